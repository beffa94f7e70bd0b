"""``asyncengine estimate``: what a checkpoint would take, from its headers alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Annotated, Any

import typer

from asyncengine.cli.command import Failure
from asyncengine.cli.flags import EngineFlags
from asyncengine.errors import ConfigError, InsufficientMemoryError

if TYPE_CHECKING:
    import torch

    from asyncengine.config import EngineConfig, Quantization
    from asyncengine.model.attention.protocol import LayerSpec
    from asyncengine.model.checkpoint import Checkpoint
    from asyncengine.model.memory import GraphReserve
    from asyncengine.model.recorded import Watched

_GIB = 1 << 30
_MOST_GIB = 1 << 30
"""More than any machine has; what is reckoned with it is still printed in a line."""


def estimate(
    model: Annotated[str, typer.Argument(metavar="DIR", help="Directory, id in the local cache, or 'tiny'.")],
    memory: Annotated[
        float | None,
        typer.Option(min=0, help="GiB to reckon with: free on a CPU, all of a GPU. Default: this machine's."),
    ] = None,
    *,
    flags: EngineFlags,
) -> int:
    """Reckon the memory of a checkpoint, the largest batch and the longest context, and show the arithmetic.

    Reads headers, no weights. Exit status 1: it does not fit, or cannot be served.
    """
    if memory is not None and not memory < _MOST_GIB:
        raise Failure(f"--memory is {memory}; expected GiB >= 0, and less than {_MOST_GIB:,}", 2)
    config = flags.config(model)
    if config.adapters:
        raise Failure("--lora-modules is given; the estimate knows no adapters", 2)
    given = None if memory is None else int(memory * _GIB)
    if given is None:
        from asyncengine.model.load_settings import device_of

        try:
            device_of(config.device)
        except ConfigError as error:
            raise Failure(f"{error}; --memory says how much to reckon with", 2) from error
    if (lines := _of_others(config, given)) is not None:
        for name, text in lines:
            print(f"{name:15} {text}")
        return 0 if lines[-1][0] else 1
    needs = read(config)
    for name, text in _needs_rows(needs):
        print(f"{name:15} {text}")
    try:
        room = Room.of(needs, config, given)
    except InsufficientMemoryError as error:  # of states
        print(f"{'':15} does not fit: {error}")
        return 1
    for name, text in _room_rows(needs, room):
        print(f"{name:15} {text}")
    if room.blocks < 2:
        print(f"{'':15} does not fit")
        return 1
    print(f"\n{'context':>10} {'fit in memory':>15} {'in one step':>15}")
    for length in _lengths(min(needs.max_length, room.blocks * needs.page_size)):
        fitting = room.fitting(needs, length)
        print(f"{length:>10,} {fitting:>15,} {min(fitting, room.sequences):>15,}")
    return 0


def _of_others(config: EngineConfig, memory: int | None) -> list[tuple[str, str]] | None:
    """Lines about a checkpoint of an encoder, or of a decoder that attends to a source; None if it is of neither."""
    from asyncengine.model.encoders.kind import is_encoder
    from asyncengine.model.gguf.checkpoint import checkpoint_at
    from asyncengine.model.location import locate
    from asyncengine.model.speech.kind import is_speech
    from asyncengine.model.text_to_text.kind import is_text_to_text

    checkpoint = checkpoint_at(locate(config.model))
    attends = is_speech(checkpoint.config) or is_text_to_text(checkpoint.config)
    if not attends and not is_encoder(checkpoint.config):
        return None
    from asyncengine.cli import estimate_encoder, estimate_sources
    from asyncengine.cli.loading import quiet

    quiet()
    kind = estimate_sources if attends else estimate_encoder
    return list(kind.rows(config, checkpoint, _device(config), memory))


def _device(config: EngineConfig) -> torch.device:
    """What a model would run on, be it here or not."""
    import torch

    cuda = config.device.startswith("cuda") or (config.device == "auto" and torch.cuda.is_available())
    return torch.device("cpu" if not cuda else "cuda" if config.device == "auto" else config.device)


@dataclass(frozen=True, slots=True)
class Needs:
    """What a model takes, whatever machine it is on.

    Attributes:
        architecture: Of transformers.
        parameters: Elements of all weights.
        tensors: How many weights there are.
        weight_bytes: Of all weights as they are kept, those of what drafts included.
        draft_bytes: Of the weights of what drafts; 0 without.
        drafts: What that is.
        dtype: Of weights, where they are not quantised.
        quantization: As `EngineConfig.quantization`.
        kv_dtype: Of the KV cache.
        device: What it would run on.
        layers: Attention layers and how often each kind is there.
        draft_layers: Those of what drafts.
        page_size: Tokens per block.
        bytes_per_block: Of KV cache, all layers together.
        values_apart: Whether values are kept beside the latents that they are the beginning of.
        recurrent: How many recurrent layers there are.
        bytes_per_state: Of what those keep of one sequence.
        keeps: Whether there is a prefix cache, which keeps states, too.
        wanted: Whether `max_sequences` is asked for.
        max_length: Most tokens in one sequence.
        max_sequences: Most sequences in one step.
        chunk: Most tokens of prompts and of drafts in one step.
        graphs: What captured steps take on a GPU; None if there are none.
    """

    architecture: str
    parameters: int
    tensors: int
    weight_bytes: int
    draft_bytes: int
    drafts: str
    dtype: torch.dtype
    quantization: Quantization
    kv_dtype: torch.dtype
    device: torch.device
    layers: list[tuple[LayerSpec, int]]
    draft_layers: list[tuple[LayerSpec, int]]
    page_size: int
    bytes_per_block: int
    values_apart: bool
    recurrent: int
    bytes_per_state: int
    keeps: bool
    wanted: bool
    max_length: int
    max_sequences: int
    chunk: int
    graphs: GraphReserve | None = None


def read(config: EngineConfig) -> Needs:
    """Reads a checkpoint's headers and watches its model run without weights.

    Raises:
        ReloadError: It is not there, damaged, or cannot be served.
        ConfigError: A setting does not fit it.
    """
    from asyncengine.cli.loading import quiet

    quiet()
    from asyncengine.model import architecture, graph_memory
    from asyncengine.model.attention.cpu import CpuAttention
    from asyncengine.model.attention.reference import TorchAttention
    from asyncengine.model.attention_modules import text_config
    from asyncengine.model.capacity import CPU_CHUNK, CUDA_CHUNK, state_scratch
    from asyncengine.model.draft_heads.plan import check_head
    from asyncengine.model.gguf.checkpoint import checkpoint_at
    from asyncengine.model.load_check import check_draft
    from asyncengine.model.load_settings import (
        KV_DTYPES,
        check_latents,
        check_quantization,
        dtype_of,
        keeps_latents,
        longest_of,
        settled,
    )
    from asyncengine.model.location import locate
    from asyncengine.model.memory import GraphReserve
    from asyncengine.model.quantised.kept_bytes import Where, kept_bytes
    from asyncengine.model.recurrent.refusals import check_recurrent
    from asyncengine.model.recurrent.states import state_bytes
    from asyncengine.model.rope_limits import length_for, limit_of, settle

    device = _device(config)
    cuda = device.type == "cuda"
    checkpoint = checkpoint_at(locate(config.model))
    config = settled(config, checkpoint, device)
    hf_config = architecture.read_config(checkpoint)
    text = text_config(hf_config)
    dtype = dtype_of(config, checkpoint)
    check_quantization(config, device, dtype)
    kv_dtype = KV_DTYPES.get(config.kv_cache_dtype, dtype)
    drafts = [
        check_draft(name, checkpoint, text.vocab_size, device, dtype, kv_dtype)
        for name in config.additional_models
        if config.speculative_mode == "small_draft"
    ]
    longest = min([longest_of(text, config), *(draft.max_length for draft in drafts)])
    limits = [limit_of(each, longest) for each in (hf_config, *(draft.hf_config for draft in drafts))]
    length, _ = length_for(config.max_single_sequence_length, longest, limits)
    if length > longest:
        whose = "the model's or its draft model's" if drafts else "the model's"
        raise ConfigError(
            f"max_single_sequence_length is {length}; {whose} max_position_embeddings allows 1..{longest}"
        )
    for each in (hf_config, *(draft.hf_config for draft in drafts)):
        settle(each, length)
    latents = keeps_latents(config)
    watched = _watched(hf_config, latents)
    check_latents(config, watched.attention.values())
    of_drafts = [_watched(draft.hf_config, latents) for draft in drafts]
    check_recurrent(config, bool(watched.recurrent), any(each.recurrent for each in of_drafts))
    head = check_head(config, checkpoint, hf_config, dtype, length)
    specs = list(watched.attention.values())
    draft_specs = [spec for each in of_drafts for spec in each.attention.values()]
    draft_specs += [] if head is None else head.specs.values()

    def kept(of: Checkpoint, hf_config: Any, watched: Watched) -> int:
        where: Where = "cuda" if cuda else "modules"
        if not cuda and config.decoder_backend != "transformers" and _is_recognised(hf_config, watched, latents):
            where = "compiled"
        own, of_head = text_config(hf_config), None
        if any(spec.values_in_keys for spec in watched.attention.values()):
            of_head = own.qk_nope_head_dim, own.v_head_dim
        return kept_bytes(of, dtype, config.quantization, text.vocab_size, where, of_head)

    each_draft = zip(drafts, of_drafts, strict=True)
    draft_bytes = sum(kept(draft.checkpoint, draft.hf_config, seen) for draft, seen in each_draft)
    draft_bytes += 0 if head is None else head.weight_bytes
    page_size = config.kv_cache_page_size or (16 if cuda else 32)
    # The kernel for the CPU has a layout of its own, and no fp8.
    plain = cuda or kv_dtype is not dtype or config.attention_backend == "torch"
    bytes_of = TorchAttention().bytes_per_block if plain else CpuAttention.bytes_per_block
    sequences = config.max_num_sequence or (256 if cuda else 64)
    chunk = min(config.prefill_chunk_size or (CUDA_CHUNK if cuda else CPU_CHUNK), length)
    graphs = None
    if cuda and config.attention_backend in ("auto", "triton"):
        texts = [text, *(text_config(draft.hf_config) for draft in drafts)]
        draws = config.speculative_mode == "disable"
        tokens = chunk + sequences
        graphs = sum((graph_memory.reserve(each, dtype, sequences, draws, tokens) for each in texts), GraphReserve())
        # As kernels have it, which there are of nearly all layers.
        graphs += state_scratch(list(watched.recurrent.values()), dtype, sequences, in_place=True)
    names = getattr(hf_config, "architectures", None)
    return Needs(
        architecture=names[0] if names else type(hf_config).__name__,
        parameters=sum(prod(shape) for shape in checkpoint.shapes.values()),
        tensors=len(checkpoint.tensors),
        weight_bytes=kept(checkpoint, hf_config, watched) + draft_bytes,
        draft_bytes=draft_bytes,
        drafts="draft model" if head is None else "draft head",
        dtype=dtype,
        quantization=config.quantization,
        kv_dtype=kv_dtype,
        device=device,
        layers=list(Counter(specs).items()),
        draft_layers=list(Counter(draft_specs).items()),
        page_size=page_size,
        bytes_per_block=sum(bytes_of(spec, page_size, kv_dtype) for spec in [*specs, *draft_specs]),
        values_apart=not plain,
        recurrent=len(watched.recurrent),
        bytes_per_state=state_bytes(watched.recurrent.values(), dtype),
        keeps=config.prefix_cache_mode == "radix",
        wanted=config.max_num_sequence is not None,
        max_length=length,
        max_sequences=sequences,
        chunk=chunk,
        graphs=graphs,
    )


def _watched(hf_config: Any, latents: bool) -> Watched:
    from asyncengine.model.watching import watch

    watched = watch(hf_config, latents=latents)
    if watched is None:
        raise Failure("the model's code cannot be watched without its weights, so there is no estimate")
    return watched


def _is_recognised(hf_config: Any, watched: Watched, latents: bool) -> bool:
    """Whether a model is of the family that runs as a compiled step, as far as the names of its parts tell."""
    import torch

    from asyncengine.model import architecture
    from asyncengine.model.decoder.blueprint import NotRecognised, check_parts

    if watched.recurrent:
        return False
    with torch.device("meta"):
        model = architecture.bare(hf_config, latents=latents)
    try:
        check_parts(model, architecture.layers_of(model.eval(), watched).attention)
    except NotRecognised:
        return False
    return True


@dataclass(frozen=True, slots=True)
class Room:
    """What a machine leaves to the KV cache.

    Attributes:
        blocks: Of KV cache that fit.
        text: The arithmetic.
        sequences: Most in one step, by what the configuration says and by their states.
        kept: States that are kept for sequences to come.
        drafted: States that a step with drafts sets aside.
    """

    blocks: int
    text: str
    sequences: int
    kept: int = 0
    drafted: int = 0

    @classmethod
    def of(cls, needs: Needs, config: EngineConfig, given: int | None) -> Room:
        """As `asyncengine.model.capacity` reckons: a share of what is free after loading, or of a whole GPU."""
        from asyncengine.model import memory
        from asyncengine.model.capacity import most_drafts
        from asyncengine.model.load_check import SLACK

        rest = f"{gib(needs.weight_bytes)} weights - {gib(SLACK)} for everything else"
        if needs.device.type == "cuda":
            total = memory.total_bytes(needs.device) if given is None else given
            share = config.gpu_memory_utilization or memory.CUDA_SHARE
            available = int(total * share) - needs.weight_bytes - SLACK
            text = f"{share:g} x {gib(total)} - {rest}"
            if needs.graphs is not None:
                available -= needs.graphs.nbytes
                text += f" - {needs.graphs}"
        else:
            free = memory.free_bytes(needs.device) if given is None else given
            share = config.gpu_memory_utilization or memory.CPU_SHARE
            available = int((free - needs.weight_bytes - SLACK) * share)
            text = f"{share:g} x ({gib(free)} free - {rest})"
        text = f"{text} = {gib(available)}"
        if not needs.recurrent:
            return cls(max(available, 0) // needs.bytes_per_block, text, needs.max_sequences)
        states = memory.state_budget(
            nbytes=max(available, 0),
            bytes_per_state=needs.bytes_per_state,
            sequences=needs.max_sequences,
            wanted=needs.wanted,
            keeps=needs.keeps,
            drafts=lambda count: most_drafts(config, count, needs.chunk),
        )
        left = available - states.nbytes
        if needs.bytes_per_block:
            blocks = left // needs.bytes_per_block
        else:  # it attends to nothing
            blocks = states.sequences * -(-needs.max_length // needs.page_size)
        text = f"{text}; - {gib(states.nbytes)} of states = {gib(left)}"
        return cls(blocks, text, states.sequences, states.kept, states.drafted)

    def fitting(self, needs: Needs, length: int) -> int:
        """How many sequences of a length the KV cache has room for."""
        return self.blocks // -(-length // needs.page_size)


def _needs_rows(needs: Needs) -> Iterator[tuple[str, str]]:
    dtype = str(needs.dtype).removeprefix("torch.")
    yield "model", f"{needs.architecture}, {needs.parameters / 1e6:,.1f} M parameters in {needs.tensors} tensors"
    of_draft = f", {gib(needs.draft_bytes)} of them the {needs.drafts}'s" if needs.draft_bytes else ""
    form = dtype if needs.quantization == "none" else needs.quantization
    yield "weights", f"{gib(needs.weight_bytes)} in {form}{of_draft}"
    for whose, layers in (("", needs.layers), (f" of the {needs.drafts}", needs.draft_layers)):
        for spec, count in layers:
            window = "" if spec.sliding_window is None else f", window {spec.sliding_window}"
            each = f"{spec.num_kv_heads} heads x ({spec.key_dim} + {spec.value_dim})"
            if spec.values_in_keys:
                size = f"({spec.key_dim} + {spec.value_dim})" if needs.values_apart else f"{spec.key_dim}"
                each = f"latents of {size}"
            yield "KV cache", f"{count} layers{whose} x {each} x {needs.kv_dtype.itemsize} bytes{window}"
    if needs.recurrent:
        yield "states", f"{needs.recurrent} recurrent layers, {gib(needs.bytes_per_state)} per sequence"
    if not needs.bytes_per_block:
        return
    per_token = needs.bytes_per_block / needs.page_size
    yield (
        "KV cache" if needs.recurrent else "",
        f"= {per_token / 1024:,.1f} KiB per token, {needs.bytes_per_block / 1024:,.1f} KiB per block of "
        f"{needs.page_size}",
    )


def _room_rows(needs: Needs, room: Room) -> Iterator[tuple[str, str]]:
    tokens = room.blocks * needs.page_size
    yield f"memory ({needs.device.type})", room.text
    yield "", f"= {room.blocks:,} blocks = {tokens:,} tokens"
    if needs.recurrent:
        of_drafts = f", {room.drafted:,} behind guessed tokens" if room.drafted else ""
        yield (
            "",
            f"{room.sequences + room.kept + room.drafted:,} states: of {room.sequences:,} sequences{of_drafts}, and "
            f"{room.kept:,} that are kept",
        )
    longest = min(needs.max_length, tokens)
    by = "the model or --max-model-len" if longest == needs.max_length else "memory"
    yield "longest context", f"{longest:,} tokens, limited by {by}"
    if longest:
        batch = min(room.fitting(needs, longest), room.sequences)
        by = "--max-num-seqs" if batch == needs.max_sequences else "memory"
        yield "largest batch", f"{batch} sequences of {longest:,} tokens, limited by {by}"


def _lengths(longest: int) -> Iterator[int]:
    """Powers of two up to the longest, and the longest."""
    length = 128
    while length < longest:
        yield length
        length *= 2
    yield longest


def gib(count: float) -> str:
    """Bytes for people to read."""
    return f"{count / _GIB:,.2f} GiB" if abs(count) >= _GIB / 10 else f"{count / (1 << 20):,.1f} MiB"
