"""Weights that are stored as codes are the numbers that those who wrote them meant."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from asyncengine import AsyncEngine, EngineConfig, EngineState, GenerationConfig
from asyncengine.errors import CheckpointError, UnsupportedModelError
from asyncengine.model.checkpoint import Checkpoint
from asyncengine.model.quantised.four_bits import FourBits
from asyncengine.model.stored.integers import _packed_integers
from asyncengine.model.stored.weight import OpenFiles
from tests.model.reference import Reference
from tests.model.stored import coded_checkpoints
from tests.model.stored.coded_checkpoints import METHODS

pytestmark = pytest.mark.loops("either")

Make = Callable[..., Path]
PROMPT = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26]


@pytest.fixture
def plain(checkpoint: Make) -> Path:
    return checkpoint("llama", num_hidden_layers=1)


@pytest.mark.parametrize("method", METHODS)
def test_codes_become_the_numbers_that_they_stand_for(method: str, plain: Path, tmp_path: Path) -> None:
    """And nothing else is handed on: transformers would tell users of it."""
    coded, numbers = coded_checkpoints.write(tmp_path, plain, method)
    tensors = load_file(coded / "model.safetensors")
    layer = "model.layers.0.self_attn"
    tensors |= {f"{layer}.{name}": torch.ones(1) for name in ("k_scale", "v_proj.input_scale", "q_proj.weight_format")}
    save_file(tensors, coded / "model.safetensors")
    found, files = Checkpoint(coded), OpenFiles()
    wanted = load_file(numbers / "model.safetensors")
    assert len(found.coded) == 7 and found.shapes == Checkpoint(numbers).shapes
    for name, weight in found.coded.items():
        assert weight.shape == tuple(wanted[name].shape)
        torch.testing.assert_close(weight.numbers(files, torch.float32), wanted[name], rtol=1e-6, atol=1e-7)
        assert isinstance(weight.read(files), FourBits) == (METHODS[method].four_bits or "nvfp4" in method)


@pytest.mark.parametrize("method", ["fp8", "gptq", "awq", "nf4", "gptq out of order"])
@pytest.mark.in_short("fp8", "awq", "nf4")
async def test_an_engine_generates_what_transformers_does_with_these_numbers(
    method: str, plain: Path, tmp_path: Path
) -> None:
    coded, numbers = coded_checkpoints.write(tmp_path, plain, method)
    await generates_the_same(coded, numbers)


@pytest.mark.parametrize("method", ["fp8", "awq"])
async def test_experts_that_are_stored_one_by_one_are_put_together(
    method: str, checkpoint: Make, tmp_path: Path
) -> None:
    coded, numbers = coded_checkpoints.write(tmp_path, checkpoint("mixtral", num_hidden_layers=1), method)
    await generates_the_same(coded, numbers)


async def test_the_experts_of_gpt_oss_are_read(checkpoint: Make, tmp_path: Path) -> None:
    coded, numbers = coded_checkpoints.write_experts(tmp_path, checkpoint("gpt_oss", num_hidden_layers=2))
    await generates_the_same(coded, numbers)


async def generates_the_same(coded: Path, numbers: Path) -> None:
    config = EngineConfig(str(coded), device="cpu", dtype="float32")
    async with AsyncEngine(config) as engine:
        result = await engine.generate(PROMPT, GenerationConfig(temperature=0, max_tokens=16, ignore_eos=True))
    assert result.token_ids == Reference(numbers).generated(PROMPT, 16)


def test_mxfp4_is_what_transformers_makes_of_it(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (2, 48, 3, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(100, 140, (2, 48, 3), dtype=torch.uint8, generator=generator)
    tensors = {"experts.down_proj_blocks": blocks, "experts.down_proj_scales": scales}
    found = Checkpoint(stored(tmp_path, tensors, {"quant_method": "mxfp4"})).coded["experts.down_proj"]
    wanted = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    assert torch.equal(found.numbers(OpenFiles(), torch.float32), wanted)


def test_what_a_checkpoint_takes_is_counted_in_numbers(plain: Path, tmp_path: Path) -> None:
    coded, numbers = coded_checkpoints.write(tmp_path, plain, "gptq")
    found, wanted = Checkpoint(coded), Checkpoint(numbers)
    assert found.shapes == wanted.shapes
    assert found.weight_bytes(torch.float32) == wanted.weight_bytes(torch.float32)
    as_codes = found.weight_bytes(torch.float32, {"int4"})
    weights = sum(weight.size for weight in found.coded.values())
    assert found.weight_bytes(torch.float32) - as_codes > 3.3 * weights  # of four bytes each
    assert Checkpoint(coded).dtype is torch.float32  # scales in float16 say nothing


@pytest.mark.parametrize(
    "about",
    [
        {"quant_method": "aqlm"},
        {"quant_method": "hqq"},
        {"quant_method": None},
        {"bits": 4, "group_size": 64},
        {"quant_method": "gptq", "bits": 4, "rotation": "hadamard"},
        {"quant_method": "fp8", "weight_scale_semantics": "of another kind"},
        {"quant_method": "gptq", "bits": 5},
        {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"},
        {"quant_method": "awq", "bits": 4, "version": "gemv"},
        {"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"},
        {"config_groups": {"a": {"weights": {"num_bits": 8}, "format": "mxfp8-quantized"}}},
        {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}},
        {"quant_method": "compressed-tensors", "transform_config": {"config_groups": {"u": {}}}},
        {"quant_method": "bitsandbytes"},
    ],
)  # fmt: skip
def test_what_is_not_known_is_refused_by_its_name(about: dict[str, Any], tmp_path: Path) -> None:
    path = stored(tmp_path, {"a.weight": torch.zeros(2, 2)}, about)
    with pytest.raises(UnsupportedModelError) as error:
        Checkpoint(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    "about",
    [
        {"quant_method": "fp8", "weight_block_size": "128"},
        {"quant_method": "fp8", "weight_block_size": [0, 0]},
        {"quant_method": "fp8", "weight_block_size": [[1], {}]},
        {"format": "pack-quantized", "config_groups": {"a": {"weights": {"num_bits": "many"}}}},
        {"quant_method": "compressed-tensors", "config_groups": [1]},
    ],
)  # fmt: skip
def test_a_configuration_that_says_nonsense_is_refused(about: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        Checkpoint(stored(tmp_path, {"a.weight": torch.zeros(2, 2)}, about))


def mixed(path: Path, plain: Path, one: str, other: str, about: dict[str, Any]) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint whose attention is stored in one way, and whose MLP in another."""
    written = [coded_checkpoints.write(path / method, plain, method) for method in (one, other)]
    coded, numbers = ([load_file(each / "model.safetensors") for each in both] for both in zip(*written, strict=True))

    def chosen(found: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return {name: tensor for name, tensor in found[0].items() if ".mlp." not in name} | {
            name: tensor for name, tensor in found[1].items() if ".mlp." in name
        }

    return stored(path, chosen(coded), about), chosen(numbers)


@pytest.mark.parametrize(
    ("one", "other", "about"),
    [
        (
            "fp8 by output",
            "packed",
            {"config_groups": {
                "a": {"format": "float-quantized", "weights": {"num_bits": 8}},
                "b": {"format": "pack-quantized", "weights": {"num_bits": 4}},
            }},
        ),
        (
            "int8",
            "nvfp4",
            {"config_groups": {
                "a": {"format": "int-quantized", "weights": {"num_bits": 8}},
                "b": {"format": "nvfp4-pack-quantized", "weights": {"num_bits": 4}},
            }},
        ),
        ("gptq of 8 bits", "gptq", {"quant_method": "gptq", "bits": 4, "dynamic": {"+:.*attn.*": {"bits": 8}}}),
    ],
)  # fmt: skip
def test_layers_may_be_stored_in_different_ways(
    one: str, other: str, about: dict[str, Any], plain: Path, tmp_path: Path
) -> None:
    path, numbers = mixed(tmp_path, plain, one, other, about)
    found, files = Checkpoint(path), OpenFiles()
    assert len(found.coded) == 7
    for name, weight in found.coded.items():
        torch.testing.assert_close(weight.numbers(files, torch.float32), numbers[name], rtol=1e-6, atol=1e-7)


def test_what_modelopt_says_in_a_file_of_its_own_is_read(plain: Path, tmp_path: Path) -> None:
    coded, _ = coded_checkpoints.write(tmp_path, plain, "fp8 of ModelOpt")
    config = json.loads((coded / "config.json").read_text())
    config.pop("quantization_config")
    (coded / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="no quantization_config"):  # it would be served wrongly
        Checkpoint(coded)
    (coded / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    assert len(Checkpoint(coded).coded) == 7


@pytest.mark.parametrize(
    ("method", "missing"),
    [
        ("gptq", "qzeros"), ("awq", "scales"), ("packed", "weight_scale"), ("packed with zeros", "weight_zero_point"),
        ("fp8", "weight_scale_inv"), ("nvfp4", "weight_global_scale"), ("mxfp4", "weight_scale"),
        ("nf4", "weight.absmax"), ("eight bits of bitsandbytes", "SCB"),
    ],
)  # fmt: skip
def test_codes_without_their_scales_are_refused_before_a_load(
    method: str, missing: str, plain: Path, tmp_path: Path
) -> None:
    coded, _ = coded_checkpoints.write(tmp_path, plain, method)
    tensors = load_file(coded / "model.safetensors")
    lost = "model.layers.0.self_attn.k_proj." + missing
    del tensors[lost]
    save_file(tensors, coded / "model.safetensors")
    with pytest.raises(CheckpointError, match=missing.replace(".", r"\.")):
        Checkpoint(coded)


@pytest.mark.parametrize(
    ("method", "part"),
    [
        ("awq", "scales"), ("awq", "qzeros"), ("gptq", "scales"), ("packed", "weight_scale"),
        ("fp8", "weight_scale_inv"), ("nvfp4", "weight_scale"),
    ],
)  # fmt: skip
async def test_codes_that_do_not_fit_are_refused_before_a_load(
    method: str, part: str, plain: Path, tmp_path: Path
) -> None:
    coded, _ = coded_checkpoints.write(tmp_path, plain, method)
    tensors = load_file(coded / "model.safetensors")
    name = f"model.layers.0.self_attn.k_proj.{part}"
    tensors[name] = tensors[name][:-1, :-1].contiguous()
    save_file(tensors, coded / "model.safetensors")
    with pytest.raises(CheckpointError, match="k_proj"):
        Checkpoint(coded)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e8m0fnu])
def test_scales_may_be_exponents(dtype: torch.dtype, plain: Path, tmp_path: Path) -> None:
    coded, _ = coded_checkpoints.write(tmp_path, plain, "fp8")
    tensors = load_file(coded / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    exponents = torch.randint(110, 130, tensors[f"{name}_scale_inv"].shape, dtype=torch.uint8)
    tensors[f"{name}_scale_inv"] = exponents.view(dtype)
    save_file(tensors, coded / "model.safetensors")
    scales = torch.exp2(exponents.float() - 127).repeat_interleave(40, 0)[:96].repeat_interleave(32, 1)
    found = Checkpoint(coded).coded[name].numbers(OpenFiles(), torch.float32)
    assert torch.equal(found, tensors[name].float() * scales)


def test_zeros_of_few_outputs_are_read() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    coded = coded_checkpoints.pack_quantized(weight, symmetric=False)
    found = _packed_integers(coded.stored, bits=4, inputs=64, padded=False)
    assert isinstance(found, FourBits)
    torch.testing.assert_close(found.weight(torch.float32), coded.numbers)


async def test_weights_that_a_model_stores_the_other_way_round_are_turned(checkpoint: Make, tmp_path: Path) -> None:
    """As GPT-2's. Tools for quantisation store all of them as (outputs, inputs)."""
    plain = checkpoint("gpt2", n_layer=1)
    tensors = load_file(plain / "model.safetensors")
    inner = {name: tensor for name, tensor in tensors.items() if ".h." in name and tensor.dim() == 2}
    coded, numbers = tensors.copy(), tensors.copy()
    for name, weight in inner.items():
        found = coded_checkpoints.gptq(weight.t().contiguous())
        numbers[name] = found.numbers.t().float()
        del coded[name]
        coded |= {f"{name.removesuffix('.weight')}.{end}": tensor for end, tensor in found.stored.items()}
    about = METHODS["gptq"].about
    paths = (
        coded_checkpoints.saved(tmp_path / "c", plain, coded, about),
        coded_checkpoints.saved(tmp_path / "n", plain, numbers),
    )
    await generates_the_same(*paths)


async def test_a_method_that_is_not_known_leaves_the_old_model(plain: Path, tmp_path: Path) -> None:
    other = stored(tmp_path, {"a.weight": torch.zeros(2, 2)}, {"quant_method": "quip"})
    async with AsyncEngine(EngineConfig(str(plain), device="cpu")) as engine:
        with pytest.raises(UnsupportedModelError, match="quip"):
            await engine.reload(EngineConfig(str(other), device="cpu"))
        assert engine.state is EngineState.READY


def stored(path: Path, tensors: dict[str, torch.Tensor], about: dict[str, Any]) -> Path:
    path.mkdir(exist_ok=True)
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": about}))
    return path
