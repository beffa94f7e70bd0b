from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch
from attention_case import layer

from asyncengine import model
from asyncengine.model.attention.cpu import CpuAttention
from asyncengine.model.attention.protocol import BackendUnavailableError
from asyncengine.model.attention.reference import TorchAttention
from asyncengine.model.attention.select import select

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "/nonexistent")
    monkeypatch.setenv("PATH", "")


@pytest.mark.usefixtures("cpu_backend")
@pytest.mark.parametrize("name", ["auto", "cpu"])
def test_cpu_gets_the_kernel(name: str) -> None:
    selection = select(name, CPU)  # type: ignore[arg-type]
    assert isinstance(selection.backend, CpuAttention)
    assert selection.fallback_reason is None


def test_the_cpu_imports_nothing_of_other_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "attention", model.attention)  # the package, which is imported anew
    package = model.attention.__name__
    for name in [name for name in sys.modules if name.startswith(package)]:
        monkeypatch.delitem(sys.modules, name)
    importlib.import_module(f"{package}.select").select("torch", CPU)
    assert f"{package}.reference" in sys.modules
    assert not {f"{package}.{name}" for name in ("triton", "flashinfer", "flash_attention")} & sys.modules.keys()


@pytest.mark.usefixtures("no_compiler")
def test_auto_falls_back_to_torch_and_says_why() -> None:
    selection = select("auto", CPU)
    assert isinstance(selection.backend, TorchAttention)
    assert selection.fallback_reason is not None
    assert "/nonexistent" in selection.fallback_reason


@pytest.mark.usefixtures("no_compiler")
def test_cpu_without_a_compiler_is_an_error() -> None:
    with pytest.raises(BackendUnavailableError, match="compiler"):
        select("cpu", CPU)


def test_cpu_kernel_on_another_device_is_an_error() -> None:
    with pytest.raises(BackendUnavailableError, match="cuda"):
        select("cpu", CUDA)


def test_cuda_gets_triton_where_it_is_installed() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    for name in ("auto", "triton"):
        selection = select(name, CUDA)  # type: ignore[arg-type]
        assert selection.backend.name == "triton"
        assert selection.fallback_reason is None
    assert select("torch", CUDA).backend.name == "torch"


@pytest.fixture
def no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "asyncengine.model.attention.triton_kernels", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)


@pytest.mark.usefixtures("no_triton")
def test_cuda_without_triton_gets_torch_and_says_why() -> None:
    selection = select("auto", CUDA)
    assert selection.backend.name == "torch"
    assert selection.fallback_reason is not None
    assert "triton cannot be imported" in selection.fallback_reason
    with pytest.raises(BackendUnavailableError, match="triton cannot be imported"):
        select("triton", CUDA)


def test_triton_on_the_cpu_is_an_error() -> None:
    with pytest.raises(BackendUnavailableError, match="needs a CUDA device, not cpu"):
        select("triton", CPU)


def test_other_devices_get_torch() -> None:
    selection = select("auto", torch.device("mps"))
    assert selection.backend.name == "torch"
    assert selection.fallback_reason == "there is no faster back end for mps yet"


def test_unknown_name_is_an_error() -> None:
    with pytest.raises(BackendUnavailableError, match="flash"):
        select("flash", CPU)  # type: ignore[arg-type]


def test_kernel_refuses_what_it_cannot_store(cpu_backend: CpuAttention) -> None:
    with pytest.raises(BackendUnavailableError, match="float64"):
        cpu_backend.allocate(layer(), 1, 16, torch.float64, CPU)
    with pytest.raises(BackendUnavailableError, match="cuda"):
        cpu_backend.allocate(layer(), 1, 16, torch.float32, CUDA)
    with pytest.raises(BackendUnavailableError, match="-1"):
        cpu_backend.allocate(layer(scaling=-1.0), 1, 16, torch.float32, CPU)
