"""The Triton back end where there is something to run it: a CUDA device, else Triton's interpreter."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from typing import Any

import numpy as np
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
        if _version(triton) < (3, 7) and _version(np) >= (2, 3):
            pytest.skip("the interpreter of triton < 3.7 needs numpy < 2.3", allow_module_level=True)
        _quicken()


def _version(package: Any) -> tuple[int, ...]:
    return tuple(map(int, package.__version__.split(".")[:2]))


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

    def replace_builtin(place: Any, name: str, builtin: Any, _: Any, scope: Any) -> None:
        while language.core.is_builtin(builtin) and hasattr(builtin, "__wrapped__"):
            builtin = builtin.__wrapped__  # out of what asks whether it is compiled

        def call(*args: Any, **kwargs: Any) -> Any:
            kwargs["_semantic"] = interpreter.interpreter_semantic
            return builtin(*args, **kwargs)

        scope.set_attr(place, name, call)

    interpreter._patch_lang, interpreter._get_np_dtype = replace_once, found
    interpreter._patch_attr = replace_builtin
    _sanitise(interpreter.interpreter_builder, False)
    _quicken_bfloat16(interpreter, language)
    _quicken_types(language.core, interpreter.interpreter_semantic)


def _quicken_bfloat16(interpreter: Any, language: Any) -> None:
    """A number in bfloat16 is the upper half of one in float32; the interpreter takes both apart to convert them."""
    convert, narrow, wide = interpreter._convert_float, language.bfloat16, language.float32

    def converted(given: Any, one: Any, other: Any, rounding: Any) -> Any:
        if rounding is None and one == narrow and other == wide:
            return np.asarray(given.view(np.uint16).astype(np.uint32) << 16)
        if rounding is None and one == wide and other == narrow:
            return np.asarray((given.view(np.uint32) >> 16).astype(np.uint16))
        return convert(given, one, other, rounding)

    interpreter._convert_float = converted


def _quicken_types(core: Any, semantic: Any) -> None:
    """Shapes, and what two types make together, are worked out once for all values that have them."""
    unwrap, check, broadcast = core._unwrap_if_constexpr, core.block_type.__init__, semantic.broadcast_impl_value
    combine = functools.cache(semantic.computation_type_impl)
    plain: dict[type, bool] = {}  # by type: nothing to unwrap in it
    shapes: dict[tuple[int, ...], tuple[Any, Any, Any]] = {}

    def unwrapped(value: Any) -> Any:
        kind = type(value)
        if kind is core.constexpr:
            return value.value
        if kind not in plain:
            plain[kind] = not issubclass(kind, (list, tuple, core.tuple, core.constexpr))
        return value if plain[kind] else unwrap(value)

    def of_block(self: Any, element_ty: Any, shape: Any) -> None:
        key = tuple([unwrapped(size) for size in shape])
        if key not in shapes:
            check(self, element_ty, shape)
            sizes = core.tuple([core.constexpr(size) for size in key])
            shapes[key] = self.shape, self.numel, (sizes, core.constexpr(self.numel))
        self.element_ty = element_ty
        self.shape, self.numel, self.of_values = shapes[key]

    scalar = core.tuple([]), core.constexpr(1)

    def of_value(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = type.of_values if isinstance(type, core.block_type) else scalar

    def broadcast_values(left: Any, right: Any) -> Any:
        one, other = left.type, right.type
        if one.is_block() and other.is_block() and one.shape is other.shape:
            return left, right
        return broadcast(left, right)

    core._unwrap_if_constexpr = unwrapped
    core.block_type.__init__, core.tensor.__init__ = of_block, of_value
    core.block_type.name = property(lambda self: f"<{self.shape}, {self.element_ty}>", lambda self, name: None)
    semantic.broadcast_impl_value = broadcast_values
    semantic.computation_type_impl = combine


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
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if DEVICE.type == "cpu":
            return super().attend(spec, cache, plan, query, key, value, sinks, bias)
        there: list[Any] = [None if x is None else x.to(DEVICE) for x in (query, key, value, sinks, bias)]
        return super().attend(spec, cache, plan, *there).cpu()

    def fill(self, cache: TritonCache, slots: Int64, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Writes what the cache holds before a step, which takes the interpreter long."""
        page_size = cache.keys.shape[2]
        at = torch.from_numpy(slots).to(DEVICE)
        for cached, given in ((cache.keys, keys), (cache.values, values)):
            numbers = fp8.movable(fp8.stored(given, cached.dtype)).to(DEVICE)
            fp8.movable(cached)[at // page_size, :, at % page_size] = numbers
