"""transformers' models that write one text of another, with a forward of their decoder alone over a step's tokens."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch

from asyncengine.errors import UnsupportedModelError
from asyncengine.model.attention.protocol import LayerSpec
from asyncengine.model.attention_modules import attend
from asyncengine.model.encoder_decoder.layers import Output


@functools.cache
def stepping(kind: Any) -> Any:
    """A class of transformers' whose forward is that of its decoder; what attends has the source elsewhere."""
    return type(kind.__name__, (kind,), {"forward": _forward, "encoded": _encoded, "__module__": kind.__module__})


def _forward(
    model: Any,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    logits_to_keep: torch.Tensor,
    use_cache: bool = False,
) -> Output:
    """Logits of some tokens of a step, of a model of which `take_steps` was called.

    Args:
        model: It.
        input_ids: (1, tokens).
        position_ids: (1, tokens) places behind the source.
        logits_to_keep: (M,) which of the tokens logits are wanted of.
        use_cache: False: transformers' own cache is not used.

    Returns:
        Something with ``logits``, (1, M, vocabulary).
    """
    # Nothing is made of it here, but without any the layers would attend once.
    nothing = torch.empty(1, 0, model.config.d_model, dtype=model.dtype, device=input_ids.device)
    decoder = model.model.decoder
    decoder.embed_positions.places = position_ids[0]
    hidden = decoder(input_ids=input_ids, encoder_hidden_states=nothing, use_cache=use_cache).last_hidden_state
    logits = model.lm_head(hidden[:, logits_to_keep])
    bias = getattr(model, "final_logits_bias", None)
    return Output(logits if bias is None else logits + bias)


def _encoded(model: Any, input_ids: torch.Tensor) -> torch.Tensor:
    """(tokens, hidden) what the encoder makes of (1, tokens)."""
    found: torch.Tensor = model.model.encoder(input_ids).last_hidden_state[0]
    return found


def take_steps(model: Any) -> None:
    """Lets the decoder embed the places that a step gives, where it would count its tokens itself, and attend to what
    is in the cache of sources, where it would multiply them by its matrices.

    Raises:
        UnsupportedModelError: It does so in a way that is not known.
    """
    decoder = model.model.decoder
    decoder.embed_positions.__class__ = _placed(decoder.embed_positions.__class__)
    for layer in decoder.layers:
        layer.encoder_attn.__class__ = _beside(layer.encoder_attn.__class__)


@functools.cache
def _beside(kind: Any) -> Any:
    """A class of attention to sources that has nothing to do with them but to ask."""

    def forward(self: Any, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        query = self.q_proj(hidden_states[0]).unflatten(-1, (-1, self.head_dim))
        attended = attend(self, query, query, query)
        return self.out_proj(attended.flatten(1))[None], None

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


@functools.cache
def _placed(kind: Any) -> Any:
    """A class that embeds its ``places``, (tokens,), in place of those that it is told."""
    if "position_ids" in inspect.signature(kind.forward).parameters:

        def forward(self: Any, *given: Any, **more: Any) -> Any:
            return kind.forward(self, *given, **(more | {"position_ids": self.places}))

    elif hasattr(kind, "create_position_ids_from_input_ids"):  # (1, tokens): each is a text of one token here

        def forward(self: Any, *given: Any, **more: Any) -> Any:
            found = self.create_position_ids_from_input_ids(given[0].T, self.padding_idx, self.places[:, None])
            return self.weights[found[:, 0]][None]

    else:
        raise UnsupportedModelError(f"{kind.__name__} counts a decoder's tokens in a way that is not known here")
    return type(kind.__name__, (kind,), {"forward": forward, "places": None, "__module__": kind.__module__})


def spec_of(config: Any) -> LayerSpec:
    """What each of its decoder's layers needs."""
    heads = config.decoder_attention_heads
    size = config.d_model // heads
    return LayerSpec(heads, heads, size, size, scaling=size**-0.5)
