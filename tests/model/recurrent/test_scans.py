"""Building the compiled code. What it computes is tested as the functions that call it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from asyncengine import EngineConfig
from asyncengine.builds import BuildError
from asyncengine.model.loader import TransformersLoader
from asyncengine.model.recurrent import compiled_functions, scans
from asyncengine.model.recurrent.scans import Scans
from asyncengine.step.model import LoadedModel

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no compiler")


def loaded(path: Path) -> LoadedModel:
    loader = TransformersLoader()
    config = EngineConfig(str(path), dtype="float32", device="cpu", max_num_sequence=2, max_total_sequence_length=128)
    model = loader.load(loader.check(config, None))
    model.model.close()
    return model


def notes_of(model: LoadedModel) -> list[str]:
    return [note for note in model.notes if note.startswith("recurrent layers: ")]


@needs_compiler
@pytest.mark.long
def test_the_code_for_any_processor_computes_the_same(
    compiled_scans: Scans, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the instructions of this one: narrower vectors, and conversions of their own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(scans, "TARGETS", ((),))
    # The branches are the same, and the compiler takes a fifth of the time.
    monkeypatch.setattr(scans, "_FLAGS", tuple("-O1" if flag == "-O3" else flag for flag in scans._FLAGS))
    plain = Scans(scans.build())
    torch.manual_seed(0)
    for dtype in scans.CODES:
        query, key, value = torch.randn(3, 2, 5, 2, 20).to(dtype)
        given, weight = torch.randn(2, 70, 9).to(dtype), torch.randn(70, 4).to(dtype)
        found = []
        for each in (plain, compiled_scans):
            delta, scan = torch.ones(2, 2, 20, 20), torch.ones(2, 2, 20, 7)
            decay, beta = -torch.ones(2, 5, 2), torch.ones(2, 5, 2) / 2
            output = torch.empty_like(value)
            each.selective_scan(
                query, beta, -torch.ones(2, 20, 7), key[..., :7], value[..., :7], scan, output, fresh=False, gate=key,
                softplus=True,
            )  # fmt: skip
            found.append(
                [
                    each.delta_rule(query, key, value, decay, beta, delta, fresh=False, normalise=True),
                    delta,
                    output,
                    scan,
                    each.convolution(given, weight, None, None, silu=True),
                ]
            )
        tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@needs_compiler
def test_it_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "stub.cpp"
    source.write_text(
        'extern "C" int delta_rule(void *) { return 1; }\n'
        'extern "C" int selective_scan(void *) { return 1; }\n'
        'extern "C" int convolution(void *) { return 1; }\n'
    )
    monkeypatch.setattr(scans, "SOURCE", source)
    said: list[str] = []
    first = scans.build(said.append)
    assert scans.build(said.append) == first
    assert len(said) == 1
    with pytest.raises(MemoryError, match="scratch"):
        Scans(first).convolution(torch.zeros(1, 1, 1), torch.zeros(1, 1), None, None, silu=False)


def test_a_library_that_cannot_be_loaded(tmp_path: Path) -> None:
    broken = tmp_path / "scans.so"
    broken.write_bytes(b"no")
    with pytest.raises(BuildError, match="cannot load"):
        Scans(broken)


def test_without_a_compiler_models_run_as_transformers_has_them(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "/nowhere/c++")
    (note,) = notes_of(loaded(checkpoint("mamba")))
    assert "/nowhere/c++" in note


@needs_compiler
def test_compiled_layers_that_compute_something_else_run_as_transformers_has_them(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        compiled_functions, "compiled", lambda _: {"mamba_selective_scan": lambda original, _: _wrong(original)}
    )
    (note,) = notes_of(loaded(checkpoint("mamba")))
    assert "does not compute" in note


def _wrong(original: Callable[..., Any]) -> Callable[..., Any]:
    def wrong(*args: Any, **kwargs: Any) -> Any:
        output, state = original(*args, **kwargs)
        return 3 - output, state

    return wrong


@needs_compiler
def test_only_models_with_recurrent_layers_are_compiled_for(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    own = scans.build
    monkeypatch.setattr(scans, "build", lambda: (asked.append(None), own())[1])
    assert not notes_of(loaded(checkpoint("llama"))) and not asked
    assert not notes_of(loaded(checkpoint("qwen3_5"))) and len(asked) == 1


@needs_compiler
def test_no_token_is_nothing_to_do() -> None:
    none = torch.empty(1, 0, 2, 8)
    state = torch.full((1, 2, 8, 8), float("nan"))
    compiled = Scans(scans.build())
    output = compiled.delta_rule(
        none, none, none, torch.empty(1, 0, 2), torch.empty(1, 0, 2), state, fresh=True, normalise=False
    )
    assert output.shape == (1, 0, 2, 8) and not state.any()
