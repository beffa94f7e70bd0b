"""What was encoded is kept for a while."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from asyncengine.media import MediaFailure, MediaItem
from asyncengine.model.media.encoder import MediaEncoder
from asyncengine.model.media.preparation import ImagePreparation
from asyncengine.model.media.processor import processor
from asyncengine.model.media.reader import ProcessedMediaReader
from tests.model.media.checkpoints import load, picture


def encoder_and_images(path: Path, budget: int) -> tuple[MediaEncoder, list[MediaItem]]:
    model, prepares = load(path), processor(path)
    reader = ProcessedMediaReader([ImagePreparation(prepares, model.config.image_token_id)], "")
    encode = prepares.tokenizer.encode
    pictures = [picture(1, 48, 32), picture(2, 40, 24)]
    read = [
        reader.read({"image": [each]}, lambda write: write(reader.marks["image"]), encode, 999).media.items[0]
        for each in pictures
    ]
    return MediaEncoder(model, reader.token_ids, torch.device("cpu"), budget), read


def test_as_many_tokens_of_images_as_may_be_are_kept_and_one_image_always(sighted: Callable[..., Path]) -> None:
    encoder, (first, second) = encoder_and_images(sighted("qwen3_vl"), budget=40)
    assert (len(first.places), len(second.places)) == (24, 15)
    for image in (first, second, first, second):
        assert len(encoder.features(image).rows) == len(image.places)
    assert encoder.encoded == 2
    encoder.clear()
    encoder.features(first)
    assert encoder.encoded == 3

    small, images = encoder_and_images(sighted("qwen3_vl"), budget=30)
    for image in (images[0], images[0], images[1], images[0]):
        small.features(image)
    assert small.encoded == 3


def test_an_error_of_the_encoder_says_of_which_image(
    sighted: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, (first, _) = encoder_and_images(sighted("qwen3_vl"), budget=40)

    def fail(*arguments: Any, **keywords: Any) -> None:
        raise IndexError("no such position")

    monkeypatch.setitem(encoder._look, "image", fail)
    with pytest.raises(MediaFailure, match="an image cannot be encoded: no such position") as caught:
        encoder.features(first)
    assert caught.value.digest == first.digest
    monkeypatch.undo()
    assert len(encoder.features(first).rows) == 24
