"""Loads checkpoints with transformers. Runs on threads of its own; what it returns goes to the step thread."""

from __future__ import annotations

import dataclasses
import functools
import threading
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from asyncengine.config import DecoderBackend, EngineConfig
from asyncengine.errors import (
    AsyncEngineError,
    CheckpointError,
    ConfigError,
    InsufficientMemoryError,
    ReloadError,
    UnsupportedModelError,
)
from asyncengine.model import memory, packed_linear
from asyncengine.model.draft_model import DraftModel
from asyncengine.model.memory import GIB
from asyncengine.speculation.lengths import LONGEST, DraftLengths
from asyncengine.speculation.ngram import NgramDrafter
from asyncengine.speculation.protocol import Drafter
from asyncengine.step.batch import StepBatch
from asyncengine.step.drafting import Drafting
from asyncengine.step.model import LoadedModel, LoadPlan
from asyncengine.step.scheduler import Limits
from asyncengine.tokenizer import Tokenizer

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KV_DTYPES = {"fp8_e4m3": torch.float8_e4m3fn}
"""What `EngineConfig.kv_cache_dtype` may be, besides "auto"."""
_BUILDING = threading.Lock()
"""Held while transformers makes a model: it sets torch's default dtype for that time, and two threads that do so at
once restore each other's."""
_WATCHED: dict[str, dict[str, Any]] = {}
"""For each configuration whose model ran without weights, its attention layers by name. It is not watched again: what
is found depends on nothing else."""

CPU_SATURATION, CUDA_SATURATION = 8.0, 128.0
"""Tokens in a step whose arithmetic takes about as long as reading the weights."""
SLACK = 256 << 20
"""Bytes for whatever else a load needs: modules, a tokenizer, activations of the first steps."""


@dataclass(frozen=True, slots=True)
class _Details:
    checkpoint: Any
    tokenizer_path: Path
    hf_config: Any
    device: torch.device
    dtype: torch.dtype
    weight_bytes: int
    max_length: int
    present_tokenizer: Tokenizer | None
    kv_dtype: torch.dtype
    draft: _Details | None = None
    watched: dict[str, Any] | None = None

    @property
    def all_weight_bytes(self) -> int:
        """Those of the draft model included."""
        return self.weight_bytes + (0 if self.draft is None else self.draft.weight_bytes)


class TransformersLoader:
    """As `asyncengine.step.model.Loader`, for checkpoint directories and cached models.

    Args:
        run_ahead: Whether steps are launched ahead of the tokens of the steps before; None where that hides something,
            which is on CUDA: on the CPU a launch is the computation itself.
    """

    def __init__(self, run_ahead: bool | None = None) -> None:
        self._run_ahead = run_ahead

    def check(self, config: EngineConfig, current: LoadedModel | None) -> LoadPlan:
        """As the protocol says: everything that can be known without the weights."""
        # Imported here and not at the top: whoever uses another loader never pays for transformers.
        from asyncengine.model.attention import select  # noqa: F401  # not on the other thread, beside transformers
        from asyncengine.model.checkpoint import Checkpoint
        from asyncengine.model.location import locate

        device = _device(config.device)
        checkpoint = Checkpoint(locate(config.model))
        dtype = checkpoint.dtype if config.dtype == "auto" else _DTYPES[config.dtype]
        # A compiler has most of its work done while transformers is imported and the model is watched.
        with ThreadPoolExecutor(1, "asyncengine-select") as pool:
            selecting = pool.submit(_select, config, device, dtype)
            if device.type != "cpu":
                wait([selecting])  # it imports triton, and so does transformers
            return self._check(config, current, checkpoint, device, dtype, selecting)

    def _check(
        self,
        config: EngineConfig,
        current: LoadedModel | None,
        checkpoint: Any,
        device: torch.device,
        dtype: torch.dtype,
        selecting: Future[Any],
    ) -> LoadPlan:
        from asyncengine.model import architecture
        from asyncengine.model.checkpoint import tokenizer_key
        from asyncengine.model.location import locate

        tokenizer_path = checkpoint.path if config.tokenizer is None else locate(config.tokenizer)
        if config.tokenizer is not None and tokenizer_key(tokenizer_path) is None:
            raise CheckpointError(f"tokenizer {config.tokenizer!r}: there are no tokenizer files")
        hf_config = architecture.read_config(checkpoint)
        text = architecture.text_config(hf_config)
        longest = getattr(text, "max_position_embeddings", None) or 2048
        kv_dtype = KV_DTYPES.get(config.kv_cache_dtype, dtype)
        draft = None
        for name in config.additional_models:
            draft = check_draft(name, checkpoint, text.vocab_size, device, dtype, kv_dtype)
            longest = min(longest, draft.max_length)
        max_length = config.max_single_sequence_length or longest
        if max_length > longest:
            whose = "the model's" if draft is None else "the model's or its draft model's"
            raise ConfigError(
                f"max_single_sequence_length is {max_length}; {whose} max_position_embeddings allows 1..{longest}"
            )
        architecture.check_rope(hf_config, max_length)
        watched = _check_on_meta(architecture, hf_config)
        if draft is not None:
            architecture.check_rope(draft.hf_config, max_length)
            draft = dataclasses.replace(
                draft, max_length=max_length, watched=_check_on_meta(architecture, draft.hf_config)
            )
        _check_kv_dtype(config, selecting.result().backend, kv_dtype, device)
        if config.quantization != "none" and dtype is not torch.bfloat16:
            given = str(dtype).removeprefix("torch.")
            raise ConfigError(f"quantization is {config.quantization!r} with dtype {given}; allowed: bfloat16")
        if config.quantization == "fp8":
            _check_fp8(config, device)
        weights = checkpoint.weight_bytes(dtype)
        present = None if current is None else current.tokenizer
        details = _Details(
            checkpoint, tokenizer_path, hf_config, device, dtype, weights, max_length, present, kv_dtype, draft, watched
        )
        return LoadPlan(config, _fits(details, current), tokenizer_key(tokenizer_path), details)

    def load(self, plan: LoadPlan) -> LoadedModel:
        """As the protocol says."""
        try:
            return _load(plan, self._run_ahead)
        except AsyncEngineError:
            raise
        except torch.OutOfMemoryError as error:
            raise InsufficientMemoryError(f"loading {plan.config.model!r}: {error}") from error
        except Exception as error:
            raise ReloadError(f"loading {plan.config.model!r} failed: {error}") from error
        finally:
            memory.give_back()


def check_draft(
    name: str, target: Any, vocab_size: int, device: torch.device, dtype: torch.dtype, kv_dtype: torch.dtype
) -> _Details:
    """A draft model, whose tokens must be the target's. Its longest sequence is its own."""
    from asyncengine.model import architecture
    from asyncengine.model.checkpoint import Checkpoint, same_vocabulary
    from asyncengine.model.location import locate

    checkpoint = Checkpoint(locate(name))
    hf_config = architecture.read_config(checkpoint)
    text = architecture.text_config(hf_config)
    if text.vocab_size != vocab_size:
        raise ConfigError(
            f"additional_models is [{name!r}], whose vocabulary has {text.vocab_size} tokens; the model's has "
            f"{vocab_size}, and a draft model needs the same"
        )
    if not same_vocabulary(checkpoint.path, target.path):
        raise ConfigError(
            f"additional_models is [{name!r}], whose tokenizer has other tokens than the model's; a draft model needs "
            "the same"
        )
    longest = getattr(text, "max_position_embeddings", None) or 2048
    weights = checkpoint.weight_bytes(dtype)
    return _Details(checkpoint, checkpoint.path, hf_config, device, dtype, weights, longest, None, kv_dtype)


def _load(plan: LoadPlan, run_ahead: bool | None) -> LoadedModel:
    from asyncengine.model import architecture
    from asyncengine.model.hidden_states import hidden_size
    from asyncengine.model.last_tokens import LastTokens
    from asyncengine.model.tokenizer import load_tokenizer

    details, config = plan.details, plan.config
    assert isinstance(details, _Details)
    tokenizer = load_tokenizer(details.tokenizer_path, details.present_tokenizer)
    selection = _select(config, details.device, details.dtype)
    backend = selection.backend
    notes = [] if selection.fallback_reason is None else [f"attention: {selection.fallback_reason}"]
    built = _built(config, details, backend)
    draft = None if details.draft is None else _built(config, details.draft, backend)
    limits, complete = _limits(plan, built, draft, backend)
    vocab_size = architecture.text_config(details.hf_config).vocab_size
    if run_ahead is None:
        run_ahead = details.device.type == "cuda"
    run_ahead &= config.speculative_mode == "disable"
    last = LastTokens(limits.max_num_sequence, details.device) if run_ahead else None
    model, _ = _serving(built, details, backend, limits, vocab_size, last)
    drafting = None
    memory_bytes = built.nbytes + limits.num_blocks * kv_bytes_per_block(
        built.layers, backend, limits, details.kv_dtype
    )
    draft_model = None
    try:
        if draft is not None:
            assert details.draft is not None
            draft_model, draft_sampler = _serving(draft, details.draft, backend, limits, vocab_size)
            drafter = model.companion = DraftModel(draft_model, draft_sampler, limits)
            drafting = _drafting(config, drafter, limits, details.device, draft.nbytes / built.nbytes)
        # Both caches are there by now: they share the attention's plan, and what one adds to it changes its addresses.
        notes += [*built.notes, *_captured(config, model, built, details, backend, limits, last)]
        if draft is not None and draft_model is not None:
            slower = _captured(config, draft_model, draft, details, backend, limits)
            notes += [f"draft model: {note}" for note in (*draft.notes, *slower)]
            memory_bytes += draft.nbytes
            memory_bytes += limits.num_blocks * kv_bytes_per_block(draft.layers, backend, limits, details.kv_dtype)
        elif config.speculative_mode == "ngram":
            drafting = _drafting(config, NgramDrafter(), limits, details.device)
    except BaseException:
        model.close()
        raise
    return LoadedModel(
        model=model,
        limits=limits,
        config=complete.replace(attention_backend=backend.name, decoder_backend=built.decoder_backend(config)),
        vocab_size=vocab_size,
        eos_token_ids=tuple(i for i in details.checkpoint.eos_token_ids if 0 <= i < vocab_size),
        default_generation_config=details.checkpoint.generation_defaults,
        tokenizer=tokenizer,
        tokenizer_key=plan.tokenizer_key,
        memory_bytes=memory_bytes,
        notes=tuple(notes),
        drafting=drafting,
        launching=model if run_ahead else None,
        warming=_warming(model, draft_model),
        hidden_size=hidden_size(built.model),
        pooling=details.checkpoint.pooling,
    )


def _drafting(
    config: EngineConfig, drafter: Drafter, limits: Limits, device: torch.device, draft_cost: float = 0.0
) -> Drafting:
    saturation = CUDA_SATURATION if device.type == "cuda" else CPU_SATURATION
    return Drafting(drafter, DraftLengths(limits.max_num_sequence, config.spec_draft_length, saturation, draft_cost))


def _warming(*models: Any) -> Any:
    """What is left to be captured of models that are there, or None."""
    from asyncengine.model.capturing import CapturesOf

    capturing = [model.capturing for model in models if model is not None and model.capturing is not None]
    return CapturesOf(capturing) if capturing else None


@dataclass(frozen=True, slots=True)
class _Built:
    """A model with its weights and without its KV cache."""

    model: Any
    layers: Any
    program: Any
    fused: Any
    notes: tuple[str, ...]

    def decoder_backend(self, config: EngineConfig) -> DecoderBackend:
        """What the configuration comes to; "auto" where that rests on measurements, so that a restart makes them."""
        if self.program is not None:
            return "compiled"
        return "transformers" if self.fused is None else config.decoder_backend

    @property
    def nbytes(self) -> int:
        from asyncengine.model.runner import weight_bytes

        return weight_bytes(self.model) if self.program is None else int(self.program.nbytes)


def _built(config: EngineConfig, details: _Details, backend: Any) -> _Built:
    from asyncengine.model import architecture, verification
    from asyncengine.model.decoder.blueprint import NotRecognised

    notes: list[str] = []
    name = str(details.checkpoint.path)
    model = _build(details)
    layers = architecture.layers_of(model, details.watched)
    trial = verification.Trial(model, layers, details.device)
    program = None
    try:
        program = _compile(config, details, model, layers, backend)
        if program is not None:
            trial.run(model, backend, program)
    except (NotRecognised, UnsupportedModelError) as error:
        if config.decoder_backend == "compiled" or config.quantization == "int8":
            raise UnsupportedModelError(f"{name!r} cannot run as a compiled step: {error}") from error
        notes.append(f"decoder: runs as transformers has it: {error}")
        program = None
        if isinstance(error, UnsupportedModelError):  # it has taken the weights
            model = _build(details)
            layers = architecture.layers_of(model, details.watched)
            trial.layers = layers
    fused = None
    if program is None:
        if config.quantization == "none" and packed_linear.supports(details.dtype, details.device):
            packed_linear.pack(model)
        trial.run(model, backend)
        fused, note = _fuse(config, details, model, layers, backend, trial)
        notes += note
        if fp8_weights := config.quantization == "fp8":
            notes.append(_quantise(model, trial, backend, details))
        if details.kv_dtype is not details.dtype:
            off = trial.run(model, backend, kv_dtype=details.kv_dtype, fp8_weights=fp8_weights)
            notes.append(f"KV cache: {config.kv_cache_dtype}: logits of a trial are {off:.1%} of their norm off")
    return _Built(model, layers, program, fused, tuple(notes))


def _fuse(
    config: EngineConfig, details: _Details, model: Any, layers: Any, backend: Any, trial: Any
) -> tuple[Any, tuple[str, ...]]:
    """The model's kernels for steps of few tokens, or None; and why there are none, in words, if they were wanted.

    Raises:
        UnsupportedModelError: There are none, and nothing else will do.
    """
    from asyncengine.model.decoder.blueprint import recognise
    from asyncengine.model.fused import choice
    from asyncengine.model.fused.decoder import FusedDecoder

    if (
        details.device.type not in choice.DEVICES
        or config.decoder_backend == "transformers"
        or config.quantization != "none"
    ):
        return None, ()
    try:
        fused = FusedDecoder(recognise(model, layers, details.max_length))
        trial.run_fused(model, backend, fused)
    except Exception as error:  # also what a compiler or a driver raises: the model can be served without
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if config.decoder_backend == "compiled":
            raise UnsupportedModelError(
                f"{str(details.checkpoint.path)!r} cannot run as a compiled step: {reason}"
            ) from error
        return None, (f"decoder: runs as transformers has it: {reason}",)
    return fused, ()


def _quantise(model: Any, trial: Any, backend: Any, details: _Details) -> str:
    """Turns linear layers into fp8; returns what came of it, in words."""
    from asyncengine.model.fp8_linear import quantise

    done, of = quantise(model)
    if not done:
        raise UnsupportedModelError(f"{str(details.checkpoint.path)!r} has no linear layers that could be in fp8")
    if details.device.type == "cuda":
        memory.empty_cache()
    error = trial.run(model, backend, fp8_weights=True)
    note = f"quantization: fp8, {done / of:.0%} of the weights: logits of a trial are {error:.1%} of their norm off"
    return note if details.device.type == "cuda" else f"{note}; slow on {details.device}"


def _serving(built: _Built, details: _Details, backend: Any, limits: Limits, vocab_size: int, last: Any = None) -> Any:
    """A model with its KV cache, and its sampler."""
    from asyncengine.model.paged_layers import PagedLayers
    from asyncengine.model.runner import TorchModel
    from asyncengine.model.sampler import Sampler

    device = details.device
    paged = PagedLayers(built.layers, backend, limits, details.kv_dtype, device)
    paged.allocate()
    sampler = Sampler(limits.max_num_sequence, vocab_size, device)
    return TorchModel(built.model, paged, sampler, device, built.program, last), sampler


def _captured(
    config: EngineConfig, model: Any, built: _Built, details: _Details, backend: Any, limits: Limits, last: Any = None
) -> tuple[str, ...]:
    """Warms a model up and captures the first of its steps; returns what is slower than it could be, in words."""
    from asyncengine.model.capturing import Capturing, Room
    from asyncengine.model.fused import choice
    from asyncengine.model.graphs import graphs_for

    fused, candidates = built.fused, frozenset[int]()
    if fused is not None:
        model.use_fused(fused)
        if config.decoder_backend == "auto":  # not before it has been measured
            candidates = fused.sizes
            fused.use(())
    _warm_up(model, limits, 2 if details.device.type == "cpu" else 64)
    graphs, slower = graphs_for(model, backend.name, limits.max_num_sequence, details.device, last)
    if graphs is not None:
        measured = None
        if candidates:
            measured = choice.Choice(graphs, fused, candidates, choice.cuda_seconds(details.device))
        room = None
        if details.device.type == "cuda":
            aside = _graphs_of(config, details, limits.max_num_sequence).nbytes
            room = Room(aside, functools.partial(memory.unheld_bytes, details.device))
        capturing = Capturing(graphs, measured, at_once=config.graph_capture == "load", room=room)
        capturing.begin()
        model.use_graphs(capturing)
    return slower


def _build(details: _Details) -> Any:
    """The transformers model, with its weights.

    Weights that are stored in the wanted dtype are mapped, not read: the file's pages are their only copy in host
    memory, and moving the model copies one parameter after the other from there to the device. What is converted, and
    experts that transformers puts together, are held in host memory once, besides the file's pages.
    """
    from transformers import AutoModelForCausalLM

    from asyncengine.model import architecture

    with _BUILDING:
        model = AutoModelForCausalLM.from_pretrained(
            details.checkpoint.path,
            config=details.hf_config,
            dtype=details.dtype,
            attn_implementation=architecture.ATTENTION,
            local_files_only=True,
        )
    return model.to(details.device).eval().requires_grad_(False)


def _compile(config: EngineConfig, details: _Details, model: Any, layers: Any, backend: Any) -> Any:
    """The model as a compiled step, which takes its weights; None if that is not wanted or not for this device.

    Raises:
        NotRecognised: The model is not one that the compiled step can run. It keeps its weights.
    """
    from asyncengine.model.attention.cpu import CpuAttention
    from asyncengine.model.attention.kernel import kind_of
    from asyncengine.model.decoder.blueprint import NotRecognised, recognise
    from asyncengine.model.decoder.program import CompiledDecoder
    from asyncengine.model.fused.choice import DEVICES

    if config.decoder_backend == "transformers" or (config.decoder_backend == "auto" and config.quantization == "fp8"):
        return None
    if details.device.type in DEVICES and config.quantization == "none":
        return None  # `_fuse` sees to it
    if not isinstance(backend, CpuAttention):
        if config.decoder_backend == "auto" and config.quantization == "none":
            return None
        raise NotRecognised(f"it needs the compiled attention of the CPU, not {backend.name!r} on {details.device}")
    blueprint = recognise(model, layers, details.max_length)
    int8 = config.quantization == "int8"
    return CompiledDecoder(blueprint, backend.library(kind_of(details.dtype, int8)), details.dtype, int8)


def kv_bytes_per_block(layers: Any, backend: Any, limits: Limits, dtype: torch.dtype) -> int:
    """Bytes of one block of KV cache, all layers together."""
    return sum(int(backend.bytes_per_block(layer.spec, limits.page_size, dtype)) for layer in layers)


def _select(config: EngineConfig, device: torch.device, dtype: torch.dtype) -> Any:
    from asyncengine.model.attention.kernel import kind_of
    from asyncengine.model.attention.protocol import BackendUnavailableError
    from asyncengine.model.attention.select import select

    try:
        return select(config.attention_backend, device, kind_of(dtype, config.quantization == "int8"))
    except BackendUnavailableError as error:
        raise ConfigError(f"attention_backend is {config.attention_backend!r}: {error}") from error


def _check_kv_dtype(config: EngineConfig, backend: Any, kv_dtype: torch.dtype, device: torch.device) -> None:
    """Refuses a KV cache that the attention back end cannot keep.

    Raises:
        ConfigError: As it says.
    """
    from asyncengine.model.attention.protocol import BackendUnavailableError

    if config.kv_cache_dtype == "auto":
        return
    try:
        backend.check_dtype(kv_dtype, device)
    except BackendUnavailableError as error:
        raise ConfigError(
            f"kv_cache_dtype is {config.kv_cache_dtype!r} with attention_backend {config.attention_backend!r} on "
            f"{device}: {error}; allowed: 'auto', or attention_backend 'torch' or, on CUDA, 'triton'"
        ) from error


def _check_fp8(config: EngineConfig, device: torch.device) -> None:
    """Refuses weights in fp8 where nothing multiplies them."""
    if config.decoder_backend == "compiled":
        raise ConfigError(
            "quantization is 'fp8' with decoder_backend 'compiled', which has no products in fp8; allowed: 'auto', "
            "'transformers'"
        )
    if device.type == "cuda" and (capability := torch.cuda.get_device_capability(device)) < (8, 9):
        raise ConfigError(
            f"quantization is 'fp8' on a device of compute capability {capability[0]}.{capability[1]} "
            f"({torch.cuda.get_device_name(device)}); allowed: 8.9 and later"
        )


def _limits(plan: LoadPlan, built: _Built, draft: _Built | None, backend: Any) -> tuple[Limits, EngineConfig]:
    """Fills in everything that the configuration leaves open."""
    config, details = plan.config, plan.details
    cuda = details.device.type == "cuda"
    sequences = config.max_num_sequence or {"interactive": 1, "local": 4, "server": 256 if cuda else 64}[config.mode]
    length = details.max_length
    chunk = min(config.prefill_chunk_size or (2048 if cuda else 512), length)
    page_size = config.kv_cache_page_size or (16 if cuda else 32)
    layers = built.layers if draft is None else [*built.layers, *draft.layers]  # they share the blocks
    per_block = sum(backend.bytes_per_block(layer.spec, page_size, details.kv_dtype) for layer in layers)
    graphs = None
    share = config.gpu_memory_utilization or (memory.CUDA_SHARE if cuda else memory.CPU_SHARE)
    if cuda:
        drafts = 0 if config.speculative_mode == "disable" else sequences * (config.spec_draft_length or LONGEST)
        activations = _profile(built.model, built.layers, chunk, sequences + min(drafts, chunk), details.device)
        used = memory.total_bytes(details.device) - memory.free_bytes(details.device)
        available = int(memory.total_bytes(details.device) * share) - used - activations
        share = 1.0
        graphs = _graph_reserve(config, details, backend, sequences)
    else:
        available = memory.free_bytes(details.device)
    budget = memory.kv_budget(
        available=max(available, 0),
        share=share,
        bytes_per_block=per_block,
        page_size=page_size,
        wanted_tokens=config.max_total_sequence_length,
        useful_tokens=sequences * length,
        graphs=graphs,
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
        tokenizer=config.tokenizer or (config.model if plan.tokenizer_key else None),
        device=str(details.device),
        dtype=str(details.dtype).removeprefix("torch."),
        max_num_sequence=sequences,
        max_total_sequence_length=budget.num_blocks * page_size,
        max_single_sequence_length=length,
        prefill_chunk_size=chunk,
        kv_cache_page_size=page_size,
        gpu_memory_utilization=config.gpu_memory_utilization or (memory.CUDA_SHARE if cuda else memory.CPU_SHARE),
    )
    return limits, complete


def _graph_reserve(config: EngineConfig, details: _Details, backend: Any, sequences: int) -> memory.GraphReserve | None:
    """What the captured steps of a model and of the one that drafts for it will take; None if there will be none."""
    if backend.name != "triton" or details.device.type != "cuda":
        return None
    needs = [details] if details.draft is None else [details, details.draft]
    return sum((_graphs_of(config, each, sequences) for each in needs), memory.GraphReserve())


def _graphs_of(config: EngineConfig, details: _Details, sequences: int) -> memory.GraphReserve:
    from asyncengine.model import architecture, graph_memory

    draws = config.speculative_mode == "disable"  # else no token stays on the device
    return graph_memory.reserve(architecture.text_config(details.hf_config), details.dtype, sequences, draws)


def _profile(model: Any, layers: Any, chunk: int, sequences: int, device: torch.device) -> int:
    """Bytes that the activations of the largest step take, measured."""
    from asyncengine.model import architecture
    from asyncengine.model.graph_memory import draw_bytes

    def nothing(module: Any, query: Any, key: Any, value: Any, kwargs: Any) -> Any:
        return query.new_zeros(query.shape[0], query.shape[1], value.shape[-1])

    tokens = chunk + sequences
    ids = torch.zeros(1, tokens, dtype=torch.long, device=device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    with architecture.hooked({layer.module: nothing for layer in layers}), torch.inference_mode():
        positions = torch.arange(tokens, device=device)[None] % 16
        model(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=sequences)
    peak = int(torch.cuda.max_memory_allocated(device)) - before
    memory.empty_cache()
    # Sampling works on a few copies of the logits in float32.
    vocab = int(architecture.text_config(model.config).vocab_size)
    return peak + max(4 * sequences * vocab * 4, draw_bytes(sequences, vocab))


def _warm_up(model: Any, limits: Limits, prompt: int) -> None:
    """Runs a prefill and a decode, so that whatever is built on first use is built before the model serves.

    For that a device wants some tokens; on the CPU nothing depends on how many there are.
    """
    most = min(limits.prefill_chunk_size, limits.max_single_sequence_length, limits.num_blocks * limits.page_size)
    for count in {min(prompt, most), 1}:
        positions = np.arange(count, dtype=np.int32)
        model.execute(
            StepBatch(
                token_ids=np.zeros(count, dtype=np.int32),
                positions=positions,
                query_start=np.array([0, count], dtype=np.int32),
                context_lens=np.zeros(1, dtype=np.int32),
                block_tables=np.arange(-(-count // limits.page_size), dtype=np.int32)[None],
                slot_mapping=positions.astype(np.int64),
                sample_index=np.empty(0, dtype=np.int64),
                sample_slots=np.empty(0, dtype=np.int64),
                sample_positions=np.empty(0, dtype=np.int64),
                copies=np.empty((0, 2), dtype=np.int64),
                num_decodes=int(count == 1),
            )
        )


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not name.startswith("cuda"):
        return torch.device(name)
    if not torch.cuda.is_available():
        raise ConfigError(f"device is {name!r}, but torch {torch.__version__} finds no CUDA device")
    index = int(name[5:]) if ":" in name else 0
    if index >= torch.cuda.device_count():
        raise ConfigError(f"device is {name!r}; there are {torch.cuda.device_count()} CUDA devices")
    return torch.device("cuda", index)


def _check_on_meta(architecture: Any, hf_config: Any) -> dict[str, Any] | None:
    """Watches the model run without weights, unless one of the same configuration was watched.

    Returns:
        Its attention layers by name; None if it does not run without weights.
    """
    from transformers import AutoModelForCausalLM

    configuration = f"{type(hf_config).__qualname__} {hf_config.to_json_string(use_diff=False)}"
    if (known := _WATCHED.get(configuration)) is not None:
        return known
    try:
        with _BUILDING, torch.device("meta"):
            model = AutoModelForCausalLM.from_config(hf_config, attn_implementation=architecture.ATTENTION)
        found = {layer.name: layer.spec for layer in architecture.record(model.eval())}
    except UnsupportedModelError:
        raise
    except Exception:
        # Some models cannot run without weights (their control flow reads them). They are watched once they are loaded.
        return None
    _WATCHED[configuration] = found
    return found


def _fits(details: _Details, current: LoadedModel | None) -> bool:
    """Whether a model fits beside the present one.

    Raises:
        InsufficientMemoryError: It does not fit even without it.
    """
    free = memory.free_bytes(details.device)
    need = details.all_weight_bytes + SLACK
    if current is None:
        if need > free:
            raise InsufficientMemoryError(_arithmetic(details, free, 0))
        return True
    held = current.memory_bytes if current.config.device == str(details.device) else 0
    if need > free + held:
        raise InsufficientMemoryError(_arithmetic(details, free, held))
    if details.device.type == "cuda":
        # The present model's KV cache takes all that its share leaves; beside it, the new one's would be tiny.
        return False if held else need <= free
    return need <= free


def _arithmetic(details: _Details, free: int, held: int) -> str:
    text = (
        f"{details.checkpoint.path} does not fit on {details.device}: weights {details.all_weight_bytes / GIB:.2f} GiB "
        f"in {details.dtype} + {SLACK / GIB:.2f} GiB for everything else > {free / GIB:.2f} GiB free"
    )
    return text + (f" + {held / GIB:.2f} GiB of the present model" if held else "")
