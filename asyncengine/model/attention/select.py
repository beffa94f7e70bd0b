"""Which back end of attention a device gets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from asyncengine.config import AttentionBackend as BackendName
from asyncengine.model.attention.cpu import CpuAttention
from asyncengine.model.attention.kernel import Kind
from asyncengine.model.attention.protocol import AttentionBackend, BackendUnavailableError
from asyncengine.model.attention.reference import TorchAttention

_FASTEST: dict[str, BackendName] = {"cpu": "cpu", "cuda": "triton"}


@dataclass(frozen=True, slots=True)
class Selection:
    """A chosen back end.

    Attributes:
        backend: Ready to use.
        fallback_reason: Why "auto" did not get the fastest back end for the device; None if it did.
    """

    backend: AttentionBackend
    fallback_reason: str | None = None


def select(
    name: BackendName,
    device: torch.device,
    kind: Kind = "float32",
    progress: Callable[[str], None] | None = None,
) -> Selection:
    """Chooses the back end for a device; may compile one, for some seconds.

    Args:
        name: "auto" takes the fastest that works here.
        device: What the model runs on.
        kind: What it computes with.
        progress: Called with a sentence before something slow happens.

    Raises:
        BackendUnavailableError: The back end that was named cannot work here.
    """
    match name:
        case "torch":
            return Selection(TorchAttention())
        case "cpu":
            if device.type != "cpu":
                raise BackendUnavailableError(f"the cpu attention back end cannot run on {device}")
            return Selection(CpuAttention(kind, progress))
        case "triton" | "flashinfer" | "flash_attention_3":
            if device.type != "cuda":
                raise BackendUnavailableError(f"the {name} attention back end needs a CUDA device, not {device}")
            return Selection(_on_cuda(name))
        case "auto" if device.type in _FASTEST:
            try:
                return select(_FASTEST[device.type], device, kind, progress)
            except BackendUnavailableError as error:
                return Selection(TorchAttention(), fallback_reason=str(error))
        case "auto":
            return Selection(TorchAttention(), fallback_reason=f"there is no faster back end for {device.type} yet")
        case _:
            raise BackendUnavailableError(
                f"no attention back end is called {name!r}; there are {', '.join(get_args(BackendName))}"
            )


def _on_cuda(name: Literal["triton", "flashinfer", "flash_attention_3"]) -> AttentionBackend:
    """Imports no other: whoever loads on the CPU wants none of them."""
    if name == "triton":
        from asyncengine.model.attention.triton import TritonAttention

        return TritonAttention()
    if name == "flashinfer":
        from asyncengine.model.attention.flashinfer import FlashInferAttention

        return FlashInferAttention()
    from asyncengine.model.attention.flash_attention import FlashAttention3

    return FlashAttention3()
