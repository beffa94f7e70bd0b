"""A last look before a model serves: does its decoder compute, over a paged cache, what transformers computes?"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from asyncengine.errors import UnsupportedModelError
from asyncengine.model import verification
from asyncengine.model.encoder_decoder.details import SourceDetails
from asyncengine.model.encoder_decoder.layers import attend_here
from asyncengine.model.encoder_decoder.loading import Backends, serving
from asyncengine.model.encoder_decoder.parting import filled, of_text
from asyncengine.model.encoder_decoder.products import with_products
from asyncengine.model.trial_bound import relative
from asyncengine.step.batch import Int32, StepBatch
from asyncengine.step.limits import Limits

_PIECES = (3, 2, 1, 1)
"""Tokens of the pieces in which a model is tried."""


def trial_ids(details: SourceDetails, never: int | None) -> Int32:
    """(tokens,) what its decoder is tried with; a token that stands for padding is not among it."""
    usable = np.delete(np.arange(details.vocab_size), [] if never is None else [never])
    return usable[np.arange(sum(_PIECES)) * 7 % len(usable)].astype(np.int32)


def try_decoder(
    model: Any,
    details: SourceDetails,
    backends: Backends,
    source: int,
    never: int | None,
    plain: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> None:
    """Compares a decoder as it will run, behind random numbers in the place of what its encoder gives out. From then on
    it attends by our function.

    Args:
        model: With its weights, as transformers runs it.
        details: Of the load.
        backends: What attends.
        source: Tokens of the source.
        never: As of `trial_ids`.
        plain: Runs it as transformers does: (1, source, hidden) and (1, tokens) to (tokens, vocabulary).

    Raises:
        UnsupportedModelError: They differ by more than rounding.
    """
    hidden = torch.randn(source, details.hf_config.d_model, generator=torch.Generator().manual_seed(0))
    rows = hidden.to(details.device, details.dtype)
    ids = trial_ids(details, never)[None]
    with torch.inference_mode():
        expected = plain(rows[None], torch.from_numpy(ids).to(details.device).long())
    attend_here(model)
    with_products(model, details, backends[0])
    page_size = verification.PAGE
    places = filled(source, page_size)
    length = places + ids.shape[1]
    limits = Limits(1, length, length, page_size, -(-length // page_size))
    text, layers, _ = serving(model, details, backends, limits, None, {})
    sequence = np.concatenate((np.zeros((1, places), np.int32), ids), axis=1)

    def piece(start: int, end: int) -> StepBatch:
        batch = verification.piece(sequence, start, end)
        return dataclasses.replace(batch, sources=np.full(1, source, np.int32))

    found = []
    with torch.inference_mode():
        layers.write(rows, piece(0, source).slot_mapping)
        for start, end in itertools.pairwise(itertools.accumulate((places, *_PIECES))):
            batch = piece(start, end)
            own = of_text(batch, page_size)
            assert own is not None
            layers.begin(batch, own.attention_spans)
            found.append(text.logits(own))
    layers.free()  # before it is reckoned what memory there is
    error = relative(torch.cat(found).float(), expected.float())
    tolerance = verification.tolerance_of(details.dtype, None, "none", False)
    if not error <= tolerance:
        raise UnsupportedModelError(
            f"{details.checkpoint.name} does not compute over a paged KV cache what it computes without one: relative "
            f"error {error:.2g}, allowed {tolerance:g}"
        )
