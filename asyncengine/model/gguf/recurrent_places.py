"""As `places`, of layers that keep a state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from asyncengine.model.gguf.facts import Facts
from asyncengine.model.gguf.family import Place, Tensors
from asyncengine.model.gguf.placed import Placed, columns, numbers, rows
from asyncengine.model.gguf.places import merged
from asyncengine.model.quantised.four_bits import GROUP
from asyncengine.model.stored.weight import Decoded


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
    yield take("ssm_a", "A_log", change=numbers(lambda found: _logarithm(found)[..., heads]), keeps_codes=False)
    yield take("ssm_dt.bias", "dt_bias", change=numbers(lambda found: found[..., heads]), keeps_codes=False)
    yield take("ssm_norm.weight", "norm.weight")
    yield take("ssm_out.weight", "out_proj.weight", change=columns(heads, width), keeps_codes=width % GROUP == 0)


def grouped_value_heads(facts: Facts, prefix: str, tensors: Tensors) -> Iterator[Placed]:
    """Gated delta rules whose queries, keys, values and gates are one matrix in the model, by key head."""
    if "ssm_out.weight" not in tensors:
        return
    keys, state = facts("ssm.group_count"), facts("ssm.state_size")
    widths = [state, state, *[facts("ssm.inner_size") // keys] * 2]
    starts = [0, state * keys, 2 * state * keys, 2 * state * keys + facts("ssm.inner_size")]
    order = torch.cat(
        [
            torch.arange(start + head * width, start + (head + 1) * width)
            for head in range(keys)
            for start, width in zip(starts, widths, strict=True)
        ]
    )

    def join(pair: Sequence[Decoded]) -> Decoded:
        return rows(lambda _: order)(merged(1)(pair))

    prefix += "linear_attn."
    if "attn_qkv.weight" in tensors:  # older files have it as the model does
        pair = tensors.pop("attn_qkv.weight"), tensors.pop("attn_gate.weight")
        yield Placed(f"{prefix}in_proj_qkvz.weight", pair, (len(order), pair[0].shape[1]), join=join)
    yield from _of_state(prefix, tensors)
    yield Placed(f"{prefix}norm.weight", (tensors.pop("ssm_norm.weight"),))


def mamba(name: str) -> Place:
    """Layers of either Mamba.

    Args:
        name: Of the module.
    """

    def place(facts: Facts, prefix: str, tensors: Tensors) -> Iterator[Placed]:
        if "ssm_in.weight" not in tensors:
            return
        yield from _of_state(f"{prefix}{name}.", tensors, "ssm_dt.weight" in tensors)
        if (norm := tensors.pop("ssm_norm.weight", None)) is not None:
            yield Placed(f"{prefix}{name}.norm.weight", (norm,), (norm.rows * norm.shape[-1],), keeps_codes=False)

    return place


def _of_state(prefix: str, tensors: Tensors, first: bool = False) -> Iterator[Placed]:
    """What all these layers have. Those of the first Mamba have decays for each channel and number of its state."""
    convolution = tensors.pop("ssm_conv1d.weight")
    channels = (convolution.shape[0], 1, convolution.shape[-1])
    yield Placed(f"{prefix}conv1d.weight", (convolution,), channels, keeps_codes=False)
    decays = tensors.pop("ssm_a")
    shape = decays.shape if first else (decays.rows * decays.shape[-1],)
    yield Placed(f"{prefix}A_log", (decays,), shape, change=numbers(_logarithm), keeps_codes=False)
    if (passed := tensors.pop("ssm_d", None)) is not None:
        yield Placed(f"{prefix}D", (passed,), (passed.rows * passed.shape[-1],), keeps_codes=False)
    if not first:
        yield Placed(f"{prefix}dt_bias", (tensors.pop("ssm_dt.bias"),))


def _logarithm(decays: torch.Tensor) -> torch.Tensor:
    return (-decays).log()
