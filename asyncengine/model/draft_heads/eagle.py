"""EAGLE-3 (Li et al., 2025): a layer of a Llama over the model's hidden states from several depths.

The states of a few layers come together in one product (`enter`). An entry's queries, keys and values see its token's
embedding and the state before it, each behind a norm of its own, side by side; what the layer adds up goes on as the
next state. Its vocabulary may be a part of the model's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

from asyncengine.errors import CheckpointError, ConfigError
from asyncengine.model.attention.protocol import LayerSpec
from asyncengine.model.attention_modules import ATTENTION, RecordedLayer
from asyncengine.model.building import BUILDING
from asyncengine.model.draft_heads.eagle_config import EagleConfig
from asyncengine.model.draft_heads.head import Pictured

ATTENDS = "midlayer.self_attn"
"""The module that attends."""
OFFSETS, KNOWN = "d2t", "t2d"
"""Of each token that the head can guess, how much more its id is in the model; and which of the model's those are."""


class EagleHead(nn.Module):
    """As `asyncengine.model.draft_heads.head.Head`. Made without weights; `load` brings them.

    Args:
        about: Its configuration.
    """

    sees_images = False

    def __init__(self, about: EagleConfig) -> None:
        super().__init__()
        config = llama_config(about)
        self.width, self._about = about.width, about
        self.midlayer: Any
        self._targets: torch.Tensor | None = None
        with BUILDING:
            self.rotary = LlamaRotaryEmbedding(config)
            with torch.device("meta"):
                inputs = len(about.target_layers) * about.target_hidden
                self.fc = nn.Linear(inputs, about.width, bias=False)
                self.embed_tokens = nn.Embedding(about.vocab_size, about.width)
                self.midlayer = LlamaDecoderLayer(config, 0)
                self.midlayer.hidden_norm = LlamaRMSNorm(about.width, eps=config.rms_norm_eps)
                attention = self.midlayer.self_attn
                for name in ("q_proj", "k_proj", "v_proj"):
                    single = getattr(attention, name)
                    double = nn.Linear(2 * about.width, single.out_features, bias=single.bias is not None)
                    setattr(attention, name, double)
                self.norm = LlamaRMSNorm(about.width, eps=config.rms_norm_eps)
                self.lm_head = nn.Linear(about.width, about.draft_vocab, bias=False)

    def load(self, weights: Mapping[str, torch.Tensor], device: torch.device) -> None:
        """Takes its weights, all of `shapes`, in the dtype that they are to have; parameters stay the ones they are."""
        weights = dict(weights)
        offsets = weights.pop(OFFSETS, None)
        weights.pop(KNOWN, None)
        self.load_state_dict(weights, assign=True)
        if offsets is not None:
            self._targets = (torch.arange(len(offsets)) + offsets.long()).to(device)
            if not 0 <= int(self._targets.min()) <= int(self._targets.max()) < self._about.vocab_size:
                raise CheckpointError(f"its {OFFSETS} leads out of the model's vocabulary")
        self.eval().requires_grad_(False)
        self.to(device)

    def enter(self, hidden: torch.Tensor) -> torch.Tensor:
        """As the protocol says."""
        states: torch.Tensor = self.fc(hidden.to(self.fc.weight.dtype))
        return states

    def run(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        before: torch.Tensor,
        pictured: Pictured | None = None,
    ) -> torch.Tensor:
        """As the protocol says."""
        first, hidden = self.midlayer, before[None]
        seen = first.hidden_norm(hidden)
        rotated = self.rotary(hidden, positions[None])
        both = torch.cat([first.input_layernorm(self.embed_tokens(token_ids)[None]), seen], dim=-1)
        hidden = seen if self._about.norm_before_residual else hidden
        hidden = hidden + first.self_attn(hidden_states=both, position_embeddings=rotated, attention_mask=None)[0]
        states: torch.Tensor = (hidden + first.mlp(first.post_attention_layernorm(hidden)))[0]
        return states

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """As the protocol says."""
        logits: torch.Tensor = self.lm_head(self.norm(states))
        if self._targets is None:
            return logits
        whole = logits.new_full((len(logits), self._about.vocab_size), -torch.inf)
        whole[:, self._targets] = logits
        return whole

    def recorded(self) -> list[RecordedLayer]:
        """Its layers that attend: one."""
        return [RecordedLayer(ATTENDS, self.midlayer.self_attn, spec_of(self._about), None)]


def llama_config(about: EagleConfig) -> Any:
    """The configuration of a head's layer, as transformers takes it.

    Raises:
        ConfigError: It does not.
    """
    try:
        config = LlamaConfig.from_dict(dict(about.llama))
    except Exception as error:
        raise ConfigError(f"transformers cannot read the configuration of its layers: {error}") from error
    config._attn_implementation = ATTENTION
    return config


def spec_of(about: EagleConfig) -> LayerSpec:
    """What a head's layer needs."""
    config = llama_config(about)
    size = config.head_dim
    return LayerSpec(config.num_attention_heads, config.num_key_value_heads, size, size, size**-0.5)


def named(name: str) -> str:
    """A weight's name in `EagleHead`, of its name in any of the layouts."""
    name = name.removeprefix("model.")
    return f"midlayer.{name.removeprefix('layers.0.')}" if name.startswith("layers.0.") else name
