"""Whether a CUDA device answers any longer."""

from __future__ import annotations

import torch

from asyncengine.model import memory

_PASSING = frozenset({2, *range(900, 909)})
"""Errors of CUDA that its context survives: memory (of the host, or of a graph), and those that speak of a capture."""


def is_lost(device: torch.device, error: BaseException) -> bool:
    """Whether CUDA reports an error after which its context is unusable.

    Then it answers every call with that error. Running out of memory is not one, nor is what another thread's capture
    of a graph makes impossible; while that goes on, nobody may wait for the device and see.
    """
    if device.type != "cuda" or isinstance(error, torch.OutOfMemoryError):
        return False
    if isinstance(error, torch.AcceleratorError) and getattr(error, "error_code", None) in _PASSING:
        return False
    try:
        with memory.CAPTURES:  # another engine's, which would make it an error to wait
            torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False
