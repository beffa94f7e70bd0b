from __future__ import annotations

import asyncio
import json
import os
import weakref
from pathlib import Path
from shutil import copy
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import TokenType
from safetensors.torch import load_file

from asyncengine import AsyncEngine, EngineConfig, GenerationConfig, RequestOptions, tiny
from asyncengine.errors import CheckpointError, UnsupportedModelError
from asyncengine.model.gguf import description
from asyncengine.model.gguf.checkpoint import checkpoint_at, described
from asyncengine.model.location import _in_directory, check_there, locate
from asyncengine.model.stored.weight import OpenFiles
from asyncengine.model.tokenizer import load_tokenizer
from tests.model import tiny_adapters
from tests.model.gguf.tiny_file import write_tiny

pytestmark = pytest.mark.loops("either")

GREEDY = GenerationConfig(temperature=0, max_tokens=24)
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER = "The capital of France is Paris."


@pytest.fixture(scope="session")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where descriptions are kept; what is compiled stays where it is."""
    kept = tmp_path_factory.getbasetemp() / "descriptions"
    monkeypatch.setattr(description, "cache_directory", lambda: kept)
    monkeypatch.setattr(description, "_OWN", {})


def test_it_has_the_weights_and_the_configuration_of_the_original(file: Path) -> None:
    checkpoint, files = checkpoint_at(file), OpenFiles()
    original = load_file(tiny.PATH / "model.safetensors")
    assert checkpoint.name == str(file)
    assert set(checkpoint.coded) == set(original)
    for name, wanted in original.items():
        assert torch.equal(checkpoint.coded[name].numbers(files, torch.float32), wanted.float())
    stated = json.loads((tiny.PATH / "config.json").read_text("utf-8"))
    for key in ("hidden_size", "head_dim", "num_key_value_heads", "rope_parameters", "rms_norm_eps", "vocab_size"):
        assert checkpoint.config[key] == stated[key]
    assert checkpoint.dtype is torch.float32
    assert checkpoint.eos_token_ids == (2,)


@pytest.mark.parametrize(
    ("kind", "form", "dtype"),
    [
        (Kind.F32, "none", "float32"), (Kind.F16, "none", "float16"), (Kind.BF16, "none", "bfloat16"),
        (Kind.Q8_0, "int8", "bfloat16"), (Kind.Q4_0, "int4", "bfloat16"),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.in_short("2-int4-bfloat16", "0-none-float32", "8-int8-bfloat16")
async def test_an_engine_answers_from_the_file_alone(kind: Kind, form: str, dtype: str, tmp_path: Path) -> None:
    file = write_tiny(tmp_path / "model.gguf", kind)
    async with AsyncEngine(EngineConfig(str(file), device="cpu")) as engine:
        answer = await engine.chat(QUESTION, GREEDY)
        complete = engine.complete_engine_config
    assert (answer.text, answer.finish_reason) == (ANSWER, "stop")
    assert (complete.quantization, complete.dtype) == (form, dtype)


async def test_a_model_in_parts_with_a_draft_model_and_a_tokenizer_from_such_files(tmp_path: Path, file: Path) -> None:
    (tmp_path / "parts").mkdir()
    write_tiny(tmp_path / "parts" / "whole.gguf", split=20)
    draft = write_tiny(tmp_path / "draft.gguf", model=tiny.DRAFT_PATH)
    config = EngineConfig(
        str(tmp_path / "parts"), tokenizer=str(file), speculative_mode="small_draft", additional_models=(str(draft),)
    )
    async with AsyncEngine(config) as engine:
        answer = await engine.chat(QUESTION, GREEDY)
    assert answer.text == ANSWER
    assert answer.usage.accepted_draft_tokens > 0


async def test_new_weights_and_another_model(file: Path) -> None:
    """Weights have transformers' names, as has what a trainer sends."""
    original = load_file(tiny.PATH / "model.safetensors")
    async with AsyncEngine(EngineConfig(str(file))) as engine:
        name = "model.layers.0.self_attn.q_proj.weight"
        await engine.update_weights({name: torch.zeros_like(original[name])})
        assert (await engine.chat(QUESTION, GREEDY)).text != ANSWER
        await engine.update_weights({name: original[name]})
        assert (await engine.chat(QUESTION, GREEDY)).text == ANSWER
        await engine.reload(EngineConfig("tiny"))
        assert (await engine.chat(QUESTION, GREEDY)).text == ANSWER
        await engine.reload(EngineConfig(str(file)))
        assert (await engine.chat(QUESTION, GREEDY)).text == ANSWER


async def test_an_adapter_says_on_a_file_what_it_says_on_the_original(file: Path, tmp_path: Path) -> None:
    """Its weights have transformers' names, and rows of the file's are in another order."""
    adapter, texts = tiny_adapters.write(tmp_path / "adapter", 1), list[str]()
    for model in ("tiny", str(file)):
        async with AsyncEngine(EngineConfig(model, device="cpu", adapters={"it": str(adapter)})) as engine:
            texts.append((await engine.chat(QUESTION, GREEDY, RequestOptions(adapter="it"))).text)
            assert (await engine.chat(QUESTION, GREEDY)).text == ANSWER
    assert texts[0] == texts[1] != ANSWER


async def test_what_the_makers_say_of_sampling_and_of_ends(tmp_path: Path) -> None:
    more: dict[str, Any] = {
        "general.sampling.temp": 0.6, "general.sampling.top_k": 20, "general.sampling.penalty_repeat": 1.1,
        "tokenizer.ggml.eot_token_id": 5,
    }  # fmt: skip
    checkpoint = checkpoint_at(write_tiny(tmp_path / "model.gguf", more=more))
    defaults = checkpoint.generation_defaults
    assert (defaults.temperature, defaults.top_k) == (pytest.approx(0.6), 20)
    assert defaults.repetition_penalty == pytest.approx(1.1)
    assert checkpoint.eos_token_ids == (2, 5)


@pytest.mark.parametrize(
    ("changes", "form"),
    [
        ({}, "int4"), ({"dtype": "float32"}, "none"), ({"decoder_backend": "transformers"}, "none"),
        ({"attention_backend": "torch"}, "none"), ({"quantization": "none"}, "none"),
        ({"quantization": "int8"}, "int8"),
    ],
    ids=str,
)  # fmt: skip
def test_codes_stay_where_they_can(changes: dict[str, Any], form: str, tmp_path: Path) -> None:
    from asyncengine.model.load_settings import settled

    file = write_tiny(tmp_path / "model.gguf", Kind.Q4_0)
    config = EngineConfig(str(file), **changes)
    assert settled(config, checkpoint_at(file), torch.device("cpu")).quantization == form
    assert settled(config, checkpoint_at(file), torch.device("cuda")).quantization in (
        "none",
        changes.get("quantization"),
    )


@pytest.mark.parametrize(("asked", "served"), [("auto", True), ("int4", False)])
async def test_codes_that_cannot_stay_become_numbers_unless_they_were_asked_for(
    asked: Any, served: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from asyncengine.model import loader

    load, models = loader._load, list[weakref.ref[Any]]()

    def only_numbers(plan: Any, run_ahead: Any) -> Any:
        if plan.config.quantization != "none":
            model = torch.nn.Linear(1, 1)
            models.append(weakref.ref(model))
            raise UnsupportedModelError("too far off in int4")
        assert models[0]() is None, "there would be two models in memory"
        return load(plan, run_ahead)

    monkeypatch.setattr(loader, "_load", only_numbers)
    engine = AsyncEngine()
    config = EngineConfig(str(write_tiny(tmp_path / "model.gguf", Kind.Q4_0)), device="cpu", quantization=asked)
    if served:
        await engine.reload(config)
        assert engine.complete_engine_config.quantization == "none"
        assert engine.health().notes == ("quantization: none: too far off in int4",)
        assert (await engine.chat(QUESTION, GREEDY)).text == ANSWER
    else:
        with pytest.raises(UnsupportedModelError, match="too far off in int4"):
            await engine.reload(config)
    await engine.shutdown()


def test_without_a_compiler_codes_become_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from asyncengine.model.load_settings import settled

    monkeypatch.setenv("CXX", "no-such-compiler")
    file = write_tiny(tmp_path / "model.gguf", Kind.Q4_0)
    assert settled(EngineConfig(str(file)), checkpoint_at(file), torch.device("cpu")).quantization == "none"


def test_a_description_is_written_once_and_goes_when_there_are_many(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(description, "cache_directory", lambda: tmp_path)
    first = described(file)
    os.utime(first, (1, 1))
    written = (first / "tokenizer.json").stat().st_mtime_ns
    assert described(file) == first
    assert (first / "tokenizer.json").stat().st_mtime_ns == written
    assert first.stat().st_mtime > 1  # it is in use
    monkeypatch.setattr(description, "MOST_DIRECTORIES", 1)
    other = described(write_tiny(tmp_path / "other.gguf", more={"general.name": "another"}))
    assert first.is_dir(), "a load may be reading it"
    os.utime(first, (1, 1))
    third = described(write_tiny(tmp_path / "third.gguf", more={"general.name": "a third"}))
    assert not first.exists()
    assert {each.name for each in third.parent.iterdir()} == {other.name, third.name}


@pytest.mark.parametrize("refuses", [RuntimeError("no home"), None], ids=["no-home", "not-writable"])
def test_where_nothing_can_be_kept_a_process_has_its_own(
    refuses: Exception | None, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cache() -> Path:
        if refuses is not None:
            raise refuses
        return tmp_path / "a-file"

    (tmp_path / "a-file").write_text("")
    monkeypatch.setattr(description, "cache_directory", cache)
    assert (described(file) / "config.json").is_file()


def test_processes_that_write_it_at_once_do_not_meet(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(description, "cache_directory", lambda: tmp_path)
    write = description._write

    def while_another_is_faster(*arguments: Any) -> None:
        monkeypatch.setattr(description, "_write", write)
        write(*arguments)
        described(file)

    monkeypatch.setattr(description, "_write", while_another_is_faster)
    assert (described(file) / "tokenizer.json").is_file()
    assert len(list((tmp_path / "gguf").iterdir())) == 1


@pytest.mark.parametrize(
    ("more", "wanted"),
    [
        ({}, {"rope_type": "default"}),
        ({"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"type": "none", "factor": 4.0}, {"rope_type": "default"}),
        (
            {"type": "yarn", "factor": 4.0, "original_context_length": 256, "yarn_beta_fast": 16.0},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256, "beta_fast": 16.0},
        ),
    ],
    ids=str,
)
def test_positions_rotate_as_a_file_says(more: dict[str, Any], wanted: dict[str, Any], tmp_path: Path) -> None:
    stated = {f"llama.rope.scaling.{key}": value for key, value in more.items()}
    found = checkpoint_at(write_tiny(tmp_path / "model.gguf", more=stated)).config["rope_parameters"]
    assert found == wanted | {"rope_theta": 10000.0}


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "generation_config.json", "whole.json"])
def test_a_description_of_which_something_is_gone_is_written_anew(
    name: str, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(description, "cache_directory", lambda: tmp_path)
    first = described(file)
    contents = {each.name: each.read_bytes() for each in first.iterdir()}
    (first / name).write_bytes(contents[name][:-1])
    assert described(file) == first
    assert {each.name: each.read_bytes() for each in first.iterdir()} == contents
    assert list(first.parent.iterdir()) == [first]


def test_a_full_disk_leaves_a_process_its_own(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(description, "cache_directory", lambda: tmp_path)
    write, written = description._write, list[Path]()

    def until_it_is_full(header: Any, config: str, directory: Path) -> None:
        written.append(directory)
        write(header, config, directory)
        if directory.is_relative_to(tmp_path / "gguf"):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(description, "_write", until_it_is_full)
    own = described(file)
    assert not own.is_relative_to(tmp_path / "gguf")
    assert described(file) == own, "there is one for each file, however often it is loaded"
    assert len([each for each in written if not each.is_relative_to(tmp_path / "gguf")]) == 1
    assert list((tmp_path / "gguf").iterdir()) == []


def test_files_that_differ_in_what_becomes_settings_have_descriptions_of_their_own(tmp_path: Path) -> None:
    """Frequencies are stored as a tensor, of which the header says nothing but its place."""
    files = [write_tiny(tmp_path / f"{factor}.gguf", factors=[factor] * 16) for factor in (2.0, 4.0)]
    settings = [checkpoint_at(file).config["rope_parameters"]["short_factor"] for file in files]
    assert settings == [[2.0] * 16, [4.0] * 16]


async def test_a_file_that_is_replaced_while_it_is_loaded_is_an_error(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is known of its tensors would be of another one."""
    from asyncengine.model.loader import TransformersLoader

    model, other = Path(copy(file, tmp_path / "model.gguf")), Path(copy(file, tmp_path / "other.gguf"))
    load = TransformersLoader.load

    def after_a_while(self: Any, plan: Any) -> Any:
        if plan.config.model == str(model):
            other.replace(model)
        return load(self, plan)

    monkeypatch.setattr(TransformersLoader, "load", after_a_while)
    async with AsyncEngine(EngineConfig("tiny")) as engine:
        with pytest.raises(CheckpointError, match=r"model\.gguf was replaced or written to while it was loaded"):
            await engine.reload(EngineConfig(str(model)))


@pytest.mark.parametrize("kind", [TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.NORMAL])
async def test_an_answer_ends_at_a_token_that_ends_answers_whatever_the_file_says_of_it(
    kind: TokenType, tmp_path: Path
) -> None:
    renamed = {"<|end|>": "<|im_end|>"}
    file = write_tiny(tmp_path / "model.gguf", more={"tokenizer.ggml.eos_token_id": 5}, renamed=renamed, ends=kind)
    assert set(checkpoint_at(file).eos_token_ids) == {2, 5}
    tokenizer = load_tokenizer(described(file), None)
    assert tokenizer is not None
    assert tokenizer.encode("<|im_end|>")[-1] == 2  # as a template means it
    async with AsyncEngine(EngineConfig(str(file), device="cpu")) as engine:
        answer = await engine.chat(QUESTION, GREEDY)
    assert (answer.text, answer.finish_reason) == (ANSWER, "stop")


@pytest.mark.parametrize(
    ("more", "error", "words"),
    [
        ({"general.architecture": "clip"}, UnsupportedModelError, "architecture 'clip' cannot be read; those of"),
        ({"general.type": "adapter"}, UnsupportedModelError, "it is no model, but of type 'adapter'"),
        ({"tokenizer.ggml.pre": "strange"}, UnsupportedModelError, "pre-tokenizer, 'strange', is not known"),
        ({"llama.block_count": "many"}, CheckpointError, "llama.block_count is 'many'"),
        ({"llama.block_count": 2_000_000_000}, CheckpointError, "llama.block_count is 2000000000"),
    ],
    ids=str,
)
def test_what_cannot_be_served_is_refused_by_its_file(
    more: dict[str, Any], error: type[Exception], words: str, tmp_path: Path
) -> None:
    file = write_tiny(tmp_path / "model.gguf", more=more)
    with pytest.raises(error, match=words) as raised:
        checkpoint_at(file)
    assert str(file) in str(raised.value)


async def test_a_refused_file_leaves_the_present_model(tmp_path: Path) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF" + bytes(60))
    async with AsyncEngine(EngineConfig("tiny")) as engine:
        for config in (
            EngineConfig(str(bad)),
            EngineConfig("tiny", additional_models=(str(bad),), speculative_mode="small_draft"),
        ):
            with pytest.raises((CheckpointError, UnsupportedModelError), match=r"bad\.gguf"):
                await engine.reload(config)
        assert (await engine.chat(QUESTION, GREEDY)).text == ANSWER


def test_a_file_is_found_by_its_directory_and_by_what_is_in_its_name(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0" * 40
    repository = tmp_path / "models--someone--model"
    snapshot = repository / "snapshots" / commit
    (repository / "refs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    names = ("model-Q4_K_M.gguf", "model-Q8_0-00001-of-00002.gguf", "model-Q8_0-00002-of-00002.gguf", "mmproj-F16.gguf")
    for name in names[:1]:
        copy(file, snapshot / name)
    assert locate("someone/model") == locate(str(snapshot)) == snapshot / names[0]
    for name in names[1:]:
        copy(file, snapshot / name)
    assert locate("someone/model:q4_k_m") == snapshot / names[0]
    assert locate("someone/model:Q8_0") == snapshot / names[1]
    (snapshot / "BF16").mkdir()
    copy(file, snapshot / "BF16" / "model-BF16.gguf")
    assert locate("someone/model:bf16") == snapshot / "BF16" / "model-BF16.gguf"
    copy(file, snapshot / "model-Q8_0_L.gguf")
    assert locate("someone/model:Q8_0") == snapshot / names[1]
    with pytest.raises(CheckpointError, match="has 4 GGUF files"):
        locate("someone/model:model-")
    (snapshot / "model-Q8_0_L.gguf").unlink()
    with pytest.raises(
        CheckpointError, match=r"has 2 GGUF files; name one of them: model-Q4_K_M\.gguf, model-Q8_0-00001"
    ):
        locate("someone/model")
    with pytest.raises(CheckpointError, match="no GGUF file with 'Q5_K' in its name; there: BF16/model-BF16"):
        locate("someone/model:Q5_K")
    (snapshot / "model.safetensors").write_bytes(b"")
    assert locate("someone/model") == snapshot
    check_there(EngineConfig("someone/model:Q8_0", tokenizer=str(file)))
    with pytest.raises(CheckpointError, match="there is no such file"):
        locate(str(snapshot / "other.gguf"))


@pytest.mark.parametrize(
    ("names", "kind", "found"),
    [
        (["m-F16", "m-BF16"], "F16", "m-F16"),
        (["m-Q4_K_M", "mmproj-F16", "imatrix_unsloth", "model-mmproj-f16"], "", "m-Q4_K_M"),
        (["m-Q4_K_M", "training_args.bin"], "", "m-Q4_K_M"),
        (["m-Q4_K_M", "m-UD-Q4_K_M"], "q4_k_m", "m-Q4_K_M"),
        (["m-Q4_K_M", "m-UD-Q4_K_M"], "UD-Q4_K_M", "m-UD-Q4_K_M"),
        (["BF16/m-BF16-00001-of-00002", "BF16/m-BF16-00002-of-00002"], "", "BF16/m-BF16-00001-of-00002"),
        (["BF16/m-BF16-00001-of-00002", "m-Q8_0"], "", "m-Q8_0"),
        (["a-Q8_0", "b-Q8_0"], "Q8_0", None),
        (["a-Q8_0", "b-Q4_0"], "", None),
    ],
    ids=str,
)
def test_of_several_files_the_one_is_found_that_is_meant(
    names: list[str], kind: str, found: str | None, tmp_path: Path
) -> None:
    for name in names:
        path = tmp_path / (name if name.endswith(".bin") else f"{name}.gguf")
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    if found is None:
        with pytest.raises(CheckpointError, match=r"2 GGUF files; name one of them"):
            _in_directory(tmp_path, kind)
    else:
        assert _in_directory(tmp_path, kind) == tmp_path / f"{found}.gguf"


@pytest.mark.loops("each")
async def test_the_loop_goes_on_while_a_file_is_read(file: Path, tmp_path: Path) -> None:
    """What a load does happens on other threads."""
    copied = tmp_path / "copied.gguf"
    copy(file, copied)
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.ensure_future(count())
    engine = AsyncEngine()
    await engine.reload(EngineConfig(str(copied)))
    counting.cancel()
    assert turns > 10
    await engine.shutdown()
