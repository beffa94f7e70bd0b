"""Steps of sequences that begin with a source, for a decoder that has it not among its tokens but beside them.

A source is what was heard, or a text. A sequence is a place for each token of it, and then the decoder's tokens. In the
block table the first places are those of the keys and values that every layer has of the source, and the others those
of the decoder's own tokens; that is why a source is filled up to where a block ends. To the decoder, a sequence begins
behind it.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from asyncengine.step.batch import NO_INDEX, NO_PAIRS, Int32, Int64, StepBatch


def filled(tokens: int, page_size: int) -> int:
    """Places of a source of so many tokens: those included that only fill its last block."""
    return -(-tokens // page_size) * page_size


def of_text(batch: StepBatch, page_size: int) -> StepBatch | None:
    """What a step has of the decoder's own tokens, as a step of sequences that begin with them; None if it has none.

    Args:
        batch: The step, each of whose rows has a source. Rows that decode have no others.
        page_size: Tokens to a block.
    """
    blocks, own = _parted(batch, page_size)
    if not own.any():
        return None
    before, counts, context = blocks * page_size, np.diff(batch.query_start), batch.context_lens
    rows = np.flatnonzero(own)
    row_of = np.repeat(np.arange(len(counts)), counts)
    kept = np.flatnonzero(np.arange(len(row_of)) >= batch.query_start[row_of + 1] - own[row_of])
    place = np.cumsum(np.bincount(kept, minlength=len(row_of))) - 1  # of each kept token among them
    return dataclasses.replace(
        batch,
        token_ids=batch.token_ids[kept],
        positions=batch.positions[kept] - before[row_of[kept]],
        query_start=np.append(0, np.cumsum(own[rows])).astype(np.int32),
        context_lens=np.maximum(context[rows] - before[rows], 0).astype(np.int32),
        block_tables=_behind(batch.block_tables[rows], blocks[rows]),
        slot_mapping=batch.slot_mapping[kept],
        sample_index=place[batch.sample_index],
        score_index=place[batch.score_index],
        attention_spans=None if batch.attention_spans is None else _moved(batch.attention_spans, place),
        media=(),
        sources=None,
    )


def _moved(spans: Int64, place: Int64) -> Int64:
    """`StepBatch.attention_spans` of the tokens that are kept, none of which is parted from its neighbours."""
    return np.stack((place[spans[:, 0]], place[spans[:, 1] - 1] + 1, spans[:, 2]), axis=1)


def of_sources(batch: StepBatch, page_size: int) -> StepBatch | None:
    """What the decoder's own tokens of a step attend to beside each other; None if there are none.

    Each token is a row of its own, whose query is the last of the source's tokens: so it attends to all of them, and to
    nothing that only fills the last block, in any back end. None is written. Arguments as those of `of_text`.
    """
    blocks, own = _parted(batch, page_size)
    row_of = np.repeat(np.arange(len(own)), own)
    if not len(row_of):
        return None
    assert batch.sources is not None
    tables = batch.block_tables[row_of, : blocks[row_of].max()]
    return _rows(tables, batch.sources[row_of] - np.int32(1), np.full(len(row_of), -1, np.int64))


def of_writing(slots: Int64, page_size: int) -> StepBatch:
    """A step that is there to write keys and values: each token is a row, and attends to no more than its own block.

    Args:
        slots: (tokens,) where they go, as `StepBatch.slot_mapping`.
        page_size: Tokens to a block.
    """
    blocks, offsets = np.divmod(slots, page_size)
    return _rows(blocks[:, None].astype(np.int32), offsets.astype(np.int32), slots)


def _parted(batch: StepBatch, page_size: int) -> tuple[Int32, Int64]:
    """(R,) blocks of each row's source, and (R,) how many of its tokens, at its end, are the decoder's own."""
    assert batch.sources is not None
    blocks: Int32 = -(-batch.sources // np.int32(page_size))
    counts = np.diff(batch.query_start)
    return blocks, np.clip(batch.context_lens + counts - blocks * page_size, 0, counts)


def _behind(block_tables: Int32, blocks: Int32) -> Int32:
    """(R, B) block tables without as many columns at their beginning as `blocks` (R,) says."""
    columns, least = block_tables.shape[1], int(blocks.min())
    if least == blocks.max():
        return block_tables[:, least:]
    wanted = np.minimum(blocks[:, None] + np.arange(columns - least), columns - 1)
    return np.take_along_axis(block_tables, wanted, axis=1)


def _rows(block_tables: Int32, context_lens: Int32, slot_mapping: Int64) -> StepBatch:
    """Rows of one token each, of which nothing is drawn."""
    rows = len(slot_mapping)
    return StepBatch(
        token_ids=np.zeros(rows, np.int32),
        positions=context_lens,
        query_start=np.arange(rows + 1, dtype=np.int32),
        context_lens=context_lens,
        block_tables=block_tables,
        slot_mapping=slot_mapping,
        sample_index=NO_INDEX,
        sample_slots=NO_INDEX,
        sample_positions=NO_INDEX,
        copies=NO_PAIRS,
        num_decodes=rows,
    )
