"""Tensors of any size that take no memory: they stand for weights while transformers finds out where those belong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


class Nothing(torch.Tensor):
    """Numbers that nobody has computed; what transformers puts together of them is of this kind, too."""

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Itself: there is nothing that could be moved."""
        return self


def nothing(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """One of them."""
    return torch.empty(tuple(shape), dtype=dtype, device="meta").as_subclass(Nothing)
