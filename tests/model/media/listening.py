"""Tiny random checkpoints of models that take audio, and what transformers makes of them. None is downloaded."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoConfig

from asyncengine.model.media.processor import processor
from tests.model.media.checkpoints import (
    END,
    TEXT,
    VISION_TOWER,
    VOCABULARY,
    _resolved,
    _spread,
    tokenizer_of,
)

RATE = 16_000


@dataclass(frozen=True)
class Listening:
    """What a checkpoint is written from. A token's name in place of an index stands for the token's index."""

    config: str
    parts: dict[str, dict[str, Any]]
    """Those of the configuration, by name."""
    values: dict[str, Any]
    processor: str
    extractor: dict[str, Any]
    placeholder: str
    tokens: tuple[str, ...]
    named_tokens: dict[str, str] = field(default_factory=dict)
    processor_values: dict[str, Any] = field(default_factory=dict)
    processor_parts: dict[str, Any] = field(default_factory=dict)


WHISPER: dict[str, Any] = {
    "feature_extractor_type": "WhisperFeatureExtractor", "feature_size": 16, "chunk_length": 2, "sampling_rate": RATE,
    "hop_length": 160, "n_fft": 400, "padding_value": 0.0, "return_attention_mask": True,
}  # fmt: skip
TOWER: dict[str, Any] = {
    "num_mel_bins": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 48,
    "max_source_positions": 100,
}  # fmt: skip
QWEN_TOWER: dict[str, Any] = {
    "num_mel_bins": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "d_model": 32, "encoder_ffn_dim": 48,
}  # fmt: skip
GEMMA_NAMES = {
    "boi_token": "<|image>", "eoi_token": "<image|>", "image_token": "<|image|>", "boa_token": "<|audio>",
    "eoa_token": "<audio|>", "audio_token": "<|audio|>",
}  # fmt: skip

LISTENING: dict[str, Listening] = {
    "qwen2_audio": Listening(
        "Qwen2AudioConfig", {
            "text_config": TEXT | {"model_type": "qwen2"},
            "audio_config": QWEN_TOWER | {"model_type": "qwen2_audio_encoder", "max_source_positions": 100},
        }, {"audio_token_index": "<|AUDIO|>"}, "Qwen2AudioProcessor", WHISPER,
        "Audio: <|audio_bos|><|AUDIO|><|audio_eos|>\n", ("<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>"),
    ),
    "glmasr": Listening(
        "GlmAsrConfig", {
            "text_config": TEXT | {"model_type": "llama"},
            "audio_config": {
                "num_mel_bins": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32,
                "intermediate_size": 128, "model_type": "glmasr_encoder",
            },
        }, {"audio_token_id": "<|pad|>"}, "GlmAsrProcessor", WHISPER, "<begin><|pad|><end_of_audio>",
        ("<|pad|>", "<begin>", "<end_of_audio>"),
    ),
    "audioflamingo3": Listening(
        "AudioFlamingo3Config", {
            "text_config": TEXT | {"model_type": "qwen2"},
            "audio_config": TOWER | {"model_type": "audioflamingo3_encoder"},
        }, {"audio_token_id": "<sound>"}, "AudioFlamingo3Processor", WHISPER, "<sound>", ("<sound>",),
    ),
    "qwen3_asr": Listening(
        "Qwen3ASRConfig", {
            "text_config": TEXT | {"model_type": "qwen3", "head_dim": 16},
            "audio_config": QWEN_TOWER | {
                "model_type": "qwen3_asr_encoder", "output_dim": 64, "downsample_hidden_size": 8,
            },
        }, {"audio_token_id": "<|audio_pad|>", "pad_token_id": END}, "Qwen3ASRProcessor", WHISPER | {
            "feature_extractor_type": "Qwen3ASRFeatureExtractor",
        },
        "<|audio_start|><|audio_pad|><|audio_end|>", ("<|audio_start|>", "<|audio_pad|>", "<|audio_end|>"),
        {"audio_token": "<|audio_pad|>", "audio_bos_token": "<|audio_start|>", "audio_eos_token": "<|audio_end|>"},
    ),
    "moss_transcribe_diarize": Listening(
        "MossTranscribeDiarizeConfig", {
            "text_config": TEXT | {"model_type": "qwen3", "head_dim": 16},
            "audio_config": TOWER,
        }, {"audio_token_id": "<|audio_pad|>", "audio_chunk_size": 2 * RATE}, "MossTranscribeDiarizeProcessor",
        WHISPER | {"feature_extractor_type": "MossTranscribeDiarizeFeatureExtractor"},
        "<|audio_start|><|audio_pad|><|audio_end|>", ("<|audio_start|>", "<|audio_pad|>", "<|audio_end|>"),
    ),
    "musicflamingo": Listening(
        "MusicFlamingoConfig", {
            "text_config": TEXT | {"model_type": "qwen2"},
            "audio_config": TOWER | {"model_type": "audioflamingo3_encoder"},
        }, {
            "audio_token_id": "<sound>", "audio_bos_token_id": "<|sound_bos|>", "audio_eos_token_id": "<|sound_eos|>",
        }, "MusicFlamingoProcessor", WHISPER, "<sound>", ("<sound>", "<|sound_bos|>", "<|sound_eos|>"),
    ),
    "omniasr": Listening(
        "OmniASRConfig", {
            "text_config": TEXT | {"model_type": "llama"},
            "audio_config": {
                "model_type": "omniasr_audio", "hidden_size": 32, "conv_dim": [16] * 7, "num_attention_heads": 2,
                "num_hidden_layers": 2, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2,
                "intermediate_size": 48,
            },
        }, {"audio_token_id": "<extra_id_1>"}, "OmniASRProcessor", {
            "feature_extractor_type": "OmniASRFeatureExtractor", "sampling_rate": RATE,
        }, "<extra_id_1>", ("<extra_id_1>",),
    ),
    "gemma4": Listening(
        "Gemma4Config", {
            "text_config": TEXT | {
                "head_dim": 16, "global_head_dim": 32, "sliding_window": 24, "vocab_size_per_layer_input": VOCABULARY,
                "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2,
                "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2,
            },
            "vision_config": VISION_TOWER | {
                "num_key_value_heads": 2, "head_dim": 16, "pooling_kernel_size": 2, "position_embedding_size": 64,
            },
            "audio_config": {
                "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "output_proj_dims": 48,
                "subsampling_conv_channels": [128, 4],
            },
        }, {
            "boi_token_id": "<|image>", "eoi_token_id": "<image|>", "image_token_id": "<|image|>",
            "video_token_id": "<|video|>", "boa_token_id": "<|audio>", "eoa_token_index": "<audio|>",
            "audio_token_id": "<|audio|>",
        }, "Gemma4Processor", {"feature_extractor_type": "Gemma4AudioFeatureExtractor"}, "<|audio|>",
        ("<|image>", "<image|>", "<|image|>", "<|video|>", "<|audio>", "<audio|>", "<|audio|>"), GEMMA_NAMES,
        {"image_seq_length": 70}, {
            "image_processor": {
                "image_processor_type": "Gemma4ImageProcessor", "patch_size": 4, "pooling_kernel_size": 2,
                "max_soft_tokens": 70,
            }, "video_processor": {"video_processor_type": "Gemma4VideoProcessor"},
        },
    ),
}  # fmt: skip


def _indices(described: Listening) -> dict[str, int]:
    return {token: 257 + place for place, token in enumerate(described.tokens)}


def config(architecture: str, **changes: Any) -> Any:
    """The configuration of a tiny model; its parts are changed by the fields of a dict."""
    described = LISTENING[architecture]
    values: dict[str, Any] = described.values | described.parts
    for name, change in changes.items():
        values[name] = values[name] | change if isinstance(change, dict) else change
    return getattr(transformers, described.config)(**_resolved(values, _indices(described)))


def _class(config: Any) -> Any:
    return getattr(transformers, type(config).__name__.removesuffix("Config") + "ForConditionalGeneration")


def template(architecture: str) -> str:
    """A chat template that writes parts as the published ones do."""
    marks = {"audio": LISTENING[architecture].placeholder, "image": "<|image|>"}
    cases = "".join("{% elif part['type'] == '" + kind + "' %}" + mark for kind, mark in marks.items())
    return (
        "{% for message in messages %}{{ message['role'] }}: {% if message['content'] is string %}"
        "{{ message['content'] }}{% else %}{% for part in message['content'] %}{% if part['type'] == 'text' %}"
        "{{ part['text'] }}" + cases + "{% endif %}{% endfor %}{% endif %}{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )


def write(path: Path, architecture: str, seed: int = 0, **changes: Any) -> Path:
    """Writes a random checkpoint with its tokenizer, processor and chat template."""
    described = LISTENING[architecture]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        described_by = config(architecture, **changes)
        model = _class(described_by)._from_config(described_by, dtype=torch.float32)
        with torch.no_grad():
            _spread(model)
    model.save_pretrained(path)
    tokenizer_of(described.tokens, described.named_tokens).save_pretrained(path)
    parts = described.processor_parts | {"feature_extractor": described.extractor}
    written = {"processor_class": described.processor} | described.processor_values | parts
    (path / "processor_config.json").write_text(json.dumps(written, indent=2))
    (path / "chat_template.jinja").write_text(template(architecture))
    return path


def sound(seed: int, seconds: float) -> Any:
    """Random samples, always the same for a seed."""
    return np.random.default_rng(seed).uniform(-0.5, 0.5, int(seconds * RATE)).astype(np.float32)


_processor = functools.lru_cache(maxsize=16)(processor)


def inputs(path: Path, messages: list[dict[str, Any]], sounds: Sequence[Any], images: Sequence[Any] = ()) -> Any:
    """What transformers' processor makes of a conversation."""
    made = _processor(path, ("audio",))
    rendered = made.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    given: dict[str, Any] = {"audio": list(sounds)} if sounds else {}
    if images:
        given["images"] = [list(images)]
    return made(text=[rendered], return_tensors="pt", **given).to(torch.float32)


def load(path: Path) -> Any:
    """The model as transformers loads it."""
    kind = _class(AutoConfig.from_pretrained(path))
    return kind.from_pretrained(path, dtype=torch.float32, attn_implementation="eager", local_files_only=True).eval()


@functools.lru_cache(maxsize=8)
def loaded(path: Path) -> Any:
    """The model, for those who ask it something and leave it as it is."""
    return load(path)


def reference(
    path: Path, messages: list[dict[str, Any]], sounds: Sequence[Any], max_tokens: int, images: Sequence[Any] = ()
) -> list[int]:
    """Greedy tokens by transformers alone; no token ends it."""
    given = inputs(path, messages, sounds, images)
    settings = {"do_sample": False, "max_new_tokens": max_tokens, "eos_token_id": None, "pad_token_id": END}
    made = loaded(path).generate(**given, **settings)
    return made[0, given["input_ids"].shape[1] :].tolist()
