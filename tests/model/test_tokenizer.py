"""A tokenizer that is loaded already is not loaded again, unless something that it is made of has changed."""

from __future__ import annotations

from pathlib import Path
from shutil import copytree
from typing import Any

import pytest

from asyncengine import AsyncEngine, EngineConfig, GenerationConfig, InvalidRequestError, tiny
from asyncengine.model.tokenizer import FastTokenizer, load_tokenizer

MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    return copytree(tiny.PATH, tmp_path / "tiny")


def test_equal_files_give_the_tokenizer_that_is_there(copied: Path) -> None:
    present = load_tokenizer(tiny.PATH)
    assert present is not None
    assert load_tokenizer(copied, present) is present


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json"])
def test_a_changed_file_gives_another(copied: Path, name: str) -> None:
    present = load_tokenizer(copied)
    file = copied / name
    file.write_text(file.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    assert load_tokenizer(copied, present) is not present


async def test_a_reload_takes_an_edited_chat_template(copied: Path) -> None:
    settings = EngineConfig(str(copied), device="cpu", mode="interactive")
    async with AsyncEngine(settings) as engine:
        before = (await engine.chat(MESSAGES, GenerationConfig(max_tokens=1))).usage.prompt_tokens
        (copied / "chat_template.jinja").write_text("user user user user user", encoding="utf-8")
        await engine.reload(settings)
        after = (await engine.chat(MESSAGES, GenerationConfig(max_tokens=1))).usage.prompt_tokens
    assert before != after


async def test_half_of_a_surrogate_pair_is_refused_by_its_place() -> None:
    async with AsyncEngine(EngineConfig("tiny", device="cpu", mode="interactive")) as engine:
        for ask in (engine.generate("a\ud800b"), engine.chat([{"role": "user", "content": "a\ud800b"}])):
            with pytest.raises(InvalidRequestError, match=r"'\\ud800' in position \d+: surrogates not allowed"):
                await ask


@pytest.mark.parametrize("special", [True, False])
def test_a_long_text_is_encoded_without_the_interpreter_s_lock(special: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library lets go of it for a batch alone: a prompt of megabytes would stop the loop and the step thread."""
    tokenizer = load_tokenizer(tiny.PATH)
    assert isinstance(tokenizer, FastTokenizer)
    backend, text = tokenizer._backend, "Once upon a time, é €. <|end|>" * 500
    asked: list[str] = []

    class Noted:
        def __getattr__(self, name: str) -> Any:
            asked.append(name)
            return getattr(backend, name)

    monkeypatch.setattr(tokenizer, "_backend", Noted())
    assert tokenizer._encoded(text, special) == backend.encode(text, add_special_tokens=special).ids
    assert tokenizer._encoded("Once", special) == backend.encode("Once", add_special_tokens=special).ids
    assert asked == ["encode_batch_fast", "encode"]
    with pytest.raises(UnicodeEncodeError):
        tokenizer._encoded(text + "\ud800", special)
