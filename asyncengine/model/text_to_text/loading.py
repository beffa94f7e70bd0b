"""Loads models that write one text of another. Runs on threads of its own; what it returns goes to the step thread."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import transformers
from transformers import AutoModelForSeq2SeqLM

from asyncengine.config import EngineConfig
from asyncengine.errors import CheckpointError, UnsupportedModelError
from asyncengine.media import KINDS, PLURALS
from asyncengine.model.checkpoint import sampling_of
from asyncengine.model.encoder_decoder import details as shared
from asyncengine.model.encoder_decoder.details import Ends, SourceDetails, check_config
from asyncengine.model.encoder_decoder.loading import (
    backends_of,
    eos_token_ids,
    generation_of,
    limits_of,
    memory_bytes,
    planned,
    stepped,
)
from asyncengine.model.encoder_decoder.trial import Trial
from asyncengine.model.load_settings import longest_of
from asyncengine.model.media.refusals import wanted
from asyncengine.model.plain_loads import loading, stated_config
from asyncengine.model.text_to_text.decoder import shape_of, stepping, take_steps
from asyncengine.model.text_to_text.languages import Languages
from asyncengine.model.text_to_text.reader import Beginning, Sizes, TextReader
from asyncengine.model.text_to_text.rules import Rules, notes_of
from asyncengine.model.tokenizer import keep_for_next_load, load_tokenizer, own_of
from asyncengine.step.model import LoadedModel, LoadPlan
from asyncengine.tokenizer import Tokenizer, WritingTokenizer

_DOES = "writes one text of another"
_NO_MEDIA = "it reads texts"
_OTHERS = ("Classification", "QuestionAnswering", "EncoderModel")


def plan_of(
    config: EngineConfig, current: LoadedModel | None, checkpoint: Any, device: torch.device, dtype: torch.dtype
) -> LoadPlan:
    """A load, if all is well; arguments as those of `asyncengine.model.load_check.plan_of`.

    Raises:
        AsyncEngineError: It cannot be loaded; the kind says why.
    """
    details = details_of(config, current, checkpoint, device, dtype)
    _stated(details)
    return planned(config, details, current)


def details_of(
    config: EngineConfig, current: LoadedModel | None, checkpoint: Any, device: torch.device, dtype: torch.dtype
) -> SourceDetails:
    """The same without a look at the memory that there is."""
    check_config(config, _DOES)
    for kind in KINDS:
        if wanted(kind, config):
            raise UnsupportedModelError(f"{PLURALS[kind]} is True; {config.model!r} takes none: {_NO_MEDIA}")
    if config.mla:
        raise UnsupportedModelError(f"mla is True; {config.model!r} has no multi-head latent attention")
    hf_config = stated_config(checkpoint, f"a {checkpoint.config['model_type']}")
    named = str((hf_config.architectures or [""])[0])
    if named.endswith(_OTHERS):
        raise UnsupportedModelError(f"{checkpoint.name} is a {named}, which writes no texts; it cannot be served")
    kind = AutoModelForSeq2SeqLM._model_mapping[type(hf_config)]
    if not kind._supports_sdpa:  # T5, before it had transformers' attention interface
        raise UnsupportedModelError(
            f"{checkpoint.name} is a {kind.__name__}, which attends in code of its own in transformers "
            f"{transformers.__version__}; a later one has it attend through its interface"
        )
    positions = longest_of(hf_config, config)
    written = positions - _behind_padding(hf_config)
    shares = getattr(hf_config, "share_encoder_decoder_embeddings", True)
    return shared.details_of(
        config,
        current,
        checkpoint,
        device,
        dtype,
        hf_config=hf_config,
        ends=Ends(positions, written, False, "a source"),
        shape=shape_of(hf_config, written),
        vocab_size=int(hf_config.vocab_size if shares else hf_config.decoder_vocab_size),
        kind=stepping(kind),
    )


def load(plan: LoadPlan) -> LoadedModel:
    """The model that was planned.

    Raises:
        ReloadError: It failed; nothing is left behind.
    """
    details, config = plan.details, plan.config
    assert isinstance(details, SourceDetails)
    with loading(config, details.checkpoint) as made:
        tokenizer = load_tokenizer(details.tokenizer_path, details.present_tokenizer)
        assert tokenizer is not None
        keep_for_next_load(tokenizer)
        stated = _stated(details)
        backends, slower = backends_of(config, details)
        trial = Trial(details, backends, details.hf_config.pad_token_id, take_steps)
        model, said = trial.run(made)
        limits, complete = limits_of(config, details, backends[0], plan.tokenizer_key is not None, False)
        defaults = sampling_of(stated.generation.to_dict())
        if not stated.generation.do_sample:  # transformers is greedy where nothing is said
            defaults = defaults.replace(temperature=0.0)
        return LoadedModel(
            model=stepped(model, details, backends, limits, "text", ("input_ids",)),
            limits=limits,
            config=complete,
            vocab_size=details.vocab_size,
            eos_token_ids=eos_token_ids(details),
            default_generation_config=defaults,
            tokenizer=tokenizer,
            tokenizer_key=plan.tokenizer_key,
            memory_bytes=memory_bytes(model, details, limits, backends[0]),
            notes=(*slower, *said, *notes_of(stated.generation)),
            source_reader=_reader(details, stated, tokenizer),
            no_media=dict.fromkeys(KINDS, _NO_MEDIA),
        )


def _behind_padding(hf_config: Any) -> int:
    """How many rows of its table of positions a decoder has no use for: one model's begin behind that of padding."""
    return max((hf_config.pad_token_id or 0) - 1, 0) if hf_config.model_type == "m2m_100" else 0


@dataclass(frozen=True, slots=True)
class _Stated:
    """What a checkpoint says of generating.

    Attributes:
        generation: transformers' ``GenerationConfig``.
        begins: How its decoder begins.
        rules: What may not be written.
    """

    generation: Any
    begins: Beginning
    rules: Rules


def _stated(details: SourceDetails) -> _Stated:
    """As the checkpoint says.

    Raises:
        CheckpointError: It is not said what the decoder begins with, or something of it is no such thing.
    """
    generation, hf_config, name = generation_of(details), details.hf_config, details.checkpoint.name
    of_config = getattr(hf_config, "decoder_start_token_id", None)
    said = (generation.decoder_start_token_id, of_config, generation.bos_token_id)
    start = next((each[0] if isinstance(each, list) and each else each for each in said if each is not None), None)
    forced = generation.forced_bos_token_id
    last = details.vocab_size - 1
    if start is None or not _is_token(start, details):
        raise CheckpointError(f"{name}: decoder_start_token_id is {start!r:.80}; expected what its decoder begins with")
    if forced is not None and not _is_token(forced, details):
        raise CheckpointError(
            f"{name}: forced_bos_token_id is {forced!r:.80}; expected a token id in 0..{last}, or null"
        )
    try:
        rules = Rules(generation, eos_token_ids(details), details.vocab_size)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{name}: what it says of generating cannot be read: {error}") from error
    return _Stated(generation, Beginning(start, forced), rules)


def _is_token(given: Any, details: SourceDetails) -> bool:
    return isinstance(given, int) and not isinstance(given, bool) and 0 <= given < details.vocab_size


def _reader(details: SourceDetails, stated: _Stated, tokenizer: Tokenizer) -> TextReader:
    """What reads sources."""
    vocabulary = int(details.hf_config.vocab_size)
    sizes = Sizes(details.sources, details.written, details.page_size, vocabulary, details.vocab_size)
    key = f"{details.checkpoint.media_key} {sizes} {stated.begins}"
    languages = Languages.of(own_of(tokenizer))
    return TextReader(key, cast("WritingTokenizer", tokenizer), languages, stated.begins, stated.rules, sizes)
