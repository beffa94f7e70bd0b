"""By what media are the same to a model: a digest of what its encoders see."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from asyncengine.media import Kind


def digest_of(kind: Kind, inputs: Mapping[str, Any]) -> bytes:
    """A digest of what an encoder takes.

    Raises:
        TypeError: There is something among it that has no place here.
    """
    found = hashlib.sha256(kind.encode())
    for name in sorted(inputs):
        found.update(f"{name}\0".encode())
        _add(found, inputs[name])
    return found.digest()


def _add(found: Any, value: Any) -> None:
    """Adds all of a value to a digest."""
    if isinstance(value, (list, tuple)):
        found.update(f"{len(value)} of ".encode())
        for each in value:
            _add(found, each)
    elif isinstance(value, (torch.Tensor, np.ndarray)):
        tensor = torch.as_tensor(value).contiguous()
        found.update(f"{tuple(tensor.shape)} {tensor.dtype} ".encode())
        if tensor.numel():
            found.update(tensor.flatten().view(torch.uint8).numpy().data)
    elif value is None or isinstance(value, (bool, int, float, str)):
        found.update(f"{value!r} ".encode())
    else:
        raise TypeError(f"the model's processor gives out a {type(value).__name__}, for which there is no place here")
