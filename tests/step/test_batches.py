"""What a step's batch says of images that are attended to as a whole."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from asyncengine.step.batch import StepBatch
from asyncengine.testing import ScriptedLoader, ScriptedMediaReader

from .core_case import Case


def test_reach_of_rows_with_and_without_images(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(ScriptedLoader(takes_images=True))
    case.load(prefill_chunk_size=64)
    steps: list[StepBatch] = []
    execute = case.model.execute

    def watched(batch: StepBatch) -> object:
        steps.append(batch)
        return execute(batch)

    monkeypatch.setattr(case.model, "execute", watched)
    case.add("decodes", max_tokens=5)
    case.core.step(list)
    expected = [[8]]
    for text, whole in (("a\0bc\0d", True), ("\0ef", False)):
        images = [b"one", b"two"][: text.count("\0")]
        read = ScriptedMediaReader(whole).read(
            {"image": images}, lambda encode, text=text: encode(text), lambda piece: list(piece.encode()), 100
        )
        new = dataclasses.replace(case.new(read.token_ids, max_tokens=1), media=read.media)
        case.give(case.adding(new))
        reach = np.arange(1, len(read.token_ids) + 1)
        for image in read.media.items if whole else ():
            assert len(image.places) > 1
            reach[image.places] = image.places[-1] + 1
        expected.append(reach.tolist())
    case.add("text", max_tokens=1)
    case.core.step(list)
    case.core.step(list)
    alone, mixed, after = steps
    assert alone.reach is None and after.reach is None
    assert mixed.reach is not None and mixed.reach.dtype == np.int32
    rows = np.split(mixed.reach, mixed.query_start[1:-1])
    assert [row.tolist() for row in rows] == [*expected, [1, 2, 3, 4]]
