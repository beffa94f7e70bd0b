"""The order of what a step does where a decoder attends to a source."""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest.mock import Mock

import numpy as np
import torch

from asyncengine.media import MediaItem, MediaPart
from asyncengine.model.encoder_decoder.model import EncoderDecoderModel
from asyncengine.model.media.encoder import Features
from tests.model.encoder_decoder.test_parting import PAGE, batch


def test_blocks_are_copied_before_a_source_is_written() -> None:
    """One that is copied from may have been given to a source of the same step."""
    item = MediaItem("audio", b"", {}, np.arange(12), 1)
    step = dataclasses.replace(
        batch([(20, 1, 10), (0, 12, 10)]),
        copies=np.array([[100, 7]]),
        media=(MediaPart(item, 0, np.arange(1, 13)),),
    )
    done = Mock()
    encoder: Any = Mock()
    encoder.features.return_value = Features(torch.zeros(12, 4))
    EncoderDecoderModel(done.text, done.sources, done.biases, encoder, PAGE).execute(step)
    assert [call[0] for call in done.mock_calls] == [
        "text.copy_blocks",
        "sources.write",
        "sources.begin",
        "text.execute",
    ]
    [[text]] = [call.args for call in done.text.execute.mock_calls]
    assert not len(text.copies) and text.token_ids.tolist() == [20]
