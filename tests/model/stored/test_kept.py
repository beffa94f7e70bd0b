"""Codes of four bits stay codes, in whatever place transformers has for their weights."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from asyncengine import AsyncEngine, EngineConfig, GenerationConfig
from asyncengine.errors import CheckpointError, ReloadError, UnsupportedModelError
from asyncengine.model import architecture
from asyncengine.model.checkpoint import Checkpoint
from asyncengine.model.load_settings import settled
from asyncengine.model.quantised.four_bit_experts import FourBitExperts, share_of
from asyncengine.model.quantised.four_bit_linear import FourBitLinear
from asyncengine.model.quantised.four_bits import nearest
from asyncengine.model.quantised.fp8_linear import Fp8Linear
from asyncengine.model.stored.kept import KeptCodes
from asyncengine.model.stored.weight import state_of
from tests.model.stored import coded_checkpoints

pytestmark = pytest.mark.loops("either")

Make = Callable[..., Path]


def loaded(path: Path, keep: bool, form: str = "int4", but: Collection[str] = ()) -> tuple[Any, int]:
    """A model in bfloat16, and how many of its weights are codes; those with such parts in their names are none."""
    checkpoint, dtype = Checkpoint(path), torch.bfloat16
    coded = [weight for name, weight in checkpoint.coded.items() if keep and not {*but} & {*name.split(".")}]
    kept = KeptCodes(coded, dtype, {form})
    config = architecture.read_config(checkpoint)
    state = state_of(checkpoint.plain, checkpoint.coded.values(), dtype) | kept.state()
    kind, config = architecture.model_class(config)
    model = kind.from_pretrained(None, state_dict=state, config=config, dtype=dtype)
    return model.eval(), kept.put(model)


def same_logits(path: Path) -> Any:
    """The model with codes, which gives the logits that it gives with numbers, bit for bit."""
    (kept, done), (plain, none) = loaded(path, True), loaded(path, False)
    assert done == sum(weight.size for weight in Checkpoint(path).coded.values() if weight.form == "int4") > none == 0
    ids = torch.arange(24)[None]
    with torch.inference_mode():
        assert torch.equal(kept(ids).logits, plain(ids).logits)
    assert share_of(kept) == pytest.approx(done / sum(each.numel() for each in plain.parameters()))
    return kept


@pytest.mark.parametrize("method", ["gptq", "awq", "packed", "mxfp4"])
def test_linear_layers_hold_codes(method: str, checkpoint: Make, tmp_path: Path) -> None:
    coded, _ = coded_checkpoints.write(tmp_path, checkpoint("qwen2", num_hidden_layers=1), method)
    layer = same_logits(coded).model.layers[0]
    assert isinstance(layer.self_attn.q_proj, FourBitLinear)
    assert layer.self_attn.q_proj.bias is not None
    assert isinstance(layer.mlp.down_proj, FourBitLinear)


def test_the_experts_of_gpt_oss_hold_codes(checkpoint: Make, tmp_path: Path) -> None:
    coded, _ = coded_checkpoints.write_experts(tmp_path, checkpoint("gpt_oss", num_hidden_layers=1))
    experts = same_logits(coded).model.layers[0].mlp.experts
    assert isinstance(experts, FourBitExperts)
    assert experts.transposed


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_experts_that_are_stored_one_by_one_hold_codes_together(kind: str, checkpoint: Make, tmp_path: Path) -> None:
    inner = {"mixtral": {}, "qwen3_moe": {"moe_intermediate_size": 64}}[kind]
    coded, _ = coded_checkpoints.write(tmp_path, checkpoint(kind, num_hidden_layers=2, **inner), "awq")
    experts = same_logits(coded).model.layers[1].mlp.experts
    assert isinstance(experts, FourBitExperts)
    assert not experts.transposed


@pytest.mark.parametrize(("but", "name"), [(["w2"], "gate_up_proj"), (["w1", "w3"], "down_proj")])
def test_experts_of_which_one_weight_is_codes_hold_these(
    but: list[str], name: str, checkpoint: Make, tmp_path: Path
) -> None:
    coded, _ = coded_checkpoints.write(tmp_path, checkpoint("mixtral", num_hidden_layers=1), "awq")
    (kept, _), (plain, _) = loaded(coded, True, but=but), loaded(coded, False)
    assert list(kept.model.layers[0].mlp.experts.four_bit_shapes) == [name]
    ids = torch.arange(24)[None]
    with torch.inference_mode():
        assert torch.equal(kept(ids).logits, plain(ids).logits)


@pytest.mark.parametrize("method", ["fp8 by output", "fp8 of ModelOpt"])
def test_codes_in_fp8_stay_what_they_are(method: str, checkpoint: Make, tmp_path: Path) -> None:
    coded, _ = coded_checkpoints.write(tmp_path, checkpoint("qwen2", num_hidden_layers=1), method)
    model, done = loaded(coded, True, "fp8")
    stored = load_file(coded / "model.safetensors")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Fp8Linear)}
    assert len(layers) == 7
    assert done == sum(layer.weight.numel() for layer in layers.values())
    for name, layer in layers.items():
        assert torch.equal(layer.weight.view(torch.uint8), stored[f"{name}.weight"].view(torch.uint8))
        scales = stored[f"{name}.weight_scale"].view(-1, 1).expand(layer.out_features, 1)
        assert torch.equal(layer.weight_scale.view(-1, 1), scales)
    assert layers["model.layers.0.self_attn.q_proj"].bias is not None


def test_scales_of_blocks_become_scales_of_outputs(checkpoint: Make, tmp_path: Path) -> None:
    coded, numbers = coded_checkpoints.write(tmp_path, checkpoint("llama", num_hidden_layers=1), "fp8")
    model, _ = loaded(coded, True, "fp8")
    layer = model.model.layers[0].mlp.down_proj
    wanted = load_file(numbers / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    found = layer.weight.float() * layer.weight_scale.view(-1, 1)
    assert 0 < (found - wanted).norm() < 0.03 * wanted.norm()


def test_experts_in_fp8_become_numbers(checkpoint: Make, tmp_path: Path) -> None:
    coded, _ = coded_checkpoints.write(tmp_path, checkpoint("mixtral", num_hidden_layers=1), "fp8 by output")
    model, done = loaded(coded, True, "fp8")
    assert done == sum(weight.size for name, weight in Checkpoint(coded).coded.items() if "experts" not in name)
    plain, _ = loaded(coded, False)
    for name in ("gate_up_proj", "down_proj"):
        assert torch.equal(*(getattr(each.model.layers[0].mlp.experts, name) for each in (model, plain)))


async def test_an_engine_serves_codes_in_fp8(checkpoint: Make, tmp_path: Path) -> None:
    coded, _ = coded_checkpoints.write(tmp_path, checkpoint("llama", num_hidden_layers=1), "fp8 by output")
    async with AsyncEngine(EngineConfig(str(coded), device="cpu", quantization="fp8")) as engine:
        assert any("as stored" in note for note in engine.health().notes)
        assert engine.complete_engine_config.dtype == "bfloat16"
        assert len((await engine.generate([3, 1, 4], GenerationConfig(max_tokens=4, ignore_eos=True))).token_ids) == 4


@pytest.mark.parametrize(
    ("kind", "method"), [("qwen2", "gptq"), ("llama", "packed with zeros"), ("mixtral", "awq"), ("gpt_oss", None)]
)
@pytest.mark.in_short("gpt_oss", "qwen2")
async def test_an_engine_serves_codes_of_four_bits(
    kind: str, method: str | None, checkpoint: Make, tmp_path: Path
) -> None:
    """By the compiled step of the CPU, to which they say the same as to transformers."""
    plain = checkpoint(kind, num_hidden_layers=2, vocab_size=192)
    if method is None:
        coded, numbers = coded_checkpoints.write_experts(tmp_path, plain)
    else:
        coded, numbers = coded_checkpoints.write(tmp_path, plain, method)
    prompts = torch.randint(1, 192, (3, 40), generator=torch.Generator().manual_seed(0)).tolist()
    found = {}
    for path, settings in (
        (coded, {"quantization": "int4"}), (numbers, {"dtype": "bfloat16"}), (numbers, {"dtype": "float32"})
    ):  # fmt: skip
        async with AsyncEngine(EngineConfig(str(path), device="cpu", **settings)) as engine:
            assert engine.complete_engine_config.decoder_backend == "compiled"
            assert engine.health().notes == (("quantization: int4, as stored",) if "quantization" in settings else ())
            found[str(settings)] = [await scored(engine, prompt) for prompt in prompts]
    codes, rounded, exact = found.values()
    # Head and embedding have eight bits, as have gpt-oss's projections: what that costs is little more than bfloat16.
    # A router may send a token elsewhere, at which those behind it look: not in all of the prompts.
    each = zip(codes, rounded, exact, strict=True)
    assert any((code - real).norm() < 2 * (short - real).norm() + 0.002 * real.norm() for code, short, real in each)


@pytest.mark.parametrize(
    ("method", "words", "form"), [("gptq", 64, "int4"), ("awq", 4096, "none"), ("fp8 by output", 64, "none")]
)
def test_most_of_a_checkpoint_must_be_codes_if_they_are_to_stay_unasked(
    method: str, words: int, form: str, checkpoint: Make, tmp_path: Path
) -> None:
    coded, _ = coded_checkpoints.write(tmp_path, checkpoint("llama", num_hidden_layers=1, vocab_size=words), method)
    config = EngineConfig(str(coded), device="cpu")
    assert settled(config, Checkpoint(coded), torch.device("cpu")).quantization == form


async def scored(engine: AsyncEngine, prompt: list[int]) -> torch.Tensor:
    [score] = await engine.score([prompt])
    return torch.tensor([each.logprob for each in score.logprobs if each is not None])


async def test_new_weights_take_the_places_of_stored_codes(checkpoint: Make, tmp_path: Path) -> None:
    """Rounded to codes, with the checkpoint's groups and without its zeros; those that do not fit change nothing."""
    plain, other = (checkpoint("llama", seed, num_hidden_layers=1, vocab_size=192) for seed in (0, 1))
    coded, _ = coded_checkpoints.write(tmp_path, plain, "awq")
    new = load_file(other / "model.safetensors")
    numbers = {
        name: nearest(weight.bfloat16()).weight(torch.float32) if "_proj" in name else weight
        for name, weight in new.items()
    }
    wanted = coded_checkpoints.saved(tmp_path / "wanted", other, numbers)
    prompt = list(range(3, 43))
    async with AsyncEngine(EngineConfig(str(coded), device="cpu", quantization="int4")) as engine:
        before = await scored(engine, prompt)
        name = "model.layers.0.self_attn.q_proj.weight"
        for wrong in (torch.zeros(64, 32, dtype=torch.uint8), torch.zeros(3, 64, dtype=torch.bfloat16)):
            with pytest.raises(ReloadError, match="q_proj"):
                await engine.update_weights({name: wrong})
        assert torch.equal(await scored(engine, prompt), before)
        await engine.update_weights({name: weight.bfloat16() for name, weight in new.items()})
        found = await scored(engine, prompt)
    async with AsyncEngine(EngineConfig(str(wanted), device="cpu", dtype="float32")) as engine:
        exact = await scored(engine, prompt)
    assert (found - exact).norm() < 0.02 * exact.norm() < 0.1 * (before - exact).norm()


def test_no_numbers_are_computed_on_the_way(checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    coded, _ = coded_checkpoints.write(tmp_path, checkpoint("mixtral", num_hidden_layers=1), "awq")
    monkeypatch.setattr("asyncengine.model.quantised.four_bits.FourBits.weight", None)
    model, _ = loaded(coded, True)
    codes = sum(each.nbytes for each in model.model.layers[0].mlp.parameters())
    assert codes < 1.1 * sum(weight.size for weight in Checkpoint(coded).coded.values()) / 2


def test_codes_whose_groups_are_out_of_order_become_numbers(checkpoint: Make, tmp_path: Path) -> None:
    coded, _ = coded_checkpoints.write(tmp_path, checkpoint("llama", num_hidden_layers=1), "gptq out of order")
    (kept, done), (plain, _) = loaded(coded, True), loaded(coded, False)
    assert done == 0
    ids = torch.arange(24)[None]
    with torch.inference_mode():
        assert torch.equal(kept(ids).logits, plain(ids).logits)


def test_experts_of_which_some_are_no_codes_become_numbers(checkpoint: Make, tmp_path: Path) -> None:
    coded, _ = coded_checkpoints.write(tmp_path, checkpoint("mixtral", num_hidden_layers=1), "gptq out of order")
    (kept, done), (plain, _) = loaded(coded, True), loaded(coded, False)
    assert done == 0
    ids = torch.arange(24)[None]
    with torch.inference_mode():
        assert torch.equal(kept(ids).logits, plain(ids).logits)


def test_a_head_becomes_numbers(checkpoint: Make, tmp_path: Path) -> None:
    plain = checkpoint("llama", num_hidden_layers=1, vocab_size=192)
    coded, _ = coded_checkpoints.write(tmp_path, plain, "gptq", others=("lm_head",))
    model, done = loaded(coded, True)
    assert type(model.lm_head) is torch.nn.Linear
    assert done == sum(weight.size for name, weight in Checkpoint(coded).coded.items() if "lm_head" not in name)
    assert torch.equal(model.lm_head.weight, loaded(coded, False)[0].lm_head.weight)


@pytest.mark.parametrize("form", ["int4", "fp8"])
def test_an_embedding_that_is_tied_to_the_head_becomes_numbers_for_both(
    form: str, checkpoint: Make, tmp_path: Path
) -> None:
    plain = checkpoint("llama", num_hidden_layers=1, vocab_size=192, tie_word_embeddings=True)
    method = {"int4": "gptq", "fp8": "fp8 by output"}[form]
    coded, _ = coded_checkpoints.write(tmp_path, plain, method, others=("model.embed_tokens",))
    model, _ = loaded(coded, True, form)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, loaded(coded, False)[0].lm_head.weight)


async def test_codes_that_cannot_stay_are_rounded(checkpoint: Make, tmp_path: Path) -> None:
    """16 inputs share a scale in NVFP4."""
    coded, _ = coded_checkpoints.write(tmp_path, checkpoint("llama", num_hidden_layers=1), "nvfp4")
    found = Checkpoint(coded)
    assert found.weight_bytes(torch.bfloat16, {"int4"}) == found.weight_bytes(torch.bfloat16)
    async with AsyncEngine(EngineConfig(str(coded), device="cpu", quantization="int4")) as engine:
        [note] = engine.health().notes
        assert note.startswith("quantization: int4, rounded: ")


def test_what_fp8_rounds_again_is_told_from_what_it_keeps(checkpoint: Make, tmp_path: Path) -> None:
    plain = checkpoint("llama", num_hidden_layers=1)
    for method, rounded in (("fp8", True), ("fp8 by output", False), ("fp8 of ModelOpt", False)):
        coded, _ = coded_checkpoints.write(tmp_path / method, plain, method)
        assert {weight.rounded for weight in Checkpoint(coded).coded.values()} == {rounded}


def test_an_expert_that_is_missing_is_an_error(checkpoint: Make, tmp_path: Path) -> None:
    coded, _ = coded_checkpoints.write(tmp_path, checkpoint("mixtral", num_hidden_layers=1), "awq")
    tensors = load_file(coded / "model.safetensors")
    for name in [name for name in tensors if ".experts.2.w3." in name]:
        del tensors[name]
    save_file(tensors, coded / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((CheckpointError, RuntimeError)):
        loaded(coded, True)


def test_a_weight_that_is_none_of_the_model_is_left_out(checkpoint: Make, tmp_path: Path) -> None:
    coded, _ = coded_checkpoints.write(tmp_path, checkpoint("llama", num_hidden_layers=1), "awq")
    before, _ = loaded(coded, True)
    tensors = load_file(coded / "model.safetensors")
    for name in [name for name in tensors if ".k_proj." in name]:
        tensors[name.replace("layers.0", "layers.7")] = tensors[name].clone()
    save_file(tensors, coded / "model.safetensors", metadata={"format": "pt"})
    after, _ = loaded(coded, True)
    ids = torch.arange(24)[None]
    with torch.inference_mode():
        assert torch.equal(before(ids).logits, after(ids).logits)


def test_a_weight_of_which_something_else_was_made_is_an_error(checkpoint: Make, tmp_path: Path) -> None:
    coded, _ = coded_checkpoints.write(tmp_path, checkpoint("llama", num_hidden_layers=1), "awq")
    checkpoint_, dtype = Checkpoint(coded), torch.bfloat16
    kept = KeptCodes(checkpoint_.coded.values(), dtype, {"int4"})
    model, _ = loaded(coded, False)
    attention = model.model.layers[0].self_attn
    parts = [kept.state()[f"model.layers.0.self_attn.{name}.weight"][...] for name in ("k_proj", "v_proj")]
    attention.kv_proj = torch.nn.Linear(64, 64, bias=False, dtype=dtype)
    attention.kv_proj.weight = torch.nn.Parameter(torch.cat(parts), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match="made of weights that are stored as codes"):
        kept.put(model)
