"""Which tokens a slot may draw: grammar, allowed tokens, bad words, min-tokens. Owner: the sampler, on the step thread.

The masks of a batch are bits, filled on the host while the device computes the logits; they reach the device packed,
and only the rows that have a mask are touched.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from asyncengine.generation import SamplingParams
from asyncengine.grammar.bits import num_words, row_of
from asyncengine.model.device_copy import to_device

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]


# For each byte of a mask, the most that eight logits may be: +inf or -inf. A minimum with these takes a tenth of the
# time of a `masked_fill` on the CPU.
_LIMITS = np.where(np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"), np.inf, -np.inf)
_LIMITS = _LIMITS.astype(np.float32)


class _SlotMask:
    """The masks of one slot, and what they depend on."""

    __slots__ = (
        "_allowed",
        "_bad",
        "_ends",
        "_error",
        "_ids",
        "_ignore_ends",
        "_jumps",
        "_matcher",
        "_max_tokens",
        "_min_tokens",
        "_ready",
        "_stops",
    )

    def __init__(self, params: SamplingParams, output: Int32, words: int) -> None:
        allowed = params.allowed_token_ids
        self._allowed = None if allowed is None else row_of(allowed, words)
        self._bad = _by_beginning(params.bad_words)
        self._min_tokens = params.min_tokens
        self._stops = row_of(params.stop_token_ids, words)
        self._ids: list[int] = output.tolist() if params.bad_words else []
        self._matcher = None if params.grammar is None else params.grammar.matcher()
        self._ends = row_of(() if params.grammar is None else params.grammar.end_token_ids, words)
        self._ignore_ends = params.ignore_eos
        self._jumps = params.jumps
        self._max_tokens = params.max_tokens
        self._error: BaseException | None = None  # of a token that was not delivered yet
        self._ready: Int32 | None = None  # the next row, if `forced` had to look at it
        if self._matcher is not None:
            for token_id in output.tolist():
                self._matcher.accept(token_id)

    def fill(self, row: Int32, position: int) -> None:
        """Writes which tokens may be drawn.

        Args:
            row: (words,) as in `asyncengine.grammar.bits`.
            position: How many tokens were generated before.

        Raises:
            ValueError: None may.
        """
        if self._error is not None:
            raise self._error
        if self._ready is not None:
            row[:], self._ready = self._ready, None
            return
        if self._matcher is None:
            row[:] = -1
        else:
            self._matcher.fill(row)
            if not (row & ~self._ends).any() and row.any():
                return  # the text is complete; nothing may keep it from ending
            if self._ignore_ends:
                row &= ~self._ends
        by_grammar = row.copy()
        if self._allowed is not None:
            row &= self._allowed
        if position < self._min_tokens:
            row &= ~self._stops
        if self._bad and (bad := self._forbidden_now()):
            row &= ~row_of(bad, len(row))
        if not row.any():
            if self._matcher is None:
                raise ValueError("no token may be drawn: allowed_token_ids, bad_words and min_tokens forbid all")
            if by_grammar.any():
                raise ValueError("no token that the grammar allows is left by the request's other masks")
            raise ValueError("the grammar allows no token")

    def _forbidden_now(self) -> list[int]:
        """The last tokens of bad words all of whose other tokens were just drawn."""
        ids = self._ids
        found: list[int] = []
        for size, words in self._bad.items():
            if size <= len(ids):
                found += words.get(tuple(ids[len(ids) - size :]), ())
        return found

    def accept(self, token_id: int) -> bool:
        """Goes on by one token; returns whether the text is complete."""
        if self._bad:
            self._ids.append(token_id)
        if self._matcher is None:
            return False
        self._matcher.accept(token_id)
        return self._matcher.finished

    def forced(self, position: int, words: int) -> tuple[list[int], bool]:
        """Goes on by the tokens about which there is no choice.

        Args:
            position: How many tokens were generated.
            words: Of a row.

        Returns:
            The tokens, and whether the text is complete with them.
        """
        tokens: list[int] = []
        matcher = self._matcher
        while self._jumps and matcher is not None and position + len(tokens) < self._max_tokens:
            try:
                if not matcher.forces:
                    break
                row = np.zeros(words, np.int32)
                self.fill(row, position + len(tokens))
                token_id = _only_bit(row)
                if token_id is None:
                    self._ready = row
                    break
                finished = self.accept(token_id)
            except BaseException as error:  # to be told where the token would have been drawn
                self._error = error
                break
            tokens.append(token_id)
            if finished:
                return tokens, True
        return tokens, False


class TokenMasks:
    """The masks of all slots that have one.

    Args:
        num_slots: Slots are 0..num_slots - 1.
        vocab_size: Width of the logits.
        device: Where the logits are.
    """

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._has = np.zeros(num_slots, np.bool_)
        self._masks: dict[int, _SlotMask] = {}

    def __len__(self) -> int:
        return len(self._masks)

    def put(self, slot: int, params: SamplingParams, output: Int32) -> bool:
        """Gives a slot its masks, min-tokens among them, where the request has others; returns whether it has.

        Raises:
            Exception: The grammar does not take what was generated before.
        """
        if params.grammar is None and params.allowed_token_ids is None and not params.bad_words:
            return False
        try:
            self._masks[slot] = _SlotMask(params, output, num_words(self._vocab_size))
        except BaseException as error:
            raise _failure(error) from error
        self._has[slot] = True
        return True

    def remove(self, slot: int) -> None:
        """Forgets a slot's masks; does nothing where there are none."""
        if self._masks.pop(slot, None) is not None:
            self._has[slot] = False

    def has(self, slots: Int64) -> NDArray[np.bool_]:
        """(rows,) whether each slot has masks."""
        return self._has[slots]

    def rows(self, slots: Int64) -> Int64:
        """Which rows of a batch have masks."""
        return np.flatnonzero(self._has[slots])

    def fill(self, rows: Int64, slots: Int64, positions: Int64, failed: dict[int, Exception]) -> Int32:
        """(len(rows), words) the masks of these rows of a batch; where one fails, all bits are set."""
        filled = np.zeros((len(rows), num_words(self._vocab_size)), np.int32)
        for bits, row in zip(filled, rows.tolist(), strict=True):
            try:
                self._masks[int(slots[row])].fill(bits, int(positions[row]))
            except BaseException as error:
                failed[row] = _failure(error)
                bits[:] = -1
        return filled

    def apply(self, logits: Tensor, rows: Int64, filled: Int32) -> None:
        """Takes what is not allowed out of some rows of logits (rows, vocab) of float32, in place."""
        if self._device.type == "cpu":
            limits = torch.from_numpy(np.take(_LIMITS, filled.view(np.uint8), axis=0).reshape(len(filled), -1))
            for row, limit in zip(rows.tolist(), limits, strict=True):
                torch.minimum(logits[row], limit[: self._vocab_size], out=logits[row])
            return
        words = to_device(filled, self._device).unsqueeze(-1)
        each = (words >> torch.arange(32, device=self._device, dtype=torch.int32)) & 1
        forbidden = each.flatten(1)[:, : self._vocab_size] == 0
        if len(rows) == len(logits):
            logits.masked_fill_(forbidden, -torch.inf)
        else:
            at = to_device(rows, self._device)
            logits[at] = logits[at].masked_fill(forbidden, -torch.inf)

    def accept(
        self, rows: Int64, slots: Int64, positions: Int64, token_ids: Int32, failed: dict[int, Exception]
    ) -> tuple[tuple[int, ...], dict[int, list[int]]]:
        """Goes on by the drawn tokens, and by those after them about which there is no choice.

        Returns:
            The rows whose text is complete, and the further tokens of each row that has some.
        """
        finished, forced = [], {}
        for row in rows.tolist():
            if row in failed:
                continue
            mask = self._masks[int(slots[row])]
            try:
                complete = mask.accept(int(token_ids[row]))
            except BaseException as error:
                failed[row] = _failure(error)
                continue
            if not complete:
                tokens, complete = mask.forced(int(positions[row]) + 1, num_words(self._vocab_size))
                if tokens:
                    forced[row] = tokens
            if complete:
                finished.append(row)
        return tuple(finished), forced


def _failure(error: BaseException) -> Exception:
    """What to tell of it. Grammars are libraries in other languages, whose panics are no `Exception`."""
    return error if isinstance(error, Exception) else RuntimeError(f"the grammar failed: {error!r}")


def _only_bit(row: Int32) -> int | None:
    """The one bit that is set; None if there are others."""
    at = np.flatnonzero(row)
    if len(at) != 1:
        return None
    word = int(row.view(np.uint32)[at[0]])
    return None if word & (word - 1) else int(at[0]) * 32 + word.bit_length() - 1


def _by_beginning(words: tuple[tuple[int, ...], ...]) -> dict[int, dict[tuple[int, ...], list[int]]]:
    """Bad words by the number of their tokens but the last, then by these; what is left are the last tokens."""
    found: dict[int, dict[tuple[int, ...], list[int]]] = {}
    for word in words:
        found.setdefault(len(word) - 1, {}).setdefault(word[:-1], []).append(word[-1])
    return found
