"""Loads encoders: what can be known before, and the model with its limits. Runs on threads of its own."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, AutoModelForSequenceClassification

from asyncengine.classifier import Classifier
from asyncengine.config import EngineConfig
from asyncengine.errors import ConfigError, UnsupportedModelError
from asyncengine.media import KINDS, PLURALS
from asyncengine.model.building import BUILDING
from asyncengine.model.checkpoint import tokenizer_key
from asyncengine.model.classification import activation_of, labels_of
from asyncengine.model.encoders.model import EncoderModel
from asyncengine.model.encoders.packing import Packing, UnpackableError
from asyncengine.model.load_check import Details, fits, tokenizer_path_of, vector_size, with_tokenizer
from asyncengine.model.load_settings import DEFAULT_LONGEST, sequences_of
from asyncengine.model.media.refusals import wanted
from asyncengine.model.plain_loads import loading, rehearse, stated_config, with_weights
from asyncengine.model.sentence_modules import embedder_of
from asyncengine.model.text_files import json_in
from asyncengine.model.tokenizer import keep_for_next_load, load_tokenizer, special_ids
from asyncengine.step.limits import Limits
from asyncengine.step.model import LoadedModel, LoadPlan

CPU_CHUNK, CUDA_CHUNK = 1024, 8192
"""Tokens of prompts in a step, where the configuration leaves that open."""
_PAGE = 16
_TRIAL = (11, 7, 7, 2)
"""Tokens of the prompts by which it is seen whether a model says the same of them together."""
_SHORT = 1024
"""Tokens of a longest prompt that is tried as well."""
_OF_CACHES = (
    "kv_cache_page_size", "max_total_sequence_length", "gpu_memory_utilization", "prefix_cache_mode",
    "prefix_cache_max_num_recycling_seqs",
)  # fmt: skip
"""Settings that say nothing to an encoder."""
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""How far that may be off, in parts of what the numbers vary by."""


@dataclass(frozen=True, slots=True)
class EncoderDetails(Details):
    """What a load needs to know of an encoder.

    Attributes:
        kind: Transformers' class for it.
        classifies: Whether that has a classification head.
        first_position: That of a prompt's first token.
    """

    kind: Any = None
    classifies: bool = False
    first_position: int = 0

    @property
    def takes_types(self) -> bool:
        """Whether the model tells tokens of two texts apart."""
        types = getattr(self.hf_config, "type_vocab_size", 2)
        return "token_type_ids" in inspect.signature(self.kind.forward).parameters and (types is None or types > 1)


def plan_of(
    config: EngineConfig, current: LoadedModel | None, checkpoint: Any, device: torch.device, dtype: torch.dtype
) -> LoadPlan:
    """A load, if all is well; arguments as those of `asyncengine.model.load_check.plan_of`.

    Raises:
        AsyncEngineError: It cannot be loaded; the kind says why.
    """
    details = details_of(config, current, checkpoint, device, dtype)
    beside = fits(details, current)
    if not beside:
        rehearse(details, details.kind, **_arguments(details))
        details = with_tokenizer(details)
    return LoadPlan(config, beside, tokenizer_key(details.tokenizer_path), details)


def details_of(
    config: EngineConfig, current: LoadedModel | None, checkpoint: Any, device: torch.device, dtype: torch.dtype
) -> EncoderDetails:
    """The same without a look at the memory that there is."""
    _check_config(config)
    hf_config = stated_config(checkpoint, "an encoder")
    tokenizer_path = tokenizer_path_of(config, checkpoint)
    classifies = checkpoint.classifies
    mapping = (AutoModelForSequenceClassification if classifies else AutoModel)._model_mapping
    if type(hf_config) not in mapping:
        what = "with a classification head " if classifies else ""
        raise UnsupportedModelError(f"transformers has no model {what}of type {hf_config.model_type!r}")
    kind = mapping[type(hf_config)]
    if isinstance(kind, tuple):
        named = checkpoint.config.get("architectures") or ()
        kind = next((each for each in kind if each.__name__ in named), kind[0])
    if getattr(hf_config, "attention_type", None) == "block_sparse":
        raise UnsupportedModelError(
            f"{checkpoint.name} attends to blocks at random; an attention_type of 'original_full' can be served"
        )
    first_position, longest = _positions(kind, hf_config)
    stated = _stated_longest(checkpoint)
    length = config.max_single_sequence_length or min(longest, stated or longest)
    if length > longest:
        raise ConfigError(f"max_single_sequence_length is {length}; the model's positions allow 1..{longest}")
    details = EncoderDetails(
        checkpoint,
        tokenizer_path,
        hf_config,
        hf_config.vocab_size,
        device,
        dtype,
        checkpoint.weight_bytes(dtype),
        length,
        None if current is None else current.tokenizer,
        dtype,
        embedder=embedder_of(checkpoint.path),
        kind=kind,
        classifies=classifies,
        first_position=first_position,
    )
    if not classifies:
        vector_size(details, hf_config.hidden_size)
    return details


def load(plan: LoadPlan) -> LoadedModel:
    """The model that was planned.

    Raises:
        ReloadError: It failed; nothing is left behind.
    """
    details, config = plan.details, plan.config
    assert isinstance(details, EncoderDetails)
    with loading(config, details.checkpoint) as made:
        made.append(model := with_weights(details, details.kind, **_arguments(details)))
        tokenizer = load_tokenizer(details.tokenizer_path, details.present_tokenizer)
        keep_for_next_load(tokenizer)
        trial = _Trial(model, details, special_ids(tokenizer))
        packing = trial.packing()
        padding = trial.padding() if packing is None else None
        hidden_size = None if details.classifies else vector_size(details, details.hf_config.hidden_size)
    limits, complete = _limits(config, details, plan.tokenizer_key is not None)
    hf_config = details.hf_config
    classifier = None
    if details.classifies:
        labels = labels_of(hf_config, hf_config.num_labels)
        classifier = Classifier(None, None, labels, activation_of(hf_config, len(labels)))
    alone = packing is None and padding is None
    notes = ["encoder: padding changes what it says: prompts of one length at a time"] * alone
    notes += _passed_over(config, complete)
    return LoadedModel(
        model=EncoderModel(model, details.device, padding, packing, details.takes_types),
        limits=limits,
        config=complete,
        vocab_size=details.vocab_size,
        eos_token_ids=(),
        default_generation_config=details.checkpoint.generation_defaults,
        tokenizer=tokenizer,
        tokenizer_key=plan.tokenizer_key,
        memory_bytes=sum(each.nbytes for each in (*model.parameters(), *model.buffers())),
        notes=tuple(notes),
        hidden_size=hidden_size,
        pooling=details.embedder.pooling,
        dense=details.embedder.dense,
        embedding_prompts=details.embedder.prompts,
        has_head=False,
        takes_pairs=tokenizer is not None,
        classifier=classifier,
        no_media=dict.fromkeys(KINDS, "it is an encoder of texts"),
    )


def _check_config(config: EngineConfig) -> None:
    """Refuses what an encoder has no use for."""
    usual = EngineConfig(config.model)
    for name in ("speculative_mode", "additional_models", "adapters", "kv_cache_dtype", "attention_backend"):
        if (given := getattr(config, name)) != getattr(usual, name):
            raise ConfigError(f"{name} is {given!r}; {config.model!r} is an encoder: leave it out")
    if config.quantization not in ("auto", "none"):
        raise ConfigError(f"quantization is {config.quantization!r}; {config.model!r} is an encoder; allowed: 'none'")
    if config.decoder_backend == "compiled":
        raise ConfigError(f"decoder_backend is 'compiled'; {config.model!r} is an encoder; allowed: 'auto'")
    for kind in KINDS:
        if wanted(kind, config):
            raise UnsupportedModelError(
                f"{PLURALS[kind]} is True; {config.model!r} takes none: it is an encoder of texts"
            )
    if config.mla:
        raise UnsupportedModelError(f"mla is True; {config.model!r} has no KV cache: it is an encoder of texts")


def _passed_over(config: EngineConfig, complete: EngineConfig) -> list[str]:
    """What is said of settings of a KV cache, which are not refused: one configuration may be for both kinds."""
    usual, meant = EngineConfig(config.model), complete.replace(gpu_memory_utilization=None)
    given = [name for name in _OF_CACHES if getattr(config, name) not in (getattr(usual, name), getattr(meant, name))]
    return [f"encoder: there is no KV cache; passed over: {', '.join(given)}"] if given else []


def _positions(kind: Any, hf_config: Any) -> tuple[int, int]:
    """The first position of a prompt, and how many there are: some models leave out those up to that of padding."""
    with BUILDING, torch.device("meta"):
        model = kind._from_config(hf_config)
    tables = [
        (0 if module.padding_idx is None else module.padding_idx + 1, len(module.weight))
        for name, module in model.named_modules()
        if name.endswith("position_embeddings") and hasattr(module, "padding_idx") and module.weight.dim() == 2
    ]
    stated = getattr(hf_config, "max_position_embeddings", None)
    counts = [count - first for first, count in tables] + ([int(stated)] if stated and stated > 0 else [])
    return max((first for first, _ in tables), default=0), min(counts, default=DEFAULT_LONGEST)


def _stated_longest(checkpoint: Any) -> int | None:
    """How long prompts may be by the files of Sentence Transformers, if they say so."""
    stated = json_in(checkpoint.path / "sentence_bert_config.json", {}).get("max_seq_length")
    return stated if type(stated) is int and stated > 0 else None


def _arguments(details: EncoderDetails) -> dict[str, Any]:
    """Further ones of `from_pretrained`."""
    # What makes one vector of a text behind the last layer is trained for other things than embeddings.
    unpooled = not details.classifies and "add_pooling_layer" in inspect.signature(details.kind.__init__).parameters
    return {"add_pooling_layer": False} if unpooled else {}


class _Trial:
    """What a model says of some prompts, one at a time, and whether it says the same of them together.

    Args:
        model: With its weights.
        details: Of the load.
        special: Token ids that mean something to some models: masks, padding, separators.

    Raises:
        UnsupportedModelError: What it says is not what an encoder says.
    """

    def __init__(self, model: Any, details: EncoderDetails, special: Sequence[int]) -> None:
        self._model, self._details = model, details
        given = getattr(details.hf_config, "pad_token_id", None)
        self._padding = given if isinstance(given, int) and 0 <= given < details.vocab_size else 0
        usable = np.delete(np.arange(details.vocab_size), self._padding)
        window = vars(details.hf_config).get("sliding_window") or 0
        lengths = [min(length, details.max_length) for length in (*_TRIAL, 2 * window + 2)]  # one reaches beyond it
        self._prompts = [usable[np.arange(length) * 7 % len(usable)].astype(np.int32) for length in lengths]
        odd = [each for each in (*special, self._padding) if 0 <= each < details.vocab_size][: details.max_length - 2]
        self._prompts.append(np.array([int(usable[-1]), *odd, int(usable[-2])], dtype=np.int32))
        padded = EncoderModel(model, details.device, self._padding)
        self._alone = [padded.outputs([prompt])[0].float() for prompt in self._prompts]
        if details.max_length <= _SHORT:  # positions may be counted in a way that nobody here knows
            try:
                padded.outputs([np.full(details.max_length, usable[0], dtype=np.int32)])
            except IndexError as error:
                name, most = details.checkpoint.name, details.max_length
                raise UnsupportedModelError(
                    f"{name} fails over {most} tokens, which its positions seem to allow: ask for fewer by "
                    "max_single_sequence_length"
                ) from error
        width = details.hf_config.num_labels if details.classifies else details.hf_config.hidden_size
        for prompt, output in zip(self._prompts, self._alone, strict=True):
            if output.shape != ((width,) if details.classifies else (len(prompt), width)):
                name = details.checkpoint.name
                raise UnsupportedModelError(f"{name} gives out {tuple(output.shape)} for a prompt of {len(prompt)}")

    def packing(self) -> Packing | None:
        """What runs the model over prompts in one row; None if it does not say the same then."""
        if self._details.classifies:  # what is behind the last layer looks at the first token of a row
            return None
        try:
            details = self._details
            packing = Packing(self._model, details.device, details.first_position, details.takes_types)
        except UnpackableError:
            return None
        with contextlib.suppress(UnpackableError, RuntimeError, IndexError), torch.inference_mode():
            if self._same(packing.run(self._prompts, None)):
                return packing
        packing.undo()
        return None

    def padding(self) -> int | None:
        """The token that prompts are padded with; None if that changes what the model says of them."""
        rows = list(range(len(self._prompts)))
        tried = EncoderModel(self._model, self._details.device, self._padding)
        with torch.inference_mode():
            together: Sequence[torch.Tensor] = list(tried.padded(rows, self._prompts, None))
        if not self._details.classifies:
            together = [each[: len(prompt)] for each, prompt in zip(together, self._prompts, strict=True)]
        return self._padding if self._same(together) else None

    def _same(self, found: Sequence[torch.Tensor]) -> bool:
        """Whether it is, but for rounding: measured by how much the numbers differ from one token to another."""
        alone, together = _rows(self._alone), _rows(found)
        spread = (alone - alone.mean(dim=0)).norm()
        return bool((together - alone).norm() <= _TOLERANCE[self._details.dtype] * spread)


def _rows(outputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """All of them, one below the other, (rows, width)."""
    return torch.cat([each.float().view(-1, each.shape[-1]) for each in outputs])


def _limits(config: EngineConfig, details: EncoderDetails, has_tokenizer: bool) -> tuple[Limits, EngineConfig]:
    """What the model can take: there is no cache, so every sequence has room for the longest prompt."""
    sequences = sequences_of(config, details.device)
    chunk = config.prefill_chunk_size or (CUDA_CHUNK if details.device.type == "cuda" else CPU_CHUNK)
    blocks = sequences * (-(-details.max_length // _PAGE) + 1)
    limits = Limits(
        max_num_sequence=sequences,
        max_single_sequence_length=details.max_length,
        prefill_chunk_size=chunk,
        page_size=_PAGE,
        num_blocks=blocks,
        prefix_cache=False,
        whole_prompts=True,
    )
    complete = config.replace(
        tokenizer=config.tokenizer or (config.model if has_tokenizer else None),
        device=str(details.device),
        dtype=str(details.dtype).removeprefix("torch."),
        max_num_sequence=sequences,
        max_total_sequence_length=blocks * _PAGE,
        max_single_sequence_length=details.max_length,
        prefill_chunk_size=chunk,
        kv_cache_page_size=_PAGE,
        prefix_cache_mode="disable",
        prefix_cache_max_num_recycling_seqs=None,
        quantization="none",
        decoder_backend="transformers",
        images=False,
        audio=False,
    )
    return limits, complete
