"""How prompts are computed together: found out by trying, at each load."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from asyncengine.model.encoders import packing
from asyncengine.model.encoders.kind import is_encoder
from asyncengine.model.encoders.model import EncoderModel
from asyncengine.model.loader import TransformersLoader
from asyncengine.model.tokenizer import load_tokenizer
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


@pytest.mark.parametrize("most", [5, 64])
@pytest.mark.in_short("5")
def test_of_a_text_that_is_cut_no_more_is_looked_at_than_is_kept(most: int, encoder: Callable[..., Path]) -> None:
    """But for once, without the interpreter's lock: an encoding holds it for as long as it is long."""
    path, text = encoder("bert"), "the old cat lives in the house " * 20_000
    tokenizer: Any = load_tokenizer(path)
    backend, looked_at = tokenizer._backend, []

    class Watched:
        def __getattr__(self, name: str) -> Any:
            return getattr(backend, name)

        def encode_batch(self, texts: list[str], **settings: Any) -> Any:
            looked_at.extend(map(len, texts))
            return backend.encode_batch(texts, **settings)

    tokenizer._backend = Watched()
    ids, second = tokenizer.encode_texts([text], most)
    expected = AutoTokenizer.from_pretrained(path)(text, truncation=True, max_length=most).input_ids
    assert (ids, second) == (expected, None)
    assert 0 < max(looked_at) < 2000 < len(text)


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
        ({"model_type": ["bert"]}, False),
    ],
)
def test_what_is_an_encoder(given: dict[str, Any], found: bool) -> None:
    assert is_encoder(given) is found
