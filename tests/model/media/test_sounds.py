"""Whatever is given for audio becomes samples of one channel at the rate that is needed, or an error says why not."""

from __future__ import annotations

import base64
import importlib.util
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from asyncengine.errors import InvalidRequestError
from asyncengine.model.media import sounds
from asyncengine.model.media.sounds import blocks_of, sound_of

RATE = 16_000
TONE = (0.5 * np.sin(np.arange(RATE // 4) * 2 * np.pi * 440 / RATE)).astype(np.float32)


def file_of(samples: Any = TONE, rate: int = RATE, kind: str = "WAV", subtype: str | None = None) -> bytes:
    held = io.BytesIO()
    soundfile.write(held, samples, rate, format=kind, subtype=subtype)
    return held.getvalue()


def test_forms_of_the_same_samples(tmp_path: Path) -> None:
    file = file_of(subtype="FLOAT")
    (tmp_path / "tone.wav").write_bytes(file)
    for source in (
        (TONE, RATE),
        (TONE.astype(np.float64), np.int64(RATE)),
        {"array": TONE, "sampling_rate": RATE},
        file,
        memoryview(file),
        tmp_path / "tone.wav",
        "data:audio/wav;base64," + base64.b64encode(file).decode(),
    ):
        found = sound_of(source, RATE)
        assert found.dtype == np.float32 and np.array_equal(found, TONE)


@pytest.mark.parametrize(
    ("kind", "subtype", "within"), [("WAV", "PCM_16", 1e-4), ("FLAC", None, 1e-4), ("OGG", None, 0.1)]
)
def test_files_of_other_kinds(kind: str, subtype: str | None, within: float) -> None:
    assert np.allclose(sound_of(file_of(kind=kind, subtype=subtype), RATE), TONE, atol=within)


def test_channels_are_averaged() -> None:
    both = np.stack((TONE, -TONE * 0.5), axis=1)
    assert np.allclose(sound_of(file_of(both, subtype="FLOAT"), RATE), TONE * 0.25, atol=1e-6)


def test_other_rates_are_resampled_as_transformers_does() -> None:
    from transformers.audio_utils import load_audio

    rate = 44_100
    high = (0.5 * np.sin(np.arange(rate // 4) * 2 * np.pi * 440 / rate)).astype(np.float32)
    file = file_of(high, rate, subtype="FLOAT")
    found = sound_of((high, rate), RATE)
    assert np.array_equal(found, sound_of(file, RATE))
    assert np.array_equal(found, load_audio(base64.b64encode(file).decode(), RATE))
    assert len(found) == len(TONE) and np.allclose(found[200:-200], TONE[200:-200], atol=1e-3)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (TONE, "an array without its sampling rate"),
        ((TONE, RATE, 1), "a tuple of 3"),
        ((TONE, 16e3), "the sampling rate 16000.0"),
        ((TONE, True), "the sampling rate True"),
        ((TONE, 7), r"a sampling rate of 7 Hz; allowed: 1000\.\.768000"),
        ((TONE[:, None], RATE), r"an array of \(4000, 1\) float32; expected floats"),
        (((TONE * 99).astype(np.int16), RATE), "int16; expected floats, -1 to 1"),
        (([0.1, 0.2], RATE), r"samples are \[0.1, 0.2\]"),
        ((TONE[:0], RATE), "has no samples"),
        ((np.append(TONE, np.float32("nan")), RATE), "not finite"),
        ((np.append(TONE, np.float32("inf")), RATE), "not finite"),
        ((np.append(TONE.astype(np.float64), 1e300), RATE), "far from -1 to 1"),
        ((np.append(TONE, np.float32(-1e20)), RATE), "far from -1 to 1"),
        (b"not audio", "an audio of 9 bytes is damaged or no file that libsndfile reads: Format not recognised"),
        ("data:audio/wav;base64,AAAA", "an audio of 3 bytes is damaged or no file that libsndfile reads"),
        (Path(__file__), r"an audio, '.*test_sounds\.py', is damaged or no file that libsndfile reads: "),
        (file_of()[:20], "damaged or no file"),
        (file_of(TONE[:0]), "has no samples"),
        ("https://example.com/a.wav", "nothing is fetched"),
        ("data:audio/wav;base64,!!!", "is not base64"),
        (Path("/nowhere/a.wav"), "No such file|System error"),
        (3, r"an audio is 3; expected \(samples, sampling_rate\)"),
    ],
)
def test_what_is_no_audio(source: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        sound_of(source, RATE)
    with pytest.raises(InvalidRequestError, match=message):
        list(blocks_of(source, RATE))


@pytest.mark.parametrize("rate", [RATE, 44_100, 8000])
@pytest.mark.parametrize("seconds", [0.01, 10.0, 25.3])
def test_blocks_are_the_whole(rate: int, seconds: float) -> None:
    """Of samples and of files, with channels that are averaged and rates that are resampled."""
    drawn = np.random.default_rng(0).uniform(-0.5, 0.5, (int(seconds * rate), 2)).astype(np.float32)
    for source in ((drawn[:, 0], rate), (drawn[:, 1].astype(np.float64), rate), file_of(drawn, rate, subtype="FLOAT")):
        blocks = list(blocks_of(source, RATE))
        assert all(block.dtype == np.float32 and len(block) <= 11 * RATE for block in blocks)
        assert np.array_equal(np.concatenate(blocks), sound_of(source, RATE))
        assert len(blocks) >= seconds / 10


def test_no_more_is_decoded_than_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    read, blocks = list[int](), soundfile.SoundFile.blocks

    def counted(self: Any, *given: Any, **more: Any) -> Any:
        return map(lambda block: read.append(len(block)) or block, blocks(self, *given, **more))

    monkeypatch.setattr(soundfile.SoundFile, "blocks", counted)
    monkeypatch.setattr(sounds, "MOST_SAMPLES", 1)  # which is of audio that is decoded at once
    found = blocks_of(file_of(np.tile(TONE, 200)), RATE)
    assert not read and len(next(found)) == 10 * RATE == sum(read)
    found.close()


def test_longer_than_a_day(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sounds, "MOST_SECONDS", 11)
    for source in ((np.tile(TONE, 45), RATE), file_of(np.tile(TONE, 45))):
        with pytest.raises(InvalidRequestError, match="an audio has 180000 samples; allowed: 176000"):
            next(blocks_of(source, RATE))


def test_too_much_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sounds, "MOST_SAMPLES", len(TONE) - 1)
    for source in ((TONE, RATE), file_of()):
        with pytest.raises(InvalidRequestError, match=r"has 4000 samples in 1 channels; allowed: 3999"):
            sound_of(source, RATE)


def test_without_what_reads_and_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    gone = ("soundfile", "soxr")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name in gone else found(name, *more))
    assert np.array_equal(sound_of((TONE, RATE), RATE), TONE)
    with pytest.raises(InvalidRequestError, match="soundfile is not installed; the extra 'audio' brings it"):
        sound_of(file_of(), RATE)
    with pytest.raises(InvalidRequestError, match="rate of 8000 Hz and the model needs 16000; without soxr"):
        sound_of((TONE, 8000), RATE)
