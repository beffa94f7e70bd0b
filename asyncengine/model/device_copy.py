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
    return pinned(array, device).to(device, non_blocking=device.type == "cuda")


def pinned(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    """A tensor on the host with the array's values, from which a copy to the device is queued like a kernel."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory() if device.type == "cuda" else tensor


def overwrite(fixed: torch.Tensor, array: NDArray[Any]) -> torch.Tensor:
    """Copies an array to the beginning of a tensor on a device, behind what is queued there; returns that part."""
    part = fixed[: len(array)]
    part.copy_(pinned(array, fixed.device), non_blocking=True)
    return part
