"""What those who draft share: what a draft is drawn with, and steps that are made of the slot table."""

from __future__ import annotations

import dataclasses

import numpy as np

from asyncengine.generation import SamplingParams
from asyncengine.step.batch import Int64, StepBatch
from asyncengine.step.slots import SlotTable


def alike(params: SamplingParams) -> SamplingParams:
    """What drafts are drawn with: as the model draws, but for what needs the tokens before.

    A guess that this forbids is not kept, that is all.
    """
    return dataclasses.replace(
        params,
        frequency_penalty=0.0,
        presence_penalty=0.0,
        repetition_penalty=1.0,
        num_logprobs=-1,
        grammar=None,
        jumps=False,
        bad_words=(),
        logits_processors=(),
    )


def places_of(table: SlotTable, slots: Int64, positions: Int64) -> Int64:
    """(rows,) where the token at each slot's position has its keys and values."""
    page_size = table.page_size
    places: Int64 = table.blocks[slots, positions // page_size].astype(np.int64) * page_size + positions % page_size
    return places


def flattened(table: SlotTable, slots: Int64, starts: Int64, counts: Int64, of_media: int = 0) -> StepBatch:
    """Tokens `starts` to `starts + counts` of each slot as one step without logits.

    Args:
        table: Has them.
        slots: (rows,)
        starts: (rows,)
        counts: (rows,)
        of_media: What is put in the place of a piece of an image or of audio.
    """
    query_start = np.zeros(len(slots) + 1, dtype=np.int32)
    np.cumsum(counts, out=query_start[1:])
    rows = np.repeat(slots, counts)
    positions = np.repeat(starts - query_start[:-1], counts) + np.arange(query_start[-1], dtype=np.int64)
    nothing = np.empty(0, dtype=np.int64)
    token_ids = table.tokens[rows, positions]
    return StepBatch(
        token_ids=np.where(token_ids < 0, np.int32(of_media), token_ids),
        positions=positions.astype(np.int32),
        query_start=query_start,
        context_lens=starts.astype(np.int32),
        block_tables=table.blocks[slots, : table.num_blocks[slots].max()],
        slot_mapping=places_of(table, rows, positions),
        sample_index=nothing,
        sample_slots=nothing,
        sample_positions=nothing,
        copies=nothing.reshape(0, 2),
        num_decodes=0,
    )
