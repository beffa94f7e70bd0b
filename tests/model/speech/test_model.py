"""The order of what a step does where a decoder attends to audio."""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest.mock import Mock

import numpy as np
import torch

from asyncengine.media import MediaItem, MediaPart
from asyncengine.model.media.encoder import Features
from asyncengine.model.speech.model import SpeechModel
from tests.model.speech.test_parting import PLACES, batch


def test_blocks_are_copied_before_audio_is_written() -> None:
    """One that is copied from may have been given to an audio of the same step."""
    item = MediaItem("audio", b"", {}, np.arange(PLACES.count), 1)
    step = dataclasses.replace(
        batch([(20, 1), (0, PLACES.count)]),
        copies=np.array([[100, 7]]),
        media=(MediaPart(item, 0, np.arange(1, 1 + PLACES.count)),),
    )
    done = Mock()
    encoder: Any = Mock()
    encoder.features.return_value = Features(torch.zeros(PLACES.count, 4))
    SpeechModel(done.text, done.heard, encoder, PLACES).execute(step)
    assert [call[0] for call in done.mock_calls] == ["text.copy_blocks", "heard.write", "heard.begin", "text.execute"]
    [[text]] = [call.args for call in done.text.execute.mock_calls]
    assert not len(text.copies) and text.token_ids.tolist() == [20]
