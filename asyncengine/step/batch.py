"""What the scheduler hands to the model for one step, and what it gets back. Values: numpy arrays, never torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from asyncengine.media import MediaPart

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]


NO_INDEX: Int64 = np.empty(0, dtype=np.int64)
NO_TOKENS: Int32 = np.empty(0, dtype=np.int32)
NO_PAIRS: Int64 = np.empty((0, 2), dtype=np.int64)
NO_SAVES: Int64 = np.empty((0, 3), dtype=np.int64)
_NO_SUMS: Float32 = np.empty((0, 0), dtype=np.float32)


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One flattened batch of R rows (sequences) with T query tokens in all; row r's tokens lie one after the other.

    Rows that decode come first, each with one query token and those that were drafted after it; rows in prefill follow.
    The keys and values of the query tokens are written before anything is attended: row r's token at position p attends
    to positions 0..p, in layers that look ahead to 0..reach - 1.

    Attributes:
        token_ids: (T,) input tokens.
        positions: (T,) where each token is rotated to, or what position it is embedded with: its place in its sequence,
            or less behind images whose tokens have several axes.
        query_start: (R + 1,) row r owns the tokens query_start[r]:query_start[r + 1].
        context_lens: (R,) tokens of the row that were in the KV cache before this step.
        block_tables: (R, B) physical block of each logical block; entries past the row's end are arbitrary.
        slot_mapping: (T,) where each token's key and value go: physical block * page size + offset.
        sample_index: (M,) index into the T tokens of each row of logits; several may name the same token. With drafts,
            all tokens of the rows that decode come first.
        sample_slots: (M,) the sequence slot that each sampled token is for.
        sample_positions: (M,) number of tokens that the slot's sequence has generated before this one.
        copies: (C, 2) physical blocks (source, destination) to copy before anything else.
        num_decodes: How many of the R rows, at the front, decode.
        score_index: (S,) index into the T tokens of each row of logits that is only looked at.
        score_token_ids: (S,) the token whose log-probability is wanted from each of them.
        score_tops: (S,) how many of the likeliest tokens are wanted beside it.
        pool_spans: (P, 2) index into the T tokens, from and to, of each run of tokens whose hidden states are summed.
        attention_spans: (A, 3) index into the T tokens, from and to, of each run of tokens of which it is wanted how
            much they attend to the audio that their sequence begins with; and to how many frames, from its first.
            None if it is wanted of none.
        draft_lengths: (num_decodes,) how many of each row's query tokens, at its end, are drafts; None if none are.
        unknown: (num_decodes,) rows whose token the host does not know yet: it is the one that the model has drawn last
            for the row's slot, and what stands in `token_ids` means nothing. None if it knows all.
        adapters: (R,) index of the adapter of each row, -1 for none; None if no row has one.
        slots: (R,) slot of each row's sequence, for models that keep a state for each; None for others.
        state_copies: (C, 2) places (source, destination) of states to copy, in this order, before anything else. A
            slot's state is at the place of the same number; behind those are the places of states that are kept.
        state_saves: (S, 3) row, count and place: where the row's state goes as it is behind its first `count` tokens.
            A row that begins at position 0 begins with no state; others go on with what is at their slot's place.
            With drafts, those of rows that decode are done, in this order, as far as their tokens count; what is at a
            slot's place behind the step is of the tokens that count.
        media: Which tokens stand for pieces of which images, audio or videos. Others of the same id are what they are.
        axes: (axes, T) where each token is rotated to, by axis; None where all axes are as `positions`.
        reach: (T,) how many tokens of its sequence each token attends to in layers that look ahead: those up to the end
            of its image for tokens of an image, those up to itself for others. All of them are in the KV cache by the
            end of this step. None if no layer does so, or no token is of an image.
        token_types: (T,) 1 for tokens of the second of two texts that a prompt is made of, 0 for all others. None if
            no prompt is of two texts that the model tells apart by that.
        sources: (R,) how many tokens the source has that each row's sequence begins with, where the decoder attends to
            one beside its own tokens (`asyncengine.media.PromptMedia.source`). None if no row has one.
    """

    token_ids: Int32
    positions: Int32
    query_start: Int32
    context_lens: Int32
    block_tables: Int32
    slot_mapping: Int64
    sample_index: Int64
    sample_slots: Int64
    sample_positions: Int64
    copies: Int64
    num_decodes: int
    score_index: Int64 = field(default_factory=lambda: NO_INDEX)
    score_token_ids: Int32 = field(default_factory=lambda: NO_TOKENS)
    score_tops: Int64 = field(default_factory=lambda: NO_INDEX)
    pool_spans: Int64 = field(default_factory=lambda: NO_PAIRS)
    attention_spans: Int64 | None = None
    draft_lengths: Int64 | None = None
    unknown: NDArray[np.bool_] | None = None
    adapters: Int32 | None = None
    slots: Int64 | None = None
    state_copies: Int64 = field(default_factory=lambda: NO_PAIRS)
    state_saves: Int64 = field(default_factory=lambda: NO_SAVES)
    media: tuple[MediaPart, ...] = ()
    axes: Int32 | None = None
    reach: Int32 | None = None
    token_types: Int32 | None = None
    sources: Int32 | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities around one drawn token.

    Attributes:
        logprob: Of the drawn token.
        top_ids: The likeliest tokens, likeliest first; empty if none were asked for.
        top_logprobs: Theirs.
    """

    logprob: float
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class StepTokens:
    """What the model drew in one step.

    Attributes:
        token_ids: (M,) one for each entry of `StepBatch.sample_index`.
        logprobs: Entry m is None where the slot asked for none; None altogether where no slot asked.
        finished: Entries whose text is complete with this token, by the grammar of their slot.
        failed: Entries that could not be drawn, and why; their token means nothing. They end their own request.
        forced: Entries to further tokens after theirs, which their grammar leaves no choice about.
        scores: (S,) one for each entry of `StepBatch.score_index`.
        pooled: (P, hidden) the sum of the hidden states behind the last norm, for each of `StepBatch.pool_spans`.
        attention: For each of `StepBatch.attention_spans`, (heads, tokens, frames) the weights by which some heads of
            the model look at each frame; of one token and head, those of all frames, the others included, add up to 1.
        taken: (num_decodes,) with drafts, how many tokens at the beginning of each row's entries count: those up to the
            first that differs from the draft which stands there. Where fewer than that could be drawn, the entry
            after them has failed.
    """

    token_ids: Int32
    logprobs: list[TokenLogprobs | None] | None = None
    finished: tuple[int, ...] = ()
    failed: Mapping[int, Exception] = field(default_factory=dict)
    forced: Mapping[int, list[int]] = field(default_factory=dict)
    scores: list[TokenLogprobs] = field(default_factory=list)
    pooled: Float32 = field(default_factory=lambda: _NO_SUMS)
    attention: tuple[Float32, ...] = ()
    taken: Int64 | None = None
