"""What a model whose decoder attends to a source would take: weights, and a KV cache with room for sources."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from asyncengine.config import EngineConfig


def rows(config: EngineConfig, checkpoint: Any, device: torch.device, memory: int | None) -> Iterator[tuple[str, str]]:
    """Lines about such a model; arguments and errors as those of `asyncengine.cli.estimate_encoder.rows`."""
    from asyncengine.cli.estimate import gib
    from asyncengine.model.attention.cpu import CpuAttention
    from asyncengine.model.attention.reference import TorchAttention
    from asyncengine.model.encoder_decoder.kept_bytes import kept_bytes
    from asyncengine.model.encoder_decoder.parting import filled
    from asyncengine.model.load_check import SLACK
    from asyncengine.model.load_settings import dtype_of, sequences_of, settled
    from asyncengine.model.memory import CPU_SHARE, CUDA_SHARE, free_bytes
    from asyncengine.model.speech.kind import is_speech

    hears = is_speech(checkpoint.config)
    if hears:
        from asyncengine.model.speech.loading import details_of
    else:
        from asyncengine.model.text_to_text.loading import details_of
    dtype = dtype_of(settled(config, checkpoint, device), checkpoint)
    details = details_of(config, None, checkpoint, device, dtype)
    form, cuda = details.quantization, device.type == "cuda"
    plain = cuda or config.attention_backend == "torch"
    parameters = sum(prod(shape) for shape in checkpoint.shapes.values())
    free = free_bytes(device) if memory is None else memory
    weights = kept_bytes(details)
    left = free - weights - SLACK
    share = config.gpu_memory_utilization or (CUDA_SHARE if cuda else CPU_SHARE)
    block = details.bytes_per_block(TorchAttention().bytes_per_block if plain else CpuAttention.bytes_per_block)
    of_one = -(-details.max_length // details.page_size) * block
    sequences, places = sequences_of(config, device), filled(details.sources, details.page_size)
    kind = (details.hf_config.architectures or [type(details.hf_config).__name__])[0]
    yield "model", f"{kind}, {parameters / 1e6:,.1f} M parameters in {len(checkpoint.tensors)} tensors"
    yield "weights", f"{gib(weights)} in {str(dtype).removeprefix('torch.') if form == 'none' else form}"
    if hears:
        longest = f"an audio of {places:,} tokens and the {details.max_length - places:,} of its text"
    else:
        text = min(details.written, details.max_length - details.page_size)
        longest = f"a source of up to {details.sources:,} tokens and up to {text:,} of its text"
    yield "KV cache", f"{of_one / 1024**2:,.1f} MiB for {longest}"
    yield (
        f"memory ({device.type})",
        f"{gib(free)} - {gib(weights)} weights - {gib(SLACK)} for everything else = {gib(left)}",
    )
    fitting = int(max(left, 0) * share) // of_one
    several = "audio" if hears else "sources"
    yield (
        "largest batch",
        f"{min(fitting, sequences):,} {several} at once: {fitting:,} fit, and --max-num-seqs is {sequences:,}",
    )
    if not fitting:
        yield "", "does not fit"
