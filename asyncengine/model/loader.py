"""Loads checkpoints with transformers. Runs on threads of its own; what it returns goes to the step thread."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from asyncengine.config import EngineConfig
from asyncengine.errors import (
    AsyncEngineError,
    InsufficientMemoryError,
    ReloadError,
    UnsupportedModelError,
)
from asyncengine.model import memory
from asyncengine.model.built_model import Built, build
from asyncengine.model.capacity import cache_bytes, graphs_of, kv_bytes_per_block, limits_of, state_scratch
from asyncengine.model.draft_heads.entries import widened
from asyncengine.model.draft_heads.serving import drafter_of
from asyncengine.model.draft_model import DraftModel
from asyncengine.model.encoders.kind import is_encoder
from asyncengine.model.findings import keep
from asyncengine.model.load_check import Details, check_drafts, plan_of, vector_size, without_findings
from asyncengine.model.load_settings import device_of, dtype_of, select_attention, settled
from asyncengine.model.recalled_model import recalled
from asyncengine.model.recurrent.refusals import check_recurrent
from asyncengine.model.tokenizer import keep_for_next_load, load_tokenizer
from asyncengine.speculation.lengths import DraftLengths
from asyncengine.speculation.ngram import NgramDrafter
from asyncengine.speculation.protocol import Drafter
from asyncengine.step.batch import StepBatch
from asyncengine.step.drafting import Drafting
from asyncengine.step.limits import Limits
from asyncengine.step.model import LoadedModel, LoadPlan

if TYPE_CHECKING:
    from asyncengine.model.fused.choice import Choice
    from asyncengine.model.graphs import StepGraphs

CPU_SATURATION, CUDA_SATURATION = 8.0, 128.0
"""Tokens in a step whose arithmetic takes about as long as reading the weights."""
_SOME_TOKENS, _MANY_TOKENS = 64, 2048
"""Of a prompt that is neither short nor long to a device, and of one that is long."""


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
        from asyncengine.model.gguf.checkpoint import checkpoint_at
        from asyncengine.model.location import locate

        device = device_of(config.device)
        checkpoint = checkpoint_at(locate(config.model))
        given, config = config, settled(config, checkpoint, device)
        dtype = dtype_of(config, checkpoint)
        checkpoint.read_ahead(memory.free_bytes(torch.device("cpu")))
        if is_encoder(checkpoint.config):
            from asyncengine.model.encoders import loading

            try:
                return loading.plan_of(given, current, checkpoint, device, dtype)
            except BaseException:
                checkpoint.stop_reading_ahead()
                raise
        # A compiler has much of its work done while transformers is imported and the model is watched. `plan_of` waits
        # for it where there is something to let go of, or to be refused; else its work may end after the check.
        pool = ThreadPoolExecutor(1, "asyncengine-compiler")
        selecting = pool.submit(select_attention, config, device, dtype)
        pool.shutdown(wait=False)
        try:
            if device.type != "cpu":
                wait([selecting])  # it imports triton, and so does transformers
            plan = plan_of(config, current, checkpoint, device, dtype, selecting)
        except BaseException:
            checkpoint.stop_reading_ahead()
            wait([selecting])
            raise
        unasked = given.quantization == "auto" and config.quantization != "none"
        return dataclasses.replace(plan, details=dataclasses.replace(plan.details, unasked=unasked))

    def load(self, plan: LoadPlan) -> LoadedModel:
        """As the protocol says. Codes that could not stay codes, and that nobody has asked for, become numbers."""
        if is_encoder(plan.details.checkpoint.config):
            from asyncengine.model.encoders import loading

            return loading.load(plan)
        try:
            return self._load(plan)
        except UnsupportedModelError as error:
            if not plan.details.unasked:
                raise
            reason = str(error)
        # What was raised is gone, and with it the model that its traceback held.
        loaded = self._load(self.check(plan.config.replace(quantization="none"), None))
        return dataclasses.replace(loaded, notes=(f"quantization: none: {reason}", *loaded.notes))

    def _load(self, plan: LoadPlan) -> LoadedModel:
        try:
            return _load(plan, self._run_ahead)
        except AsyncEngineError:
            raise
        except torch.OutOfMemoryError as error:
            raise InsufficientMemoryError(f"loading {plan.config.model!r}: {error}") from error
        except Exception as error:
            raise ReloadError(f"loading {plan.config.model!r} failed: {error}") from error
        finally:
            plan.details.checkpoint.stop_reading_ahead()
            wait([plan.details.selecting])
            memory.give_back()


def _load(plan: LoadPlan, run_ahead: bool | None) -> LoadedModel:
    from asyncengine.model.last_tokens import LastTokens

    details, config = plan.details, plan.config
    assert isinstance(details, Details)
    compiling = details.selecting
    assert compiling is not None
    attention = functools.cache(lambda: _attention(config, details, compiling))
    built = None
    known = None if details.findings is None else recalled(config, details, attention().backend)
    # Where all is known already, nothing of transformers is imported beside the tokenizer; else its models follow.
    with ThreadPoolExecutor(1, "asyncengine-tokenizer") as pool:
        # A vocabulary is read with the GIL, for as long as it takes to pack the weights, which is done without.
        reading = pool.submit(load_tokenizer, details.tokenizer_path, details.present_tokenizer)
        if known is not None:
            built = known.built()
        tokenizer = reading.result()
        keeping = functools.cache(lambda: pool.submit(keep_for_next_load, tokenizer))
        if built is None:
            details = details if details.findings is None else without_findings(details)

            def attend() -> Any:
                if not compiling.done():
                    keeping()  # for seconds, with the GIL
                return attention().backend

            built = build(config, details, attend, keeping)
            if details.findings_at is not None and built.findings is not None:
                keep(details.findings_at, built.findings)
        keeping().result()
    backend, reason = attention().backend, attention().fallback_reason
    notes = [] if reason is None else [f"attention: {reason}"]
    notes += [details.rope_note] if details.rope_note else []
    draft = None
    if details.draft is not None:
        text_alone = config.replace(images=False, audio=False, mla=None)
        draft = build(text_alone, details.draft, lambda: backend)
        check_drafts(details.draft, draft.has_head)
    head = None if details.draft_head is None else details.draft_head.build(built, details)
    check_recurrent(config, bool(built.layers.recurrent), draft is not None and bool(draft.layers.recurrent))
    drafting_layers = [] if draft is None else draft.layers.attention
    if head is not None:
        drafting_layers = [widened(layer) for layer in head.layers]
    limits, complete = limits_of(plan, built, drafting_layers, backend)
    vocab_size = details.vocab_size
    if run_ahead is None:
        run_ahead = details.device.type == "cuda"
    run_ahead &= config.speculative_mode == "disable"
    last = LastTokens(limits.max_num_sequence, details.device) if run_ahead else None
    model, _ = _serving(built, details, backend, limits, vocab_size, last)
    drafting = None
    memory_bytes = built.nbytes + cache_bytes(built, backend, limits, details)
    draft_model = encoder = None
    of_media = 0
    try:
        if built.media_trial is not None:
            model.use_media(encoder := built.media_trial.encoder(built.model))
            of_media = next(iter(built.media_trial.reader.token_ids.values()))
        model.use_adapters(adapting := _adapting(built, details))
        adapters = [(name, adapting.format.prepare(path, None)) for name, path in config.adapters.items()]
        for index, (_, prepared) in enumerate(adapters):
            model.put_adapter(index, prepared)
        if draft is not None:
            assert details.draft is not None
            draft_model, draft_sampler = _serving(draft, details.draft, backend, limits, vocab_size)
            drafter = model.companion = DraftModel(draft_model, draft_sampler, limits, of_media)
            drafting = _drafting(config, drafter, limits, details.device, draft.nbytes / built.nbytes)
        heads = None
        if head is not None:
            heads = drafter_of(head, model, details, backend, limits, config, encoder)
            drafting = _drafting(config, heads, limits, details.device, head.read_bytes / built.nbytes)
            memory_bytes += head.nbytes + heads.nbytes
            memory_bytes += limits.num_blocks * kv_bytes_per_block(drafting_layers, backend, limits, details.kv_dtype)
        # Both caches are there by now: they share the attention's plan, and what one adds to it changes its addresses.
        notes += [*built.notes, *_captured(config, model, built, details, backend, limits, last, adapting)]
        if draft is not None and draft_model is not None:
            slower = _captured(config, draft_model, draft, details, backend, limits)
            notes += [f"draft model: {note}" for note in (*draft.notes, *slower)]
            memory_bytes += draft.nbytes + cache_bytes(draft, backend, limits, details)
        elif heads is not None:
            heads.check()
        elif config.speculative_mode == "ngram":
            drafting = _drafting(config, NgramDrafter(), limits, details.device)
    except BaseException:
        model.close()
        raise
    return LoadedModel(
        model=model,
        limits=limits,
        config=complete.replace(
            attention_backend=backend.name,
            decoder_backend=built.decoder_backend(config),
            images=not built.no_media["image"],
            audio=not built.no_media["audio"],
            mla=any(layer.spec.values_in_keys for layer in built.layers.attention),
        ),
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
        hidden_size=vector_size(details, built.hidden_size),
        pooling=details.embedder.pooling,
        dense=details.embedder.dense,
        embedding_prompts=details.embedder.prompts,
        has_head=built.has_head,
        classifier=built.classifier,
        ranking=details.ranking,
        adapting=model,
        adapters=tuple(adapters),
        adapter_format=adapting.format,
        media_reader=None if built.media_trial is None else built.media_trial.reader,
        no_media=built.no_media,
    )


def _attention(config: EngineConfig, details: Details, compiling: Future[Any]) -> Any:
    """What attends in this load, anew: it keeps what a step has last asked of it."""
    wait([compiling])
    return select_attention(config, details.device, details.dtype)


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


def _serving(built: Built, details: Details, backend: Any, limits: Limits, vocab_size: int, last: Any = None) -> Any:
    """A model with its KV cache, and its sampler."""
    from asyncengine.model.paged_layers import PagedLayers
    from asyncengine.model.recurrent.states import States
    from asyncengine.model.runner import TorchModel
    from asyncengine.model.sampler import Sampler

    device = details.device
    recurrent = built.layers.recurrent
    states = States(recurrent, limits, details.dtype, device) if recurrent else None
    paged = PagedLayers(built.layers.attention, backend, limits, details.kv_dtype, device, states)
    paged.allocate()
    sampler = Sampler(limits.max_num_sequence, vocab_size, device)
    return TorchModel(built.model, paged, sampler, device, built.program, last), sampler


def _adapting(built: Built, details: Details) -> Any:
    """What computes with a model's adapters."""
    from asyncengine.model.adapters.adapted_modules import AdaptedModules

    if built.program is not None:
        return built.program.adapters_of(built.model)
    return AdaptedModules(built.model, built.layers, details.device, details.dtype)


def _captured(
    config: EngineConfig,
    model: Any,
    built: Built,
    details: Details,
    backend: Any,
    limits: Limits,
    last: Any = None,
    adapting: Any = None,
) -> tuple[str, ...]:
    """Warms a model up and captures the first of its steps; returns what is slower than it could be, in words."""
    from asyncengine.model.attention.protocol import CarryingBackend
    from asyncengine.model.buckets import Buckets
    from asyncengine.model.capturing import Capturing, Room
    from asyncengine.model.fused import choice
    from asyncengine.model.graphs import graphs_for

    fused = built.fused
    if fused is not None:
        model.use_fused(fused)
        if config.decoder_backend == "auto":  # not before it has been measured
            fused.rest()
    prompt = _SOME_TOKENS if details.device.type != "cpu" else 2 if built.program is None else 1
    _warm_up(model, limits, prompt, details.vocab_size)
    waits = None
    if details.device.type == "cuda":
        from asyncengine.model import architecture

        waits = architecture.waits(built.model)
    graphs, slower = graphs_for(model, backend, limits.max_num_sequence, details.device, last, waits, model.states)
    measured = None
    if fused is not None and config.decoder_backend == "auto":
        measured = choice.Choice(fused, choice.cuda_seconds(details.device), graphs)
        _choose_launched(model, measured, graphs, limits, details.device, details.vocab_size)
    if graphs is None:
        return slower if measured is None else (*measured.notes, *slower)
    room = None
    if details.device.type == "cuda":
        specs = [layer.spec for layer in built.layers.attention]
        adapters = adapting is not None and bool(config.adapters)  # those that come later take what is left
        reserve = graphs_of(config, details, backend, limits.max_num_sequence, specs, adapters)
        recurrent = [layer.spec for layer in built.layers.recurrent]
        aside = (reserve + state_scratch(recurrent, details.dtype, limits.max_num_sequence)).nbytes
        room = Room(aside, functools.partial(memory.unheld_bytes, details.device))
    mixed = None
    if isinstance(backend, CarryingBackend) and model.states is None:  # prompts are cut in ways of their own
        tokens = limits.prefill_chunk_size + limits.max_num_sequence
        mixed = graphs.mixed(Buckets.mixed(tokens), limits.max_num_sequence)
    adapted = None if adapting is None else graphs.adapted(Buckets.doubling(limits.max_num_sequence), adapting)
    at_once = config.graph_capture == "load"
    seconds = choice.cuda_seconds(details.device, rounds=3, replays=3)
    capturing = Capturing(graphs, measured, mixed=mixed, adapted=adapted, seconds=seconds, at_once=at_once, room=room)
    capturing.begin()
    model.use_graphs(capturing)
    return slower


def _choose_launched(
    model: Any, choice: Choice, graphs: StepGraphs | None, limits: Limits, device: torch.device, vocab_size: int
) -> None:
    """Has the choice measure, by steps that are launched, what it cannot measure by captured ones."""
    from asyncengine.model.fused.choice import cuda_seconds
    from asyncengine.model.fused.tiles import MOST_TOKENS, SOME_TOKENS

    longest = _longest_piece(limits)
    sorts: list[tuple[Sequence[int], int]] = []
    if graphs is None:
        sorts += [((1,), 1), (range(2, MOST_TOKENS + 1), MOST_TOKENS)]
    some_captured = graphs is not None and any(size > MOST_TOKENS and choice.is_open(size) for size in graphs.sizes)
    if longest > MOST_TOKENS and not some_captured:
        sorts.append(((SOME_TOKENS,), _SOME_TOKENS))
    if longest > SOME_TOKENS:  # else those of more tokens are run as those are
        sorts.append(((SOME_TOKENS + 1,), _MANY_TOKENS))
    for counts, tokens in sorts:
        tokens = min(tokens, longest)
        prefill = _prefill(tokens, limits.page_size, vocab_size)
        step = dataclasses.replace(prefill, sample_index=np.array([tokens - 1]))
        # The first run makes whatever is made on first use. A step of many tokens takes so long that two tell enough.
        seconds = cuda_seconds(device, rounds=2 if tokens == _MANY_TOKENS else 7, replays=1)
        with torch.inference_mode():
            choice.decide_launched(counts, tokens, functools.partial(model.logits, step), seconds)


def _warm_up(model: Any, limits: Limits, prompt: int, vocab_size: int) -> None:
    """Runs a prefill and a decode, so that whatever is built on first use is built before the model serves.

    For that a device wants some tokens; on the CPU nothing depends on how many there are. A compiled step has been run
    by the trial, and its prefill and decode are one code: a single token shows that it runs over this cache.
    """
    for count in {min(prompt, _longest_piece(limits)), 1}:
        model.execute(_prefill(count, limits.page_size, vocab_size))


def _longest_piece(limits: Limits) -> int:
    """Tokens of one prompt that a step can have."""
    return min(limits.prefill_chunk_size, limits.max_single_sequence_length, limits.num_blocks * limits.page_size)


def _prefill(count: int, page_size: int, vocab_size: int) -> StepBatch:
    """A step of so many tokens of one prompt, or of one that decodes. A token that there is not would lose a device."""
    positions = np.arange(count, dtype=np.int32)
    return StepBatch(
        token_ids=positions % min(16, vocab_size),
        positions=positions,
        query_start=np.array([0, count], dtype=np.int32),
        context_lens=np.zeros(1, dtype=np.int32),
        block_tables=np.arange(-(-count // page_size), dtype=np.int32)[None],
        slot_mapping=positions.astype(np.int64),
        sample_index=np.empty(0, dtype=np.int64),
        sample_slots=np.empty(0, dtype=np.int64),
        sample_positions=np.empty(0, dtype=np.int64),
        copies=np.empty((0, 2), dtype=np.int64),
        num_decodes=int(count == 1),
        slots=np.zeros(1, dtype=np.int64),
    )
