"""Experts whose weights have four bits, as gpt-oss publishes its own (MXFP4).

A module of transformers becomes one of a subclass. On CUDA kernels do what it does, if they know its gate. Elsewhere
what is done with weights is left to it, and codes become numbers for as long as that takes: that is the reference that
those kernels and the compiled step of the CPU are held to.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

from asyncengine.model.quantised import four_bit_product
from asyncengine.model.quantised.four_bit_linear import FourBitLinear, keeper, replace_codes
from asyncengine.model.quantised.four_bit_product import Gate
from asyncengine.model.quantised.four_bits import GROUP, INT4, FourBits, nearest
from asyncengine.model.weight_writer import Writer

NAMES = ("gate_up_proj", "down_proj")
"""The parameters that have the weights of all experts, (experts, outputs, inputs) or with the last two exchanged."""

_HELD: dict[type[nn.Module], type[nn.Module]] = {}


class FourBitExperts(nn.Module):
    """What a module of experts becomes.

    Its parameters of `NAMES`, or one of them, are codes, (experts * outputs, inputs / 2), with buffers ``NAME_scale``
    and ``NAME_zero``. As an attribute each of these is what it was, in shape and dtype: without numbers outside of a
    forward pass.

    Attributes:
        transposed: Whether the weights are (experts, inputs, outputs).
        four_bit_shapes: What the shapes of those with codes are taken to be, by name.
        four_bit_values: What codes stand for, by name.
        dtype: Of the weights.
        kernel_gate: What is between their products; None if there are no kernels for that, or not both are codes.
        by_kernel: Whether kernels multiply codes on CUDA.
    """

    transposed: bool
    four_bit_shapes: dict[str, torch.Size]
    four_bit_values: dict[str, tuple[float, ...]]
    dtype: torch.dtype
    kernel_gate: Gate | None
    by_kernel: bool

    gate_up_proj = property(lambda self: self._numbers("gate_up_proj"))
    down_proj = property(lambda self: self._numbers("down_proj"))

    def four_bits(self, name: str) -> FourBits:
        """The codes of one of `NAMES` and what they stand for, of all experts."""
        codes, buffers = self._parameters[name], self._buffers
        scales = buffers[f"{name}_scale"]
        assert codes is not None and scales is not None
        return FourBits(codes.data, scales, buffers[f"{name}_zero"], self.four_bit_values[name])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's own: (tokens, hidden), (tokens, top) experts, and their shares."""
        if self.kernel_gate is not None and self.by_kernel and len(args) == 3 and args[0].device.type == "cuda":
            return self._by_kernels(*args)
        present = {name: self._made(name) for name in self.four_bit_shapes}
        self.__dict__["_present"] = present
        try:
            return super().forward(*args, **kwargs)
        finally:
            del self.__dict__["_present"]

    def _by_kernels(self, x: torch.Tensor, chosen: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        gate_up, down = (self.four_bits(name) for name in NAMES)
        biases = (self._parameters.get(f"{name}_bias") for name in NAMES)
        assert self.kernel_gate is not None
        return four_bit_product.multiply_experts(x, gate_up, down, chosen, shares, self.kernel_gate, *biases)

    @torch.no_grad()
    def write(self, name: str, value: torch.Tensor) -> None:
        """Replaces one of `NAMES` by another one in its shape and dtype."""
        replace_codes(self.four_bits(name), _rows(value, self.transposed))

    def release(self, name: str) -> None:
        """Lets codes go; whoever took them says so."""
        codes = self._parameters[name]
        assert codes is not None
        self._parameters[name] = nn.Parameter(codes.detach().to("meta"), requires_grad=False)
        for buffer in (f"{name}_scale", f"{name}_zero"):
            self._buffers[buffer] = None

    def _numbers(self, name: str) -> torch.Tensor:
        if name not in self.four_bit_shapes:
            return cast("torch.Tensor", self._parameters[name])
        present = self.__dict__.get("_present")
        if present is not None:
            return cast("torch.Tensor", present[name])
        return torch.empty(self.four_bit_shapes[name], dtype=self.dtype, device="meta")

    def _made(self, name: str) -> torch.Tensor:
        shape = self.four_bit_shapes[name]
        numbers = self.four_bits(name).weight(self.dtype)
        numbers = numbers.view(shape[0], -1, numbers.shape[-1])
        return numbers.transpose(1, 2) if self.transposed else numbers


def hold(module: Any, weights: dict[str, FourBits], transposed: bool) -> None:
    """Makes a module of experts one of `FourBitExperts`.

    Args:
        module: Its parameters that become codes are let go; they may be without numbers.
        weights: Codes of all experts, one after the other, for each of `NAMES`, or for one.
        transposed: Whether its weights are (experts, inputs, outputs).
    """
    dtype = module.down_proj.dtype
    shapes = {name: getattr(module, name).shape for name in weights}
    for name in weights:
        del module._parameters[name]
    module.__class__ = _held(type(module))
    module.transposed, module.dtype = transposed, dtype
    module.four_bit_shapes = shapes
    module.four_bit_values = {name: weights[name].values for name in weights}
    module.kernel_gate, module.by_kernel = _gate(module, weights), True
    for name in weights:
        own = weights[name]
        module._parameters[name] = nn.Parameter(own.codes, requires_grad=False)
        module.register_buffer(f"{name}_scale", own.scales, persistent=False)
        module.register_buffer(f"{name}_zero", own.zeros, persistent=False)


def _gate(module: Any, weights: dict[str, FourBits]) -> Gate | None:
    """What a module of experts does between its products, if there are kernels for it and for its weights."""
    # Not above: what looks for the parts of a decoder looks for experts of four bits.
    from asyncengine.model.decoder.experts import gate_of
    from asyncengine.model.decoder.parts import NotRecognised

    if len(weights) < len(NAMES):
        return None
    try:
        activation, alpha, limit, alternating = gate_of(module, weights["down_proj"].shape[1])
    except NotRecognised:
        return None
    has_kernels = all(four_bit_product.has_kernel(own) for own in weights.values())
    return Gate(activation, alternating, alpha, limit) if has_kernels else None


def _held(kind: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a module's class, one for each."""
    if kind not in _HELD:
        _HELD[kind] = type(f"FourBit{kind.__name__}", (FourBitExperts, kind), {})
    return _HELD[kind]


def round_experts(model: nn.Module, group: int = GROUP, values: tuple[float, ...] = INT4) -> int:
    """Rounds the weights of experts, as far as their inputs are whole groups.

    Returns:
        How many weights were rounded.
    """
    done = 0
    for module in list(model.modules()):
        own = [module._parameters.get(name) for name in NAMES]
        if any(each is None or each.ndim != 3 for each in own):
            continue
        gate_up, down = cast("list[torch.Tensor]", own)
        transposed = is_transposed(module, gate_up, down)
        inputs = (gate_up.shape[1], down.shape[1]) if transposed else (gate_up.shape[2], down.shape[2])
        if any(count % group for count in inputs):
            continue
        done += gate_up.numel() + down.numel()
        weights = {
            name: nearest(_rows(each.detach(), transposed), group, values)
            for name, each in zip(NAMES, (gate_up, down), strict=True)
        }
        hold(module, weights, transposed)
    return done


def is_transposed(module: Any, gate_up: torch.Tensor, down: torch.Tensor) -> bool:
    """Whether experts are stored as (experts, inputs, outputs)."""
    (a, b), (c, d) = gate_up.shape[1:], down.shape[1:]
    straight, transposed = (a, b) == (2 * d, c), (a, b) == (d, 2 * c)
    return bool(getattr(module, "is_transposed", False)) if straight and transposed else transposed


def _rows(weights: torch.Tensor, transposed: bool) -> torch.Tensor:
    """(experts * outputs, inputs)."""
    return (weights.transpose(1, 2) if transposed else weights).flatten(0, 1)


def use_kernels(model: nn.Module, whether: bool) -> None:
    """Lets kernels multiply codes on CUDA, or numbers be made of codes; as far as there are kernels."""
    for module in model.modules():
        if isinstance(module, FourBitLinear):
            module.by_kernel = whether and four_bit_product.has_kernel(module.four_bits)
        elif isinstance(module, FourBitExperts):
            module.by_kernel = whether


def share_of(model: nn.Module) -> float:
    """The share of a model's weights that are codes of four bits."""
    codes = sum(each.numel() for each in model.parameters() if each.dtype is torch.uint8)  # two weights each
    return 2 * codes / (codes + sum(each.numel() for each in model.parameters()))


def layers(model: nn.Module) -> dict[int, tuple[torch.Size, torch.dtype]]:
    """What the weights of experts in four bits are taken to be, by the identity of the codes."""
    return {
        id(module._parameters[name]): (module.four_bit_shapes[name], module.dtype)
        for module in model.modules()
        if isinstance(module, FourBitExperts)
        for name in module.four_bit_shapes
    }


def writers(model: nn.Module) -> dict[int, list[Writer]]:
    """What new values of experts in four bits go through, by the identity of the codes."""
    found: dict[int, list[Writer]] = {}
    for module in model.modules():
        if isinstance(module, FourBitExperts):
            for name in module.four_bit_shapes:
                write: Callable[[torch.Tensor], None] = functools.partial(module.write, name)
                keep = functools.partial(_keep, module, name)
                found[id(module._parameters[name])] = [Writer(write, keep)]
    return found


def _keep(module: FourBitExperts, name: str) -> Callable[[], None]:
    return keeper(module.four_bits(name))
