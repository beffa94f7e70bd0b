"""What captured steps are reckoned to take, beside what is counted on the CPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, PreTrainedConfig, Qwen3Config

from asyncengine import EngineConfig, InsufficientMemoryError
from asyncengine.model import architecture, capacity, device_copy, memory, token_draw
from asyncengine.model.attention_modules import hooked
from asyncengine.model.buckets import Buckets
from asyncengine.model.graph_memory import DRAW_GRAPH, STEP_GRAPH, activation_numbers, draw_bytes, reserve
from asyncengine.model.memory import GraphReserve
from asyncengine.model.recorded import Recorded
from asyncengine.model.token_draw import DrawKind, DrawSettings
from asyncengine.step.model import LoadPlan
from tests.model.live_bytes import LiveBytes

SIZES: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 128,
}  # fmt: skip


def settings_of(rows: int) -> DrawSettings:
    def columns(value: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((rows, 1), value, dtype=dtype)

    return DrawSettings(
        columns(0.5, torch.float64), columns(0.9, torch.float64), columns(1.2, torch.float32),
        columns(0.01, torch.float32), columns(20, torch.int32),
    )  # fmt: skip


@pytest.mark.parametrize(("rows", "vocab"), [(4, 32_000), (4, 150_000), (160, 1_000), (160, 8_000)])
def test_a_draw_works_on_no_more_than_is_reckoned(rows: int, vocab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_copy, "_AT_HAND", "none")
    logits = torch.randn(rows, vocab).bfloat16()
    likeliest, settings, most = logits.argmax(-1), settings_of(rows), 0
    for kind in DrawKind:
        with torch.inference_mode(), LiveBytes() as live:
            token_draw.draw(kind, logits, likeliest, settings)
        most = max(most, live.peak)
    assert most <= draw_bytes(rows, vocab) <= 1.25 * most


@pytest.mark.parametrize(
    ("config", "at_most"),
    [(LlamaConfig(**SIZES), 1.5), (Qwen3Config(**SIZES), 1.5), (MixtralConfig(**SIZES, num_local_experts=4), 1.5)],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_a_layer_has_no_more_at_hand_than_is_reckoned(config: PreTrainedConfig, at_most: float) -> None:
    model = AutoModelForCausalLM.from_config(config, attn_implementation=architecture.ATTENTION, dtype=torch.bfloat16)
    layers, tokens = architecture.record(model.eval()).attention, 64

    def nothing(module: Any, query: Any, key: Any, value: Any, kwargs: Any) -> Any:
        return query.new_zeros(query.shape[0], query.shape[1], value.shape[-1])

    ids, positions = torch.zeros(1, tokens, dtype=torch.long), torch.arange(tokens)[None]
    with (
        hooked({layer.module: nothing for layer in layers}),
        torch.inference_mode(),
        LiveBytes() as live,
    ):
        model(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=1)
    reckoned = activation_numbers(config) * tokens * 2
    assert live.peak <= reckoned <= at_most * live.peak


def test_the_reserve_adds_up() -> None:
    text = SimpleNamespace(vocab_size=1000, hidden_size=64, intermediate_size=256)
    sizes = Buckets.upto(16).sizes
    assert sizes == (1, 2, 4, 8, 16)
    kept, activations = sum(sizes) * 1000 * 2, 16 * (6 * 64 + 4 * 256) * 2
    assert reserve(text, torch.bfloat16, 16, False) == GraphReserve(kept + activations + 5 * STEP_GRAPH, 5)
    both = GraphReserve(kept + activations + draw_bytes(16, 1000) + 5 * STEP_GRAPH + 15 * DRAW_GRAPH, 20)
    assert reserve(text, torch.bfloat16, 16, True) == both
    mixed = reserve(text, torch.bfloat16, 16, False, 100)
    more = (3 * 16 * 1000 + (100 - 16) * (6 * 64 + 4 * 256)) * 2 + 3 * STEP_GRAPH  # of 32, 64 and 100 tokens
    assert mixed == GraphReserve(kept + activations + 5 * STEP_GRAPH + more, 8)
    adapted = GraphReserve(kept + (1 + 2 + 4 + 8 + 16) * 1000 * 2 + activations + 10 * STEP_GRAPH, 10)
    assert reserve(text, torch.bfloat16, 16, False, adapters=True) == adapted
    assert reserve(text, torch.bfloat16, 1, False).graphs == 1
    assert str(GraphReserve(3 << 28, 20)) == "0.75 GiB for 20 CUDA graphs"


@pytest.mark.parametrize(
    ("backend", "device", "mode", "graphs"),
    [
        ("triton", "cuda", "disable", 23), ("triton", "cuda", "ngram", 8), ("torch", "cuda", "disable", None),
        ("triton", "cpu", "disable", None),
    ],
)  # fmt: skip
def test_a_load_sets_aside_what_it_will_capture(backend: str, device: str, mode: Any, graphs: int | None) -> None:
    details: Any = SimpleNamespace(
        device=torch.device(device), draft=None, hf_config=LlamaConfig(**SIZES), dtype=torch.bfloat16, max_length=100
    )
    config = EngineConfig("m", speculative_mode=mode)
    attention = {"triton": SimpleNamespace(plan_with=print), "torch": SimpleNamespace(name="torch")}[backend]
    found = capacity.graph_reserve(config, details, attention, 16, [])
    assert (None if found is None else found.graphs) == graphs
    if graphs is not None:  # and for those with adapters, if there are any; a model that drafts has none
        details.draft = details
        found = capacity.graph_reserve(config.replace(adapters={"one": "a"}), details, attention, 16, [])
        assert found is not None and found.graphs == 2 * graphs + 5


def test_the_kv_cache_of_a_gpu_gets_what_graphs_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    gib = 1 << 30
    monkeypatch.setattr(memory, "total_bytes", lambda device: 80 * gib)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 60 * gib)
    monkeypatch.setattr(capacity, "_profile", lambda *args: 2 * gib)
    details: Any = SimpleNamespace(
        device=torch.device("cuda", 0), draft=None, hf_config=LlamaConfig(**SIZES), dtype=torch.bfloat16,
        kv_dtype=torch.bfloat16, max_length=1 << 20, draft_head=None,
    )  # fmt: skip
    backend = SimpleNamespace(plan_with=print, bytes_per_block=lambda spec, page_size, dtype: 1 << 20)
    layers: Any = [SimpleNamespace(spec=None)]
    built: Any = SimpleNamespace(model=None, layers=Recorded(layers), media_trial=None)
    config = EngineConfig("m", gpu_memory_utilization=0.5)
    limits, _ = capacity.limits_of(LoadPlan(config, True, None, details), built, (), backend)
    spec = SimpleNamespace(states=[SimpleNamespace(nbytes=lambda dtype: 48 << 20)])

    def with_states_of(*in_place: bool) -> Any:
        recurrent: Any = [SimpleNamespace(spec=spec, in_place=each) for each in in_place]
        built: Any = SimpleNamespace(model=None, layers=Recorded(layers, recurrent), media_trial=None)
        return capacity.limits_of(LoadPlan(config, True, None, details), built, (), backend)[0]

    with_states = with_states_of(False)
    assert 8 < with_states.max_num_sequence < 64, "fewer than usual, and graphs for no more"
    assert 3 * with_states.max_num_sequence < with_states_of(True).max_num_sequence, "no copies for each"
    one, none = with_states_of(True, False), with_states_of(True, True)
    assert one.max_num_sequence < none.max_num_sequence, "one layer takes them"
    assert with_states.num_blocks > 1 << 12 and with_states.kept_states
    graphs = reserve(details.hf_config, torch.bfloat16, 256, True, 2048 + 256)
    assert graphs.nbytes > 1 << 20
    assert limits.num_blocks == (40 * gib - 20 * gib - 2 * gib - graphs.nbytes) >> 20
    with pytest.raises(InsufficientMemoryError, match=rf"\(18\.00 GiB available - {graphs}\)"):
        wanted = config.replace(max_total_sequence_length=18 * 1024 * 16)
        capacity.limits_of(LoadPlan(wanted, True, None, details), built, (), backend)
