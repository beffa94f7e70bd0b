"""Processors whose files are damaged, or that cannot be loaded: found out before the present model goes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from asyncengine import CheckpointError, EngineConfig, UnsupportedModelError
from asyncengine.model import load_check
from asyncengine.model.loader import TransformersLoader


@pytest.mark.parametrize("content", ["{", "", "[1]", b"\xff", None])
def test_a_damaged_file_of_a_processor_is_refused_by_its_name_unless_images_are(
    content: str | bytes | None, sighted: Callable[..., Path], tmp_path: Path
) -> None:
    path = Path(shutil.copytree(sighted("qwen2_vl"), tmp_path / "damaged"))
    file = path / "processor_config.json"
    if content is None:
        file.unlink()
        file.mkdir()
    else:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    for images in (None, True):
        with pytest.raises(CheckpointError, match=r"damaged/processor_config.json (cannot be read|is a JSON list)"):
            TransformersLoader().check(EngineConfig(str(path), device="cpu", images=images), None)
    TransformersLoader().check(EngineConfig(str(path), device="cpu", images=False), None)


def test_a_processor_that_cannot_be_loaded_and_is_wanted_is_refused_before_the_present_model_goes(
    sighted: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, loader = sighted("qwen2_vl"), TransformersLoader()
    present = loader.load(loader.check(EngineConfig(str(whole), device="cpu", mode="interactive"), None))
    present.model.close()
    odd = Path(shutil.copytree(whole, tmp_path / "odd"))
    (odd / "processor_config.json").write_text('{"processor_class": "Qwen2VLProcessor", "image_processor": 5}')
    monkeypatch.setattr(load_check, "fits", lambda details, current: False)
    with pytest.raises(UnsupportedModelError, match=r"images is True; .*odd' takes none: its processor cannot"):
        loader.check(EngineConfig(str(odd), device="cpu", images=True), present)
    for path, images in ((odd, None), (whole, True)):
        assert not loader.check(EngineConfig(str(path), device="cpu", images=images), present).fits_beside
