"""Text files of checkpoints that are not what they should be: told by their names, before the present model goes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from asyncengine import AsyncEngine, CheckpointError, EngineConfig, EngineState, GenerationConfig
from asyncengine.model import kept_tokenizer, load_check
from asyncengine.model.loader import TransformersLoader
from tests.model import letters

pytestmark = pytest.mark.loops("either")

Make = Callable[..., Path]
GREEDY = GenerationConfig(temperature=0.0, max_tokens=3)
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def config(path: Path, **changes: Any) -> EngineConfig:
    return EngineConfig(str(path), **{"device": "cpu", "mode": "interactive", **changes})


@pytest.fixture
def whole(checkpoint: Make, tmp_path: Path) -> Path:
    """A checkpoint with every text file that may be there."""
    path = Path(shutil.copytree(checkpoint("llama", vocab_size=letters.VOCABULARY), tmp_path / "whole"))
    letters.write(path)
    objects: dict[str, Any] = {
        "generation_config.json": {"eos_token_id": letters.END},
        "special_tokens_map.json": {"eos_token": "<end>"},
        "added_tokens.json": {},
        "model.safetensors.index.json": {"weight_map": {"any": "model.safetensors"}},
        "hf_quant_config.json": {},
        "config_sentence_transformers.json": {"prompts": {}},
    }
    for name, content in objects.items():
        (path / name).write_text(json.dumps(content))
    (path / "modules.json").write_text("[]")
    (path / "chat_template.jinja").write_text(TEMPLATE)
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "rag.jinja").write_text(TEMPLATE)
    return path


@pytest.fixture
def first_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The present model has to go before the next one is loaded."""
    monkeypatch.setattr(load_check, "fits", lambda details, current: False)


def cut(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def made_a_directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


JSON: dict[str, Callable[[Path], Any]] = {
    "cut": lambda file: file.write_text("{"),
    "empty": lambda file: file.write_bytes(b""),
    "a number": lambda file: file.write_text("7"),
    "another type": lambda file: file.write_text("{}" if file.name == "modules.json" else "[1]"),
    "too deep": lambda file: file.write_text("[" * 100_000),
    "not UTF-8": lambda file: file.write_bytes(b'{"a": "\xff"}'),
    "a directory": made_a_directory,
}
TEMPLATES = {"cut": cut, "not UTF-8": JSON["not UTF-8"], "a directory": made_a_directory}


def damages(path: Path) -> Iterator[tuple[str, Callable[[Path], Any]]]:
    for file in sorted(path.rglob("*")):
        kinds = {".json": JSON, ".jinja": TEMPLATES}.get(file.suffix, {})
        yield from ((str(file.relative_to(path)), damage) for damage in kinds.values())


@pytest.mark.usefixtures("first_out")
async def test_the_old_model_serves_on_whatever_file_is_damaged(whole: Path, tmp_path: Path) -> None:
    broken, tried = tmp_path / "broken", set()
    async with AsyncEngine(config(whole)) as engine:
        before = (await engine.generate([1, 2, 3], GREEDY)).token_ids
        for name, damage in damages(whole):
            shutil.copytree(whole, broken)
            damage(broken / name)
            with pytest.raises(CheckpointError) as caught:
                await engine.reload(config(broken))
            assert str(broken / name) in str(caught.value)
            assert engine.state is EngineState.READY
            shutil.rmtree(broken)
            tried.add(name)
        assert (await engine.generate([1, 2, 3], GREEDY)).token_ids == before
    assert len(tried) == 12  # config.json, tokenizer.json and tokenizer_config.json among them


@pytest.mark.usefixtures("first_out")
async def test_those_of_a_draft_model_and_of_a_tokenizer_elsewhere_are_told_as_well(
    whole: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    drafting: dict[str, Any] = {"additional_models": [str(broken)], "speculative_mode": "small_draft"}
    places: list[tuple[tuple[str, ...], dict[str, Any]]] = [
        (("config.json", "generation_config.json", "tokenizer.json"), drafting),
        (("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"), {"tokenizer": str(broken)}),
    ]
    async with AsyncEngine(config(whole)) as engine:
        for names, settings in places:
            for name in names:
                for damage in (TEMPLATES if name.endswith(".jinja") else JSON).values():
                    shutil.copytree(whole, broken)
                    damage(broken / name)
                    with pytest.raises(CheckpointError) as caught:
                        await engine.reload(config(whole, **settings))
                    assert str(broken / name) in str(caught.value)
                    shutil.rmtree(broken)
        assert engine.state is EngineState.READY


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("tokenizer.json", {}, "tokenizer.json has no model"),
        ("tokenizer.json", {"model": {"type": "BPE"}}, r"the tokenizer in .* cannot be loaded"),
        ("generation_config.json", {"eos_token_id": "<end>"}, r"generation_config.json: eos_token_id is '<end>'"),
        ("generation_config.json", {"eos_token_id": [0, 1.5]}, r"eos_token_id is \[0, 1.5\]; expected token ids"),
        ("model.safetensors.index.json", {}, "has no weight_map"),
        ("model.safetensors.index.json", {"weight_map": {}}, "has no weight_map"),
        ("model.safetensors.index.json", {"weight_map": {"a": 5}}, "has 5 in its weight_map; expected files"),
        ("model.safetensors.index.json", {"weight_map": {"a": "."}}, r"has '\.' in its weight_map; expected files"),
    ],
)
@pytest.mark.usefixtures("first_out")
def test_what_is_in_them_and_makes_no_sense(whole: Path, name: str, content: Any, says: str) -> None:
    loader = TransformersLoader()
    present = loader.load(loader.check(config(whole), None))
    present.model.close()
    (whole / name).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=says):
        loader.check(config(whole), present)


def test_of_a_draft_model_with_another_vocabulary_the_file_is_named_that_has_none(whole: Path, tmp_path: Path) -> None:
    draft = Path(shutil.copytree(whole, tmp_path / "draft"))
    (draft / "tokenizer.json").write_text('{"model": {"vocab": {}}, "added_tokens": [5]}')
    drafting: dict[str, Any] = {"additional_models": [str(draft)], "speculative_mode": "small_draft"}
    with pytest.raises(CheckpointError, match=r"draft/tokenizer.json has no vocabulary"):
        TransformersLoader().check(config(whole, **drafting), None)


@pytest.mark.usefixtures("first_out")
def test_a_tokenizer_that_was_read_to_see_whether_it_can_be_is_not_read_again(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_tokenizer, "place_of", lambda path, sources: None)
    loader = TransformersLoader()
    present = loader.load(loader.check(config(whole, tokenizer="tiny"), None))
    present.model.close()
    read, read_it = [], AutoTokenizer.from_pretrained

    def noted(path: Path, **arguments: Any) -> Any:
        read.append(path)
        return read_it(path, **arguments)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", noted)
    plan = loader.check(config(whole), present)
    assert not plan.fits_beside and read == [whole]
    loaded = loader.load(plan)
    loaded.model.close()
    assert read == [whole]
    assert loaded.tokenizer is not None and loaded.tokenizer is not present.tokenizer
    assert loaded.tokenizer.encode_chat([{"role": "user", "content": "the"}], {}) == loaded.tokenizer.encode("the")


def test_where_the_chat_template_has_a_file_of_its_own_it_is_found_and_judged(whole: Path) -> None:
    shutil.rmtree(whole / "additional_chat_templates")
    (whole / "chat_template.jinja").unlink()
    old = whole / "chat_template.json"
    for content in ({"chat_template": TEMPLATE}, {}, {"chat_template": 5}):
        old.write_text(json.dumps(content))
        TransformersLoader().check(config(whole), None)
    loader = TransformersLoader()
    for text, says in (("{", "cannot be read"), ('{"chat_template": "{{ a"}', "is no chat template: line 1")):
        old.write_text(text)
        with pytest.raises(CheckpointError, match=rf"chat_template.json {says}"):
            loader.load(loader.check(config(whole), None))
