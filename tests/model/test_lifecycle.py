"""Real models through their life: load, fail to load, swap, carry, update, sleep, unload."""

import asyncio
import gc
import json
import multiprocessing
import statistics
import threading
import time
import weakref
from collections.abc import Callable
from functools import cache
from pathlib import Path
from shutil import copytree
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from asyncengine import (
    AsyncEngine,
    CheckpointError,
    ConfigError,
    EngineConfig,
    EngineState,
    GenerationConfig,
    InsufficientMemoryError,
    ReloadError,
    UnsupportedModelError,
)
from tests.model import checkpoints
from tests.model.reference import reference

GREEDY = GenerationConfig(temperature=0, max_tokens=24, ignore_eos=True)
PROMPT = (5, 6, 7, 8, 9)


def config(path: Path, **changes: Any) -> EngineConfig:
    return EngineConfig(
        str(path), device="cpu", max_total_sequence_length=2048, max_num_sequence=8, kv_cache_page_size=16
    ).replace(**changes)


@cache
def generated(path: Path, prompt: tuple[int, ...] = PROMPT) -> list[int]:
    return reference(path).generated(prompt, 24)


def break_weights(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def break_architecture(path: Path) -> None:
    values = json.loads((path / "config.json").read_text())
    changed = values | {"model_type": "bloom", "architectures": ["BloomForCausalLM"]}
    (path / "config.json").write_text(json.dumps(changed))


def break_shapes(path: Path) -> None:
    """Every check of headers passes; loading finds that the weights are of another model."""
    values = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(values | {"intermediate_size": 128}))


def nothing(path: Path) -> None:
    pass


FAILURES: dict[str, tuple[Callable[[Path], None], dict[str, Any], type[Exception], str]] = {
    "bad path": (nothing, {"model": "/nowhere"}, CheckpointError, "no such directory"),
    "truncated weights": (break_weights, {}, CheckpointError, "damaged or incomplete"),
    "unsupported architecture": (break_architecture, {}, UnsupportedModelError, "bloom"),
    "weights of another shape": (break_shapes, {}, ReloadError, "size mismatch|mismatched|shape"),
    "out of memory by configuration": (
        nothing,
        {"max_total_sequence_length": 10**12},
        InsufficientMemoryError,
        "max_total_sequence_length = 1000000000000 needs",
    ),
    "longer than the model": (nothing, {"max_single_sequence_length": 513}, ConfigError, r"allows 1\.\.512"),
    "no such device": (nothing, {"device": "cuda:7"}, ConfigError, "cuda:7"),
}


@pytest.mark.loops("either")
@pytest.mark.parametrize("failure", FAILURES)
async def test_a_reload_that_fails_leaves_the_old_model_serving(
    failure: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    if failure == "no such device" and torch.cuda.device_count() > 7:
        pytest.skip("there is such a device")
    damage, changes, error, message = FAILURES[failure]
    good = checkpoint("llama")
    bad = Path(copytree(checkpoint("llama", seed=1), tmp_path / "bad"))
    damage(bad)
    async with AsyncEngine(config(good)) as engine:
        running = await engine.add_request(PROMPT, GREEDY)
        before = engine.complete_engine_config
        with pytest.raises(error, match=message):
            await engine.reload(config(bad, **changes))
        assert engine.state is EngineState.READY
        assert engine.complete_engine_config == before
        assert (await running).token_ids == generated(good)
        assert (await engine.generate(PROMPT, GREEDY)).token_ids == generated(good)


@pytest.mark.loops("either")
async def test_a_warm_up_that_raises_leaves_the_old_model_serving(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from asyncengine.model import first_steps

    async with AsyncEngine(config(checkpoint("llama"))) as engine:
        broken = RuntimeError("the kernel does not like it")

        def warm_up(*_: Any) -> None:
            raise broken

        monkeypatch.setattr(first_steps, "_warm_up", warm_up)
        with pytest.raises(ReloadError, match="the kernel does not like it") as caught:
            await engine.reload(config(checkpoint("llama", seed=1)))
        assert caught.value.__cause__ is broken
        monkeypatch.undo()
        assert (await engine.generate(PROMPT, GREEDY)).token_ids == generated(checkpoint("llama"))


@pytest.mark.loops("either")
async def test_a_load_that_fails_after_the_old_model_is_gone_leaves_a_usable_engine(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from asyncengine.model import first_steps, load_check

    def warm_up(*_: Any) -> None:
        raise RuntimeError("the kernel does not like it")

    async with AsyncEngine(config(checkpoint("llama"))) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(load_check, "fits", lambda details, current: False)
            patch.setattr(first_steps, "_warm_up", warm_up)
            with pytest.raises(ReloadError, match="the kernel does not like it"):
                await engine.reload(config(checkpoint("llama", seed=1)))
        assert engine.state is EngineState.UNLOADED
        await engine.reload(config(checkpoint("llama", seed=1)))
        assert (await engine.generate(PROMPT, GREEDY)).token_ids == generated(checkpoint("llama", seed=1))


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.loops("either")
async def test_a_request_is_carried_over_to_the_next_model(
    beside: bool, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from asyncengine.model import load_check, loader, runner

    first, second = checkpoint("llama"), checkpoint("qwen3")
    # The first model is slowed down until it may be swapped; between its steps the reload goes on.
    due = threading.Event()
    execute, phase = runner.TorchModel.execute, "load" if beside else "check"
    go_on = getattr(loader.TransformersLoader, phase)

    def held(model: Any, batch: Any) -> Any:
        due.wait(0.02)
        return execute(model, batch)

    def noted(self: Any, *arguments: Any) -> Any:
        try:
            return go_on(self, *arguments)
        finally:
            due.set()

    async with AsyncEngine(config(first)) as engine:
        monkeypatch.setattr(load_check, "fits", lambda details, current: beside)
        monkeypatch.setattr(runner.TorchModel, "execute", held)
        monkeypatch.setattr(loader.TransformersLoader, phase, noted)
        stream = await engine.add_request(PROMPT, GREEDY.replace(max_tokens=300))
        head = [token for token in (await anext(stream)).token_ids]
        await engine.reload(config(second), in_flight="carry")
        async for output in stream:
            head += output.token_ids
    assert len(head) == 300
    # Wherever the swap was: the tokens before it are the first model's, those after it the second's.
    by_first = reference(first).after_each(PROMPT, head)
    same = next((i for i, (a, b) in enumerate(zip(head, by_first, strict=True)) if a != b), 300)
    assert 1 <= same < 300
    assert head[same:] == reference(second).after_each([*PROMPT, *head[:same]], head[same:])


@pytest.mark.loops("either")
async def test_weights_are_replaced_whole_or_not_at_all(checkpoint: Callable[..., Path]) -> None:
    first, second = checkpoint("llama"), checkpoint("llama", seed=1)
    weights = AutoModelForCausalLM.from_pretrained(second, dtype=torch.float32).state_dict()
    async with AsyncEngine(config(first)) as engine:
        long_prompt = tuple(range(1, 60))
        assert (await engine.generate(long_prompt, GREEDY)).token_ids == generated(first, long_prompt)
        for name, wrong, message in (
            ("model.norm.weight", torch.zeros(3), "the model's is"),
            ("model.norm.weight", torch.zeros(64, dtype=torch.float64), "float64"),
            ("model.nose.weight", torch.zeros(64), "is not in the model"),
        ):
            with pytest.raises(ReloadError, match=message):
                await engine.update_weights(weights | {name: wrong})
        assert (await engine.generate(long_prompt, GREEDY)).token_ids == generated(first, long_prompt)
        version = await engine.update_weights(weights)
        assert version == 1
        result = await engine.generate(long_prompt, GREEDY)
        assert result.usage.cached_tokens == 0  # nothing that the old weights computed is used
        assert result.token_ids == generated(second, long_prompt)


async def test_a_sleeping_engine_goes_on_where_it_was(checkpoint: Callable[..., Path]) -> None:
    async with AsyncEngine(config(checkpoint("llama"))) as engine:
        stream = await engine.add_request(PROMPT, GREEDY.replace(max_tokens=200))
        await anext(stream)
        await engine.sleep()
        assert engine.state is EngineState.SLEEPING
        await engine.wake()
        tokens = (await stream).token_ids
    assert len(tokens) == 200
    assert tokens == reference(checkpoint("llama")).after_each(PROMPT, tokens)


@pytest.mark.loops("either")
async def test_debug_functions_are_called_beside_the_model(checkpoint: Callable[..., Path]) -> None:
    async with AsyncEngine(config(checkpoint("llama"))) as engine:
        (count,) = await engine.debug_call_func_on_all_workers("num_parameters")
        assert count == AutoModelForCausalLM.from_pretrained(checkpoint("llama")).num_parameters()
        (same,) = await engine.debug_call_func_on_all_workers("asyncengine.model.debug_functions:num_parameters")
        assert same == count
        with pytest.raises(LookupError, match=r"no debug function 'nose'; there are num_parameters"):
            await engine.debug_call_func_on_all_workers("nose")


@pytest.mark.loops("either")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("backend", ["cpu", "torch"])
async def test_half_precision_serves_and_agrees_between_alone_and_batched(
    dtype: str, backend: str, checkpoint: Callable[..., Path]
) -> None:
    prompts = [[i + 1, i + 2, i + 3] * (i + 1) for i in range(6)]
    async with AsyncEngine(config(checkpoint("llama"), dtype=dtype, attention_backend=backend)) as engine:
        assert engine.complete_engine_config is not None
        assert engine.complete_engine_config.dtype == dtype
        first = GREEDY.replace(max_tokens=4)
        together = await engine.generate_many(prompts, first)
        alone = [await engine.generate(prompt, first) for prompt in prompts]
    agree = [a.token_ids == b.token_ids for a, b in zip(together, alone, strict=True)]
    assert sum(agree) >= 5  # rounding may turn a near-tie, not the rule


def remember(model: Any) -> list[Any]:
    return [weakref.ref(model), *(weakref.ref(parameter) for parameter in model.parameters())]


async def test_unload_lets_every_weight_go(checkpoint: Callable[..., Path]) -> None:
    async with AsyncEngine(config(checkpoint("llama"))) as engine:
        stream = await engine.add_request(PROMPT, GREEDY.replace(max_tokens=400))
        await anext(stream)
        (references,) = await engine.debug_call_func_on_all_workers(f"{__name__}:remember")
        await engine.unload()
        assert not [r for r in references if r() is not None]
        assert (await stream).finish_reason == "abort"


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Writes a checkpoint of about so many megabytes in float32, whatever its numbers."""

    def make(megabytes: int) -> Path:
        path = tmp_path_factory.mktemp("large")
        width = 1024
        layer = 4 * width * width + 3 * width * 4 * width
        described = checkpoints.config(
            "llama",
            hidden_size=width,
            intermediate_size=4 * width,
            num_attention_heads=8,
            num_key_value_heads=8,
            num_hidden_layers=max(round(megabytes * 1e6 / 4 / layer), 1),
        )
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(described)
        some = torch.randn(4 * width * width, generator=torch.Generator().manual_seed(0)) * width**-0.5
        tensors = {name: some[: each.numel()].view(each.shape).clone() for name, each in model.state_dict().items()}
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        model.config.save_pretrained(path)
        return path

    return make


def resident() -> int:
    gc.collect()
    return int(psutil.Process().memory_info().rss)


def given_back_and_kept(path: Path) -> tuple[int, int]:
    """The bytes that an unload gives back (the median of three), and those that a further load and unload keep.

    What is built or imported once, with the first load or the second, counts for neither.
    """

    async def measure() -> tuple[int, int]:
        engine = AsyncEngine(loader=None)
        loaded, left = [], []
        for _ in range(3):
            await engine.reload(config(path))
            await engine.generate(PROMPT, GREEDY.replace(max_tokens=2))
            loaded.append(resident())
            await engine.unload()
            left.append(resident())
            gc.freeze()  # what was imported is there to stay: the next collection need not look at it
        await engine.shutdown()
        back = statistics.median(before - after for before, after in zip(loaded, left, strict=True))
        return int(back), left[2] - left[1]

    return asyncio.run(measure())


def test_unload_gives_the_memory_back(large: Callable[[int], Path]) -> None:
    path = large(200)
    size = (path / "model.safetensors").stat().st_size
    assert size > 190e6
    # In a process of its own: what the tests before this one have freed would be used again, or given back meanwhile.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        back, kept = pool.apply(given_back_and_kept, (path,))
    # The heap, which small things share, is some 50 MB larger or smaller from one time to the next.
    assert back > 0.75 * size, f"{back / 1e6:.0f} MB of {size / 1e6:.0f} MB come back"
    assert kept < 0.25 * size, f"{kept / 1e6:.0f} MB of {size / 1e6:.0f} MB stay"


@pytest.mark.alone
@pytest.mark.loops("either")
async def test_loading_half_a_gigabyte_does_not_stall_the_loop(large: Callable[[int], Path]) -> None:
    """Contract 26. The loop's lag is how late a 1 ms timer comes, while models are loaded, one beside the other."""
    path = large(500)
    lags: list[float] = []
    stop = asyncio.Event()

    async def watch() -> None:
        while not stop.is_set():
            due = time.perf_counter() + 0.001
            await asyncio.sleep(0.001)
            lags.append(time.perf_counter() - due)

    async with AsyncEngine(config(path)) as engine:
        watcher = asyncio.create_task(watch())
        for _ in range(3):
            await engine.reload(config(path))
        stop.set()
        await watcher
    assert len(lags) > 100
    p99 = statistics.quantiles(lags, n=100)[98]
    assert p99 < 0.05, f"p99 {p99 * 1e3:.1f} ms, longest {max(lags) * 1e3:.1f} ms of {len(lags)}"
