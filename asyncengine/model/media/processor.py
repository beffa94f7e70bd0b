"""Processors of models that look or listen, as transformers loads them, with torchvision and without.

transformers prepares images with torchvision where it is installed, and with Pillow where it is not and where the model
has such a variant, as nearly all have. Videos it prepares with torchvision alone, and a processor that knows of videos
is not loaded without it, even if it is only to see images. So without it, `asyncengine.model.media.video_processor` has
its video processor.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, AutoFeatureExtractor, AutoImageProcessor, AutoProcessor, AutoTokenizer

try:
    from transformers.video_processing_utils import VideoProcessorMixin
except ImportError as error:
    raise ImportError(f"images need transformers 5.24 or later; there is {transformers.__version__}") from error

from asyncengine.media import Kind
from asyncengine.model.media.preparation import listening_part
from asyncengine.model.media.video_processor import video_processor

FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json", "tokenizer_config.json")
"""Those that may name the processor's class, in the order in which they are asked."""


PARTS: dict[str, Any] = {
    "tokenizer": AutoTokenizer,
    "image_processor": AutoImageProcessor,
    "feature_extractor": AutoFeatureExtractor,
    "audio_processor": AutoFeatureExtractor,
}


def processor(path: Path, kinds: Sequence[Kind] = ("image",)) -> Any:
    """The processor of a checkpoint; where transformers has none of its video processor here, with that of this engine.

    Args:
        path: Of the checkpoint.
        kinds: What it is to prepare.

    Raises:
        ImportError: The processor needs a package that is not installed.
        OSError: A file is missing.
        ValueError: The image processor needs a package that is not installed, or the checkpoint has none.
    """
    try:
        made = AutoProcessor.from_pretrained(path, local_files_only=True)
    except (ImportError, OSError, ValueError):
        if (kind := _class(path)) is None or "video_processor" not in kind.get_attributes():
            raise
        made = without_torchvision(kind, path)
    if "image" in kinds and not hasattr(made, "image_processor"):  # of text alone, this is a tokenizer
        raise ValueError(f"{path} has no image processor")
    if "audio" in kinds and listening_part(made) is None:
        raise ValueError(f"{path} has no feature extractor of audio")
    return made


def _class(path: Path) -> Any:
    """The class of a checkpoint's processor, found where AutoProcessor finds it."""
    for file in FILES:
        if (path / file).exists():
            name = json.loads((path / file).read_text(encoding="utf-8")).get("processor_class")
            if name is not None:
                return getattr(transformers, name, None)
    configuration = type(AutoConfig.from_pretrained(path, local_files_only=True))
    return transformers.PROCESSOR_MAPPING.get(configuration)


def without_torchvision(kind: Any, path: Path) -> Any:
    """A processor of the class, made of its parts."""

    def module(name: str) -> Any:  # it looks for this class among those that are there only with torchvision
        return VideoProcessorMixin if name == "VideoProcessorMixin" else kind.get_possibly_dynamic_module(name)

    sighted: Any = type(kind.__name__, (kind,), {"get_possibly_dynamic_module": staticmethod(module)})
    settings, options = kind.get_processor_dict(path, local_files_only=True)
    return sighted.from_args_and_dict([_part(name, path) for name in kind.get_attributes()], settings, **options)


def _part(name: str, path: Path) -> Any:
    return (
        video_processor(path) if name == "video_processor" else PARTS[name].from_pretrained(path, local_files_only=True)
    )
