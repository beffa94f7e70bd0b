"""Moves host arrays to the device without waiting for it, and says where the host may look at what is there."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray

_AT_HAND = "cpu"


def at_hand(tensor: torch.Tensor) -> bool:
    """Whether the host can look at a tensor's values without waiting for a device: only on the CPU."""
    return tensor.device.type == _AT_HAND


def to_device(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    """A tensor with the array's values; on the CPU it shares the array's memory.

    For a CUDA device the copy goes through pinned memory, so that it is queued like a kernel: a copy from pageable
    memory may make the host wait.
    """
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
