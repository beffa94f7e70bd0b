"""A tokenizer that is put together from what was kept is the one that transformers made."""

from __future__ import annotations

import json
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
from transformers import AutoTokenizer

from asyncengine import tiny
from asyncengine.grammar.vocabulary import TokenTable
from asyncengine.model import kept_tokenizer
from asyncengine.model.tokenizer import FastTokenizer, load_tokenizer

CLASSES = {
    "TokenizersBackend": "llama",
    "Qwen2Tokenizer": "qwen3",
    "GPT2Tokenizer": "gpt2",
    "GemmaTokenizer": "gemma3_text",
    "GPTNeoXTokenizer": "gpt_neox",
    "CohereTokenizer": "cohere",
}
MESSAGES = [{"role": "user", "content": "Which is larger, 9.11 or 9.9?"}]
TEXTS = ["Once upon a time", "  two\n\n\tspaces <|end|> l'été 12345 ßßß", "数字 🙂 \u200d", ""]


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where tokenizers are kept meanwhile."""
    monkeypatch.setattr(kept_tokenizer, "cache_directory", lambda: tmp_path / "kept")
    return tmp_path / "kept" / "tokenizers"


def directory(path: Path, kind: str = "TokenizersBackend", **settings: Any) -> Path:
    """A copy of the embedded model's tokenizer, of another class."""
    copytree(tiny.PATH, path)
    changes = {
        "tokenizer_config.json": {"tokenizer_class": kind, "unk_token": "<|pad|>", **settings},
        "config.json": {"model_type": CLASSES[kind]},
    }
    for name, values in changes.items():
        content = json.loads((path / name).read_text(encoding="utf-8"))
        (path / name).write_text(json.dumps(content | values), encoding="utf-8")
    return path


def read(path: Path) -> FastTokenizer:
    tokenizer = load_tokenizer(path)
    assert isinstance(tokenizer, FastTokenizer)
    return tokenizer


def read_and_keep(path: Path) -> FastTokenizer:
    tokenizer = read(path)
    assert tokenizer.keep_at is not None
    tokenizer.keep()
    return tokenizer


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A list to which each directory is added that transformers reads a tokenizer from."""
    read: list[Path] = []
    from_pretrained = AutoTokenizer.from_pretrained
    monkeypatch.setattr(
        AutoTokenizer,
        "from_pretrained",
        lambda path, **options: (read.append(path), from_pretrained(path, **options))[1],
    )
    return read


@pytest.mark.parametrize("kind", CLASSES)
def test_it_is_the_same(kind: str, tmp_path: Path, made: list[Path]) -> None:
    path = directory(tmp_path / "model", kind)
    first, second = read_and_keep(path), read(path)
    assert made == [path] and second.keep_at is None
    one, other = first._chat, second._chat
    states = [dict(vars(tokenizer)) for tokenizer in (one, other)]
    backends = [state.pop("_tokenizer") for state in states]
    assert backends[0].to_str() == backends[1].to_str()
    assert backends[0].encode_special_tokens == backends[1].encode_special_tokens
    for name in ("_vocab", "_merges"):
        states[0].pop(name, None)
    assert states[0] == states[1]
    for name in ("special_tokens_map", "all_special_ids", "model_input_names", "chat_template", "eos_token_id"):
        assert getattr(one, name) == getattr(other, name), name
    for text in TEXTS:
        assert first.encode(text) == second.encode(text)
        assert one(text)["input_ids"] == other(text)["input_ids"]
    ids = range(one.vocab_size)
    assert [first.decode([i], True) for i in ids] == [second.decode([i], True) for i in ids]
    assert first.encode_chat(MESSAGES, {}) == second.encode_chat(MESSAGES, {})
    for name in ("parses_responses", "call_marks", "reasons", "takes_tools"):
        assert getattr(first, name) == getattr(second, name), name
    tables = [tokenizer.token_table() for tokenizer in (first, second)]
    assert all(isinstance(table, TokenTable) for table in tables)
    assert tables[0].special == tables[1].special and tables[0].tokenizer_json == tables[1].tokenizer_json


def test_a_class_that_computes_something_is_imported_and_one_that_constructs_is_not(tmp_path: Path) -> None:
    """Importing a class of a model is importing transformers' list of all of them."""
    for kind, same in (("CohereTokenizer", True), ("Qwen2Tokenizer", False)):
        path = directory(tmp_path / kind, kind)
        first, second = read_and_keep(path), read(path)
        assert type(first._chat).__qualname__ == kind
        assert (type(first._chat) is type(second._chat)) == same


@pytest.mark.parametrize("space", ["", " ", "\n"], ids=["words", "space", "line"])
def test_tokens_and_merges_are_kept_by_themselves_where_a_line_can_hold_them(
    space: str, tmp_path: Path, kept: Path, made: list[Path]
) -> None:
    path = directory(tmp_path / "model")
    content = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))
    if space:
        vocabulary = content["model"]["vocab"]
        for token in (space, f"e{space}"):
            vocabulary[token] = max(vocabulary.values()) + 1
        content["model"]["merges"].append(["e", space])
        (path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    first, second = read_and_keep(path), read(path)
    assert made == [path]
    assert first._chat._tokenizer.to_str() == second._chat._tokenizer.to_str()
    (file,) = kept.iterdir()
    about = json.loads(file.read_bytes()[32:].partition(b"\n")[0])
    assert len(about["parts"]) == (1 if space else 3)


def test_added_tokens_have_their_numbers_and_ways(tmp_path: Path, made: list[Path]) -> None:
    """Those that are in the vocabulary and those behind it, special and not, by turns."""
    path = directory(tmp_path / "model")
    content = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))
    following = max(*content["model"]["vocab"].values(), *(token["id"] for token in content["added_tokens"])) + 1
    for number, special in enumerate((True, False, False, True)):
        content["added_tokens"].append(
            {
                "id": following + number, "content": f"[{number}]", "special": special, "single_word": number == 1,
                "lstrip": number == 2, "rstrip": number == 3, "normalized": not special,
            }
        )  # fmt: skip
    (path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    first, second = read_and_keep(path), read(path)
    assert made == [path]
    for text in ("a [0] b", "a[1]b [1] c", "a [2] b", "a [3] b", "[0][1][2][3]"):
        assert first.encode(text) == second.encode(text)
        assert any(token >= following for token in second.encode(text))


def test_special_tokens_that_are_text_stay_so(tmp_path: Path) -> None:
    path = directory(tmp_path / "model", split_special_tokens=True)
    first, second = read_and_keep(path), read(path)
    assert len(first.encode("<|end|>")) > 1
    assert first.encode("<|end|>") == second.encode("<|end|>")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json", "chat_template.jinja"])
def test_a_changed_file_is_read(name: str, tmp_path: Path, made: list[Path]) -> None:
    path = directory(tmp_path / "model")
    read_and_keep(path)
    file = path / name
    file.write_text(file.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    read(path)
    assert made == [path, path]


def test_another_version_reads_it(tmp_path: Path, made: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = directory(tmp_path / "model")
    read_and_keep(path)
    monkeypatch.setattr(kept_tokenizer, "version", lambda name: "another")
    read(path)
    assert len(made) == 2


@pytest.mark.parametrize("damage", ["cut", "bit", "class"])
def test_what_is_damaged_is_read_by_transformers(
    damage: str, tmp_path: Path, kept: Path, made: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = directory(tmp_path / "model")
    text = TEXTS[1]
    first = read_and_keep(path)
    (file,) = kept.iterdir()
    content = bytearray(file.read_bytes())
    if damage == "class":
        monkeypatch.setattr(kept_tokenizer, "_read", lambda value: {}["a name that another version has"])
    elif damage == "cut":
        file.write_bytes(content[:100])
    else:
        content[-2] ^= 1
        file.write_bytes(content)
    assert read(path).encode(text) == first.encode(text)
    assert len(made) == 2


def test_what_cannot_be_written_down_is_not_kept(tmp_path: Path, kept: Path) -> None:
    tokenizer = read(directory(tmp_path / "model"))
    tokenizer._chat.of_our_own = object()
    tokenizer.keep()
    assert not kept.exists()


def test_what_would_not_be_the_same_is_not_kept(tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = read(directory(tmp_path / "model"))
    monkeypatch.setattr(tokenizer._chat, "apply_chat_template", lambda *args, **options: "something else")
    assert not kept_tokenizer.keep(tokenizer.keep_at, tokenizer._chat)
    monkeypatch.undo()
    place = kept / "here"
    assert kept_tokenizer.keep(place, tokenizer._chat) and place.exists()


@pytest.mark.parametrize("other", ["vocabulary", "attribute"])
def test_what_is_put_together_differently_is_not_kept(
    other: str, tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = read(directory(tmp_path / "model"))
    assemble = kept_tokenizer._assembled

    def differently(content: bytes) -> Any:
        again = assemble(content)
        if other == "vocabulary":
            again.backend_tokenizer.add_tokens(["one more"])
        else:
            again.padding_side = "left" if again.padding_side == "right" else "right"
        return again

    monkeypatch.setattr(kept_tokenizer, "_assembled", differently)
    assert not kept_tokenizer.keep(kept / "here", tokenizer._chat)
    assert not kept.exists()


def test_a_class_of_somebody_elses_is_not_kept(tmp_path: Path, kept: Path) -> None:
    tokenizer = read(directory(tmp_path / "model"))

    class Own(type(tokenizer._chat)):  # type: ignore[misc]
        def decode(self, *args: Any, **options: Any) -> str:
            return "mine"

    tokenizer._chat.__class__ = Own
    assert not kept_tokenizer.keep(kept / "here", tokenizer._chat)


def test_without_a_home_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(kept_tokenizer, "cache_directory", homeless)
    assert read(directory(tmp_path / "model")).keep_at is None
