"""`EncoderDecoderModel`: what the step thread steps where a decoder attends to a source. Owned by the step thread."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from asyncengine.generation import SamplingParams
from asyncengine.media import Kind, MediaItem
from asyncengine.model.encoder_decoder.layers import SourceLayers
from asyncengine.model.encoder_decoder.parting import of_text
from asyncengine.model.encoder_decoder.parts import Biases
from asyncengine.model.media.encoder import Features, MediaEncoder
from asyncengine.model.runner import TorchModel
from asyncengine.step.batch import NO_PAIRS, Int32, StepBatch, StepTokens

_NO_TOKENS = np.empty(0, dtype=np.int32)


class SourceEncoder(MediaEncoder):
    """As `MediaEncoder`: a row of its output for each place of a source; the last ones, in which nothing is, are zero.

    Args:
        model: With its weights; has an ``encoded`` that makes (tokens, hidden) of what it takes.
        kind: Of its sources.
        wanted: What it takes, by name.
        device: Where it is.
        budget: Places whose rows are kept for steps to come.
    """

    def __init__(self, model: Any, kind: Kind, wanted: Sequence[str], device: torch.device, budget: int) -> None:
        super().__init__(model, {}, device, budget)
        self._wanted[kind] = dict.fromkeys(wanted)

    def _made(self, given: dict[str, Any], item: MediaItem) -> Features:
        rows = self._model.encoded(**given)
        return Features(torch.nn.functional.pad(rows, (0, 0, 0, len(item.places) - len(rows))))


class EncoderDecoderModel:
    """As `asyncengine.step.model.Model`, over a decoder that attends to a source.

    What a step has of sources is encoded and written first. What it has of the decoder's own tokens is a step like any.

    Args:
        text: Steps the decoder.
        sources: Its layers that attend to sources.
        biases: What the others add to scores.
        encoder: Of sources.
        page_size: Tokens to a block.
    """

    def __init__(
        self, text: TorchModel, sources: SourceLayers, biases: Biases, encoder: SourceEncoder, page_size: int
    ) -> None:
        self._text = text
        self._sources: SourceLayers | None = sources
        self._biases: Biases | None = biases
        self._encoder = encoder
        self._page_size = page_size

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
        assert self._sources is not None
        return dataclasses.replace(drawn, attention=self._sources.attention())

    def logits(self, batch: StepBatch) -> torch.Tensor:
        """(M, vocabulary) logits, one row for each of `batch.sample_index`."""
        text = self._begin(batch)
        with torch.inference_mode():
            return torch.empty(0, 0) if text is None else self._text.logits(text)

    def _begin(self, batch: StepBatch) -> StepBatch | None:
        """Writes what a step has of sources; returns the rest of it, if there is one."""
        assert self._sources is not None
        with torch.inference_mode():
            if len(batch.copies):  # before a block is written that one is copied from
                self._text.copy_blocks(batch.copies)
                batch = dataclasses.replace(batch, copies=NO_PAIRS)
            for part in batch.media:
                rows = self._encoder.features(part.item).rows[part.first : part.first + len(part.tokens)]
                self._sources.write(rows, batch.slot_mapping[part.tokens])
            text = of_text(batch, self._page_size)
            if text is not None:
                self._sources.begin(batch, text.attention_spans)
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
        assert self._biases is not None
        self._encoder.clear()
        self._text.update_weights(weights)
        self._biases.refresh()

    def debug_call(self, name: str, args: tuple[Any, ...]) -> list[Any]:
        """As the protocol says."""
        return self._text.debug_call(name, args)

    def close(self) -> None:
        """As the protocol says."""
        self._sources = self._biases = None
        self._encoder.clear()
        self._text.close()
