"""Products of few tokens with what stands before and after them, as one launch. Owned by the step thread."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

import torch

from asyncengine.model.attention import fp8
from asyncengine.model.fused import tiles
from asyncengine.model.fused.launches import NO_ACTIVATION, Formula, load_kernels
from asyncengine.model.fused.tiles import MOST_TOKENS, Tile
from asyncengine.model.launching import OPTIONS
from asyncengine.model.quantised.four_bit_linear import FourBitLinear

_CENTRES = (3, 9)
"""The first version of Triton that is known to compile a mean that is taken off, in a product of one token; 3.6 makes
thousands of lines of it that spill."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What the kernel `project` is compiled for, apart from how it is cut.

    Attributes:
        inputs: Of every matrix.
        outputs: Of each matrix, at most three.
        dtype: Of the weights.
        gated: Whether they are a gate and an up projection.
        normed: Whether the inputs are normed.
        centred: Whether their mean is taken off.
        norm_bias: Whether the norm has a bias.
        bias: Whether the matrices have biases.
        residual: Whether something is added to the result.
        cap: Whether the result is capped.
        activation: By `blueprint.ACTIVATIONS`.
    """

    inputs: int
    outputs: tuple[int, ...]
    dtype: torch.dtype
    gated: bool = False
    normed: bool = False
    centred: bool = False
    norm_bias: bool = False
    bias: bool = False
    residual: bool = False
    cap: bool = False
    activation: int = NO_ACTIVATION

    def tile(self, tokens: int) -> Tile:
        """How it is cut for so many tokens."""
        return tiles.tile_for(tokens, self.inputs, sum(self.outputs), self.dtype.itemsize, self.gated)

    def blocks(self, tile: Tile) -> int:
        """How many programs that makes."""
        apart = self.outputs[:1] if self.gated else self.outputs
        return sum(-(-outputs // tile.outputs) for outputs in apart)

    def constants(self, kernels: Any, tokens: int, tile: Tile, widen: bool = False) -> dict[str, Any]:
        """Of the kernel `project`."""
        padded = 1 if tokens == 1 else MOST_TOKENS
        norm = kernels.NO_NORM
        if self.normed:
            small = padded > 1 and self.dtype is torch.float16  # x * g may be more than the largest of them
            norm = kernels.NORM_BEFORE if self.centred or self.norm_bias or small else kernels.NORM_AFTER
        first, second, third = (*self.outputs, 0, 0)[:3]
        return {
            "INPUTS": self.inputs,
            "FIRST": first,
            "SECOND": second,
            "THIRD": third,
            "NORM": norm,
            "CENTRED": self.centred,
            "HAS_NORM_BIAS": self.norm_bias,
            "GATED": self.gated,
            "ACTIVATION": self.activation,
            "HAS_RESIDUAL": self.residual,
            "HAS_CAP": self.cap,
            "HAS_BIAS": self.bias,
            "TOKENS": padded,
            "OUTPUTS_EACH": tile.outputs,
            "INPUTS_AT_ONCE": tile.inputs,
            "STAGES": tile.stages,
            # Without tf32, whose 10 bits of mantissa are not what float32 was asked for.
            "PRECISION": "ieee" if self.dtype is torch.float32 else None,
            "WIDEN": widen,
        }


class NarrowProduct:
    """A formula of few tokens, as one launch.

    Weights are read where the modules keep them, each time: who writes into them or moves them need not say so here.
    """

    def __init__(self, formula: Formula) -> None:
        self._kernels = load_kernels()
        self._formula = formula
        weights = [part.weight for part in formula.parts]
        norm = formula.norm
        self._dtype = formula.dtype or weights[0].dtype
        self._width = formula.width
        self._shape = Shape(
            inputs=weights[0].shape[1],
            outputs=tuple(weight.shape[0] for weight in weights),
            dtype=weights[0].dtype,
            gated=formula.gated,
            normed=norm is not None,
            centred=norm is not None and norm.centred,
            norm_bias=norm is not None and norm.bias is not None,
            bias=formula.parts[0].bias is not None,
            cap=bool(formula.cap),
            activation=formula.activation,
        )

    @staticmethod
    def computes(formula: Formula) -> bool:
        """Whether the kernel can read the weights, and be compiled for what stands around them."""
        if any(isinstance(part.linear, FourBitLinear) for part in formula.parts):
            return False  # those have a kernel of their own
        weights = [part.weight for part in formula.parts]
        if any(weight.stride() != (weight.shape[1], 1) or weight.dtype is fp8.E4M3 for weight in weights):
            return False
        if len({(part.weight.dtype, part.bias is None) for part in formula.parts}) > 1:
            return False
        centred = formula.norm is not None and formula.norm.centred
        return not centred or weights[0].device.type != "cuda" or _triton() >= _CENTRES

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """(tokens, outputs) of (tokens, inputs), both contiguous; of 1 to `MOST_TOKENS` tokens."""
        tokens, shape, formula = x.shape[0], self._shape, self._formula
        result = torch.empty(tokens, self._width, dtype=self._dtype, device=x.device)
        if residual is not None:
            shape = dataclasses.replace(shape, residual=True)
        tile = shape.tile(tokens)
        weights = [part.weight for part in formula.parts]
        biases = [part.bias for part in formula.parts]
        absent = [None] * (3 - len(weights))
        norm = formula.norm
        widen = shape.dtype is torch.bfloat16 and x.device.type == "cpu"
        self._kernels.project[(shape.blocks(tile),)](
            x, None if norm is None else norm.weight, None if norm is None else norm.bias,
            *weights, *absent, *biases, *absent, residual, result, tokens,
            0.0 if norm is None else norm.offset, 0.0 if norm is None else norm.epsilon, formula.factor, formula.cap,
            **shape.constants(self._kernels, tokens, tile, widen), **launch_options(tile),
        )  # fmt: skip
        return result


def _triton() -> tuple[int, ...]:
    import triton

    return tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:2])


def launch_options(tile: Tile) -> dict[str, Any]:
    """How the compiler is to make `project`."""
    return OPTIONS | {"num_warps": tile.warps, "num_stages": tile.stages}
