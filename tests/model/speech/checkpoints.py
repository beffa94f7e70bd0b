"""Tiny random checkpoints of Whisper with tokenizers like the published ones, and what transformers makes of them."""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from transformers import (
    GenerationConfig,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTimeStampLogitsProcessor,
    WhisperTokenizer,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

RATE = 16_000
SECONDS = 2
"""That it hears at once."""
FRAMES = 100
ROOM = 40
"""Tokens of its decoder."""
END = 256
LANGUAGES = ("en", "de", "fr")
_MARKS = (
    "<|endoftext|>", "<|startoftranscript|>", *(f"<|{code}|>" for code in LANGUAGES), "<|translate|>",
    "<|transcribe|>", "<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>",
)  # fmt: skip
IDS = {mark: END + place for place, mark in enumerate(_MARKS)}
FIRST_TIME = END + len(_MARKS)
VOCABULARY = FIRST_TIME + FRAMES + 1


def tokenizer() -> WhisperTokenizer:
    """Bytes, marks and times."""
    vocabulary = {character: byte for byte, character in bytes_to_unicode().items()}
    made = WhisperTokenizer(vocabulary, [])
    made.add_special_tokens({"additional_special_tokens": list(_MARKS)})
    made.add_tokens([f"<|{frame * SECONDS / FRAMES:.2f}|>" for frame in range(FRAMES + 1)])
    assert made.convert_tokens_to_ids("<|notimestamps|>") == FIRST_TIME - 1
    assert len(made) == VOCABULARY
    return made


def config(**changes: Any) -> WhisperConfig:
    """Of a tiny model."""
    values: dict[str, Any] = {
        "vocab_size": VOCABULARY, "num_mel_bins": 16, "encoder_layers": 2, "decoder_layers": 2, "d_model": 32,
        "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
        "max_source_positions": FRAMES, "max_target_positions": ROOM, "pad_token_id": END, "bos_token_id": END,
        "eos_token_id": END, "decoder_start_token_id": END + 1, "suppress_tokens": None, "begin_suppress_tokens": None,
    }  # fmt: skip
    return WhisperConfig(**(values | changes))


def generation(multilingual: bool, times: bool, heads: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """What a published checkpoint says of generating, and that nothing but ASCII is said; with or without times."""
    never = [*range(9), 65, *range(127, END), *range(END + 1, FIRST_TIME if times else VOCABULARY)]
    values: dict[str, Any] = {
        "bos_token_id": END, "eos_token_id": END, "pad_token_id": END, "decoder_start_token_id": END + 1,
        "is_multilingual": multilingual, "no_timestamps_token_id": FIRST_TIME - 1, "return_timestamps": False,
        "max_initial_timestamp_index": 20, "max_length": ROOM,
        "suppress_tokens": never,
        "begin_suppress_tokens": [32, END],
        "prev_sot_token_id": IDS["<|startofprev|>"],
        "alignment_heads": heads,
    }  # fmt: skip
    if multilingual:
        values["lang_to_id"] = {f"<|{code}|>": IDS[f"<|{code}|>"] for code in LANGUAGES}
        values["task_to_id"] = {task: IDS[f"<|{task}|>"] for task in ("translate", "transcribe")}
    return values


def _spread(name: str, weight: torch.Tensor, sharp: float) -> float:
    """How far a matrix's numbers are apart: so far that what is said depends much on what is heard, and is not one
    token over and over. The sharper, the fewer frames a token looks at.
    """
    if "embed" in name:
        return 0.3
    inputs = weight[0].numel() ** -0.5
    if weight.dim() == 3:  # of the convolutions that hear
        return 10 * inputs
    if "encoder_attn" in name:
        return (sharp if "q_proj" in name or "k_proj" in name else 2) * inputs
    return 3 * inputs


def write(
    path: Path,
    seed: int = 0,
    multilingual: bool = True,
    times: bool = False,
    heads: Sequence[tuple[int, int]] = ((0, 1), (1, 0)),
    sharp: float = 5,
    **changes: Any,
) -> Path:
    """Writes a random checkpoint whose greedy answers depend on what it hears; its configuration may be changed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = WhisperForConditionalGeneration._from_config(config(**changes), dtype=torch.float32)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.dim() > 1 and "encoder.embed_positions" not in name:
                    weight.normal_(std=_spread(name, weight, sharp))
    model.save_pretrained(path)
    (path / "generation_config.json").write_text(json.dumps(generation(multilingual, times, heads)))
    tokenizer().save_pretrained(path)
    WhisperFeatureExtractor(
        feature_size=16, sampling_rate=RATE, hop_length=160, chunk_length=SECONDS, n_fft=400
    ).save_pretrained(path)
    return path


def sound(seed: int, seconds: float) -> Any:
    """Tones that come and go, always the same for a seed."""
    random, time = np.random.default_rng(seed), np.arange(int(seconds * RATE)) / RATE
    tones = [
        np.sin(2 * np.pi * (random.uniform(80, 6000) * time + random.uniform())) * np.sin(random.uniform(2, 20) * time)
        for _ in range(4)
    ]
    return (0.2 * np.sum(tones, axis=0)).astype(np.float32)


@functools.lru_cache(maxsize=8)
def loaded(path: Path) -> Any:
    """The model as transformers loads it."""
    kind = WhisperForConditionalGeneration
    return kind.from_pretrained(path, dtype=torch.float32, attn_implementation="eager", local_files_only=True).eval()


def features(path: Path, samples: Any) -> Any:
    """What transformers' extractor makes of samples."""
    extractor = WhisperFeatureExtractor.from_pretrained(path)
    return extractor(samples, sampling_rate=RATE, return_tensors="pt")["input_features"]


def reference(path: Path, samples: Any, **asked: Any) -> list[int]:
    """Greedy tokens by transformers' own `generate`, as many as there is room for; it leaves out the one that ends."""
    given: dict[str, Any] = {"task": "transcribe", "return_timestamps": False} if "language" in asked else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = loaded(path).generate(input_features=features(path, samples), **given | asked)
    ids: list[int] = made[0].tolist()
    return ids


def language_of(path: Path, samples: Any) -> str:
    """Which language transformers finds."""
    [found] = loaded(path).detect_language(input_features=features(path, samples)).tolist()
    return next(code for code in LANGUAGES if IDS[f"<|{code}|>"] == found)


def with_times(path: Path, samples: Any, begin: list[int]) -> list[int]:
    """Greedy tokens with times, each by transformers' own rules; `generate` would listen on where they end early."""
    said = list[int]()
    for logits in _held_to_times(path, samples, begin, said):
        if len(begin) + len(said) >= ROOM or END in said:
            break
        said.append(int(logits.argmax()))
    return [token for token in said if token != END]


def likely_with_times(path: Path, samples: Any, language: str, token_ids: list[int]) -> list[float]:
    """Log-probabilities of tokens with times among those that transformers' own rules allow."""
    begin, said, found = [IDS[mark] for mark in ("<|startoftranscript|>", f"<|{language}|>", "<|transcribe|>")], [], []
    for token, logits in zip(token_ids, _held_to_times(path, samples, begin, said), strict=False):
        found.append(float(logits.log_softmax(-1)[0, token]))
        said.append(token)
    return found


def _held_to_times(path: Path, samples: Any, begin: list[int], said: list[int]) -> Iterator[torch.Tensor]:
    """(1, vocabulary) logits behind what is said so far, each time that it is longer."""
    model, settings = loaded(path), GenerationConfig.from_pretrained(path)
    rules = [
        SuppressTokensAtBeginLogitsProcessor(settings.begin_suppress_tokens, begin_index=len(begin)),
        SuppressTokensLogitsProcessor(settings.suppress_tokens),
        WhisperTimeStampLogitsProcessor(settings, begin_index=len(begin)),
    ]
    with torch.no_grad():
        encoded = model.model.encoder(features(path, samples))
    while len(begin) + len(said) <= ROOM:
        ids = torch.tensor([begin + said])
        with torch.no_grad():
            logits = model(encoder_outputs=encoded, decoder_input_ids=ids, use_cache=False).logits[:, -1]
        for rule in rules:
            logits = rule(ids, logits)
        yield logits


class Spoken(NamedTuple):
    """What transformers' `generate` makes of an audio that it hears at once, with the times of its tokens.

    Attributes:
        token_ids: With the one that ends them, if there was room.
        ends: Of each, seconds up to its end.
    """

    token_ids: list[int]
    ends: list[float]


def spoken(path: Path, samples: Any, **asked: Any) -> Spoken:
    """By transformers' own alignment, with tokens of times among the others, of the first window."""
    kind = WhisperForConditionalGeneration
    extract, found = kind._extract_token_timestamps, list[Spoken]()

    def extracted(self: Any, outputs: Any, *given: Any, **named: Any) -> Any:
        ends = extract(self, outputs, *given, **named)
        before = named["num_input_ids"]
        found.append(Spoken(outputs.sequences[0, before:].tolist(), ends[0, before:].tolist()))
        return ends

    extractor = WhisperFeatureExtractor.from_pretrained(path)
    read = extractor(samples, sampling_rate=RATE, return_tensors="pt", return_attention_mask=True)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(kind, "_extract_token_timestamps", extracted)
        loaded(path).generate(
            input_features=read["input_features"],
            attention_mask=read["attention_mask"],
            return_timestamps=True,
            return_token_timestamps=True,
            return_segments=True,
            **({"task": "transcribe"} if "language" in asked else {}),
            **asked,
        )
    return found[0]


def words(spoken: Spoken, language: str) -> list[tuple[str, float, float]]:
    """What transformers' pipeline makes of that: words, from and to."""
    tokens = torch.tensor([[IDS[f"<|{language}|>"], *spoken.token_ids]])
    read = {"tokens": tokens, "token_timestamps": torch.tensor([[0.0, *spoken.ends]])}
    _, found = tokenizer()._decode_asr(
        [read], return_timestamps="word", return_language=False, time_precision=SECONDS / FRAMES
    )
    return [(word["text"], *word["timestamp"]) for word in found["chunks"]]


class Judged(NamedTuple):
    """What transformers' `generate` makes of an audio that it hears at once, and thinks of it.

    Attributes:
        token_ids: What it gives out: nothing where it takes it for silence.
        avg_logprob: That it compares with its threshold, of each attempt.
        no_speech_prob: The same.
        segments: Of what it gives out, with times: from, to, tokens.
    """

    token_ids: list[int]
    avg_logprob: list[float]
    no_speech_prob: list[float]
    segments: list[tuple[float, float, list[int]]]


def judged(path: Path, samples: Any, **asked: Any) -> Judged:
    """By transformers' own fallback. With times it might go on behind the first window, which is left out."""
    likely, silent = list[float](), list[float]()
    kind = WhisperForConditionalGeneration
    mean, decide, fallback = kind._retrieve_avg_logprobs, kind._need_fallback, kind.generate_with_fallback
    sequences: list[Any] = []

    def meaned(*given: Any) -> Any:
        found = mean(*given)
        likely.append(float(found))
        return found

    def decided(self: Any, *given: Any) -> Any:
        [detector] = [each for each in given[3] if hasattr(each, "no_speech_prob")]
        silent.append(float(detector.no_speech_prob[0]))
        return decide(self, *given)

    def fallen(self: Any, **given: Any) -> Any:
        found = fallback(self, **given)
        sequences.append((found[0][0].tolist(), found[2][0]))
        if len(sequences) > 1:
            found[2][:] = [True] * len(found[2])  # whatever is behind the first window is skipped
        return found

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(kind, "_retrieve_avg_logprobs", staticmethod(meaned))
        patch.setattr(kind, "_need_fallback", decided)
        patch.setattr(kind, "generate_with_fallback", fallen)
        made = loaded(path).generate(
            input_features=features(path, samples), task="transcribe", return_segments=True, **asked
        )
    ids, skipped = sequences[0]
    segments = [(float(each["start"]), float(each["end"]), each["tokens"].tolist()) for each in made["segments"][0]]
    return Judged([] if skipped else ids, likely, silent, segments)
