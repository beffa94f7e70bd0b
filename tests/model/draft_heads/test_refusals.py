"""Heads that do not fit are refused before the present model is let go, with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from asyncengine import AsyncEngine, CheckpointError, ConfigError, EngineConfig, GenerationConfig
from asyncengine.model import load_check
from asyncengine.model.loader import TransformersLoader
from tests.model import checkpoints
from tests.model.draft_heads import eagle_heads, mtp_heads


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.write(tmp_path_factory.mktemp("target"), "llama")


def check(target: Path, head: Path | str, **changes: Any) -> None:
    config = EngineConfig(
        str(target),
        device="cpu",
        speculative_mode="eagle3",
        additional_models=[str(head)],
        **changes,  # type: ignore[arg-type]
    )
    TransformersLoader().check(config, None)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": 32, "head_dim": 16}, "hidden states of 32 numbers; the model's have 64"),
        ({"target_hidden_size": 128}, "hidden states of 128 numbers; the model's have 64"),
        ({"vocab_size": 300}, "vocabulary has 300 tokens; the model's has 199"),
        ({"eagle_aux_hidden_state_layer_ids": [1, 2, 4]}, r"sees the layers \[1, 2, 4\]; the model has 3"),
        ({"eagle_aux_hidden_state_layer_ids": [1, 2]}, r"its fc.weight is \(64, 192\); expected \(64, 128\)"),
        ({"model_type": "deepseek_v3"}, "layers are of model type 'deepseek_v3'; expected 'llama'"),
        ({"eagle_config": {"use_aux_hidden_state": False}}, "it is not of EAGLE-3"),
        ({"norm_output": True}, "its norm_output is True, which nothing here knows"),
        ({"quantization_config": {"quant_method": "fp8"}}, "its quantization_config is .*|it is quantised"),
        ({"num_hidden_layers": 2}, "its num_hidden_layers is 2; expected 1"),
        ({"draft_vocab_size": 40}, r"its (d2t|lm_head.weight) is \(80.*expected \(40"),
        ({"draft_vocab_size": "many"}, "its draft_vocab_size is 'many'"),
        ({"num_hidden_layers": None}, "its num_hidden_layers is None; expected an integer >= 1"),
        ({"speculators_model_type": "mtp"}, "its speculators_model_type is 'mtp'; expected 'eagle3'"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_what_a_configuration_says_is_compared_with_the_model(
    changes: dict[str, Any], said: str, target: Path, tmp_path: Path
) -> None:
    head = eagle_heads.write(tmp_path, "authors", eagle_heads.weights(), **changes)
    with pytest.raises(ConfigError, match=rf"additional_models is \['{tmp_path}'\]: .*{said}"):
        check(target, head)


def test_weights_must_be_those_of_such_a_head(target: Path, tmp_path: Path) -> None:
    tensors = eagle_heads.weights()
    strange = eagle_heads.write(tmp_path / "strange", "specforge", tensors | {"midlayer.q_norm.weight": torch.ones(16)})
    with pytest.raises(ConfigError, match=r"1 of its weights are none of an EAGLE-3 head's: midlayer\.q_norm\.weight"):
        check(target, strange)
    del tensors["norm.weight"]
    with pytest.raises(ConfigError, match=r"1 of its weights are missing: norm\.weight"):
        check(target, eagle_heads.write(tmp_path / "missing", "specforge", tensors))
    (tmp_path / "missing" / "model.safetensors").unlink()
    (tmp_path / "missing" / "pytorch_model.bin").write_bytes(b"no pickle")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin cannot be read"):
        check(target, tmp_path / "missing")


def test_a_table_that_leads_out_of_the_vocabulary_is_refused(target: Path, tmp_path: Path) -> None:
    tensors = eagle_heads.weights()
    tensors["d2t"] += 199
    head = eagle_heads.write(tmp_path, "specforge", tensors)
    config = EngineConfig(str(target), device="cpu", speculative_mode="eagle3", additional_models=[str(head)])  # type: ignore[arg-type]
    loader = TransformersLoader()
    with pytest.raises(CheckpointError, match="d2t leads out of the model's vocabulary"):
        loader.load(loader.check(config, None))


async def test_the_present_model_stays(target: Path, tmp_path: Path) -> None:
    async with AsyncEngine(EngineConfig("tiny", device="cpu", max_total_sequence_length=512)) as engine:
        for head in (str(eagle_heads.write(tmp_path, "authors", eagle_heads.weights())), "tiny-draft"):
            with pytest.raises(ConfigError, match=r"hidden states of 64|a whole model drafts as 'small_draft'"):
                await engine.reload(EngineConfig("tiny", speculative_mode="eagle3", additional_models=[head]))  # type: ignore[arg-type]
        with pytest.raises(CheckpointError, match="there is no such directory"):
            await engine.reload(EngineConfig("tiny", speculative_mode="eagle3", additional_models=["./nowhere"]))  # type: ignore[arg-type]
        assert (await engine.generate("Hello", GenerationConfig(max_tokens=2))).usage.completion_tokens


def test_a_checkpoint_without_a_head_names_what_was_looked_for(target: Path) -> None:
    said = (
        r"speculative_mode is 'mtp' with model .*no weights of such a head; looked for: "
        r"'model\.layers\.3\.eh_proj\.weight' \(DeepSeek, GLM\), 'mtp\.fc\.weight' \(Qwen\), "
        r"'model\.mtp_layers\.0\.input_proj\.weight' \(MiMo\)"
    )
    with pytest.raises(ConfigError, match=said):
        TransformersLoader().check(EngineConfig(str(target), device="cpu", speculative_mode="mtp"), None)


def test_a_head_of_a_checkpoint_must_be_whole(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    path = mtp_heads.write(tmp_path, "qwen2", "mimo")
    config, loader = EngineConfig(str(path), device="cpu", speculative_mode="mtp"), TransformersLoader()
    tensors = load_file(path / "model.safetensors")
    for name, error in (("self_attn.q_proj", CheckpointError), ("hidden_layernorm", ConfigError)):
        without = {key: tensor for key, tensor in tensors.items() if key != f"model.mtp_layers.0.{name}.weight"}
        save_file(without, path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(error, match=rf"1 (of the head's weights|weights of its head) are missing: .*{name}"):
            loader.load(loader.check(config, None))


@pytest.mark.parametrize(("name", "says"), [
    ("layers.3.self_attn.q_proj", r"1 weights of its head are missing: model\.layers\.0\.self_attn\.q_proj"),
    ("layers.3.mlp.up_proj", r"1 weights of its head are of another shape: model\.layers\.0\.mlp\.up_proj"),
])  # fmt: skip
def test_weights_of_its_layer_are_checked_while_the_present_model_is_there(
    name: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file

    path = mtp_heads.write(tmp_path, "qwen2", "deepseek")
    tensors = load_file(path / "model.safetensors")
    lost = tensors.pop(f"model.{name}.weight")
    if "another shape" in says:
        tensors[f"model.{name}.weight"] = lost[:5].clone()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(load_check, "fits", lambda details, current: False)
    with pytest.raises(CheckpointError, match=says):
        TransformersLoader().check(EngineConfig(str(path), device="cpu", speculative_mode="mtp"), None)


@pytest.mark.parametrize("name", ["enorm", "shared_head.norm", "embed_tokens"])
def test_what_stands_around_its_layer_must_have_the_shapes_of_the_model(name: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    path = mtp_heads.write(tmp_path, "qwen2", "deepseek", own=True)
    tensors = load_file(path / "model.safetensors")
    tensors[f"model.layers.3.{name}.weight"] = tensors[f"model.layers.3.{name}.weight"][:5].clone()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=rf"{name}\.weight is \(5,.*\); expected \("):
        TransformersLoader().check(EngineConfig(str(path), device="cpu", speculative_mode="mtp"), None)
