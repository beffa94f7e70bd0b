"""Loads checkpoints with transformers. Runs on threads of its own; what it returns goes to the step thread."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
from asyncengine.model.capacity import Fitted, kv_bytes_per_block, limits_of
from asyncengine.model.draft_heads.entries import widened
from asyncengine.model.draft_heads.plan import BuiltHead
from asyncengine.model.draft_heads.serving import drafter_of
from asyncengine.model.draft_model import DraftModel
from asyncengine.model.encoders.kind import is_encoder
from asyncengine.model.findings import keep
from asyncengine.model.first_steps import captured
from asyncengine.model.kept_blocks import Identity, numbers_of, why_not
from asyncengine.model.last_tokens import LastTokens
from asyncengine.model.load_check import Details, check_drafts, plan_of, vector_size, without_findings
from asyncengine.model.load_settings import device_of, dtype_of, select_attention, settled
from asyncengine.model.recalled_model import recalled
from asyncengine.model.recurrent.refusals import check_recurrent
from asyncengine.model.speech.kind import is_speech
from asyncengine.model.text_to_text.kind import is_text_to_text
from asyncengine.model.tokenizer import keep_for_next_load, load_tokenizer
from asyncengine.speculation.lengths import DraftLengths
from asyncengine.speculation.ngram import NgramDrafter
from asyncengine.speculation.protocol import Drafter
from asyncengine.step.drafting import Drafting
from asyncengine.step.model import LoadedModel, LoadPlan
from asyncengine.tokenizer import Tokenizer

if TYPE_CHECKING:
    from asyncengine.model.media.encoder import MediaEncoder

CPU_SATURATION, CUDA_SATURATION = 8.0, 128.0
"""Tokens in a step whose arithmetic takes about as long as reading the weights."""


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
        if (other := _other_loading(checkpoint.config)) is not None:
            try:
                plan: LoadPlan = other.plan_of(given, current, checkpoint, device, dtype)
            except BaseException:
                checkpoint.stop_reading_ahead()
                raise
            return plan
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
        if (other := _other_loading(plan.details.checkpoint.config)) is not None:
            loaded: LoadedModel = other.load(plan)
            return loaded
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


def _other_loading(config: dict[str, Any]) -> Any:
    """The module that loads models which are no decoders alone; None if a checkpoint is of such a decoder.

    Args:
        config: Of the checkpoint, ``config.json``.
    """
    if is_encoder(config):
        from asyncengine.model.encoders import loading as of_encoders

        return of_encoders
    if is_speech(config):
        from asyncengine.model.speech import loading as of_speech

        return of_speech
    if is_text_to_text(config):
        from asyncengine.model.text_to_text import loading as of_texts

        return of_texts
    return None


def _load(plan: LoadPlan, run_ahead: bool | None) -> LoadedModel:
    details, config = plan.details, plan.config
    assert isinstance(details, Details) and details.selecting is not None
    identity = Identity(details.checkpoint.weight_files)
    attention = functools.cache(functools.partial(_attention, config, details, details.selecting))
    details, built, tokenizer = _built(config, details, attention)
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
    fitted = Fitted(config, details, built, backend, limits)
    if run_ahead is None:
        run_ahead = details.device.type == "cuda"
    run_ahead &= config.speculative_mode == "disable"
    last = LastTokens(limits.max_num_sequence, details.device) if run_ahead else None
    model, _ = _serving(fitted, last)
    guessing = _Guessing()
    try:
        encoder = None
        if built.media_trial is not None:
            model.use_media(encoder := built.media_trial.encoder(built.model))
        model.use_adapters(adapting := _adapting(built, details))
        adapters = [(name, adapting.format.prepare(path, None)) for name, path in config.adapters.items()]
        for index, (_, prepared) in enumerate(adapters):
            model.put_adapter(index, prepared)
        if draft is not None:
            guessing = _by_model(fitted, model, draft)
        elif head is not None:
            guessing = _by_head(fitted, model, head, encoder)
        elif config.speculative_mode == "ngram":
            guessing = _Guessing(_drafting(fitted, NgramDrafter()))
        # Both caches are there by now: they share the attention's plan, and what one adds to it changes its addresses.
        notes += [*built.notes, *captured(fitted, model, last, adapting)]
        notes += guessing.begin()
    except BaseException:
        model.close()
        raise
    complete = complete.replace(
        attention_backend=backend.name,
        decoder_backend=built.decoder_backend(config),
        images=not built.no_media["image"],
        audio=not built.no_media["audio"],
        videos=not built.no_media["video"],
        mla=any(layer.spec.values_in_keys for layer in built.layers.attention),
    )
    identity.settings = numbers_of(details, complete)
    no_keeping = why_not(limits, draft is not None or head is not None)
    return LoadedModel(
        model=model,
        limits=limits,
        config=complete,
        vocab_size=details.vocab_size,
        eos_token_ids=tuple(i for i in details.checkpoint.eos_token_ids if 0 <= i < details.vocab_size),
        default_generation_config=details.checkpoint.generation_defaults,
        tokenizer=tokenizer,
        tokenizer_key=plan.tokenizer_key,
        memory_bytes=fitted.nbytes + guessing.nbytes,
        notes=tuple(notes),
        drafting=guessing.drafting,
        launching=model if run_ahead else None,
        warming=_warming(model, guessing.model),
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
        keeping=None if no_keeping else model.kept_blocks(),
        no_keeping=no_keeping,
        prefix_identity=identity,
    )


def _attention(config: EngineConfig, details: Details, compiling: Future[Any]) -> Any:
    """What attends in this load, anew: it keeps what a step has last asked of it."""
    wait([compiling])
    return select_attention(config, details.device, details.dtype)


def _built(
    config: EngineConfig, details: Details, attention: Callable[[], Any]
) -> tuple[Details, Built, Tokenizer | None]:
    """The model, what is known of it by now, and its tokenizer, which is read beside."""
    compiling, built = details.selecting, None
    assert compiling is not None
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
    return details, built, tokenizer


@dataclass(frozen=True, slots=True)
class _Guessing:
    """What guesses tokens for a model.

    Attributes:
        drafting: It, as the core asks it; None if nothing does.
        nbytes: Of its weights and of all that it keeps of sequences.
        model: The draft model, if it is one.
        begin: What it does before it serves, once the model's own steps are captured; returns notes.
    """

    drafting: Drafting | None = None
    nbytes: int = 0
    model: Any = None
    begin: Callable[[], Iterable[str]] = tuple


def _by_model(fitted: Fitted, model: Any, draft: Built) -> _Guessing:
    """Has a draft model guess; it sleeps, wakes and goes with the model."""
    assert fitted.details.draft is not None
    drafts = dataclasses.replace(fitted, details=fitted.details.draft, built=draft)
    draft_model, sampler = _serving(drafts)
    trial = fitted.built.media_trial
    of_media = 0 if trial is None else next(iter(trial.reader.token_ids.values()))
    drafter = model.companion = DraftModel(draft_model, sampler, fitted.limits, of_media)

    def begin() -> list[str]:
        slower = captured(drafts, draft_model)
        return [f"draft model: {note}" for note in (*draft.notes, *slower)]

    cost = draft.nbytes / fitted.built.nbytes
    return _Guessing(_drafting(fitted, drafter, cost), drafts.nbytes, draft_model, begin)


def _by_head(fitted: Fitted, model: Any, head: BuiltHead, encoder: MediaEncoder | None) -> _Guessing:
    """Has a head guess from the hidden states of the model, with which it sleeps, wakes and goes."""
    drafter = drafter_of(head, model, fitted, encoder)
    layers, limits = [widened(layer) for layer in head.layers], fitted.limits
    per_block = kv_bytes_per_block(layers, fitted.backend, limits, fitted.details.kv_dtype)
    nbytes = head.nbytes + drafter.nbytes + limits.num_blocks * per_block

    def begin() -> tuple[str, ...]:
        drafter.check()
        return ()

    return _Guessing(_drafting(fitted, drafter, head.read_bytes / fitted.built.nbytes), nbytes, begin=begin)


def _drafting(fitted: Fitted, drafter: Drafter, cost: float = 0.0) -> Drafting:
    """A drafter, of which one guess costs so much of a step of the model, and how much it is asked for."""
    saturation = CUDA_SATURATION if fitted.details.device.type == "cuda" else CPU_SATURATION
    sequences, wanted = fitted.limits.max_num_sequence, fitted.config.spec_draft_length
    return Drafting(drafter, DraftLengths(sequences, wanted, saturation, cost))


def _warming(*models: Any) -> Any:
    """What is left to be captured of models that are there, or None."""
    from asyncengine.model.capturing import CapturesOf

    capturing = [model.capturing for model in models if model is not None and model.capturing is not None]
    return CapturesOf(capturing) if capturing else None


def _serving(fitted: Fitted, last: LastTokens | None = None) -> Any:
    """A model with its KV cache, and its sampler."""
    from asyncengine.model.paged_layers import PagedLayers
    from asyncengine.model.recurrent.states import States
    from asyncengine.model.runner import TorchModel
    from asyncengine.model.sampler import Sampler

    details, built, limits = fitted.details, fitted.built, fitted.limits
    recurrent = built.layers.recurrent
    states = States(recurrent, limits, details.dtype, details.device) if recurrent else None
    paged = PagedLayers(built.layers.attention, fitted.backend, limits, details.kv_dtype, details.device, states)
    paged.allocate()
    sampler = Sampler(limits.max_num_sequence, details.vocab_size, details.device)
    return TorchModel(built.model, paged, sampler, details.device, built.program, last), sampler


def _adapting(built: Built, details: Details) -> Any:
    """What computes with a model's adapters."""
    from asyncengine.model.adapters.adapted_modules import AdaptedModules

    if built.program is not None:
        return built.program.adapters_of(built.model)
    return AdaptedModules(built.model, built.layers, details.device, details.dtype)
