"""Linear layers of short numbers, multiplied in float32."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from asyncengine.model import widened
from asyncengine.model.widened import WidenedLinears, is_faster


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_are_exact_and_rounded_once(dtype: torch.dtype, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(widened, "_PIECE", 100)  # several pieces, the last one smaller
    torch.manual_seed(0)
    layer = nn.Linear(48, 23, bias=bias, dtype=dtype)
    x = torch.randn(2, 5, 48).to(dtype)
    with torch.inference_mode(), WidenedLinears():
        found = layer(x)
    exact = x.double() @ layer.weight.double().T + (layer.bias.double() if bias else 0.0)
    assert found.dtype is dtype
    torch.testing.assert_close(found, exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_float32_goes_through_torch_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(widened, "_linear", None)
    layer, x = nn.Linear(16, 4, dtype=torch.float32), torch.randn(3, 16, dtype=torch.float32)
    with torch.inference_mode():
        with WidenedLinears():
            found = layer(x)
        assert torch.equal(found, layer(x))


@pytest.mark.parametrize(("capability", "faster"), [("AVX2", True), ("DEFAULT", True), ("AVX512", False)])
def test_processors_with_kernels_of_their_own_keep_them(
    capability: str, faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert is_faster(torch.device("cpu")) is faster
    assert not is_faster(torch.device("cuda"))
