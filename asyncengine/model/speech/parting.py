"""Steps of sequences that begin with an audio, for a decoder that has it not among its tokens but beside them.

A sequence is so many places for what was heard, and then the decoder's tokens. In the block table the first places
are those of the keys and values that every layer has of the audio, and the others those of the decoder's own tokens;
that is why the audio ends where a block does. To the decoder, a sequence begins behind it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from asyncengine.step.batch import NO_INDEX, NO_PAIRS, Int32, Int64, StepBatch


@dataclass(frozen=True, slots=True)
class Places:
    """Those of the audio in each sequence.

    Attributes:
        heard: How many there is something in: frames that the encoder gives out.
        blocks: How many blocks they take.
        page_size: Tokens to a block.
    """

    heard: int
    blocks: int
    page_size: int

    @classmethod
    def of(cls, frames: int, page_size: int) -> Places:
        """Those of so many frames."""
        return cls(frames, -(-frames // page_size), page_size)

    @property
    def count(self) -> int:
        """How many there are, those included that only fill the last block."""
        return self.blocks * self.page_size


def of_text(batch: StepBatch, places: Places) -> StepBatch | None:
    """What a step has of the decoder's own tokens, as a step of sequences that begin with them; None if it has none.

    Args:
        batch: The step. Rows that decode have no others.
        places: Of audio.
    """
    counts, context = np.diff(batch.query_start), batch.context_lens
    own = np.clip(context + counts - places.count, 0, counts)  # of each row's tokens, at its end
    if not own.any():
        return None
    rows = np.flatnonzero(own)
    row_of = np.repeat(np.arange(len(counts)), counts)
    kept = np.flatnonzero(np.arange(len(row_of)) >= batch.query_start[row_of + 1] - own[row_of])
    place = np.cumsum(np.bincount(kept, minlength=len(row_of))) - 1  # of each kept token among them
    return dataclasses.replace(
        batch,
        token_ids=batch.token_ids[kept],
        positions=batch.positions[kept] - np.int32(places.count),
        query_start=np.append(0, np.cumsum(own[rows])).astype(np.int32),
        context_lens=np.maximum(context[rows] - places.count, 0).astype(np.int32),
        block_tables=batch.block_tables[rows, places.blocks :],
        slot_mapping=batch.slot_mapping[kept],
        sample_index=place[batch.sample_index],
        score_index=place[batch.score_index],
        attention_spans=None if batch.attention_spans is None else _moved(batch.attention_spans, place),
        media=(),
    )


def _moved(spans: Int64, place: Int64) -> Int64:
    """`StepBatch.attention_spans` of the tokens that are kept, none of which is parted from its neighbours."""
    return np.stack((place[spans[:, 0]], place[spans[:, 1] - 1] + 1, spans[:, 2]), axis=1)


def of_audio(batch: StepBatch, places: Places) -> StepBatch | None:
    """What the decoder's own tokens of a step attend to beside each other; None if there are none.

    Each token is a row of its own, whose query is the last of all that was heard: so it attends to all of it, in any
    back end. None is written.

    Args:
        batch: The step.
        places: Of audio.
    """
    counts = np.diff(batch.query_start)
    own = np.clip(batch.context_lens + counts - places.count, 0, counts)
    row_of = np.repeat(np.arange(len(counts)), own)
    if not len(row_of):
        return None
    last = np.full(len(row_of), places.heard - 1, np.int32)
    return _rows(batch.block_tables[row_of, : places.blocks], last, np.full(len(row_of), -1, np.int64))


def of_writing(slots: Int64, page_size: int) -> StepBatch:
    """A step that is there to write keys and values: each token is a row, and attends to no more than its own block.

    Args:
        slots: (tokens,) where they go, as `StepBatch.slot_mapping`.
        page_size: Tokens to a block.
    """
    blocks, offsets = np.divmod(slots, page_size)
    return _rows(blocks[:, None].astype(np.int32), offsets.astype(np.int32), slots)


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
