"""transformers alone runs the tiny checkpoints, and what they say depends on what they see."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from asyncengine.model.media.processor import without_torchvision
from tests.model import checkpoints as text_checkpoints
from tests.model import letters
from tests.model.media.checkpoints import inputs, loaded, picture, processor, reference

SOME = ("qwen3_vl", "llava", "gemma3", "idefics2", "granite4_vision", "ovis2", "ernie4_5_vl_moe")
"""Of each kind one, and those that the engine refuses; to the others it is compared."""

CONVERSATION: list[dict[str, Any]] = [
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "Look: "},
            {"type": "image"},
            {"type": "text", "text": " and "},
            {"type": "image"},
            {"type": "text", "text": " which?"},
        ],
    }
]


@pytest.mark.parametrize("architecture", SOME)
@pytest.mark.in_short("granite4_vision", "llava", "qwen3_vl", "idefics2")
def test_what_is_said_depends_on_what_is_seen(architecture: str, sighted: Callable[..., Path]) -> None:
    path = sighted(architecture)
    seen = [picture(1, 48, 32), picture(2, 40, 24)]
    tokens = reference(path, CONVERSATION, seen, 8)
    assert len(tokens) == 8
    assert len(set(tokens)) > 1

    model = loaded(path)
    with torch.inference_mode():
        logits = model(**inputs(path, CONVERSATION, seen)).logits[0, -1]
        other = model(**inputs(path, CONVERSATION, [picture(3, 48, 32), seen[1]])).logits[0, -1]
    assert int(logits.argmax()) == tokens[0]
    assert (logits - other).abs().max() > 0.1 * logits.std()


@pytest.mark.parametrize("architecture", SOME)
def test_text_alone_needs_no_image(architecture: str, sighted: Callable[..., Path]) -> None:
    given = inputs(sighted(architecture), [{"role": "user", "content": "Hé!"}], [])
    assert "pixel_values" not in given
    assert max(given["input_ids"][0]) <= 256


def test_without_torchvision_a_processor_sees_images_the_same(sighted: Callable[..., Path]) -> None:
    path = sighted("qwen3_vl")
    sighted = without_torchvision(transformers.Qwen3VLProcessor, path)
    assert isinstance(sighted, transformers.Qwen3VLProcessor)
    assert sighted.video_processor.patch_size == 4
    assert sighted.video_processor.fps == 2

    seen = [picture(1, 48, 32), picture(2, 40, 24)]
    given = sighted.apply_chat_template(
        [{"role": "user", "content": [{"type": "image", "image": image} for image in seen]}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    expected = inputs(path, [{"role": "user", "content": [{"type": "image"}] * 2}], seen)
    assert given.keys() == expected.keys()
    assert all(torch.equal(given[name], expected[name]) for name in given)


def test_files_that_say_nothing_of_videos(sighted: Callable[..., Path], tmp_path: Path) -> None:
    path = shutil.copytree(sighted("qwen2_vl"), tmp_path / "silent")
    settings = json.loads((path / "processor_config.json").read_text())
    del settings["video_processor"]
    (path / "processor_config.json").write_text(json.dumps(settings))
    assert isinstance(processor(path), transformers.Qwen2VLProcessor)


def test_a_checkpoint_of_text_has_no_image_processor(tmp_path: Path) -> None:
    path = text_checkpoints.write(tmp_path / "text", "llama")
    letters.write(path)
    with pytest.raises(ValueError, match="has no image processor"):
        processor(path)
