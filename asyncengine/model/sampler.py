"""Turns logits into tokens. Owner: the model runner, on the step thread.

The order is logit bias; presence, frequency and repetition penalty; the requests' own processors; masks (min-tokens,
allowed tokens, bad words, grammar); temperature; top-k; min-p; top-p; draw, in float32. What a row draws is bitwise
independent of the other rows of the batch, of its slot and of preemption.

The settings of the slots are numpy arrays, because it is the host that decides which kernels run: rows are split by
what they need (greedy; top-k; top-p alone; neither), and nothing runs for a feature that no row of the batch has.

A row that cannot be drawn from (NaN or +inf among its logits, nothing but -inf, or a temperature so small that the
scaled logits overflow) raises nothing and disturbs no other row: the likeliest token is taken, NaN counts as -inf,
and the result is token 0 where nothing is left.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from asyncengine.generation import LogprobsMode, SamplingParams
from asyncengine.model import token_draw
from asyncengine.model.device_copy import at_hand, to_device
from asyncengine.model.random_stream import uniforms
from asyncengine.model.slot_entries import SlotEntries
from asyncengine.model.token_draw import DrawKind
from asyncengine.model.token_filters import Kept, is_sound, narrow, nucleus, plain
from asyncengine.model.token_logprobs import Described
from asyncengine.model.token_masks import TokenMasks
from asyncengine.model.token_penalties import TokenPenalties
from asyncengine.model.token_ranking import argmax
from asyncengine.model.user_processors import UserProcessors
from asyncengine.step.batch import NO_TOKENS, StepTokens, TokenLogprobs

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]

_BLOCK = 1 << 20  # logits
_MODES = get_args(LogprobsMode)
_SEARCHED = len(_MODES)
"""Beside the modes: a beam's log-probabilities, which transformers biases, penalises and masks in place of logits."""
_NO_ROWS: Int64 = np.empty(0, np.int64)
_FLOAT32_MAX = float(np.finfo(np.float32).max)


class _Way(enum.IntEnum):
    """How a row is drawn. It depends on the row's own settings only."""

    GREEDY = 0
    NARROW = 1
    NUCLEUS = 2
    PLAIN = 3


@dataclass(frozen=True, slots=True)
class Drawn:
    """What was drawn for a batch, on the device, and what the host needs to make `StepTokens` of it.

    Attributes:
        tokens: (rows,) int64.
        slots: (rows,) as given, as are the positions.
        masked: Rows that have masks.
        follows: Whether what follows the tokens on the host goes on by them.
        failed: Rows that could not be drawn, and why.
        described: Log-probabilities of those rows that asked for them.
    """

    tokens: Tensor
    slots: Int64
    positions: Int64
    masked: Int64
    follows: bool
    failed: dict[int, Exception]
    described: list[Described]

    @property
    def tensors(self) -> list[Tensor]:
        """All that the host must have."""
        return [self.tokens, *(tensor for part in self.described for tensor in (part.ids, part.values))]


class Sampler:
    """Draws the next token of each sequence of a batch.

    Args:
        num_slots: Slots are 0..num_slots - 1. A slot in which nothing was placed is greedy.
        vocab_size: Width of the logits.
        device: Where the logits are.
    """

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._way = np.full(num_slots, _Way.GREEDY, np.int8)
        self._key = np.zeros(num_slots, np.uint64)
        self._scale = np.ones(num_slots, np.float32)  # one over the temperature
        self._top_k = np.zeros(num_slots, np.int64)
        self._min_p = np.zeros(num_slots, np.float32)
        self._top_p = np.ones(num_slots, np.float64)
        self._min_tokens = np.zeros(num_slots, np.int64)
        self._num_logprobs = np.full(num_slots, -1, np.int64)
        self._described = np.zeros(num_slots, np.int8)  # which log-probabilities are wanted, of `_MODES`
        self._special = np.zeros(num_slots, np.bool_)  # needs more than temperature and filters
        self._bias = SlotEntries(num_slots)
        self._forbidden = SlotEntries(num_slots)
        self._penalties = TokenPenalties(num_slots, vocab_size, device)
        self._masks = TokenMasks(num_slots, vocab_size, device)
        self._processors = UserProcessors(num_slots)

    def place(self, slot: int, params: SamplingParams, branch: int, prompt_ids: Int32, output_ids: Int32) -> None:
        """A sequence occupies the slot, replacing what was there. An exception leaves the slot free.

        Args:
            slot: Of the sequence, until it is released or replaced.
            params: Of its request.
            branch: Which branch of the request it is; it draws from the stream seed + branch.
            prompt_ids: (prompt tokens,)
            output_ids: (generated tokens,) not empty after a preemption.
        """
        self.release(slot)
        try:
            with torch.inference_mode():
                self._penalties.put(slot, params, prompt_ids, output_ids)
            bias = [(token, value) for token, value in params.logit_bias if 0 <= token < self._vocab_size]
            if bias:
                self._bias.put(slot, [token for token, _ in bias], [value for _, value in bias])
            self._processors.put(slot, params, branch, prompt_ids, output_ids)
            if not self._masks.put(slot, params, output_ids) and params.min_tokens > len(output_ids):
                stops = [token for token in params.stop_token_ids if 0 <= token < self._vocab_size]
                self._forbidden.put(slot, stops, [-np.inf] * len(stops))
            self._key[slot] = (params.seed + branch) % 2**64
            self._scale[slot] = min(1 / params.temperature, _FLOAT32_MAX) if params.temperature else 1.0
            self._top_k[slot] = min(params.top_k, self._vocab_size)
            self._min_p[slot] = params.min_p
            self._top_p[slot] = params.top_p
            self._min_tokens[slot] = params.min_tokens
            self._num_logprobs[slot] = params.num_logprobs
            self._described[slot] = _MODES.index(params.logprobs_mode)
            if params.search is not None:
                self._num_logprobs[slot] = max(params.num_logprobs, params.num_candidates)
                self._described[slot] = _SEARCHED
            self._way[slot] = _way(params)
            described = self._num_logprobs[slot] >= 0
            self._special[slot] = described or bool(bias) or bool(self.remembers(np.array([slot]))[0])
        except BaseException:
            self.release(slot)
            raise

    def release(self, slot: int) -> None:
        """Frees what the slot's sequence holds; does nothing to a free slot."""
        self._way[slot] = _Way.GREEDY
        self._num_logprobs[slot] = -1
        self._min_tokens[slot] = 0
        self._special[slot] = False
        self._bias.remove(slot)
        self._forbidden.remove(slot)
        self._penalties.remove(slot)
        self._masks.remove(slot)
        self._processors.remove(slot)

    def remembers(self, slots: Int64) -> NDArray[np.bool_]:
        """(rows,) whether what a slot draws depends on the tokens that it has drawn before."""
        return self._penalties.has(slots) | self._masks.has(slots) | self._processors.has(slots)

    def kind(self, slots: Int64, positions: Int64) -> DrawKind | None:
        """What a captured draw of these rows needs to be; None where there is none that could do what they ask for."""
        if self._special[slots].any() or (positions < self._min_tokens[slots]).any():
            return None
        ways = set(self._way[slots].tolist())
        if not ways - {_Way.GREEDY}:
            return DrawKind.GREEDY
        if _Way.NARROW not in ways:
            return DrawKind.NUCLEUS if _Way.NUCLEUS in ways else DrawKind.PLAIN
        many = int(self._top_k[slots[self._way[slots] == _Way.NARROW]].max()) > token_draw.MOST_CANDIDATES
        return None if many or _Way.NUCLEUS in ways else DrawKind.NARROW

    def settings(self, kind: DrawKind | None, slots: Int64, positions: Int64, rows: int) -> dict[str, Int32]:
        """What a draw of some kind takes from the host, of these rows and padded to `rows` ones."""
        if kind is None or kind is DrawKind.GREEDY:
            return token_draw.sections(rows)
        ways = self._way[slots]
        top_k = np.where(ways == _Way.NARROW, self._top_k[slots], 0)
        return token_draw.sections(
            rows,
            u=uniforms(self._key[slots], positions),
            top_p=self._top_p[slots],
            scale=self._scale[slots],
            min_p=self._min_p[slots],
            top_k=np.where(ways == _Way.GREEDY, token_draw.GREEDY_ROW, top_k),
        )

    def sample(self, logits: Tensor, slots: Int64, positions: Int64) -> StepTokens:
        """Draws one token for each row, waits for them, and counts them for the slots' penalties.

        Log-probabilities are of the untouched logits (raw), of those after bias, penalties and masks (masked), or of
        the distribution that was drawn from (processed; for a greedy row the same as masked). A token with
        probability 0 is not listed among the likeliest, so there may be fewer of them than were asked for. Of a beam of
        a search they are of the untouched logits and then biased, penalised and masked, as transformers does it.

        A row whose grammar, masks or processors fail is drawn from like any other and listed as failed.

        Args:
            logits: (rows, vocab) of any float type; may be overwritten.
            slots: (rows,) which slot each row is of. One that `remembers` appears once.
            positions: (rows,) how many tokens the slot's sequence has generated before this one.
        """
        if not len(slots):
            return StepTokens(NO_TOKENS)
        drawn = self.draw(logits, slots, positions)
        return self.finish(drawn, [tensor.cpu().numpy() for tensor in drawn.tensors])

    @staticmethod
    def drawn(tokens: Tensor, slots: Int64, positions: Int64) -> Drawn:
        """The first half of `sample`, of a draw that has a kind: its (rows,) int64 tokens are there."""
        return Drawn(tokens, slots, positions, _NO_ROWS, False, {}, [])

    def draw(self, logits: Tensor, slots: Int64, positions: Int64, follows: bool = True) -> Drawn:
        """The first half of `sample`: queues what the device does, and waits for nothing there.

        Args:
            logits: As of `sample`.
            slots: As of `sample`.
            positions: As of `sample`.
            follows: Whether `finish` goes on by the tokens, which must then come before anything else happens to the
                slots. Without, a slot may belong to another sequence by then; none may have a grammar, bad words or
                processors.
        """
        with torch.inference_mode():
            ways = self._way[slots]
            asked = np.flatnonzero(self._num_logprobs[slots] >= 0)
            raw = allowed_rows = processed = searched = asked
            if len(asked):
                modes = self._described[slots[asked]]
                raw, allowed_rows, processed, searched = (asked[modes == mode] for mode in range(_SEARCHED + 1))
            raw_logits = self._rows(logits, raw).to(torch.float32, copy=True) if len(raw) else None

            failed: dict[int, Exception] = {}
            masked = self._masks.rows(slots) if len(self._masks) else _NO_ROWS
            if len(searched):
                logits = logits.float()
                logprobs = torch.log_softmax(self._rows(logits, searched), dim=-1)
                if len(searched) == len(slots):
                    logits = logprobs
                else:
                    logits[to_device(searched, self._device)] = logprobs
            # Before anything waits for the logits: the device may still be computing them.
            bits = self._masks.fill(masked, slots, positions, failed) if len(masked) else None
            adjusts = bool(len(self._bias) or len(self._forbidden) or len(self._penalties) or len(self._processors))
            if adjusts or bits is not None or ways.any():
                logits = logits.float()
            if adjusts:
                self._adjust(logits, slots, positions, failed)
            if bits is not None:
                self._masks.apply(logits, masked, bits)
            allowed = self._rows(logits, allowed_rows).to(torch.float32, copy=True) if len(allowed_rows) else None
            log_weights = self._log_weights(logits, slots, processed, ways) if len(processed) else None
            summed = self._rows(logits, searched) if len(searched) else None  # nothing is drawn of these

            tokens = self._draw(logits, slots, positions, ways)
            if len(self._penalties):
                self._penalties.record(slots, tokens)
            described = [
                Described.of(values, self._rows(tokens, rows), rows, self._num_logprobs[slots[rows]])
                for rows, values in ((raw, raw_logits), (allowed_rows, allowed), (processed, log_weights))
                if values is not None
            ]
            if summed is not None:
                of = self._rows(tokens, searched)
                described.append(Described.as_they_are(summed, of, searched, self._num_logprobs[slots[searched]]))
            return Drawn(tokens, slots, positions, masked, follows, failed, described)

    def finish(self, drawn: Drawn, tensors: Sequence[NDArray[Any]]) -> StepTokens:
        """The second half: what the host makes of it.

        Args:
            drawn: What was drawn.
            tensors: `drawn.tensors`, on the host.
        """
        slots, positions, masked, failed = drawn.slots, drawn.positions, drawn.masked, drawn.failed
        token_ids = tensors[0].astype(np.int32)
        finished: tuple[int, ...] = ()
        forced: dict[int, list[int]] = {}
        if drawn.follows:
            if len(masked):
                finished, forced = self._masks.accept(masked, slots, positions, token_ids, failed)
                self._record(slots, forced)
            if len(self._processors):
                self._processors.record(slots, token_ids)
        if not drawn.described:
            return StepTokens(token_ids, None, finished, failed, forced)
        logprobs: list[TokenLogprobs | None] = [None] * len(slots)
        for described, ids, values in zip(drawn.described, tensors[1::2], tensors[2::2], strict=True):
            for row, entry in zip(described.rows.tolist(), described.listed(ids, values), strict=True):
                logprobs[row] = entry
        return StepTokens(token_ids, logprobs, finished, failed, forced)

    def _record(self, slots: Int64, forced: dict[int, list[int]]) -> None:
        """Counts tokens that were not drawn for the penalties of their slots."""
        if len(self._penalties):
            for row, tokens in forced.items():
                for token_id in tokens:
                    self._penalties.record(slots[row : row + 1], torch.tensor([token_id], device=self._device))

    def _adjust(self, logits: Tensor, slots: Int64, positions: Int64, failed: dict[int, Exception]) -> None:
        """Bias, penalties, processors and min-tokens mask, in place; only the entries that they name are touched."""
        if len(self._bias):
            rows, ids, values = self._bias.of_batch(slots)
            if len(rows):
                at = to_device(np.stack([rows, ids]), self._device)
                logits[at[0], at[1]] += to_device(values, self._device)
        if len(self._penalties):
            self._penalties.apply(logits, slots)
        if len(self._processors):
            self._processors.apply(logits, slots, failed)
        if len(self._forbidden):
            rows, ids, values = self._forbidden.of_batch(slots, positions < self._min_tokens[slots])
            if len(rows):
                at = to_device(np.stack([rows, ids]), self._device)
                logits[at[0], at[1]] = to_device(values, self._device)

    def _draw(self, logits: Tensor, slots: Int64, positions: Int64, ways: NDArray[np.int8]) -> Tensor:
        """(rows,) int64 tokens of adjusted logits, which are overwritten."""
        if not ways.any():
            return argmax(logits)
        u = uniforms(self._key[slots], positions)
        tokens = torch.empty(len(slots), dtype=torch.int64, device=self._device)
        for way in set(ways.tolist()):
            for rows in self._blocks(np.flatnonzero(ways == way)):
                part = self._rows(logits, rows)
                if way == _Way.GREEDY:
                    drawn = argmax(part)
                else:
                    drawn = self._draw_sampled(part, slots[rows], to_device(u[rows, None], self._device), way)
                if len(rows) == len(slots):
                    return drawn
                tokens[to_device(rows, self._device)] = drawn
        return tokens

    def _draw_sampled(self, logits: Tensor, slots: Int64, u: Tensor, way: int) -> Tensor:
        sound = is_sound(logits, self._scale_of(slots))
        # Only on the CPU can the host look without waiting.
        likeliest = argmax(logits) if not at_hand(logits) or not sound.all() else None
        parts = self._keep(logits, slots, way)
        if parts[0].rows is None:
            drawn = parts[0].draw(u)
        else:
            drawn = torch.empty(len(slots), dtype=torch.int64, device=self._device)
            for part in parts:
                drawn[part.rows] = part.draw(u)
        return drawn if likeliest is None else torch.where(sound, drawn, likeliest)

    def _keep(self, logits: Tensor, slots: Int64, way: int) -> list[Kept]:
        """What rows of one way may draw; their logits are overwritten."""
        scale = self._scale_of(slots)
        min_p = self._column(self._min_p, slots) if self._min_p[slots].any() else None
        if way == _Way.PLAIN:
            return plain(logits, scale, min_p)
        top_p = self._column(self._top_p, slots)
        if way == _Way.NUCLEUS:
            return nucleus(logits, scale, min_p, top_p)
        top_k = self._top_k[slots]
        return narrow(logits, scale, to_device(top_k[:, None], self._device), int(top_k.max()), min_p, top_p)

    def _log_weights(self, logits: Tensor, slots: Int64, rows: Int64, ways: NDArray[np.int8]) -> Tensor:
        """The logarithms, up to a constant for each row, of what these rows draw from: (len(rows), vocab) float32.

        The rows are copied and filtered beside the draw; the result is the same, bit for bit.
        """
        result = self._rows(logits, rows).clone()
        for way in set(ways[rows].tolist()):
            if way == _Way.GREEDY:
                continue
            mine = np.flatnonzero(ways[rows] == way)
            own, at = slots[rows[mine]], to_device(mine, self._device)
            scale = self._scale_of(own)
            values = result[at] if scale is None else result[at] * scale
            if way != _Way.PLAIN or self._min_p[own].any():
                for part in self._keep(result[at], own, way):
                    where = slice(None) if part.rows is None else part.rows
                    values[where] = values[where].masked_fill(~part.mask(self._vocab_size), -torch.inf)
            result[at] = values
        return result

    def _scale_of(self, slots: Int64) -> Tensor | None:
        return None if (self._scale[slots] == 1).all() else self._column(self._scale, slots)

    def _column(self, settings: NDArray[np.floating], slots: Int64) -> Tensor:
        return to_device(settings[slots, None], self._device)

    def _blocks(self, rows: Int64) -> list[Int64]:
        """Rows in blocks whose intermediate results stay in the processor's cache; all in one on other devices."""
        size = max(1, _BLOCK // self._vocab_size) if self._device.type == "cpu" else len(rows)
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def _rows(self, values: Tensor, rows: Int64) -> Tensor:
        """Some rows, not none and in rising order, of values: a view where they are neighbours, a copy otherwise."""
        first, last = int(rows[0]), int(rows[-1])
        if last - first + 1 == len(rows):
            return values[first : last + 1]
        return values[to_device(rows, self._device)]


def _way(params: SamplingParams) -> _Way:
    if params.temperature == 0:
        return _Way.GREEDY
    if params.top_k > 0:
        return _Way.NARROW
    return _Way.NUCLEUS if params.top_p < 1 else _Way.PLAIN
