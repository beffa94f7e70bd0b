"""A model whose weights are short numbers, computed in float32.

What transformers computes in bfloat16 or float16 is rounded after each operation, and that hides small mistakes of
whatever is compared with it. In float32 the same modules, with the same weights, come to what is right but for a
millionth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

SHORT = (torch.bfloat16, torch.float16)
_PIECE = 1 << 18
"""Weights that are widened at once. In float32 they stay in a core's cache until they are multiplied."""
_PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm}
_WIDENED = {
    functional.layer_norm, functional.rms_norm, torch.layer_norm, torch.rms_norm, torch.addmm, torch.baddbmm,
    torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__,
}  # fmt: skip
"""Functions that are given float32 in the place of short numbers: they refuse both together, or round to the latter."""


class Rounded(Protocol):
    """What a weight is rounded to."""

    @property
    def together(self) -> int:
        """So many outputs are rounded together; those before them are a multiple of it."""
        ...

    def __call__(self, weight: Tensor, /) -> Tensor:
        """(outputs, inputs), some outputs of the weight, to the same in float32."""
        ...


class InFloat32(TorchFunctionMode):
    """Within it, this thread's modules compute in float32 what they have in bfloat16 or float16.

    Args:
        rounded: Says what becomes of a weight, or of a part of it, before it is multiplied or looked up; None for one
            that stays as it is.
    """

    def __init__(self, rounded: Callable[[Tensor], Rounded | None] = lambda weight: None) -> None:
        super().__init__()
        self._rounded = rounded

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Takes the place of each function of torch's."""
        if func is functional.linear and not kwargs and any(map(_is_short, args)):
            return self._linear(*args)
        if func is functional.embedding and _is_short(args[1]):
            return self._looked_up(args[1], func(*args, **(kwargs or {})))
        if func is torch.addmm and not kwargs and _is_short(args[2]):
            return self._linear(args[1], args[2].T, args[0])
        if func in _PRODUCTS and not kwargs and any(map(_is_short, args)):
            if args[1].dim() == 2 and _is_short(args[1]):
                return self._linear(args[0], args[1].T)
            return func(*(each.float() for each in args))
        if func in _WIDENED:
            args = tuple(each.float() if _is_short(each) else each for each in args)
            kwargs = {name: each.float() if _is_short(each) else each for name, each in (kwargs or {}).items()}
        return func(*args, **(kwargs or {}))

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """(..., inputs), (outputs, inputs), (outputs) -> (..., outputs)"""
        outputs, inputs = weight.shape
        rounded = self._rounded(weight)
        rows = x.reshape(-1, inputs).float()
        sums = torch.empty(len(rows), outputs, dtype=torch.float32)
        together = 1 if rounded is None else rounded.together
        each = max(1, _PIECE // (inputs * together)) * together
        for start in range(0, outputs, each):
            piece = weight[start : start + each]
            sums[:, start : start + each] = rows @ (piece.float() if rounded is None else rounded(piece)).T
        if bias is not None:
            sums += bias.float()
        return sums.view(*x.shape[:-1], outputs)

    def _looked_up(self, table: Tensor, rows: Tensor) -> Tensor:
        """Rows of a table, (..., size)."""
        rounded = self._rounded(table)
        return rows.float() if rounded is None else rounded(rows.view(-1, rows.shape[-1])).view(rows.shape)


class ExpertsOneByOne:
    """Within it, a model's experts are multiplied one after the other, by functions that `InFloat32` knows."""

    def __init__(self, model: nn.Module) -> None:
        self._model: Any = model
        self._before: Any = None

    def __enter__(self) -> None:
        if self._model._can_set_experts_implementation():
            self._before = self._model.get_experts_implementation()
            self._model.set_experts_implementation("eager")

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            self._model.set_experts_implementation(self._before)


def _is_short(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in SHORT
