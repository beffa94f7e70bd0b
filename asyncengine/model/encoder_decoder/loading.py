"""What is the same in loads of models whose decoder attends to a source: audio, or text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import GenerationConfig

from asyncengine.config import EngineConfig
from asyncengine.errors import CheckpointError
from asyncengine.media import Kind
from asyncengine.model import memory
from asyncengine.model.attention.protocol import AttentionBackend
from asyncengine.model.checkpoint import tokenizer_key
from asyncengine.model.decoder.compiled_layers import weight_bytes
from asyncengine.model.encoder_decoder.details import SourceDetails
from asyncengine.model.encoder_decoder.layers import SourceLayers, layers_of
from asyncengine.model.encoder_decoder.model import EncoderDecoderModel, SourceEncoder
from asyncengine.model.encoder_decoder.parts import Biases, parts_of
from asyncengine.model.encoder_decoder.products import check_products
from asyncengine.model.load_check import fits, with_tokenizer
from asyncengine.model.load_settings import check_layers, select_attention, sequences_of
from asyncengine.model.media.trial import BUDGET_TOKENS
from asyncengine.model.paged_layers import PagedLayers
from asyncengine.model.plain_loads import rehearse
from asyncengine.model.runner import TorchModel
from asyncengine.model.sampler import Sampler
from asyncengine.step.chunking import MAX_SCORED
from asyncengine.step.limits import Limits
from asyncengine.step.model import LoadedModel, LoadPlan

Heads = Mapping[int, Sequence[int]]
"""By layer, some of its heads."""
_NO_HEADS: Heads = {}
Backends = tuple[AttentionBackend, AttentionBackend]
"""What attends to the tokens before, and what attends to sources: each keeps its own plan of a step."""

_CHUNK = 2048
"""Tokens of prompts in a step, where the configuration leaves that open: a source and what stands behind it."""


def planned(config: EngineConfig, details: SourceDetails, current: LoadedModel | None) -> LoadPlan:
    """A load that fits; where it does only without the present model, it is rehearsed before that goes.

    Raises:
        AsyncEngineError: It cannot be loaded; the kind says why.
    """
    backends = backends_of(config, details)[0]
    check_products(details, backends[0])
    for backend in backends:
        check_layers(config, backend, {"": details.layer}, details.dtype, details.device)
    beside = fits(details, current)
    if not beside:
        rehearse(details, details.kind)
        details = with_tokenizer(details)
    return LoadPlan(config, beside, tokenizer_key(details.tokenizer_path), details)


def backends_of(config: EngineConfig, details: SourceDetails) -> tuple[Backends, list[str]]:
    """What attends, and what there is to be said of it, in words."""
    first, second = (select_attention(config, details.device, details.dtype) for _ in range(2))
    reason = first.fallback_reason
    return (first.backend, second.backend), [] if reason is None else [f"attention: {reason}"]


def serving(
    model: Any, details: SourceDetails, backends: Backends, limits: Limits, sampler: Any, heads: Heads
) -> tuple[TorchModel, SourceLayers, Biases]:
    """A model with its KV cache, and with the heads that tell what tokens attend to."""
    layer, device = details.layer, details.device
    biases = Biases(parts_of(model), layer.distances)
    paged = PagedLayers(layers_of(model, layer, biases), backends[0], limits, details.dtype, device)
    paged.allocate()
    sources = SourceLayers(model, layer, paged, backends[1], limits.page_size, device, heads)
    return TorchModel(model, paged, sampler, device), sources, biases


def stepped(
    model: Any,
    details: SourceDetails,
    backends: Backends,
    limits: Limits,
    kind: Kind,
    wanted: tuple[str, ...],
    heads: Heads = _NO_HEADS,
) -> EncoderDecoderModel:
    """What the step thread steps.

    Args:
        model: As `serving` takes it; has the ``encoded`` that `SourceEncoder` calls.
        details: Of the load.
        backends: What attends.
        limits: What it can take.
        kind: Of its sources.
        wanted: What its encoder takes, by name.
        heads: By layer, those that tell what tokens attend to.
    """
    sampler = Sampler(limits.max_num_sequence, details.vocab_size, details.device)
    text, sources, biases = serving(model, details, backends, limits, sampler, heads)
    encoder = SourceEncoder(model, kind, wanted, details.device, BUDGET_TOKENS)
    return EncoderDecoderModel(text, sources, biases, encoder, limits.page_size)


def limits_of(
    config: EngineConfig,
    details: SourceDetails,
    backend: AttentionBackend,
    has_tokenizer: bool,
    audio: bool,
    heads: Heads = _NO_HEADS,
) -> tuple[Limits, EngineConfig]:
    """What the model can take, by the memory that there is, and the completed configuration.

    Args:
        config: What is wanted.
        details: Of the load.
        backend: What attends to the tokens before.
        has_tokenizer: Whether there is one with the checkpoint.
        audio: Whether sources are audio.
        heads: As of `stepped`.
    """
    device, page_size, length = details.device, details.page_size, details.max_length
    cuda = device.type == "cuda"
    sequences = sequences_of(config, device)
    chunk = min(config.prefill_chunk_size or _CHUNK, length)
    share = config.gpu_memory_utilization or (memory.CUDA_SHARE if cuda else memory.CPU_SHARE)
    available, taken = memory.free_bytes(device), share
    if cuda:
        used = memory.total_bytes(device) - available
        available = int(memory.total_bytes(device) * share) - used
        available -= _activations(details, chunk + sequences, sequences, sum(map(len, heads.values())))
        taken = 1.0
    budget = memory.kv_budget(
        available=max(available, 0),
        share=taken,
        bytes_per_block=details.bytes_per_block(backend.bytes_per_block),
        page_size=page_size,
        wanted_tokens=config.max_total_sequence_length,
        useful_tokens=sequences * -(-length // page_size) * page_size,
    )
    limits = Limits(
        max_num_sequence=sequences,
        max_single_sequence_length=length,
        prefill_chunk_size=chunk,
        page_size=page_size,
        num_blocks=budget.num_blocks,
        hybrid=config.prefill_mode == "hybrid",
        prefix_cache=config.prefix_cache_mode == "radix",
        max_recycling=config.prefix_cache_max_num_recycling_seqs,
    )
    complete = config.replace(
        tokenizer=config.tokenizer or (config.model if has_tokenizer else None),
        device=str(device),
        dtype=str(details.dtype).removeprefix("torch."),
        max_num_sequence=sequences,
        max_total_sequence_length=budget.num_blocks * page_size,
        max_single_sequence_length=length,
        prefill_chunk_size=chunk,
        kv_cache_page_size=page_size,
        gpu_memory_utilization=share,
        quantization=details.quantization,
        decoder_backend="transformers",
        attention_backend=backend.name,
        images=False,
        audio=audio,
        mla=False,
    )
    return limits, complete


def memory_bytes(model: Any, details: SourceDetails, limits: Limits, backend: AttentionBackend) -> int:
    """What weights and KV cache take on their device."""
    return weight_bytes(model) + limits.num_blocks * details.bytes_per_block(backend.bytes_per_block)


def eos_token_ids(details: SourceDetails) -> tuple[int, ...]:
    """What ends a text."""
    return tuple(i for i in details.checkpoint.eos_token_ids if 0 <= i < details.vocab_size)


def generation_of(details: SourceDetails) -> GenerationConfig:
    """What the checkpoint says of generating.

    Raises:
        CheckpointError: That cannot be read.
    """
    path, name, more = details.checkpoint.path, "generation_config.json", dict[str, Any]()
    if not (path / name).exists():  # transformers' configuration of a model leaves out what is in its file of it
        name, more = "config.json", {"_from_model_config": True}
    try:
        return GenerationConfig.from_pretrained(path, name, local_files_only=True, **more)
    except Exception as error:
        raise CheckpointError(f"{path / name} cannot be read: {error}") from error


def _activations(details: SourceDetails, tokens: int, sequences: int, heads: int) -> int:
    """Bytes that the largest step takes beside weights and KV cache: an encoder's layer, copies of all logits, and
    copies of what tokens attend to by so many heads.
    """
    rows, shape = 2 * max(details.sources, tokens), details.shape
    of_layer = rows * (8 * details.hf_config.d_model + 2 * shape.inner) * details.dtype.itemsize
    if shape.spec.distances:  # the encoder's bias of each pair of a source's tokens, and a mask that is made of it
        of_layer += 2 * shape.spec.num_heads * details.sources**2 * details.dtype.itemsize
    attended = 3 * heads * MAX_SCORED * details.sources * 4
    return int(of_layer + 4 * sequences * details.vocab_size * 4 + attended)
