"""Loads models that write down what they hear. Runs on threads of its own; what it returns goes to the step thread."""

from __future__ import annotations

from typing import Any, cast

import torch
from transformers import GenerationConfig, WhisperFeatureExtractor

from asyncengine.config import EngineConfig
from asyncengine.errors import CheckpointError, ConfigError, UnsupportedModelError
from asyncengine.model.encoder_decoder import details as shared
from asyncengine.model.encoder_decoder.details import Ends, Shape, SourceDetails, check_config
from asyncengine.model.encoder_decoder.loading import (
    backends_of,
    eos_token_ids,
    generation_of,
    limits_of,
    memory_bytes,
    planned,
    stepped,
)
from asyncengine.model.encoder_decoder.parting import filled
from asyncengine.model.encoder_decoder.trial import Trial
from asyncengine.model.plain_loads import loading, stated_config
from asyncengine.model.speech.alignment import alignment_heads
from asyncengine.model.speech.decoder import SpeechDecoder, spec_of
from asyncengine.model.speech.reader import SpeechReader
from asyncengine.model.speech.transcription import Hearing, WhisperTranscription
from asyncengine.model.text_files import check_processors
from asyncengine.model.tokenizer import keep_for_next_load, load_tokenizer
from asyncengine.step.model import LoadedModel, LoadPlan
from asyncengine.tokenizer import Tokenizer, WritingTokenizer


def plan_of(
    config: EngineConfig, current: LoadedModel | None, checkpoint: Any, device: torch.device, dtype: torch.dtype
) -> LoadPlan:
    """A load, if all is well; arguments as those of `asyncengine.model.load_check.plan_of`.

    Raises:
        AsyncEngineError: It cannot be loaded; the kind says why.
    """
    return planned(config, details_of(config, current, checkpoint, device, dtype), current)


def details_of(
    config: EngineConfig, current: LoadedModel | None, checkpoint: Any, device: torch.device, dtype: torch.dtype
) -> SourceDetails:
    """The same without a look at the memory that there is."""
    _check_config(config)
    hf_config = stated_config(checkpoint, f"a {checkpoint.config['model_type']}")
    if any(str(named).endswith("Classification") for named in hf_config.architectures or ()):
        raise UnsupportedModelError(f"{checkpoint.name} is a classifier of audio, which cannot be served")
    if (
        not (checkpoint.path / "preprocessor_config.json").exists()
        and not (checkpoint.path / "processor_config.json").exists()
    ):
        raise CheckpointError(f"{checkpoint.name} has no preprocessor_config.json, which says what it hears")
    check_processors(checkpoint.path)
    return shared.details_of(
        config,
        current,
        checkpoint,
        device,
        dtype,
        hf_config=hf_config,
        ends=Ends(hf_config.max_source_positions, hf_config.max_target_positions, True, "an audio"),
        shape=Shape(spec_of(hf_config), hf_config.decoder_layers, hf_config.encoder_ffn_dim),
        vocab_size=hf_config.vocab_size,
        kind=SpeechDecoder,
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
        backends, notes = backends_of(config, details)
        # It has them take what they take beside the KV cache, too.
        model, said = Trial(details, backends).run(made)
        generation = generation_of(details)
        heads, no_words = alignment_heads(generation, details.hf_config)
        limits, complete = limits_of(config, details, backends[0], plan.tokenizer_key is not None, True, heads)
        reader, refused = _reader(details, tokenizer, generation, no_words)
        return LoadedModel(
            model=stepped(model, details, backends, limits, "audio", ("input_features",), heads),
            limits=limits,
            config=complete,
            vocab_size=details.vocab_size,
            eos_token_ids=eos_token_ids(details),
            default_generation_config=details.checkpoint.generation_defaults,
            tokenizer=tokenizer,
            tokenizer_key=plan.tokenizer_key,
            memory_bytes=memory_bytes(model, details, limits, backends[0]),
            notes=(*notes, *said, *refused),
            media_reader=reader,
            begins_with_audio=True,
            aligns=bool(heads),
            no_media={"image": "it hears", "audio": ""},
        )


def _check_config(config: EngineConfig) -> None:
    """Refuses what there is nothing for."""
    check_config(config, "transcribes audio")
    if config.images:
        raise UnsupportedModelError(f"images is True; {config.model!r} takes none: it hears")
    if config.audio is False:
        raise ConfigError(f"audio is False; {config.model!r} takes nothing else")
    if config.mla:
        raise UnsupportedModelError(f"mla is True; {config.model!r} has no multi-head latent attention")


def _reader(
    details: SourceDetails, tokenizer: Tokenizer, generation: GenerationConfig, no_words: str
) -> tuple[SpeechReader, list[str]]:
    """What reads audio, and what there is to be said of it, in words."""
    path, config = details.checkpoint.path, details.hf_config
    try:
        extractor = WhisperFeatureExtractor.from_pretrained(path, local_files_only=True)
    except Exception as error:
        raise CheckpointError(f"{details.checkpoint.name}: its feature extractor cannot be loaded: {error}") from error
    rate, samples = int(extractor.sampling_rate), int(extractor.n_samples)
    if extractor.nb_max_frames != 2 * config.max_source_positions or extractor.feature_size != config.num_mel_bins:
        raise CheckpointError(
            f"{details.checkpoint.name}: its feature extractor makes {extractor.nb_max_frames} frames of "
            f"{extractor.feature_size} mel bins; its encoder takes {2 * config.max_source_positions} of "
            f"{config.num_mel_bins}"
        )
    seconds = samples / rate / config.max_source_positions
    hearing = Hearing(rate, samples, seconds, config.median_filter_width, no_words)
    writing, notes, transcribing = cast("WritingTokenizer", tokenizer), [], None
    try:
        transcribing = WhisperTranscription(
            writing, generation, hearing, details.vocab_size, config.max_target_positions
        )
    except UnsupportedModelError as error:
        notes.append(f"transcripts: refused: {error}")
    key = f"{details.checkpoint.media_key} {details.page_size}"
    places = filled(details.sources, details.page_size)
    token_id = int(config.decoder_start_token_id)  # begins every text, so that penalties of tokens do nothing new
    return SpeechReader(key, extractor, hearing, details.sources, places, token_id, writing, transcribing), notes
