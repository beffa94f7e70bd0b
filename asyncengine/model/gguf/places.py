"""Tensors of a layer that become something else than one parameter each."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from asyncengine.model.gguf.facts import Facts
from asyncengine.model.gguf.family import Place, Tensors
from asyncengine.model.gguf.placed import Given, Placed, rows
from asyncengine.model.quantised.four_bits import FourBits
from asyncengine.model.stored.weight import Decoded


def experts(name: str) -> Place:
    """The weights of all experts of a layer, gates before what they gate.

    Args:
        name: Of the module that has them.
    """

    def place(facts: Facts, prefix: str, tensors: Tensors) -> Iterator[Placed]:
        down = tensors.pop("ffn_down_exps.weight", None)
        if down is None:
            yield from _single_experts(f"{prefix}{name}", tensors)
            return
        yield Placed(f"{prefix}{name}.down_proj", (down,), experts=down.shape[0])
        both = tensors.pop("ffn_gate_up_exps.weight", None)
        if both is not None:
            yield Placed(f"{prefix}{name}.gate_up_proj", (both,), experts=both.shape[0])
            return
        pair = tensors.pop("ffn_gate_exps.weight"), tensors.pop("ffn_up_exps.weight")
        count, width, inputs = pair[0].shape
        shape = (count, 2 * width, inputs)
        yield Placed(f"{prefix}{name}.gate_up_proj", pair, shape, join=merged(count), experts=count)

    return place


def _single_experts(name: str, tensors: Tensors) -> Iterator[Placed]:
    """Those of older files, one by one."""
    count = sum(re.fullmatch(r"ffn_down\.\d+\.weight", short) is not None for short in tensors)
    if not count:
        return
    down = tuple(tensors.pop(f"ffn_down.{expert}.weight") for expert in range(count))
    yield Placed(f"{name}.down_proj", down, (count, *down[0].shape), join=merged(1), experts=count)
    pairs = [[tensors.pop(f"ffn_{kind}.{expert}.weight") for kind in ("gate", "up")] for expert in range(count)]
    both = tuple(each for pair in pairs for each in pair)
    width, inputs = both[0].shape
    yield Placed(f"{name}.gate_up_proj", both, (count, 2 * width, inputs), join=merged(1), experts=count)


def interleaved_experts(name: str) -> Place:
    """As `experts`, with gates between what they gate, inputs first, and biases."""

    def place(facts: Facts, prefix: str, tensors: Tensors) -> Iterator[Placed]:
        down = tensors.pop("ffn_down_exps.weight")
        count, outputs, inputs = down.shape
        shape = (count, inputs, outputs)
        yield Placed(f"{prefix}{name}.down_proj", (down,), shape, experts=count, transposed=True)
        yield Placed(f"{prefix}{name}.down_proj_bias", (tensors.pop("ffn_down_exps.bias"),), keeps_codes=False)
        pair = tensors.pop("ffn_gate_exps.weight"), tensors.pop("ffn_up_exps.weight")
        count, width, inputs = pair[0].shape
        shape, join = (count, inputs, 2 * width), merged(count, interleaved=True)
        yield Placed(f"{prefix}{name}.gate_up_proj", pair, shape, join=join, experts=count, transposed=True)
        biases = tensors.pop("ffn_gate_exps.bias"), tensors.pop("ffn_up_exps.bias")
        yield Placed(
            f"{prefix}{name}.gate_up_proj_bias",
            biases,
            (count, 2 * width),
            join=lambda pair: torch.stack([_numbers(each) for each in pair], -1),
            keeps_codes=False,
        )
        sinks = tensors.pop("attn_sinks.weight")
        yield Placed(f"{prefix}self_attn.sinks", (sinks,))

    return place


def experts_without_gates(name: str) -> Place:
    """As `experts`, where nothing is gated."""

    def place(facts: Facts, prefix: str, tensors: Tensors) -> Iterator[Placed]:
        for stored, of_model in (("ffn_up_exps.weight", "up_proj"), ("ffn_down_exps.weight", "down_proj")):
            if (found := tensors.pop(stored, None)) is not None:
                yield Placed(f"{prefix}{name}.{of_model}", (found,), experts=found.shape[0])

    return place


def gate_and_up(name: str, *stored: str) -> Place:
    """A network whose gate lies before what it gates, in one matrix.

    Args:
        name: Of the parameter.
        stored: Endings of the names of both.
    """

    def place(facts: Facts, prefix: str, tensors: Tensors) -> Iterator[Placed]:
        for ending in stored:
            gate, up = (tensors.pop(f"ffn_{each}{ending}.weight", None) for each in ("gate", "up"))
            if gate is not None and up is not None:
                shape = (gate.shape[0] + up.shape[0], gate.shape[1])
                yield Placed(f"{prefix}{name}", (gate, up), shape, join=merged(1))

    return place


def by_head(name: str) -> Place:
    """Queries, keys and values in one matrix, which the model has by head.

    Args:
        name: Of the module.
    """

    def place(facts: Facts, prefix: str, tensors: Tensors) -> Iterator[Placed]:
        heads = facts.one("attention.head_count")
        for last in ("weight", "bias"):
            if (found := tensors.pop(f"attn_qkv.{last}", None)) is not None:
                order = torch.arange(found.shape[0]).view(3, heads, -1).transpose(0, 1).flatten()
                change = rows(partial(_constant, order))
                yield Placed(f"{prefix}{name}.{last}", (found,), change=change, keeps_codes=last == "weight")

    return place


def _constant(order: torch.Tensor, count: int) -> torch.Tensor:
    return order


def latent_keys(facts: Facts, prefix: str, tensors: Tensors) -> Iterator[Placed]:
    """What makes keys and values of what is kept of them, for each head; of keys it is stored the other way round."""
    keys, values = tensors.pop("attn_k_b.weight", None), tensors.pop("attn_v_b.weight", None)
    if keys is None or values is None:
        return
    heads, rank, width = keys.shape

    def join(pair: Sequence[Decoded]) -> Decoded:
        of_keys = _numbers(pair[0]).view(heads, rank, width).transpose(1, 2)
        return torch.cat([of_keys, _numbers(pair[1]).view(heads, -1, rank)], 1).flatten(0, 1)

    shape = (heads * (width + values.shape[1]), rank)
    yield Placed(f"{prefix}self_attn.kv_b_proj.weight", (keys, values), shape, join=join, keeps_codes=False)


def norms_of_heads(facts: Facts, prefix: str, tensors: Tensors) -> Iterator[Placed]:
    """Norms of queries and keys, one for each head."""
    for stored, name in (("attn_q_norm.weight", "q_layernorm"), ("attn_k_norm.weight", "k_layernorm")):
        if (found := tensors.pop(stored, None)) is not None:
            for head in range(found.shape[0]):
                yield Placed(f"{prefix}self_attn.{name}.norms.{head}.weight", (found.part(head, 1),), found.shape[1:])


def streams(facts: Facts, prefix: str, tensors: Tensors) -> Iterator[Placed]:
    """Matrices between the streams of Gemma 3n, several of which are stored as one."""
    for stored, name in (("altup_proj", "altup_projections"), ("altup_unembd_proj", "altup_unembed_projections")):
        found = tensors.pop(f"{stored}.weight")
        for index in range(found.shape[0]):
            yield Placed(f"model.{name}.{index}.weight", (found.part(index, 1),), found.shape[1:])


def activation(facts: Facts, prefix: str, tensors: Tensors) -> Iterator[Given]:
    """The parameters of xIELU, which are metadata."""
    layer = int(prefix.rstrip(".").rpartition(".")[2])
    for key, shape in (("alpha_p", (1,)), ("alpha_n", (1,)), ("beta", ()), ("eps", ())):
        value = facts.without_architecture(f"xielu.{key}")
        value = value[layer] if isinstance(value, list) else value
        yield Given(f"{prefix}mlp.act_fn.{key}", torch.tensor(value, dtype=torch.float32).view(shape))


def merged(count: int, interleaved: bool = False) -> Callable[[Sequence[Decoded]], Decoded]:
    """Puts the outputs of several matrices of each expert behind or between each other.

    Args:
        count: How many experts there are.
        interleaved: Whether between.
    """

    def both(parts: Sequence[torch.Tensor]) -> torch.Tensor:
        parts = [each.view(count, -1, each.shape[-1]) for each in parts]
        whole = torch.stack(parts, 2).flatten(1, 2) if interleaved else torch.cat(parts, 1)
        return whole.flatten(0, 1)

    def join(parts: Sequence[Decoded]) -> Decoded:
        codes = [each for each in parts if isinstance(each, FourBits)]
        if not codes:
            return both([_numbers(each) for each in parts])
        zeros = None
        if any(each.zeros is not None for each in codes):
            zeros = both([torch.zeros_like(each.scales) if each.zeros is None else each.zeros for each in codes])
        scales = both([each.scales for each in codes])
        return FourBits(both([each.codes for each in codes]), scales, zeros, codes[0].values)

    return join


def _numbers(found: Decoded) -> torch.Tensor:
    assert isinstance(found, torch.Tensor)
    return found
