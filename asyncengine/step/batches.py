"""What a step's batch is built from: the columns of the slot table, turned into rows. Owned by the step thread."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from asyncengine.instructions import AlignmentQuestion, NewRequest, PromptQuestion
from asyncengine.media import MediaPart
from asyncengine.step.batch import NO_PAIRS, NO_SAVES, Int32, Int64, StepBatch
from asyncengine.step.decode_rows import DecodeRows
from asyncengine.step.drafting import Drafts
from asyncengine.step.plan import Chunk, StateMoves
from asyncengine.step.sequence import SequenceState
from asyncengine.step.slots import SlotTable


@dataclass(frozen=True, slots=True)
class _Placed:
    """A piece of prefill, where it is in the batch.

    Attributes:
        chunk: The piece.
        start: Where its tokens begin among those of the batch.
        computed: Where they begin in their sequence.
    """

    chunk: Chunk
    start: int
    computed: int

    @property
    def end(self) -> int:
        """Where they end in their sequence."""
        return self.computed + self.chunk.count

    @property
    def new(self) -> NewRequest:
        """Whose prompt they are of."""
        return self.chunk.sequence.request.new


class Batches:
    """Builds them.

    Args:
        slots: What is known of the sequences.
    """

    def __init__(self, slots: SlotTable) -> None:
        self._slots = slots

    def of(
        self,
        decoding: DecodeRows,
        chunks: list[Chunk],
        copies: Int64,
        drafts: Drafts | None,
        ahead: bool,
        states: StateMoves | None = None,
    ) -> StepBatch:
        """The batch of a step.

        Args:
            decoding: The sequences that decode.
            chunks: What is prefilled.
            copies: (C, 2) blocks to copy first.
            drafts: Of the rows that decode.
            ahead: Whether the step before is still computed.
            states: What is done with states; None if the model keeps none.
        """
        slots, page_size = self._slots, self._slots.page_size
        decodes = len(decoding.slots)
        rows = np.concatenate([decoding.slots, np.array([c.sequence.slot for c in chunks], dtype=np.int64)])
        context = slots.num_computed[rows]
        counts = np.ones(len(rows), dtype=np.int64)
        counts[decodes:] = [chunk.count for chunk in chunks]
        if drafts is not None:
            counts[:decodes] += drafts.lengths
        query_start = np.zeros(len(rows) + 1, dtype=np.int32)
        np.cumsum(counts, out=query_start[1:])
        token_rows = np.repeat(rows, counts)
        offsets = np.arange(query_start[-1], dtype=np.int64) - np.repeat(query_start[:-1], counts)
        positions = np.repeat(context, counts) + offsets
        token_ids = slots.tokens[token_rows, positions]
        decoded = int(query_start[decodes])
        if drafts is not None:
            token_ids[:decoded][offsets[:decoded] > 0] = drafts.token_ids
        rotated, shifts = positions.astype(np.int32), slots.shifts_of(rows)
        if shifts is not None:
            rotated += np.repeat(shifts, counts).astype(np.int32)
        starts, computed = query_start[decodes:-1].tolist(), context[decodes:].tolist()
        placed = [_Placed(*each) for each in zip(chunks, starts, computed, strict=True)]
        more: dict[str, Any] = {"positions": rotated}
        if any(chunk.num_scored for chunk in chunks):
            more |= self._looked_at([each for each in placed if each.chunk.num_scored])
        if any(chunk.pools for chunk in chunks):
            more["pool_spans"] = _pool_spans(placed)
        if any(each.new.media is not None for each in placed):
            more |= _media(placed, rotated, positions)
            for part in more["media"]:
                token_ids[part.tokens] = part.item.token_id
        if any(each.new.second is not None for each in placed):
            more["token_types"] = _types(placed, len(token_ids))
        return StepBatch(
            token_ids=token_ids,
            query_start=query_start,
            context_lens=context.astype(np.int32),
            block_tables=slots.blocks[rows, : slots.num_blocks[rows].max()],
            slot_mapping=slots.blocks[token_rows, positions // page_size].astype(np.int64) * page_size
            + positions % page_size,
            copies=copies,
            num_decodes=decodes,
            draft_lengths=None if drafts is None else drafts.lengths,
            unknown=decoding.unknown() if ahead else None,
            adapters=slots.adapters_of(rows),
            sources=slots.sources_of(rows),
            slots=None if states is None else rows,
            state_copies=NO_PAIRS if states is None else states.copies,
            state_saves=NO_SAVES if states is None else states.saves,
            **self._samples(placed, token_rows[:decoded], positions),
            **more,
        )

    def _samples(self, placed: list[_Placed], decoding: Int64, positions: Int64) -> dict[str, Any]:
        """The fields of the batch that say whose token is drawn from what.

        Args:
            placed: What is prefilled.
            decoding: (decoded,) the slots of the tokens that rows which decode have; each is drawn from.
            positions: (tokens,) the places of all tokens in their sequences.
        """
        index, slots = np.arange(len(decoding), dtype=np.int64), decoding
        drawing = [(each, branch) for each in placed for branch in each.chunk.branches]
        if drawing:
            last = np.array([each.start + each.chunk.count - 1 for each, _ in drawing], dtype=np.int64)
            index = np.append(index, last)
            slots = np.append(slots, np.array([branch.slot for _, branch in drawing], dtype=np.int64))
        generated = positions[index] + 1 - self._slots.prompt_tokens[slots]
        if drawing:
            # A branch about to be born has a slot but no tokens in it yet.
            generated[len(decoding) :] *= np.array([branch.state is not SequenceState.UNBORN for _, branch in drawing])
        return {"sample_index": index, "sample_slots": slots, "sample_positions": generated}

    def _looked_at(self, placed: list[_Placed]) -> dict[str, Any]:
        """The fields of the batch that say what is looked at besides: logits, or what tokens attend to."""
        found: dict[str, Any] = {}
        if scored := [each for each in placed if not each.chunk.aligns]:
            found |= self._scores(scored)
        if len(scored) < len(placed):
            found["attention_spans"] = _attention_spans(placed)
        return found

    def _scores(self, placed: list[_Placed]) -> dict[str, Any]:
        """The fields of the batch that say which of the pieces' logits are looked at."""
        index, token_ids, tops = [], [], []
        for each in placed:
            (first, end), new = each.chunk.scored, each.new
            index.append(np.arange(first, end, dtype=np.int64) - each.computed + each.start)
            targets = self._slots.tokens[each.chunk.sequence.slot, first + 1 : end + 1]
            if isinstance(new.question, PromptQuestion):
                targets = np.full(end - first, new.question.token_id, dtype=np.int32)
            elif new.media is not None:
                targets = new.media.plain(targets, first + 1)
            token_ids.append(targets)
            tops.append(np.full(end - first, max(new.params.num_prompt_logprobs, 0), dtype=np.int64))
        return {
            "score_index": np.concatenate(index),
            "score_token_ids": np.concatenate(token_ids),
            "score_tops": np.concatenate(tops),
        }


def _attention_spans(placed: list[_Placed]) -> Int64:
    """`StepBatch.attention_spans`."""
    spans = []
    for each in placed:
        if isinstance(question := each.new.question, AlignmentQuestion):
            first, end = (position - each.computed + each.start for position in each.chunk.scored)
            spans.append([first, end, question.frames])
    return np.array(spans, dtype=np.int64)


def _pool_spans(placed: list[_Placed]) -> Int64:
    """`StepBatch.pool_spans`."""
    pooling = (each for each in placed if each.chunk.pools)
    spans = [[position - each.computed + each.start for position in each.chunk.pooled] for each in pooling]
    return np.array(spans, dtype=np.int64)


def _media(placed: list[_Placed], rotated: Int32, positions: Int64) -> dict[str, Any]:
    """The fields of the batch that say where images, audio and videos are in it, and what depends on that.

    Args:
        placed: What is prefilled.
        rotated: (tokens,) where tokens are rotated to, but for those of prompts whose tokens have several axes.
        positions: (tokens,) their places in their sequences.
    """
    parts: list[MediaPart] = []
    axes: Int32 | None = None
    for each in placed:
        media = each.new.media
        if media is None:
            continue
        for item in media.items:
            first, last = np.searchsorted(item.places, (each.computed, each.end)).tolist()
            if first < last:
                parts.append(MediaPart(item, first, item.places[first:last] - each.computed + each.start))
        if media.axes is not None:
            if axes is None:
                axes = np.repeat(rotated[None], len(media.axes), axis=0)
            of_prompt = media.axes[:, each.computed : each.end]
            axes[:, each.start : each.start + of_prompt.shape[1]] = of_prompt
    found: dict[str, Any] = {"media": tuple(parts), "reach": _reach(placed, positions)}
    if axes is not None:
        found["positions"] = axes[0]
        found["axes"] = axes if parts else None  # those of text are all alike
    return found


def _reach(placed: list[_Placed], positions: Int64) -> Int32 | None:
    """`StepBatch.reach`."""
    reach = None
    for each in placed:
        own = None if each.new.media is None else each.new.media.reach(each.computed, each.end)
        if own is not None:
            assert own[-1] <= each.end, "a step ends within an image"
            reach = (positions + 1).astype(np.int32) if reach is None else reach
            reach[each.start : each.start + each.chunk.count] = own
    return reach


def _types(placed: list[_Placed], tokens: int) -> Int32:
    """`StepBatch.token_types`."""
    types = np.zeros(tokens, dtype=np.int32)
    for each in placed:
        if each.new.second is not None:
            types[each.start + max(each.new.second - each.computed, 0) : each.start + each.chunk.count] = 1
    return types
