"""What a checkpoint's headers tell is found out before the present model goes, where it would have to go first."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from asyncengine import AsyncEngine, CheckpointError, EngineConfig, EngineState, GenerationConfig
from asyncengine.model import load_check, rehearsal
from asyncengine.model.loader import TransformersLoader
from asyncengine.step.model import LoadedModel
from tests.model.gguf import files
from tests.model.stored import coded_checkpoints

pytestmark = pytest.mark.loops("either")

Make = Callable[..., Path]
Tensors = dict[str, torch.Tensor]
GREEDY = GenerationConfig(temperature=0.0, max_tokens=3)
Q = "model.layers.1.self_attn.q_proj"


def config(path: Path, **changes: Any) -> EngineConfig:
    return EngineConfig(str(path), **{"device": "cpu", "mode": "interactive", **changes})


@pytest.fixture(scope="module")
def present(checkpoint: Make) -> LoadedModel:
    loader = TransformersLoader()
    loaded = loader.load(loader.check(config(checkpoint("llama")), None))
    loaded.model.close()
    return loaded


@pytest.fixture
def first_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The present model has to go before the next one is loaded, of which nothing is known from an earlier load."""
    monkeypatch.setattr(load_check, "fits", lambda details, current: False)
    monkeypatch.setattr(load_check, "place_of", lambda *_: None)


def rewrite(path: Path, change: Callable[[Tensors], Any]) -> None:
    """Changes the tensors of a checkpoint's file."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def without(name: str) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.pop(name)


def halved(name: str) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({name: tensors[name][: len(tensors[name]) // 2].clone()})


def in_shards(path: Path) -> None:
    """Two files and their index, which names them and not what is in them."""
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names = sorted(tensors)
    for at, part in (("a", names[::2]), ("b", names[1::2])):
        save_file({name: tensors[name] for name in part}, path / f"{at}.safetensors", {"format": "pt"})
    index = {"weight_map": {name: f"{'ab'[at % 2]}.safetensors" for at, name in enumerate(names)}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


@dataclass(frozen=True)
class Fault:
    architecture: str
    says: str
    change: Callable[[Tensors], Any]
    method: str = ""
    sharded: bool = False
    stated: dict[str, Any] = field(default_factory=dict)


EXPERT = "model.layers.1.block_sparse_moe.experts.2.w3"
FAULTS = {
    "a weight is missing": Fault("llama", rf"1 weights are missing: {Q}\.weight", without(f"{Q}.weight")),
    "a weight is of another shape": Fault(
        "llama", rf"1 weights are of another shape: {Q}\.weight", halved(f"{Q}.weight")
    ),
    "one is missing in shards": Fault(
        "llama", rf"1 weights are missing: {Q}\.weight", without(f"{Q}.weight"), sharded=True
    ),
    "a tied head has no embedding": Fault(
        "gemma2", r"1 weights are missing: model\.embed_tokens\.weight", without("model.embed_tokens.weight")
    ),
    "an expert lacks a weight": Fault(
        "mixtral", rf"1 weights are missing: {EXPERT}\.weight", without(f"{EXPERT}.weight")
    ),
    "an expert is of another shape": Fault(
        "mixtral", rf"1 weights are of another shape: {EXPERT}\.weight", halved(f"{EXPERT}.weight")
    ),
    "experts are fewer than there should be": Fault(
        "mixtral",
        r"2 weights are of another shape: model\.layers\.1\.mlp\.experts\.down_proj",
        lambda tensors: [tensors.pop(f"{EXPERT[:-4]}3.{part}.weight") for part in ("w1", "w2", "w3")],
    ),
    "all experts are of another shape": Fault(
        "mixtral",
        r"6 weights are of another shape: model\.layers\.0\.mlp\.experts\.down_proj",
        lambda tensors: None,
        stated={"intermediate_size": 128},
    ),
    "beside codes a weight is missing": Fault(
        "qwen2", rf"1 weights are missing: {Q}\.bias", without(f"{Q}.bias"), method="gptq"
    ),
    "codes are of another shape": Fault(
        "llama",
        r"9 weights are of another shape: model\.layers\.0\.mlp\.down_proj\.weight",
        lambda tensors: None,
        method="awq",
        stated={"intermediate_size": 128},
    ),
}


@pytest.mark.usefixtures("first_out")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_decoder_whose_weights_are_not_its_own_is_refused_by_the_check(
    fault: str, checkpoint: Make, present: LoadedModel, tmp_path: Path
) -> None:
    what = FAULTS[fault]
    path = shutil.copytree(checkpoint(what.architecture), tmp_path / "model")
    if what.method:
        path, _ = coded_checkpoints.write(tmp_path, checkpoint(what.architecture), what.method)
    rewrite(path, what.change)
    if what.sharded:
        in_shards(path)
    about = path / "config.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | what.stated))
    with pytest.raises(CheckpointError, match=what.says):
        TransformersLoader().check(config(path), present)


@pytest.mark.usefixtures("first_out")
@pytest.mark.parametrize("fault", ["a weight is left over", "a weight is missing"])
def test_a_gguf_file_is_refused_by_the_check(
    fault: str, checkpoint: Make, present: LoadedModel, tmp_path: Path
) -> None:
    def edit(metadata: dict[str, Any], tensors: Tensors) -> None:
        if fault == "a weight is missing":
            del tensors["blk.1.attn_q.weight"]
        else:
            tensors["blk.1.attn_q.bias"] = torch.zeros(64)  # the first layer has none

    file = files.write(tmp_path / "model.gguf", checkpoint("llama"), "llama", edit=edit)
    says = "no use for 1 weights" if fault == "a weight is left over" else "1 weights are missing"
    with pytest.raises(CheckpointError, match=rf"{says}: {Q}\."):
        TransformersLoader().check(config(file, tokenizer=None), present)


@pytest.mark.usefixtures("first_out")
@pytest.mark.parametrize(
    ("architecture", "method"),
    [("gemma2", ""), ("mixtral", ""), ("mixtral", "awq"), ("qwen2", "gptq"), ("gpt2", "gguf")],
)
def test_one_whose_weights_are_whole_is_rehearsed_and_passes(
    architecture: str,
    method: str,
    checkpoint: Make,
    present: LoadedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = checkpoint(architecture)
    if method == "gguf":
        path = files.write(tmp_path / "model.gguf", path, architecture)
    elif method:
        path, _ = coded_checkpoints.write(tmp_path, path, method)

    def make_up(*_: Any) -> None:
        raise AssertionError("numbers are made up")

    monkeypatch.setattr(PreTrainedModel, "initialize_weights", make_up)
    done: list[Any] = []
    rehearsed = rehearsal.rehearsed
    monkeypatch.setattr(rehearsal, "rehearsed", lambda *args, **more: done.append(rehearsed(*args, **more)) or done[-1])
    assert not TransformersLoader().check(config(path), present).fits_beside
    [(model, report)] = done
    assert not any(report[name] for name in ("missing_keys", "mismatched_keys", "unexpected_keys"))
    assert all(weight.is_meta for weight in (*model.parameters(), *model.buffers()))


@pytest.mark.usefixtures("first_out")
def test_one_expert_stands_for_all_of_a_layer(
    checkpoint: Make, present: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers takes a copy of its rules for each weight that it puts together with others."""
    given: list[int] = []
    loaded = rehearsal.loaded
    monkeypatch.setattr(
        rehearsal, "loaded", lambda kind, source, **more: given.append(len(source)) or loaded(kind, source, **more)
    )
    TransformersLoader().check(config(checkpoint("mixtral")), present)
    whole = len(load_file(checkpoint("mixtral") / "model.safetensors"))
    assert given == [whole - 3 * 3 * 3]  # three of four experts, with three weights in each of three layers


@pytest.mark.usefixtures("first_out")
def test_what_cannot_be_rehearsed_is_left_to_the_load(
    checkpoint: Make, present: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("nothing of this works without numbers")

    path = shutil.copytree(checkpoint("llama"), tmp_path / "model")
    rewrite(path, without(f"{Q}.weight"))
    monkeypatch.setattr(rehearsal, "loaded", fail)
    assert not TransformersLoader().check(config(path), present).fits_beside


@pytest.mark.usefixtures("first_out")
def test_pickles_have_nothing_to_rehearse(checkpoint: Make, present: LoadedModel, tmp_path: Path) -> None:
    path = shutil.copytree(checkpoint("llama"), tmp_path / "model")
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    assert not TransformersLoader().check(config(path), present).fits_beside


def test_what_is_loaded_beside_is_not_rehearsed(
    checkpoint: Make, present: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(rehearsal, "rehearse")
    for current in (None, present):
        assert TransformersLoader().check(config(checkpoint("llama", seed=1)), current).fits_beside


@pytest.mark.usefixtures("first_out")
async def test_the_old_model_serves_on_after_each_of_them(checkpoint: Make, tmp_path: Path) -> None:
    """A weight of the model or of its draft model, a draft model without a head, a layer behind the pooling."""
    whole = checkpoint("llama")
    broken, headless, odd = (Path(shutil.copytree(whole, tmp_path / name)) for name in ("broken", "headless", "odd"))
    rewrite(broken, without(f"{Q}.weight"))
    rewrite(headless, without("lm_head.weight"))
    modules = [
        {"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
    ]
    (odd / "modules.json").write_text(json.dumps(modules))
    for name, about in (
        ("1_Pooling", {"word_embedding_dimension": 48, "pooling_mode_lasttoken": True}),
        ("2_Dense", {"in_features": 48, "out_features": 8, "bias": False, "activation_function": "torch.nn.Identity"}),
    ):
        (odd / name).mkdir()
        (odd / name / "config.json").write_text(json.dumps(about))
    save_file({"linear.weight": torch.zeros(8, 48)}, odd / "2_Dense" / "model.safetensors")
    drafting: dict[str, Any] = {"speculative_mode": "small_draft"}
    async with AsyncEngine(config(whole)) as engine:
        before = (await engine.generate([1, 2, 3], GREEDY)).token_ids
        for bad, says in (
            (config(broken), rf"broken: 1 weights are missing: {Q}\.weight"),
            (config(whole, additional_models=[str(broken)], **drafting), r"broken: 1 weights are missing"),
            (config(whole, additional_models=[str(headless)], **drafting), "cannot draft: it has no language-model"),
            (config(odd), "a layer behind the pooling takes 48 numbers; it gets 64"),
        ):
            with pytest.raises(CheckpointError, match=says):
                await engine.reload(bad)
            assert engine.state is EngineState.READY
            assert (await engine.generate([1, 2, 3], GREEDY)).token_ids == before
