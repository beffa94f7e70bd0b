"""Engines that serve through the fused kernels, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from asyncengine import AsyncEngine, EngineConfig, GenerationConfig
from asyncengine.errors import UnsupportedModelError
from asyncengine.model import first_steps
from asyncengine.model.fused import choice
from asyncengine.model.fused.decoder import FusedDecoder
from asyncengine.model.loader import TransformersLoader
from asyncengine.step.limits import Limits
from tests.model.fused.interpreted import DEVICE, fuse_here, on_one_loop
from tests.model.test_graphs import Replayer, graphs_here

Checkpoint = Callable[..., Path]

GREEDY = GenerationConfig(temperature=0, max_tokens=3, ignore_eos=True)
PROMPTS = [[5, 6, 7], list(range(1, 20))]


@pytest.fixture(autouse=True)
def fused_here(monkeypatch: pytest.MonkeyPatch) -> None:
    fuse_here(monkeypatch)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The token counts of the steps that were run by fused kernels."""
    counts: list[int] = []
    forward = FusedDecoder.forward

    def counting(self: FusedDecoder, ids: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        counts.append(ids.shape[1])
        return forward(self, ids, *others)

    monkeypatch.setattr(FusedDecoder, "forward", counting)
    return counts


def config(path: Path, decoder: Any, **changes: Any) -> EngineConfig:
    return EngineConfig(
        str(path), device=DEVICE.type, dtype="float32", attention_backend="torch", decoder_backend=decoder,
        **{"max_num_sequence": 2, "prefill_chunk_size": 32, "max_total_sequence_length": 256, **changes},
    )  # fmt: skip


def about_decoder(notes: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(note for note in notes if note.startswith("decoder: "))


async def tokens_of(engine: AsyncEngine) -> list[list[int]]:
    return [result.token_ids for result in await engine.generate_many(PROMPTS, GREEDY)]


@on_one_loop
async def test_an_engine_generates_what_it_generates_without(checkpoint: Checkpoint, runs: list[int]) -> None:
    path = checkpoint("llama", num_hidden_layers=1)
    async with AsyncEngine(config(path, "transformers")) as engine:
        expected = await tokens_of(engine)
    assert runs == []
    async with AsyncEngine(config(path, "compiled")) as engine:
        complete = engine.complete_engine_config
        assert complete is not None and complete.decoder_backend == "compiled"
        assert not about_decoder(engine.health().notes)
        runs.clear()
        assert await tokens_of(engine) == expected
    assert {2, 22} <= set(runs)  # decodes, and both prompts at once


@on_one_loop
async def test_new_weights_sleep_and_embeddings(checkpoint: Checkpoint, runs: list[int]) -> None:
    path, other = (checkpoint("llama", num_hidden_layers=1, seed=seed) for seed in (0, 1))
    async with AsyncEngine(config(other, "transformers")) as engine:
        expected = await tokens_of(engine)
    weights = AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32).state_dict()
    async with AsyncEngine(config(path, "compiled")) as engine:
        await engine.update_weights(weights)
        await engine.sleep()
        await engine.wake()
        runs.clear()
        assert await tokens_of(engine) == expected
        assert runs
        runs.clear()
        await engine.embed([[5, 6, 7]])
        assert runs == []  # hidden states are the modules'


def load(path: Path, decoder: str) -> tuple[str, tuple[str, ...]]:
    loader = TransformersLoader()
    loaded = loader.load(loader.check(config(path, decoder), None))
    notes = (*loaded.notes, *(loaded.warming.warmth.notes if loaded.warming is not None else ()))
    loaded.model.close()
    return loaded.config.decoder_backend, about_decoder(notes)


@on_one_loop
async def test_weights_in_fp8(checkpoint: Checkpoint, runs: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """They are multiplied by torch; what is between is fused, and compared with the modules in fp8."""
    times = [2.0, 1.0] * 3
    monkeypatch.setattr(choice, "cuda_seconds", lambda device, **_: lambda replay: times.pop(0))
    path, changes = checkpoint("llama", num_hidden_layers=1), {"dtype": "bfloat16", "quantization": "fp8"}
    async with AsyncEngine(config(path, "auto").replace(**changes)) as engine:
        quantised, chosen = engine.health().notes[-2:]
        assert quantised.startswith("quantization: fp8, ")
        assert chosen.startswith("decoder: fused kernels are used for 1, 2, 3, 4, 5, 6, 7, 8, 9 to 512, more tokens: ")
        runs.clear()
        assert [len(tokens) for tokens in await tokens_of(engine)] == [3, 3]
        assert runs[0] == 22 and set(runs[1:]) == {2}  # both prompts, and what follows


@pytest.mark.parametrize(
    ("seconds", "used"), [((2.0, 1.0), "used for 1, 2, 9 to 512, more tokens"), ((1.0, 2.0), "not used")]
)
def test_auto_takes_them_where_they_are_measured_to_be_faster(
    seconds: tuple[float, float],
    used: str,
    checkpoint: Checkpoint,
    monkeypatch: pytest.MonkeyPatch,
    runs: list[int],
) -> None:
    times = list(3 * seconds)  # of a step of 32 tokens that is launched, and of the buckets 2 and 1

    def taken(replay: Callable[[], None]) -> float:
        runs.clear()
        replay()
        assert (32 in runs) == (len(times) == 5)  # of what is launched, the second time
        return times.pop(0)

    graphs_here(monkeypatch, Replayer())
    monkeypatch.setattr(choice, "cuda_seconds", lambda device, **_: taken)
    runs_as, (note,) = load(checkpoint("llama", num_hidden_layers=1), "auto")
    assert runs_as == "auto"  # a restart measures again
    assert times == []
    assert note.startswith(f"decoder: fused kernels are {used}: measured 32 launched in ")


@pytest.mark.parametrize(
    ("changes", "decided"),
    [
        ({"chunk": 512, "sequences": 256}, [((1,), 1), ((2, 3, 4, 5, 6, 7, 8), 8), ((512,), 64)]),
        ({"chunk": 2048, "length": 400}, [((1,), 1), ((2, 3, 4, 5, 6, 7, 8), 8), ((512,), 64)]),
        ({"chunk": 4096}, [((1,), 1), ((2, 3, 4, 5, 6, 7, 8), 8), ((512,), 64), ((513,), 2048)]),
        ({"chunk": 600, "buckets": (1, 16)}, [((513,), 600)]),
        ({"chunk": 5, "buckets": (1, 8)}, []),
    ],
)
def test_a_sort_of_steps_is_decided_by_one_of_them(changes: dict[str, Any], decided: list[Any]) -> None:
    found = list[Any]()

    class Measured:
        def decide_launched(self, counts: Any, tokens: int, launch: Any, seconds: Any) -> None:
            found.append((tuple(counts), tokens))

        def is_open(self, size: int) -> bool:
            return True

    given = {"chunk": 2048, "length": 8192, "sequences": 4, "buckets": None} | changes
    limits = Limits(given["sequences"], given["length"], given["chunk"], 16, 1 << 14)
    graphs: Any = None if given["buckets"] is None else SimpleNamespace(sizes=given["buckets"])
    measured: Any = Measured()
    first_steps._choose_launched(SimpleNamespace(logits=print), measured, graphs, limits, torch.device("cpu"), 99)
    assert found == decided


def test_what_nothing_is_captured_of_is_measured_as_it_is_launched(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = [2.0, 1.0, 1.0, 2.0, 2.0, 1.0]  # of 1, 8 and 32 tokens
    monkeypatch.setattr(choice, "cuda_seconds", lambda device, **_: lambda replay: times.pop(0))
    _, (note,) = load(checkpoint("llama", num_hidden_layers=1), "auto")
    assert note.startswith("decoder: fused kernels are used for 1, 9 to 512, more tokens: measured 1 launched in ")


@pytest.mark.parametrize(
    ("name", "changes", "decoder", "reason"),
    [
        ("gpt_neox", {}, "auto", "outputs of several projections alternate in one layer"),
        ("gpt_neox", {}, "compiled", "outputs of several projections alternate in one layer"),
        # Were it not seen that some layers do not rotate, the numbers would show it.
        ("smollm3", {"no_rope_layers": [1, 0]}, "auto", "SmolLM3ForCausalLM does not compute over a paged"),
    ],
)
def test_what_they_cannot_run_is_run_by_transformers_or_refused(
    name: str,
    changes: dict[str, Any],
    decoder: str,
    reason: str,
    checkpoint: Checkpoint,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("asyncengine.model.decoder.blueprint.rotates", lambda *_: True)
    path = checkpoint(name, num_hidden_layers=len(changes) + 1, **changes)
    if decoder == "auto":
        runs_as, (note,) = load(path, decoder)
        assert runs_as == "transformers"
        assert note.startswith(f"decoder: runs as transformers has it: {reason}")
        return
    with pytest.raises(UnsupportedModelError, match=f"cannot run as a compiled step: {reason}"):
        load(path, decoder)


def test_a_compiler_that_fails_keeps_no_model_from_being_served(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise RuntimeError("ptxas fatal: no such thing\nand more of it")

    monkeypatch.setattr(FusedDecoder, "forward", fail)
    path = checkpoint("llama", num_hidden_layers=1)
    assert load(path, "auto") == (
        "transformers", ("decoder: runs as transformers has it: ptxas fatal: no such thing",),
    )  # fmt: skip
    with pytest.raises(UnsupportedModelError, match=r"cannot run as a compiled step: ptxas fatal: no such thing$"):
        load(path, "compiled")
