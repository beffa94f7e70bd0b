"""Recognises decoders that the compiled step can run, by their parts and not by their names.

What is looked for is the family that most decoders are of: per layer, a norm, projections to queries, keys and values
(with biases, and norms of queries and keys, or without), rotary positions, attention, an output projection; a norm, and
an MLP with or without a gate; norms after either branch, or none. Whatever does not fit says why, and runs as
transformers has it. A model that has all the parts but adds something between them is found out by its numbers:
`asyncengine.model.verification` compares the compiled step with transformers before it serves.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from asyncengine.model.architecture import RecordedLayer, text_config

ALIGNMENT = 16
"""Sizes must be multiples of it: so many floats are in the widest vector."""

ACTIVATIONS = {"silu": 0, "swish": 0, "gelu_pytorch_tanh": 1, "gelu_new": 1, "gelu_fast": 1, "gelu": 2}


class NotRecognised(Exception):  # it is an answer, not an error
    """The model is not of the family; the message says what differs."""


@dataclass(frozen=True, slots=True)
class NormPart:
    """x / rms(x) * (weight + offset).

    Attributes:
        module: Has the weight.
        epsilon: Added to the mean square.
        offset: 1 where the weights are stored less one (Gemma), else 0.
    """

    module: nn.Module
    epsilon: float
    offset: float


@dataclass(frozen=True, slots=True)
class Projection:
    """Some outputs of a linear layer: all of them, unless the model has fused several projections into one layer."""

    linear: nn.Linear
    start: int
    stop: int

    @property
    def weight(self) -> torch.Tensor:
        """(outputs, inputs)"""
        return self.linear.weight[self.start : self.stop]

    @property
    def bias(self) -> torch.Tensor | None:
        """(outputs,) or None"""
        bias = self.linear.bias
        return None if bias is None else bias[self.start : self.stop]


@dataclass(frozen=True, slots=True)
class LayerParts:
    """One layer. A norm that is None is not there.

    Attributes:
        qkv: Projections to queries, keys and values, in this order.
        gate_up: Gate and up projection.
        cosines: (positions, rotary / 2) float32; the same tensor for layers that rotate alike.
        sines: Likewise.
    """

    before_attention: NormPart | None
    after_attention: NormPart | None
    before_mlp: NormPart | None
    after_mlp: NormPart | None
    query_norm: NormPart | None
    key_norm: NormPart | None
    qkv: tuple[Projection, Projection, Projection]
    output: Projection
    gate_up: tuple[Projection, Projection]
    down: Projection
    cosines: torch.Tensor
    sines: torch.Tensor
    recorded: RecordedLayer


@dataclass(frozen=True, slots=True)
class Blueprint:
    """A whole decoder, in the modules that hold its weights.

    Attributes:
        embedding_scale: What embeddings are multiplied by.
    """

    embedding: nn.Embedding
    layers: tuple[LayerParts, ...]
    norm: NormPart
    head: nn.Linear
    activation: int
    embedding_scale: float
    residual_scale: float
    logit_scale: float
    logit_cap: float


@torch.no_grad()
def recognise(model: Any, recorded: list[RecordedLayer], max_length: int) -> Blueprint:
    """Finds a model's parts.

    Args:
        model: A causal language model of transformers with its weights.
        recorded: Its attention layers.
        max_length: How many positions will be asked for.

    Raises:
        NotRecognised: It is not of the family.
    """
    config = text_config(model.config)
    stack = model.get_decoder() if hasattr(model, "get_decoder") else None
    blocks = getattr(stack, "layers", None)
    if stack is None or not isinstance(blocks, nn.ModuleList) or len(blocks) != len(recorded):
        raise NotRecognised("there is no plain list of layers")
    head = model.get_output_embeddings()
    embedding = model.get_input_embeddings()
    if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear):
        raise NotRecognised("embedding or head is more than a matrix")
    _expect(stack, {"embed_tokens", "layers", "norm", "rotary_emb"}, "the model")
    norm = _norm(stack, "norm")
    if norm is None:
        raise NotRecognised("there is no last norm")
    kinds = getattr(config, "layer_types", None) or [None] * len(blocks)
    rotations = {kind: _rotation(stack.rotary_emb, kind, embedding.weight.device, max_length) for kind in set(kinds)}
    layers = tuple(
        _layer(block, entry, *rotations[kind]) for block, entry, kind in zip(blocks, recorded, kinds, strict=True)
    )
    if len({layer.cosines.shape for layer in layers}) > 1:
        raise NotRecognised("its layers rotate different numbers of dimensions")
    for size in (config.hidden_size, *(layer.down.linear.in_features for layer in layers)):
        _aligned(size)
    activation = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
    if activation not in ACTIVATIONS:
        raise NotRecognised(f"its activation is {activation!r}")
    return Blueprint(
        embedding=embedding,
        layers=layers,
        norm=norm,
        head=head,
        activation=ACTIVATIONS[activation],
        embedding_scale=_embedding_scale(embedding, config),
        residual_scale=float(getattr(config, "residual_multiplier", None) or 1.0),
        logit_scale=1.0 / float(getattr(config, "logits_scaling", None) or 1.0),
        logit_cap=float(getattr(config, "final_logit_softcapping", None) or 0.0),
    )


def _layer(block: nn.Module, recorded: RecordedLayer, cosines: torch.Tensor, sines: torch.Tensor) -> LayerParts:
    attention, spec = recorded.module, recorded.spec
    _expect(
        block,
        {
            "self_attn", "mlp", "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
        },
        "a layer",
    )  # fmt: skip
    _expect(attention, {"q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "q_norm", "k_norm"}, "attention")
    mlp = getattr(block, "mlp", None)
    if mlp is None or getattr(block, "self_attn", None) is not attention:
        raise NotRecognised("a layer is not attention and an MLP")
    _expect(mlp, {"gate_proj", "up_proj", "gate_up_proj", "down_proj", "act_fn", "activation_fn"}, "an MLP")
    pre, post = _norm(block, "input_layernorm"), _norm(block, "post_attention_layernorm")
    pre_mlp, post_mlp = _norm(block, "pre_feedforward_layernorm"), _norm(block, "post_feedforward_layernorm")
    if pre_mlp is None and post_mlp is None:  # the name says where it stands: after attention, and before the MLP
        post, pre_mlp = None, post
    widths = (spec.num_heads * spec.key_dim, spec.num_kv_heads * spec.key_dim, spec.num_kv_heads * spec.value_dim)
    down = _linears(mlp, ["down_proj"])[0]
    inner = down.linear.in_features
    qkv = _linears(attention, ["q_proj", "k_proj", "v_proj"], "qkv_proj", widths)
    gate_up = _linears(mlp, ["gate_proj", "up_proj"], "gate_up_proj", (inner, inner))
    layer = LayerParts(
        before_attention=pre,
        after_attention=post,
        before_mlp=pre_mlp,
        after_mlp=post_mlp,
        query_norm=_norm(attention, "q_norm"),
        key_norm=_norm(attention, "k_norm"),
        qkv=(qkv[0], qkv[1], qkv[2]),
        output=_linears(attention, ["o_proj"])[0],
        gate_up=(gate_up[0], gate_up[1]),
        down=down,
        cosines=cosines,
        sines=sines,
        recorded=recorded,
    )
    for size in (*widths, spec.key_dim, spec.num_heads * spec.value_dim):
        _aligned(size)
    for norm, whole in ((layer.query_norm, widths[0]), (layer.key_norm, widths[1])):
        if norm is not None and norm.module.weight.numel() not in (spec.key_dim, whole):  # type: ignore[operator]
            raise NotRecognised("a norm of queries or keys is neither of a head nor of all heads")
    return layer


def _expect(module: nn.Module, names: set[str], what: str) -> None:
    children = [(name, child) for name, child in module.named_children() if not isinstance(child, nn.Dropout)]
    strange = sorted(name for name, _ in children if name not in names)
    if strange:
        raise NotRecognised(f"{what} has a part called {strange[0]}")


def _linears(
    module: nn.Module, names: list[str], fused: str | None = None, widths: tuple[int, ...] | None = None
) -> list[Projection]:
    """The linear layers of these names, or the parts, `widths` outputs wide, of the one that is called `fused`."""
    if fused is not None and widths is not None and hasattr(module, fused):
        linear = getattr(module, fused)
        ends = list(itertools.accumulate(widths))
        if type(linear) is not nn.Linear or linear.out_features != ends[-1]:
            raise NotRecognised(f"{fused} is not the projections that it stands for")
        return [Projection(linear, end - width, end) for end, width in zip(ends, widths, strict=True)]
    found = []
    for name in names:
        linear = getattr(module, name, None)
        if type(linear) is not nn.Linear:
            raise NotRecognised(f"{name} is not a linear layer")
        found.append(Projection(linear, 0, linear.out_features))
    if widths is not None and [part.stop for part in found] != list(widths):
        raise NotRecognised(f"{', '.join(names)} do not give what is taken from them")
    return found


def _norm(module: nn.Module, name: str) -> NormPart | None:
    """Recognises a norm by what it does to numbers."""
    norm = getattr(module, name, None)
    if norm is None or isinstance(norm, nn.Identity):
        return None
    weight = getattr(norm, "weight", None)
    epsilon = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if not isinstance(weight, torch.Tensor) or weight.ndim != 1 or not isinstance(epsilon, float):
        raise NotRecognised(f"{name} is not a norm with a weight")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, weight.numel(), generator=generator).to(weight.dtype)
    try:
        found = norm(x).double()
    except Exception as error:
        raise NotRecognised(f"{name} takes more than a tensor") from error
    plain = x.double() / (x.double().square().mean(-1, keepdim=True) + epsilon).sqrt()
    for offset in (0.0, 1.0):
        if torch.allclose(found, plain * (weight.double() + offset), rtol=2e-2, atol=2e-2 * float(found.abs().max())):
            return NormPart(norm, epsilon, offset)
    raise NotRecognised(f"{name} is not a norm by the root mean square")


def _rotation(
    rotary: nn.Module, kind: str | None, device: torch.device, max_length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of every position, from the model's own module, for layers of a kind."""
    x, positions = torch.empty(1, 1, 1, dtype=torch.float32, device=device), torch.arange(max_length)[None]
    try:
        cosines, sines = rotary(x, positions)
    except Exception:
        try:
            cosines, sines = rotary(x, positions, kind)
        except Exception as error:
            raise NotRecognised("its rotary embedding takes more than positions and a kind of layer") from error
    half = cosines.shape[-1] // 2
    if cosines.shape[0] != 1 or half % 8 or not torch.equal(cosines[..., :half], cosines[..., half:]):
        raise NotRecognised("its rotary embedding does not rotate halves")
    return cosines[0, :, :half].float().contiguous(), sines[0, :, :half].float().contiguous()


def _embedding_scale(embedding: nn.Embedding, config: Any) -> float:
    """What an embedding is multiplied by, by the module itself and by the model."""
    row = int(embedding.weight[:64].double().norm(dim=1).argmax())  # not that of a padding token
    weight = embedding.weight[row].double()
    within = float(embedding(torch.tensor([row])).double().flatten() @ weight / (weight @ weight))
    return (within if within == within else 1.0) * float(getattr(config, "embedding_multiplier", None) or 1.0)


def _aligned(size: int) -> None:
    if size % ALIGNMENT:
        raise NotRecognised(f"it has a size of {size}, which is not a multiple of {ALIGNMENT}")
