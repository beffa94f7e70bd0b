"""What is known of a load before any weight is read, and everything that can be wrong with it."""

from __future__ import annotations

import dataclasses
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from asyncengine.config import EngineConfig, Quantization
from asyncengine.errors import CheckpointError, ConfigError, InsufficientMemoryError, UnsupportedModelError
from asyncengine.media import KINDS, PLURALS, Kind
from asyncengine.model import memory, rope_limits
from asyncengine.model.adapters import lora
from asyncengine.model.attention_modules import text_config
from asyncengine.model.draft_heads.plan import HeadPlan, check_head
from asyncengine.model.findings import Findings, place_of, recall
from asyncengine.model.load_settings import (
    DEFAULT_LONGEST,
    KV_DTYPES,
    check_kv_dtype,
    check_latents,
    check_layers,
    check_quantization,
    device_of,
    dtype_of,
    keeps_latents,
    longest_of,
    serves_all,
    settled,
)
from asyncengine.model.media.refusals import refusals, wanted
from asyncengine.model.memory import GIB
from asyncengine.model.ranking import ranking_of
from asyncengine.model.recorded import Watched
from asyncengine.model.recurrent.refusals import check_recurrent
from asyncengine.model.rope_limits import RopeLimit
from asyncengine.model.sentence_modules import Embedder, embedder_of
from asyncengine.model.text_files import check_processors, check_settings
from asyncengine.model.tokenizer import load_tokenizer
from asyncengine.model.watching import watch
from asyncengine.reranking import RerankPrompt
from asyncengine.step.model import LoadedModel, LoadPlan
from asyncengine.tokenizer import Tokenizer

SLACK = 256 << 20
"""Bytes for whatever else a load needs: modules, a tokenizer, activations of the first steps."""


D = TypeVar("D", bound="Details")


@dataclass(frozen=True, slots=True)
class Details:
    """What a load needs to know of a model.

    Attributes:
        checkpoint: An `asyncengine.model.checkpoint.Checkpoint`.
        tokenizer_path: Directory of the tokenizer.
        hf_config: As transformers reads it.
        vocab_size: Tokens that have logits.
        device: Where it will be.
        dtype: Of weights and activations.
        weight_bytes: Bytes of its weights in that dtype.
        max_length: Most tokens in one sequence.
        present_tokenizer: One that need not be loaded if it is the same: that of the model that is loaded, or what was
            read to see whether it can be.
        kv_dtype: Of the KV cache.
        draft: The same of the model that drafts for it.
        watched: What its layers need; None if it does not run without weights.
        findings: What an earlier load of it found out, if that was kept. Then there is no `hf_config`.
        findings_at: Where what is found out is kept; None if it is not.
        selecting: Comes to what attends, as soon as that is compiled; None for a draft model.
        quantization: What weights are kept as.
        no_media: By kind, why the model takes none, in words; empty if it is to take some.
        unasked: Whether nobody has asked for that `quantization`, so that it may be another one.
        rope_limit: Up to which length of a sequence its rotary embedding does not change; None if it never does.
        rope_note: What there is to be said of that, in words; empty if there is nothing.
        head: Its classification head, if it has one: an `asyncengine.model.classification.Head`.
        ranking: How it ranks documents, if it says so.
        draft_head: What drafts from its hidden states.
        embedder: How it makes embeddings, as far as that is said.
        latents: Whether it keeps those of multi-head latent attention, if it has such layers.
    """

    checkpoint: Any
    tokenizer_path: Path
    hf_config: Any
    vocab_size: int
    device: torch.device
    dtype: torch.dtype
    weight_bytes: int
    max_length: int
    present_tokenizer: Tokenizer | None
    kv_dtype: torch.dtype
    draft: Details | None = None
    watched: Watched | None = None
    findings: Findings | None = None
    findings_at: Path | None = None
    selecting: Future[Any] | None = None
    quantization: Quantization = "none"
    no_media: dict[Kind, str] = field(default_factory=lambda: dict.fromkeys(KINDS, "it drafts"))
    unasked: bool = False
    rope_limit: RopeLimit | None = None
    rope_note: str = ""
    head: Any = None
    ranking: RerankPrompt | None = None
    draft_head: HeadPlan | None = None
    embedder: Embedder = field(default_factory=Embedder)
    latents: bool = False

    @property
    def media(self) -> bool:
        """Whether the model is to take images, audio or videos."""
        return not all(self.no_media.values())

    @property
    def all_weight_bytes(self) -> int:
        """Those of what drafts included."""
        return self.weight_bytes + sum(each.weight_bytes for each in (self.draft, self.draft_head) if each is not None)


def plan_of(
    config: EngineConfig,
    current: LoadedModel | None,
    checkpoint: Any,
    device: torch.device,
    dtype: torch.dtype,
    selecting: Future[Any],
) -> LoadPlan:
    """A load, if all is well.

    Args:
        config: What is wanted.
        current: The model that is loaded.
        checkpoint: An `asyncengine.model.checkpoint.Checkpoint`.
        device: Where.
        dtype: Of weights and activations.
        selecting: Comes to what attends.

    Raises:
        AsyncEngineError: It cannot be loaded; the kind says why.
    """
    tokenizer_path = tokenizer_path_of(config, checkpoint)
    refused, latents = refusals(config, checkpoint), keeps_latents(config)
    if not all(refused.values()):
        check_processors(checkpoint.path)
    # A head is tried in every load.
    alone = all(refused.values()) and not checkpoint.classifies and not config.mla
    findings_at = place_of(config, checkpoint, device, dtype) if alone else None
    findings = recall(findings_at)
    if findings is not None and selecting.result().backend.name != "cpu":
        findings = None
    stated = _stated(config, checkpoint) if findings is None else _found(findings)
    no_media = _no_media(config, refused, stated.hf_config)
    kv_dtype = KV_DTYPES.get(config.kv_cache_dtype, dtype)
    for path in config.adapters.values():
        lora.check_there(path, checkpoint.shapes)
    draft = None
    for name in config.additional_models if config.speculative_mode == "small_draft" else ():
        draft = check_draft(name, checkpoint, stated.vocab_size, device, dtype, kv_dtype, config.quantization)
        draft = dataclasses.replace(draft, latents=latents)
    max_length, rope_note = _length(config, stated, draft)
    watched = drafting = None
    if findings is None:
        rope_limits.settle(stated.hf_config, max_length)
        watched = watch(stated.hf_config, not all(no_media.values()), latents)
        check_latents(config, None if watched is None else watched.attention.values())
    if draft is not None:
        rope_limits.settle(draft.hf_config, max_length)
        drafting = watch(draft.hf_config, latents=latents)
        draft = dataclasses.replace(draft, max_length=max_length, watched=drafting)
    check_recurrent(config, bool(watched and watched.recurrent), bool(drafting and drafting.recurrent))
    draft_head = check_head(config, checkpoint, stated.hf_config, dtype, max_length)
    if current is not None or findings is not None or not serves_all(config, device):
        backend = selecting.result().backend
        check_kv_dtype(config, backend, kv_dtype, device)
        for each in (watched, drafting):
            check_layers(config, backend, None if each is None else each.attention, kv_dtype, device)
        check_layers(config, backend, None if draft_head is None else draft_head.specs, kv_dtype, device)
    check_quantization(config, device, dtype)
    details = Details(
        checkpoint=checkpoint,
        tokenizer_path=tokenizer_path,
        hf_config=stated.hf_config,
        vocab_size=stated.vocab_size,
        device=device,
        dtype=dtype,
        weight_bytes=checkpoint.weight_bytes(dtype, checkpoint.kept_forms(config.quantization, device.type)),
        max_length=max_length,
        present_tokenizer=None if current is None else current.tokenizer,
        kv_dtype=kv_dtype,
        draft=draft,
        watched=watched,
        findings=findings,
        findings_at=findings_at,
        selecting=selecting,
        quantization=config.quantization,
        no_media=no_media,
        rope_limit=stated.rope_limit,
        rope_note=rope_note,
        head=stated.head,
        ranking=ranking_of(checkpoint.path),
        draft_head=draft_head,
        embedder=embedder_of(checkpoint.path),
        latents=latents,
    )
    return _planned(config, details, current)


def tokenizer_path_of(config: EngineConfig, checkpoint: Any) -> Path:
    """Where a model's tokenizer is: with the checkpoint, unless another is named.

    Raises:
        CheckpointError: There is none where it is named, or its settings are damaged.
    """
    from asyncengine.model.checkpoint import tokenizer_key
    from asyncengine.model.gguf.checkpoint import described
    from asyncengine.model.location import locate

    path: Path = checkpoint.path if config.tokenizer is None else described(locate(config.tokenizer))
    if config.tokenizer is not None and tokenizer_key(path) is None:
        raise CheckpointError(f"tokenizer {config.tokenizer!r}: there are no tokenizer files")
    check_settings(path)
    return path


@dataclass(frozen=True, slots=True)
class _Stated:
    """What a configuration says of a model. Attributes as in `Details`.

    Attributes:
        longest: Most tokens in one sequence, as far as the model goes.
    """

    hf_config: Any
    head: Any
    vocab_size: int
    longest: int
    rope_limit: RopeLimit | None


def _stated(config: EngineConfig, checkpoint: Any) -> _Stated:
    from asyncengine.model import architecture, classification

    hf_config = architecture.read_config(checkpoint)
    head = classification.head_of(checkpoint, hf_config)
    text = text_config(hf_config)
    longest = longest_of(text, config)
    return _Stated(hf_config, head, text.vocab_size, longest, rope_limits.limit_of(hf_config, longest))


def _found(findings: Findings) -> _Stated:
    """The same by an earlier load, for which transformers reads nothing."""
    about = findings.description
    limit = None if (known := about["rope_limit"]) is None else RopeLimit(*known)
    return _Stated(None, None, about["vocab_size"], about["longest"], limit)


def _no_media(config: EngineConfig, refused: dict[Kind, str], hf_config: Any) -> dict[Kind, str]:
    """`Details.no_media`, where `refused` says what is not to be asked of the model.

    Raises:
        UnsupportedModelError: It takes none of a kind that is wanted.
    """
    no_media = refused
    if hf_config is not None:
        from asyncengine.model import architecture

        no_media = {kind: reason or architecture.no_media(hf_config, kind) for kind, reason in refused.items()}
    for kind, reason in no_media.items():
        if reason and wanted(kind, config):
            raise UnsupportedModelError(f"{PLURALS[kind]} is True; {config.model!r} takes none: {reason}")
    return no_media


def _length(config: EngineConfig, stated: _Stated, draft: Details | None) -> tuple[int, str]:
    """Most tokens in one sequence of a model and what drafts for it; and `Details.rope_note`.

    Raises:
        ConfigError: More are wanted than they go.
    """
    longest, limits = stated.longest, [stated.rope_limit]
    if draft is not None:
        longest = min(longest, draft.max_length)
        limits.append(rope_limits.limit_of(draft.hf_config, draft.max_length))
    max_length, rope_note = rope_limits.length_for(config.max_single_sequence_length, longest, limits)
    if max_length > longest:
        whose = "the model's" if draft is None else "the model's or its draft model's"
        raise ConfigError(
            f"max_single_sequence_length is {max_length}; {whose} max_position_embeddings allows 1..{longest}"
        )
    return max_length, rope_note


def _planned(config: EngineConfig, details: Details, current: LoadedModel | None) -> LoadPlan:
    """A load that fits; where it does only without the present model, it is rehearsed before that goes."""
    from asyncengine.model.checkpoint import tokenizer_key

    selecting = details.selecting
    assert selecting is not None
    try:
        beside = fits(details, current)
    except InsufficientMemoryError:
        if selecting.done():
            raise
        wait([selecting])  # a compiler takes memory as well, and gives it back
        beside = fits(details, current)
    if not beside:  # else a load that fails takes nothing from anyone
        from asyncengine.model.media.trials import check_wanted
        from asyncengine.model.rehearsal import rehearse

        rehearse(details)
        details = with_tokenizer(details)
        check_wanted(config, details)
    return LoadPlan(config, beside, tokenizer_key(details.tokenizer_path), details)


def with_tokenizer(details: D) -> D:
    """A load whose tokenizer is there, which may be what is wrong with it. Of pure Python, it is made again.

    Raises:
        CheckpointError: It cannot be loaded.
    """
    tokenizer = load_tokenizer(details.tokenizer_path, details.present_tokenizer)
    return dataclasses.replace(details, present_tokenizer=tokenizer or details.present_tokenizer)


def vector_size(details: Details, hidden_size: int | None) -> int | None:
    """Numbers in an embedding; None if the model gives out no hidden states.

    Raises:
        CheckpointError: The layers behind the pooling are for hidden states of another size.
    """
    size = hidden_size
    for layer in details.embedder.dense if size is not None else ():
        outputs, inputs = layer.weight.shape
        if inputs != size:
            name = details.checkpoint.name
            raise CheckpointError(f"{name}: a layer behind the pooling takes {inputs} numbers; it gets {size}")
        size = outputs
    return size


def is_known(config: EngineConfig) -> bool:
    """Whether a load has something to go by that an earlier one found out: it imports no models of transformers' then.

    Raises:
        AsyncEngineError: The checkpoint or the device is not there.
    """
    from asyncengine.model.gguf.checkpoint import checkpoint_at
    from asyncengine.model.location import locate

    checkpoint = checkpoint_at(locate(config.model))
    if config.attention_backend not in ("auto", "cpu"):
        return False
    device = device_of(config.device)
    config = settled(config, checkpoint, device)
    try:
        place = place_of(config, checkpoint, device, dtype_of(config, checkpoint))
        return place is not None and place.exists()
    except OSError:  # the load will say what is wrong
        return False


def check_draft(
    name: str,
    target: Any,
    vocab_size: int,
    device: torch.device,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    quantization: Quantization = "none",
) -> Details:
    """A draft model, whose tokens must be the target's. Its longest sequence is its own."""
    from asyncengine.model import architecture
    from asyncengine.model.checkpoint import same_vocabulary
    from asyncengine.model.gguf.checkpoint import checkpoint_at
    from asyncengine.model.location import locate

    checkpoint = checkpoint_at(locate(name))
    hf_config = architecture.read_config(checkpoint)
    text = text_config(hf_config)
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
    longest = getattr(text, "max_position_embeddings", None) or DEFAULT_LONGEST
    weights = checkpoint.weight_bytes(dtype, checkpoint.kept_forms(quantization, device.type))
    return Details(
        checkpoint=checkpoint,
        tokenizer_path=checkpoint.path,
        hf_config=hf_config,
        vocab_size=vocab_size,
        device=device,
        dtype=dtype,
        weight_bytes=weights,
        max_length=longest,
        present_tokenizer=None,
        kv_dtype=kv_dtype,
        quantization=quantization,
    )


def check_drafts(draft: Details, has_head: bool) -> None:
    """Refuses a draft model that has no head.

    Raises:
        CheckpointError: So it is.
    """
    if not has_head:
        raise CheckpointError(f"{draft.checkpoint.path} cannot draft: it has no language-model head")


def without_findings(details: Details) -> Details:
    """The same load, with what is known of the configuration alone: what an earlier one had kept does not hold.

    Raises:
        UnsupportedModelError: It cannot be served, as it turns out.
    """
    from asyncengine.model import architecture

    hf_config = architecture.read_config(details.checkpoint)
    rope_limits.settle(hf_config, details.max_length)
    watched = watch(hf_config, details.media, details.latents)
    return dataclasses.replace(details, hf_config=hf_config, watched=watched, findings=None)


def fits(details: Details, current: LoadedModel | None) -> bool:
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


def _arithmetic(details: Details, free: int, held: int) -> str:
    text = (
        f"{details.checkpoint.name} does not fit on {details.device}: weights {details.all_weight_bytes / GIB:.2f} GiB "
        f"in {details.dtype} + {SLACK / GIB:.2f} GiB for everything else > {free / GIB:.2f} GiB free"
    )
    text += f" + {held / GIB:.2f} GiB of the present model" if held else ""
    kept = details.checkpoint.kept_forms(details.quantization, details.device.type)
    forms = {weight.form for weight in details.checkpoint.coded.values()} - {"none", *kept}
    if details.device.type != "cpu":
        forms -= {"int8"}
    return text + "".join(f"; quantization {form!r} keeps the checkpoint's codes" for form in sorted(forms))
