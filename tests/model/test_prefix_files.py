"""Prefix caches in files, over real models: what is found in one is bit for bit what there was."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from asyncengine import AsyncEngine, EngineConfig, GenerationConfig, PrefixCacheError, RequestResult
from asyncengine.builds import cache_directory
from asyncengine.model import kept_blocks
from asyncengine.model.kept_blocks import weights_digest

pytestmark = pytest.mark.loops("either")

PROMPT = torch.randint(40, 199, (37,), generator=torch.Generator().manual_seed(3)).tolist()
ASKED = GenerationConfig(max_tokens=6, temperature=0, ignore_eos=True, logprobs=True, top_logprobs=5)


def config(path: Path, **changes: Any) -> EngineConfig:
    values: dict[str, Any] = {
        "device": "cpu", "dtype": "float32", "kv_cache_page_size": 4, "max_num_sequence": 4,
        "max_total_sequence_length": 400,
    }  # fmt: skip
    return EngineConfig(str(path), **(values | changes))


async def answered(engine: AsyncEngine) -> RequestResult:
    return await engine.generate(PROMPT, ASKED)


WAYS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"dtype": "bfloat16"}),
    ("llama", {"dtype": "bfloat16", "quantization": "int8", "speculative_mode": "ngram"}),
    ("llama", {"attention_backend": "torch", "kv_cache_dtype": "fp8_e4m3"}),
    ("deepseek_v2", {"attention_backend": "torch"}),
    ("deepseek_v2", {}),
    ("gemma3_text", {"decoder_backend": "transformers"}),
]


@pytest.mark.parametrize(("architecture", "changes"), WAYS, ids=[f"{name},{','.join(each)}" for name, each in WAYS])
@pytest.mark.in_short(
    "gemma3_text,decoder_backend",
    "deepseek_v2,attention_backend",
    "llama,attention_backend,kv_cache_dtype",
    "llama,dtype,quantization,speculative_mode",
    "llama,",
)
async def test_another_engine_finds_the_same_bits(
    architecture: str, changes: dict[str, Any], checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """In whichever layout a back end keeps them, with latents, in narrow numbers."""
    file, path = tmp_path / "prefixes", checkpoint(architecture)
    async with AsyncEngine(config(path, **changes)) as engine:
        await answered(engine)
        first = await answered(engine)
        count = await engine.save_prefix_cache(file)
        assert count >= 36
    async with AsyncEngine(config(path, **changes)) as engine:
        other = [50] * 21  # so that blocks go elsewhere
        await engine.generate(other, ASKED)
        assert await engine.load_prefix_cache(file) == count
        again = await answered(engine)
        assert again.usage.cached_tokens == first.usage.cached_tokens == 36
        assert again.outputs == first.outputs


@pytest.fixture
async def kept(checkpoint: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint of its own, and a file of a prefix cache."""
    path, file = tmp_path / "model", tmp_path / "prefixes"
    shutil.copytree(checkpoint("llama"), path)
    async with AsyncEngine(config(path)) as engine:
        await answered(engine)
        await engine.save_prefix_cache(file)
    return path, file


def changed_weights(path: Path) -> None:
    """By as little as can be."""
    file = path / "model.safetensors"
    tensors = load_file(file)
    name = min(tensors)
    tensors[name].view(-1)[0] += 1e-3
    save_file(tensors, file, {"format": "pt"})


async def test_a_checkpoint_that_is_written_over_is_not_the_one_that_was_loaded(kept: tuple[Path, Path]) -> None:
    """As by who trains on: what the model has computed must not be taken for what the new weights would."""
    path, file = kept
    async with AsyncEngine(config(path)) as engine:
        await answered(engine)
        changed_weights(path)
        for call in (engine.save_prefix_cache, engine.load_prefix_cache):
            with pytest.raises(PrefixCacheError, match="have changed since it was loaded"):
                await call(file)
        (path / "model.safetensors").unlink()
        with pytest.raises(PrefixCacheError, match="cannot read the checkpoint's weights"):
            await engine.save_prefix_cache(file)


def changed_configuration(path: Path) -> None:
    values = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(values | {"rms_norm_eps": 1e-4}))


@pytest.mark.parametrize(
    ("change", "changes", "differs"),
    [
        (changed_weights, {}, "weights"),
        (changed_configuration, {}, "configuration"),
        (None, {"dtype": "bfloat16"}, "dtype"),
        (None, {"attention_backend": "torch"}, "attention_backend, decoder_backend"),
        (None, {"kv_cache_page_size": 8}, "kv_cache_page_size"),
        (None, {"dtype": "bfloat16", "quantization": "int8"}, "dtype, quantization"),
    ],
)
async def test_what_is_of_something_else_is_refused(
    change: Any, changes: dict[str, Any], differs: str, kept: tuple[Path, Path]
) -> None:
    path, file = kept
    if change is not None:
        change(path)
    async with AsyncEngine(config(path, **changes)) as engine:
        with pytest.raises(PrefixCacheError, match=f"it differs in {differs}$"):
            await engine.load_prefix_cache(file)
        assert (await answered(engine)).usage.cached_tokens == 0


async def test_programs_of_another_version_keep_other_numbers(
    kept: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_blocks, "program", lambda: ("another",))
    async with AsyncEngine(config(kept[0])) as engine:
        with pytest.raises(PrefixCacheError, match="it differs in program"):
            await engine.load_prefix_cache(kept[1])


async def test_new_weights_are_not_the_checkpoint_s(kept: tuple[Path, Path]) -> None:
    path, file = kept
    async with AsyncEngine(config(path)) as engine:
        name, weight = next(iter(load_file(path / "model.safetensors").items()))
        await engine.update_weights({name: weight * 1.5})
        await answered(engine)
        for call in (engine.save_prefix_cache, engine.load_prefix_cache):
            with pytest.raises(PrefixCacheError, match="weights were replaced by update_weights"):
                await call(file)
        await engine.reload(config(path))
        assert await engine.load_prefix_cache(file) > 0


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("mamba2", {}, "states of recurrent layers are not kept"),
    ("llama", {"prefix_cache_mode": "disable"}, "prefix_cache_mode is 'disable'"),
    ("llama", {"speculative_mode": "small_draft"}, "what drafts for it has keys and values of its own"),
]


@pytest.mark.parametrize(("architecture", "changes", "message"), REFUSED, ids=[message for *_, message in REFUSED])
async def test_what_cannot_be_kept(
    architecture: str, changes: dict[str, Any], message: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    path = checkpoint(architecture)
    drafts = {"additional_models": (str(path),)} if "speculative_mode" in changes else {}
    async with AsyncEngine(config(path, **changes, **drafts)) as engine:
        with pytest.raises(PrefixCacheError, match=message):
            await engine.save_prefix_cache(tmp_path / "prefixes")


def test_weights_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until their file changes, be it by a byte and as large as before."""
    file, times = tmp_path / "model.safetensors", itertools.count(1)

    def write(content: bytes) -> None:
        file.write_bytes(content)
        os.utime(file, ns=(0, next(times)))  # a system's clock may not have moved on since

    write(b"some weights")
    first = weights_digest([file])
    opened = list[Path]()
    open_file = Path.open

    def noted(path: Path, *given: Any, **named: Any) -> Any:
        opened.append(path)
        return open_file(path, *given, **named)

    monkeypatch.setattr(Path, "open", noted)
    assert weights_digest([file]) == first and file not in opened
    write(b"some Weights")
    second = weights_digest([file])
    assert second != first and file in opened
    write(b"some weights")
    assert weights_digest([file]) == first
    assert (cache_directory() / "digests").is_dir()
    monkeypatch.setattr(kept_blocks, "cache_directory", lambda: Path(os.devnull))
    opened.clear()
    assert weights_digest([file]) == first and file in opened


def test_weights_that_are_replaced_while_they_are_read_are_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was found of the new ones is not taken for the old ones' if these come back."""
    file, aside, new = (tmp_path / name for name in ("model.safetensors", "aside", "new"))
    file.write_bytes(b"old weights")
    new.write_bytes(b"new weights")
    stamps = kept_blocks.stamps
    monkeypatch.setattr(kept_blocks, "stamps", lambda files: [each[:5] for each in stamps(files)])  # but for renaming
    opened = Path.open

    def replacing(path: Path, *given: Any, **named: Any) -> Any:
        if path == file:
            monkeypatch.setattr(Path, "open", opened)
            file.rename(aside)
            new.rename(file)
        return opened(path, *given, **named)

    monkeypatch.setattr(Path, "open", replacing)
    of_new = weights_digest([file])
    aside.rename(file)
    assert weights_digest([file]) != of_new
