"""A model whose tokens, step latency and faults are given. Owned by the step thread while an engine uses it."""

from __future__ import annotations

import dataclasses
import math
import threading
import time
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asyncengine.errors import PrefixCacheError, ReloadError
from asyncengine.generation import SamplingParams
from asyncengine.grammar.protocol import Matcher
from asyncengine.step.adapters import NO_ADAPTER
from asyncengine.step.batch import Int32, StepBatch, StepTokens, TokenLogprobs
from asyncengine.step.limits import Limits
from asyncengine.testing import media
from asyncengine.testing.adapters import Script, ScriptedAdapter, ScriptedAdapters
from asyncengine.testing.states import ScriptedStates

_STAMP = 1 << 32
"""What the mark of an adapter is multiplied by in the "KV cache", where it is added to a token."""


def echo(prompt: Sequence[int], branch: int) -> Iterable[int]:
    """The script that answers with its prompt."""
    return prompt


def guesses(tokens: Sequence[int], end: int) -> list[tuple[int, float]]:
    """Which tokens may follow others in a beam search, and their log-probabilities, the likeliest first.

    They are ``a``, ``b``, ``c`` and the end, as likely as a hash of all tokens says.

    Args:
        tokens: Prompt and text.
        end: The token that ends a text.
    """
    weights = {token: 1 + zlib.crc32(repr([*tokens, token]).encode()) % 1000 for token in (*b"abc", end)}
    whole = sum(weights.values())
    ranked = sorted(weights, key=lambda token: -weights[token])
    return [(token, math.log(weights[token] / whole)) for token in ranked]


class DeviceLostError(RuntimeError):
    """Raised by `ScriptedModel.lose_device`: the engine takes it for the loss of the device."""


class ScriptedModel:
    """A model that plays a script.

    A request's grammar is honoured in that the script must keep to it: a token that the grammar does not allow ends its
    request with `RequestDroppedError`. Logits processors are refused, because there are no logits; biases, penalties
    and lists of tokens change nothing. A beam search finds no script, but what `guesses` makes likely.

    The hidden state of a token is ``(token id, position, 1)``, and it attends to one frame of an audio, that of its
    position, or what is left of that behind whole rounds through the frames. In the prompt, the script finds what was
    seen of images and videos and heard of audio in the place of the tokens that stand for them
    (`asyncengine.testing.media`).

    It also keeps a paged "KV cache" of its own, in which every token is written where the scheduler says, and before
    it answers it reads each sequence back through its block table: a mistake of the engine about blocks raises. With
    `Limits.kept_states`, it has a state for each sequence, too, and what a sequence goes on from is compared with what
    is in the cache. What a failed step has moved is rubbish.

    Steps may be launched ahead, as on a GPU: each takes its time after the one before, and whoever collects it waits
    without the GIL. What a step computes is what the state was when it was launched; behind one that fails, nothing
    but rubbish is computed.

    Args:
        script: What is generated.
        limits: Of the model.
        step_seconds: How long each step takes; spent without the GIL, as on a GPU.
        eos_token_id: What comes after a script.

    Attributes:
        steps: How many steps have been executed.
        batches: (rows, tokens) of each.
        closed: Whether the engine has let it go.
        under_way: How many steps were launched and not collected yet.
    """

    def __init__(self, script: Script, limits: Limits, step_seconds: float = 0.0, eos_token_id: int = 256) -> None:
        self.limits = limits
        self.steps = 0
        self.batches: list[tuple[int, int]] = []
        self.closed = False
        self.under_way = 0
        self.asleep = False
        self.weights: dict[str, Any] = {}
        self._script = script
        self._step_seconds = step_seconds
        self._eos = eos_token_id
        self._asked: dict[int, tuple[list[int], int]] = {}  # prompt and branch, unless nothing is wanted
        self._answers: dict[tuple[int, int], list[int]] = {}  # by slot and by the mark of its adapter
        self._adapters = ScriptedAdapters()
        self._tokens: dict[int, list[int]] = {}
        self._blind: set[int] = set()  # slots whose images are not known yet
        self._num_logprobs: dict[int, int] = {}
        self._searching: dict[int, SamplingParams] = {}
        self._allowed: dict[int, tuple[int, ...]] = {}
        self._matchers: dict[int, Matcher] = {}
        self._faults: list[BaseException] = []
        self._launch_faults: list[BaseException] = []
        self._last: dict[int, int] = {}  # the token that was drawn last for each slot
        self._free_at = 0.0  # when the last step that was launched will be through
        self._broken: _Flight | None = None  # a step that failed, until it is collected
        self._refuse: BaseException | None = None
        self._gate: threading.Semaphore | None = None
        self._entered = threading.Semaphore(0)
        self._cache = np.full(limits.num_blocks * limits.page_size, -1, dtype=np.int64)
        self._states: ScriptedStates | None = None
        if limits.kept_states is not None:
            self._states = ScriptedStates(limits.max_num_sequence, limits.kept_states, limits.drafted_states)

    # What a test does

    def fail_next(self, error: BaseException) -> None:
        """Lets the next step raise; one that is launched, where it is collected."""
        self._faults.append(error)

    def fail_next_launch(self, error: BaseException) -> None:
        """Lets the next launch raise."""
        self._launch_faults.append(error)

    def lose_device(self) -> None:
        """Lets the next step raise what the engine takes for the loss of the device."""
        self.fail_next(DeviceLostError("the scripted device is lost"))

    def refuse_next(self, error: BaseException) -> None:
        """Lets the next sequence's parameters be refused."""
        self._refuse = error

    def hold(self) -> None:
        """Lets each step wait, from now on, until `let` allows it."""
        self._gate = threading.Semaphore(0)

    def let(self, steps: int = 1) -> None:
        """Allows a number of steps."""
        assert self._gate is not None
        self._gate.release(steps)

    def release(self) -> None:
        """Undoes `hold`."""
        gate, self._gate = self._gate, None
        if gate is not None:
            gate.release()  # at most one step is held

    def wait_until_held(self, timeout: float = 10.0) -> bool:
        """Blocks until a held step has begun; call it from a thread."""
        return self._entered.acquire(timeout=timeout)

    # What the engine does

    def place(self, slot: int, params: SamplingParams, branch: int, prompt: Int32, output: Int32) -> None:
        """As `asyncengine.step.model.Model`."""
        if self._refuse is not None:
            error, self._refuse = self._refuse, None
            raise error
        if params.logits_processors:
            raise ValueError("the scripted model has no logits that logits_processors could change")
        self._matchers.pop(slot, None)
        if params.grammar is not None:
            self._matchers[slot] = matcher = params.grammar.matcher()
            for token_id in output.tolist():
                matcher.accept(token_id)
        self._asked.pop(slot, None)
        for key in [key for key in self._answers if key[0] == slot]:
            del self._answers[key]
        if params.max_tokens:
            self._asked[slot] = prompt.tolist(), branch
        self._tokens[slot] = [*prompt.tolist(), *output.tolist()]
        self._blind.add(slot)
        self._num_logprobs[slot] = params.num_logprobs
        self._searching.pop(slot, None)
        if params.search is not None:
            self._searching[slot] = params
        self._allowed[slot] = params.allowed_token_ids or ()

    def execute(self, batch: StepBatch) -> StepTokens:
        """As `asyncengine.step.model.Model`."""
        self._begin(batch)
        self._wait(self._step_seconds)
        if self._faults:
            self._spoil(batch)
            raise self._faults.pop(0)
        return self._compute(batch)

    def launch(self, batch: StepBatch) -> _Flight:
        """As `asyncengine.step.model.LaunchingModel`."""
        if self._launch_faults:
            raise self._launch_faults.pop(0)
        self._begin(batch)
        self.under_way += 1
        self._free_at = max(self._free_at, time.perf_counter()) + self._step_seconds
        if self._broken is not None:
            self._spoil(batch)
            return _Flight(self._free_at, StepTokens(np.full(len(batch.sample_index), -1, dtype=np.int32)))
        if self._faults:
            self._spoil(batch)
            self._broken = _Flight(self._free_at, self._faults.pop(0))
            return self._broken
        return _Flight(self._free_at, self._compute(batch))

    def collect(self, flight: _Flight) -> StepTokens:
        """As `asyncengine.step.model.LaunchingModel`."""
        self._wait(flight.until - time.perf_counter())
        self.under_way -= 1
        if flight is self._broken:
            self._broken = None
        if isinstance(flight.outcome, BaseException):
            raise flight.outcome
        return flight.outcome

    def _begin(self, batch: StepBatch) -> None:
        assert not self.closed, "a model that was let go is stepped"
        assert not self.asleep, "a model that sleeps is stepped"
        self.steps += 1
        self.batches.append((len(batch.context_lens), len(batch.token_ids)))

    def _wait(self, seconds: float) -> None:
        gate = self._gate
        if gate is not None:
            self._entered.release()
            gate.acquire()
        if seconds > 0:
            time.sleep(seconds)

    def _compute(self, batch: StepBatch) -> StepTokens:
        if batch.unknown is not None:
            token_ids = batch.token_ids.copy()
            for row in np.flatnonzero(batch.unknown).tolist():
                token_ids[batch.query_start[row]] = self._last[int(batch.sample_slots[row])]
            batch = dataclasses.replace(batch, token_ids=token_ids)
        self._write(batch)
        found: list[list[int]] = []
        if self._states is not None:
            found = [self._found(batch, row).tolist() for row in range(len(batch.context_lens))]
            self._states.move(batch, found)
        else:
            assert batch.slots is None and not len(batch.state_copies) and not len(batch.state_saves), "of no use"
        drawn = self._draw(batch)
        if self._states is not None and drawn.taken is not None:
            self._states.take(batch, found, drawn.taken.tolist())
        if batch.draft_lengths is None:
            self._last.update(zip(batch.sample_slots.tolist(), drawn.token_ids.tolist(), strict=True))
        return drawn

    def _spoil(self, batch: StepBatch) -> None:
        if self._states is not None:
            self._states.spoil(batch)

    def _write(self, batch: StepBatch) -> None:
        page_size = self.limits.page_size
        for source, to in batch.copies.tolist():
            self._cache[to * page_size : (to + 1) * page_size] = self._cache[
                source * page_size : (source + 1) * page_size
            ]
        assert len(np.unique(batch.slot_mapping)) == len(batch.slot_mapping), "two tokens are written to one place"
        cells = batch.token_ids.astype(np.int64)
        media.see(batch, cells)
        self._cache[batch.slot_mapping] = cells
        if batch.adapters is not None:
            stamps = np.array([self._adapters.stamp(index) for index in batch.adapters.tolist()])
            self._cache[batch.slot_mapping] += np.repeat(stamps, np.diff(batch.query_start)) * _STAMP

    def _found(self, batch: StepBatch, row: int) -> NDArray[np.int64]:
        """(tokens,) what is in the cache of a row, drafts included."""
        page_size = self.limits.page_size
        start, end = batch.query_start[row : row + 2]
        length = int(batch.context_lens[row] + end - start)
        places = np.arange(length)
        blocks = batch.block_tables[row, places // page_size].astype(np.int64)
        found: NDArray[np.int64] = self._cache[blocks * page_size + places % page_size]
        media.check_positions(batch, row, found % _STAMP)
        return found

    def _read(self, batch: StepBatch, row: int) -> list[int]:
        """Tokens of a row as they are in the cache, drafts included."""
        found = self._found(batch, row)
        assert self._adapters.may_read(_adapter_of(batch, row), (found // _STAMP).tolist()), "it is another adapter's"
        tokens: list[int] = (found % _STAMP).tolist()
        return tokens

    def _see(self, slot: int, found: list[int]) -> None:
        """Learns what the images of a sequence are, once; from then on they must be these."""
        if slot in self._blind:
            self._blind.discard(slot)
            tokens, known = self._tokens[slot], len(self._asked[slot][0]) if slot in self._asked else 0
            tokens[: len(found)] = media.seen(tokens[: len(found)], found[: len(tokens)])
            if slot in self._asked:
                self._asked[slot] = tokens[:known], self._asked[slot][1]

    def _answer(self, slot: int, adapter: int) -> list[int]:
        key = slot, self._adapters.stamp(adapter)
        if key not in self._answers:
            asked = self._asked.get(slot)
            script = self._adapters.script(adapter, self._script)
            self._answers[key] = [] if asked is None else list(script(*asked))
        return self._answers[key]

    def _guessed(self, found: list[int], position: int, params: SamplingParams) -> TokenLogprobs:
        """What may follow the tokens of a beam."""
        ends = () if position >= params.min_tokens else params.stop_token_ids
        may = [guess for guess in guesses(found, self._eos) if guess[0] not in ends][: params.num_candidates]
        return TokenLogprobs(may[0][1], *(tuple(each) for each in zip(*may, strict=True)))

    def _draw(self, batch: StepBatch) -> StepTokens:
        rows = np.searchsorted(batch.query_start, batch.sample_index, side="right") - 1
        token_ids: list[int] = []
        logprobs: list[TokenLogprobs | None] = []
        finished: list[int] = []
        failed: dict[int, Exception] = {}
        over: set[int] = set()  # rows of which no more tokens count
        taken = None if batch.draft_lengths is None else np.zeros(batch.num_decodes, dtype=np.int64)
        for entry, (slot, position, row) in enumerate(
            zip(batch.sample_slots.tolist(), batch.sample_positions.tolist(), rows.tolist(), strict=True)
        ):
            tokens = self._tokens[slot]
            found = self._read(batch, row)
            self._see(slot, found)
            if taken is not None and row < batch.num_decodes:
                found = found[: len(found) - int(batch.query_start[row + 1] - 1 - batch.sample_index[entry])]
                begins = batch.sample_index[entry] == batch.query_start[row]
                if not begins and (row in over or found != tokens):  # it follows a draft that was wrong
                    over.add(row)
                    token_ids.append(-1)
                    logprobs.append(None)
                    continue
                taken[row] += 1
            searching = self._searching.get(slot)
            if searching is not None:  # which beam has the slot is not told
                known = len(self._asked[slot][0])
                assert len(found) == known + position
                tokens[known:] = found[known:]
            assert found == tokens, f"the cache of slot {slot} has {found}, the sequence {tokens}"
            if searching is not None:
                guessed = self._guessed(found, position, searching)
                tokens.append(guessed.top_ids[0])
                token_ids.append(guessed.top_ids[0])
                logprobs.append(guessed)
                continue
            token_id = self._eos
            try:
                answer = self._answer(slot, _adapter_of(batch, row))
                token_id = answer[position] if position < len(answer) else self._eos
                matcher = self._matchers.get(slot)
                if matcher is not None and _accept(matcher, token_id):
                    finished.append(len(token_ids))
                    over.add(row)
            except Exception as error:
                failed[len(token_ids)] = error
                over.add(row)
                if taken is not None and row < batch.num_decodes:
                    taken[row] -= 1
            tokens.append(token_id)
            token_ids.append(token_id)
            wanted = self._num_logprobs[slot]
            others = (other for other in self._allowed[slot] if other != token_id)  # less likely by a factor of e
            top = (token_id, *others)[: max(wanted, 0)]
            tops = tuple(-float(position) - (place > 0) for place in range(len(top)))
            logprobs.append(TokenLogprobs(-float(position), top, tops) if wanted >= 0 else None)
        some = any(entry is not None for entry in logprobs)
        scores = [
            TokenLogprobs(-float(position), (token_id,) * min(top, 1), (-float(position),) * min(top, 1))
            for position, token_id, top in zip(
                batch.positions[batch.score_index].tolist(),
                batch.score_token_ids.tolist(),
                batch.score_tops.tolist(),
                strict=True,
            )
        ]
        states = np.stack([batch.token_ids, batch.positions, np.ones(len(batch.token_ids))], axis=1)
        pooled = [states[first:end].sum(axis=0) for first, end in batch.pool_spans.tolist()]
        attention = (
            np.eye(frames, dtype=np.float32)[None, batch.positions[first:end] % frames]
            for first, end, frames in (() if batch.attention_spans is None else batch.attention_spans.tolist())
        )
        return StepTokens(
            np.array(token_ids, dtype=np.int32),
            logprobs if some else None,
            tuple(finished),
            failed,
            scores=scores,
            pooled=np.array(pooled, dtype=np.float32),
            attention=tuple(attention),
            taken=taken,
        )

    def device_lost(self, error: BaseException) -> bool:
        """As `asyncengine.step.model.Model`."""
        return isinstance(error, DeviceLostError)

    def sleep(self) -> None:
        """As `asyncengine.step.model.Model`."""
        self.asleep = True
        self._cache[:] = -1
        if self._states is not None:
            self._states.clear()

    def wake(self) -> None:
        """As `asyncengine.step.model.Model`."""
        self.asleep = False

    def put_adapter(self, index: int, prepared: ScriptedAdapter) -> None:
        """As `asyncengine.step.model.AdaptableModel`."""
        self._adapters.put(index, prepared)

    def remove_adapter(self, index: int) -> None:
        """As `asyncengine.step.model.AdaptableModel`."""
        self._adapters.remove(index)

    def kept_parts(self) -> Mapping[str, int]:
        """As `asyncengine.step.model.KeepingModel`."""
        return {"cells": self.limits.page_size * self._cache.itemsize}

    def read_blocks(self, blocks: Int32) -> NDArray[np.uint8]:
        """As `asyncengine.step.model.KeepingModel`."""
        self._check_kept()
        return self._cache.reshape(self.limits.num_blocks, -1)[blocks].view(np.uint8)

    def write_blocks(self, blocks: Int32, rows: NDArray[np.uint8]) -> None:
        """As `asyncengine.step.model.KeepingModel`."""
        self._check_kept()
        self._cache.reshape(self.limits.num_blocks, -1)[blocks] = rows.view(np.int64)

    def _check_kept(self) -> None:
        assert not self.asleep, "a cache that sleeps is read or written"
        if self.weights:
            raise PrefixCacheError("the weights were replaced")

    def update_weights(self, weights: Mapping[str, Any]) -> None:
        """Keeps them; a weight that is None is refused."""
        for name, value in weights.items():
            if value is None:
                raise ReloadError(f"weight {name!r} is None")
        self.weights.update(weights)

    def debug_call(self, name: str, args: tuple[Any, ...]) -> list[Any]:
        """Calls the method of this name."""
        return [getattr(self, name)(*args)]

    def close(self) -> None:
        """As `asyncengine.step.model.Model`."""
        self.closed = True


@dataclass(frozen=True, slots=True, eq=False)
class _Flight:
    """A step that was launched: when it will be through, and what comes of it."""

    until: float
    outcome: StepTokens | BaseException


def _adapter_of(batch: StepBatch, row: int) -> int:
    return NO_ADAPTER if batch.adapters is None else int(batch.adapters[row])


def _accept(matcher: Matcher, token_id: int) -> bool:
    """Whether the text is complete with the token.

    Raises:
        ValueError: The grammar does not allow it.
    """
    row = np.zeros(token_id // 32 + 1, dtype=np.int32)
    matcher.fill(row)
    if not row[token_id // 32] >> (token_id % 32) & 1:
        raise ValueError(f"the script's token {token_id} ({bytes([token_id % 256])!r}) is not allowed by the grammar")
    matcher.accept(token_id)
    return matcher.finished
