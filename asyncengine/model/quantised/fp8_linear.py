"""Linear layers in fp8: weights with one scale for each output, inputs with one for each token.

Both are multiplied as they are by `torch._scaled_mm`, scaled by rows; on CUDA one kernel of our own quantises the input
before it. torch has the same product for the CPU, where it is slow: it is there for tests, and to look at the error
(torch 2.11 has not, and numbers are multiplied).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from asyncengine.model.attention import fp8
from asyncengine.model.quantised.eight_bits import EightBits
from asyncengine.model.quantised.replaced_linear import replace
from asyncengine.model.weight_writer import Writer, restorer

ALIGNMENT = 16
"""Sizes of a layer must be multiples of it, or it stays as it is: the device's products need that."""
_BLOCK, _WARPS = 4096, 8


def quantised(numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, columns) numbers in fp8, and the (rows, 1) scales in float32 by which they are to be multiplied."""
    wide = numbers.float()
    scales = wide.abs().amax(1, keepdim=True).clamp_min(1e-12) / fp8.LARGEST
    return fp8.stored(wide / scales, fp8.E4M3), scales


def codes_of(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As `quantised`; in one launch, where there is a kernel for it."""
    return (_kernel() if rows.device.type == "cuda" else quantised)(rows)


class Fp8Linear(nn.Module):
    """Takes the place of a linear layer, whose weight and bias keep their names.

    Attributes:
        weight: (outputs, inputs) in fp8.
        bias: (outputs,), or None, as it was.
        weight_scale: (1, outputs).
        dtype: Of the weight that it was made of, of its inputs and of its outputs.

    Args:
        weights: Codes and scales.
        bias: (outputs,), or None.
        dtype: As above.
    """

    def __init__(self, weights: EightBits, bias: nn.Parameter | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.out_features, self.in_features = weights.codes.shape
        self.weight = nn.Parameter(weights.codes, requires_grad=False)
        self.bias = bias
        self.weight_scale: torch.Tensor
        self.register_buffer("weight_scale", weights.scales.view(1, -1), persistent=False)

    @classmethod
    def of(cls, linear: nn.Linear, tied: Fp8Linear | None = None) -> Fp8Linear:
        """Takes the place of a linear layer, whose weight is let go.

        Args:
            linear: The layer.
            tied: One in fp8 that was made of the same weight, and shares its own.
        """
        if tied is None:
            return cls(EightBits(*quantised(linear.weight.detach())), linear.bias, linear.weight.dtype)
        made = cls(EightBits(tied.weight.data, tied.weight_scale), linear.bias, tied.dtype)
        made.weight = tied.weight
        return made

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(..., inputs) to (..., outputs)."""
        rows = input.reshape(-1, self.in_features)
        output = self.multiply(*codes_of(rows)) if len(rows) else rows.new_empty(0, self.out_features)
        return output.view(*input.shape[:-1], self.out_features)

    def multiply(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """(rows, inputs) in fp8 and (rows, 1) scales to (rows, outputs)."""
        if codes.is_cpu and not _scales_rows_on_cpu():
            found = functional.linear(codes.float(), self.weight.float()).mul_(scales).mul_(self.weight_scale)
            return (found if self.bias is None else found.add_(self.bias)).to(self.dtype)
        return torch._scaled_mm(
            codes,
            self.weight.t(),
            scale_a=scales,
            scale_b=self.weight_scale,
            bias=self.bias,
            out_dtype=self.dtype,
            use_fast_accum=True,
        )

    @torch.no_grad()
    def write(self, value: torch.Tensor) -> None:
        """Replaces the weight by another one in `dtype`."""
        weight, scale = quantised(value.to(self.weight.device))
        fp8.movable(self.weight.data).copy_(fp8.movable(weight))
        self.weight_scale.copy_(scale.view(1, -1))

    def keep(self) -> Callable[[], None]:
        """What puts the present weight back."""
        return restorer(fp8.movable(self.weight.data), self.weight_scale)


def quantise(model: Any, but: Collection[nn.Module] = ()) -> tuple[int, int]:
    """Puts an `Fp8Linear` in the place of every linear layer but the head and those named.

    Returns:
        How many weights are in fp8 now, and how many there are.
    """
    return replace(model, fits, Fp8Linear.of, but)


def counted(model: nn.Module) -> tuple[int, int]:
    """How many weights are in fp8, and how many there are."""
    in_fp8 = {id(layer.weight): layer.weight.numel() for layer in layers(model).values()}
    return sum(in_fp8.values()), sum(parameter.numel() for parameter in model.parameters())


def fits(layer: nn.Linear) -> bool:
    """Whether the device can multiply a layer in fp8."""
    return not any(size % ALIGNMENT for size in layer.weight.shape)


def layers(model: nn.Module) -> dict[int, Fp8Linear]:
    """The layers in fp8, by the identity of their weights."""
    return {id(module.weight): module for module in model.modules() if isinstance(module, Fp8Linear)}


def writers(model: nn.Module) -> dict[int, list[Writer]]:
    """What new values of weights in fp8 go through, by the identity of the weights.

    Layers that share a weight each write it: a move to another device leaves each with a scale of its own.
    """
    found: dict[int, list[Writer]] = {}
    for module in model.modules():
        if isinstance(module, Fp8Linear):
            found.setdefault(id(module.weight), []).append(Writer(module.write, module.keep))
    return found


class RowKernel:
    """Quantises in one launch what `quantised` does in several.

    Raises:
        ImportError: Triton is not there.
    """

    def __init__(self) -> None:
        self._kernel: Any = importlib.import_module("asyncengine.model.quantised.fp8_kernels").quantise_rows

    def __call__(self, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `quantised`."""
        count, columns = numbers.shape
        if numbers.stride(1) != 1:
            numbers = numbers.contiguous()
        codes = torch.empty(count, columns, dtype=torch.uint8, device=numbers.device)
        scales = torch.empty(count, 1, dtype=torch.float32, device=numbers.device)
        on_device = torch.cuda.device(numbers.device) if numbers.device.type == "cuda" else contextlib.nullcontext()
        if count:
            with on_device:
                self._kernel[(count,)](numbers, codes, scales, numbers.stride(0), **constants(columns))
        return codes.view(fp8.E4M3), scales


def constants(columns: int) -> dict[str, int]:
    """What the kernel `quantise_rows` is compiled for."""
    return {"COLUMNS": columns, "BLOCK": min(_BLOCK, 1 << (columns - 1).bit_length()), "num_warps": _WARPS}


@functools.cache
def _scales_rows_on_cpu() -> bool:
    """Whether torch's product for the CPU takes scales of rows; that of 2.11 takes one of each matrix."""
    codes = torch.ones(ALIGNMENT, ALIGNMENT).to(fp8.E4M3)
    try:
        torch._scaled_mm(
            codes,
            codes.t(),
            scale_a=torch.ones(ALIGNMENT, 1),
            scale_b=torch.ones(1, ALIGNMENT),
            out_dtype=torch.bfloat16,
        )
    except RuntimeError:
        return False
    return True


@functools.cache
def _kernel() -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    try:
        return RowKernel()
    except Exception:  # whatever a package that does not fit the system raises when it is imported
        return quantised
