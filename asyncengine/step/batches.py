"""What a step's batch is built from: the columns of the slot table, turned into rows. Owned by the step thread."""

from __future__ import annotations

from typing import Any

import numpy as np

from asyncengine.media import MediaPart
from asyncengine.step.batch import NO_PAIRS, NO_SAVES, Int32, Int64, StepBatch
from asyncengine.step.decode_rows import DecodeRows
from asyncengine.step.drafting import Drafts
from asyncengine.step.plan import Chunk, StateMoves
from asyncengine.step.sequence import SequenceState
from asyncengine.step.slots import SlotTable


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
        sample_index = np.arange(decoded, dtype=np.int64)
        sample_slots = token_rows[:decoded]
        drawing = [(i, branch) for i, chunk in enumerate(chunks) for branch in chunk.branches]
        if drawing:
            last = query_start[1:] - 1
            sample_index = np.append(sample_index, [last[decodes + i] for i, _ in drawing]).astype(np.int64)
            sample_slots = np.append(sample_slots, [branch.slot for _, branch in drawing]).astype(np.int64)
        sample_positions = positions[sample_index] + 1 - slots.prompt_tokens[sample_slots]
        if drawing:
            # A branch about to be born has a slot but no tokens in it yet.
            born = np.array([branch.state is not SequenceState.UNBORN for _, branch in drawing])
            sample_positions[decoded:] *= born
        more: dict[str, Any] = {}
        if any(chunk.num_scored for chunk in chunks):
            more = self._scores(chunks, query_start[decodes:], context[decodes:])
        rotated, shifts = positions.astype(np.int32), slots.shifts_of(rows)
        if shifts is not None:
            rotated += np.repeat(shifts, counts).astype(np.int32)
        if any(chunk.sequence.request.new.media is not None for chunk in chunks):
            more["media"], axes = self._media(chunks, query_start[decodes:], context[decodes:], rotated)
            if axes is not None:
                rotated = axes[0]
                more["axes"] = axes if more["media"] else None  # those of text are all alike
            reach = self._reach(chunks, query_start[decodes:], context[decodes:], positions)
            if reach is not None:
                more["reach"] = reach
            for part in more["media"]:
                token_ids[part.tokens] = part.item.token_id
        spans = [
            [position - computed + start for position in chunk.pooled]
            for chunk, start, computed in zip(chunks, query_start[decodes:-1].tolist(), context[decodes:], strict=True)
            if chunk.pools
        ]
        if spans:
            more["pool_spans"] = np.array(spans, dtype=np.int64)
        if any(chunk.sequence.request.new.second is not None for chunk in chunks):
            more["token_types"] = self._types(chunks, query_start[decodes:], context[decodes:], len(token_ids))
        return StepBatch(
            token_ids=token_ids,
            positions=rotated,
            query_start=query_start,
            context_lens=context.astype(np.int32),
            block_tables=slots.blocks[rows, : slots.num_blocks[rows].max()],
            slot_mapping=slots.blocks[token_rows, positions // page_size].astype(np.int64) * page_size
            + positions % page_size,
            sample_index=sample_index,
            sample_slots=sample_slots,
            sample_positions=sample_positions,
            copies=copies,
            num_decodes=decodes,
            draft_lengths=None if drafts is None else drafts.lengths,
            unknown=decoding.unknown() if ahead else None,
            adapters=slots.adapters_of(rows),
            slots=None if states is None else rows,
            state_copies=NO_PAIRS if states is None else states.copies,
            state_saves=NO_SAVES if states is None else states.saves,
            **more,
        )

    def _media(
        self, chunks: list[Chunk], query_start: Int32, context: Int64, positions: Int32
    ) -> tuple[tuple[MediaPart, ...], Int32 | None]:
        """Where images and audio are in the batch, and where its tokens are rotated to if prompts have axes."""
        parts, axes = [], None
        for chunk, start, computed in zip(chunks, query_start.tolist(), context.tolist(), strict=False):
            media = chunk.sequence.request.new.media
            if media is None:
                continue
            end = computed + chunk.count
            for item in media.items:
                first, last = np.searchsorted(item.places, (computed, end)).tolist()
                if first < last:
                    parts.append(MediaPart(item, first, item.places[first:last] - computed + start))
            if media.axes is not None:
                if axes is None:
                    axes = np.repeat(positions[None], len(media.axes), axis=0)
                of_prompt = media.axes[:, computed:end]
                axes[:, start : start + of_prompt.shape[1]] = of_prompt
        return tuple(parts), axes

    @staticmethod
    def _types(chunks: list[Chunk], query_start: Int32, context: Int64, tokens: int) -> Int32:
        """`StepBatch.token_types`."""
        types = np.zeros(tokens, dtype=np.int32)
        for chunk, start, computed in zip(chunks, query_start.tolist(), context.tolist(), strict=False):
            second = chunk.sequence.request.new.second
            if second is not None:
                types[start + max(second - computed, 0) : start + chunk.count] = 1
        return types

    @staticmethod
    def _reach(chunks: list[Chunk], query_start: Int32, context: Int64, positions: Int64) -> Int32 | None:
        """`StepBatch.reach`."""
        reach = None
        for chunk, start, computed in zip(chunks, query_start.tolist(), context.tolist(), strict=False):
            media = chunk.sequence.request.new.media
            own = None if media is None else media.reach(computed, computed + chunk.count)
            if own is not None:
                assert own[-1] <= computed + chunk.count, "a step ends within an image"
                reach = (positions + 1).astype(np.int32) if reach is None else reach
                reach[start : start + chunk.count] = own
        return reach

    def _scores(self, chunks: list[Chunk], query_start: Int32, context: Int64) -> dict[str, Any]:
        """The fields of the batch that say which of the chunks' logits are looked at."""
        index, token_ids, tops = [], [], []
        for chunk, start, computed in zip(chunks, query_start.tolist(), context.tolist(), strict=False):
            first, end = chunk.scored
            index.append(np.arange(first, end, dtype=np.int64) - computed + start)
            new = chunk.sequence.request.new
            targets = self._slots.tokens[chunk.sequence.slot, first + 1 : end + 1]
            token_ids.append(targets if new.media is None else new.media.plain(targets, first + 1))
            top = new.params.num_prompt_logprobs
            tops.append(np.full(end - first, top, dtype=np.int64))
        return {
            "score_index": np.concatenate(index),
            "score_token_ids": np.concatenate(token_ids),
            "score_tops": np.concatenate(tops),
        }
