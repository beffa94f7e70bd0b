"""The embedded checkpoint is small, loads like any other, knows its demonstration, and can be made again."""

from __future__ import annotations

import os
import random
import runpy
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from asyncengine.tiny import DRAFT_PATH, PATH, corpus, stories, train
from asyncengine.tiny.packing import IGNORED, OPEN_ROWS, PADDING, Document, encode_chat, pack
from asyncengine.tiny.questions import CATEGORIES

MEGABYTE = 1_000_000


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(PATH)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(PATH).eval()


def ask(model: Any, tokenizer: Any, messages: Sequence[corpus.Message]) -> tuple[str, bool]:
    """The greedy answer, and whether the model ended it by itself."""
    inputs = tokenizer.apply_chat_template(
        list(messages), add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=256)[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(output, skip_special_tokens=True), output[-1].item() == tokenizer.eos_token_id


# --- the checkpoint ---------------------------------------------------------------------------------------------------


def test_importing_the_package_loads_neither_torch_nor_transformers() -> None:
    code = "import sys, asyncengine.tiny; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_checkpoint_is_at_most_five_megabytes() -> None:
    assert sum(file.stat().st_size for file in PATH.iterdir()) <= 5 * MEGABYTE


def test_draft_model_is_at_most_one_megabyte_and_has_the_same_tokens() -> None:
    assert sum(file.stat().st_size for file in DRAFT_PATH.iterdir()) <= MEGABYTE
    assert (DRAFT_PATH / "tokenizer.json").read_bytes() == (PATH / "tokenizer.json").read_bytes()


def test_model_has_about_one_million_parameters_in_float32(model: Any) -> None:
    assert 0.9e6 < model.num_parameters() < 1.1e6
    assert str(model.dtype) == "torch.float32"


def test_attention_is_grouped(model: Any) -> None:
    assert model.config.num_attention_heads == 2 * model.config.num_key_value_heads


def test_generation_stops_at_the_end_of_a_turn(model: Any, tokenizer: Any) -> None:
    assert tokenizer.eos_token == "<|end|>"
    assert model.generation_config.eos_token_id == model.config.eos_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize("chat", corpus.DEMO_CHATS, ids=lambda chat: chat.category)
def test_demonstration_is_answered_rightly(model: Any, tokenizer: Any, chat: corpus.Chat) -> None:
    answer, ended = ask(model, tokenizer, chat.prompt)
    assert chat.is_right(answer), answer
    assert ended


def test_answers_are_right_after_a_system_message(model: Any, tokenizer: Any) -> None:
    system = corpus.Message(role="system", content="You are a helpful assistant.")
    answer, ended = ask(model, tokenizer, (system, *corpus.DEMO_CHATS[2].prompt))
    assert (answer, ended) == ("The capital of France is Paris.", True)


def test_plain_text_is_continued_as_a_story(model: Any, tokenizer: Any) -> None:
    inputs = tokenizer("Once upon a time", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=256)[0]
    assert output[-1].item() == tokenizer.eos_token_id
    assert tokenizer.decode(output, skip_special_tokens=True).endswith("The end.")


# --- the tokenizer ----------------------------------------------------------------------------------------------------


@given(text=st.text())
@settings(deadline=None)
def test_any_text_comes_back_unchanged(tokenizer: Any, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text


def test_every_byte_is_one_token() -> None:
    tokenizer = AutoTokenizer.from_pretrained(PATH)
    ids = tokenizer.encode("\u00ff\U0010ffff\x00", add_special_tokens=False)
    assert len(ids) == len("\u00ff\U0010ffff\x00".encode())


def test_plain_text_begins_with_bos_and_chats_have_only_one(tokenizer: Any) -> None:
    assert tokenizer("Once")["input_ids"][0] == tokenizer.bos_token_id
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hello!"}], return_dict=True)
    assert chat["input_ids"].count(tokenizer.bos_token_id) == 1


def test_chat_template_writes_what_the_model_was_trained_on(tokenizer: Any) -> None:
    for chat in corpus.chats(random.Random(0), 100):
        prompt = tokenizer.apply_chat_template(list(chat.prompt), add_generation_prompt=True, return_dict=True)
        trained = encode_chat(tokenizer.backend_tokenizer, chat).ids
        assert trained[: len(prompt["input_ids"])] == prompt["input_ids"]


def test_chat_template_refuses_an_unknown_role(tokenizer: Any) -> None:
    with pytest.raises(Exception, match="not tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "42"}])


# --- the corpus -------------------------------------------------------------------------------------------------------


def test_one_seed_makes_one_corpus() -> None:
    assert corpus.chats(random.Random(7), 200) == corpus.chats(random.Random(7), 200)
    assert corpus.chats(random.Random(7), 200) != corpus.chats(random.Random(8), 200)
    assert corpus.texts(random.Random(7), 10) == corpus.texts(random.Random(7), 10)


def test_every_generated_answer_is_right_by_its_own_pattern() -> None:
    for chat in corpus.chats(random.Random(1), 2000):
        assert chat.is_right(chat.answer), chat


def test_every_category_is_weighted() -> None:
    assert set(CATEGORIES) < set(corpus.WEIGHTS)
    for category in corpus.WEIGHTS:
        assert corpus.chat(random.Random(2), category).category == category


def test_held_out_prompts_are_new() -> None:
    known = corpus.chats(random.Random(3), 2000)
    held_out = corpus.held_out(random.Random(4), "capital", 20, known)
    prompts = [str(chat.prompt) for chat in held_out]
    assert len(prompts) == len(set(prompts)) > 10
    assert not set(prompts) & {str(chat.prompt) for chat in known}


def test_a_story_that_changes_its_hero_is_wrong() -> None:
    story = stories.tell(random.Random(5), stories.fill(random.Random(5), {"hero": "fox"}))
    chat = corpus.Chat("story", (), story, stories.pattern({"hero": "fox"}))
    assert chat.is_right(story)
    assert not chat.is_right(story.replace("fox", "owl"))
    assert not chat.is_right(story.replace("fox", "owl", 1))
    assert not chat.is_right(story + " And then")


# --- packing ----------------------------------------------------------------------------------------------------------


def test_rows_hold_whole_documents_and_labels_never_cross_them() -> None:
    documents = [Document([10 + n] * (n % 7 + 1), [10 + n] * (n % 7 + 1)) for n in range(3 * OPEN_ROWS)]
    rows = list(pack(documents, 8))
    for row in rows:
        assert len(row.ids) == len(row.labels) == len(row.segments) == len(row.positions) == 8
        for token, label, position in zip(row.ids, row.labels, row.positions, strict=True):
            assert label in (token, IGNORED)
            assert position < 8
    kept = sorted(
        token for row in rows for token, segment in zip(row.ids, row.segments, strict=True) if segment != PADDING
    )
    assert kept == sorted(token for document in documents for token in document.ids)


def test_a_document_longer_than_a_row_is_left_out() -> None:
    assert list(pack([Document([1] * 9, [1] * 9)], 8)) == []


# --- training ---------------------------------------------------------------------------------------------------------


def options(directory: Path, held_out: int) -> list[str]:
    """Of the script, for one step."""
    return ["--steps", "1", "--held-out", str(held_out), "--output", str(directory)]


@pytest.fixture
def torchs_settings() -> Iterator[None]:
    """The script sets some for its process."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("torchs_settings")
@pytest.mark.long
def test_training_twice_writes_the_same_files_and_prints_a_held_out_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With less in a step than whoever makes the checkpoint has."""
    monkeypatch.setattr(train, "ROWS", 2)
    monkeypatch.setattr(train, "THREADS", 1)
    monkeypatch.setattr(sys, "argv", ["train", *options(tmp_path / "first", held_out=0)])
    train.main()
    assert "held-out" not in capsys.readouterr().out
    # A model that was trained for one step ends no answer: each would be as long as it may be.
    monkeypatch.setattr(train, "LONGEST_ANSWER", 8)
    monkeypatch.setattr(sys, "argv", ["train", *options(tmp_path / "second", held_out=1)])
    train.main()
    printed = capsys.readouterr().out
    first, second = (
        {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("first", "second")
    )
    assert first.keys() == {file.name for file in PATH.iterdir()}
    assert first == second
    assert "held-out loss" in printed


def test_it_is_a_program(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["train", "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(train.__file__, run_name="__main__")
    assert "--held-out" in capsys.readouterr().out


TRAINED_ON = """
import hashlib, itertools, random
from asyncengine.tiny import corpus
from asyncengine.tiny.packing import encode_chat, encode_text, pack
from asyncengine.tiny.tokenizer import train_tokenizer

rng = random.Random(0)
chats, texts = corpus.chats(rng, 60), corpus.texts(rng, 8)
held_out = [corpus.held_out(random.Random(1), category, 1, chats) for category in corpus.WEIGHTS]
contents = [message["content"] for chat in chats for message in chat.prompt] + [chat.answer for chat in chats]
tokenizer = train_tokenizer(itertools.chain(texts, contents))
documents = [encode_chat(tokenizer, chat) for chat in chats] + [encode_text(tokenizer, text) for text in texts]
rows = list(itertools.islice(pack(itertools.cycle(documents), 256), 24))
print(hashlib.sha256(repr((tokenizer.to_str(), rows, held_out)).encode()).hexdigest())
"""
"""Without torch, which takes long to import."""


def test_what_it_is_trained_on_is_the_same_in_every_process(capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever the order is in which Python goes through a set of strings there."""
    exec(TRAINED_ON, {})
    here = capsys.readouterr().out
    for seed in ("1", "2"):  # one of them is not this process's
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", TRAINED_ON]
        there = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        assert there.stdout == here
