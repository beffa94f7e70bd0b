"""Encoders say what they say in transformers: vectors, classes, relevances."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging as transformers_logging

from asyncengine import AsyncEngine, EngineConfig, EngineState, GenerationConfig, RequestOptions
from asyncengine.errors import (
    CheckpointError,
    ConfigError,
    ContextLengthExceededError,
    InvalidRequestError,
    ReloadError,
    RequestDroppedError,
    UnsupportedModelError,
)
from asyncengine.loop.embedding import ClassificationOptions, EmbeddingOptions
from asyncengine.loop.pairs import Pair
from asyncengine.loop.prepare import Purpose
from asyncengine.model.encoders import loading as encoders_loading
from asyncengine.outputs import FinishReason
from asyncengine.reranking import RerankPrompt
from tests.model.encoders.checkpoints import KINDS, WITH_HEADS, logits, states, tokenizer_of

pytestmark = pytest.mark.loops("either")

TEXTS = [
    "the cat is in the house", "a", "who lives in paris ?", "unable dogs running , some", "the cat lives in the house",
    "the old king of france was in rome and some dog eats the red tree in the river of the house",
]  # fmt: skip
QUERY = "what is the capital of italy ?"
PAIRS = [(QUERY, text) for text in TEXTS]
HEADS = tuple(kind for kind in WITH_HEADS if kind not in ("xlm-roberta", "electra"))  # whose heads are RoBERTa's
ALONE = GenerationConfig(max_tokens=0, detokenize=False)
LONG = " ".join(itertools.islice(itertools.cycle(["the", "old", "dog", "eats", "a", "small", "tree", "."]), 90))


def config(path: Path, **settings: Any) -> EngineConfig:
    return EngineConfig(str(path), **{"max_num_sequence": 4, "prefill_chunk_size": 24, **settings})


def near(found: Any, expected: torch.Tensor, tolerance: float = 2e-5) -> None:
    np.testing.assert_allclose(found, expected.numpy(), rtol=tolerance, atol=tolerance)


AS_HEADS = {"albert", "deberta-v2", "distilbert", "esm", "eurobert", "mpnet"}
"""Those of which heads say below that their numbers are right; pooling is alike for all."""


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.long if kind in AS_HEADS else ()) for kind in KINDS]
)
@pytest.mark.in_short("gemma3", "bert", "fnet", "modernbert")
async def test_vectors_are_those_of_transformers(kind: str, encoder: Callable[..., Path]) -> None:
    path = encoder(kind)
    expected = states(path, TEXTS)
    async with AsyncEngine(config(path)) as engine:
        for pooling, pool in (("mean", lambda s: s.mean(0)), ("cls", lambda s: s[0]), ("last", lambda s: s[-1])):
            found = await engine.embed(TEXTS, pooling, normalize=False)  # type: ignore[arg-type]
            for each, hidden in zip(found, expected, strict=True):
                near(each.vector, pool(hidden))
                assert each.usage.prompt_tokens == len(hidden)
        notes = engine.health().notes
        assert notes == (("encoder: padding changes what it says: prompts of one length at a time",) * (kind == "fnet"))
        assert engine.metrics().kv_blocks_used == 0


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.in_short("deberta-v2", "albert", "esm", "distilbert", "modernbert", "bert")
async def test_heads_say_what_they_say_in_transformers(kind: str, encoder: Callable[..., Path]) -> None:
    path = encoder(kind, 3, id2label={0: "no", 1: "perhaps", 2: "yes"})
    asked = [*TEXTS, *PAIRS]
    async with AsyncEngine(config(path)) as engine:
        for each, expected in zip(await engine.classify(asked), logits(path, asked), strict=True):
            near(each.logits, expected)
            assert each.probs is not None
            near(each.probs, expected.softmax(-1))
            assert each.label == ("no", "perhaps", "yes")[int(expected.argmax())]


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta"])
async def test_a_head_of_one_label_ranks(kind: str, encoder: Callable[..., Path]) -> None:
    path = encoder(kind, 1)
    expected = logits(path, PAIRS)
    async with AsyncEngine(config(path)) as engine:
        ranked = await engine.rerank(QUERY, TEXTS)
        assert [each.index for each in ranked] == sorted(range(len(TEXTS)), key=lambda index: -float(expected[index]))
        for each in ranked:
            assert each.logit == pytest.approx(float(expected[each.index]), rel=1e-5, abs=1e-5)
            assert each.score == pytest.approx(1 / (1 + np.exp(-each.logit)))
        with pytest.raises(InvalidRequestError, match="makes its prompts of two texts: leave it out"):
            await engine.rerank(QUERY, TEXTS, RerankPrompt(template="{query} {document}"))
        with pytest.raises(InvalidRequestError, match="no place for one"):
            await engine.rerank(QUERY, TEXTS, instruction="find it")


async def test_a_separator_within_a_text_begins_no_second_one(encoder: Callable[..., Path]) -> None:
    path = encoder("bert", 3)
    asked = ["the cat [SEP] the dog", ("the cat [SEP] a", "the dog [SEP] a")]
    async with AsyncEngine(config(path)) as engine:
        for each, expected in zip(await engine.classify(asked), logits(path, asked), strict=True):  # type: ignore[arg-type]
            near(each.logits, expected)


@pytest.mark.parametrize("kind", ["roberta", "xlm-roberta", "mpnet", "bert"])
async def test_tokens_of_padding_within_a_text_count_as_they_do_in_transformers(
    kind: str, encoder: Callable[..., Path]
) -> None:
    path = encoder(kind)
    pad = AutoTokenizer.from_pretrained(path).pad_token
    texts = [f"the cat is {pad} in the house", f"one king {pad}", "a dog"]
    async with AsyncEngine(config(path)) as engine:
        for each, hidden in zip(await engine.embed(texts, normalize=False), states(path, texts), strict=True):
            near(each.vector, hidden.mean(0))


async def test_a_mask_in_one_prompt_changes_no_other(encoder: Callable[..., Path]) -> None:
    """ESM scales all embeddings of a row by how many masks are in it."""
    path = encoder("esm")
    texts = ["the cat is [MASK] in the house", "a dog runs", "one king [MASK]"]
    async with AsyncEngine(config(path)) as engine:
        for each, hidden in zip(await engine.embed(texts, normalize=False), states(path, texts), strict=True):
            near(each.vector, hidden.mean(0))


async def test_a_model_of_one_type_of_text_is_told_none(encoder: Callable[..., Path]) -> None:
    path = encoder("bert", 1, type_vocab_size=1)
    model, tokenizer = _with_head(path), AutoTokenizer.from_pretrained(path)
    encoded = tokenizer("a dog", "the cat", return_tensors="pt")
    with torch.inference_mode():
        expected = model(encoded.input_ids, encoded.attention_mask).logits[0, 0]
    async with AsyncEngine(config(path)) as engine:
        (found,) = await engine.relevances([("a dog", "the cat")])
        assert found.logit == pytest.approx(float(expected), rel=1e-5, abs=1e-5)


async def test_prompts_may_be_token_ids(encoder: Callable[..., Path]) -> None:
    path = encoder("bert")
    ids = AutoTokenizer.from_pretrained(path)(TEXTS[0]).input_ids
    async with AsyncEngine(config(path)) as engine:
        (by_text,), (by_ids,) = await engine.embed(TEXTS[:1]), await engine.embed([ids])
        assert np.array_equal(by_text.vector, by_ids.vector)


@pytest.mark.parametrize(("kind", "most"), [("bert", 64), ("roberta", 64), ("mpnet", 64)])
async def test_as_long_as_there_are_positions(kind: str, most: int, encoder: Callable[..., Path]) -> None:
    """Longer than a step's budget as well: a prompt is computed in one."""
    path = encoder(kind)
    whole = AutoTokenizer.from_pretrained(path)(LONG).input_ids
    assert len(whole) > most
    model = AutoModel.from_pretrained(path).eval()
    async with AsyncEngine(config(path)) as engine:
        ids = whole[:most]
        (found, short) = await engine.embed([ids, ids[:2]], "mean", normalize=False)
        with torch.inference_mode():
            near(found.vector, model(torch.tensor([ids])).last_hidden_state[0].mean(0))
            near(short.vector, model(torch.tensor([ids[:2]])).last_hidden_state[0].mean(0))
        for prompt in (LONG, whole[: most + 1]):
            with pytest.raises(ContextLengthExceededError, match=rf"allowed: 1\.\.{most} \(max_single_sequence_length"):
                await engine.embed([prompt])
    with pytest.raises(ConfigError, match=rf"positions allow 1\.\.{most}"):
        async with AsyncEngine(config(path, max_single_sequence_length=most + 1)):
            pass


@pytest.mark.parametrize("kind", ["bert", "roberta"])
async def test_what_is_too_long_is_cut_as_transformers_cuts_it(kind: str, encoder: Callable[..., Path]) -> None:
    path = encoder(kind, 3)
    tokenizer, asked = AutoTokenizer.from_pretrained(path), [LONG, (QUERY, LONG), (QUERY, "a dog")]
    async with AsyncEngine(config(path)) as engine:
        for most in (-1, 40, 20):
            within = 64 if most < 0 else most
            expected = [
                tokenizer(LONG, truncation=True, max_length=within).input_ids,
                tokenizer(QUERY, LONG, truncation="only_second", max_length=within).input_ids,
                tokenizer(QUERY, "a dog").input_ids,
            ]
            found = await engine.classify(asked, truncate_prompt_tokens=most)  # type: ignore[arg-type]
            assert [each.usage.prompt_tokens for each in found] == list(map(len, expected))
        (cut,) = await engine.classify([(QUERY, LONG)], truncate_prompt_tokens=30)
        encoded = tokenizer(QUERY, LONG, truncation="only_second", max_length=30, return_tensors="pt")
        model = _with_head(path)
        with torch.inference_mode():
            near(cut.logits, model(**encoded).logits[0])
        # Nothing would be left of what is cut.
        for prompt, few in (((LONG, "a dog"), -1), ((QUERY, "a dog"), 8), ("the cat", 2)):
            with pytest.raises(ContextLengthExceededError, match="is to be cut to"):
                await engine.classify([prompt], truncate_prompt_tokens=few)  # type: ignore[list-item]
        (longer,) = await engine.classify(["the cat " * 50_000], truncate_prompt_tokens=-1)
        assert longer.usage.prompt_tokens == 64
        for wrong in (0, -2, True, 1.5, "all"):
            with pytest.raises(InvalidRequestError, match="truncate_prompt_tokens is"):
                await engine.classify(["a"], truncate_prompt_tokens=wrong)  # type: ignore[arg-type]
        with pytest.raises(InvalidRequestError, match=r"truncate_prompt_tokens is 65; allowed: -1 and 1\.\.64"):
            await engine.classify(["a"], truncate_prompt_tokens=65)
        with pytest.raises(InvalidRequestError, match="conversations cannot be cut"):
            await engine.classify([[{"role": "user", "content": "a"}]], truncate_prompt_tokens=5)


def _with_head(path: Path) -> Any:
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(path).eval()


def sentence_transformer(source: Path, path: Path, **changes: Any) -> Path:
    """A checkpoint with the files of Sentence Transformers: the first token, a layer behind it, and a length."""
    shutil.copytree(source, path)
    kinds = ["Transformer", "Pooling", "Dense", "Normalize"]
    paths = ["", "1_Pooling", "2_Dense", "3_Normalize"]
    named = zip(paths, kinds, strict=True)
    modules = [{"path": at, "type": f"sentence_transformers.models.{kind}"} for at, kind in named]
    (path / "modules.json").write_text(json.dumps(modules))
    for at in paths[1:]:
        (path / at).mkdir()
    (path / "1_Pooling" / "config.json").write_text(
        json.dumps({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False})
    )
    squash = changes.get("squash", "torch.nn.modules.activation.Tanh")
    (path / "2_Dense" / "config.json").write_text(json.dumps({"activation_function": squash, "bias": True}))
    torch.manual_seed(3)
    inputs = changes.get("inputs", 32)
    weights = {"linear.weight": torch.randn(12, inputs), "linear.bias": torch.randn(12)}
    save_file(weights, path / "2_Dense" / "model.safetensors")
    (path / "sentence_bert_config.json").write_text('{"max_seq_length": 20}')
    prompts = {"query": "find : ", "document": "", "odd": None}
    (path / "config_sentence_transformers.json").write_text(json.dumps({"prompts": prompts}))
    return path


async def test_files_of_sentence_transformers_say_how(encoder: Callable[..., Path], tmp_path: Path) -> None:
    path = sentence_transformer(encoder("bert"), tmp_path / "model")
    weights = load_file(path / "2_Dense" / "model.safetensors")
    async with AsyncEngine(config(path)) as engine:
        assert engine.complete_engine_config is not None
        assert engine.complete_engine_config.max_single_sequence_length == 20
        found = await engine.embed(TEXTS[:3])
        for each, hidden in zip(found, states(path, TEXTS[:3]), strict=True):
            vector = torch.tanh(hidden[0] @ weights["linear.weight"].T + weights["linear.bias"])
            near(each.vector, vector / vector.norm())
        (short,) = await engine.embed(TEXTS[:1], dimensions=4)
        assert short.vector.shape == (4,) and np.linalg.norm(short.vector) == pytest.approx(1.0)
        asked = await engine.embed(["the cat"], prompt_name="query")
        told = await engine.embed(["find : the cat"])
        assert np.array_equal(asked[0].vector, told[0].vector)
        assert asked[0].usage.prompt_tokens == told[0].usage.prompt_tokens
        (cut,) = await engine.embed(["the cat"], prompt_name="query", truncate_prompt_tokens=4)
        assert cut.usage.prompt_tokens == 4
        for wrong, words in (("task", "allowed: 'query', 'document'"), (3, "expected a string or None")):
            with pytest.raises(InvalidRequestError, match=words):
                await engine.embed(["the cat"], prompt_name=wrong)  # type: ignore[arg-type]
        with pytest.raises(InvalidRequestError, match="it is for texts alone, and there is"):
            await engine.embed([[5]], prompt_name="query")
        with pytest.raises(InvalidRequestError, match=r"dimensions is 13; allowed: 1\.\.12"):
            await engine.embed(TEXTS[:1], dimensions=13)
        await engine.reload(config(path, max_single_sequence_length=64))  # the model has positions for as many
        (long,) = await engine.embed([LONG], truncate_prompt_tokens=-1)
        assert long.usage.prompt_tokens == 64


@pytest.mark.parametrize(
    ("kinds", "said"),
    [
        (["Transformer", "Pooling", "Normalize", "Dense"], "Pooling [+] Normalize [+] Dense"),
        (["Transformer", "Dense"], "Dense"),
        (["Router"], "Router"),
        (["Transformer", "Pooling", "LayerNorm", "Dense"], "Pooling [+] LayerNorm [+] Dense"),
    ],
)
async def test_modules_in_another_order_are_not_made_up(
    kinds: list[str], said: str, encoder: Callable[..., Path], tmp_path: Path
) -> None:
    path = sentence_transformer(encoder("bert"), tmp_path / "model")
    places = {"Pooling": "1_Pooling", "Dense": "2_Dense"}
    modules = [{"path": places.get(kind, ""), "type": f"sentence_transformers.models.{kind}"} for kind in kinds]
    (path / "modules.json").write_text(json.dumps(modules))
    (path / "2_Dense" / "config.json").write_text("{}")  # which nobody reads then
    async with AsyncEngine(config(path)) as engine:
        with pytest.raises(InvalidRequestError, match=f"pools by '{said}'"):
            await engine.embed(["a"])
        (found,) = await engine.embed(["a"], "mean", normalize=False)
        near(found.vector, states(path, ["a"])[0].mean(0))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"squash": "torch.nn.modules.activation.Mish"}, UnsupportedModelError, "its activation is '.*Mish'; allowed"),
        ({"inputs": 31}, CheckpointError, "a layer behind the pooling takes 31 numbers; it gets 32"),
    ],
)
async def test_files_that_make_no_sense_leave_the_old_model(
    changes: Any, error: type[Exception], words: str, encoder: Callable[..., Path], tmp_path: Path
) -> None:
    path = sentence_transformer(encoder("bert"), tmp_path / "model", **changes)
    async with AsyncEngine(config(encoder("roberta"))) as engine:
        with pytest.raises(InvalidRequestError, match=r"prompt_name is 'query'; allowed: .* has none"):
            await engine.embed(["a"], prompt_name="query")
        with pytest.raises(error, match=words):
            await engine.reload(config(path))
        assert len(await engine.embed(["a"])) == 1


async def test_a_decoder_embeds_through_such_layers_too(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    path = sentence_transformer(checkpoint("llama"), tmp_path / "model", inputs=64)
    (path / "1_Pooling" / "config.json").write_text('{"pooling_mode": "lasttoken"}')
    weights = load_file(path / "2_Dense" / "model.safetensors")
    hidden_size = json.loads((path / "config.json").read_text())["hidden_size"]
    assert hidden_size == 64
    ids = list(range(5, 45))
    model = AutoModel.from_pretrained(path, dtype=torch.float32)
    with torch.inference_mode():
        hidden = model(torch.tensor([ids])).last_hidden_state[0][-1]
    async with AsyncEngine(EngineConfig(str(path), dtype="float32", prefill_chunk_size=16)) as engine:
        (found,) = await engine.embed([ids], normalize=False)
        near(found.vector, torch.tanh(hidden @ weights["linear.weight"].T + weights["linear.bias"]), 1e-4)


async def test_what_it_cannot_do_is_refused_by_name(encoder: Callable[..., Path]) -> None:
    async with AsyncEngine(config(encoder("bert"))) as engine:
        with pytest.raises(InvalidRequestError, match="can only embed: its checkpoint has no language-model head"):
            await engine.generate("a", GenerationConfig(max_tokens=1))
        with pytest.raises(InvalidRequestError, match="no language-model head"):
            await engine.score(["a"])
        with pytest.raises(InvalidRequestError, match="cannot classify: its checkpoint has no classification head"):
            await engine.classify(["a"])
        with pytest.raises(InvalidRequestError, match="cannot rank: it has no classification head"):
            await engine.rerank("a", ["b"])
        with pytest.raises(InvalidRequestError, match="pooling is 'max'; allowed: 'mean', 'last', 'cls', None"):
            await engine.embed(["a"], "max")  # type: ignore[arg-type]
        with pytest.raises(InvalidRequestError, match="adapter is 'x'; loaded: none"):
            await engine.embed(["a"], options=RequestOptions(adapter="x"))
        assert len(await engine.embed(["a"])) == 1
    async with AsyncEngine(config(encoder("bert", 3))) as engine:
        with pytest.raises(InvalidRequestError, match="cannot embed: it gives out no hidden states; it classifies"):
            await engine.embed(["a"])
        with pytest.raises(InvalidRequestError, match="cannot rank: its head has 3 labels"):
            await engine.rerank("a", ["b"])
        assert len(await engine.classify(["a"])) == 1
    async with AsyncEngine(EngineConfig("tiny")) as engine:
        with pytest.raises(InvalidRequestError, match="pooling is 'cls'; allowed here: 'mean', 'last'"):
            await engine.embed(["a"], "cls")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"speculative_mode": "ngram"}, "speculative_mode is 'ngram'; .* is an encoder: leave it out"),
        ({"attention_backend": "torch"}, "attention_backend is 'torch'"),
        ({"kv_cache_dtype": "fp8_e4m3"}, "kv_cache_dtype"),
        ({"decoder_backend": "compiled"}, "decoder_backend is 'compiled'"),
        ({"adapters": {"a": "adapter"}}, "adapters is {'a': 'adapter'}"),
        ({"quantization": "int8", "dtype": "bfloat16"}, "quantization is 'int8'; .*allowed: 'none'"),
        ({"images": True}, "images is True"),
    ],
)
async def test_settings_that_mean_nothing_to_it_are_refused(
    settings: Any, words: str, encoder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    engine = AsyncEngine()
    await engine.reload(config(encoder("roberta")))
    with pytest.raises((ConfigError, UnsupportedModelError), match=words):
        await engine.reload(config(encoder("bert"), **settings))
    assert len(await engine.embed(["a"])) == 1
    await engine.shutdown()


async def test_settings_of_a_cache_are_passed_over_and_said(encoder: Callable[..., Path]) -> None:
    engine = AsyncEngine()
    complete = await engine.reload(config(encoder("bert"), kv_cache_page_size=32, gpu_memory_utilization=0.5))
    [note] = engine.health().notes
    assert note == "encoder: there is no KV cache; passed over: kv_cache_page_size, gpu_memory_utilization"
    assert complete.kv_cache_page_size == 16
    await engine.reload(complete.replace(gpu_memory_utilization=None))  # what it comes to is nothing to speak of
    assert not engine.health().notes
    await engine.shutdown()


async def test_what_is_missing_is_said_and_leaves_the_engine_usable(
    encoder: Callable[..., Path], tmp_path: Path
) -> None:
    path = tmp_path / "model"
    shutil.copytree(encoder("bert"), path)
    weights = load_file(path / "model.safetensors")
    lost = next(name for name in weights if name.endswith("attention.output.dense.weight"))
    others = {name: value for name, value in weights.items() if name != lost}
    save_file(others, path / "model.safetensors", {"format": "pt"})
    engine = AsyncEngine()
    with pytest.raises(CheckpointError, match="1 weights are missing"):
        await engine.reload(config(path))
    save_file(weights | {lost: weights[lost][:5]}, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"1 weights are of another shape: {lost}"):
        await engine.reload(config(path))
    await engine.reload(config(encoder("bert")))
    assert len(await engine.embed(["a"])) == 1
    await engine.shutdown()


@pytest.mark.parametrize(("kind", "labels"), [("bert", 0), ("roberta", 2)])
async def test_what_is_missing_is_found_out_before_the_present_model_has_to_go(
    kind: str, labels: int, encoder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = shutil.copytree(encoder(kind, labels=labels), tmp_path / "model")
    weights = load_file(path / "model.safetensors")
    lost = "classifier.out_proj.weight" if labels else "encoder.layer.1.output.dense.weight"
    monkeypatch.setattr(encoders_loading, "fits", lambda details, current: False)
    async with AsyncEngine(config(encoder("bert"))) as engine:
        for changed, says in (
            ({name: value for name, value in weights.items() if name != lost}, "1 weights are missing"),
            (weights | {lost: weights[lost][:1].clone()}, "1 weights are of another shape"),
        ):
            save_file(changed, path / "model.safetensors", {"format": "pt"})
            with pytest.raises(CheckpointError, match=f"{says}: {lost}"):
                await engine.reload(config(path))
            assert engine.state is EngineState.READY
            assert len(await engine.embed(["a"])) == 1
        save_file(weights, path / "model.safetensors", {"format": "pt"})
        await engine.reload(config(path))
        assert engine.state is EngineState.READY


async def test_transformers_reports_nothing_of_what_is_left_over(encoder: Callable[..., Path]) -> None:
    """Of a model that fills in words, the head that does so is of no use here."""
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addHandler(handler)
    transformers_logging.set_verbosity_warning()
    try:
        AutoModel.from_pretrained(encoder("bert"), add_pooling_layer=False)
        assert any("LOAD REPORT" in record for record in records)
        records.clear()
        async with AsyncEngine(config(encoder("bert"))):
            assert records == []
    finally:
        transformers_logging.set_verbosity_error()
        logger.removeHandler(handler)


@pytest.mark.loops("each")
async def test_leaving_in_the_middle_disturbs_nobody(encoder: Callable[..., Path]) -> None:
    path = encoder("bert")
    async with AsyncEngine(config(path, max_num_sequence=2)) as engine:
        expected = [each.vector for each in await engine.embed(TEXTS)]

        async def some(index: int) -> None:
            if index % 3 == 1:
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0):
                        await engine.embed(TEXTS * 4)
                return
            for each, vector in zip(await engine.embed(TEXTS), expected, strict=True):
                np.testing.assert_allclose(each.vector, vector, rtol=1e-5, atol=1e-5)

        await asyncio.gather(*(some(index) for index in range(12)))
        pending = asyncio.ensure_future(engine.embed(TEXTS * 4, options=RequestOptions(request_id="many")))
        await asyncio.sleep(0)
        await engine.abort_request("many-3")
        with contextlib.suppress(RequestDroppedError):  # it may have been through
            await pending
        assert engine.metrics().kv_blocks_used == 0
        assert engine.metrics().num_requests_running == engine.metrics().num_requests_waiting == 0


@pytest.mark.loops("each")
@pytest.mark.loops("either")
async def test_models_change_places(encoder: Callable[..., Path]) -> None:
    """Between encoders and decoders, also under requests that wait."""
    first, ranker = encoder("bert"), encoder("bert", 1)
    engine = AsyncEngine()
    await engine.reload(config(first))
    expected = (await engine.embed(TEXTS[:1]))[0].vector
    await engine.reload(EngineConfig("tiny"))
    assert (await engine.generate("Once", GenerationConfig(max_tokens=2))).finish_reason is FinishReason.LENGTH
    await engine.reload(config(first))
    assert np.array_equal((await engine.embed(TEXTS[:1]))[0].vector, expected)
    await engine.pause()
    waiting = await engine._add(
        TEXTS[:2], [ALONE] * 2, RequestOptions(), Purpose(reading=EmbeddingOptions()), many=True
    )
    await engine.reload(config(ranker), in_flight="carry")  # which has no vectors to give
    await engine.resume()
    for stream in waiting:
        with pytest.raises(InvalidRequestError, match="it pools by 'mean'; the new model gives out no hidden states"):
            await stream
    assert len(await engine.rerank(QUERY, TEXTS)) == len(TEXTS)
    await engine.pause()
    pairs = [Pair(*pair) for pair in PAIRS[:2]]
    ranking = await engine._add(
        pairs, [ALONE] * 2, RequestOptions(), Purpose(reading=ClassificationOptions()), many=True
    )
    await engine.reload(config(first), in_flight="carry")
    await engine.resume()
    for stream in ranking:
        with pytest.raises(InvalidRequestError, match="the new model has no classification head"):
            await stream
    await engine.unload()
    assert engine.state.value == "unloaded"
    await engine.shutdown()


async def test_it_sleeps_and_has_its_weights_replaced(encoder: Callable[..., Path]) -> None:
    path, other = encoder("bert"), encoder("bert", seed=1)
    async with AsyncEngine(config(path)) as engine:
        (before,) = await engine.embed(TEXTS[:1])
        await engine.sleep()
        await engine.wake()
        assert np.array_equal((await engine.embed(TEXTS[:1]))[0].vector, before.vector)
        stored = load_file(other / "model.safetensors")
        weights = {name: value for name, value in stored.items() if "pooler" not in name}
        with pytest.raises(ReloadError, match="'nose' is not in the model"):
            await engine.update_weights({**weights, "nose": torch.zeros(1)})
        assert np.array_equal((await engine.embed(TEXTS[:1]))[0].vector, before.vector)
        await engine.update_weights(weights)
        (after,) = await engine.embed(TEXTS[:1], "mean", normalize=False)
        near(after.vector, states(other, TEXTS[:1])[0].mean(0))
        (count,) = await engine.debug_call_func_on_all_workers("num_parameters")
        assert count == AutoModel.from_pretrained(path, add_pooling_layer=False).num_parameters()


async def test_in_bfloat16_it_is_near(encoder: Callable[..., Path]) -> None:
    path = encoder("modernbert")
    async with AsyncEngine(config(path, dtype="bfloat16")) as engine:
        for each, hidden in zip(await engine.embed(TEXTS, "mean"), states(path, TEXTS), strict=True):
            mean = hidden.mean(0)
            assert float(np.dot(each.vector, (mean / mean.norm()).numpy())) > 0.999


def test_the_tokenizers_here_tell_texts_apart_as_theirs_do() -> None:
    assert "token_type_ids" in tokenizer_of("bert")("a", "b")
    assert "token_type_ids" not in tokenizer_of("roberta")("a", "b")
