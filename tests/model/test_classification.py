"""Models with a classification head say what transformers' own classes say, however their prompts were computed."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, modeling_layers

from asyncengine import (
    AdapterError,
    AsyncEngine,
    CheckpointError,
    EngineConfig,
    EngineState,
    InvalidRequestError,
    ReloadError,
    RequestOptions,
    RerankPrompt,
    UnsupportedModelError,
    tiny,
)
from asyncengine.model.adapters import lora
from tests.model.adapters import merge, save_adapter
from tests.model.test_embeddings import CONFIG, prompts

pytestmark = pytest.mark.loops("either")

SMALL: dict[str, Any] = {"num_hidden_layers": 1, "num_labels": 2}
HOW = RerankPrompt(template="Story of {query}: {document}\nGood?", yes=" happy", no=" sad")
STORIES = ["the horse was sad", "a ball", "the duck said {query}", "once more, a ball beside the path"]

Write = Callable[..., Path]


@pytest.fixture
def classifier(checkpoint: Write) -> Write:
    def make(architecture: str = "llama", **changes: Any) -> Path:
        return checkpoint(architecture, kind=AutoModelForSequenceClassification, **changes)

    return make


def loads(path: Path | str, **changes: Any) -> EngineConfig:
    return EngineConfig(str(path), **({"dtype": "float32"} | CONFIG | changes))


def reference(path: Path, prompts: list[list[int]]) -> list[np.ndarray[Any, Any]]:
    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    with torch.inference_mode():
        return [model(torch.tensor([prompt])).logits[0].numpy() for prompt in prompts]


def changed(path: Path, to: Path, about: dict[str, Any], **tensors: torch.Tensor | None) -> Path:
    """A copy of a checkpoint with other settings, and with other tensors or without them."""
    shutil.copytree(path, to)
    config = json.loads((to / "config.json").read_text()) | about
    (to / "config.json").write_text(json.dumps(config))
    stored = load_file(to / "model.safetensors")
    for name, tensor in tensors.items():
        stored.pop(name.replace("__", "."), None)
        if tensor is not None:
            stored[name.replace("__", ".")] = tensor
    save_file(stored, to / "model.safetensors", {"format": "pt"})
    return to


@pytest.mark.parametrize(
    "architecture",
    ["qwen3", "gemma2", "gemma3_text", *(pytest.param(name, marks=pytest.mark.long) for name in ("llama", "mistral"))],
)
async def test_classes_are_those_of_transformers_from_chunks_and_from_the_prefix_cache(
    architecture: str, classifier: Write
) -> None:
    path = classifier(architecture, num_labels=3)
    expected = reference(path, prompts())
    backends = ("compiled", "transformers") if architecture in ("llama", "gemma2") else ("compiled",)
    for backend in backends:
        async with AsyncEngine(loads(path, decoder_backend=backend)) as engine:
            first, again = [await engine.classify(prompts()) for _ in range(2)]
            (cached,) = await engine.embed(prompts()[-1:], "last")
            assert again[-1].usage.cached_tokens > 0 and cached.vector.shape == (64,)
            for found, logits in zip([*first, *again], [*expected, *expected], strict=True):
                assert found.logits.dtype == np.float32 and np.abs(found.logits - logits).max() < 2e-5
                probs = torch.tensor(logits).softmax(0).numpy()
                assert found.probs is not None and np.abs(found.probs - probs).max() < 1e-5
            with pytest.raises(InvalidRequestError, match="can only embed and classify"):  # also where the head is tied
                await engine.generate(prompts()[0])


@pytest.mark.parametrize(
    ("about", "labels", "meant"),
    [
        ({}, 1, torch.sigmoid),
        ({"problem_type": "regression"}, 1, None),
        ({"problem_type": "regression"}, 2, None),
        ({"problem_type": "multi_label_classification"}, 2, torch.sigmoid),
        ({"problem_type": "single_label_classification"}, 2, lambda logits: logits.softmax(0)),
        ({"id2label": {"0": "safe", "1": "unsafe"}}, 2, lambda logits: logits.softmax(0)),
    ],
)
async def test_a_checkpoint_says_what_its_logits_mean(
    about: dict[str, Any], labels: int, meant: Any, classifier: Write, tmp_path: Path
) -> None:
    path = changed(classifier(**(SMALL | {"num_labels": labels})), tmp_path / "it", about)
    async with AsyncEngine(loads(path)) as engine:
        (found,) = await engine.classify(prompts()[2:3])
    (logits,) = reference(path, prompts()[2:3])
    assert np.abs(found.logits - logits).max() < 2e-5
    if meant is None:
        assert found.probs is None
    else:
        assert found.probs is not None and np.abs(found.probs - meant(torch.tensor(logits)).numpy()).max() < 1e-5
    assert found.labels == (("safe", "unsafe") if "id2label" in about else ("LABEL_0", "LABEL_1")[:labels])
    assert found.label == found.labels[int(logits.argmax())]
    if labels == 1:
        assert found.score == pytest.approx(float(logits[0]), abs=2e-5)


async def test_a_bias_that_is_stored_is_added(classifier: Write, tmp_path: Path) -> None:
    path = changed(classifier(**SMALL), tmp_path / "it", {}, score__bias=torch.tensor([3.0, -7.0]))
    async with AsyncEngine(loads(path)) as engine:
        (found,) = await engine.classify(prompts()[2:3])
    (logits,) = reference(path, prompts()[2:3])  # which passes it over
    assert np.abs(found.logits - (logits + np.array([3, -7]))).max() < 2e-5


async def test_layers_in_eight_bits_leave_the_head_as_it_is(classifier: Write) -> None:
    path = classifier(num_labels=3)
    expected = np.stack(reference(path, prompts()))
    async with AsyncEngine(loads(path, dtype="bfloat16", quantization="int8")) as engine:
        found = np.stack([each.logits for each in await engine.classify(prompts())])
    assert 0 < np.linalg.norm(found - expected) < 0.1 * np.linalg.norm(expected)


async def test_heads_that_cannot_be_are_refused_while_the_present_model_stays(
    classifier: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = classifier(**SMALL)
    wrongs: list[tuple[dict[str, Any], dict[str, Any], type[ReloadError], str]] = [
        ({}, {"score__weight": None}, CheckpointError, r"score\.weight, of its classification head, is missing"),
        (
            {"num_labels": 3, "id2label": None, "label2id": None},
            {},
            CheckpointError,
            r"score\.weight is \(2, 64\); config\.json says \(3, 64\)",
        ),
        ({}, {"score__bias": torch.zeros(3)}, CheckpointError, r"score\.bias is \(3,\); config\.json says \(2,\)"),
        ({"model_type": "granite"}, {}, UnsupportedModelError, "transformers has no such class for a 'granite' model"),
    ]
    async with AsyncEngine(loads("tiny")) as engine:
        for index, (about, tensors, kind, words) in enumerate(wrongs):
            with pytest.raises(kind, match=words):
                await engine.reload(loads(changed(path, tmp_path / str(index), about, **tensors)))
        assert engine.state is EngineState.READY

        def first(self: Any, input_ids: torch.Tensor, **more: Any) -> Any:
            return SimpleNamespace(logits=self.score(self.model(input_ids, **more).last_hidden_state[:, 0]))

        monkeypatch.setattr(modeling_layers.GenericForSequenceClassification, "forward", first)
        with pytest.raises(UnsupportedModelError, match="does not apply its head to the last token's hidden state"):
            await engine.reload(loads(path))


async def test_one_engine_goes_from_a_classifier_to_a_generator_and_back(classifier: Write) -> None:
    path = classifier(**SMALL)
    (expected,) = reference(path, prompts()[3:4])
    async with AsyncEngine(loads(path)) as engine:
        with pytest.raises(ReloadError, match=r"'score\.weight' is not in the model"):
            await engine.update_weights({"score.weight": torch.zeros(2, 64)})
        with pytest.raises(AdapterError, match="modules_to_save"):
            lora.check_config("adapter 'a'", {"peft_type": "LORA", "modules_to_save": ["score"]})
        await engine.reload(loads("tiny"))
        with pytest.raises(InvalidRequestError, match="'tiny' cannot classify"):
            await engine.classify(prompts()[:1])
        assert (await engine.generate("Once")).text
        await engine.reload(loads(path))
        (found,) = await engine.classify(prompts()[3:4])
        assert np.abs(found.logits - expected).max() < 2e-5


def log_odds(texts: list[str], yes: str, no: str) -> list[float]:
    """What the embedded model makes of one token more than of the other, behind each text."""
    tokenizer = AutoTokenizer.from_pretrained(tiny.PATH)
    model = AutoModelForCausalLM.from_pretrained(tiny.PATH, dtype=torch.float32)
    pair = [tokenizer(token, add_special_tokens=False).input_ids[0] for token in (yes, no)]
    found = []
    for text in texts:
        with torch.inference_mode():
            ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
            logits = model(ids).logits[0, -1][pair]
        found.append(float(logits[0] - logits[1]))
    return found


async def test_a_generator_ranks_by_the_logits_of_two_tokens() -> None:
    query = "a horse " * 20
    expected = log_odds([f"Story of {query}: {story}\nGood?" for story in STORIES], " happy", " sad")
    async with AsyncEngine(loads("tiny", max_num_sequence=1)) as engine:
        found = await engine.rerank(query, STORIES, HOW)
        assert [each.logit for each in found] == sorted((each.logit for each in found), reverse=True)
        for each in found:
            assert each.logit == pytest.approx(expected[each.index], abs=1e-4)
            assert each.score == pytest.approx(1 / (1 + math.exp(-expected[each.index])), abs=1e-5)
        assert sum(each.usage.cached_tokens > 30 for each in found) == 3  # the query is computed once
        with pytest.raises(InvalidRequestError, match=r"instruction is 'x'; the prompt has no place"):
            await engine.rerank(query, STORIES, HOW, instruction="x")
        for wrong, words in (
            (None, "'tiny' does not say how it ranks; give a RerankPrompt with its template and its tokens yes and no"),
            (RerankPrompt(template="{query}{document}"), "yes is None; 'tiny' has no classification head"),
            (RerankPrompt(yes="a long text", no="no"), r"yes is 'a long text', which is \d+ tokens"),
            (RerankPrompt(yes=1024, no=5), r"yes is 1024; allowed: 0\.\.1023"),
            (RerankPrompt(yes=5, no=5), "which are one token"),
        ):
            with pytest.raises(InvalidRequestError, match=words):
                await engine.rerank(query, STORIES, wrong)
        assert await engine.rerank(query, [], HOW) == []
        assert engine.metrics().kv_blocks_used == 0


async def test_a_checkpoint_says_how_it_ranks(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).symlink_to(tiny.PATH / name)
    about = json.loads((tiny.PATH / "tokenizer_config.json").read_text())
    about["chat_template"] = (
        "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}Good?{% endif %}"
    )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(about))
    tokenizer = AutoTokenizer.from_pretrained(tiny.PATH)
    yes, no = (tokenizer(token, add_special_tokens=False).input_ids[0] for token in (" happy", " sad"))
    modules = [{"path": "", "type": "x.Transformer"}, {"path": "1_LogitScore", "type": "x.logit_score.LogitScore"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "1_LogitScore").mkdir()
    tokens = tmp_path / "1_LogitScore" / "config.json"
    tokens.write_text(json.dumps({"true_token_id": yes, "false_token_id": no}))
    processing = {"processing_kwargs": {"chat_template": {"add_generation_prompt": True}}}
    (tmp_path / "sentence_bert_config.json").write_text(json.dumps(processing))
    sampled = {"do_sample": True, "temperature": 0.3, "top_p": 0.1, "min_p": 0.9, "top_k": 1, "repetition_penalty": 2.0}
    (tmp_path / "generation_config.json").write_text(json.dumps(sampled))  # has no say in it
    prompted = {"prompts": {"task": "find it"}, "default_prompt_name": "task"}
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(prompted))
    texts = [f"system: {told}\nquery: horse\ndocument: a happy duck\nGood?" for told in ("find it", "find that")]
    expected = log_odds(texts, " happy", " sad")
    async with AsyncEngine(loads(tmp_path)) as engine:
        (found,) = await engine.rerank("horse", ["a happy duck"])
        (told,) = await engine.rerank("horse", ["a happy duck"], instruction="find that")
        assert [found.logit, told.logit] == pytest.approx(expected, abs=1e-4)
        tokens.write_text(json.dumps({"true_token_id": yes, "false_token_id": None}))
        await engine.reload(loads(tmp_path))
        with pytest.raises(InvalidRequestError, match="does not say how it ranks"):
            await engine.rerank("horse", ["a happy duck"])
        tokens.write_text(json.dumps({"true_token_id": "", "false_token_id": no}))
        with pytest.raises(CheckpointError, match="yes is ''; expected a token id"):
            await engine.reload(loads(tmp_path))
        tokens.write_text(json.dumps({"true_token_id": yes, "false_token_id": no}))
        for name, wrong, words in (
            ("sentence_bert_config.json", {"processing_kwargs": [1]}, "processing_kwargs is a JSON list"),
            ("config_sentence_transformers.json", {"prompts": [1]}, "prompts is a JSON list; expected an object"),
            (
                "config_sentence_transformers.json",
                {"prompts": {"a": 3}, "default_prompt_name": "a"},
                "config_sentence_transformers.json: the prompt that is named is 3",
            ),
        ):
            before = (tmp_path / name).read_text()
            (tmp_path / name).write_text(json.dumps(wrong))
            with pytest.raises(CheckpointError, match=words):
                await engine.reload(loads(tmp_path))
            (tmp_path / name).write_text(before)
        (tmp_path / "modules.json").write_text("[1]")
        await engine.reload(loads(tmp_path))  # which ranks nothing


async def test_an_adapter_of_its_layers_is_computed_and_it_drafts_for_nobody(tmp_path: Path) -> None:
    path, adapter = tmp_path / "judge", tmp_path / "adapter"
    model: Any = AutoModelForSequenceClassification.from_pretrained(tiny.PATH, dtype=torch.float32, num_labels=2)
    model.save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny.PATH / name, path)
    factors = save_adapter(adapter, model, 1, only=("q_proj", "v_proj"), scale=1.5)
    merge(model, factors, 2.0)  # alpha of 8 over a rank of 4
    with torch.inference_mode():
        expected = model(torch.tensor(prompts()[3:4])).logits[0].numpy()
    async with AsyncEngine(loads(path, adapters={"strict": str(adapter)})) as engine:
        (plain,) = await engine.classify(prompts()[3:4])
        (found,) = await engine.classify(prompts()[3:4], RequestOptions(adapter="strict"))
        assert np.abs(found.logits - expected).max() < 1e-4 < np.abs(plain.logits - expected).max()
        drafting = loads("tiny", speculative_mode="small_draft", additional_models=(str(path),))
        with pytest.raises(CheckpointError, match="cannot draft: it has no language-model head"):
            await engine.reload(drafting)
