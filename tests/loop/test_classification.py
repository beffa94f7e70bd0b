"""Requests for classes keep every promise that requests make. A token's hidden state is (token id, position, 1)."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from asyncengine import EngineConfig, GenerationConfig, InvalidRequestError, RerankPrompt
from asyncengine.classifier import Classifier
from asyncengine.loop.pairs import Pair
from asyncengine.testing import ByteTokenizer, ScriptedLoader
from tests.loop.test_embedding import PROMPT, all_is_free, held_in_the_middle, loaded

pytestmark = pytest.mark.loops("either")

WEIGHT, BIAS = np.array([[1, 0, 0], [0, 2, 5]], np.float32), np.array([0, -1], np.float32)
TWO = Classifier(WEIGHT, BIAS, ("id", "place"), "softmax")
ONE = Classifier(np.array([[1, 0, 0]], np.float32), None, ("reward",), "sigmoid")


def classifying(classifier: Classifier | None = TWO) -> ScriptedLoader:
    loader = ScriptedLoader(tokenizer=ByteTokenizer(), fits_beside=False)
    loader.classifier = classifier
    return loader


async def test_the_last_tokens_state_goes_through_the_head() -> None:
    engine = await loaded(classifying())
    long, short = await engine.classify([PROMPT, "\x05"])
    assert long.logits.tolist() == [PROMPT[-1], 2 * 99 + 5 - 1] and long.logits.dtype == np.float32
    assert (short.logits.tolist(), short.labels, short.label) == ([5, 4], ("id", "place"), "id")
    assert short.probs is not None and short.probs.tolist() == pytest.approx([0.7310586, 0.2689414])
    assert (long.usage.prompt_tokens, long.usage.completion_tokens, long.label) == (100, 0, "place")
    with pytest.raises(ValueError, match="each of 2 labels"):
        _ = short.score
    assert (await engine.embed([PROMPT], "last", normalize=False))[0].vector.tolist() == [PROMPT[-1], 99, 1]
    await all_is_free(engine)
    await engine.shutdown()


async def test_a_conversation_is_written_without_another_turn() -> None:
    engine = await loaded(loader := classifying(ONE))
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    written: list[object] = []

    class Tokenizer(ByteTokenizer):
        def encode_chat(self, messages, template_arguments):  # type: ignore[no-untyped-def]
            written.append(template_arguments)
            return [7]

    loader.tokenizer = Tokenizer()
    await engine.reload(EngineConfig("b"))
    (found,) = await engine.classify([messages])
    assert (found.score, found.label) == (7.0, "reward")
    await engine.classify([messages], add_generation_prompt=True, thinking=False)
    assert written == [{"add_generation_prompt": False}, {"add_generation_prompt": True, "thinking": False}]
    with pytest.raises(InvalidRequestError, match=r"thinking given; .* for conversations alone"):
        await engine.classify(["a"], thinking=False)
    await engine.shutdown()


async def test_what_a_model_has_no_head_for_is_refused_before_it_is_admitted() -> None:
    engine = await loaded(loader := classifying())
    with pytest.raises(InvalidRequestError, match="'a' can only embed and classify"):
        await engine.generate("a")
    with pytest.raises(InvalidRequestError, match="can only embed and classify"):
        await engine.score(["a"])
    loader.classifier = None
    await engine.reload(EngineConfig("b"))
    with pytest.raises(InvalidRequestError, match=r"'b' cannot classify: .* generate and rerank need none"):
        await engine.classify(["a"])
    with pytest.raises(InvalidRequestError, match="expected a list of prompts"):
        await engine.classify("a")
    assert engine.metrics().counters.requests == {"stop": 0, "length": 0, "abort": 0, "error": 0}
    await engine.shutdown()


async def test_a_cancelled_caller_ends_its_requests() -> None:
    engine = await loaded(loader := classifying())
    loader.model.hold()
    task = asyncio.ensure_future(engine.classify([PROMPT, PROMPT]))
    await held_in_the_middle(engine, loader.model)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    loader.model.release()
    await all_is_free(engine)
    assert engine.metrics().counters.requests["abort"] == 2
    await engine.shutdown()


@pytest.mark.parametrize("other", [ONE, None])
async def test_requests_that_are_carried_over_meet_the_new_models_head_or_end(other: Classifier | None) -> None:
    engine = await loaded(loader := classifying())
    first = loader.model
    first.hold()
    task = asyncio.ensure_future(engine.classify([PROMPT]))
    await held_in_the_middle(engine, first)
    loader.classifier = other
    reloading = asyncio.ensure_future(engine.reload(EngineConfig("b", prefill_chunk_size=16), "carry"))
    await asyncio.sleep(0)
    first.release()
    await reloading
    if other is None:
        with pytest.raises(InvalidRequestError, match="the new model has no classification head"):
            await task
    else:
        (found,) = await task
        assert (found.labels, found.score) == (("reward",), PROMPT[-1])
    await engine.shutdown()


class Pairing(ByteTokenizer):
    """Two texts are one behind the other."""

    def encode_texts(self, texts: Sequence[str], most: int | None = None) -> tuple[list[int], int | None]:
        return self.encode("".join(texts)), len(texts[0])


@pytest.mark.parametrize("takes_pairs", [True, False])
async def test_pairs_that_are_carried_over_meet_a_model_that_takes_them_or_end(takes_pairs: bool) -> None:
    loader = classifying(ONE)
    loader.tokenizer, loader.takes_pairs = Pairing(), True
    engine = await loaded(loader)
    first = loader.model
    first.hold()
    task = asyncio.ensure_future(engine.relevances([("a" * 60, "b" * 40)]))
    await held_in_the_middle(engine, first)
    loader.takes_pairs = takes_pairs
    reloading = asyncio.ensure_future(engine.reload(EngineConfig("b", prefill_chunk_size=16), "carry"))
    await asyncio.sleep(0)
    first.release()
    await reloading
    if takes_pairs:
        assert [each.logit for each in await task] == [ord("b")]
    else:
        with pytest.raises(InvalidRequestError, match="the new model takes no pairs of texts"):
            await task
    await all_is_free(engine)
    await engine.shutdown()


async def test_generation_that_is_carried_over_to_a_classifier_ends() -> None:
    engine = await loaded(loader := classifying(None))
    first = loader.model
    first.hold()
    task = asyncio.ensure_future(engine.generate(PROMPT, GenerationConfig(max_tokens=5)))
    await held_in_the_middle(engine, first)
    loader.classifier = TWO
    reloading = asyncio.ensure_future(engine.reload(EngineConfig("b", prefill_chunk_size=16), "carry"))
    await asyncio.sleep(0)
    first.release()
    await reloading
    with pytest.raises(InvalidRequestError, match="the new model has no language-model head"):
        await task
    await engine.shutdown()


async def test_requests_that_wait_for_another_model_meet_that_one() -> None:
    engine = await loaded(loader := classifying(None))
    loader.classifier, loader.gate = ONE, threading.Event()
    reloading = asyncio.ensure_future(engine.reload(EngineConfig("b")))
    while not loader.model.closed:
        await engine.abort_request("nobody")
    waiting = asyncio.gather(engine.generate(PROMPT), engine.classify([PROMPT]), return_exceptions=True)
    await asyncio.sleep(0)
    loader.gate.set()
    await reloading
    generated, classified = await waiting
    assert isinstance(generated, InvalidRequestError) and "can only embed and classify" in str(generated)
    assert not isinstance(classified, BaseException) and classified[0].score == PROMPT[-1]
    await engine.shutdown()


async def test_a_head_of_one_label_ranks_documents() -> None:
    engine = await loaded(classifying(ONE))
    how = RerankPrompt(template="q: {query}\nd: {document}")
    found = await engine.rerank("{document}", ["1", "3", "2", "3"], how)
    assert [(each.index, each.logit) for each in found] == [(1, 51.0), (3, 51.0), (2, 50.0), (0, 49.0)]
    assert found[0].score == pytest.approx(1.0) and found[0].usage.prompt_tokens == len("q: {document}\nd: 1")
    with pytest.raises(InvalidRequestError, match="'a' does not say how it ranks"):
        await engine.rerank("a", ["b"])
    with pytest.raises(InvalidRequestError, match="yes is 'y'; 'a' has a classification head"):
        await engine.rerank("a", ["b"], RerankPrompt(yes="y", no="n"))
    for wrong, words in (
        ((1, ["b"]), r"pairs has \(1, 'b'\); expected a query and a document"),
        (("a", "b"), "documents is 'b'"),
        (("a", [1]), r"pairs has \('a', 1\)"),
    ):
        with pytest.raises(InvalidRequestError, match=words):
            await engine.rerank(*wrong, how)  # type: ignore[arg-type]
    await engine.shutdown()


def test_a_pair_is_written_as_the_model_says_that_it_is_prepared_for() -> None:
    """Another model may have been loaded since the caller asked."""
    pair = Pair("a", "b", None, None)
    for template in ("old: {query} {document}", "new: {query} {document}"):
        view: Any = SimpleNamespace(
            ranking=RerankPrompt(template=template, yes="y", no="n"), classifier=None, tokenizer=ByteTokenizer(),
            config=EngineConfig("m"), takes_pairs=False,
        )  # fmt: skip
        ids, second = pair.encoded(view)
        assert second is None
        assert bytes(ids).decode() == template.format(query="a", document="b")


async def test_a_scripted_model_says_yes_or_no() -> None:
    loader = ScriptedLoader(lambda prompt, _: list(b"yes" if ord("y") in prompt else b"no"), tokenizer=ByteTokenizer())
    engine = await loaded(loader)
    how = RerankPrompt(template="{query} {document}", yes="y", no="n")
    found = await engine.rerank("a", ["b", "y", "c"], how)
    assert [(each.index, each.logit) for each in found] == [(1, 1.0), (0, -1.0), (2, -1.0)]
    assert [each.score for each in await engine.relevances([("a", "b"), ("a", "y")], how)] == pytest.approx(
        [1 / (1 + np.e), np.e / (1 + np.e)]
    )
    await engine.shutdown()


async def test_a_head_of_several_labels_ranks_none() -> None:
    engine = await loaded(classifying())
    with pytest.raises(InvalidRequestError, match="'a' cannot rank: its head has 2 labels"):
        await engine.rerank("a", ["b"], RerankPrompt(template="{query}{document}"))
    await engine.shutdown()
