"""Whatever a caller gives for audio, as samples at the rate that a model needs. On worker threads."""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asyncengine.errors import InvalidRequestError
from asyncengine.media import AudioSource
from asyncengine.model.media.data_urls import data_of

MOST_SAMPLES = 1 << 26
"""Of one audio, all its channels together, before any is decoded."""
MOST_SECONDS = 24 * 3600
"""Of one that is decoded in blocks."""
LOWEST_RATE, HIGHEST_RATE = 1_000, 768_000

_BLOCK = 10
"""Seconds of a block."""
_LARGEST = 2.0**32
"""Of samples: more than there is where somebody has not scaled them. What a model's features are made of is squared and
summed in float32, and would not be finite.
"""

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
    else:
        _check_size(len(samples), 1)
    if not len(samples):
        raise InvalidRequestError("an audio has no samples")
    _check_rate(own)
    _check_finite(samples)
    return np.ascontiguousarray(samples if own == rate else _resampled(samples, own, rate), dtype=np.float32)


def blocks_of(source: AudioSource, rate: int) -> Iterator[Samples]:
    """The same samples in blocks of some seconds, of an audio of up to a day. Each is decoded when it is asked for.

    Args:
        source: As of `sound_of`, as is the rate.
        rate: The same.

    Raises:
        InvalidRequestError: As `sound_of`; of a file that is damaged behind its beginning, in the middle.
    """
    samples, own = _given(source)
    if samples is None:
        with _opened(source) as opened:
            own = int(opened.samplerate)
            blocks = (_averaged(block) for block in opened.blocks(_BLOCK * own, dtype="float32", always_2d=True))
            yield from _checked(blocks, own, rate, opened.frames)
    else:
        found = samples
        parts = (found[at : at + _BLOCK * own] for at in range(0, len(found), max(_BLOCK * own, 1)))
        yield from _checked(parts, own, rate, len(found))


def _checked(blocks: Iterable[NDArray[Any]], own: int, rate: int, frames: int) -> Iterator[Samples]:
    """Blocks at the rate that is needed; so many frames are said to come."""
    _check_rate(own)
    if frames > (most := MOST_SECONDS * own):
        raise InvalidRequestError(f"an audio has {frames} samples; allowed: {most}, {MOST_SECONDS // 3600} h")
    resampler, count = None if own == rate else _Resampler(own, rate), 0
    for block in blocks:
        if (count := count + len(block)) > most:
            raise InvalidRequestError(f"an audio has more than {most} samples, {MOST_SECONDS // 3600} h")
        _check_finite(block)
        yield np.ascontiguousarray(block, np.float32) if resampler is None else resampler.push(block)
    if not count:
        raise InvalidRequestError("an audio has no samples")
    if resampler is not None:
        yield resampler.flush()


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
    return samples, int(rate)


def _decoded(source: AudioSource) -> tuple[NDArray[Any], int]:
    """Samples of a file, its channels averaged, and their rate."""
    with _opened(source) as opened:
        _check_size(opened.frames, opened.channels)
        return _averaged(opened.read(opened.frames, dtype="float32", always_2d=True)), int(opened.samplerate)


def _averaged(frames: NDArray[Any]) -> NDArray[Any]:
    """(frames,) of (frames, channels)."""
    return frames.mean(axis=1) if frames.shape[1] > 1 else frames[:, 0]


@contextlib.contextmanager
def _opened(source: AudioSource) -> Iterator[Any]:
    """A file to be decoded. Whatever is raised meanwhile says what is wrong with it."""
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
            yield opened
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
    resampler = _Resampler(own, rate)
    return np.concatenate((resampler.push(samples), resampler.flush()))


class _Resampler:
    """Samples of one rate at another; in blocks they come to what they come to at once.

    Args:
        own: Their rate.
        rate: That which is needed.

    Raises:
        InvalidRequestError: There is nothing to do it with.
    """

    def __init__(self, own: int, rate: int) -> None:
        if importlib.util.find_spec("soxr") is None:
            raise InvalidRequestError(
                f"an audio has a sampling rate of {own} Hz and the model needs {rate}; without soxr, which the extra "
                "'audio' brings, it is not resampled"
            )
        import soxr

        self._own, self._rate = own, rate
        self._stream = soxr.ResampleStream(own, rate, 1, dtype="float32", quality="soxr_hq")
        self._taken = self._given = 0

    def push(self, samples: NDArray[Any]) -> Samples:
        """What is certain with these."""
        found: Samples = self._stream.resample_chunk(samples.astype(np.float32))
        self._taken += len(samples)
        self._given += len(found)
        return found

    def flush(self) -> Samples:
        """The rest: as many in all as they are seconds, rounded up."""
        found = self._stream.resample_chunk(np.empty(0, np.float32), last=True)
        left = -(-self._taken * self._rate // self._own) - self._given
        rest: Samples = np.pad(found, (0, max(0, left - len(found))))[:left]
        return rest


def _check_rate(own: int) -> None:
    if not LOWEST_RATE <= own <= HIGHEST_RATE:
        raise InvalidRequestError(f"an audio has a sampling rate of {own} Hz; allowed: {LOWEST_RATE}..{HIGHEST_RATE}")


def _check_finite(samples: NDArray[Any]) -> None:
    if len(samples) and not (float(samples.min()) >= -_LARGEST and float(samples.max()) <= _LARGEST):
        raise InvalidRequestError("an audio has samples that are not finite numbers, or far from -1 to 1")


def _check_size(frames: int, channels: int) -> None:
    if frames * channels > MOST_SAMPLES:
        raise InvalidRequestError(f"an audio has {frames} samples in {channels} channels; allowed: {MOST_SAMPLES}")
