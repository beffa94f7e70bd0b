"""The routes of models that classify and rank. A token's hidden state is (token id, position, 1)."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest

from asyncengine import AsyncEngine, EngineConfig
from asyncengine.classifier import Classifier
from asyncengine.reranking import RerankPrompt
from asyncengine.testing import ByteTokenizer, ScriptedLoader
from tests.loop.test_classification import ONE, TWO
from tests.server.serving import MODEL, error, served

pytestmark = pytest.mark.loops("either")

HOW = RerankPrompt(template="{query}?{document}", instruction=None)
TOLD = RerankPrompt(template="{query}?{instruction}{document}")


def classifier_engine(classifier: Classifier | None) -> AsyncEngine:
    loader = ScriptedLoader(tokenizer=ByteTokenizer())
    loader.classifier = classifier
    return AsyncEngine(EngineConfig(MODEL), loader=loader)


async def test_classes_of_texts_of_token_ids_and_of_a_conversation() -> None:
    async with served(classifier_engine(TWO)) as client:
        for given, count in (("\x05", 1), ([5], 1), (["\x05", "b"], 2), ([[5], [98]], 2)):
            answer = await client.post("/classify", json={"model": MODEL, "input": given, "user": "me"})
            assert answer.status_code == 200 and answer.headers["x-ignored-fields"] == "user"
            found = answer.json()
            assert found["id"].startswith("classify-") and (found["object"], found["model"]) == ("list", MODEL)
            assert [item["index"] for item in found["data"]] == list(range(count))
            first = found["data"][0]
            assert (first["label"], first["num_classes"]) == ("id", 2)
            assert first["probs"] == pytest.approx([0.7310586, 0.2689414])
            assert found["usage"] == {"prompt_tokens": count, "total_tokens": count}
        raw = await client.post("/classify", json={"input": "\x05", "use_activation": False})
        assert raw.json()["data"][0]["probs"] == [5.0, 4.0]
        said = await client.post("/classify", json={"messages": [{"role": "user", "content": "a"}]})
        assert said.json()["usage"]["prompt_tokens"] == len("user: a\nassistant: ")


async def test_scores_of_pairs_and_of_one_text_with_many() -> None:
    async with served(classifier_engine(ONE), rerank_prompt=HOW) as client:
        for names in (("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2")):
            for one, other in (("q", ["1", "2"]), (["q"], ["1", "2"]), (["q", "r"], ["1", "2"])):
                answer = await client.post("/score", json={names[0]: one, names[1]: other, "use_activation": False})
                found = answer.json()
                assert found["id"].startswith("score-") and (found["object"], found["model"]) == ("list", MODEL)
                assert found["data"] == [
                    {"index": 0, "score": 49.0, "object": "score"}, {"index": 1, "score": 50.0, "object": "score"},
                ]  # fmt: skip
                assert found["usage"] == {"prompt_tokens": 6, "total_tokens": 6}
        one = await client.post("/v1/score", json={"text_1": "q", "text_2": "\x02"})
        assert one.json()["data"][0]["score"] == pytest.approx(1 / (1 + math.exp(-2)))


async def test_documents_come_ranked() -> None:
    async with served(classifier_engine(ONE), rerank_prompt=HOW) as client:
        for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
            body: dict[str, Any] = {"query": "q", "documents": ["\x01", {"text": "\x03"}, "\x02"]}
            found = (await client.post(path, json=body)).json()
            assert found["id"].startswith("rerank-") and found["model"] == MODEL
            assert [(each["index"], each["document"]["text"]) for each in found["results"]] == [
                (1, "\x03"), (2, "\x02"), (0, "\x01"),
            ]  # fmt: skip
            assert found["results"][0]["relevance_score"] == pytest.approx(1 / (1 + math.exp(-3)))
            assert found["usage"] == {"prompt_tokens": 9, "total_tokens": 9}
        few = await client.post(
            "/rerank", json={**body, "top_n": 1, "return_documents": False, "use_activation": False}
        )
        assert few.json()["results"] == [{"index": 1, "relevance_score": 3.0}]


async def test_what_is_wrong_is_refused_by_name() -> None:
    wrong: list[tuple[str, dict[str, Any], str]] = [
        ("/classify", {}, "input"), ("/classify", {"input": "a", "messages": []}, "input"),
        ("/classify", {"messages": []}, "messages"), ("/classify", {"input": [99999]}, "input"),
        ("/classify", {"input": "a", "add_generation_prompt": True}, "add_generation_prompt"),
        ("/classify", {"input": ["a"] * 2049}, "input"), ("/classify", {"input": "a", "softmax": True}, "softmax"),
        ("/classify", {"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ("/score", {"text_1": "a"}, "text_1"), ("/score", {"text_1": "a", "documents": "b"}, "text_1"),
        ("/score", {"text_1": ["a", "b"], "text_2": ["c"]}, "text_1"),
        ("/score", {"queries": [], "items": "b"}, "queries"),
        ("/score", {"text_1": "a", "text_2": [1]}, "text_2[0]"),
        ("/rerank", {"query": "a", "documents": []}, "documents"), ("/rerank", {"documents": ["a"]}, "query"),
        ("/rerank", {"query": "a", "documents": ["b"], "top_n": -1}, "top_n"),
        ("/rerank", {"query": "a", "documents": ["b"], "instruction": "x"}, "instruction"),
        ("/rerank", {"query": "a", "documents": ["b"], "max_tokens_per_doc": 5}, "max_tokens_per_doc"),
    ]  # fmt: skip
    async with served(classifier_engine(ONE), rerank_prompt=HOW) as client:
        for path, body, param in wrong:
            refused = await client.post(path, json=body)
            assert refused.status_code == 400 and error(refused)["param"] == param, (body, refused.text)
        assert (await client.post("/classify", json={"input": "a", "model": "other"})).status_code == 404


async def test_an_instruction_goes_where_the_prompt_has_a_place_for_it() -> None:
    async with served(classifier_engine(ONE), rerank_prompt=TOLD) as client:
        body = {"query": "q", "documents": ["d"], "instruction": "find"}
        assert (await client.post("/rerank", json=body)).json()["usage"]["prompt_tokens"] == len("q?findd")


async def test_a_model_that_cannot_says_so() -> None:
    async with served(classifier_engine(None)) as client:
        for path, body, words in (
            ("/classify", {"input": "a"}, "cannot classify"),
            ("/score", {"text_1": "a", "text_2": "b"}, "does not say how it ranks"),
            ("/rerank", {"query": "a", "documents": ["b"]}, "does not say how it ranks"),
        ):
            refused = await client.post(path, json=body)
            assert refused.status_code == 400 and words in error(refused)["message"]
    async with served(classifier_engine(TWO)) as client:
        refused = await client.post("/v1/completions", json={"prompt": "a"})
        assert refused.status_code == 400 and "can only embed and classify" in error(refused)["message"]


async def test_an_aborted_request_is_a_503() -> None:
    engine = classifier_engine(ONE)
    async with served(engine) as client:
        await engine.pause()
        asked = asyncio.ensure_future(client.post("/classify", json={"input": "a"}))
        while not engine.metrics().num_requests_waiting:
            await engine.abort_request("nobody")
        await engine.reset()
        await engine.resume()
        answer = await asked
        assert answer.status_code == 503 and "retry-after" in answer.headers
