"""Products of many tokens: torch's own, between kernels for what stands before and after. Owned by the step thread."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

from asyncengine.model.attention import fp8
from asyncengine.model.decoder.parts import NormPart, NotRecognised, Projection
from asyncengine.model.fused.launches import NO_ACTIVATION, Formula, load_kernels
from asyncengine.model.launching import OPTIONS, power_of_two
from asyncengine.model.quantised import four_bit_product
from asyncengine.model.quantised.four_bit_linear import FourBitLinear
from asyncengine.model.quantised.four_bits import FourBits
from asyncengine.model.quantised.fp8_linear import Fp8Linear, codes_of

NUMBERS_EACH = 1024
"""Results of `activate` that one program computes: 16 bytes a thread in two bytes each."""


class WideProduct:
    """A formula of any number of tokens, as several launches.

    Raises:
        NotRecognised: Its weights would have to be copied.
    """

    def __init__(self, formula: Formula) -> None:
        self._kernels = load_kernels()
        self._formula = formula
        together = merged(formula.parts)
        self._parts, self._widths = [part for part, _ in together], [widths for _, widths in together]
        self._inner = formula.width
        if any(part.period is not None for part in self._parts):
            raise NotRecognised("outputs of several projections alternate in one layer")
        self._fp8 = [
            part.linear
            for part in self._parts
            if isinstance(part.linear, Fp8Linear) and part.weight.shape == part.linear.weight.shape
        ]
        four_bits = [part.linear for part in self._parts if isinstance(part.linear, FourBitLinear)]
        if not all(layer.by_kernel for layer in four_bits):
            raise NotRecognised("no kernel multiplies codes of four bits")
        self._four_bits = bool(four_bits)
        in_fp8 = {part.weight.dtype is fp8.E4M3 for part in self._parts}
        if in_fp8 != {bool(self._fp8)} or len(self._fp8) not in (0, len(self._parts)):
            raise NotRecognised("of layers in fp8 only a part is wanted")

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """(tokens, outputs) of (tokens, inputs), both contiguous. A residual is written over."""
        formula = self._formula
        if formula.norm is not None:
            x = norm_rows(x, formula.norm)
        if residual is not None:
            return self._added(x, residual)
        if formula.activation != NO_ACTIVATION:
            result = self._activated(x)
        else:
            found = self._products(x)
            result = found[0] if len(found) == 1 else torch.cat(found, 1)
        if formula.factor != 1.0:
            result.mul_(formula.factor)
        if formula.cap:
            result.div_(formula.cap).tanh_().mul_(formula.cap)
        return result

    def _added(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        (part,) = self._parts
        if self._fp8 or self._four_bits or part.bias is not None:
            return residual.add_(self._products(x)[0], alpha=self._formula.factor)
        return residual.addmm_(x, part.weight.T, alpha=self._formula.factor)

    def _activated(self, x: torch.Tensor) -> torch.Tensor:
        formula, tokens = self._formula, x.shape[0]
        inner, found = self._inner, self._products(x)
        gate, up = (found[0][:, :inner], found[0][:, inner:]) if len(found) == 1 else found
        result = x.new_empty(tokens, inner)
        self._kernels.activate[(tokens, -(-inner // NUMBERS_EACH))](
            gate, up, result, gate.stride(0), up.stride(0), INNER=inner, GATED=formula.gated,
            ACTIVATION=formula.activation, NUMBERS_EACH=NUMBERS_EACH, **OPTIONS,
        )  # fmt: skip
        return result

    def apart(self, x: torch.Tensor) -> list[torch.Tensor]:
        """(tokens, outputs) of each linear layer, which may be views of one tensor; of a formula without activation."""
        if self._formula.norm is not None:
            x = norm_rows(x, self._formula.norm)
        found = self._products(x)
        return [part for each, widths in zip(found, self._widths, strict=True) for part in torch.split(each, widths, 1)]

    def _products(self, x: torch.Tensor) -> list[torch.Tensor]:
        """What the linear layers make of it, neighbours in one layer together."""
        if self._fp8:
            codes = codes_of(x)
            return [layer.multiply(*codes) for layer in self._fp8]
        return [_multiplied(x, part) for part in self._parts]


def _multiplied(x: torch.Tensor, part: Projection) -> torch.Tensor:
    """(tokens, outputs) of (tokens, inputs)."""
    codes = part.codes
    if codes is None:
        return functional.linear(x, part.weight, part.bias)
    assert isinstance(codes, FourBits)  # there are no others on a device
    return four_bit_product.multiply(x, codes, part.bias)


def norm_rows(
    x: torch.Tensor, norm: NormPart, residual: torch.Tensor | None = None, factor: float = 1.0
) -> torch.Tensor:
    """Norms each of (tokens, width); with a residual, adds `factor` times that to it."""
    result = torch.empty_like(x)
    width = x.shape[1]
    load_kernels().norm_rows[(x.shape[0],)](
        x, norm.weight, norm.bias, residual, result, norm.offset, norm.epsilon, factor,
        **norm_constants(width, norm.centred, norm.bias is not None, residual is not None), **norm_options(width),
    )  # fmt: skip
    return result


def norm_constants(width: int, centred: bool, bias: bool, residual: bool) -> dict[str, Any]:
    """Of the kernel `norm_rows`."""
    return {
        "WIDTH": width,
        "PAD": power_of_two(width),
        "CENTRED": centred,
        "HAS_NORM_BIAS": bias,
        "HAS_RESIDUAL": residual,
    }


def norm_options(width: int) -> dict[str, Any]:
    """How the compiler is to make it: a thread has 16 bytes of two bytes each, if a row is that long."""
    return OPTIONS | {"num_warps": min(max(power_of_two(width) // 256, 1), 8)}


def merged(parts: Sequence[Projection]) -> list[tuple[Projection, list[int]]]:
    """The same outputs, with neighbours in one layer taken as one; and how many each of them has."""
    found: list[tuple[Projection, list[int]]] = []
    for part in parts:
        last, widths = found[-1] if found else (None, [])
        width = part.weight.shape[0]
        if last is not None and last.linear is part.linear and last.stop == part.start and part.period is None:
            whole = Projection(part.linear, last.start, part.stop, transposed=part.transposed)
            found[-1] = (whole, [*widths, width])
        else:
            found.append((part, [width]))
    return found
