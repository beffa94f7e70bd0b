"""The engine over models with recurrent layers: what it keeps, what it refuses, and what goes on as with any other."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from asyncengine import (
    AdapterError,
    AsyncEngine,
    ConfigError,
    EngineConfig,
    GenerationConfig,
    InsufficientMemoryError,
    RequestOptions,
    StepError,
)
from asyncengine.model import memory
from asyncengine.model.loader import TransformersLoader
from asyncengine.model.runner import TorchModel
from tests.model.adapters import merge, save_adapter
from tests.model.reference import Reference, reference

pytestmark = pytest.mark.loops("either")
PROMPT = list(range(20, 57))
GREEDY = GenerationConfig(temperature=0, max_tokens=20, ignore_eos=True)


def config_of(path: Path, **changes: Any) -> EngineConfig:
    return EngineConfig(
        str(path), device="cpu", dtype="float32", max_num_sequence=4, max_total_sequence_length=512,
        kv_cache_page_size=16, prefill_chunk_size=32,
    ).replace(**changes)  # fmt: skip


async def test_the_next_turn_goes_on_behind_the_last_block_of_the_answer(checkpoint: Callable[..., Path]) -> None:
    path = checkpoint("qwen3_5")
    async with AsyncEngine(config_of(path)) as engine:
        first = await engine.generate(PROMPT, GREEDY)
        assert first.usage.cached_tokens == 0
        turn = [*PROMPT, *first.token_ids, 3, 4, 5]
        second = await engine.generate(turn, GREEDY)
        assert second.usage.cached_tokens == 48  # of 37 + 20: the state is that behind three blocks
        again = await engine.generate(turn, GREEDY)
        assert again.usage.cached_tokens == 48 and again.token_ids == second.token_ids
        metrics = engine.metrics()
        assert (metrics.states_total, metrics.states_cached > 2) == (64, True)
    assert second.token_ids == reference(path).after_each(turn, second.token_ids)


async def test_weights_that_are_replaced_make_states_of_their_own(checkpoint: Callable[..., Path]) -> None:
    path, other = checkpoint("lfm2"), checkpoint("lfm2", seed=1)
    weights = dict(AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32).named_parameters())
    async with AsyncEngine(config_of(path)) as engine:
        await engine.generate(PROMPT, GREEDY)
        await engine.update_weights({name: weight.detach() for name, weight in weights.items()})
        result = await engine.generate(PROMPT, GREEDY)
        assert result.usage.cached_tokens == 0
        assert result.token_ids == reference(other).after_each(PROMPT, result.token_ids)
        await engine.sleep()
        await engine.wake()
        assert (await engine.generate(PROMPT, GREEDY)).token_ids == result.token_ids


async def test_a_failed_step_leaves_no_state_behind(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoint("qwen3_5")
    execute, fails = TorchModel.execute, [False]

    def executed(model: TorchModel, batch: Any) -> Any:
        drawn = execute(model, batch)  # its states have moved on by then
        if fails[0]:
            fails[0] = False
            raise RuntimeError("no")
        return drawn

    monkeypatch.setattr(TorchModel, "execute", executed)
    async with AsyncEngine(config_of(path)) as engine:
        expected = await engine.generate(PROMPT, GREEDY)
        fails[0] = True
        with pytest.raises(StepError, match="no"):
            await engine.generate([9, *PROMPT], GREEDY)
        assert (await engine.generate(PROMPT, GREEDY)).token_ids == expected.token_ids
        assert engine.state.value == "ready" and engine.metrics().kv_blocks_used == 0


async def test_scores_and_vectors_are_those_of_a_plain_forward(checkpoint: Callable[..., Path]) -> None:
    path = checkpoint("granitemoehybrid")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.inference_mode():
        output = model(torch.tensor([PROMPT]), use_cache=False, output_hidden_states=True)
    logprobs = output.logits[0].log_softmax(-1)
    mean = output.hidden_states[-1][0].mean(dim=0)
    async with AsyncEngine(config_of(path)) as engine:
        (score,) = await engine.score([PROMPT])
        (vector,) = await engine.embed([PROMPT], "mean")
    expected = sum(float(logprobs[at, token]) for at, token in enumerate(PROMPT[1:]))
    assert score.logprob == pytest.approx(expected, rel=1e-4)
    assert np.allclose(vector.vector, (mean / mean.norm()).numpy(), atol=1e-4)


async def test_adapters_reach_the_first_and_last_products_of_a_recurrent_layer(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    path = checkpoint("qwen3_5")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    factors = save_adapter(tmp_path / "one", model, 1, scale=1.0)
    assert any("in_proj_qkv" in name for name in factors) and any("linear_attn.out_proj" in name for name in factors)
    own = Reference(path)
    merge(own.model, factors, 2.0)  # alpha 8, rank 4
    async with AsyncEngine(config_of(path, adapters={"one": str(tmp_path / "one")})) as engine:
        plain, adapted = await asyncio.gather(
            engine.generate(PROMPT, GREEDY), engine.generate(PROMPT, GREEDY, RequestOptions(adapter="one"))
        )
    assert plain.token_ids == reference(path).after_each(PROMPT, plain.token_ids)
    assert adapted.token_ids == own.after_each(PROMPT, adapted.token_ids)
    assert plain.token_ids != adapted.token_ids


async def test_adapters_of_what_is_computed_row_by_row_are_refused(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    path = checkpoint("mamba")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    save_adapter(tmp_path / "inner", model, 1, only="x_proj")
    save_adapter(tmp_path / "outer", model, 1, only=("in_proj", "out_proj"))
    async with AsyncEngine(config_of(path)) as engine:
        with pytest.raises(AdapterError, match="x_proj"):
            await engine.load_adapter("inner", tmp_path / "inner")
        await engine.load_adapter("outer", tmp_path / "outer")
        assert len((await engine.generate(PROMPT, GREEDY, RequestOptions(adapter="outer"))).token_ids) == 20


async def test_a_weight_that_a_layer_reads_itself_stays_as_it_is(checkpoint: Callable[..., Path]) -> None:
    """The first Mamba multiplies by the weight of a linear layer that it does not call."""
    path = checkpoint("mamba", time_step_rank=16)
    async with AsyncEngine(config_of(path, dtype="bfloat16", quantization="fp8")) as engine:
        assert any(note.startswith("quantization: fp8") for note in engine.health().notes)
        assert len((await engine.generate(PROMPT, GREEDY)).token_ids) == 20
    async with AsyncEngine(config_of(path)) as engine:
        result = await engine.generate(PROMPT, GREEDY)
        assert not any("run as torch has them" in note for note in engine.health().notes)
    assert result.token_ids == reference(path).after_each(PROMPT, result.token_ids)


def test_a_model_without_positions_takes_sequences_of_any_length(checkpoint: Callable[..., Path]) -> None:
    loader, path = TransformersLoader(), checkpoint("mamba")
    assert loader.check(config_of(path), None).details.max_length == 2048
    assert loader.check(config_of(path, max_single_sequence_length=9000), None).details.max_length == 9000
    with pytest.raises(ConfigError, match=r"max_position_embeddings allows 1\.\.512"):
        loader.check(config_of(checkpoint("lfm2"), max_single_sequence_length=9000), None)


def test_it_cannot_be_a_compiled_step_and_that_is_known_before_a_load(checkpoint: Callable[..., Path]) -> None:
    config = config_of(checkpoint("lfm2"), decoder_backend="compiled")
    with pytest.raises(ConfigError, match="cannot run as a compiled step: it has recurrent layers"):
        TransformersLoader().check(config, None)


def test_half_of_the_memory_is_left_to_keys_and_values() -> None:
    mib = 1 << 20

    def budget(
        nbytes: int, sequences: int = 16, wanted: bool = False, keeps: bool = True, each: int = 0, drafts: int = 0
    ) -> tuple[int, ...]:
        found = memory.state_budget(
            nbytes=nbytes, bytes_per_state=mib, sequences=sequences, wanted=wanted, keeps=keeps,
            beside=lambda count: each * count, drafts=lambda count: drafts * count,
        )  # fmt: skip
        assert found.nbytes == (found.sequences + found.kept + found.drafted + 1) * mib
        assert 2 * found.nbytes <= nbytes - each * found.sequences
        assert bool(drafts) == bool(found.drafted)
        return found.sequences, found.kept, *([found.drafted] if drafts else [])

    assert budget(1000 * mib) == (16, 64)
    assert budget(1000 * mib, sequences=32) == (32, 128)
    assert budget(1000 * mib, keeps=False) == (16, 0)
    assert budget(100 * mib) == (16, 25)
    assert budget(20 * mib) == (5, 4)  # fewer sequences than would be usual
    assert budget(20 * mib, sequences=9, wanted=True) == (9, 0)
    assert budget(100 * mib, sequences=256, each=mib) == (17, 20)  # of which each takes as much again, besides
    with pytest.raises(InsufficientMemoryError, match=r"max_num_sequence = 16, but 0\.02 GiB .* = 9 sequences; lower"):
        budget(20 * mib, wanted=True)
    with pytest.raises(InsufficientMemoryError, match="the states of recurrent layers do not fit"):
        budget(3 * mib)
    assert budget(1000 * mib, drafts=4) == (16, 64, 64)
    assert budget(100 * mib, drafts=4) == (16, 21, 12)  # an eighth at most, and what is kept comes after it
    assert budget(20 * mib, drafts=4) == (5, 2, 2)
    assert budget(24 * mib, sequences=9, wanted=True, drafts=4) == (9, 0, 2)
    with pytest.raises(InsufficientMemoryError, match="behind guessed tokens do not fit beside those of 9 sequences"):
        budget(20 * mib, sequences=9, wanted=True, drafts=4)
