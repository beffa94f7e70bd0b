"""A load of a checkpoint that an earlier one found everything out about."""

from __future__ import annotations

import errno
import os
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from asyncengine import CheckpointError, ConfigError, EngineConfig
from asyncengine.builds import cache_directory
from asyncengine.model import built_model, findings, kept_tokenizer, load_check, loader, skeleton
from asyncengine.model import checkpoint as checkpoint_module
from asyncengine.model.checkpoint import Checkpoint
from asyncengine.model.decoder.weights import Packing
from asyncengine.model.findings import Findings, keep, recall
from asyncengine.model.loader import TransformersLoader
from asyncengine.model.runner import TorchModel
from asyncengine.model.skeleton import Skeleton
from asyncengine.model.stored.weight import OpenFiles
from asyncengine.model.verification import Trial
from asyncengine.step.model import LoadedModel
from tests.model.checkpoints import ARCHITECTURES
from tests.model.decoder.test_program import batch_of, load, logits, sequences
from tests.model.test_kept_tokenizer import directory

NOT_KEPT = {"mixtral", "gpt_oss", "gpt_neox"}
"""Experts are put together by transformers, and the head of the last is stored under another name."""
COMPILED = sorted(set(ARCHITECTURES) - {"deepseek_v3", "mistral", "olmo3", "qwen3_moe"})  # which have others' parts
LIKE_OTHERS = {"cohere2", "exaone4", "glm4", "granite", "llama", "olmo2", "qwen3", "smollm3", "starcoder2"}
"""Those whose parts are kept as those of others are."""
INT8 = ("qwen2", "phi3", "gpt2", "opt", "cohere", "gemma2", "mixtral")
"""Between them they have every kind of part that is stored so."""


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where findings are kept meanwhile."""
    for module in (findings, kept_tokenizer):
        monkeypatch.setattr(module, "cache_directory", lambda: tmp_path / "kept")
    return tmp_path / "kept" / "findings"


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list to which each model that transformers builds with its weights is added."""
    built: list[str] = []
    read = built_model.read_model
    monkeypatch.setattr(built_model, "read_model", lambda details: (built.append("one"), read(details))[1])
    return built


def recalled(loaded: LoadedModel) -> bool:
    model = loaded.model
    assert isinstance(model, TorchModel)
    return isinstance(model._model, Skeleton)


@pytest.mark.parametrize(
    ("architecture", "quantization"),
    [
        *(pytest.param(name, "none", marks=pytest.mark.long if name in LIKE_OTHERS else ()) for name in COMPILED),
        *((name, "int8") for name in INT8),
        *((name, "int4") for name in ("qwen2", "gpt2", "mixtral")),
    ],
)
@pytest.mark.in_short(
    "mixtral-int4",
    "mixtral-none",
    "gpt_oss-none",
    "gpt2-int8",
    "gpt2-none",
    "cohere-none",
    "gemma2-none",
    "phi3-none",
    "qwen2-int4",
    "opt-none",
)
def test_a_known_checkpoint_needs_no_model_of_transformers(
    architecture: str, quantization: str, tmp_path: Path, checkpoint: Callable[..., Path], builds: list[str]
) -> None:
    """And what it computes is the same, bit for bit."""
    path = checkpoint(architecture)
    dtype = "float32"
    if quantization != "none":  # which is for bfloat16; weights in another dtype than stored are transformers' business
        dtype = "bfloat16"
        path = shutil.copytree(path, tmp_path / "model")
        stored = load_file(path / "model.safetensors")
        values = {name: value.bfloat16() for name, value in stored.items()}
        save_file(values, path / "model.safetensors", {"format": "pt"})
    first, second = (load(path, dtype=dtype, quantization=quantization) for _ in range(2))
    assert (recalled(first), recalled(second)) == (False, architecture not in NOT_KEPT)
    assert len(builds) == (2 if architecture in NOT_KEPT else 1)
    batch = batch_of([(tokens, 0) for tokens in sequences()])
    assert torch.equal(logits(first, batch), logits(second, batch))
    for name in ("config", "limits", "vocab_size", "hidden_size", "notes", "eos_token_ids", "memory_bytes"):
        assert getattr(first, name) == getattr(second, name), name
    first.model.close()
    second.model.close()


def test_what_was_loaded_before_is_known(
    kept: Path, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EngineConfig(str(checkpoint("llama")), device="cpu")
    assert not load_check.is_known(config)
    load(checkpoint("llama")).model.close()
    assert load_check.is_known(config)
    assert not load_check.is_known(config.replace(dtype="bfloat16"))
    assert not load_check.is_known(config.replace(decoder_backend="transformers"))
    assert not load_check.is_known(config.replace(attention_backend="torch"))
    with pytest.raises(CheckpointError):
        load_check.is_known(config.replace(model=str(kept)))
    monkeypatch.setattr(findings, "stamps", lambda files: [file.stat() for file in [kept / "gone"]])
    assert not load_check.is_known(config)


def test_weights_that_changed_are_another_checkpoint(
    tmp_path: Path, checkpoint: Callable[..., Path], builds: list[str]
) -> None:
    """Even if they are as many bytes as before and somebody has set the file's time back."""
    path = shutil.copytree(checkpoint("qwen3"), tmp_path / "model")
    load(path).model.close()
    weights = path / "model.safetensors"
    before = weights.stat()
    content = (checkpoint("qwen3", seed=1) / "model.safetensors").read_bytes()
    with weights.open("r+b") as file:
        file.write(content)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = weights.stat()
    assert (after.st_ino, after.st_size, after.st_mtime_ns) == (before.st_ino, before.st_size, before.st_mtime_ns)
    loaded, wanted = load(path), load(checkpoint("qwen3", seed=1))
    assert not recalled(loaded)
    batch = batch_of([(sequences()[0], 0)])
    assert torch.equal(logits(loaded, batch), logits(wanted, batch))
    loaded.model.close()
    wanted.model.close()


def test_what_was_kept_of_other_weights_does_not_pass_the_trial(
    tmp_path: Path, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, builds: list[str]
) -> None:
    """Should a name ever stand for another checkpoint: the logits are compared, and then all is found out anew."""
    monkeypatch.setattr(findings, "stamps", lambda files: iter(()))
    load(checkpoint("llama")).model.close()
    loaded = load(checkpoint("llama", seed=1))
    assert len(builds) == 2 and not recalled(loaded)
    again = load(checkpoint("llama", seed=1))
    assert len(builds) == 2 and recalled(again), "what was found out anew is kept in its place"
    batch = batch_of([(sequences()[0], 0)])
    assert torch.equal(logits(loaded, batch), logits(again, batch))
    loaded.model.close()
    again.model.close()


@pytest.mark.parametrize(
    "changes",
    [{"dtype": "bfloat16"}, {"max_single_sequence_length": 64}, {"decoder_backend": "transformers"}],
    ids=str,
)
def test_another_configuration_is_found_out_by_itself(
    changes: dict[str, Any], checkpoint: Callable[..., Path], builds: list[str]
) -> None:
    path = checkpoint("llama")
    load(path).model.close()
    load(path, **changes).model.close()
    assert len(builds) == 2


def test_another_version_is_found_out_by_itself(
    checkpoint: Callable[..., Path], builds: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    load(checkpoint("llama")).model.close()
    monkeypatch.setattr(findings, "version", lambda name: "another")
    load(checkpoint("llama")).model.close()
    assert len(builds) == 2


@pytest.mark.parametrize("damage", [b"", b"x" * 100, None], ids=["empty", "short", "one bit"])
def test_a_damaged_file_is_none(
    damage: bytes | None, kept: Path, checkpoint: Callable[..., Path], builds: list[str]
) -> None:
    load(checkpoint("llama")).model.close()
    (file,) = kept.iterdir()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content if damage is None else damage)
    load(checkpoint("llama")).model.close()
    assert len(builds) == 2
    load(checkpoint("llama")).model.close()
    assert len(builds) == 2, "it was written anew"


def test_without_a_place_to_write_to_nothing_is_kept(
    kept: Path, checkpoint: Callable[..., Path], builds: list[str]
) -> None:
    kept.parent.write_text("not a directory")
    for _ in range(2):
        load(checkpoint("llama")).model.close()
    assert len(builds) == 2


def test_only_so_many_files_are_kept(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(findings, "MOST_FILES", 3)
    for number in range(5):
        keep(kept / str(number), Findings({"number": number}, {}))
        os.utime(kept / str(number), (number, number))
    assert sorted(file.name for file in kept.iterdir()) == ["2", "3", "4"]
    found = recall(kept / "4")
    assert found is not None and found.description == {"number": 4}


def test_what_is_too_large_is_not_kept(kept: Path) -> None:
    keep(kept / "large", Findings({}, {"table": torch.zeros(findings.MOST_BYTES, dtype=torch.uint8)}))
    assert recall(kept / "large") is None


@pytest.mark.parametrize(
    "architecture",
    [
        "qwen2",
        "phi3",
        "gpt2",
        "gemma2",
        *(pytest.param(name, marks=pytest.mark.long) for name in ("phi", "opt", "cohere")),
    ],
)
@pytest.mark.in_short("gpt2", "gemma2")
def test_new_weights_find_their_places(architecture: str, checkpoint: Callable[..., Path]) -> None:
    load(checkpoint(architecture)).model.close()
    loaded, wanted = load(checkpoint(architecture)), load(checkpoint(architecture, seed=1))
    assert recalled(loaded)
    weights = AutoModelForCausalLM.from_pretrained(checkpoint(architecture, seed=1), dtype=torch.float32).state_dict()
    loaded.model.update_weights(weights)
    batch = batch_of([(sequences()[0], 0)])
    assert torch.equal(logits(loaded, batch), logits(wanted, batch))
    loaded.model.close()
    wanted.model.close()


def test_debug_functions_get_a_model_of_transformers(checkpoint: Callable[..., Path]) -> None:
    first, second = (load(checkpoint("gemma3_text")) for _ in range(2))
    assert recalled(second)
    for name in ("structure", "num_parameters", "weight_bytes"):
        assert second.model.debug_call(name, ()) == first.model.debug_call(name, ())
    first.model.close()
    second.model.close()


def test_it_sleeps_and_wakes(checkpoint: Callable[..., Path]) -> None:
    load(checkpoint("llama")).model.close()
    loaded = load(checkpoint("llama"))
    batch = batch_of([(sequences()[0], 0)])
    before = logits(loaded, batch)
    loaded.model.sleep()
    loaded.model.wake()
    assert torch.equal(logits(loaded, batch), before)
    loaded.model.close()


def test_a_broken_tokenizer_is_refused_as_ever(tmp_path: Path, checkpoint: Callable[..., Path]) -> None:
    path = shutil.copytree(checkpoint("llama"), tmp_path / "model")
    load(path).model.close()
    (path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read: Expecting property name"):
        load(path)


def test_the_tokenizer_is_that_of_the_first_load(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is kept apart: it is the same for another dtype, and without findings."""
    path = checkpoint("llama", vocab_size=4096)
    text, messages = "Once upon a time", [{"role": "user", "content": "hello"}]
    first = load(path, tokenizer="tiny")
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *args, **options: pytest.fail("it is read again"))
    loaded = [first, load(path, tokenizer="tiny"), load(path, tokenizer="tiny", dtype="bfloat16")]
    assert [recalled(each) for each in loaded] == [False, True, False]
    for each in loaded:
        assert each.tokenizer is not None
        assert each.tokenizer.encode(text) == first.tokenizer.encode(text)
        assert each.tokenizer.encode_chat(messages, {}) == first.tokenizer.encode_chat(messages, {})
        each.model.close()


def test_a_compiler_that_is_gone_is_no_obstacle(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoint("llama")
    load(path, decoder_backend="auto").model.close()
    loaded = load(path, decoder_backend="auto", attention_backend="torch")
    assert not recalled(loaded) and loaded.config.decoder_backend == "transformers"
    loaded.model.close()


KNOWN = """
import sys
from asyncengine import EngineConfig
from asyncengine.model.loader import TransformersLoader
loader = TransformersLoader()
loader.load(loader.check(EngineConfig(sys.argv[1], device="cpu", tokenizer=sys.argv[2]), None)).model.close()
print(*(name for name in sys.argv[3:] if name in sys.modules))
"""


@pytest.mark.long
def test_the_modules_of_models_are_not_imported(
    tmp_path: Path, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are most of what a first load takes. Of these some are imported for a tokenizer of most classes."""
    for module in (findings, kept_tokenizer):
        monkeypatch.setattr(module, "cache_directory", cache_directory)  # where another process looks
    path = shutil.copytree(checkpoint("llama", vocab_size=4096), tmp_path / "never loaded before")
    tokenizer = str(directory(tmp_path / "tokenizer", "Qwen2Tokenizer"))
    loader = TransformersLoader()
    first = loader.load(loader.check(EngineConfig(str(path), device="cpu", tokenizer=tokenizer), None))
    assert not recalled(first)
    first.model.close()
    slow = ("transformers.models", "transformers.modeling_utils", "sympy", "torch._dynamo")
    assert set(slow) < sys.modules.keys(), "a load that has to find everything out imports them"
    command = [sys.executable, "-c", KNOWN, str(path), tokenizer, "transformers", *slow, "triton"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    imported = subprocess.run(command, env=environment, check=True, text=True, stdout=subprocess.PIPE).stdout.split()
    assert imported == ["transformers"]


def test_the_vocabulary_is_read_while_the_weights_are_packed(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading it holds the interpreter's lock, so it begins when all is ready for what needs no lock."""
    load(checkpoint("llama")).model.close()
    ready, reads = threading.Event(), threading.Event()
    recall_model, read, run = loader.recalled, loader.load_tokenizer, Packing.run
    together: list[bool] = []
    monkeypatch.setattr(loader, "recalled", lambda *args: (recall_model(*args), ready.set())[0])
    monkeypatch.setattr(
        loader, "load_tokenizer", lambda *args: (reads.set(), together.append(ready.is_set()), read(*args))[-1]
    )
    monkeypatch.setattr(Packing, "run", lambda packing: (together.append(reads.wait(10)), run(packing))[-1])
    load(checkpoint("llama")).model.close()
    assert together == [True, True]


@pytest.mark.parametrize("backend", ["compiled", "transformers"])
def test_a_compiled_step_is_warmed_up_by_one_token(
    backend: str, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step reads all weights, and the trial has run some."""
    warmed: list[int] = []
    execute = TorchModel.execute
    monkeypatch.setattr(
        TorchModel, "execute", lambda model, batch: (warmed.append(len(batch.token_ids)), execute(model, batch))[1]
    )
    load(checkpoint("llama"), decoder_backend=backend).model.close()
    assert sorted(warmed) == ([1, 2] if backend == "transformers" else [1])


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system takes no advice about files")
class TestReadingAhead:
    """The weight files are asked for as soon as it is known which they are."""

    def test_nothing_waits_for_it(self, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[tuple[int, int]] = []
        done = threading.Event()

        def advise(file: int, start: int, length: int, advice: int) -> None:
            asked.append((start, length))
            assert done.wait(60), "the checks of a load wait until its weights are read"

        monkeypatch.setattr(os, "posix_fadvise", advise)
        path = checkpoint("llama")
        size = (path / "model.safetensors").stat().st_size
        plan = TransformersLoader().check(EngineConfig(str(path), device="cpu"), None)
        done.set()
        TransformersLoader().load(plan).model.close()
        assert asked[0][0] == 0 and sum(length for _, length in asked) >= size

    def test_nothing_is_asked_for_that_would_push_out_what_else_is_in_memory(
        self, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[int] = []
        monkeypatch.setattr(os, "posix_fadvise", lambda file, start, length, advice: asked.append(start))
        path = checkpoint("llama")
        for spare in (-1, 0):
            reading = Checkpoint(path)
            reading.read_ahead(free=2 * (path / "model.safetensors").stat().st_size + spare)
            if reading._reading is not None:
                reading._reading.join()
            assert bool(asked) == (spare == 0)

    def test_a_file_system_that_takes_no_advice_is_no_obstacle(
        self, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked = []

        def refuse(file: int, start: int, length: int, advice: int) -> None:
            asked.append(start)
            raise OSError(errno.EINVAL, "Invalid argument")

        monkeypatch.setattr(os, "posix_fadvise", refuse)
        failures: list[object] = []
        monkeypatch.setattr(threading, "excepthook", failures.append)
        load(checkpoint("llama")).model.close()
        assert asked == [0] and not failures

    @pytest.mark.parametrize("refused", [True, False], ids=["refused", "loaded"])
    def test_it_ends_with_the_load(
        self, refused: bool, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """However much there is still to be asked for."""
        begun, asked = threading.Event(), []

        def advise(file: int, start: int, length: int, advice: int) -> None:
            begun.set()
            asked.append(start)

        monkeypatch.setattr(os, "posix_fadvise", advise)
        monkeypatch.setattr(checkpoint_module, "_AHEAD", 1)
        path = checkpoint("llama")
        config = EngineConfig(str(path), device="cpu", max_single_sequence_length=1 << 30 if refused else None)
        if refused:
            with pytest.raises(ConfigError):
                TransformersLoader().check(config, None)
        else:
            plan = TransformersLoader().check(config, None)
            assert begun.wait(60)
            TransformersLoader().load(plan).model.close()
        assert not [thread for thread in threading.enumerate() if thread.name == "asyncengine-read-ahead"]


@pytest.mark.parametrize(
    "architecture", ["gpt2", "qwen2", *(pytest.param(name, marks=pytest.mark.long) for name in ("llama", "starcoder2"))]
)
def test_no_weight_is_looked_at_before_all_are_packed(
    architecture: str, tmp_path: Path, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look at a file that has not been read waits for it, and the tokenizer is read meanwhile."""
    path = shutil.copytree(checkpoint(architecture), tmp_path / "model")
    load(path).model.close()
    weights = path / "model.safetensors"
    others = (checkpoint(architecture, seed=1) / "model.safetensors").read_bytes()
    expected = load(checkpoint(architecture, seed=1), decoder_backend="transformers")
    run = Packing.run

    def change_and_run(packing: Packing) -> None:
        with weights.open("r+b") as file:  # the pages that are mapped
            file.write(others)
        run(packing)

    monkeypatch.setattr(Packing, "run", change_and_run)
    monkeypatch.setattr(Trial, "run", lambda *args, **kwargs: 0.0)
    loaded = load(path)
    assert recalled(loaded)
    batch = batch_of([(sequences()[0], 0)])
    assert torch.allclose(logits(loaded, batch), logits(expected, batch), atol=1e-4)
    loaded.model.close()
    expected.model.close()


def test_a_known_checkpoint_is_tried_by_one_prefill(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    run = TorchModel.logits
    monkeypatch.setattr(
        TorchModel, "logits", lambda model, batch: (steps.append(len(batch.token_ids)), run(model, batch))[1]
    )
    load(checkpoint("llama")).model.close()
    first = len(steps)
    load(checkpoint("llama")).model.close()
    assert (steps[:first], steps[first:]) == ([12, 8, 2, 2, 1], [12, 1])  # one to warm up


def test_numbers_that_may_not_be_used_where_they_are_are_copied(
    tmp_path: Path, checkpoint: Callable[..., Path], builds: list[str]
) -> None:
    path = shutil.copytree(checkpoint("llama"), tmp_path / "model")
    weights = path / "model.safetensors"
    content = weights.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    weights.write_bytes(struct.pack("<Q", length + 1) + content[8 : 8 + length] + b" " + content[8 + length :])
    loaded, wanted = load(path), load(checkpoint("llama"))
    mapped = skeleton._numbers(Checkpoint(path), {"model.norm.weight"}, torch.float32, OpenFiles())
    assert mapped["model.norm.weight"].data_ptr() % 4 == 0
    again = load(path)
    assert recalled(again) and builds == ["one"] * 2
    batch = batch_of([(sequences()[0], 0)])
    assert torch.equal(logits(again, batch), logits(wanted, batch))
    for each in (loaded, wanted, again):
        each.model.close()


def test_a_model_that_is_refused_is_not_looked_at_on_the_tokenizer_thread(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where transformers makes a model, its tokenizer was read before: it does not bear two threads at a time."""
    order: list[str] = []
    read, build = loader.load_tokenizer, loader.build
    monkeypatch.setattr(loader, "load_tokenizer", lambda *args: (read(*args), order.append("tokenizer"))[0])
    monkeypatch.setattr(loader, "build", lambda *args: (order.append("model"), build(*args))[1])
    load(checkpoint("llama")).model.close()
    assert order == ["tokenizer", "model"]
