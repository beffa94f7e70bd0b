"""How prompts are computed together: found out by trying, at each load."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from asyncengine.model.encoders import packing
from asyncengine.model.encoders.kind import is_encoder
from asyncengine.model.encoders.model import EncoderModel
from asyncengine.model.loader import TransformersLoader
from tests.model.encoders.checkpoints import KINDS
from tests.model.encoders.test_engine import config

PACKED = {"bert", "roberta", "xlm-roberta", "distilbert", "electra", "albert", "modernbert", "eurobert", "gemma3"}


def loaded(path: Path) -> EncoderModel:
    loader = TransformersLoader()
    model = loader.load(loader.check(config(path), None)).model
    assert isinstance(model, EncoderModel)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_in_one_row_where_that_is_the_same_and_padded_else(kind: str, encoder: Callable[..., Path]) -> None:
    model = loaded(encoder(kind))
    assert (model._packing is not None) == (kind in PACKED)
    assert (model._padding is None) == (kind in PACKED or kind == "fnet")
    model.close()


@pytest.mark.parametrize("kind", ["modernbert", "gemma3"])
def test_a_window_that_is_another_one_is_noticed(
    kind: str, encoder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = packing.band
    monkeypatch.setattr(packing, "band", lambda length, window, device: whole(length, window + 1, device))
    model = loaded(encoder(kind))
    assert model._packing is None and model._padding is not None
    prompts = [np.arange(5, 5 + length, dtype=np.int32) for length in (30, 3)]
    together, alone = model.outputs(prompts), [model.outputs([prompt])[0] for prompt in prompts]
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    model.close()


def test_prompts_of_similar_length_are_padded_together(encoder: Callable[..., Path]) -> None:
    model = loaded(encoder("mpnet"))
    assert list(model._groups([10, 40, 30, 29, 8, 7])) == [[1, 2], [3], [0, 4], [5]]
    model.close()
    model = loaded(encoder("fnet"))
    assert list(model._groups([3, 4, 3])) == [[1], [0, 2]]
    model.close()


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({"model_type": "bert", "architectures": ["BertModel"]}, True),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, True),
        ({"model_type": "bert"}, True),
        ({"model_type": "bert", "architectures": ["BertLMHeadModel"], "is_decoder": True}, False),
        ({"model_type": "bert", "architectures": ["BertLMHeadModel"]}, False),
        ({"model_type": "llama", "architectures": ["LlamaModel"]}, False),
        ({"model_type": "qwen3", "architectures": ["Qwen3ForSequenceClassification"]}, False),
        ({"model_type": "bart", "architectures": ["BartModel"], "is_encoder_decoder": True}, False),
        ({"model_type": "gemma3_text", "architectures": ["Gemma3TextModel"]}, False),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, True),
        ({"model_type": "gemma3", "text_config": {}, "use_bidirectional_attention": True}, False),
        ({}, False),
    ],
)
def test_what_is_an_encoder(given: dict[str, Any], found: bool) -> None:
    assert is_encoder(given) is found
