"""The Triton back end where there is something to run it: a CUDA device, else Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from asyncengine.model.attention import fp8
from asyncengine.model.attention.protocol import LayerSpec
from asyncengine.model.attention.triton import TritonAttention, TritonCache, TritonPlan
from asyncengine.step.batch import Int64, StepBatch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def require_triton() -> None:
    """Skips the test, or the module, where the kernels can neither run nor be interpreted."""
    triton = pytest.importorskip("triton", reason="triton is not installed")
    if DEVICE.type == "cpu" and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):
        pytest.skip("the interpreter of triton < 3.7 needs numpy < 2.3", allow_module_level=True)


class TritonOnDevice(TritonAttention):
    """Takes and gives tensors on the CPU, wherever it computes."""

    def allocate(
        self, spec: LayerSpec, num_blocks: int, page_size: int, dtype: torch.dtype, device: torch.device
    ) -> TritonCache:
        return super().allocate(spec, num_blocks, page_size, dtype, DEVICE)

    def plan(self, batch: StepBatch, page_size: int, device: torch.device) -> TritonPlan:
        return super().plan(batch, page_size, DEVICE)

    def attend(
        self,
        spec: LayerSpec,
        cache: TritonCache,
        plan: TritonPlan,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        if DEVICE.type == "cpu":
            return super().attend(spec, cache, plan, query, key, value, sinks)
        there: list[Any] = [None if x is None else x.to(DEVICE) for x in (query, key, value, sinks)]
        return super().attend(spec, cache, plan, *there).cpu()

    def fill(self, cache: TritonCache, slots: Int64, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Writes what the cache holds before a step, which takes the interpreter long."""
        page_size = cache.keys.shape[2]
        at = torch.from_numpy(slots).to(DEVICE)
        for cached, given in ((cache.keys, keys), (cache.values, values)):
            numbers = fp8.movable(fp8.stored(given, cached.dtype)).to(DEVICE)
            fp8.movable(cached)[at // page_size, :, at % page_size] = numbers
