"""The Triton back end where there is something to run it: a CUDA device, else Triton's interpreter."""

from __future__ import annotations

import dataclasses
import functools
import importlib
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
    if DEVICE.type == "cpu":
        if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):
            pytest.skip("the interpreter of triton < 3.7 needs numpy < 2.3", allow_module_level=True)
        _quicken()


def _quicken() -> None:
    """Lets the interpreter do once what it would do again and again, which is a third of its time.

    Whenever a function is called, by a launch or by another function, it goes through all of Triton's language and puts
    what computes with numpy in the place of what compiles. Here it does so for each function once, and leaves it there.
    Nor does it compute each index in 64 bits beside, as a kernel in a debugger would: see `watch_overflows`.
    """
    interpreter = importlib.import_module("triton.runtime.interpreter")
    language = importlib.import_module("triton.language")
    if not hasattr(interpreter, "_LangPatchScope") or hasattr(interpreter._patch_lang, "cache_info"):
        return
    replace, find = interpreter._patch_lang, interpreter._get_np_dtype

    @functools.cache
    def replace_once(function: Any) -> Any:
        replace(function)
        return interpreter._LangPatchScope()  # in which nothing was replaced: nothing is put back

    known = functools.cache(find)

    def found(dtype: Any) -> Any:
        scalar = dtype.element_ty if isinstance(dtype, language.block_type) else dtype
        return find(scalar) if isinstance(scalar, language.pointer_type) else known(scalar)

    interpreter._patch_lang, interpreter._get_np_dtype = replace_once, found
    _sanitise(interpreter.interpreter_builder, False)


def _sanitise(builder: Any, overflows: bool) -> None:
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=overflows)


def watch_overflows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the interpreter fail where an index does not fit: for cases that are large enough."""
    if DEVICE.type == "cpu":
        builder = importlib.import_module("triton.runtime.interpreter").interpreter_builder
        monkeypatch.setattr(builder, "options", builder.options)  # which is put back
        _sanitise(builder, True)


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
