"""Compiled code multiplies where a decoder attends to a source. What it answers is compared elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from asyncengine import EngineConfig
from asyncengine.model.decoder.compiled_linear import CompiledLinear
from asyncengine.model.encoder_decoder.parts import parts_of
from asyncengine.model.loader import TransformersLoader
from tests.model.speech import checkpoints as speech
from tests.model.text_to_text import checkpoints as text


def write_text(path: Path) -> Path:
    return text.write(path, "bart", tie_word_embeddings=True, encoder_ffn_dim=48)


def write_t5(path: Path) -> Path:
    return text.write(path, "t5")


@pytest.mark.parametrize(
    ("write", "settings", "compiled"),
    [
        (write_text, {"dtype": "float32"}, {"encoder", "decoder", "head"}),
        (write_t5, {"dtype": "float32"}, {"encoder", "decoder", "head"}),
        (write_t5, {"dtype": "float32", "attention_backend": "torch"}, set()),
        (write_text, {"dtype": "float32", "attention_backend": "torch"}, set()),
        (speech.write, {"dtype": "float32"}, {"decoder", "head"}),
        (speech.write, {"dtype": "bfloat16"}, {"encoder", "decoder", "head"}),
    ],
    ids=["text", "T5", "T5, no compiled code", "no compiled code", "audio in float32", "audio"],
)
def test_what_multiplies(
    write: Callable[[Path], Path], settings: dict[str, Any], compiled: set[str], tmp_path: Path
) -> None:
    loader = TransformersLoader()
    config = EngineConfig(str(write(tmp_path)), device="cpu", max_total_sequence_length=4096, **settings)
    loaded: Any = loader.load(loader.check(config, None))
    try:
        model = loaded.model._text._model
        named = parts_of(model)
        parts = {"encoder": named.encoder, "decoder": named.decoder, "head": model.get_output_embeddings()}
        layers = {name: [each for each in part.modules() if takes_inputs(each)] for name, part in parts.items()}
        assert {name for name, own in layers.items() if all(type(each) is CompiledLinear for each in own)} == compiled
        assert not any(type(each) is CompiledLinear for name in layers.keys() - compiled for each in layers[name])
        # What it takes is what was reckoned before it was loaded; buffers and positions are a few numbers more.
        [held] = loaded.model.debug_call("weight_bytes", ())
        reckoned = loader.check(config, None).details.weight_bytes
        assert 0 <= held - reckoned < 0.1 * held
    finally:
        loaded.model.close()


def takes_inputs(module: nn.Module) -> bool:
    return hasattr(module, "in_features")
