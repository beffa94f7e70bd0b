"""Whatever a caller gives for audio, as samples at the rate that a model needs. On worker threads."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asyncengine.errors import InvalidRequestError
from asyncengine.media import AudioSource
from asyncengine.model.media.data_urls import data_of

MOST_SAMPLES = 1 << 26
"""Of one audio, all its channels together, before any is decoded."""
LOWEST_RATE, HIGHEST_RATE = 1_000, 768_000

_EXPECTED = (
    "expected (samples, sampling_rate) with an array of floats of one dimension, bytes of a file, a pathlib.Path or a "
    "data: URL"
)

Samples = NDArray[np.float32]


def sound_of(source: AudioSource, rate: int) -> Samples:
    """(samples,) of one channel at a sampling rate.

    Channels of a file are averaged, and other rates resampled, as transformers does.

    Args:
        source: As a caller gives it.
        rate: Samples in a second that the model needs.

    Raises:
        InvalidRequestError: It is no audio, or has none, or too much, or another rate and there is nothing to resample
            it with.
    """
    samples, own = _given(source)
    if samples is None:
        samples, own = _decoded(source)
    if not len(samples):
        raise InvalidRequestError("an audio has no samples")
    if not LOWEST_RATE <= own <= HIGHEST_RATE:
        raise InvalidRequestError(f"an audio has a sampling rate of {own} Hz; allowed: {LOWEST_RATE}..{HIGHEST_RATE}")
    if not np.isfinite(samples).all():
        raise InvalidRequestError("an audio has samples that are not finite numbers")
    return np.ascontiguousarray(samples if own == rate else _resampled(samples, own, rate), dtype=np.float32)


def _given(source: AudioSource) -> tuple[NDArray[Any] | None, int]:
    """Samples and their rate, of a source that has both; else None, if it may be a file."""
    if isinstance(source, Mapping):
        source = (source.get("array"), source.get("sampling_rate"))
    if isinstance(source, np.ndarray):
        raise InvalidRequestError(f"an audio is an array without its sampling rate; {_EXPECTED}")
    if not isinstance(source, tuple):
        return None, 0
    if len(source) != 2:
        raise InvalidRequestError(f"an audio is a tuple of {len(source)}; {_EXPECTED}")
    samples, rate = source
    if isinstance(rate, bool) or not isinstance(rate, (int, np.integer)):
        raise InvalidRequestError(f"an audio has the sampling rate {rate!r:.40}; expected samples in a second")
    if not isinstance(samples, np.ndarray) or samples.ndim != 1 or samples.dtype.kind != "f":
        what = f"an array of {samples.shape} {samples.dtype}" if isinstance(samples, np.ndarray) else f"{samples!r:.80}"
        raise InvalidRequestError(f"an audio's samples are {what}; expected floats, -1 to 1, of one dimension")
    _check_size(len(samples), 1)
    return samples, int(rate)


def _decoded(source: AudioSource) -> tuple[NDArray[Any], int]:
    """Samples of a file, its channels averaged, and their rate."""
    file: Any = source
    if isinstance(source, str):
        file = io.BytesIO(data_of(source, "an audio", "audio"))
    elif isinstance(source, (bytes, bytearray, memoryview)):
        file = io.BytesIO(source)
    elif not isinstance(source, Path):
        raise InvalidRequestError(f"an audio is {source!r:.80}; {_EXPECTED}")
    if importlib.util.find_spec("soundfile") is None:
        raise InvalidRequestError("an audio is a file, and soundfile is not installed; the extra 'audio' brings it")
    import soundfile

    try:
        with soundfile.SoundFile(file) as opened:
            _check_size(opened.frames, opened.channels)
            frames = opened.read(opened.frames, dtype="float32", always_2d=True)
            return frames.mean(axis=1) if frames.shape[1] > 1 else frames[:, 0], int(opened.samplerate)
    except InvalidRequestError:
        raise
    except soundfile.LibsndfileError as error:
        # It would name what the bytes are wrapped in.
        name = f", {str(source)!r}," if isinstance(source, Path) else f" of {file.getbuffer().nbytes} bytes"
        raise InvalidRequestError(
            f"an audio{name} is damaged or no file that libsndfile reads: {error.error_string}"
        ) from error
    except Exception as error:  # of the file system, say
        raise InvalidRequestError(f"an audio cannot be read: {error}") from error


def _resampled(samples: NDArray[Any], own: int, rate: int) -> NDArray[Any]:
    if importlib.util.find_spec("soxr") is None:
        raise InvalidRequestError(
            f"an audio has a sampling rate of {own} Hz and the model needs {rate}; without soxr, which the extra "
            "'audio' brings, it is not resampled"
        )
    import soxr

    wanted = -(-len(samples) * rate // own)
    found = soxr.resample(samples.astype(np.float32), own, rate, quality="soxr_hq")
    padded: NDArray[Any] = np.pad(found, (0, max(0, wanted - len(found))))[:wanted]
    return padded


def _check_size(frames: int, channels: int) -> None:
    if frames * channels > MOST_SAMPLES:
        raise InvalidRequestError(f"an audio has {frames} samples in {channels} channels; allowed: {MOST_SAMPLES}")
