"""Reads the audio of prompts for a decoder that attends to it. On worker threads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from asyncengine.errors import InvalidRequestError
from asyncengine.media import Kind, MediaItem, PromptMedia, ReadPrompt, Sources, Write
from asyncengine.model.media.digest import digest_of
from asyncengine.model.media.sounds import sound_of
from asyncengine.model.speech.transcription import Hearing
from asyncengine.tokenizer import WritingTokenizer
from asyncengine.transcription import Transcribing


class SpeechReader:
    """As `asyncengine.media.MediaReader`: a prompt is one audio and the decoder's first tokens behind it.

    Args:
        key: As of the protocol.
        extractor: Of transformers: makes features of samples.
        hearing: How the model hears.
        frames: Tokens of an audio: what the encoder gives out.
        places: They, and those that fill the last block.
        token_id: What stands for a place.
        tokenizer: The model's.
        transcribing: As of the protocol.
    """

    kinds: Sequence[Kind] = ("audio",)

    def __init__(
        self,
        key: str,
        extractor: Any,
        hearing: Hearing,
        frames: int,
        places: int,
        token_id: int,
        tokenizer: WritingTokenizer,
        transcribing: Transcribing | None,
    ) -> None:
        self.key = key
        self.token_ids: Mapping[Kind, int] = {"audio": token_id}
        self.transcribing = transcribing
        self._extractor, self._hearing, self._frames, self._places = extractor, hearing, frames, places
        self._tokenizer = tokenizer

    def read(self, sources: Sources, write: Write, encode: Callable[[str], list[int]], most_tokens: int) -> ReadPrompt:
        """As the protocol says. The audio comes first; no mark stands for it."""
        given = sources["audio"]
        if len(given) != 1:
            raise InvalidRequestError(f"the prompt has {len(given)} audio; the model hears one")
        features = self._features(given[0])
        inputs = {"input_features": features}
        [token_id], count = self.token_ids.values(), self._places
        item = MediaItem("audio", digest_of("audio", inputs), inputs, np.arange(count), token_id)
        begin = write(self._tokenizer.encode_piece)  # special tokens around it are the caller's
        if not begin:
            raise InvalidRequestError("the prompt's text comes to no tokens; the decoder begins with at least one")
        return ReadPrompt([token_id] * count + begin, PromptMedia((item,), self.key, source=self._frames))

    def _features(self, source: Any) -> Any:
        rate = self._hearing.rate
        try:
            samples = sound_of(source, rate)
            if len(samples) > (most := self._hearing.samples):
                raise InvalidRequestError(
                    f"an audio of {len(samples) / rate:.2f} s is longer than the model hears at once, "
                    f"{most / rate:g} s; transcribe cuts it into pieces"
                )
            return self._extractor(samples, sampling_rate=rate, return_tensors="pt")["input_features"]
        except InvalidRequestError as error:
            raise InvalidRequestError(f"audio[0]: {error}") from error
