"""`SpeechModel`: what the step thread steps where a decoder attends to audio. Owned by the step thread."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from asyncengine.generation import SamplingParams
from asyncengine.media import Kind, MediaItem
from asyncengine.model.media.encoder import Features, MediaEncoder
from asyncengine.model.runner import TorchModel
from asyncengine.model.speech.decoder import HeardLayers, SpeechDecoder
from asyncengine.model.speech.parting import Places, of_text
from asyncengine.step.batch import NO_PAIRS, Int32, StepBatch, StepTokens

_NO_TOKENS = np.empty(0, dtype=np.int32)


class SpeechEncoder(MediaEncoder):
    """As `MediaEncoder`: a row of its output for each place of an audio; the last ones, in which nothing is, are zero.

    Args:
        model: With its weights.
        token_ids: What stands for a place.
        device: Where it is.
        budget: Places whose rows are kept for steps to come.
    """

    def __init__(self, model: SpeechDecoder, token_ids: Mapping[Kind, int], device: torch.device, budget: int) -> None:
        super().__init__(model, token_ids, device, budget)
        self._wanted["audio"] = {"input_features": None}

    def _audio(self, given: dict[str, Any], item: MediaItem) -> Features:
        rows = self._model.encoded(**given)
        return Features(torch.nn.functional.pad(rows, (0, 0, 0, len(item.places) - len(rows))))


class SpeechModel:
    """As `asyncengine.step.model.Model`, over a decoder that attends to audio.

    What a step has of audio is encoded and written first. What it has of the decoder's own tokens is a step like any.

    Args:
        text: Steps the decoder.
        heard: Its layers that attend to audio.
        encoder: Of audio.
        places: Of audio.
    """

    def __init__(self, text: TorchModel, heard: HeardLayers, encoder: SpeechEncoder, places: Places) -> None:
        self._text = text
        self._heard: HeardLayers | None = heard
        self._encoder = encoder
        self._places = places

    def place(self, slot: int, params: SamplingParams, branch: int, prompt: Int32, output: Int32) -> None:
        """As the protocol says."""
        self._text.place(slot, params, branch, prompt, output)

    def execute(self, batch: StepBatch) -> StepTokens:
        """As the protocol says."""
        text = self._begin(batch)
        if text is None:
            return StepTokens(_NO_TOKENS)
        drawn = self._text.execute(text)
        if text.attention_spans is None:
            return drawn
        assert self._heard is not None
        return dataclasses.replace(drawn, attention=self._heard.attention())

    def logits(self, batch: StepBatch) -> torch.Tensor:
        """(M, vocabulary) logits, one row for each of `batch.sample_index`."""
        text = self._begin(batch)
        with torch.inference_mode():
            return torch.empty(0, 0) if text is None else self._text.logits(text)

    def _begin(self, batch: StepBatch) -> StepBatch | None:
        """Writes what a step has of audio; returns the rest of it, if there is one."""
        assert self._heard is not None
        with torch.inference_mode():
            if len(batch.copies):  # before a block is written that one is copied from
                self._text.copy_blocks(batch.copies)
                batch = dataclasses.replace(batch, copies=NO_PAIRS)
            for part in batch.media:
                rows = self._encoder.features(part.item).rows[part.first : part.first + len(part.tokens)]
                self._heard.write(rows, batch.slot_mapping[part.tokens])
            text = of_text(batch, self._places)
            if text is not None:
                self._heard.begin(batch, text.attention_spans)
        return text

    def device_lost(self, error: BaseException) -> bool:
        """As the protocol says."""
        return self._text.device_lost(error)

    def sleep(self) -> None:
        """As the protocol says."""
        self._encoder.clear()
        self._text.sleep()

    def wake(self) -> None:
        """As the protocol says."""
        self._text.wake()

    def update_weights(self, weights: Mapping[str, Any]) -> None:
        """As the protocol says."""
        self._encoder.clear()
        self._text.update_weights(weights)

    def debug_call(self, name: str, args: tuple[Any, ...]) -> list[Any]:
        """As the protocol says."""
        return self._text.debug_call(name, args)

    def close(self) -> None:
        """As the protocol says."""
        self._heard = None
        self._encoder.clear()
        self._text.close()
