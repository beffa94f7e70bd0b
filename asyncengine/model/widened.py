"""Products of short floating-point numbers, summed in float32 by float32's own kernels.

On a processor without instructions for bfloat16 and float16, torch multiplies them several times more slowly than it
widens the weights and multiplies in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_SHORT = (torch.bfloat16, torch.float16)
_NATIVE = ("AVX512", "SVE")
"""Beginnings of the names of instruction sets with which torch has kernels of its own for short numbers."""
_PIECE = 1 << 22
"""Weights that are widened at once. Fewer would stay nearer, but threads wait for each other after each piece."""


def is_faster(device: torch.device) -> bool:
    """Whether `WidenedLinears` are, on a device."""
    return device.type == "cpu" and not torch.backends.cpu.get_cpu_capability().startswith(_NATIVE)


class WidenedLinears(TorchFunctionMode):
    """Within it, this thread's linear layers of bfloat16 or float16 add up in float32, and round the sum.

    That is what torch's own kernels for them do, in another order of additions.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Takes the place of each function of torch's."""
        if func is functional.linear and not kwargs and args[1].dtype in _SHORT and args[1].device.type == "cpu":
            return _linear(*args)
        return func(*args, **(kwargs or {}))


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """(..., inputs), (outputs, inputs), (outputs) -> (..., outputs)"""
    outputs, inputs = weight.shape
    rows = x.reshape(-1, inputs).float()
    sums = torch.empty(len(rows), outputs, dtype=torch.float32)
    each = max(1, min(outputs, _PIECE // inputs))
    widened = torch.empty(each, inputs, dtype=torch.float32)
    for start in range(0, outputs, each):
        piece = weight[start : start + each]
        wide = widened[: len(piece)].copy_(piece)
        sums[:, start : start + each] = rows @ wide.T
    if bias is not None:
        sums += bias.float()
    return sums.to(x.dtype).reshape(*x.shape[:-1], outputs)
