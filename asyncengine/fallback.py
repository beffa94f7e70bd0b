"""When what was written down of an audio is doubted, and written down anew. Values; no torch, no asyncio."""

from __future__ import annotations

import enum
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeGuard

from asyncengine.errors import InvalidRequestError
from asyncengine.generation import MAX_FACTOR, GenerationConfig
from asyncengine.transcription import Quality


class Verdict(enum.Enum):
    """What becomes of what was written down."""

    GOOD = "good"
    DOUBTED = "doubted"
    SILENCE = "silence"


@dataclass(frozen=True, slots=True, kw_only=True)
class TranscriptionFallback:
    """What of a transcript is written down anew, and how: the rules of openai-whisper (Radford et al., 2022).

    What was heard at once is written down at the first temperature. Where that looks wrong, it is written down at the
    next one, and so on; what comes of the last is taken as it is. Where it looks wrong and the model finds it likely
    that nothing is said, nothing is. Names and defaults are openai-whisper's; a threshold that is None is passed over.

    Attributes:
        temperature: One after the other; or a single one.
        compression_ratio_threshold: More is doubted: bytes of the text, by how many zlib makes of them.
        logprob_threshold: Less is doubted: the mean log-probability of a token.
        no_speech_threshold: What is doubted by `logprob_threshold` is silence from that probability on. Of models that
            do not say how likely it is, nothing is.
    """

    temperature: float | Sequence[float] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    compression_ratio_threshold: float | None = 2.4
    logprob_threshold: float | None = -1.0
    no_speech_threshold: float | None = 0.6

    def __post_init__(self) -> None:
        given = self.temperature
        temperatures = tuple(given) if isinstance(given, (list, tuple)) else (given,)
        if not temperatures or not all(_is_number(each) and 0.0 <= each <= MAX_FACTOR for each in temperatures):
            raise InvalidRequestError(
                f"temperature of the fallback is {given!r:.80}; expected a list of numbers >= 0, or one"
            )
        object.__setattr__(self, "temperature", tuple(map(float, temperatures)))
        for name in ("compression_ratio_threshold", "logprob_threshold", "no_speech_threshold"):
            if (value := getattr(self, name)) is not None and not _is_number(value):
                raise InvalidRequestError(f"{name} is {value!r:.80}; expected a number or None")

    @property
    def temperatures(self) -> tuple[float, ...]:
        """All of them, in their order."""
        assert isinstance(self.temperature, tuple)
        return self.temperature

    def verdict(self, quality: Quality) -> Verdict:
        """What becomes of what was heard at once."""
        likely, ratio, silent = quality.avg_logprob, quality.compression_ratio, quality.no_speech_prob
        least, most_silent = self.logprob_threshold, self.no_speech_threshold
        unlikely = likely is not None and least is not None and likely < least
        if silent is not None and most_silent is not None and silent > most_silent and (unlikely or least is None):
            return Verdict.SILENCE
        most = self.compression_ratio_threshold
        repeats = ratio is not None and most is not None and ratio > most
        return Verdict.DOUBTED if unlikely or repeats else Verdict.GOOD


def check_fallback(fallback: object, config: GenerationConfig) -> None:
    """Whether a transcript can be written down so.

    Raises:
        InvalidRequestError: It is no fallback, or the configuration has a temperature beside it.
    """
    if fallback is None:
        return
    if not isinstance(fallback, TranscriptionFallback):
        raise InvalidRequestError(f"fallback is {fallback!r:.80}; expected TranscriptionFallback(...) or None")
    if config.temperature is not None:
        raise InvalidRequestError(f"temperature is {config.temperature}, and the fallback says which; leave it out")


def compression_ratio(text: str) -> float:
    """Bytes of a text, by how many zlib makes of them: of one that repeats itself much."""
    data = text.encode()
    return len(data) / len(zlib.compress(data))


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value
