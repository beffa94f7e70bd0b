"""The server's routes over encoders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from asyncengine import AsyncEngine
from tests.model.encoders.checkpoints import logits, states
from tests.model.encoders.test_engine import LONG, PAIRS, QUERY, TEXTS, config
from tests.server.serving import error, served

pytestmark = pytest.mark.loops("either")


async def test_vectors(encoder: Callable[..., Path]) -> None:
    path = encoder("bert")
    async with served(AsyncEngine(config(path))) as client:
        asked = {"input": TEXTS, "pooling": "cls", "normalize": False}
        items = (await client.post("/v1/embeddings", json=asked)).json()["data"]
        for item, hidden in zip(items, states(path, TEXTS), strict=True):
            np.testing.assert_allclose(item["embedding"], hidden[0].numpy(), rtol=2e-5, atol=2e-5)
        long = await client.post("/v1/embeddings", json={"input": LONG})
        assert long.status_code == 400 and error(long)["code"] == "context_length_exceeded"
        cut = await client.post("/v1/embeddings", json={"input": LONG, "truncate_prompt_tokens": -1})
        assert cut.json()["usage"]["prompt_tokens"] == 64
        chat = await client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "a"}]})
        assert chat.status_code == 400


async def test_classes_scores_and_ranks(encoder: Callable[..., Path]) -> None:
    path = encoder("roberta", 1)
    expected = [float(each) for each in logits(path, PAIRS)]
    async with served(AsyncEngine(config(path))) as client:
        asked = {"text_1": QUERY, "text_2": TEXTS, "use_activation": False}
        scores = (await client.post("/score", json=asked)).json()["data"]
        assert [item["score"] for item in scores] == pytest.approx(expected, rel=1e-4, abs=1e-5)
        ranked = (await client.post("/rerank", json={"query": QUERY, "documents": TEXTS, "top_n": 2})).json()["results"]
        best = sorted(range(len(TEXTS)), key=lambda index: -expected[index])[:2]
        assert [item["index"] for item in ranked] == best
        long = {"query": QUERY, "documents": [LONG], "truncate_prompt_tokens": 40}
        assert (await client.post("/rerank", json=long)).json()["usage"]["total_tokens"] == 40
        told = await client.post("/rerank", json={"query": QUERY, "documents": TEXTS, "instruction": "find"})
        assert told.status_code == 400 and error(told)["param"] == "instruction"
    async with served(AsyncEngine(config(encoder("bert", 3)))) as client:
        found = (await client.post("/classify", json={"input": TEXTS, "use_activation": False})).json()["data"]
        for item, row in zip(found, logits(encoder("bert", 3), TEXTS), strict=True):
            np.testing.assert_allclose(item["probs"], row.numpy(), rtol=2e-5, atol=2e-5)
