import itertools
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from asyncengine import (
    AsyncEngine,
    CheckpointError,
    ConfigError,
    EngineConfig,
    GenerationConfig,
    InsufficientMemoryError,
    InvalidRequestError,
)
from asyncengine.model import architecture, findings, graphs, kept_tokenizer, load_check, watching
from asyncengine.model import loader as loader_module
from asyncengine.model.decoder.weights import Packing
from asyncengine.model.load_settings import check_quantization
from asyncengine.model.loader import TransformersLoader
from asyncengine.model.paged_layers import PagedLayers
from asyncengine.model.read_model import read_model
from asyncengine.model.verification import Trial
from asyncengine.step.model import LoadedModel

pytestmark = pytest.mark.loops("either")


def load(config: EngineConfig) -> LoadedModel:
    loader = TransformersLoader()
    loaded = loader.load(loader.check(config, None))
    loaded.model.close()
    return loaded


@pytest.mark.parametrize(
    ("mode", "sequences", "tokens"),
    [("interactive", 1, 512), ("local", 4, 4 * 512), ("server", 64, 64 * 512)],
)
def test_modes_derive_the_limits_that_are_not_given(
    mode: Any, sequences: int, tokens: int, checkpoint: Callable[..., Path]
) -> None:
    loaded = load(EngineConfig(str(checkpoint("llama")), device="cpu", mode=mode))
    config = loaded.config
    assert config.max_num_sequence == loaded.limits.max_num_sequence == sequences
    assert config.max_single_sequence_length == 512
    assert config.max_total_sequence_length == loaded.limits.num_blocks * loaded.limits.page_size == tokens
    assert config.prefill_chunk_size == 512


def test_the_completed_configuration_has_no_gaps_and_loads_again(checkpoint: Callable[..., Path]) -> None:
    config = load(EngineConfig(str(checkpoint("llama")), device="cpu")).config
    gaps = [name for name in config.__slots__ if getattr(config, name) is None]
    assert set(gaps) == {"prefix_cache_max_num_recycling_seqs", "max_queue_size", "tokenizer"}
    assert load(EngineConfig.from_json(config.to_json())).config == config


def test_kv_capacity_is_a_share_of_free_memory(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_check.memory, "free_bytes", lambda device: 1 << 30)
    config = EngineConfig(str(checkpoint("llama")), device="cpu", kv_cache_page_size=16, gpu_memory_utilization=0.001)
    limits = load(config).limits
    per_block = 3 * 2 * 2 * 16 * 16 * 4  # layers, key and value, heads, head size, tokens, bytes
    assert limits.num_blocks == int((1 << 30) * 0.001) // per_block


def test_weights_that_do_not_fit_are_refused_with_the_arithmetic(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_check.memory, "free_bytes", lambda device: 1 << 20)
    with pytest.raises(InsufficientMemoryError, match=r"weights 0\.00 GiB .* \+ 0\.25 GiB .* > 0\.00 GiB free"):
        TransformersLoader().check(EngineConfig(str(checkpoint("llama")), device="cpu"), None)


def test_a_model_that_fits_only_alone_is_not_loaded_beside(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EngineConfig(str(checkpoint("llama")), device="cpu", max_total_sequence_length=512)
    loaded = load(config)
    assert loaded.memory_bytes > 512 * 3 * 2 * 2 * 16 * 4
    assert TransformersLoader().check(config, loaded).fits_beside
    need = load_check.SLACK + loaded.memory_bytes // 2
    monkeypatch.setattr(load_check.memory, "free_bytes", lambda device: need)
    assert not TransformersLoader().check(config, loaded).fits_beside


def test_both_models_have_their_caches_before_any_step_is_captured(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They share the attention's plan: a cache that comes later would move what captured steps refer to."""
    done: list[str] = []
    allocate, capture = PagedLayers.allocate, graphs.graphs_for
    monkeypatch.setattr(PagedLayers, "allocate", lambda self: (done.append("allocate"), allocate(self))[1])
    monkeypatch.setattr(graphs, "graphs_for", lambda *args: (done.append("capture"), capture(*args))[1])
    paths = checkpoint("llama"), checkpoint("qwen3")
    load(EngineConfig(str(paths[0]), device="cpu", speculative_mode="small_draft", additional_models=[str(paths[1])]))
    assert done[-4:] == ["allocate", "allocate", "capture", "capture"]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="there is no list of memory maps")
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
@pytest.mark.usefixtures("nothing_kept")
def test_weights_are_mapped_from_the_file_and_not_copied_in_host_memory(
    architecture: str, checkpoint: Callable[..., Path]
) -> None:
    """So that moving them to a device, one parameter after the other, is the only copy that is made.

    Experts that are stored one by one are put together by transformers, and so are copied.
    """
    path = checkpoint(architecture)
    loader = TransformersLoader()
    model, _ = read_model(loader.check(EngineConfig(str(path), device="cpu"), None).details)
    spans = [
        tuple(int(end, 16) for end in line.split()[0].split("-"))
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(path / "model.safetensors"))
    ]
    for name, parameter in model.named_parameters():
        begin = parameter.data_ptr()
        mapped = any(low <= begin and begin + parameter.nbytes <= high for low, high in spans)
        assert mapped == (".experts." not in name), name


@pytest.fixture
def nothing_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (findings, kept_tokenizer):
        monkeypatch.setattr(module, "cache_directory", lambda: tmp_path / "kept")


@pytest.mark.usefixtures("nothing_kept")
def test_a_first_load_goes_on_while_the_code_is_compiled(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until it has read the weights and asked transformers what they compute; and then a tokenizer is kept."""
    kept, asked = threading.Event(), threading.Event()
    select, keep, of = loader_module.select_attention, kept_tokenizer.keep, Trial.of

    def slowly(*arguments: Any) -> Any:
        assert asked.wait(60) and kept.wait(60), "the load waits for the compiler first"
        return select(*arguments)

    monkeypatch.setattr(loader_module, "select_attention", slowly)
    monkeypatch.setattr(kept_tokenizer, "keep", lambda *arguments: (keep(*arguments), kept.set())[0])
    monkeypatch.setattr(Trial, "of", lambda *arguments: (of(*arguments), asked.set())[0])
    loaded = load(EngineConfig(str(checkpoint("llama")), device="cpu", tokenizer="tiny"))
    assert loaded.config.attention_backend == "cpu"


@pytest.mark.usefixtures("nothing_kept")
def test_a_load_that_fails_leaves_no_compiler_behind(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    failed, compiled = threading.Event(), threading.Event()
    select = loader_module.select_attention

    def slowly(*arguments: Any) -> Any:
        assert failed.wait(60)
        selection = select(*arguments)
        compiled.set()
        return selection

    def fail(*_: Any) -> Any:
        failed.set()
        raise CheckpointError("no such tokens")

    monkeypatch.setattr(loader_module, "select_attention", slowly)
    monkeypatch.setattr(loader_module, "load_tokenizer", fail)
    with pytest.raises(CheckpointError, match="no such tokens"):
        load(EngineConfig(str(checkpoint("llama")), device="cpu"))
    assert compiled.is_set()


@pytest.mark.usefixtures("nothing_kept")
def test_the_compilers_memory_is_not_counted_against_a_model(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    weighed, compiled = threading.Event(), threading.Event()
    select, fits = loader_module.select_attention, load_check.fits

    def slowly(*arguments: Any) -> Any:
        assert weighed.wait(60)
        compiled.set()
        return select(*arguments)

    def weigh(*arguments: Any) -> bool:
        try:
            return fits(*arguments)
        finally:
            weighed.set()

    monkeypatch.setattr(loader_module, "select_attention", slowly)
    monkeypatch.setattr(load_check, "fits", weigh)
    monkeypatch.setattr(load_check.memory, "free_bytes", lambda device: 1 << (40 if compiled.is_set() else 20))
    assert TransformersLoader().check(EngineConfig(str(checkpoint("llama")), device="cpu"), None).fits_beside


@pytest.mark.usefixtures("nothing_kept")
def test_models_of_one_configuration_are_watched_once_wherever_they_are(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    watched: list[Any] = []
    record = architecture.record
    monkeypatch.setattr(watching, "_WATCHED", {})
    monkeypatch.setattr(architecture, "record", lambda model: (watched.append(model), record(model))[1])
    for path in (checkpoint("llama"), checkpoint("llama", seed=1), checkpoint("llama", num_hidden_layers=2)):
        TransformersLoader().check(EngineConfig(str(path), device="cpu"), None)
    assert [model.config.num_hidden_layers for model in watched] == [3, 2]


@pytest.mark.usefixtures("nothing_kept")
def test_a_model_is_not_let_go_before_the_code_for_the_next_is_there(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, loader = EngineConfig(str(checkpoint("llama")), device="cpu"), TransformersLoader()
    current = load(config)

    def fail(*_: Any) -> Any:
        raise ConfigError("no compiler")

    monkeypatch.setattr(loader_module, "select_attention", fail)
    other = config.replace(model=str(checkpoint("qwen3")))
    with pytest.raises(ConfigError, match="no compiler"):
        loader.check(other, current)
    with pytest.raises(ConfigError, match="no compiler"):
        loader.check(other.replace(attention_backend="cpu"), None)
    plan = loader.check(other, None)
    with pytest.raises(ConfigError, match="no compiler"):
        loader.load(plan)


@pytest.mark.usefixtures("nothing_kept")
@pytest.mark.parametrize(
    ("architecture", "stored", "dtype", "calls"),
    [
        ("llama", ["float32"], "float32", 1),
        ("llama", ["float32"], "bfloat16", 3 * 7 + 2),  # three layers of seven, embedding and head
        ("llama", ["bfloat16", "bfloat16", "float32"], "bfloat16", 3 * 7 + 2),
        ("gpt_neox", ["float32"], "float32", 3 * 3 + 1),  # its queries, keys and values take turns, and are copied
    ],
)
def test_only_weights_that_are_all_mapped_are_packed_by_one_call(
    architecture: str,
    stored: list[str],
    dtype: Any,
    calls: int,
    checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Others are in memory, and let go matrix by matrix."""
    path = shutil.copytree(checkpoint(architecture), tmp_path / "model")
    dtypes = itertools.cycle(getattr(torch, name) for name in stored)
    weights = load_file(path / "model.safetensors")
    save_file({name: w.to(next(dtypes)) for name, w in weights.items()}, path / "model.safetensors", {"format": "pt"})
    packed: list[Packing] = []
    run = Packing.run
    monkeypatch.setattr(Packing, "run", lambda self: (packed.append(self), run(self))[1])
    loaded = load(EngineConfig(str(path), device="cpu", dtype=dtype))
    assert loaded.config.decoder_backend == "compiled"
    assert len(packed) == calls


@pytest.mark.parametrize("name", ["model.layers.1.post_attention_layernorm.weight", "model.embed_tokens.weight"])
async def test_weights_that_are_missing_are_not_made_up(
    name: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    path = shutil.copytree(checkpoint("llama"), tmp_path / "model")
    weights = load_file(path / "model.safetensors")
    save_file({key: w for key, w in weights.items() if key != name}, path / "model.safetensors", {"format": "pt"})
    async with AsyncEngine(EngineConfig(str(checkpoint("llama")), mode="interactive")) as engine:
        with pytest.raises(CheckpointError, match=f"1 weights are missing: {name}"):
            await engine.reload(EngineConfig(str(path), mode="interactive"))
        assert (await engine.generate([1, 2, 3], GenerationConfig(max_tokens=3))).token_ids


async def test_a_model_without_a_head_embeds_and_does_nothing_else(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    whole, path = checkpoint("llama"), shutil.copytree(checkpoint("llama"), tmp_path / "model")
    weights = load_file(path / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    config = EngineConfig(str(whole), mode="interactive")
    async with AsyncEngine(config) as engine:
        expected = (await engine.embed([[1, 2, 3]]))[0].vector
        with pytest.raises(CheckpointError, match="cannot draft: it has no language-model head"):
            await engine.reload(config.replace(speculative_mode="small_draft", additional_models=[str(path)]))
        for _ in range(2):  # such a load is never known
            await engine.reload(config.replace(model=str(path)))
            assert np.array_equal((await engine.embed([[1, 2, 3]]))[0].vector, expected)
            with pytest.raises(InvalidRequestError, match="can only embed: its checkpoint has no language-model head"):
                await engine.generate([1, 2, 3])
            with pytest.raises(InvalidRequestError, match="can only embed"):
                await engine.score([[1, 2, 3]])
        await engine.reload(config)
        assert (await engine.generate([1, 2, 3], GenerationConfig(max_tokens=3))).token_ids


def test_the_loader_leaves_torch_as_it_is(checkpoint: Callable[..., Path]) -> None:
    before = (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), torch.random.get_rng_state())
    load(EngineConfig(str(checkpoint("gpt_oss")), device="cpu", dtype="bfloat16"))
    after = (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), torch.random.get_rng_state())
    assert before[:3] == after[:3]
    assert torch.equal(before[3], after[3])


async def test_a_missing_tokenizer_is_no_error_until_text_is_asked_for(checkpoint: Callable[..., Path]) -> None:
    from asyncengine import InvalidRequestError

    async with AsyncEngine(EngineConfig(str(checkpoint("llama")), mode="interactive")) as engine:
        result = await engine.generate([1, 2, 3], GenerationConfig(max_tokens=3))
        assert result.text == ""
        with pytest.raises(InvalidRequestError, match="has no tokenizer; pass the prompt as token ids"):
            await engine.generate("text")
        with pytest.raises(InvalidRequestError, match="stop strings need a tokenizer"):
            await engine.generate([1], GenerationConfig(stop_strs="x"))


async def test_the_tokenizer_may_come_from_elsewhere(checkpoint: Callable[..., Path]) -> None:
    path = checkpoint("llama", vocab_size=4096)
    async with AsyncEngine(EngineConfig(str(path), tokenizer="tiny", mode="interactive")) as engine:
        result = await engine.generate("Hello", GenerationConfig(max_tokens=5, temperature=0))
        assert result.usage.prompt_tokens >= 1
        assert isinstance(result.text, str)


@pytest.mark.parametrize(
    ("changes", "device", "said"),
    [
        ({"quantization": "int8"}, "cuda", "'int8' on cuda"),
        ({"quantization": "int8", "attention_backend": "torch"}, "cpu", "attention_backend 'torch'"),
        ({"quantization": "int4", "attention_backend": "torch"}, "cpu", "attention_backend 'torch'"),
    ],
)
def test_weights_that_nothing_multiplies_are_refused_before_a_load(
    changes: dict[str, Any], device: str, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        check_quantization(EngineConfig("tiny", **changes), torch.device(device), torch.bfloat16)
    if device == "cpu":
        with pytest.raises(ConfigError, match=said):
            TransformersLoader().check(EngineConfig("tiny", device="cpu", **changes), None)
