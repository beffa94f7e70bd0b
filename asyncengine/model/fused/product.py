"""Products with what stands before and after them. Owned by the step thread once the model serves."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from asyncengine.model.fused.launches import Formula
from asyncengine.model.fused.narrow_product import NarrowProduct
from asyncengine.model.fused.tiles import MOST_TOKENS
from asyncengine.model.fused.wide_product import WideProduct


class Product:
    """A formula of any number of tokens: one launch for few of them, where their weights allow that; else several.

    Raises:
        NotRecognised: There is no way to compute it without copies of its weights.
    """

    def __init__(self, formula: Formula) -> None:
        self.width = formula.width
        self._widths = [part.weight.shape[0] for part in formula.parts]
        self._wide = WideProduct(formula)
        self._narrow = NarrowProduct(formula) if NarrowProduct.computes(formula) else None

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """(tokens, outputs) of (tokens, inputs), both contiguous. A residual may be written over."""
        if self._narrow is None or x.shape[0] > MOST_TOKENS:
            return self._wide(x, residual)
        return self._narrow(x, residual)

    def apart(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        """(tokens, outputs) of each linear layer, which may be views of one tensor; of a formula without activation."""
        if self._narrow is None or x.shape[0] > MOST_TOKENS:
            return self._wide.apart(x)
        return torch.split(self._narrow(x), self._widths, 1)
