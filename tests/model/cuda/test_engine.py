"""The engine as it runs on CUDA, on a pretended device: the tokens are those of the host, and nothing waits."""

from __future__ import annotations

import asyncio
import gc
import importlib
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from asyncengine import AsyncEngine, EngineConfig, GenerationConfig, RequestOptions, StepError
from asyncengine.model import buckets, first_steps, graphs, token_draw, verification
from asyncengine.model.draft_heads.drafter import HeadDrafter
from asyncengine.model.fused import choice
from asyncengine.model.fused.decoder import FusedDecoder
from asyncengine.model.quantised import four_bit_product
from asyncengine.model.recurrent import step_kernels
from asyncengine.model.runner import TorchModel
from tests.loop.harness import eventually
from tests.model import checkpoints
from tests.model.adapters import save_adapter
from tests.model.attention.triton_device import require_triton
from tests.model.cuda.pretended import Pretended, pretended
from tests.model.draft_heads import eagle_heads, mtp_heads
from tests.model.fused.interpreted import large_tiles, on_one_loop
from tests.model.reference import reference
from tests.model.stored import coded_checkpoints

PROMPT = [1, 2, 3, 4, 5]
TOKENS = 3


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pretended]:
    """With loads that try as few tokens as they can: the interpreter takes its time."""
    require_triton()
    monkeypatch.setattr(verification, "_TOKENS", 5)
    monkeypatch.setattr(verification, "_CUTS", (0, 3, 5))
    monkeypatch.setattr(first_steps, "_SOME_TOKENS", 9)
    monkeypatch.setattr(buckets, "_MIXED", (1 + len(PROMPT),))
    monkeypatch.setattr(graphs, "FILTERED", ())  # a draw is the same behind any model
    monkeypatch.setattr(choice, "cuda_seconds", lambda device, **_: lambda run: (run(), 1.0)[1])
    with pretended() as device:
        yield device
        gc.collect()
        assert device.allocated == 0, "something outlives its engine"


@pytest.fixture
def config(checkpoint: Callable[..., Path]) -> EngineConfig:
    """Of a model with few kernels and captures: the interpreter takes its time for each."""
    return EngineConfig(
        str(checkpoint("llama", num_hidden_layers=1)), device="cuda", dtype="float32", max_num_sequence=1,
        max_total_sequence_length=256, prefill_chunk_size=32, graph_capture="load", decoder_backend="transformers",
    )  # fmt: skip


async def on_host(config: EngineConfig, work: Callable[[AsyncEngine], Awaitable[Any]]) -> Any:
    changes = {"device": "cpu", "graph_capture": "idle", "attention_backend": "torch"}
    async with AsyncEngine(config.replace(**changes)) as engine:
        return await work(engine)


def logprobs_of(branch: Any) -> list[float]:
    return [entry.logprob for entry in branch.logprobs]


async def greedy(engine: AsyncEngine) -> list[list[int]]:
    """Two requests for one place."""
    settings = GenerationConfig(max_tokens=TOKENS, temperature=0, ignore_eos=True)
    answers = await asyncio.gather(*(engine.generate([i, *PROMPT], settings) for i in range(2)))
    return [answer.token_ids for answer in answers]


@on_one_loop
async def test_draws_what_the_host_draws_and_waits_for_nothing_but_tokens(
    device: Pretended, config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Draws behind graphs, in one, and by the sampler; prompts beside decodes; somebody leaves in the middle."""
    settings: list[dict[str, Any]] = [
        {"temperature": 0}, {}, {"top_p": 0.7}, {"top_k": 9, "top_p": 0.8, "min_p": 0.02}, {"frequency_penalty": 0.5},
        {"logit_bias": {5: 4.0}}, {"logprobs": True, "top_logprobs": 2},
    ]  # fmt: skip

    async def work(engine: AsyncEngine) -> list[list[int]]:
        async def leave() -> None:
            async with engine.stream(PROMPT, GenerationConfig(max_tokens=99, ignore_eos=True, seed=9)) as stream:
                await anext(aiter(stream))

        asked = [
            engine.generate([i, *PROMPT], GenerationConfig(max_tokens=3, ignore_eos=True, seed=i, **each))
            for i, each in enumerate(settings)
        ]
        *answers, _ = await asyncio.gather(*asked, leave())
        return [answer.token_ids for answer in answers]

    config = config.replace(max_num_sequence=2)
    monkeypatch.setattr(buckets, "_MIXED", (6, 12))
    monkeypatch.setattr(graphs, "FILTERED", token_draw.FILTERED)
    async with AsyncEngine(config) as engine:
        assert engine.health().notes == ()
        assert engine.health().warm_up.done == 2 + 2 * 3 + 2  # steps and draws of 1 and 2, steps with prompts
        device.waits.clear()
        launched = device.kernels.copy()
        found = await work(engine)
        assert set(device.waits) == {"Event.synchronize"}  # the way back, and a pinned buffer's turn
        assert device.replays > 10 and set(device.kernels) == {"write", "attend", "merge"}
        assert device.kernels == launched  # every step is replayed
    assert found == await on_host(config, work)


@on_one_loop
async def test_a_launched_step_waits_for_nothing(
    device: Pretended, config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host may wait for tokens, not on its way to the launch of a step, whatever is in it."""
    launch = TorchModel.launch

    def launched(model: TorchModel, batch: Any) -> Any:
        synchronised = device.waits.pop("Event.synchronize", 0)  # of a pinned buffer: at once, if it is free
        with device.no_waits(but="Event.synchronize"):
            flight = launch(model, batch)
        device.waits["Event.synchronize"] += synchronised
        return flight

    monkeypatch.setattr(TorchModel, "launch", launched)
    async with AsyncEngine(config.replace(graph_capture="idle")) as engine:
        assert await greedy(engine) == await on_host(config, greedy)
        chosen = GenerationConfig(max_tokens=3, seed=1, top_k=200, repetition_penalty=1.2, logprobs=True)
        assert len((await engine.generate(PROMPT, chosen)).token_ids) == 3


@on_one_loop
async def test_fused_kernels_take_part_in_captured_steps(
    device: Pretended, config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of few tokens, and of more: of ten sequences, and of their prompts."""
    large_tiles(monkeypatch)
    captured = set[int]()
    forward = FusedDecoder.forward

    def noted(self: FusedDecoder, ids: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        captured.update([] if device.tape is None else [ids.shape[1]])
        return forward(self, ids, *others)

    monkeypatch.setattr(FusedDecoder, "forward", noted)

    async def work(engine: AsyncEngine) -> list[list[int]]:
        settings = GenerationConfig(max_tokens=3, temperature=0, ignore_eos=True)
        prompts = [[i, 1] for i in range(10)]
        answers = await asyncio.gather(
            engine.generate_many(prompts, settings), engine.generate_many(prompts[:1], [settings.replace(max_tokens=8)])
        )
        return [answer.token_ids for each in answers for answer in each]

    # Pages enough for all of them at once.
    config = config.replace(decoder_backend="compiled", max_num_sequence=11, max_total_sequence_length=512)
    async with AsyncEngine(config) as engine:
        assert captured == {1, 2, 4, 8, 11, 6}
        before = device.kernels.copy()
        device.waits.clear()
        found = await work(engine)
        assert set(device.waits) == {"Event.synchronize"}
        assert before.keys() >= {"project", "rotate", "norm_rows", "activate"}
        assert device.replays > 5
        launched = device.kernels - before  # several prompts at once are more than there is a graph for
        assert launched.keys() >= {"rotate", "norm_rows", "activate"}
    assert found == await on_host(config.replace(decoder_backend="transformers"), work)


@on_one_loop
@pytest.mark.long
async def test_speculation_verifies_on_the_device(device: Pretended, config: EngineConfig) -> None:
    drafting = config.replace(speculative_mode="small_draft", additional_models=(config.model,), spec_draft_length=2)
    async with AsyncEngine(drafting) as engine:
        assert await greedy(engine) == await on_host(config, greedy)
        assert engine.metrics().counters.accepted_draft_tokens > 0


@on_one_loop
@pytest.mark.parametrize("mode", [pytest.param("eagle3", marks=pytest.mark.long), "mtp"])
@pytest.mark.long
async def test_heads_draft_from_states_that_replayed_steps_hand_out(
    mode: str, device: Pretended, config: EngineConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guesses are those of the host, also behind a cached prompt, of branches, and after a sleep."""
    monkeypatch.setattr(mtp_heads, "LAYERS", 1)
    monkeypatch.setattr(eagle_heads, "VOCAB", 8)
    if mode == "mtp":
        path, heads = mtp_heads.write(tmp_path / "model", "qwen2", "mimo", vocab_size=8), []
    else:
        path = checkpoints.write(tmp_path / "model", "llama", num_hidden_layers=1, vocab_size=8)
        seen = {"vocab_size": 8, "eagle_aux_hidden_state_layer_ids": [0, 1, 1]}
        heads = [str(eagle_heads.write(tmp_path / "head", "authors", eagle_heads.weights(6), **seen))]

    prompt, settings = [1, 2, 3, 4] * 2 + [5], GenerationConfig(max_tokens=8, temperature=0, ignore_eos=True)

    async def first(engine: AsyncEngine) -> Any:
        return (await engine.generate(prompt, settings)).token_ids

    async def work(engine: AsyncEngine) -> list[Any]:
        greedy = await first(engine)
        drawn = await engine.generate(prompt, settings.replace(n=2, temperature=1, seed=3, max_tokens=3))
        assert drawn.usage.cached_tokens == 8
        return [greedy, *(branch.token_ids for branch in drawn.outputs)]

    config = config.replace(model=str(path), max_num_sequence=2, kv_cache_page_size=8)
    drafting = config.replace(speculative_mode=mode, additional_models=tuple(heads), spec_draft_length=2)
    guesses, propose = list[list[int]](), HeadDrafter.propose

    def noted(self: HeadDrafter, *asked: Any) -> Any:
        found = propose(self, *asked)
        guesses.extend(each.tolist() for each in found)
        return found

    monkeypatch.setattr(HeadDrafter, "propose", noted)
    expected = await on_host(drafting, work)
    of_host = guesses.copy()
    assert len(of_host) > 6 and len({tuple(each) for each in of_host}) > 3
    async with AsyncEngine(drafting) as engine:
        assert engine.health().notes == ()
        replays = device.replays
        guesses.clear()
        assert await work(engine) == expected
        assert guesses == of_host
        await engine.sleep()
        await engine.wake()
        guesses.clear()
        assert await first(engine) == expected[0]
        assert guesses == of_host[: len(guesses)] != []
        assert device.replays > replays


@on_one_loop
@pytest.mark.long
async def test_steps_with_adapters_are_captured(
    device: Pretended, config: EngineConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decodes, with those that come later, too; in steps with prompts they are launched, and wait for nothing."""
    model = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32)
    for seed, name in enumerate(("one", "two")):
        save_adapter(tmp_path / name, model, seed, rank=2, only="up_proj", scale=1.0)
    save_adapter(tmp_path / "large", model, 2, rank=12, only=("q_proj", "up_proj"), scale=1.0)
    launch = TorchModel.launch

    def launched(model: TorchModel, batch: Any) -> Any:
        with device.no_waits(but="Event.synchronize"):
            return launch(model, batch)

    monkeypatch.setattr(TorchModel, "launch", launched)

    async def answers(engine: AsyncEngine, *names: str | None, tokens: int = 4) -> list[list[int]]:
        settings = GenerationConfig(max_tokens=tokens, temperature=0, ignore_eos=True)
        asked = (engine.generate(PROMPT, settings, RequestOptions(adapter=name)) for name in names)
        return [answer.token_ids for answer in await asyncio.gather(*asked)]

    async def alone(engine: AsyncEngine) -> list[list[int]]:
        for name in ("two", "large"):
            await engine.load_adapter(name, tmp_path / name)
        return [(await answers(engine, name))[0] for name in (None, "one", "two", "large")]

    async def launches(engine: AsyncEngine, name: str, tokens: int) -> Counter[str]:
        before = device.kernels.copy()
        await answers(engine, name, tokens=tokens)
        return device.kernels - before

    config = config.replace(adapters={"one": str(tmp_path / "one")}, max_num_sequence=2)
    plain, one, two, large = await on_host(config, alone)
    assert len({tuple(each) for each in (plain, one, two, large)}) == 4
    async with AsyncEngine(config) as engine:
        assert engine.health().notes == ()
        assert engine.health().warm_up.done == 2 + 1 + 2  # of 1 and 2, with prompts, with adapters of 1 and 2
        assert await answers(engine, None, "one") == [plain, one]
        await engine.load_adapter("two", tmp_path / "two")
        for_its_prompt = await launches(engine, "two", 2)
        assert for_its_prompt["shrink"] == for_its_prompt["expand"] == 1
        assert await launches(engine, "two", 5) == for_its_prompt
        await engine.sleep()
        await engine.wake()
        assert await launches(engine, "two", 5) == for_its_prompt
        assert await answers(engine, "two", "one") == [two, one]
        before = device.allocated
        await engine.unload_adapter("two")
        assert device.allocated < before
        await engine.load_adapter("large", tmp_path / "large")  # what was captured serves no such rank
        assert engine.health().warm_up.goes_on
        assert await answers(engine, "large", "one") == [large, one]
        await eventually(lambda: not engine.health().warm_up.goes_on)
        assert await launches(engine, "large", 2) == await launches(engine, "large", 5)
        for name in engine.adapters:
            await engine.unload_adapter(name)
        assert await answers(engine, None) == [plain]
        assert engine.health().warm_up.done == 2 + 1


@on_one_loop
async def test_decodes_of_recurrent_layers_are_captured(
    device: Pretended, config: EngineConfig, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """States are copied for branches, kept for the next turn, and gone with the engine; no launch waits."""
    path = checkpoint("qwen3_5", num_hidden_layers=2, layer_types=["linear_attention", "full_attention"])
    launch = TorchModel.launch

    def launched(model: TorchModel, batch: Any) -> Any:
        with device.no_waits(but="Event.synchronize"):
            return launch(model, batch)

    monkeypatch.setattr(TorchModel, "launch", launched)

    async def work(engine: AsyncEngine, alone: bool = True) -> list[Any]:
        settings = GenerationConfig(max_tokens=5, temperature=0, ignore_eos=True)
        first, other = await asyncio.gather(
            engine.generate(PROMPT, settings.replace(n=2, temperature=1, seed=3, logprobs=True)),
            engine.generate([9, *PROMPT], settings),
        )
        for seed, branch in enumerate(first.outputs if alone else (), 3):  # each is what it would be alone, on the host
            single = await engine.generate(PROMPT, settings.replace(temperature=1, seed=seed, logprobs=True))
            assert single.outputs[0].token_ids == branch.token_ids
            assert logprobs_of(single.outputs[0]) == pytest.approx(logprobs_of(branch), abs=1e-4)
        turn = [9, *PROMPT, *other.token_ids, 7]
        second = await engine.generate(turn, settings.replace(max_tokens=3, logprobs=True))
        return [
            [branch.token_ids for branch in first.outputs],
            other.token_ids,
            second.token_ids,
            second.usage.cached_tokens,
            # They tell what state each went on from, where few tokens would not.
            pytest.approx([each for one in (*first.outputs, second.outputs[0]) for each in logprobs_of(one)], abs=1e-4),
        ]

    config = config.replace(model=str(path), max_num_sequence=4, kv_cache_page_size=8)
    async with AsyncEngine(config) as engine:
        (note,) = (note for note in engine.health().notes if note.startswith("recurrent layers"))
        packages = "causal-conv1d, flash-linear-attention"
        assert note == f"recurrent layers: prompts are computed by plain torch; {packages} would have kernels"
        assert device.kernels["delta_rule"] > 0 and device.kernels["convolution"] > 0
        assert engine.health().warm_up.done == 3  # steps of 1, 2 and 4; those with prompts are launched
        replays = device.replays
        found = await work(engine, alone=False)
        assert device.replays - replays > 5
        await engine.sleep()
        await engine.wake()
        again = await work(engine, alone=False)
    expected = await on_host(config.replace(prefix_cache_mode="disable"), work)  # where no state is copied for a turn
    for each in (found, again):
        assert each[:-2] == expected[:-2] and each[-2] == 8
        assert each[-1].expected == expected[-1]


@on_one_loop
@pytest.mark.parametrize(
    ("architecture", "changes", "kernels"),
    [
        # One of those that a kernel serves; other tests here are of gated delta rules.
        ("kimi_linear", {"layer_types": ["linear_attention", "full_attention"]}, {"convolution", "delta_rule"}),
        pytest.param("bamba", {}, {"convolution", "selective_scan"}, marks=pytest.mark.long),
        ("mamba", {}, {"convolution", "selective_scan"}),
        pytest.param("lfm2", {"layer_types": ["conv", "full_attention"]}, {"convolution"}, marks=pytest.mark.long),
    ],
)
@pytest.mark.in_short("kimi_linear")
async def test_kernels_take_decodes_of_recurrent_layers_to_what_transformers_says(
    device: Pretended, config: EngineConfig, checkpoint: Callable[..., Path], architecture: str,
    changes: dict[str, Any], kernels: set[str],
) -> None:  # fmt: skip
    """Of sequences that come and go beside each other."""
    path = checkpoint(architecture, num_hidden_layers=2, **changes)
    config = config.replace(model=str(path), max_num_sequence=2, kv_cache_page_size=8)
    prompts = [PROMPT, [9, *PROMPT], [7]]
    settings = [GenerationConfig(max_tokens=count, temperature=0, ignore_eos=True) for count in (3, 5, 4)]
    async with AsyncEngine(config) as engine:
        assert not any("decode as transformers" in note for note in engine.health().notes)
        results = await engine.generate_many(prompts, settings)
    assert set(device.kernels) >= kernels
    for prompt, result in zip(prompts, results, strict=True):
        assert result.token_ids == reference(path).after_each(prompt, result.token_ids)


@on_one_loop
@pytest.mark.long
async def test_recurrent_layers_whose_kernels_fail_decode_as_transformers_has_them(
    device: Pretended, config: EngineConfig, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoint("qwen3_5", num_hidden_layers=2, layer_types=["linear_attention", "full_attention"])
    config = config.replace(model=str(path), max_num_sequence=2)

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such instruction")

    async def answered() -> str:
        async with AsyncEngine(config) as engine:
            assert await greedy(engine) == expected
            (note, _) = (note for note in engine.health().notes if note.startswith("recurrent layers"))
            return note

    expected = await on_host(config, greedy)
    monkeypatch.setattr(step_kernels.StepKernels, "delta_rule", fails)
    assert await answered() == (
        "recurrent layers: 1 of 1 decode as transformers has them, which is slower: RuntimeError: no such instruction"
    )
    monkeypatch.setattr(step_kernels.importlib, "import_module", fails)
    assert await answered() == (
        "recurrent layers: decode as transformers has them, which is slower: triton cannot be imported: "
        "no such instruction"
    )


@pytest.mark.long  # what a launched step with drafts does is tested on the host, too, beside captured ones
@on_one_loop
async def test_steps_with_drafts_of_recurrent_layers_are_launched(
    device: Pretended, config: EngineConfig, checkpoint: Callable[..., Path]
) -> None:
    path = checkpoint(
        "qwen3_5", num_hidden_layers=2, layer_types=["linear_attention", "full_attention"], vocab_size=4
    )  # fmt: skip
    counted = list[Any]()

    async def work(engine: AsyncEngine) -> list[Any]:
        settings = GenerationConfig(max_tokens=16, temperature=0, ignore_eos=True, logprobs=True)
        results = await engine.generate_many([[1, 2, 3, 0] * 4, [3, 2] * 3], settings)
        counted.append(engine.metrics().counters)
        return [(result.token_ids, pytest.approx(logprobs_of(result.outputs[0]), abs=1e-4)) for result in results]

    config = config.replace(model=str(path), max_num_sequence=2, kv_cache_page_size=16)
    expected = await on_host(config, work)
    async with AsyncEngine(config.replace(speculative_mode="ngram", spec_draft_length=3)) as engine:
        replays = device.replays
        found = await work(engine)
        assert device.replays > replays
    for (tokens, logprobs), (wanted, those) in zip(found, expected, strict=True):
        assert tokens == wanted and logprobs.expected == those
    assert 0 < counted[1].accepted_draft_tokens < counted[1].draft_tokens  # states were put back


@on_one_loop
@pytest.mark.parametrize("architecture", ["qwen3_vl", pytest.param("gemma3", marks=pytest.mark.long)])
@pytest.mark.long
async def test_images_are_seen_beside_captured_steps(
    device: Pretended, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    """Steps with images are executed, decodes of their answers replayed."""
    sighted_checkpoints = pytest.importorskip("tests.model.media.checkpoints", exc_type=ImportError)
    samples = importlib.import_module("asyncengine.model.media.samples")
    path = sighted_checkpoints.write(tmp_path / "checkpoint", architecture, text_config={"num_hidden_layers": 1})
    monkeypatch.setattr(samples, "_LARGE", (64, 64))
    monkeypatch.setattr(samples, "_LARGE_FRAMES", (64, 64, 2))
    config = EngineConfig(
        str(path), device="cuda", dtype="float32", max_num_sequence=2, max_total_sequence_length=256,
        prefill_chunk_size=32, graph_capture="load", decoder_backend="transformers", images=True,
    )  # fmt: skip
    content = [{"type": "image", "image": sighted_checkpoints.picture(1, 32, 32)}, {"type": "text", "text": "?"}]

    async def look(engine: AsyncEngine) -> list[list[int]]:
        settings = GenerationConfig(max_tokens=4, temperature=0, ignore_eos=True)
        seeing = engine.chat([{"role": "user", "content": content}], settings)
        answers = await asyncio.gather(seeing, engine.generate(PROMPT, settings))
        return [answer.token_ids for answer in answers]

    expected = await on_host(config, look)
    async with AsyncEngine(config) as engine:
        assert await look(engine) == expected
        assert engine.health().notes == ()
        assert device.replays > 1


@on_one_loop
@pytest.mark.long
async def test_scores_and_embeddings(device: Pretended, config: EngineConfig) -> None:
    async def work(engine: AsyncEngine) -> tuple[list[float], list[Any]]:
        scores = await engine.score([PROMPT, [7, 8]], top_logprobs=2)
        return [score.logprob for score in scores], [each.vector for each in await engine.embed([PROMPT, [7, 8]])]

    async with AsyncEngine(config) as engine:
        scores, vectors = await work(engine)
    expected, expected_vectors = await on_host(config, work)
    assert scores == pytest.approx(expected, rel=1e-4)
    assert np.allclose(vectors, expected_vectors, atol=1e-4)


@on_one_loop
async def test_sleeps_wakes_changes_and_reloads_without_a_trace(
    device: Pretended, config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a model takes is the same after each load, and nothing is left after an unload."""
    monkeypatch.setattr(graphs, "FILTERED", token_draw.FILTERED)
    async with AsyncEngine(config) as engine:
        first, taken = await greedy(engine), device.allocated
        weights = load_file(Path(config.model) / "model.safetensors")
        await engine.sleep()
        assert device.allocated < taken - sum(tensor.nbytes for tensor in weights.values())
        await engine.wake()
        assert await greedy(engine) == first
        await engine.update_weights({name: tensor.flip(0) for name, tensor in weights.items() if "up_proj" in name})
        changed = await greedy(engine)
        assert changed != first
        await engine.update_weights(weights)
        assert await greedy(engine) == first
        streams = device.multiplied.copy()
        await engine.unload()
        gc.collect()
        assert device.allocated == 0
        await engine.reload(config)
        assert await greedy(engine) == first
        gc.collect()
        assert device.allocated == pytest.approx(taken, rel=0.05)
        assert device.multiplied == streams


@on_one_loop
@pytest.mark.long
async def test_weights_and_kv_cache_in_fp8(device: Pretended, config: EngineConfig) -> None:
    """What the load compares with transformers is computed by the device's kernels, in bfloat16."""
    narrow = config.replace(dtype="bfloat16", quantization="fp8", kv_cache_dtype="fp8_e4m3")
    async with AsyncEngine(narrow) as engine:
        assert [note.split(":")[0] for note in engine.health().notes] == ["quantization", "KV cache"]
        device.waits.clear()
        assert all(len(tokens) == TOKENS for tokens in await greedy(engine))
        assert set(device.waits) == {"Event.synchronize"} and device.replays > 0
        assert "quantise_rows" in device.kernels


@on_one_loop
@pytest.mark.parametrize(("kind", "stored"), [("llama", False), ("gpt_oss", True)])
@pytest.mark.in_short("llama-False")
async def test_weights_of_four_bits(
    kind: str,
    stored: bool,
    device: Pretended,
    config: EngineConfig,
    checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What kernels make of codes is compared with what transformers makes of the numbers, and is captured."""
    large_tiles(monkeypatch)
    path = checkpoint(kind, num_hidden_layers=1)
    if stored:
        path, _ = coded_checkpoints.write_experts(tmp_path, path)
    narrow = config.replace(model=str(path), dtype="bfloat16", quantization="int4")
    async with AsyncEngine(narrow) as engine:
        [note] = engine.health().notes
        assert note.startswith("quantization: int4") and note.endswith("as stored") == stored
        device.waits.clear()
        first = await greedy(engine)
        assert all(len(tokens) == TOKENS for tokens in first)
        assert set(device.waits) == {"Event.synchronize"} and device.replays > 0
        assert {"by_row", "by_tile"} | ({"route", "add_up"} if stored else set()) <= set(device.kernels)
        if stored:
            await engine.sleep()
            await engine.wake()
            assert await greedy(engine) == first


@on_one_loop
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.in_short("False")
async def test_kernels_that_compute_something_else_are_not_used(
    fails: bool, device: Pretended, config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a device that treats some numbers otherwise, or for which they cannot be compiled."""
    multiply = four_bit_product.multiply

    def wrong(x: torch.Tensor, *others: Any) -> torch.Tensor:
        if fails:
            raise RuntimeError("no such instruction")
        return multiply(x, *others).flip(-1)

    monkeypatch.setattr(four_bit_product, "multiply", wrong)
    async with AsyncEngine(config.replace(dtype="bfloat16", quantization="int4")) as engine:
        note = next(note for note in engine.health().notes if "slow" in note)
        assert ("no such instruction" if fails else "relative error") in note
        assert all(len(tokens) == TOKENS for tokens in await greedy(engine))


@on_one_loop
@pytest.mark.long
async def test_a_model_that_waits_is_served_as_it_is(
    device: Pretended, config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = TorchModel._forward

    def waits(model: TorchModel, *inputs: torch.Tensor) -> torch.Tensor:
        logits = forward(model, *inputs)
        assert not logits.numel() or float(logits.abs().max()) > 0
        return logits

    monkeypatch.setattr(TorchModel, "_forward", waits)
    async with AsyncEngine(config) as engine:
        [note] = engine.health().notes
        assert note.startswith("graphs: the model cannot be captured, it runs without: ")
        assert "during a capture" in note
        assert await greedy(engine) == await on_host(config, greedy)
        assert device.replays == 0 and device.captures_underway == 0
        torch.empty(2, device="cuda").normal_()  # an application's


@on_one_loop
@pytest.mark.long
async def test_experts_that_wait_are_not_captured(
    device: Pretended, config: EngineConfig, checkpoint: Callable[..., Path]
) -> None:
    path = str(checkpoint("mixtral", num_hidden_layers=1))
    async with AsyncEngine(config.replace(model=path)) as engine:
        assert engine.health().notes == (
            "graphs: experts in float32 (grouped_mm) make the host wait; none are captured",
        )


@on_one_loop
async def test_a_step_that_runs_out_of_memory_ends_its_requests_alone(
    device: Pretended, config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch, fail = TorchModel.launch, [True]

    def short(model: TorchModel, batch: Any) -> Any:
        if fail.pop() if fail else False:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return launch(model, batch)

    async with AsyncEngine(config) as engine:
        first = await greedy(engine)
        monkeypatch.setattr(TorchModel, "launch", short)
        with pytest.raises(StepError, match="out of memory"):
            await engine.generate(PROMPT)
        assert await greedy(engine) == first
