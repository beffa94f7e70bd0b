"""transformers' models that write one text of another, with a forward of their decoder alone over a step's tokens."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch

from asyncengine.errors import CheckpointError, UnsupportedModelError
from asyncengine.model.attention.protocol import LayerSpec
from asyncengine.model.attention_modules import attend
from asyncengine.model.encoder_decoder.details import Shape
from asyncengine.model.encoder_decoder.layers import Output
from asyncengine.model.encoder_decoder.parts import parts_of


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
    decoder = getattr(model, "model", model).decoder
    if hasattr(decoder, "embed_positions"):
        decoder.embed_positions.places = position_ids[0]
    hidden = decoder(input_ids=input_ids, encoder_hidden_states=nothing, use_cache=use_cache).last_hidden_state
    hidden = hidden[:, logits_to_keep]
    if getattr(model.config, "scale_decoder_outputs", False):  # T5, where its head is the table of tokens
        hidden = hidden * model.model_dim**-0.5
    logits = model.lm_head(hidden)
    bias = getattr(model, "final_logits_bias", None)
    return Output(logits if bias is None else logits + bias)


def _encoded(model: Any, input_ids: torch.Tensor) -> torch.Tensor:
    """(tokens, hidden) what the encoder makes of (1, tokens)."""
    found: torch.Tensor = getattr(model, "model", model).encoder(input_ids).last_hidden_state[0]
    return found


def take_steps(model: Any) -> None:
    """Lets the decoder embed the places that a step gives, where it would count its tokens itself, and attend to what
    is in the cache of sources, where it would multiply them by its matrices. Where it adds a bias to scores, it would
    reckon that for all pairs of a step's tokens: from then on it attends to those before without.

    Raises:
        UnsupportedModelError: It does so in a way that is not known.
    """
    parts = parts_of(model)
    if hasattr(parts.decoder, "embed_positions"):
        parts.decoder.embed_positions.__class__ = _placed(parts.decoder.embed_positions.__class__)
    for module in parts.beside:
        module.__class__ = _asking(module.__class__, parts.projections, parts.head_dim, True)
    for module in parts.own.values():
        if hasattr(module, "has_relative_attention_bias"):
            module.__class__ = _asking(module.__class__, parts.projections, parts.head_dim, False)


@functools.cache
def _asking(kind: Any, projections: tuple[str, str, str, str], head_dim: str, beside: bool) -> Any:
    """A class of attention that does no more than to ask what was given to it.

    Args:
        kind: transformers'.
        projections: As of `Parts`.
        head_dim: As of `Parts`.
        beside: Whether it attends to sources, and so has nothing to do with keys and values.
    """
    *made, out = projections
    given_out = (None,) * (2 if "position_bias" in inspect.signature(kind.forward).parameters else 1)

    def forward(self: Any, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor | None, ...]:
        size = getattr(self, head_dim)
        query, *others = (
            getattr(self, name)(hidden_states[0]).unflatten(-1, (-1, size)) for name in made[: 1 if beside else 3]
        )
        key, value = others or (query, query)
        return getattr(self, out)(attend(self, query, key, value).flatten(1))[None], *given_out

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


def shape_of(config: Any, written: int) -> Shape:
    """How large a model is.

    Args:
        config: Its configuration, of transformers.
        written: Most tokens of its decoder.

    Raises:
        CheckpointError: What it says of distances between tokens makes no sense.
    """
    if not hasattr(config, "relative_attention_max_distance"):
        heads = config.decoder_attention_heads
        size = config.d_model // heads
        spec = LayerSpec(heads, heads, size, size, scaling=size**-0.5)
        return Shape(spec, config.decoder_layers, config.encoder_ffn_dim)
    farthest, buckets = config.relative_attention_max_distance, config.relative_attention_num_buckets
    if not farthest > buckets // 2 > 1:  # half of them are of one distance each, in the encoder a quarter
        raise CheckpointError(
            f"relative_attention_max_distance is {farthest} and relative_attention_num_buckets {buckets}; expected at "
            "least 4 of these, and a distance of more than half as many"
        )
    heads, size = config.num_heads, config.d_kv
    spec = LayerSpec(heads, heads, size, size, scaling=1.0, distances=min(farthest + 1, written))
    return Shape(spec, config.num_decoder_layers, config.d_ff)
