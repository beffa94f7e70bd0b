"""Loads models that write down what they hear. Runs on threads of its own; what it returns goes to the step thread."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)
from transformers.modeling_outputs import BaseModelOutput

from asyncengine.config import EngineConfig
from asyncengine.errors import CheckpointError, ConfigError, UnsupportedModelError
from asyncengine.model import memory, packed_linear, verification
from asyncengine.model.attention.protocol import AttentionBackend, LayerSpec
from asyncengine.model.checkpoint import tokenizer_key
from asyncengine.model.load_check import Details, fits, tokenizer_path_of, with_tokenizer
from asyncengine.model.load_settings import check_layers, select_attention, sequences_of
from asyncengine.model.media.trial import BUDGET_TOKENS
from asyncengine.model.paged_layers import PagedLayers
from asyncengine.model.plain_loads import loading, rehearse, stated_config, with_weights
from asyncengine.model.runner import TorchModel
from asyncengine.model.sampler import Sampler
from asyncengine.model.speech.alignment import alignment_heads
from asyncengine.model.speech.decoder import HeardLayers, SpeechDecoder, attend_here, layers_of, spec_of
from asyncengine.model.speech.model import SpeechEncoder, SpeechModel
from asyncengine.model.speech.parting import Places, of_text
from asyncengine.model.speech.reader import SpeechReader
from asyncengine.model.speech.transcription import Hearing, WhisperTranscription
from asyncengine.model.text_files import check_processors
from asyncengine.model.tokenizer import keep_for_next_load, load_tokenizer
from asyncengine.model.trial_bound import relative
from asyncengine.step.chunking import MAX_SCORED
from asyncengine.step.limits import Limits
from asyncengine.step.model import LoadedModel, LoadPlan
from asyncengine.tokenizer import Tokenizer, WritingTokenizer

_Backends = tuple[AttentionBackend, AttentionBackend]

_CHUNK = 2048
"""Tokens of prompts in a step, where the configuration leaves that open: an audio and what stands behind it."""
_TRIAL = (3, 2, 1, 1)
"""Tokens of the pieces in which a model is tried."""
_NOT_HERE: dict[str, object] = {
    "speculative_mode": "disable", "additional_models": (), "adapters": {}, "kv_cache_dtype": "auto",
}  # fmt: skip
"""Settings that mean nothing here yet, and how they may be."""


@dataclass(frozen=True, slots=True)
class SpeechDetails(Details):
    """What a load needs to know of such a model.

    Attributes:
        places: Of audio.
    """

    places: Places = dataclasses.field(default_factory=lambda: Places(0, 0, 1))


def plan_of(
    config: EngineConfig, current: LoadedModel | None, checkpoint: Any, device: torch.device, dtype: torch.dtype
) -> LoadPlan:
    """A load, if all is well; arguments as those of `asyncengine.model.load_check.plan_of`.

    Raises:
        AsyncEngineError: It cannot be loaded; the kind says why.
    """
    details = details_of(config, current, checkpoint, device, dtype)
    for backend in _backends(config, details)[0]:
        check_layers(config, backend, {"": spec_of(details.hf_config)}, dtype, device)
    beside = fits(details, current)
    if not beside:
        rehearse(details, SpeechDecoder)
        details = with_tokenizer(details)
    return LoadPlan(config, beside, tokenizer_key(details.tokenizer_path), details)


def details_of(
    config: EngineConfig, current: LoadedModel | None, checkpoint: Any, device: torch.device, dtype: torch.dtype
) -> SpeechDetails:
    """The same without a look at the memory that there is."""
    _check_config(config)
    hf_config = stated_config(checkpoint, f"a {checkpoint.config['model_type']}")
    if any(str(named).endswith("Classification") for named in hf_config.architectures or ()):
        raise UnsupportedModelError(f"{checkpoint.name} is a classifier of audio, which cannot be served")
    tokenizer_path = tokenizer_path_of(config, checkpoint)
    if tokenizer_key(tokenizer_path) is None:
        raise CheckpointError(f"{tokenizer_path}: there are no tokenizer files")
    if (
        not (checkpoint.path / "preprocessor_config.json").exists()
        and not (checkpoint.path / "processor_config.json").exists()
    ):
        raise CheckpointError(f"{checkpoint.name} has no preprocessor_config.json, which says what it hears")
    check_processors(checkpoint.path)
    page_size = config.kv_cache_page_size or (16 if device.type == "cuda" else 32)
    places = Places.of(hf_config.max_source_positions, page_size)
    longest = places.count + hf_config.max_target_positions
    length = config.max_single_sequence_length or longest
    if not places.count + 1 < length <= longest:
        raise ConfigError(
            f"max_single_sequence_length is {length}; an audio takes {places.count} tokens and the model's positions "
            f"allow {hf_config.max_target_positions} behind it: {places.count + 2}..{longest}"
        )
    return SpeechDetails(
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
        places=places,
    )


def load(plan: LoadPlan) -> LoadedModel:
    """The model that was planned.

    Raises:
        ReloadError: It failed; nothing is left behind.
    """
    details, config = plan.details, plan.config
    assert isinstance(details, SpeechDetails)
    with loading(config, details.checkpoint) as made:
        tokenizer = load_tokenizer(details.tokenizer_path, details.present_tokenizer)
        assert tokenizer is not None
        keep_for_next_load(tokenizer)
        made.append(model := with_weights(details, SpeechDecoder))
        backends, notes = _backends(config, details)
        _try(model, details, backends)  # which has them take what they take beside the KV cache
        return _loaded(plan, details, model, tokenizer, backends, notes)


def _loaded(
    plan: LoadPlan,
    details: SpeechDetails,
    model: SpeechDecoder,
    tokenizer: Tokenizer,
    backends: _Backends,
    notes: list[str],
) -> LoadedModel:
    config, device = plan.config, details.device
    generation = _generation(details)
    heads, no_words = alignment_heads(generation, details.hf_config)
    aligned = sum(map(len, heads.values()))
    limits, complete = _limits(config, details, backends[0], plan.tokenizer_key is not None, aligned)
    reader, refused = _reader(details, tokenizer, generation, no_words)
    text, heard = _serving(
        model, details, backends, limits, Sampler(limits.max_num_sequence, details.vocab_size, device), heads
    )
    encoder = SpeechEncoder(model, reader.token_ids, device, BUDGET_TOKENS)
    blocks = limits.num_blocks * bytes_per_block(details, backends[0].bytes_per_block)
    return LoadedModel(
        model=SpeechModel(text, heard, encoder, details.places),
        limits=limits,
        config=complete.replace(attention_backend=backends[0].name),
        vocab_size=details.vocab_size,
        eos_token_ids=tuple(i for i in details.checkpoint.eos_token_ids if 0 <= i < details.vocab_size),
        default_generation_config=details.checkpoint.generation_defaults,
        tokenizer=tokenizer,
        tokenizer_key=plan.tokenizer_key,
        memory_bytes=details.weight_bytes + blocks,
        notes=(*notes, *refused),
        media_reader=reader,
        begins_with_audio=True,
        aligns=bool(heads),
        no_media={"image": "it hears", "audio": ""},
    )


def _check_config(config: EngineConfig) -> None:
    """Refuses what there is nothing for."""
    for name, usual in _NOT_HERE.items():
        given = getattr(config, name)
        if given != usual and given:
            raise ConfigError(f"{name} is {given!r}; {config.model!r} transcribes audio: leave it out")
    if config.quantization not in ("auto", "none"):
        raise ConfigError(f"quantization is {config.quantization!r}; {config.model!r} hears audio; allowed: 'none'")
    if config.decoder_backend == "compiled":
        raise ConfigError(f"decoder_backend is 'compiled'; {config.model!r} transcribes audio; allowed: 'auto'")
    if config.images:
        raise UnsupportedModelError(f"images is True; {config.model!r} takes none: it hears")
    if config.audio is False:
        raise ConfigError(f"audio is False; {config.model!r} takes nothing else")
    if config.mla:
        raise UnsupportedModelError(f"mla is True; {config.model!r} has no multi-head latent attention")


def _backends(config: EngineConfig, details: SpeechDetails) -> tuple[_Backends, list[str]]:
    """What attends to the tokens before, and what attends to audio: each keeps its own plan of a step. And what there
    is to be said of them, in words.
    """
    first, second = (select_attention(config, details.device, details.dtype) for _ in range(2))
    reason = first.fallback_reason
    return (first.backend, second.backend), [] if reason is None else [f"attention: {reason}"]


def _serving(
    model: SpeechDecoder,
    details: SpeechDetails,
    backends: _Backends,
    limits: Limits,
    sampler: Any,
    heads: Mapping[int, Sequence[int]],
) -> tuple[TorchModel, HeardLayers]:
    """A model with its KV cache, and with the heads that look at what is being said."""
    places = Places.of(details.places.heard, limits.page_size)
    paged = PagedLayers(layers_of(model), backends[0], limits, details.dtype, details.device)
    paged.allocate()
    heard = HeardLayers(model, paged, backends[1], places, details.device, heads)
    return TorchModel(model, paged, sampler, details.device), heard


def _try(model: SpeechDecoder, details: SpeechDetails, backends: _Backends) -> None:
    """Compares the decoder as it will run, over a paged cache, with transformers', behind what no encoder gives out.

    Raises:
        UnsupportedModelError: They differ by more than rounding.
    """
    config, count = details.hf_config, sum(_TRIAL)
    heard = torch.randn(details.places.heard, config.d_model, generator=torch.Generator().manual_seed(0))
    rows = heard.to(details.device, details.dtype)
    ids = np.arange(count, dtype=np.int32)[None] * 7 % details.vocab_size
    with torch.inference_mode():
        expected = WhisperForConditionalGeneration.forward(
            model,
            encoder_outputs=BaseModelOutput(last_hidden_state=rows[None]),
            decoder_input_ids=torch.from_numpy(ids).to(details.device).long(),
            use_cache=False,
        ).logits[0]
    attend_here(model)
    if packed_linear.supports(details.dtype, details.device):
        packed_linear.pack(model.model.decoder, set())
    places = Places.of(details.places.heard, verification.PAGE)
    length = places.count + count
    limits = Limits(1, length, length, places.page_size, -(-length // places.page_size))
    text, layers = _serving(model, details, backends, limits, None, {})
    sequence = np.concatenate((np.zeros((1, places.count), np.int32), ids), axis=1)
    slots = verification.piece(sequence, 0, places.heard).slot_mapping
    found = []
    with torch.inference_mode():
        layers.write(rows, slots)
        for start, end in itertools.pairwise(itertools.accumulate((places.count, *_TRIAL))):
            batch = verification.piece(sequence, start, end)
            own = of_text(batch, places)
            assert own is not None
            layers.begin(batch, own.attention_spans)
            found.append(text.logits(own))
    layers.free()  # before it is reckoned what memory there is
    error = relative(torch.cat(found).float(), expected.float())
    tolerance = verification.tolerance_of(details.dtype, None, "none", False)
    if not error <= tolerance:
        raise UnsupportedModelError(
            f"{details.checkpoint.name} does not compute over a paged KV cache what it computes without one: relative "
            f"error {error:.2g}, allowed {tolerance:g}"
        )


def _reader(
    details: SpeechDetails, tokenizer: Tokenizer, generation: GenerationConfig, no_words: str
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
    key = f"{details.checkpoint.media_key} {details.places}"
    token_id = int(config.decoder_start_token_id)  # begins every text, so that penalties of tokens do nothing new
    return SpeechReader(key, extractor, hearing, details.places, token_id, writing, transcribing), notes


def _generation(details: SpeechDetails) -> GenerationConfig:
    """What the checkpoint says of generating."""
    path = details.checkpoint.path
    if not (path / "generation_config.json").exists():
        return GenerationConfig.from_model_config(details.hf_config)
    try:
        return GenerationConfig.from_pretrained(path, local_files_only=True)
    except Exception as error:
        raise CheckpointError(f"{path / 'generation_config.json'} cannot be read: {error}") from error


def bytes_per_block(details: SpeechDetails, of_layer: Callable[[LayerSpec, int, torch.dtype], int]) -> int:
    """Of all layers together, by what each takes, as `AttentionBackend.bytes_per_block` has it."""
    layer = of_layer(spec_of(details.hf_config), details.places.page_size, details.dtype)
    return layer * int(details.hf_config.decoder_layers)


def _limits(
    config: EngineConfig, details: SpeechDetails, backend: AttentionBackend, has_tokenizer: bool, aligned: int
) -> tuple[Limits, EngineConfig]:
    """What the model can take, by the memory that there is; so many heads tell what tokens attend to."""
    device, page_size, length = details.device, details.places.page_size, details.max_length
    cuda = device.type == "cuda"
    sequences = sequences_of(config, device)
    chunk = min(config.prefill_chunk_size or _CHUNK, length)
    share = config.gpu_memory_utilization or (memory.CUDA_SHARE if cuda else memory.CPU_SHARE)
    available, taken = memory.free_bytes(device), share
    if cuda:
        used = memory.total_bytes(device) - available
        available = int(memory.total_bytes(device) * share) - used
        available -= _activations(details, chunk + sequences, sequences, aligned)
        taken = 1.0
    budget = memory.kv_budget(
        available=max(available, 0),
        share=taken,
        bytes_per_block=bytes_per_block(details, backend.bytes_per_block),
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
        quantization="none",
        decoder_backend="transformers",
        images=False,
        audio=True,
        mla=False,
    )
    return limits, complete


def _activations(details: SpeechDetails, tokens: int, sequences: int, aligned: int) -> int:
    """Bytes that the largest step takes beside weights and KV cache: an encoder's layer, copies of all logits, and
    copies of what tokens attend to.
    """
    config = details.hf_config
    frames = 2 * max(details.places.heard, tokens)
    of_layer = frames * (8 * config.d_model + 2 * config.encoder_ffn_dim) * details.dtype.itemsize
    attended = 3 * aligned * MAX_SCORED * details.places.heard * 4
    return int(of_layer + 4 * sequences * config.vocab_size * 4 + attended)
