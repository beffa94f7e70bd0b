"""Brings a head together with the model that it drafts for. Used on the loader's thread."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from asyncengine.model.attention_modules import text_config
from asyncengine.model.draft_heads.drafter import HeadDrafter
from asyncengine.model.draft_heads.entries import EntryLayers, widened
from asyncengine.model.draft_heads.kept_states import KeptStates
from asyncengine.model.draft_heads.plan import BuiltHead
from asyncengine.model.draft_heads.taps import Taps
from asyncengine.model.media.encoder import MediaEncoder
from asyncengine.model.sampler import Sampler
from asyncengine.speculation.lengths import LONGEST

if TYPE_CHECKING:
    from asyncengine.model.capacity import Fitted
    from asyncengine.model.runner import TorchModel


def drafter_of(head: BuiltHead, model: TorchModel, fitted: Fitted, encoder: MediaEncoder | None) -> HeadDrafter:
    """What drafts by a head; the model hands its hidden states to it from now on, and is its companion.

    Args:
        head: The head.
        model: The model as it runs.
        fitted: The same as it was built.
        encoder: Of the model's images, if it takes some.
    """
    config, details, limits = fitted.config, fitted.details, fitted.limits
    assert details.draft_head is not None
    device, text = details.device, text_config(details.hf_config)
    layers = EntryLayers([widened(layer) for layer in head.layers], fitted.backend, limits, details.kv_dtype, device)
    layers.allocate()
    sequences, places = limits.max_num_sequence, limits.num_blocks * limits.page_size
    # The newest state of every sequence, and those of as many guesses, twice: some sit out a step.
    rows = min(2 * sequences * (1 + (config.spec_draft_length or LONGEST)), places)
    kept = KeptStates(places, rows, limits.page_size, head.head.width, details.dtype, device)
    dtype = torch.float32 if model.compiled else details.dtype
    tokens = limits.prefill_chunk_size + sequences
    taps = Taps(details.draft_head.target_layers, tokens, text.hidden_size, dtype, device)
    sampler = Sampler(sequences, details.vocab_size, device)
    drafter = HeadDrafter(head.head, layers, taps, kept, sampler, device, encoder)
    model.use_taps(taps, drafter)
    model.companion = drafter
    return drafter
