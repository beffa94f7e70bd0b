"""Processors of models that look at images, as transformers loads them, where torchvision is and where it is not.

transformers prepares images with torchvision where it is installed, and with Pillow where it is not and where the model
has such a variant, as nearly all have. Videos it prepares with torchvision alone, and a processor that knows of videos
is not loaded without it, even if it is only to see images.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, AutoFeatureExtractor, AutoImageProcessor, AutoProcessor, AutoTokenizer
from transformers.utils import is_torchvision_available
from transformers.video_processing_utils import VideoProcessorMixin

FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json", "tokenizer_config.json")
"""Those that may name the processor's class, in the order in which they are asked."""

PARTS: dict[str, Any] = {
    "tokenizer": AutoTokenizer,
    "image_processor": AutoImageProcessor,
    "feature_extractor": AutoFeatureExtractor,
    "video_processor": VideoProcessorMixin,  # has the settings of a video processor, and sees no video
}


def processor(path: Path) -> Any:
    """The processor of a checkpoint; without torchvision, one that knows of videos only what it is told of them.

    Raises:
        ImportError: The checkpoint's processor needs a package that is not installed.
        ValueError: Its image processor does, or it has no processor.
    """
    try:
        return AutoProcessor.from_pretrained(path, local_files_only=True)
    except (ImportError, ValueError):
        if is_torchvision_available():
            raise
        if (kind := _class(path)) is None or "video_processor" not in kind.get_attributes():
            raise
    return _blind_to_videos(kind, path)


def _class(path: Path) -> Any:
    """The class of a checkpoint's processor, found where AutoProcessor finds it."""
    for file in FILES:
        if (path / file).exists():
            name = json.loads((path / file).read_text(encoding="utf-8")).get("processor_class")
            if name is not None:
                return getattr(transformers, name, None)
    configuration = type(AutoConfig.from_pretrained(path, local_files_only=True))
    return transformers.PROCESSOR_MAPPING.get(configuration)


def _blind_to_videos(kind: Any, path: Path) -> Any:
    """A processor whose video processor is the part of one that needs no torchvision."""

    def module(name: str) -> Any:  # transformers looks for this class where it is only with torchvision
        return VideoProcessorMixin if name == "VideoProcessorMixin" else kind.get_possibly_dynamic_module(name)

    blind = type(kind.__name__, (kind,), {"get_possibly_dynamic_module": staticmethod(module)})
    parts = [PARTS[name].from_pretrained(path, local_files_only=True) for name in kind.get_attributes()]
    settings, options = kind.get_processor_dict(path, local_files_only=True)
    return blind.from_args_and_dict(parts, settings, **options)
