"""After which errors of CUDA a device counts as lost."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from asyncengine.model import memory
from asyncengine.model.runner import TorchModel


def error_of_cuda(code: int | None) -> torch.AcceleratorError:
    error = torch.AcceleratorError("CUDA error")
    if code is not None:
        error.error_code = code
    return error


@pytest.fixture
def model() -> TorchModel:
    model = TorchModel(torch.nn.Identity(), None, None, torch.device("cpu"))  # type: ignore[arg-type]
    model._device = torch.device("cuda")
    return model


@pytest.mark.parametrize("code", [2, 900, 901, 906, 908])
def test_memory_and_captures_of_others_do_not_mean_that_it_is_lost(
    model: TorchModel, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: pytest.fail("another thread captures"))
    assert not model.device_lost(error_of_cuda(code))
    assert not model.device_lost(torch.OutOfMemoryError("CUDA out of memory"))


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("error", [ValueError("of our own"), error_of_cuda(1), error_of_cuda(700), error_of_cuda(None)])
def test_of_any_other_error_the_device_is_asked(
    model: TorchModel, error: Exception, broken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def synchronize(device: torch.device) -> None:
        if broken:
            raise error_of_cuda(719)

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert model.device_lost(error) == broken


def test_a_model_is_let_go_on_a_device_that_is_lost(model: TorchModel, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def empty_cache() -> None:
        asked.append(memory.CAPTURES.locked())
        raise error_of_cuda(719)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)
    model._layers = SimpleNamespace(free=lambda: None)  # type: ignore[assignment]
    model.close()
    assert model._model is None and asked == [True] and not memory.CAPTURES.locked()


def test_a_cpu_is_never_lost(model: TorchModel) -> None:
    model._device = torch.device("cpu")
    assert not model.device_lost(error_of_cuda(700))
