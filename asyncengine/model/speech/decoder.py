"""Whisper (Radford et al., 2022) as a model of the tokens that it writes, with what it hears in pages of the KV cache.

Each layer of its decoder attends twice: to the tokens before, and to all of what the encoder gives out. Both kinds of
keys and values are of one shape and lie in one cache, in the places that `asyncengine.model.speech.parting` describes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import WhisperConfig, WhisperForConditionalGeneration

from asyncengine.model.attention.protocol import AttentionBackend, LayerSpec
from asyncengine.model.attention_modules import ATTENTION, RecordedLayer, attach
from asyncengine.model.device_copy import to_device
from asyncengine.model.paged_layers import PagedLayers
from asyncengine.model.speech.parting import Places, of_audio, of_writing
from asyncengine.step.batch import Float32, Int64, StepBatch


class SpeechDecoder(WhisperForConditionalGeneration):  # type: ignore[misc]
    """Whisper whose forward is that of its decoder over a step's tokens; what attends has the audio elsewhere."""

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, logits_to_keep: torch.Tensor, use_cache: bool = False
    ) -> Any:
        """Logits of some tokens of a step.

        Args:
            input_ids: (1, tokens).
            position_ids: (1, tokens) places behind the audio.
            logits_to_keep: (M,) which of the tokens logits are wanted of.
            use_cache: False: transformers' own cache is not used.

        Returns:
            Something with ``logits``, (1, M, vocabulary).
        """
        # Nothing is made of the encoder's output here, but without any the layers would attend once.
        nothing = torch.empty(1, 0, self.config.d_model, dtype=self.dtype, device=input_ids.device)
        hidden = self.model.decoder(
            input_ids=input_ids, position_ids=position_ids, encoder_hidden_states=nothing, use_cache=use_cache
        ).last_hidden_state
        return _Output(self.proj_out(hidden[:, logits_to_keep]))

    def encoded(self, input_features: torch.Tensor) -> torch.Tensor:
        """(frames, hidden) what the encoder makes of (1, mel bins, 2 * frames)."""
        found: torch.Tensor = self.model.encoder(input_features).last_hidden_state[0]
        return found


class _Output:
    """What a forward gives out."""

    __slots__ = ("logits",)

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits


def attend_here(model: SpeechDecoder) -> None:
    """Lets the decoder attend by our function and the encoder by torch's; they share one configuration otherwise."""
    own = copy.deepcopy(model.config)
    for module in model.model.encoder.modules():
        if getattr(module, "config", None) is model.config:
            module.config = own
    model.set_attn_implementation(ATTENTION)
    model.model.encoder.set_attn_implementation("sdpa")


def spec_of(config: WhisperConfig) -> LayerSpec:
    """What each of its layers needs; queries are scaled before they come."""
    heads = config.decoder_attention_heads
    return LayerSpec(heads, heads, config.d_model // heads, config.d_model // heads, scaling=1.0)


def layers_of(model: SpeechDecoder) -> list[RecordedLayer]:
    """What attends to the tokens before, in the order of execution."""
    spec = spec_of(model.config)
    return [
        RecordedLayer(f"model.decoder.layers.{index}.self_attn", layer.self_attn, spec, None)
        for index, layer in enumerate(model.model.decoder.layers)
    ]


@dataclass(frozen=True, slots=True)
class _Looked:
    """Tokens of a step of which it is wanted what they attend to.

    Attributes:
        tokens: Which ones.
        blocks: (blocks,) those of the audio.
        frames: How many of it are wanted, from the first.
        found: (heads, tokens, frames) of each layer that has some of the heads.
    """

    tokens: slice
    blocks: torch.Tensor
    frames: int
    found: list[torch.Tensor] = field(default_factory=list)


class HeardLayers:
    """What attends to the audio, over the caches of what attends to the tokens before.

    Args:
        model: With its weights.
        paged: The layers that attend to the tokens before, as `layers_of` has them, with their caches.
        backend: Attends. Another one than theirs: a step has a plan of each.
        places: Of audio.
        device: Where all of that is.
        heads: By layer, the heads whose weights are wanted where a step wants to know what tokens attend to.
    """

    def __init__(
        self,
        model: SpeechDecoder,
        paged: PagedLayers,
        backend: AttentionBackend,
        places: Places,
        device: torch.device,
        heads: Mapping[int, Sequence[int]],
    ) -> None:
        self._modules = [layer.encoder_attn for layer in model.model.decoder.layers]
        self._spec = spec_of(model.config)
        self._paged, self._backend, self._places, self._device = paged, backend, places, device
        self._heads = {layer: to_device(np.array(own), device) for layer, own in heads.items()}
        self._looked: list[_Looked] = []
        self._plan: Any = None
        # Some make what they need with a layer's cache: of one that nobody uses here.
        backend.allocate(self._spec, 1, places.page_size, model.dtype, device)
        attach({module: self._hook(index) for index, module in enumerate(self._modules)})

    def begin(self, batch: StepBatch, attention_spans: Int64 | None) -> None:
        """Prepares a step.

        Args:
            batch: As the scheduler has it.
            attention_spans: As of that, but of the decoder's own tokens.
        """
        heard = of_audio(batch, self._places)
        self._plan = None if heard is None else self._backend.plan(heard, self._places.page_size, self._device)
        self._looked = []
        for first, end, frames in () if attention_spans is None else attention_spans.tolist():
            assert heard is not None
            blocks = to_device(heard.block_tables[first].astype(np.int64), self._device)
            self._looked.append(_Looked(slice(first, end), blocks, frames))

    def attention(self) -> tuple[Float32, ...]:
        """What tokens of the step attended to, as `asyncengine.step.batch.StepTokens`. Waits for the device."""
        looked, self._looked = self._looked, []
        return tuple(torch.cat(each.found).cpu().numpy() for each in looked)

    def write(self, rows: torch.Tensor, slots: Int64) -> None:
        """Writes what every layer keeps of some frames.

        Args:
            rows: (frames, hidden) of the encoder's output.
            slots: (frames,) where they go.
        """
        plan = self._backend.plan(of_writing(slots, self._places.page_size), self._places.page_size, self._device)
        heads = self._spec.num_heads, self._spec.key_dim
        for module, cache in zip(self._modules, self._paged.caches, strict=True):
            key, value = (project(rows).unflatten(1, heads) for project in (module.k_proj, module.v_proj))
            self._backend.attend(self._spec, cache, plan, key, key, value, None)

    def free(self) -> None:
        """Lets the caches go."""
        self._paged.free()
        self._plan = None

    def _look(self, cache: Any, query: torch.Tensor, heads: torch.Tensor) -> None:
        """Notes how much some heads attend to each frame, which the back ends do not tell.

        Args:
            cache: Of the layer.
            query: (tokens, heads, dim) of the step, scaled.
            heads: (heads,) which ones.
        """
        for each in self._looked:
            keys = self._backend.keys(self._spec, cache, each.blocks)[: self._places.heard].index_select(1, heads)
            queries = query[each.tokens].index_select(1, heads)
            scores = torch.einsum("thd,fhd->htf", queries.float(), keys.float())
            each.found.append(scores.softmax(-1)[..., : each.frames])

    def _hook(self, index: int) -> Any:
        def hook(module: nn.Module, query: torch.Tensor, key: Any, value: Any, kwargs: Any) -> torch.Tensor:
            # None of the tokens is written, so whatever has the shape of keys and values stands for theirs.
            cache = self._paged.caches[index]
            if self._looked and (heads := self._heads.get(index)) is not None:
                self._look(cache, query, heads)
            return self._backend.attend(self._spec, cache, self._plan, query, query, query, None)

        return hook
