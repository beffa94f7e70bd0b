"""Recognises decoders that the compiled step can run, by their parts and not by their names.

What is looked for is the family that most decoders are of: per layer, a norm, projections to queries, keys and values
(with biases, and norms of queries and keys, or without), positions that rotate or are added to the embeddings,
attention, an output projection; after it or beside it a norm, and an MLP with or without a gate, or experts with gates;
norms after either branch, or none. Whatever does not fit says why, and runs as transformers has it. A model that has
all the parts but adds something between them is found out by its numbers: `asyncengine.model.verification` compares the
compiled step with transformers before it serves.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from asyncengine.model.attention.protocol import LayerSpec
from asyncengine.model.attention_modules import RecordedLayer, text_config
from asyncengine.model.decoder.experts import ROUTERS, SHARED, SHARED_GATES, experts_of, shared_of
from asyncengine.model.decoder.parts import (
    Beside,
    Blueprint,
    LatentParts,
    LayerParts,
    NormPart,
    NotRecognised,
    Projection,
)
from asyncengine.model.decoder.rotation import Rotation, latent_rotation, rotates, rotation
from asyncengine.model.latent_attention import LatentAttention
from asyncengine.model.quantised.byte_linear import ByteLinear
from asyncengine.model.quantised.four_bit_linear import FourBitLinear
from asyncengine.model.quantised.fp8_linear import Fp8Linear

__all__ = ["Blueprint", "LayerParts", "NormPart", "NotRecognised", "Projection", "recognise"]

ALIGNMENT = 16
"""Sizes must be multiples of it: so many floats are in the widest vector."""

ACTIVATIONS = {
    "silu": 0, "swish": 0, "gelu_pytorch_tanh": 1, "gelu_new": 1, "gelu_fast": 1, "gelu": 2, "relu": 3, "relu2": 4,
}  # fmt: skip

# What transformers calls the same part. The first that a module has is taken.
_EMBEDDING = ("embed_tokens", "wte", "embed_in")
_POSITIONS = ("embed_positions", "wpe")
_LAYERS = ("layers", "h")
_LAST_NORM = ("norm", "ln_f", "final_layer_norm", "final_layernorm")
_ATTENTION = ("self_attn", "attention", "attn")
_FIRST_NORM = ("input_layernorm", "ln_1", "self_attn_layer_norm")
_AFTER_ATTENTION = ("post_self_attn_layernorm",)
_SECOND_NORM = ("post_attention_layernorm", "ln_2", "final_layer_norm")  # before the MLP, unless there is one more
_BEFORE_MLP = ("pre_feedforward_layernorm",)
_AFTER_MLP = ("post_feedforward_layernorm", "post_mlp_layernorm")
_QUERY_NORM = ("q_norm", "q_layernorm")
_KEY_NORM = ("k_norm", "k_layernorm")
_FUSED_QKV = ("qkv_proj", "c_attn")  # queries, then keys, then values
_QKV_BY_HEAD = ("query_key_value",)  # of every head: query, key, value
_OUTPUT = ("o_proj", "c_proj", "out_proj", "dense")
_GATE_UP = ("gate_up_proj", "input_linear")  # gate, then up projection
_UP = ("up_proj", "fc1", "c_fc", "dense_h_to_4h")
_DOWN = ("down_proj", "fc2", "c_proj", "dense_4h_to_h", "output_linear")
_ACTIVATION = ("act_fn", "activation_fn", "act", "activation")
_MLP = ("mlp", "block_sparse_moe")
_OF_LATENTS = {"q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj"}
_SHARED_MLP = ("shared_mlp",)  # beside a module of experts


@torch.no_grad()
def recognise(model: Any, recorded: list[RecordedLayer], max_length: int, whole_experts: bool = False) -> Blueprint:
    """Finds a model's parts.

    Args:
        model: A causal language model of transformers with its weights.
        recorded: Its attention layers.
        max_length: How many positions will be asked for.
        whole_experts: Whether an MLP with experts is taken as it is, whatever it does.

    Raises:
        NotRecognised: It is not of the family.
    """
    config = text_config(model.config)
    stack, blocks = check_parts(model, recorded, whole_experts)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    norm = _norm(stack, _LAST_NORM)
    if norm is None:
        raise NotRecognised("there is no last norm")
    rotations = _rotations(stack, config, recorded, max_length)
    hidden = config.hidden_size
    each = zip(blocks, recorded, rotations, strict=True)
    layers = tuple(_layer(*parts, hidden, model.dtype, whole_experts) for parts in each)
    _aligned(hidden)
    names = ("hidden_act", "hidden_activation", "activation_function")
    activation = next((name for key in names if (name := getattr(config, key, None))), None)
    if activation not in ACTIVATIONS:
        raise NotRecognised(f"its activation is {activation!r}")
    positions, first_position = _positions(stack, hidden, max_length)
    rotated = next((each for each in rotations if each is not None), None)
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    branches = {float(getattr(block, "residual_scale", 1.0)) for block in blocks}
    if len(branches) > 1:
        raise NotRecognised("its layers add their branches in different sizes")
    return Blueprint(
        embedding=embedding,
        positions=positions,
        first_position=first_position,
        layers=layers,
        norm=norm,
        head=head,
        activation=ACTIVATIONS[activation],
        rotary=0 if rotated is None else 2 * rotated.cosines.shape[1],
        pairs=rotated is not None and rotated.pairs,
        embedding_scale=_embedding_scale(embedding, config),
        residual_scale=float(getattr(config, "residual_multiplier", None) or branches.pop()),
        logit_scale=scale,
        logit_cap=float(getattr(config, "final_logit_softcapping", None) or 0.0),
    )


def check_parts(
    model: Any, recorded: Sequence[RecordedLayer], whole_experts: bool = False
) -> tuple[nn.Module, nn.ModuleList]:
    """Looks at what a model's parts are called, for which it needs no weights; as `recognise` does first.

    Returns:
        What has the layers, and the layers.

    Raises:
        NotRecognised: It has parts that are not of the family.
    """
    stack = model.get_decoder() if hasattr(model, "get_decoder") else None
    stack = getattr(stack, "decoder", stack)
    blocks = None if stack is None else _first(stack, _LAYERS)
    if stack is None or not isinstance(blocks, nn.ModuleList) or len(blocks) != len(recorded):
        raise NotRecognised("there is no plain list of layers")
    if not isinstance(model.get_input_embeddings(), nn.Embedding) or not isinstance(
        model.get_output_embeddings(), (nn.Linear, ByteLinear)
    ):
        raise NotRecognised("embedding or head is more than a matrix")
    _expect(stack, {*_EMBEDDING, *_POSITIONS, *_LAYERS, *_LAST_NORM, "rotary_emb"}, "the model")
    for block, layer in zip(blocks, recorded, strict=True):
        _check_layer(block, layer.module, whole_experts)
        if isinstance(layer.module, LatentAttention):
            of_heads: Any = layer.module
            sizes = layer.spec.value_dim, layer.spec.key_dim - layer.spec.value_dim
            for size in (*sizes, of_heads.qk_nope_head_dim, of_heads.v_head_dim):
                _aligned(size)
    return stack, blocks


def _check_layer(block: nn.Module, attention: nn.Module, whole_experts: bool) -> None:
    mlp = _first(block, _MLP)
    own = {*_ATTENTION, *_FIRST_NORM, *_AFTER_ATTENTION, *_SECOND_NORM, *_BEFORE_MLP, *_AFTER_MLP, *_MLP}
    of_mlp = {"gate_proj", *_GATE_UP, *_UP, *_DOWN, *_ACTIVATION}
    if not whole_experts:
        own |= {*_SHARED_MLP}
    _expect(block, own if mlp is not None else own | of_mlp, "a layer")
    if _first(block, _ATTENTION) is not attention:
        raise NotRecognised("a layer is not attention and an MLP")
    of_attention = {"q_proj", "k_proj", "v_proj", *_FUSED_QKV, *_QKV_BY_HEAD, *_OUTPUT, *_QUERY_NORM, *_KEY_NORM}
    if isinstance(attention, LatentAttention):
        of_attention = {"q_proj", *_OUTPUT, *_OF_LATENTS}
    _expect(attention, of_attention, "attention")
    if mlp is None or (whole_experts and hasattr(mlp, "experts")):
        return
    if not hasattr(mlp, "experts"):
        return _expect(mlp, of_mlp, "an MLP")
    _expect(mlp, {*ROUTERS, *SHARED, *SHARED_GATES, "experts"}, "an MLP with experts")
    for shared in (shared_of(mlp), _first(block, _SHARED_MLP)):
        if shared is not None:
            _expect(shared, of_mlp, "a shared expert")


def _rotations(
    stack: nn.Module, config: Any, recorded: Sequence[RecordedLayer], max_length: int
) -> list[Rotation | None]:
    """For each layer, how it rotates; one object for those that rotate alike."""
    rotary = getattr(stack, "rotary_emb", None)
    if rotary is None:
        return [None] * len(recorded)
    kinds = getattr(config, "layer_types", None) or [None] * len(recorded)
    first = {kind: layer for kind, layer in zip(reversed(kinds), reversed(recorded), strict=True)}
    found = {
        kind: (latent_rotation if layer.spec.values_in_keys else rotation)(rotary, layer.module, kind, max_length)
        for kind, layer in first.items()
    }
    if len({(each.cosines.shape, each.pairs) for each in found.values()}) > 1:
        raise NotRecognised("its layers rotate in different ways")
    widest = 2 * next(iter(found.values())).cosines.shape[1]
    if any(widest > layer.spec.key_dim for layer in recorded):
        raise NotRecognised("it rotates more dimensions than a head has")
    each = zip(kinds, recorded, strict=True)
    return [found[kind] if rotates(layer.module, config.hidden_size) else None for kind, layer in each]


def _positions(stack: nn.Module, hidden: int, max_length: int) -> tuple[nn.Embedding | None, int]:
    """The embedding of positions, and its row for position 0."""
    positions = _first(stack, _POSITIONS)
    if positions is None:
        return None, 0
    first = getattr(positions, "offset", 0)
    if not isinstance(positions, nn.Embedding) or not isinstance(first, int):
        raise NotRecognised("its positions are more than a matrix")
    if positions.weight.shape[1] != hidden or positions.weight.shape[0] < first + max_length:
        raise NotRecognised(f"its embeddings of positions are fewer than {max_length}, or of another size")
    return positions, first


def _layer(
    block: nn.Module,
    recorded: RecordedLayer,
    rotation: Rotation | None,
    hidden: int,
    dtype: torch.dtype,
    whole_experts: bool,
) -> LayerParts:
    attention, spec = recorded.module, recorded.spec
    mlp, beside = _first(block, _MLP), _first(block, _SHARED_MLP)
    experts, whole = None, None
    if mlp is None:
        mlp = block  # which has its linear layers
    elif whole_experts and hasattr(mlp, "experts"):
        whole, mlp = mlp, None
    elif hasattr(mlp, "experts"):
        experts = experts_of(mlp, hidden, dtype)
        mlp = shared_of(mlp)
        if beside is not None:
            if mlp is not None:
                raise NotRecognised("a layer has two shared experts")
            mlp, experts = beside, replace(experts, beside=Beside())
    elif beside is not None:
        raise NotRecognised("a layer has an MLP beside another one")
    pre, post, pre_mlp, post_mlp, parallel = _norms_of(block)
    widths = (spec.num_heads * spec.key_dim, spec.num_kv_heads * spec.key_dim, spec.num_kv_heads * spec.value_dim)
    latents = None
    if isinstance(attention, LatentAttention):
        if whole_experts:
            raise NotRecognised("it keeps latents")
        latents, qkv = _latents(attention, spec)
    else:
        qkv = _qkv(attention, widths, spec.num_heads == spec.num_kv_heads)
    down = None if mlp is None else _linear(mlp, _DOWN)
    layer = LayerParts(
        before_attention=pre,
        after_attention=post,
        before_mlp=pre_mlp,
        after_mlp=post_mlp,
        query_norm=_norm(attention, _QUERY_NORM, spec.key_dim, spec.num_heads),
        key_norm=_norm(attention, _KEY_NORM, spec.key_dim, spec.num_kv_heads),
        qkv=qkv,
        output=_linear(attention, _OUTPUT),
        gate_up=() if down is None else _gate_up(mlp, down.inputs),
        down=down,
        experts=experts,
        rotation=None if rotation is None else (rotation.cosines, rotation.sines),
        parallel=parallel,
        query_scale=_query_scale(recorded),
        recorded=recorded,
        whole_mlp=whole,
        latents=latents,
    )
    inner = [0 if down is None else down.inputs, 0 if experts is None else experts.inner]
    for size in (*widths, spec.key_dim, spec.num_heads * spec.value_dim, *inner):
        _aligned(size)
    return layer


def _latents(attention: Any, spec: LayerSpec) -> tuple[LatentParts, tuple[Projection, ...]]:
    """What is between the first projections and attention, and these."""
    rank, rotated, plain = spec.value_dim, spec.key_dim - spec.value_dim, attention.qk_nope_head_dim
    norm, query, query_norm = _norm(attention, ("kv_a_layernorm",)), None, None
    if norm is None:
        raise NotRecognised("latents have no norm")
    asked, kept = _linear(attention, ("q_a_proj", "q_proj")), _linear(attention, ("kv_a_proj_with_mqa",))
    if getattr(attention, "q_a_proj", None) is not None:
        query, query_norm = _linear(attention, ("q_b_proj",)), _norm(attention, ("q_a_layernorm",))
        if query_norm is None or query.inputs != asked.shape[0] or query.bias is not None:
            raise NotRecognised("queries are not a product behind a norm")
    queries = spec.num_heads * (plain + rotated)
    if (asked if query is None else query).shape[0] != queries or kept.shape[0] != spec.key_dim:
        raise NotRecognised("queries or latents have another size than is taken from them")
    outputs, inputs = attention.kv_b_proj.weight.shape
    value = outputs // spec.num_heads - plain
    if inputs != rank or outputs != spec.num_heads * (plain + value):
        raise NotRecognised("latents do not make a key and a value for each head")
    _aligned(asked.shape[0])
    return LatentParts(attention.kv_b_proj, spec.num_heads, plain, norm, query, query_norm), (asked, kept)


def _query_scale(recorded: RecordedLayer) -> float:
    """What queries are multiplied by before attention, where that is told to scale by 1 and the module by more."""
    own = getattr(recorded.module, "scaling", 1.0)
    return own if recorded.spec.scaling == 1.0 and isinstance(own, float) else 1.0


def _norms_of(
    block: nn.Module,
) -> tuple[NormPart | None, NormPart | None, NormPart | None, NormPart | None, bool]:
    """Norms before and after attention, before and after the MLP; and whether the two stand side by side."""
    pre, second = _norm(block, _FIRST_NORM), _norm(block, _SECOND_NORM)
    post, pre_mlp, post_mlp = _norm(block, _AFTER_ATTENTION), _norm(block, _BEFORE_MLP), _norm(block, _AFTER_MLP)
    if post is None and (pre_mlp is not None or post_mlp is not None):
        post = second
    elif pre_mlp is None:
        pre_mlp = second
    elif second is not None:
        raise NotRecognised("a layer has more norms than places for them")
    # With one norm there is nothing that could stand between the two.
    alone = pre is not None and post is None and pre_mlp is None and post_mlp is None
    return pre, post, pre_mlp, post_mlp, alone or bool(getattr(block, "use_parallel_residual", False))


def _qkv(attention: nn.Module, widths: tuple[int, int, int], equal_heads: bool) -> tuple[Projection, ...]:
    by_head = _first(attention, _QKV_BY_HEAD)
    if by_head is not None:
        whole = _linear(attention, _QKV_BY_HEAD)
        if not equal_heads or len(set(widths)) > 1 or whole.weight.shape[0] != sum(widths):
            raise NotRecognised("query_key_value is not a query, a key and a value for each head")
        size = attention.head_size if hasattr(attention, "head_size") else attention.head_dim
        assert isinstance(size, int)
        starts = (0, size, 2 * size)
        return tuple(Projection(whole.linear, at, at + size, 3 * size, whole.transposed) for at in starts)
    if _first(attention, _FUSED_QKV) is not None:
        return _blocks(_linear(attention, _FUSED_QKV), widths)
    found = tuple(_linear(attention, (name,)) for name in ("q_proj", "k_proj", "v_proj"))
    if tuple(part.weight.shape[0] for part in found) != widths:
        raise NotRecognised("q_proj, k_proj, v_proj do not give what is taken from them")
    return found


def _gate_up(mlp: nn.Module, inner: int) -> tuple[Projection, ...]:
    if _first(mlp, _GATE_UP) is not None:
        return _blocks(_linear(mlp, _GATE_UP), (inner, inner))
    gate = () if getattr(mlp, "gate_proj", None) is None else (_linear(mlp, ("gate_proj",)),)
    found = (*gate, _linear(mlp, _UP))
    if any(part.weight.shape[0] != inner for part in found):
        raise NotRecognised("an MLP's two layers do not fit")
    return found


def _blocks(whole: Projection, widths: Sequence[int]) -> tuple[Projection, ...]:
    """The parts, `widths` outputs wide, of a linear layer that stands for several."""
    ends = list(itertools.accumulate(widths))
    if whole.weight.shape[0] != ends[-1]:
        raise NotRecognised("a fused layer is not the projections that it stands for")
    return tuple(
        Projection(whole.linear, end - width, end, transposed=whole.transposed)
        for end, width in zip(ends, widths, strict=True)
    )


def _linear(module: nn.Module, names: Sequence[str]) -> Projection:
    linear = _first(module, names)
    if type(linear) not in (nn.Linear, Conv1D, Fp8Linear, FourBitLinear, ByteLinear):
        raise NotRecognised(f"{names[0]} is not a linear layer")
    return Projection(linear, transposed=type(linear) is Conv1D)


def _first(module: nn.Module, names: Sequence[str]) -> Any:
    """The part that has one of these names, or None."""
    return next((part for name in names if (part := getattr(module, name, None)) is not None), None)


def _expect(module: nn.Module, names: set[str], what: str) -> None:
    children = [(name, child) for name, child in module.named_children() if not isinstance(child, nn.Dropout)]
    strange = sorted(name for name, _ in children if name not in names)
    if strange:
        raise NotRecognised(f"{what} has a part called {strange[0]}")


def _norm(module: nn.Module, names: Sequence[str], head: int = 0, heads: int = 0) -> NormPart | None:
    """Recognises a norm by what it does to numbers; of queries or keys, where it is given what they are."""
    norm = _first(module, names)
    if norm is None or isinstance(norm, nn.Identity):
        return None
    name = names[0]
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    epsilon = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if not isinstance(weight, torch.Tensor) or not isinstance(epsilon, float):
        raise NotRecognised(f"{name} is not a norm with a weight")
    if head and tuple(weight.shape) not in ((head,), (heads * head,), (heads, head)):
        raise NotRecognised("a norm of queries or keys is neither of a head nor of all heads")
    if not head and weight.ndim != 1:
        raise NotRecognised(f"{name} is not a norm of a row")
    x = torch.randn(3, *weight.shape, generator=torch.Generator().manual_seed(0)).add(1.0).to(weight)
    try:
        found = norm(x).double()
    except Exception as error:
        raise NotRecognised(f"{name} takes more than a tensor") from error
    for centred in (False, True):
        wide = x.double() - x.double().mean(-1, keepdim=True) if centred else x.double()
        plain = wide / (wide.square().mean(-1, keepdim=True) + epsilon).sqrt()
        for offset in (0.0, 1.0):
            wanted = plain * (weight.double() + offset) + (0.0 if bias is None else bias.double())
            if torch.allclose(found, wanted, rtol=2e-2, atol=2e-2 * float(found.abs().max())):
                return NormPart(norm, epsilon, offset, centred, of_heads=weight.shape[-1] == head)
    raise NotRecognised(f"{name} divides neither by the root mean square nor by the deviation")


def _embedding_scale(embedding: nn.Embedding, config: Any) -> float:
    """What an embedding is multiplied by, by the module itself and by the model."""
    row = int(embedding.weight[:64].double().norm(dim=1).argmax())  # not that of a padding token
    weight = embedding.weight[row].double()
    at = torch.tensor([row], device=weight.device)
    answer = embedding(at).flatten()
    within = float(answer.double() @ weight / (weight @ weight))
    # Answers of few digits tell no more of them; most models round what they multiply by to the same type.
    rounded = float(torch.tensor(within).to(answer.dtype))
    if torch.equal(embedding.weight[row] * rounded, answer):
        within = rounded
    return (within if within == within else 1.0) * float(getattr(config, "embedding_multiplier", None) or 1.0)


def _aligned(size: int) -> None:
    if size % ALIGNMENT:
        raise NotRecognised(f"it has a size of {size}, which is not a multiple of {ALIGNMENT}")
