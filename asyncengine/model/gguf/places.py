"""Tensors of a layer that become something else than one parameter each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from asyncengine.model.gguf.facts import Facts
from asyncengine.model.gguf.header import BlockTensor
from asyncengine.model.gguf.placed import Placed, columns, numbers, rows
from asyncengine.model.quantised.four_bits import GROUP, FourBits
from asyncengine.model.stored.weight import Decoded

Tensors = dict[str, BlockTensor]


def experts(name: str) -> Callable[[Facts, str, Tensors], Iterator[Placed]]:
    """The weights of all experts of a layer, gates before what they gate.

    Args:
        name: Of the module that has them.
    """

    def place(facts: Facts, prefix: str, tensors: Tensors) -> Iterator[Placed]:
        down = tensors.pop("ffn_down_exps.weight", None)
        if down is None:
            return
        yield Placed(f"{prefix}{name}.down_proj", (down,), experts=down.shape[0])
        both = tensors.pop("ffn_gate_up_exps.weight", None)
        if both is not None:
            yield Placed(f"{prefix}{name}.gate_up_proj", (both,), experts=both.shape[0])
            return
        pair = tensors.pop("ffn_gate_exps.weight"), tensors.pop("ffn_up_exps.weight")
        count, width, inputs = pair[0].shape
        shape = (count, 2 * width, inputs)
        yield Placed(f"{prefix}{name}.gate_up_proj", pair, shape, join=_merged(count, False), experts=count)

    return place


def interleaved_experts(name: str) -> Callable[[Facts, str, Tensors], Iterator[Placed]]:
    """As `experts`, with gates between what they gate, inputs first, and biases."""

    def place(facts: Facts, prefix: str, tensors: Tensors) -> Iterator[Placed]:
        down = tensors.pop("ffn_down_exps.weight")
        count, outputs, inputs = down.shape
        shape = (count, inputs, outputs)
        yield Placed(f"{prefix}{name}.down_proj", (down,), shape, experts=count, transposed=True)
        yield Placed(f"{prefix}{name}.down_proj_bias", (tensors.pop("ffn_down_exps.bias"),))
        pair = tensors.pop("ffn_gate_exps.weight"), tensors.pop("ffn_up_exps.weight")
        count, width, inputs = pair[0].shape
        shape, join = (count, inputs, 2 * width), _merged(count, True)
        yield Placed(f"{prefix}{name}.gate_up_proj", pair, shape, join=join, experts=count, transposed=True)
        biases = tensors.pop("ffn_gate_exps.bias"), tensors.pop("ffn_up_exps.bias")
        yield Placed(
            f"{prefix}{name}.gate_up_proj_bias",
            biases,
            (count, 2 * width),
            join=lambda pair: torch.stack([_numbers(each) for each in pair], -1),
        )
        sinks = tensors.pop("attn_sinks.weight")
        yield Placed(f"{prefix}self_attn.sinks", (sinks,))

    return place


def short_convolution(facts: Facts, prefix: str, tensors: Tensors) -> Iterator[Placed]:
    """A convolution of each channel by itself, which has a dimension for that."""
    if (stored := tensors.pop("shortconv.conv.weight", None)) is not None:
        shape = (stored.shape[0], 1, stored.shape[1])
        yield Placed(f"{prefix}conv.conv.weight", (stored,), shape, keeps_codes=False)


def value_heads(facts: Facts, prefix: str, tensors: Tensors) -> Iterator[Placed]:
    """Gated delta rules, whose value heads llama.cpp has in another order: those that share a key head lie apart."""
    if "ssm_out.weight" not in tensors:
        return
    keys, values = facts("ssm.group_count"), facts("ssm.time_step_rank")
    width = facts("ssm.inner_size") // values
    heads = torch.arange(values).view(-1, keys).t().flatten()
    each = (heads[:, None] * width + torch.arange(width)).flatten()
    mixed = 2 * keys * facts("ssm.state_size")  # queries and keys come before the values
    behind = torch.cat([torch.arange(mixed), mixed + each])
    prefix += "linear_attn."

    def take(stored: str, name: str, **more: Any) -> Placed:
        return Placed(prefix + name, (tensors.pop(stored),), **more)

    yield take("attn_qkv.weight", "in_proj_qkv.weight", change=rows(lambda _: behind))
    convolution = tensors["ssm_conv1d.weight"]
    shape = (convolution.shape[0], 1, convolution.shape[-1])
    yield take("ssm_conv1d.weight", "conv1d.weight", shape=shape, change=rows(lambda _: behind), keeps_codes=False)
    yield take("attn_gate.weight", "in_proj_z.weight", change=rows(lambda _: each))
    for stored, name in (("ssm_alpha", "in_proj_a"), ("ssm_beta", "in_proj_b")):
        yield take(f"{stored}.weight", f"{name}.weight", change=rows(lambda _: heads))
    yield take("ssm_a", "A_log", change=numbers(lambda found: (-found).log()[..., heads]), keeps_codes=False)
    yield take("ssm_dt.bias", "dt_bias", change=numbers(lambda found: found[..., heads]), keeps_codes=False)
    yield take("ssm_norm.weight", "norm.weight")
    yield take("ssm_out.weight", "out_proj.weight", change=columns(heads, width), keeps_codes=width % GROUP == 0)


def _merged(count: int, interleaved: bool) -> Callable[[Sequence[Decoded]], Decoded]:
    """Puts the outputs of two matrices of each expert behind or between each other."""

    def both(pair: Sequence[torch.Tensor]) -> torch.Tensor:
        parts = [each.view(count, -1, each.shape[-1]) for each in pair]
        whole = torch.stack(parts, 2).flatten(1, 2) if interleaved else torch.cat(parts, 1)
        return whole.flatten(0, 1)

    def join(pair: Sequence[Decoded]) -> Decoded:
        codes = [each for each in pair if isinstance(each, FourBits)]
        if not codes:
            return both([_numbers(each) for each in pair])
        zeros = None
        if any(each.zeros is not None for each in codes):
            zeros = both([torch.zeros_like(each.scales) if each.zeros is None else each.zeros for each in codes])
        scales = both([each.scales for each in codes])
        return FourBits(both([each.codes for each in codes]), scales, zeros, codes[0].values)

    return join


def _numbers(found: Decoded) -> torch.Tensor:
    assert isinstance(found, torch.Tensor)
    return found
