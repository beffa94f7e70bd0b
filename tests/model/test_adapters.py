"""LoRA adapters over real models: what they compute, that it hangs on nothing else, and what is refused."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import uvloop
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from asyncengine import (
    AdapterError,
    AsyncEngine,
    EngineConfig,
    EngineState,
    GenerationConfig,
    InsufficientMemoryError,
    ModelNotLoadedError,
    RequestOptions,
    RequestResult,
    tiny,
)
from asyncengine.model import load_check
from asyncengine.model.adapters import adapted_modules, lora
from tests.model.adapters import PREFIX, linear_layers, merge, save_adapter, tensors_of
from tests.model.reference import Reference

TOKENS = 8
GREEDY = GenerationConfig(temperature=0, max_tokens=TOKENS, ignore_eos=True)
PROMPTS = [[5], [7, 8, 9, 10, 11], [11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30]]
PARTS = {
    "gpt2": "attn.c_attn",
    "gpt_neox": ("query_key_value", "dense_4h_to_h"),
    "phi3": ("qkv_proj", "gate_up_proj"),
    "mixtral": ("q_proj", "o_proj"),
    "deepseek_v3": ("q_b_proj", "shared_experts.up_proj"),
    "qwen2_moe": ("shared_expert_gate", "shared_expert.down_proj"),
}
"""Layers of the second adapter, where they are called otherwise than in llama."""


def config(path: Path, **changes: Any) -> EngineConfig:
    values: dict[str, Any] = {
        "dtype": "float32", "device": "cpu", "prefill_chunk_size": 8, "kv_cache_page_size": 4, "max_num_sequence": 8,
        "max_total_sequence_length": 512,
    }  # fmt: skip
    return EngineConfig(str(path), **(values | changes))


async def ask(engine: AsyncEngine, prompt: list[int], adapter: str | None, **changes: Any) -> RequestResult:
    return await engine.generate(prompt, GREEDY.replace(**changes), RequestOptions(adapter=adapter))


async def ask_all(engine: AsyncEngine, adapters: tuple[str | None, ...]) -> list[RequestResult]:
    """Every prompt with every adapter, at once."""
    return await asyncio.gather(*(ask(engine, prompt, adapter) for adapter in adapters for prompt in PROMPTS))


@pytest.mark.parametrize(
    ("architecture", "decoder"),
    [
        *((name, "compiled") for name in ("qwen3", "gemma3_text", "phi3", "gpt2", "gpt_neox", "mixtral", "qwen2_moe")),
        *((name, "transformers") for name in ("qwen3", "gpt2", "deepseek_v3")),
        pytest.param("qwen2", "compiled", marks=pytest.mark.long),
        pytest.param("phi3", "transformers", marks=pytest.mark.long),
    ],
)
@pytest.mark.in_short(
    "deepseek_v3-transformers", "qwen2_moe-compiled", "gemma3_text-compiled", "gpt2-transformers", "gpt2-compiled"
)
def test_tokens_are_those_of_transformers_with_the_adapter_merged(
    architecture: str, decoder: Any, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    path = checkpoint(architecture)
    references = {name: Reference(path) for name in (None, "all", "some")}
    model: Any = references[None].model
    factors = save_adapter(tmp_path / "all", model, 1, rank=5, alpha=7.5)
    merge(references["all"].model, factors, 7.5 / 5)
    some = PARTS.get(architecture, ("v_proj", "down_proj"))
    factors = save_adapter(tmp_path / "some", model, 2, rank=17, only=some, scale=1.0, use_rslora=True)
    merge(references["some"].model, factors, 8 / math.sqrt(17))

    async def serve() -> list[RequestResult]:
        settings = config(path, decoder_backend=decoder, adapters={"all": str(tmp_path / "all")})
        async with AsyncEngine(settings) as engine:
            await engine.load_adapter("some", tmp_path / "some")
            assert engine.adapters == ("all", "some")
            return await ask_all(engine, tuple(references))

    results = (asyncio if decoder == "compiled" else uvloop).run(serve())
    found = {name: results[i * len(PROMPTS) : (i + 1) * len(PROMPTS)] for i, name in enumerate(references)}
    for name, reference in references.items():
        for prompt, result in zip(PROMPTS, found[name], strict=True):
            assert result.token_ids == reference.after_each(prompt, result.token_ids), f"{name}, {prompt}"
    tokens = {name: [result.token_ids for result in own] for name, own in found.items()}
    assert tokens[None] != tokens["all"] != tokens["some"] != tokens[None], "an adapter changed nothing"


@pytest.fixture(scope="module")
def tiny_adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters for the embedded model: ``one`` and ``two``."""
    directory = tmp_path_factory.mktemp("adapters")
    model = AutoModelForCausalLM.from_pretrained(tiny.PATH, dtype=torch.float32)
    save_adapter(directory / "one", model, 1)
    save_adapter(directory / "two", model, 2, rank=40)
    return directory


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "float32"},
        {"dtype": "bfloat16"},
        pytest.param({"dtype": "float16"}, marks=pytest.mark.long),
        *({"dtype": "bfloat16", "quantization": quantization} for quantization in ("int8", "int4")),
    ],
    ids=lambda changes: "-".join(changes.values()),
)
@pytest.mark.in_short("float32", "bfloat16-int4")
def test_the_batch_changes_no_bits(changes: Any, tiny_adapters: Path) -> None:
    """Log-probabilities of a request with an adapter, alone and beside requests with others, in any chunks."""

    async def serve(chunk: int, together: bool) -> list[RequestResult]:
        paths = {name: str(tiny_adapters / name) for name in ("one", "two")}
        settings = config(tiny.PATH, adapters=paths, prefill_chunk_size=chunk, **changes)
        async with AsyncEngine(settings) as engine:
            assert engine.complete_engine_config.decoder_backend == "compiled"
            wanted = [(prompt, name) for prompt in (*PROMPTS, [*range(40, 150)]) for name in (None, "one", "two")]
            changed = {"logprobs": True, "top_logprobs": 3, "max_tokens": 6}
            asked = [ask(engine, prompt, name, **changed) for prompt, name in wanted]
            return await asyncio.gather(*asked) if together else [await each for each in asked]

    alone, beside = asyncio.run(serve(128, False)), asyncio.run(serve(9, True))
    for one, other in zip(alone, beside, strict=True):
        assert one.outputs[0].logprobs == other.outputs[0].logprobs
    with_one, without = alone[1].outputs[0], alone[0].outputs[0]
    assert with_one.logprobs != without.logprobs


@pytest.mark.long
def test_lower_precisions_are_near(tiny_adapters: Path) -> None:
    """An adapter is no further off than the model is by itself, in each way in which weights may be kept."""

    async def scores(**changes: Any) -> torch.Tensor:
        async with AsyncEngine(config(tiny.PATH, adapters={"one": str(tiny_adapters / "one")}, **changes)) as engine:
            found = []
            for name in ("one", None):
                scored = await engine.score([[*range(40, 150)]], options=RequestOptions(adapter=name))
                found.append([entry.logprob for entry in scored[0].logprobs[1:]])
            return torch.tensor(found)

    exact, without = asyncio.run(scores())
    assert (exact - without).abs().mean() > 0.5
    for changes in (
        {"dtype": "bfloat16"},
        {"dtype": "bfloat16", "quantization": "int8"},
        {"dtype": "bfloat16", "quantization": "int4"},
        {"dtype": "bfloat16", "decoder_backend": "transformers"},
        {"dtype": "bfloat16", "quantization": "fp8"},
    ):
        near, near_without = asyncio.run(scores(**changes))
        of_the_weights = (without - near_without).abs().mean()
        assert (exact - near).abs().mean() < 2 * of_the_weights + 0.02, changes


def test_embeddings_and_pinned_prompts_have_adapters(tiny_adapters: Path) -> None:
    async def serve() -> None:
        async with AsyncEngine(config(tiny.PATH, adapters={"one": str(tiny_adapters / "one")})) as engine:
            text, with_one = "a little horse", RequestOptions(adapter="one")
            (plain,), (adapted,) = await engine.embed([text]), await engine.embed([text], options=with_one)
            assert not torch.allclose(torch.tensor(plain.vector), torch.tensor(adapted.vector), atol=1e-3)
            prompt = PROMPTS[2]
            await engine.pin_prompt(prompt, "pin", with_one)
            pinned = engine.metrics().kv_blocks_used
            assert pinned == len(prompt) // 4
            result = await ask(engine, prompt, "one")
            assert result.usage.cached_tokens > 0
            assert (await ask(engine, prompt, None)).usage.cached_tokens == 0
            await engine.unload_adapter("one")
            assert engine.metrics().kv_blocks_used == 0
            assert not await engine.unpin_prompt("pin")

    asyncio.run(serve())


def test_tensors_of_a_training_loop_are_taken(tiny_adapters: Path) -> None:
    """As `peft.get_peft_model_state_dict` gives them; what becomes of them later is nothing to the engine."""

    async def serve() -> None:
        async with AsyncEngine(config(tiny.PATH, adapters={"one": str(tiny_adapters / "one")})) as engine:
            read = lora.read_config(tiny_adapters / "one")
            tensors = load_file(tiny_adapters / "one" / "adapter_model.safetensors")
            await engine.load_adapter("policy", tensors, read)
            expected = (await ask(engine, PROMPTS[1], "one")).token_ids
            assert (await ask(engine, PROMPTS[1], "policy")).token_ids == expected
            for tensor in tensors.values():
                tensor.zero_()
            assert (await ask(engine, PROMPTS[1], "policy")).token_ids == expected
            await engine.load_adapter("policy", tensors, read)  # which does nothing now
            plain = (await ask(engine, PROMPTS[1], None)).token_ids
            assert (await ask(engine, PROMPTS[1], "policy")).token_ids == plain

    asyncio.run(serve())


@pytest.mark.parametrize("decoder", ["compiled", "transformers"])
def test_adapters_stay_when_weights_change_and_when_the_engine_sleeps(decoder: Any, tiny_adapters: Path) -> None:
    async def serve() -> None:
        settings = config(tiny.PATH, adapters={"one": str(tiny_adapters / "one")}, decoder_backend=decoder)
        async with AsyncEngine(settings) as engine:
            before = (await ask(engine, PROMPTS[1], "one")).token_ids
            await engine.sleep()
            await engine.wake()
            assert (await ask(engine, PROMPTS[1], "one")).token_ids == before
            model = AutoModelForCausalLM.from_pretrained(tiny.PATH, dtype=torch.float32)
            name = "model.layers.1.self_attn.v_proj.weight"
            changed = model.get_parameter(name).detach() * -1
            await engine.update_weights({name: changed})
            with torch.no_grad():
                model.get_parameter(name).copy_(changed)
            factors = save_adapter(tiny_adapters / "again", model, 1)
            merge(model, factors, 2.0)
            found = (await ask(engine, PROMPTS[1], "one")).token_ids
            with torch.inference_mode():
                logits = model(torch.tensor([[*PROMPTS[1], *found[:-1]]])).logits[0, len(PROMPTS[1]) - 1 :]
            assert found == logits.argmax(-1).tolist() != before

    asyncio.run(serve())


def test_a_model_that_is_made_meanwhile_changes_no_dtype(tiny_adapters: Path) -> None:
    """While transformers makes a model, the whole process's default dtype is that model's."""

    async def serve() -> None:
        async with AsyncEngine(config(tiny.PATH, adapters={"one": str(tiny_adapters / "one")})) as engine:
            torch.set_default_dtype(torch.bfloat16)
            try:
                await engine.load_adapter("again", tiny_adapters / "one")
            finally:
                torch.set_default_dtype(torch.float32)
            once, again = [(await ask(engine, PROMPTS[2], name)).token_ids for name in ("one", "again")]
            assert once == again

    asyncio.run(serve())


def test_one_for_which_there_is_no_memory_leaves_what_was_there(
    tiny_adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> Any:
        raise torch.OutOfMemoryError("full")

    async def serve() -> None:
        settings = config(tiny.PATH, decoder_backend="transformers", adapters={"one": str(tiny_adapters / "one")})
        async with AsyncEngine(settings) as engine:
            before = (await ask(engine, PROMPTS[1], "one")).token_ids
            monkeypatch.setattr(adapted_modules, "_moved", full)
            for name in ("one", "two"):
                with pytest.raises(InsufficientMemoryError, match="no memory for the adapter: full"):
                    await engine.load_adapter(name, tiny_adapters / "two")
            assert engine.adapters == ("one",)
            assert (await ask(engine, PROMPTS[1], "one")).token_ids == before

    asyncio.run(serve())


def test_nothing_is_left_of_adapters_that_went(tiny_adapters: Path) -> None:
    async def serve() -> None:
        async with AsyncEngine(config(tiny.PATH)) as engine:
            for _ in range(3):
                await engine.load_adapter("one", tiny_adapters / "one")
                await ask(engine, PROMPTS[1], "one")
                await engine.unload_adapter("one")
            hooks = "tests.model.test_adapters:hooks"
            assert (await engine.debug_call_func_on_all_workers(hooks))[0] == 0
            assert engine.metrics().kv_blocks_cached == 0
            await engine.reload(config(tiny.PATH, adapters={"two": str(tiny_adapters / "two")}))
            assert engine.adapters == ("two",)
            await engine.unload()
            assert engine.adapters == ()
            with pytest.raises(ModelNotLoadedError):
                await engine.load_adapter("one", tiny_adapters / "one")
            await engine.reload(config(tiny.PATH))
            assert engine.adapters == ()

    asyncio.run(serve())


def hooks(model: Any) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def test_an_adapter_that_does_not_fit_is_refused_and_the_model_serves_on(tiny_adapters: Path, tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()

    async def serve() -> None:
        async with AsyncEngine(config(tiny.PATH, adapters={"one": str(tiny_adapters / "one")})) as engine:
            before = (await ask(engine, PROMPTS[1], "one")).token_ids
            for source, says in (
                (tmp_path / "missing", "there is no such directory"),
                ("~nobody-at-all/x", "adapter '~nobody-at-all/x': "),
                ("a\0b", "there is no such directory"),
                (tmp_path / "nothing", "it is not an adapter that PEFT saved"),
                (tiny.PATH, "it is not an adapter that PEFT saved"),
                (5, "expected a directory or a mapping of tensors"),
                ({}, "with tensors, expected what adapter_config.json would have"),
            ):
                with pytest.raises(AdapterError, match=says):
                    await engine.load_adapter("one", source)  # type: ignore[arg-type]
            with pytest.raises(AdapterError, match="there is no such directory"):
                await engine.reload(config(tiny.PATH, adapters={"x": str(tmp_path / "missing")}))
            assert engine.state is EngineState.READY
            assert (await ask(engine, PROMPTS[1], "one")).token_ids == before

    asyncio.run(serve())


def test_a_reload_with_a_wrong_adapter_leaves_the_old_model(
    tiny_adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the two do not fit beside each other: one that is damaged, and one for a larger model."""
    shutil.copytree(tiny_adapters / "one", tmp_path / "damaged")
    weights = tmp_path / "damaged" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    shutil.copytree(tiny_adapters / "one", tmp_path / "larger")
    larger = {"model.layers.0.self_attn.q_proj": (torch.ones(4, 256), torch.ones(128, 4))}
    save_file(tensors_of(larger), tmp_path / "larger" / "adapter_model.safetensors")
    monkeypatch.setattr(load_check, "fits", lambda details, current: False)

    async def serve() -> None:
        async with AsyncEngine(config(tiny.PATH, adapters={"one": str(tiny_adapters / "one")})) as engine:
            before = (await ask(engine, PROMPTS[1], "one")).token_ids
            for name, says in (
                ("damaged", "cannot be read"),
                ("larger", r"the checkpoint's weight of it is \(128, 128\)"),
            ):
                with pytest.raises(AdapterError, match=says):
                    await engine.reload(config(tiny.PATH, adapters={"x": str(tmp_path / name)}))
                assert engine.state is EngineState.READY
            assert (await ask(engine, PROMPTS[1], "one")).token_ids == before

    asyncio.run(serve())


LAYERS = {"model.layers.0.self_attn.q_proj": (8, 6), "model.layers.0.mlp.down_proj": (6, 4)}
RIGHT = {
    "model.layers.0.self_attn.q_proj": (torch.ones(2, 6), torch.ones(8, 2)),
    "model.layers.0.mlp.down_proj": (torch.ones(3, 4), torch.ones(6, 3)),
}
BARE = tensors_of(RIGHT)
Q = f"{PREFIX}model.layers.0.self_attn.q_proj"
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "bias": "none"}


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in BARE.items() if key != name}


WRONG: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"peft_type": "IA3"}, {}, "is of peft_type 'IA3'; served: 'LORA'"),
    ({"use_dora": True}, {}, "has use_dora = True; that is not served"),
    ({"bias": "lora_only"}, {}, "has bias = 'lora_only'"),
    ({"modules_to_save": ["lm_head"]}, {}, r"has modules_to_save = \['lm_head'\]"),
    ({"target_parameters": ["experts.down_proj"]}, {}, "has target_parameters"),
    ({"trainable_token_indices": [1]}, {}, "has trainable_token_indices"),
    ({"use_bdlora": {"nblocks": 2}}, {}, "has use_bdlora"),
    ({"arrow_config": {"top_k": 2}}, {}, "has arrow_config"),
    ({"kasa_config": {}}, {}, "has kasa_config"),
    ({"init_lora_weights": "pissa_niter_4"}, {}, "has init_lora_weights = 'pissa_niter_4', so it is one for altered"),
    ({"init_lora_weights": "OLoRA"}, {}, "path_initial_model_for_weight_conversion"),
    ({"r": 0}, {}, "has r = 0; expected a number > 0"),
    ({"lora_alpha": "8"}, {}, "has lora_alpha = '8'"),
    ({"alpha_pattern": {"q_proj": None}}, {}, "has lora_alpha = None"),
    ({"alpha_pattern": {"(": 2}}, {}, "has the pattern"),
    ({"alpha_pattern": {"(" * 50_000: 2}}, {}, "has the pattern"),
    ({"alpha_pattern": {"a{99999999999}": 2}}, {}, "has the pattern"),
    ({"alpha_pattern": ["q_proj"]}, {}, "expected numbers by names of layers"),
    ({}, {"": None}, "has no tensors"),
    ({}, without(f"{Q}.lora_B.weight"), "q_proj has lora_A alone"),
    ({}, {**BARE, f"{PREFIX}lm_head.weight": torch.ones(2, 2)}, "no factor of an adapted linear layer"),
    ({}, {**BARE, f"{Q}.lora_magnitude_vector": torch.ones(8)}, "no factor of an adapted linear layer"),
    ({}, {**BARE, f"{Q}.lora_A.weight": torch.ones(2, 7)}, "takes 6 numbers and gives 8"),
    ({}, {**BARE, f"{Q}.lora_A.weight": torch.ones(3, 6)}, "takes 6 numbers and gives 8"),
    ({}, {**BARE, f"{Q}.lora_A.weight": torch.full((2, 6), math.nan)}, "numbers that are not finite"),
    ({}, {**BARE, f"{Q}.lora_A.weight": torch.ones(2, 6, dtype=torch.int64)}, "is not a matrix"),
    ({}, {**BARE, f"{Q}.lora_A.weight": [[1.0] * 6] * 2}, "is not a matrix"),
    ({}, {**BARE, f"{Q}.lora_A.weight": torch.ones(0, 6)}, "is empty"),
    ({}, {**BARE, f"{Q}.lora_B.weight": torch.full((8, 2), 1e5)}, "q_proj has numbers that float16 cannot hold"),
    ({}, {**BARE, f"{Q}.lora_A.weight": torch.ones(2, 6, device="meta")}, "is sparse, or has no numbers"),
    ({}, {**BARE, f"{Q}.lora_A.weight": torch.ones(2, 6).to_sparse()}, "is sparse, or has no numbers"),
    ({}, {**BARE, f"{Q}.lora_A.other.weight": torch.ones(2, 6)}, "has lora_A twice, as if of two adapters"),
    ({}, {5: torch.ones(2, 6)}, "no factor of an adapted linear layer"),
    (
        {},
        tensors_of({"model.layers.0.self_attn.q_pro": (torch.ones(2, 6), torch.ones(8, 2))}),
        "did you mean 'model.layers.0.self_attn.q_proj'",
    ),
]


@pytest.mark.parametrize(("settings", "tensors", "says"), WRONG, ids=range(len(WRONG)))
def test_what_is_wrong_with_an_adapter_is_said(settings: Any, tensors: Any, says: str) -> None:
    given = {} if "" in tensors else tensors or BARE
    with pytest.raises(AdapterError, match=says):
        lora.read(given, CONFIG | settings, LAYERS, torch.float16)


def test_scaling_is_that_of_peft() -> None:
    def scalings(**settings: Any) -> dict[str, float]:
        return {name: own.scaling for name, own in lora.read(BARE, CONFIG | settings, LAYERS, torch.float32).items()}

    q, down = RIGHT
    assert scalings() == {q: 4.0, down: pytest.approx(8 / 3)}
    assert scalings(use_rslora=True) == {q: pytest.approx(8 / 2**0.5), down: pytest.approx(8 / 3**0.5)}
    assert scalings(alpha_pattern={"down_proj": 6}, rank_pattern={"down_proj": 3}) == {q: 4.0, down: 2.0}
    assert scalings(alpha_pattern={"^model.layers.0.mlp.down_proj": 6}) == {q: 4.0, down: 2.0}
    assert scalings(alpha_pattern={"^down_proj": 6})[down] == pytest.approx(8 / 3)


@pytest.mark.parametrize("begun", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_how_training_began_is_of_no_matter_where_the_model_was_as_it_is(begun: object) -> None:
    assert lora.read(BARE, CONFIG | {"init_lora_weights": begun}, LAYERS, torch.float32).keys() == RIGHT.keys()


def test_names_of_pefts_own_modules_and_without_its_prefix_are_known() -> None:
    named = {key.replace(".weight", ".default.weight"): value for key, value in BARE.items()}
    bare = {key.removeprefix(PREFIX): value for key, value in BARE.items()}
    assert (
        lora.read(named, CONFIG, LAYERS, torch.float32).keys()
        == lora.read(bare, CONFIG, LAYERS, torch.float32).keys()
        == RIGHT.keys()
    )


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("adapter_config.json", "{", "cannot be read"),
        ("adapter_config.json", "[]", "is not a JSON object"),
        ("adapter_model.safetensors", "nonsense", "cannot be read"),
        ("adapter_model.safetensors", None, "has no weights"),
    ],
)
def test_damaged_files_are_refused(file: str, content: str | None, says: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "adapter_model.safetensors").write_text("")
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_text(content)
    with pytest.raises(AdapterError, match=says):
        lora.read(tmp_path, None, LAYERS, torch.float32)


def test_pickled_weights_are_read_and_run_nothing(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    torch.save(BARE, tmp_path / "adapter_model.bin")
    assert lora.read(str(tmp_path), None, LAYERS, torch.float32).keys() == RIGHT.keys()
    torch.save({"x": Harmful()}, tmp_path / "adapter_model.bin")
    with pytest.raises(AdapterError, match="cannot be read"):
        lora.read(str(tmp_path), None, LAYERS, torch.float32)


class Harmful:
    def __reduce__(self) -> Any:
        return (pytest.fail, ("it was run",))


def test_all_that_can_be_adapted_is_named(checkpoint: Callable[..., Path]) -> None:
    """Whatever PEFT's ``all-linear`` would adapt, for a compiled step and for modules."""

    async def serve(decoder: Any) -> None:
        path = checkpoint("qwen3")
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        async with AsyncEngine(config(path, decoder_backend=decoder)) as engine:
            format = engine._thread.core.view.adapter_format  # type: ignore[union-attr]
            assert dict(format._layers) == linear_layers(model)  # type: ignore[union-attr]

    asyncio.run(serve("compiled"))
    asyncio.run(serve("transformers"))


def test_an_engine_without_a_model_has_no_adapters() -> None:
    assert AsyncEngine().adapters == ()
    assert dataclasses.asdict(EngineConfig("tiny"))["adapters"] == {}
