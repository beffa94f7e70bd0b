"""GGUF files beside the checkpoints that they were made of: weights, configuration, tokens."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from asyncengine import AsyncEngine, EngineConfig, GenerationConfig
from asyncengine.errors import CheckpointError, UnsupportedModelError
from asyncengine.model.architecture import coded_for, model_class, read_config, turned_weights
from asyncengine.model.gguf.checkpoint import GgufCheckpoint
from asyncengine.model.gguf.families import FAMILIES
from asyncengine.model.stored.weight import Decoded, OpenFiles, state_of
from tests.model.checkpoints import config
from tests.model.gguf.files import write
from tests.model.gguf.kinds import KINDS

pytestmark = pytest.mark.loops("either")

CHANGES: dict[str, dict[str, Any]] = {
    "starcoder2": {"sliding_window": None},  # files do not say
    "qwen3_moe": {"norm_topk_prob": True},  # llama.cpp knows no other
    "mixtral": {"sliding_window": None},
    "falcon_h1": {
        "attention_in_multiplier": 1.25, "attention_out_multiplier": 0.9, "key_multiplier": 0.7,
        "ssm_in_multiplier": 1.2, "ssm_out_multiplier": 0.8, "mlp_multipliers": [0.9, 1.1],
        "ssm_multipliers": [0.9, 1.1, 0.8, 1.2, 0.7], "embedding_multiplier": 2.0, "lm_head_multiplier": 0.5,
    },
    "apertus": {
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
        },
    },
    "olmo3": {
        "rope_parameters": {
            "full_attention": {
                "rope_type": "yarn", "rope_theta": 5432.0, "factor": 4.0, "original_max_position_embeddings": 16,
                "attention_factor": 1.25, "beta_fast": 32.0, "beta_slow": 1.0,
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": 5432.0},
        },
    },
    "lfm2": {"block_auto_adjust_ff_dim": False},
}  # fmt: skip
IN_WEIGHTS = ("falcon_h1",)
"""Those whose weights are stored multiplied."""
ELSEWHERE = {
    "_name_or_path", "pad_token_id", "chunk_size", "mamba_chunk_size", "sliding_window_pattern", "rope_parameters",
    "_sliding_window_pattern", "original_max_position_embeddings", "position_embedding_type", "n_inner",
}  # fmt: skip
"""Fields that are of no consequence here, or are told apart below."""
NOT_READ = ("type", "max_position_embeddings")
"""What some configurations have in their `rope_parameters`."""
COMPUTED = (
    "llama", "mixtral", "gemma3_text", "phi3", "gpt2", "gpt_oss", "qwen3_next", "qwen3_5", "qwen3_5_moe", "lfm2_moe",
    "granitemoehybrid", "falcon_h1", "nemotron_h", "mamba", "mamba2", "apertus", "deepseek_v2", "gemma4_text",
    "gemma4_moe", "gpt_neox", "granitemoeshared", "ministral3", "stablelm",
)  # fmt: skip
"""Of each kind some; and all whose files say something in other words than their configurations do."""
SERVED = ("llama", "gpt_oss", "qwen3_next", "granitemoehybrid", "mamba", "deepseek_v2", "gemma4_moe", "falcon_h1")
"""Of those in turn some, by an engine."""
IMPLIED = ("mlp_bias", "head_dim", "rotary_dim", "rms_norm_eps", "position_embedding_type", "max_position_embeddings")
"""What others' configurations have besides, which is what it is without."""
EPSILONS = ("rms_norm_eps", "layer_norm_eps", "norm_eps", "norm_epsilon", "layer_norm_epsilon")
UNKNOWN_LENGTH = ("granitemoehybrid",)
PROMPT = torch.randint(1, 199, (45,), generator=torch.Generator().manual_seed(3)).tolist()
GREEDY = GenerationConfig(temperature=0, max_tokens=8, ignore_eos=True)


@pytest.fixture
def original(checkpoint: Callable[..., Path]) -> Callable[[str], Path]:
    return lambda architecture: checkpoint(architecture, **(unusual(architecture) | CHANGES.get(architecture, {})))


def unusual(architecture: str) -> dict[str, Any]:
    """Values that are nobody's defaults, for what most models have."""
    values = config(architecture).to_dict()
    changes: dict[str, Any] = {name: 3e-5 for name in EPSILONS if isinstance(values.get(name), float)}
    rope = values.get("rope_parameters") or {}
    if "rope_theta" in rope:
        changes["rope_parameters"] = rope | {"rope_theta": 5432.0}
    elif rope:
        thetas = {"full_attention": 5432.0, "sliding_attention": 4321.0}
        changes["rope_parameters"] = {kind: each | {"rope_theta": thetas[kind]} for kind, each in rope.items()}
    return changes


def weights(file: Path) -> dict[str, torch.Tensor]:
    files = OpenFiles()
    return {name: each.numbers(files, torch.float32) for name, each in GgufCheckpoint(file).coded.items()}


def parameters(model: Any) -> dict[str, torch.Tensor]:
    """As transformers has them, but those of layers with inputs first the usual way round."""
    turned = turned_weights(type(model), model.config)
    return {name: each.T if name in turned else each for name, each in model.state_dict().items()}


def effective(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = AutoConfig.from_pretrained(path).get_text_config().to_dict()
    return found


def read(file: Path, *args: Any, **more: Any) -> GgufCheckpoint:
    return GgufCheckpoint(write(file, *args, **more))


async def served(file: Path, **more: Any) -> list[int]:
    config = EngineConfig(str(file), dtype="float32", device="cpu", prefill_chunk_size=32, max_num_sequence=2, **more)
    async with AsyncEngine(config) as engine:
        return list((await engine.generate(PROMPT, GREEDY)).token_ids)


@pytest.mark.parametrize("architecture", KINDS)
@pytest.mark.in_short(*SERVED, "mixtral", "gemma3_text", "phi3", "gpt2")
def test_is_what_it_was_made_of(architecture: str, original: Callable[[str], Path], tmp_path: Path) -> None:
    path = original(architecture)
    file = write(tmp_path / "model.gguf", path, architecture)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    expected, found = parameters(model), weights(file)
    assert expected.keys() - found.keys() <= {"lm_head.weight"}
    assert not found.keys() - expected.keys()
    if architecture not in IN_WEIGHTS:
        for name, weight in found.items():
            torch.testing.assert_close(weight, expected[name], atol=1e-6, rtol=1e-6, msg=name)
    derives_what_is_stated(path, GgufCheckpoint(file).path)
    if architecture not in COMPUTED:
        derives_nothing_else(path, GgufCheckpoint(file).path)
        return
    with torch.inference_mode():
        logits, same = (each(torch.tensor([PROMPT]), use_cache=False).logits[0] for each in (model, read_back(file)))
    torch.testing.assert_close(same, logits, atol=1e-5, rtol=1e-4)
    if architecture in SERVED:
        tokens = asyncio.run(served(file))
        with torch.inference_mode():
            logits = model(torch.tensor([[*PROMPT, *tokens[:-1]]]), use_cache=False).logits[0]
        assert tokens == logits[len(PROMPT) - 1 :].argmax(-1).tolist()


def read_back(file: Path) -> Any:
    """The model of transformers that is in a file."""
    checkpoint = GgufCheckpoint(file)
    kind, config = model_class(read_config(checkpoint))
    state = state_of({}, coded_for(checkpoint, kind, config), torch.float32)
    return kind.from_pretrained(None, state_dict=state, config=config, dtype=torch.float32).eval()


def derives_what_is_stated(original: Path, described: Path) -> None:
    """A configuration has the fields of the original, as far as they are of consequence."""
    stated, derived = effective(original), effective(described)
    unknown = {name for name in UNKNOWN_LENGTH if derived["model_type"] == name} and {"max_position_embeddings"}
    shared = (stated.keys() & derived.keys()) - ELSEWHERE - set(CHANGES["falcon_h1"]) - unknown
    read = {key: stated[key] for key in shared if stated[key] is not None}
    assert {key: derived[key] for key in read} == read
    rope = {key: value for key, value in (stated.get("rope_parameters") or {}).items() if key not in NOT_READ}
    if rope.get("rope_type") != "llama3":  # which is stored as its frequencies
        assert {key: derived["rope_parameters"].get(key) for key in rope} == rope


def derives_nothing_else(original: Path, described: Path) -> None:
    """So that with the same weights it is the same model."""
    stated, derived = effective(original), effective(described)
    others = {key for key in stated.keys() | derived.keys() if stated.get(key) != derived.get(key)}
    assert others <= {"_name_or_path", "pad_token_id", *IMPLIED}
    if "head_dim" in others:
        assert derived["head_dim"] == derived["hidden_size"] // derived["num_attention_heads"]


def one_by_one(metadata: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if "_exps.weight" in name]:
        for expert, each in enumerate(tensors.pop(name)):
            tensors[name.replace("_exps.", f".{expert}.")] = each


def fused_experts(metadata: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if "ffn_gate_exps" in name]:
        pair = tensors.pop(name), tensors.pop(name.replace("gate", "up"))
        tensors[name.replace("gate", "gate_up")] = torch.cat(pair, 1)


def fused_attention(metadata: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if "attn_q." in name]:
        parts = [tensors.pop(name.replace("attn_q", f"attn_{each}")) for each in "qkv"]
        tensors[name.replace("attn_q", "attn_qkv")] = torch.cat(parts)


def scaled(metadata: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if name.endswith("_exps.weight") or name.endswith("attn_q.weight")]:
        weight = tensors[name]
        scale = torch.arange(1.0, len(weight) + 1) if weight.ndim == 3 else torch.tensor([4.0])
        tensors[name] = weight / scale.view(-1, *[1] * (weight.ndim - 1))
        tensors[name.replace("weight", "scale")] = scale
        tensors[name.replace("weight", "input_scale")] = torch.full_like(scale, 1e9)


def further_tokens(metadata: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    metadata |= {"block_count": metadata["block_count"] + 1, "nextn_predict_layers": 1}
    tensors |= {"blk.3.nextn.eh_proj.weight": torch.zeros(64, 128), "blk.3.attn_norm.weight": torch.zeros(64)}


def little_stated(metadata: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    for key in ("attention.key_length", "attention.value_length", "expert_feed_forward_length", "rope.freq_base_swa"):
        metadata.pop(key, None)
    metadata["feed_forward_length"] = [metadata["feed_forward_length"]] * metadata["block_count"]


VARIANTS = [
    ("mixtral", one_by_one), ("qwen3_moe", one_by_one), ("qwen3_moe", fused_experts), ("llama", fused_attention),
    ("qwen2", fused_attention), ("mixtral", scaled), ("llama", further_tokens), ("llama", little_stated),
]  # fmt: skip


@pytest.mark.parametrize(("architecture", "edit"), VARIANTS)
def test_other_ways_to_store_the_same(
    architecture: str, edit: Any, original: Callable[[str], Path], tmp_path: Path
) -> None:
    path = original(architecture)
    file = write(tmp_path / "model.gguf", path, architecture, edit=edit)
    expected = parameters(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32))
    for name, weight in weights(file).items():
        torch.testing.assert_close(weight, expected[name], msg=name)
    assert not expected.keys() - weights(file).keys() - {"lm_head.weight"}
    stated, derived = effective(path), effective(GgufCheckpoint(file).path)
    for key in ("num_hidden_layers", "num_key_value_heads", "intermediate_size", "moe_intermediate_size"):
        assert derived.get(key) == stated.get(key)


def decoded(file: Path) -> dict[str, Decoded]:
    files = OpenFiles()
    return {name: each.read(files) for name, each in GgufCheckpoint(file).coded.items()}


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [
        ("llama", "Q4_0"), ("llama", "Q4_1"), ("mixtral", "Q4_1"), ("gpt_oss", "Q4_0"), ("qwen3_5", "Q4_1"),
        ("qwen3_next", "Q4_0"), ("granitemoehybrid", "Q4_0"),
    ],
)  # fmt: skip
@pytest.mark.in_short("qwen3_next-Q4_0", "llama-Q4_1", "mixtral-Q4_1")
def test_blocks_of_four_bits_stay_codes(
    architecture: str, kind: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    wide = {"linear_value_head_dim": 32} if "qwen3_" in architecture else {}
    path = checkpoint(architecture, **CHANGES.get(architecture, {}), **wide)
    type_ = gguf.GGMLQuantizationType[kind]
    file = write(tmp_path / "codes.gguf", path, architecture, type_=type_)
    rounded = write(tmp_path / "floats.gguf", path, architecture, type_=type_, rounded=True)
    codes, floats = weights(file), weights(rounded)
    for name, weight in codes.items():
        torch.testing.assert_close(weight, floats[name], atol=1e-6, rtol=1e-5, msg=name)
    kept = {name: each for name, each in decoded(file).items() if not isinstance(each, torch.Tensor)}
    matrices = {name for name, each in floats.items() if each.ndim > 1 and each.shape[-1] % 32 == 0}
    assert matrices - kept.keys() <= {name for name in matrices if "conv" in name or "bias" in name}
    assert all(GgufCheckpoint(file).coded[name].form == "int4" for name in kept)


def test_what_is_not_known_is_refused(original: Callable[[str], Path], tmp_path: Path) -> None:
    def surplus(metadata: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        tensors["blk.1.attn_rot_embd.weight"] = torch.ones(4)

    def lonely(metadata: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        tensors["blk.1.attn_q.input_scale"] = torch.ones(1)

    for edit, name in ((surplus, "blk.1.attn_rot_embd.weight"), (lonely, "blk.1.attn_q.input_scale")):
        with pytest.raises(UnsupportedModelError, match=f"surplus.gguf: .*{name}"):
            read(tmp_path / "surplus.gguf", original("llama"), "llama", edit=edit)


def test_a_weight_that_is_missing_or_of_no_use_is_an_error(original: Callable[[str], Path], tmp_path: Path) -> None:
    def less(metadata: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        del tensors["blk.1.ffn_up.weight"]

    def more(metadata: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        tensors["blk.1.attn_q.bias"] = torch.ones(64)

    for edit, message in ((less, "model.layers.1.mlp.up_proj.weight"), (more, "model.layers.1.self_attn.q_proj.bias")):
        file = write(tmp_path / "model.gguf", original("llama"), "llama", edit=edit)
        with pytest.raises(CheckpointError, match=f"model.gguf: .*{message}"):
            asyncio.run(served(file))


def test_metadata_that_do_not_fit_are_an_error(original: Callable[[str], Path], tmp_path: Path) -> None:
    for key, value, message in (
        ("embedding_length", None, "llama.embedding_length"),
        ("attention.head_count", [4, 2, 4], "differs between layers"),
        ("attention.head_count", "four", "num_attention_heads"),
        ("block_count", 2.5, "llama.block_count is 2.5"),
        ("block_count", 2, "not known to have 9 of its tensors: blk.2"),
        ("attention.head_count", 0, "attention.head_count is 0"),
    ):

        def edit(
            metadata: dict[str, Any], tensors: dict[str, torch.Tensor], key: str = key, value: Any = value
        ) -> None:
            metadata[key] = value

        file = write(tmp_path / "odd.gguf", original("llama"), "llama", edit=edit)
        with pytest.raises((CheckpointError, UnsupportedModelError), match=message):
            asyncio.run(served(file))


def test_architectures_that_are_not_known_are_refused_by_name(original: Callable[[str], Path], tmp_path: Path) -> None:
    file = write(tmp_path / "model.gguf", original("llama"), "llama")
    file.write_bytes(file.read_bytes().replace(b"llama", b"lxama"))
    with pytest.raises(UnsupportedModelError, match=r"'lxama' cannot be read; those of .*llama"):
        GgufCheckpoint(file)


def test_every_kind_is_of_a_family() -> None:
    assert {kind.name for kind in KINDS.values()} <= FAMILIES.keys()


def test_the_page_lists_all_families() -> None:
    page = (Path(__file__).parents[3] / "docs" / "gguf.md").read_text(encoding="utf-8")
    rows = [line.split("|")[2] for line in page.partition("## Which models")[2].splitlines() if line.startswith("| ")]
    assert {name for row in rows for name in re.findall(r"`([^`]+)`", row)} == FAMILIES.keys()
