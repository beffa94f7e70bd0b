"""What an encoder would take: weights, and nothing that grows with the texts that it reads."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from asyncengine.config import EngineConfig


def rows(config: EngineConfig, checkpoint: Any, device: torch.device, memory: int | None) -> Iterator[tuple[str, str]]:
    """Lines about an encoder, a name and a text each; the last is without a name if it does not fit.

    Args:
        config: What would be loaded.
        checkpoint: An `asyncengine.model.checkpoint.Checkpoint`.
        device: Where.
        memory: Bytes to reckon with; None is what is free here.

    Raises:
        ReloadError: It cannot be served.
        ConfigError: A setting does not fit it.
    """
    from asyncengine.cli.estimate import gib
    from asyncengine.model.encoders.loading import details_of
    from asyncengine.model.load_check import SLACK
    from asyncengine.model.load_settings import dtype_of, sequences_of, settled
    from asyncengine.model.memory import free_bytes

    dtype = dtype_of(settled(config, checkpoint, device), checkpoint)
    details = details_of(config, None, checkpoint, device, dtype)
    parameters = sum(prod(shape) for shape in checkpoint.shapes.values())
    free = free_bytes(device) if memory is None else memory
    left = free - details.weight_bytes - SLACK
    yield "model", f"{details.kind.__name__}, {parameters / 1e6:,.1f} M parameters in {len(checkpoint.tensors)} tensors"
    yield "weights", f"{gib(details.weight_bytes)} in {str(dtype).removeprefix('torch.')}"
    yield "KV cache", "none: an encoder"
    yield (
        f"memory ({device.type})",
        f"{gib(free)} - {gib(details.weight_bytes)} weights - {gib(SLACK)} for everything else = {gib(left)}",
    )
    yield "longest prompt", f"{details.max_length:,} tokens"
    yield "largest batch", f"{sequences_of(config, device):,} prompts, limited by --max-num-seqs"
    if left < 0:
        yield "", "does not fit"
