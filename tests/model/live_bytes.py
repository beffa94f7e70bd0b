"""How many bytes of tensors are alive at a time while something is computed on the CPU."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts what operators make while it is entered.

    Attributes:
        peak: Most bytes that were alive at a time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live: dict[int, int] = {}  # address to size

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {tensor.untyped_storage().data_ptr() for tensor in tree_leaves(args) if torch.is_tensor(tensor)}
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if torch.is_tensor(tensor):
                storage = tensor.untyped_storage()
                address = storage.data_ptr()
                if address and address not in before and address not in self._live:
                    self._live[address] = storage.nbytes()
                    weakref.finalize(storage, self._live.pop, address, None)
        self.peak = max(self.peak, sum(self._live.values()))
        return result
