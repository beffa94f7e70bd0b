"""transformers alone runs the tiny checkpoints, and what they say depends on what they see."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.model.vision.checkpoints import VISION, inputs, load, picture, reference, runs, write

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


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    written: dict[str, Path] = {}

    def get(architecture: str) -> Path:
        if not runs(architecture):
            pytest.skip(f"needs {' and '.join(VISION[architecture].needs)}")
        if architecture not in written:
            written[architecture] = write(tmp_path_factory.mktemp(architecture), architecture)
        return written[architecture]

    return get


@pytest.mark.parametrize("architecture", VISION)
def test_what_is_said_depends_on_what_is_seen(architecture: str, checkpoint: Callable[[str], Path]) -> None:
    path = checkpoint(architecture)
    seen = [picture(1, 48, 32), picture(2, 40, 24)]
    tokens = reference(path, CONVERSATION, seen, 8)
    assert len(tokens) == 8
    assert len(set(tokens)) > 1

    model = load(path)
    with torch.inference_mode():
        logits = model(**inputs(path, CONVERSATION, seen)).logits[0, -1]
        other = model(**inputs(path, CONVERSATION, [picture(3, 48, 32), seen[1]])).logits[0, -1]
    assert int(logits.argmax()) == tokens[0]
    assert (logits - other).abs().max() > 0.1 * logits.std()


@pytest.mark.parametrize("architecture", VISION)
def test_text_alone_needs_no_image(architecture: str, checkpoint: Callable[[str], Path]) -> None:
    given = inputs(checkpoint(architecture), [{"role": "user", "content": "Hé!"}], [])
    assert "pixel_values" not in given
    assert max(given["input_ids"][0]) <= 256
