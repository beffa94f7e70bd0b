"""The back ends over FlashInfer and FlashAttention-3, with stand-ins for both: what they are given, what is refused."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attention_case import CPU, dense, fresh_cache, layer, random_row, shuffled_tables, step_batch
from fake_libraries import modules
from test_parity import MIXED, assert_matches_dense
from transformers import AutoModelForCausalLM

from asyncengine import AsyncEngine, ConfigError, EngineConfig, GenerationConfig
from asyncengine.model import architecture, loader, verification
from asyncengine.model.attention import flashinfer
from asyncengine.model.attention.flash_attention import FlashAttention3
from asyncengine.model.attention.flashinfer import FlashInferAttention
from asyncengine.model.attention.protocol import BackendUnavailableError, LayerSpec, ParticularBackend
from asyncengine.model.attention.reference import TorchAttention
from asyncengine.model.attention.select import Selection, select
from asyncengine.model.load_settings import check_layers

pytestmark = pytest.mark.loops("either")

Backend = FlashInferAttention | FlashAttention3
NAMES = ["flashinfer", "flash_attention_3"]
MODULES = {"flashinfer": "flashinfer", "flash_attention_3": "flash_attn_interface"}
CUDA = torch.device("cuda")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(flashinfer, "WORKSPACE_BYTES", 1 << 10)


@pytest.fixture(params=NAMES)
def backend(request: pytest.FixtureRequest, installed: None) -> Backend:
    return FlashInferAttention() if request.param == "flashinfer" else FlashAttention3()


@pytest.mark.parametrize("page_size", [1, 16, 48])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.in_short("flashinfer-torch.bfloat16", "flash_attention_3-torch.bfloat16")
def test_mixed_batch(backend: Backend, dtype: torch.dtype, page_size: int) -> None:
    assert_matches_dense(backend, layer(key_dim=64), [*MIXED, (30, 3), (31, 4)], page_size, dtype)


@pytest.mark.parametrize(
    "features",
    [
        {"sliding_window": 1},
        {"sliding_window": 20},
        {"soft_cap": 2.0},
        {"scaling": 1.0},
        {"soft_cap": 5.0, "sliding_window": 33},
        {"heads": 8, "kv_heads": 1},
        {"key_dim": 256},
    ],
    ids=str,
)
def test_features(backend: Backend, features: dict[str, Any]) -> None:
    shapes = [(40, 1), (95, 1), (30, 9), (0, 25), (19, 1), (20, 1)]
    assert_matches_dense(backend, layer(**{"key_dim": 64} | features), shapes, 16, torch.float16)


def test_layers_of_several_kinds_in_one_step(backend: Backend) -> None:
    specs = [layer(key_dim=64), layer(key_dim=64, sliding_window=9), layer(key_dim=128, kv_heads=4)]
    tables, num_blocks = shuffled_tables([6, 1], 4, 0)
    plan = backend.plan(step_batch([6, 1], [0, 0], tables, 4), 4, CPU)
    for spec in [*specs, *specs]:
        cache = fresh_cache(backend, spec, num_blocks, 4, torch.float16)
        rows = [random_row(spec, 0, new, torch.float16, new) for new in (6, 1)]
        inputs = [
            torch.cat([getattr(row, name) for row in rows]).to(torch.float16) for name in ("query", "keys", "values")
        ]
        output = backend.attend(spec, cache, plan, *inputs, None)
        expected = torch.cat([dense(spec, row, None) for row in rows])
        torch.testing.assert_close(output.double(), expected, rtol=1e-3, atol=2e-3)


def test_rows_without_query_tokens_and_padding(backend: Backend) -> None:
    spec = layer(key_dim=64)
    row = random_row(spec, 0, 2, torch.float16, 1)
    tables, num_blocks = shuffled_tables([5, 2, 9], 4, 0)
    batch = step_batch([0, 2, 0], [5, 0, 9], tables, 4)
    batch = dataclasses.replace(batch, slot_mapping=np.append(batch.slot_mapping, [-1, -1, -1]))
    cache = fresh_cache(backend, spec, num_blocks, 4, torch.float16)
    inputs = [
        torch.cat((x, torch.full((3, *x.shape[1:]), torch.nan))).half() for x in (row.query, row.keys, row.values)
    ]
    output = backend.attend(spec, cache, backend.plan(batch, 4, CPU), *inputs, None)
    torch.testing.assert_close(output[:2].double(), dense(spec, row, None), rtol=1e-3, atol=2e-3)
    assert (output[2:] == 0).all()
    assert int(cache.keys.isfinite().sum()) == 2 * spec.num_kv_heads * spec.key_dim


def test_a_step_without_query_tokens(backend: Backend) -> None:
    spec = layer(key_dim=64)
    cache = fresh_cache(backend, spec, 4, 4, torch.float16)
    batch = step_batch([0], [3], [[2]], 4)
    batch = dataclasses.replace(batch, slot_mapping=np.full(2, -1))
    query, key = torch.zeros(2, 4, 64).half(), torch.zeros(2, 2, 64).half()
    output = backend.attend(spec, cache, backend.plan(batch, 4, CPU), query, key, key, None)
    assert output.shape == (2, 4, 64) and (output == 0).all()


def test_blocks_are_copied_as_the_reference_does(backend: Backend) -> None:
    spec, copies = layer(key_dim=64), torch.tensor([[0, 2], [2, 1]])
    caches = [each.allocate(spec, 3, 4, torch.float16, CPU) for each in (backend, TorchAttention())]
    for cache in caches:
        cache.keys.copy_(torch.arange(cache.keys.numel()).view(cache.keys.shape) % 999)  # the same in blocks of both
        cache.values.copy_(cache.keys + 1)
    backend.copy_blocks(caches[:1], copies)
    TorchAttention().copy_blocks(caches[1:], copies)
    for name in ("keys", "values"):  # its own last block is nobody's
        assert torch.equal(getattr(caches[0], name)[:3], getattr(caches[1], name))


@pytest.mark.usefixtures("installed")
def test_flashinfer_plans_once_for_a_kind_of_layer_and_never_over_the_step_before() -> None:
    backend, spec = FlashInferAttention(), layer(key_dim=64)
    cache = fresh_cache(backend, spec, 4, 4, torch.float16)
    query, key = torch.zeros(1, 4, 64).half(), torch.zeros(1, 2, 64).half()
    counts = []
    for position in range(4):
        plan = backend.plan(step_batch([1], [position], [[2]], 4), 4, CPU)
        for _ in range(3):
            backend.attend(spec, cache, plan, query, key, key, None)
        made = sys.modules["flashinfer"].BatchPrefillWithPagedKVCacheWrapper.made
        counts.append([wrapper.plans for wrapper in made])
    assert counts == [[1], [1, 1], [2, 1], [2, 2]]


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (layer(key_dim=64, has_sinks=True), "no attention sinks"),
        (layer(key_dim=64, distances=3), "adds no bias to scores"),
        (layer(key_dim=64, value_dim=128), "not of 64 and 128"),
        (layer(key_dim=512), "not of 512 and 512"),
        (layer(key_dim=65), "not of 65 and 65"),
        (layer(key_dim=64, looks_ahead=True), "tokens of an image cannot attend to later ones"),
    ],
)
def test_layers_that_it_does_not_know_are_refused(backend: Backend, spec: LayerSpec, says: str) -> None:
    with pytest.raises(BackendUnavailableError, match=f"{backend.name} .*{says}"):
        backend.allocate(spec, 1, 16, torch.float16, CPU)
    config = EngineConfig("model", attention_backend=backend.name)
    watched = {"first": layer(key_dim=64), "second": spec}
    with pytest.raises(ConfigError, match=f"attention_backend is '{backend.name}': .*{says}"):
        check_layers(config, backend, watched, torch.float16, CPU)
    check_layers(config, backend, {"first": layer(key_dim=64)}, torch.float16, CPU)
    check_layers(config, backend, None, torch.float16, CPU)  # one that was not watched is refused when it is allocated
    check_layers(config, TorchAttention(), watched, torch.float16, CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn], ids=str)
def test_numbers_that_it_does_not_store_are_refused(backend: Backend, dtype: torch.dtype) -> None:
    says = f"stores bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    with pytest.raises(BackendUnavailableError, match=says):
        backend.allocate(layer(key_dim=64), 1, 16, dtype, CPU)
    with pytest.raises(ConfigError, match=says):
        check_layers(EngineConfig("model", attention_backend=backend.name), backend, {}, dtype, CPU)


@pytest.mark.usefixtures("installed")
def test_old_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an old one")
    for backend in (FlashInferAttention(), FlashAttention3()):
        with pytest.raises(BackendUnavailableError, match=r"8\.0 or later, not 7\.5 \(an old one\)"):
            backend.check_dtype(torch.float16, CUDA)


@pytest.mark.parametrize("name", NAMES)
def test_is_there_only_by_name_on_cuda_where_it_imports(name: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in MODULES.values():
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(BackendUnavailableError, match=f"{MODULES[name]}, the module of .*, cannot be imported"):
        select(name, CUDA)
    with pytest.raises(BackendUnavailableError, match=f"the {name} attention back end needs a CUDA device, not cpu"):
        select(name, CPU)
    for module, fake in modules().items():
        monkeypatch.setitem(sys.modules, module, fake)
    backend = select(name, CUDA).backend
    assert backend.name == name and isinstance(backend, ParticularBackend)
    assert select("auto", CUDA).backend.name in ("triton", "torch")


def test_whole_models_compute_what_transformers_computes(backend: Backend, checkpoint: Callable[..., Path]) -> None:
    """Windows in some layers, several KV heads, and a KV cache of bfloat16."""
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint("gemma3_text", num_hidden_layers=2, head_dim=64),
        dtype=torch.bfloat16,
        attn_implementation=architecture.ATTENTION,
    )
    layers = architecture.record(model.eval())
    assert verification.Trial.of(model, layers, CPU).run(model, backend) < 0.05


@pytest.fixture
def chosen(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> Backend:
    """As a load on CUDA would have chosen it."""
    monkeypatch.setattr(loader, "select_attention", lambda config, device, dtype: Selection(backend))
    return backend


async def test_an_engine_serves_over_it(chosen: Backend, checkpoint: Callable[..., Path]) -> None:
    config = EngineConfig(
        str(checkpoint("llama", num_hidden_layers=2, head_dim=64)),
        device="cpu",
        dtype="bfloat16",
        mode="interactive",
        attention_backend=chosen.name,
        prefill_chunk_size=16,
    )
    async with AsyncEngine(config) as engine:
        assert engine.complete_engine_config.attention_backend == chosen.name
        greedy = GenerationConfig(temperature=0, max_tokens=8, ignore_eos=True)
        first = await engine.generate(list(range(1, 80)), greedy)
        again = await engine.generate(list(range(1, 80)), greedy)
        assert again.usage.cached_tokens > 0
        assert len(first.token_ids) == 8 and first.token_ids == again.token_ids


@pytest.mark.usefixtures("chosen")
def test_a_load_is_refused_before_there_are_weights(backend: Backend, checkpoint: Callable[..., Path]) -> None:
    config = EngineConfig(
        str(checkpoint("llama", head_dim=20)), device="cpu", dtype="bfloat16", attention_backend=backend.name
    )
    with pytest.raises(ConfigError, match=r"takes key and value heads of one size, .* not of 20 and 20"):
        loader.TransformersLoader().check(config, None)
    config = config.replace(model=str(checkpoint("llama", head_dim=64)), dtype="float32")
    with pytest.raises(ConfigError, match="stores bfloat16 and float16, not float32"):
        loader.TransformersLoader().check(config, None)
    with pytest.raises(ConfigError, match=r"kv_cache_dtype is 'fp8_e4m3' .*stores bfloat16 and float16"):
        loader.TransformersLoader().check(config.replace(dtype="bfloat16", kv_cache_dtype="fp8_e4m3"), None)


@pytest.mark.usefixtures("chosen")
def test_a_model_that_cannot_be_watched_is_refused_when_it_is_loaded(checkpoint: Callable[..., Path]) -> None:
    config = EngineConfig(str(checkpoint("gpt_oss", head_dim=64)), device="cpu", dtype="bfloat16")
    plan = loader.TransformersLoader().check(config, None)
    plan = dataclasses.replace(plan, details=dataclasses.replace(plan.details, watched=None))
    with pytest.raises(BackendUnavailableError, match="no attention sinks"):
        loader.TransformersLoader().load(plan)
