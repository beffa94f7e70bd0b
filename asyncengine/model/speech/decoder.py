"""Whisper (Radford et al., 2022) as a model of the tokens that it writes, with what it hears in the KV cache."""

from __future__ import annotations

from typing import Any

import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration

from asyncengine.model.attention.protocol import LayerSpec
from asyncengine.model.encoder_decoder.layers import Output


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
        return Output(self.proj_out(hidden[:, logits_to_keep]))

    def encoded(self, input_features: torch.Tensor) -> torch.Tensor:
        """(frames, hidden) what the encoder makes of (1, mel bins, 2 * frames)."""
        found: torch.Tensor = self.model.encoder(input_features).last_hidden_state[0]
        return found


def spec_of(config: WhisperConfig) -> LayerSpec:
    """What each of its layers needs; queries are scaled before they come."""
    heads = config.decoder_attention_heads
    return LayerSpec(heads, heads, config.d_model // heads, config.d_model // heads, scaling=1.0)
