"""Multi-head latent attention that keeps its latents: what is kept, what comes of it, and who has no such layers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from asyncengine import (
    AdapterError,
    AsyncEngine,
    ConfigError,
    EngineConfig,
    GenerationConfig,
    ReloadError,
    RequestOptions,
    UnsupportedModelError,
)
from asyncengine.model import architecture, packed_linear
from asyncengine.model.adapters.adapted_modules import AdaptedModules
from asyncengine.model.attention.cpu import CpuAttention
from asyncengine.model.attention.reference import TorchAttention
from asyncengine.model.decoder.weights import PackedMatrix
from asyncengine.model.latent_attention import LatentAttention, keep_latents
from asyncengine.model.loader import TransformersLoader
from asyncengine.model.quantised.four_bit_linear import round_layers
from asyncengine.model.verification import Trial
from asyncengine.model.watching import watch
from tests.model import checkpoints
from tests.model.adapters import save_adapter
from tests.model.attention.triton_device import require_triton
from tests.model.decoder.test_compiled_models import failing_at
from tests.model.draft_heads import mtp_heads
from tests.model.reference import Reference

pytestmark = pytest.mark.loops("either")

Checkpoint = Callable[..., Path]
GREEDY = GenerationConfig(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = [[3 + 7 * i % 190 for i in range(length)] for length in (41, 1, 9)]
RANK, ROTATED = 16, 8
FILLING = {"kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 16, "v_head_dim": 32}
"""Sizes that fill vectors, so that the model runs as a compiled step."""


def engine_config(path: Path, **changes: Any) -> EngineConfig:
    given = {"device": "cpu", "dtype": "float32", "max_total_sequence_length": 1024, "prefill_chunk_size": 16}
    return EngineConfig(str(path), **(given | changes))


def model_of(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=architecture.ATTENTION)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("name", ["deepseek_v2", "glm4_moe_lite", "longcat_flash", "minicpm3"])
@pytest.mark.in_short("minicpm3", "deepseek_v2")
async def test_tokens_are_those_of_transformers_in_chunks_together_and_from_the_prefix_cache(
    name: str, checkpoint: Checkpoint
) -> None:
    path = checkpoint(name)
    reference = Reference(path)
    for mla in (None, False)[: 1 + (name == "minicpm3")]:
        async with AsyncEngine(engine_config(path, mla=mla)) as engine:
            assert engine.complete_engine_config.mla is (mla is None)
            results = [result async for result in answers(engine, [*PROMPTS, PROMPTS[0]])]
            again = await engine.generate(PROMPTS[0], GREEDY)
        assert again.usage.cached_tokens > 0
        for prompt, result in [*results, (PROMPTS[0], again)]:
            assert result.token_ids == reference.after_each(prompt, result.token_ids)
    assert reference.generated(PROMPTS[0], 3) == again.token_ids[:3]


async def answers(engine: AsyncEngine, prompts: list[list[int]]) -> Any:
    streams = [await engine.add_request(prompt, GREEDY) for prompt in prompts]
    for prompt, stream in zip(prompts, streams, strict=True):
        yield prompt, await stream


async def test_the_matrix_is_read_where_other_layers_are_packed(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_linear, "_LEAST", 1)
    path = checkpoint("minicpm3")
    async with AsyncEngine(engine_config(path, attention_backend="torch")) as engine:
        result = await engine.generate(PROMPTS[0], GREEDY)
    assert result.token_ids == Reference(path).after_each(PROMPTS[0], result.token_ids)


@pytest.mark.parametrize(
    ("target", "draft"), [("llama", "deepseek_v2"), ("deepseek_v2", "llama"), ("deepseek_v3", "")], ids=str
)
@pytest.mark.in_short("deepseek_v3-", "llama-deepseek_v2")
async def test_who_drafts_keeps_latents_too(
    target: str, draft: str, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absorb, seen = LatentAttention.absorb, set()

    def watched(module: LatentAttention, query: torch.Tensor, rotated: int) -> torch.Tensor:
        seen.add(module)
        return absorb(module, query, rotated)

    monkeypatch.setattr(LatentAttention, "absorb", watched)
    if draft:
        path, modules = checkpoint(target), 3
        drafts = {"speculative_mode": "small_draft", "additional_models": [str(checkpoint(draft))]}
    else:
        path, modules = mtp_heads.write(tmp_path, target, "deepseek"), mtp_heads.LAYERS + 1
        drafts = {"speculative_mode": "mtp"}
    mla = True if target != "llama" else None  # which is asked of the target alone
    async with AsyncEngine(engine_config(path, mla=mla, spec_draft_length=2, **drafts)) as engine:
        seen.clear()  # of the trial
        result = await engine.generate(PROMPTS[0], GREEDY)
        assert engine.metrics().counters.draft_tokens > 0
    assert len(seen) == modules
    assert result.token_ids == Reference(path).after_each(PROMPTS[0], result.token_ids)


def test_a_token_takes_its_latents_alone() -> None:
    config = checkpoints.config("glm4_moe_lite")
    heads = 4 * (16 + ROTATED + 20)
    for latents, kept, numbers in ((True, RANK + ROTATED, RANK), (False, heads, 0)):
        watched = watch(config, latents=latents)
        assert watched is not None
        specs = list(watched.attention.values())
        assert len(specs) == 3
        assert all(spec.values_in_keys is latents for spec in specs)
        bytes_of = CpuAttention.bytes_per_block(specs[0], 1, torch.float32)
        assert bytes_of == 4 * (kept + numbers)  # the kernel for the CPU keeps values in an order of their own
        assert specs[0].scaling == pytest.approx((16 + ROTATED) ** -0.5)


def test_what_is_computed_otherwise_is_refused(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is expected is what transformers makes of keys and values of all heads."""
    absorb = LatentAttention.absorb
    monkeypatch.setattr(LatentAttention, "absorb", lambda self, query, rotated: 1.5 * absorb(self, query, rotated))
    loader = TransformersLoader()
    with pytest.raises(UnsupportedModelError, match="does not compute over a paged KV cache"):
        loader.load(loader.check(engine_config(checkpoint("minicpm3")), None))


async def test_keys_and_values_of_one_byte_have_one_scale(checkpoint: Checkpoint) -> None:
    model = model_of(checkpoint("minicpm3"))
    keep_latents(model)
    layers = architecture.record(model)
    for layer in layers.attention:
        layer.module.kv_a_proj_with_mqa.weight[RANK:] *= 1e4  # type: ignore[union-attr, index, operator]
    scaled = Trial.of(model, layers, torch.device("cpu")).scaled(model, TorchAttention())
    assert all(layer.spec.key_scale == layer.spec.value_scale > 1 for layer in scaled.attention)
    given = engine_config(checkpoint("minicpm3"), attention_backend="torch", kv_cache_dtype="fp8_e4m3")
    async with AsyncEngine(given) as engine:
        assert engine.complete_engine_config.mla
        assert len((await engine.generate(PROMPTS[0], GREEDY)).token_ids) == 12


@pytest.mark.parametrize("changes", [{}, FILLING], ids=["transformers", "compiled"])
async def test_the_matrix_can_be_replaced_where_weights_are_narrow(
    checkpoint: Checkpoint, changes: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its part that makes keys, and the one that makes values; if that fails half-way, neither."""
    path, other = checkpoint("minicpm3", seed=1, **changes), checkpoint("minicpm3", seed=2, **changes)
    name = "model.layers.1.self_attn.kv_b_proj.weight"
    old, new = (model_of(each, torch.bfloat16).get_parameter(name) for each in (path, other))
    values = old.clone()
    values.view(4, -1, old.shape[1])[:, 16:] = new.view(4, -1, old.shape[1])[:, 16:]

    async with AsyncEngine(engine_config(path, quantization="int8", dtype="auto")) as engine:
        assert engine.complete_engine_config.decoder_backend == ("compiled" if changes else "transformers")
        before = await scored(engine)
        with monkeypatch.context() as patched:
            patched.setattr(PackedMatrix, "write", failing_at(8))  # of four heads, the last one's value
            with pytest.raises(ReloadError, match="none was replaced"):
                await engine.update_weights({name: new})
        assert torch.equal(await scored(engine), before)
        await engine.update_weights({name: values})
        half = await scored(engine)
        await engine.update_weights({name: new})
        after = await scored(engine)
        assert not torch.equal(half, before)
        assert not torch.equal(after, half)
        await engine.sleep()
        await engine.wake()
        assert torch.equal(await scored(engine), after)
        await engine.update_weights({name: old})
        assert torch.equal(await scored(engine), before)


def test_a_matrix_of_codes_becomes_the_numbers_that_they_stand_for(checkpoint: Checkpoint) -> None:
    model = model_of(checkpoint("minicpm3", kv_lora_rank=32), torch.bfloat16)
    round_layers(model)
    layers = [module for module in model.modules() if hasattr(type(module), "expand_kv")]
    before = [layer.kv_b_proj for layer in layers]
    assert all(type(layer) is not nn.Linear for layer in before)
    keep_latents(model)
    latents = torch.randn(5, 32, dtype=torch.bfloat16)
    for layer, coded in zip(layers, before, strict=True):
        assert type(layer.kv_b_proj) is nn.Linear
        assert isinstance(layer, LatentAttention)
        torch.testing.assert_close(layer.kv_b_proj(latents), coded(latents), rtol=2e-2, atol=2e-2)


async def test_an_adapter_of_the_matrix_is_added_to_what_is_multiplied_with_it(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Requests with it, with another, and without, in the same steps, as with keys and values of all heads."""
    path = checkpoint("minicpm3")
    model = model_of(path)
    for name, seed in (("one", 1), ("two", 2)):
        save_adapter(tmp_path / name, model, seed, only=("kv_b_proj",))
    adapters = {name: str(tmp_path / name) for name in ("one", "two")}
    found = []
    for mla in (True, False):
        async with AsyncEngine(engine_config(path, mla=mla, adapters=adapters)) as engine:
            found.append(torch.stack(await asyncio.gather(*(scored(engine, name) for name in ("one", None, "two")))))
            torch.testing.assert_close(await scored(engine), found[-1][1], rtol=1e-4, atol=1e-4)  # in steps without any
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (found[0][one] - found[0][other]).abs().max() > 0.01


async def scored(engine: AsyncEngine, adapter: str | None = None) -> torch.Tensor:
    """The logarithms of the probabilities of a prompt's tokens."""
    [score] = await engine.score([PROMPTS[0]], options=RequestOptions(adapter=adapter))
    return torch.tensor([each.logprob for each in score.logprobs if each is not None])


async def test_adapters_of_a_compiled_step_may_adapt_all_else(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = checkpoint("minicpm3", **FILLING)
    model = model_of(path)
    save_adapter(tmp_path / "one", model, 1, only=("q_a_proj", "kv_a_proj_with_mqa", "o_proj"))
    save_adapter(tmp_path / "two", model, 2, only=("q_b_proj",), rank=5)
    save_adapter(tmp_path / "none", model, 3, only=("kv_b_proj",))
    adapters = {name: str(tmp_path / name) for name in ("one", "two")}
    found = []
    for changes in ({"decoder_backend": "compiled"}, {"decoder_backend": "transformers", "mla": False}):
        async with AsyncEngine(engine_config(path, adapters=adapters, **changes)) as engine:
            found.append(torch.stack(await asyncio.gather(*(scored(engine, name) for name in ("one", None, "two")))))
            if engine.complete_engine_config.mla:
                with pytest.raises(
                    AdapterError, match=r"kv_b_proj', which .*decoder_backend='transformers' lets it be"
                ):
                    await engine.load_adapter("none", tmp_path / "none")
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (found[0][one] - found[0][other]).abs().max() > 0.01


def test_no_kernel_looks_up_what_adapts_the_matrix(checkpoint: Checkpoint, tmp_path: Path) -> None:
    require_triton()
    model = model_of(checkpoint("minicpm3"))
    keep_latents(model)
    adapted = AdaptedModules(model, architecture.record(model), torch.device("cpu"), torch.float32, by_token=True)
    for number, name in enumerate(("o_proj", "kv_b_proj")):
        save_adapter(tmp_path / name, model, number, only=name)
        adapted.put(number, adapted.format.prepare(str(tmp_path / name), None))
        assert adapted.by_token(1) is adapted.capturable is (number == 0)
    adapted.remove(1)
    assert adapted.capturable


@pytest.mark.parametrize(
    ("name", "changes", "error", "message"),
    [
        ("llama", {"mla": True}, UnsupportedModelError, "mla is True; .* has no multi-head latent attention"),
        ("minicpm3", {"mla": True, "attention_backend": "flashinfer"}, ConfigError, "'flashinfer', which knows no"),
    ],
)
def test_who_has_none_is_refused_where_latents_are_wanted(
    name: str, changes: dict[str, Any], error: type[Exception], message: str, checkpoint: Checkpoint
) -> None:
    with pytest.raises(error, match=message):
        TransformersLoader().check(engine_config(checkpoint(name), **changes), None)


def test_what_is_no_answer_is_refused() -> None:
    with pytest.raises(ConfigError, match="mla is 'yes'; allowed: True, False, None"):
        EngineConfig("tiny", mla="yes")  # type: ignore[arg-type]
