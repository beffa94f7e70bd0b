"""How a checkpoint's own processor asks its model to transcribe, and reads what the model says. On worker threads."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np

from asyncengine.errors import InvalidRequestError
from asyncengine.model.media.preparation import listening_part
from asyncengine.transcription import TranscriptionPrompt, WholeTranscription

_FORMAT = "transcription_only"


class ProcessedTranscription(WholeTranscription):
    """As `asyncengine.transcription.Transcribing`, over a processor of transformers'.

    Args:
        processor: It, which has ``apply_transcription_request``.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._taken = set(inspect.signature(processor.apply_transcription_request).parameters)
        self.parses = "return_format" in inspect.signature(type(processor).decode).parameters

    @classmethod
    def of(cls, processor: Any) -> ProcessedTranscription | None:
        """That of a processor; None if it has none that gives out a text."""
        asks = getattr(processor, "apply_transcription_request", None)
        return cls(processor) if asks is not None and "tokenize" in inspect.signature(asks).parameters else None

    def request(self, asked: TranscriptionPrompt) -> str:
        """As the protocol says."""
        self.check(asked)
        given: dict[str, Any] = {}
        for name, field, value in (("language", "language", asked.language), ("prompt", "hint", asked.hint)):
            if value is None:
                continue
            if name not in self._taken:
                raise InvalidRequestError(f"{field} is {value!r:.80}; the model is not told any")
            given[name] = value
        sound = np.zeros(
            int(listening_part(self._processor).sampling_rate), np.float32
        )  # whatever stands for the audio
        try:
            [text] = self._processor.apply_transcription_request(audio=sound, tokenize=False, **given)
        except Exception as error:  # a language that it does not know, say
            raise InvalidRequestError(f"the model's processor does not ask for that: {error}") from error
        return str(text)

    def text(self, token_ids: Sequence[int]) -> str | None:
        """As `WholeTranscription`."""
        try:
            return str(self._processor.decode(list(token_ids), return_format=_FORMAT, skip_special_tokens=True))
        except Exception:  # what the model said may have another form than it should
            return None
