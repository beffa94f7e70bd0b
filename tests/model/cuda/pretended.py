"""A CUDA device that is pretended: its tensors lie in host memory, and what a device would not stand for is an error.

`torch.cuda` and everything that makes a tensor on ``"cuda"`` are replaced while `pretended` lasts, so the code under
test takes the paths that it takes on a device: pinned memory, streams and events, CUDA graphs, Triton's kernels (in its
interpreter). Held against it:

* operators that mix tensors of host and device;
* waits for the device (`Pretended.waits` names them, `no_waits` forbids them), and anything that a capture forbids;
* what one stream reads or writes while another may still be at it: each stream, event and the host has a vector clock,
  each storage remembers who touched it last;
* copies to the host that somebody looks at before they are done: the host's side is garbage until then;
* pinned memory that is written again while a copy out of it may be under way;
* memory that nobody has written: it is not a number;
* graphs: a capture computes nothing, a replay computes it again in the same places, and what nobody holds of a graph's
  memory is garbage after it; a capture that breaks off leaves behind what torch 2.11 leaves behind; a pool of memory
  whose graphs are gone takes no others, as long as somebody holds something of it.

What it cannot know: what a kernel does on a device, how long it takes, and what the allocator of CUDA memory does.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import threading
import time
import types
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from asyncengine import builds
from asyncengine.model import graph_recorder

aten = torch.ops.aten
PLACE = torch.device("cuda", 0)
TOTAL = 8 << 30
_WAITING = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.is_nonzero.default,
    aten.equal.default, aten.unique_dim.default, aten._unique2.default, aten.repeat_interleave.Tensor,
    aten.unique_consecutive.default, aten.bincount.default,
}  # fmt: skip
_INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
_SENT = {  # operators that name a device among their arguments, or ask about it
    aten.to.device, aten.to.dtype_layout, aten.is_pinned.default, aten.pin_memory.default, aten._pin_memory.default,
}  # fmt: skip
_PRODUCTS = {aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default, aten.mv.default}

_RANDOM = tuple(
    f"aten.{name}"
    for name in ("normal", "uniform", "rand", "bernoulli", "multinomial", "exponential", "native_dropout")
)

Clock = dict[int, int]


def _merge(into: Clock, other: Clock) -> None:
    for stream, moment in other.items():
        if into.get(stream, 0) < moment:
            into[stream] = moment


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _leaves(given: Any, into: list[Any]) -> list[Any]:
    """What an operator's arguments are made of. As `tree_flatten`, which takes longer."""
    for one in given.values() if type(given) is dict else given:
        if isinstance(one, (tuple, list, dict)):
            _leaves(one, into)
        else:
            into.append(one)
    return into


def _mapped(function: Callable[[Any], Any], given: Any) -> Any:
    """The same with each leaf replaced. As torch's `tree_map`."""
    if isinstance(given, (tuple, list)):
        values = [_mapped(function, one) for one in given]
        return type(given)(*values) if hasattr(given, "_fields") else type(given)(values)
    if isinstance(given, dict):
        return {name: _mapped(function, one) for name, one in given.items()}
    return function(given)


def _held(one: Any) -> Any:
    return one.held if isinstance(one, OnDevice) else one


@functools.cache
def _decomposes(func: Any) -> bool:
    return bool(func._can_decompose()) and func not in _WAITING


def _garbage(tensor: torch.Tensor) -> None:
    """Fills memory with what nobody could take for a result."""
    if tensor.is_floating_point():
        if tensor.element_size() == 1:
            tensor.view(torch.uint8).fill_(0x7F)
        else:
            tensor.fill_(float("nan"))
    elif tensor.dtype is torch.bool:
        tensor.fill_(True)
    elif tensor.numel():
        tensor.fill_(torch.iinfo(tensor.dtype).max // 3)


class OnDevice(torch.Tensor):
    """A tensor of the device. `held` is what it is made of."""

    held: torch.Tensor
    share: _Share

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> OnDevice:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined,no-any-return]
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=PLACE
        )

    def __init__(self, held: torch.Tensor) -> None:
        self.held = held

    def __repr__(self, **_: Any) -> str:
        return f"OnDevice({self.held})"

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def untyped_storage(self) -> Any:
        return self.held.untyped_storage()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        copied = self.detach().clone()
        if isinstance(self, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied, requires_grad=self.requires_grad)
        memo[id(self)] = copied
        return copied

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert Pretended.present is not None, f"{func} on a device that is gone"
        return Pretended.present.run(func, args, kwargs or {})

    __torch_function__ = torch._C._disabled_torch_function_impl


class _Share:
    """A tensor's share in its storage. It goes with the tensor, which weak references would keep from being swapped."""

    def __init__(self, device: Pretended, address: int, size: list[int]) -> None:
        self._device, self._address, self._size = device, address, size

    def __del__(self) -> None:
        self._size[0] -= 1
        if self._size[0] == 0 and self._device._sizes.get(self._address) is self._size:
            del self._device._sizes[self._address]
            self._device.allocated -= self._size[1]


class _Mode(TorchDispatchMode):
    """Sees what makes tensors of the device, on one thread."""

    def __init__(self, device: Pretended) -> None:
        super().__init__()
        self._pretended = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not types and func not in _SENT and not kwargs.get("pin_memory"):
            device = kwargs.get("device")
            if device is None or torch.device(device).type != "cuda":  # nothing of the device, and nothing for it
                return func(*args, **kwargs)
        return self._pretended.run(func, args, kwargs)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here, and what keeps torch from trying takes as long as many an operator."""
        return False


class Stream:
    """As `torch.cuda.Stream`."""

    def __init__(self, device: Any = None, priority: int = 0, **_: Any) -> None:
        self.owner = Pretended.present
        assert self.owner is not None
        self.number = self.owner.next_stream()
        self.clock: Clock = {}
        self.cuda_stream = self.number

    def wait_event(self, event: Event) -> None:
        _merge(self.clock, event.clock)

    def wait_stream(self, stream: Stream) -> None:
        _merge(self.clock, stream.clock)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        assert self.owner is not None
        self.owner.wait("Stream.synchronize", self.clock)


class Event:
    """As `torch.cuda.Event`."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, **_: Any) -> None:
        self.clock: Clock = {}
        self._at = 0.0
        self._timed = enable_timing

    def record(self, stream: Stream | None = None) -> None:
        device = Pretended.present
        assert device is not None
        self.clock = dict((stream or device.stream).clock)
        self._at = time.perf_counter()

    def synchronize(self) -> None:
        assert Pretended.present is not None
        Pretended.present.wait("Event.synchronize", self.clock)

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Event) -> float:
        assert self._timed and other._timed
        return (other._at - self._at) * 1e3


@dataclasses.dataclass
class _Touched:
    """Who touched a storage last.

    Attributes:
        written: Stream and moment.
        read: The last moment of each stream.
    """

    written: tuple[int, int]
    read: Clock = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class _ToHost:
    """A copy that is under way: what it reads, what that was, and where it goes."""

    stream: int
    moment: int
    source: torch.Tensor
    contents: torch.Tensor
    host: torch.Tensor


@dataclasses.dataclass
class _FromHost:
    """A copy out of pinned memory that may be under way: where from, and what was there."""

    stream: int
    moment: int
    source: torch.Tensor
    contents: torch.Tensor


@dataclasses.dataclass
class _Taped:
    function: Callable[..., Any]
    arguments: Any
    outputs: list[torch.Tensor]
    reads: list[torch.Tensor]
    writes: list[torch.Tensor]


class CUDAGraph:
    """As `torch.cuda.CUDAGraph`."""

    def __init__(self, keep_graph: bool = False) -> None:
        self.tape: list[_Taped] | None = None
        self.pool: _Pool | None = None

    def replay(self) -> None:
        assert Pretended.present is not None and self.tape is not None
        Pretended.present.replay(self)

    def reset(self) -> None:
        self.tape = None
        if self.pool is not None:
            self.pool.graphs -= 1
            self.pool = None

    __del__ = reset


class _Pool:
    """What captures share.

    Attributes:
        graphs: How many there are.
        held: What was made in captures: each storage's number of tensors, and its size.
    """

    def __init__(self) -> None:
        self.graphs = 0
        self.held: list[list[int]] = []

    def enter(self) -> None:
        """A graph more. It is as in torch: what is left of graphs that are gone is given back, if nobody holds it."""
        self.held = [size for size in self.held if size[0] > 0]
        if self.held and not self.graphs:
            raise RuntimeError("it->second->use_count > 0 INTERNAL ASSERT FAILED")
        self.graphs += 1


class Pretended:
    """The device.

    Attributes:
        multiplied: The streams on which products were made: cuBLAS keeps memory for each.
        waits: How often the host waited for it, by what for.
        replays: How often a graph was replayed.
        launches: Operators and kernels that were launched, one by one.
        kernels: Those of Triton among them, by name.
    """

    present: Pretended | None = None

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.waits: Counter[str] = Counter()
        self.replays = 0
        self.launches = 0
        self.kernels: Counter[str] = Counter()
        self.multiplied: set[int] = set()
        self._streams = 0
        self._moment = 0
        self._host: Clock = {}
        self._touched: dict[int, _Touched] = {}
        self._pinned: set[int] = set()
        self._pending: list[_ToHost | _FromHost] = []
        self._sizes: dict[int, list[int]] = {}
        self.allocated = self.peak = 0
        self._here = threading.local()
        self._capturing: dict[int, tuple[CUDAGraph, list[tuple[torch.Tensor, torch.Tensor]]]] = {}
        self.default_stream: Stream | None = None
        self._invalid = self._generator_captures = False
        self.captures_underway = 0

    # Streams and time

    def next_stream(self) -> int:
        self._streams += 1
        return self._streams

    @property
    def stream(self) -> Stream:
        """The present one of this thread."""
        if self.default_stream is None:
            self.default_stream = Stream()
        return getattr(self._here, "stream", None) or self.default_stream

    @property
    def tape(self) -> list[_Taped] | None:
        """What this thread captures."""
        capturing = self._capturing.get(threading.get_ident())
        return None if capturing is None else capturing[0].tape

    @contextlib.contextmanager
    def on(self, stream: Stream | None) -> Iterator[None]:
        before = getattr(self._here, "stream", None)
        self._here.stream = stream if stream is not None else before
        try:
            yield
        finally:
            self._here.stream = before

    def set_stream(self, stream: Stream) -> None:
        self._here.stream = stream

    def end_allocate(self, *_: Any) -> None:
        """As torch's own function of that name."""
        if not self.captures_underway:
            raise RuntimeError("not currently recording")
        self.captures_underway -= 1

    def wait(self, what: str, clock: Clock | None = None) -> None:
        """The host waits for everything, or for what a clock has seen."""
        self._not_captured(what)
        if what not in getattr(self._here, "allowed", {what}):
            raise AssertionError(f"waits for the device: {what}")
        with self.lock, torch.inference_mode():
            self.waits[what] += 1
            clock = {number: self._moment for number in range(1, self._streams + 1)} if clock is None else clock
            _merge(self._host, clock)
            left = []
            for copy in self._pending:
                if clock.get(copy.stream, 0) < copy.moment:
                    left.append(copy)
                    continue
                if not _same(copy.source, copy.contents):
                    raise AssertionError(f"written while a copy out of it was under way: {copy.source.shape}")
                if isinstance(copy, _ToHost):
                    copy.host.copy_(copy.contents)
            self._pending = left

    def _not_captured(self, what: str) -> None:
        if self.tape is not None:
            self._invalid = True
            raise RuntimeError(f"{what} during a capture")

    @contextlib.contextmanager
    def no_waits(self, but: str = "") -> Iterator[None]:
        """Makes each wait of this thread an error, except for one thing."""
        self._here.allowed = {but}
        try:
            yield
        finally:
            del self._here.allowed

    def _tick(self, reads: list[torch.Tensor], writes: list[torch.Tensor], made: list[torch.Tensor]) -> int:
        """Notes that the present stream touches storages; complains if another may be at them."""
        self._moment += 1
        stream, moment = self.stream, self._moment
        _merge(stream.clock, self._host)
        clock = stream.clock
        for tensor in (*reads, *writes):
            touched = self._touched.get(_address(tensor))
            if touched is not None and clock.get(touched.written[0], 0) < touched.written[1]:
                raise AssertionError(f"stream {stream.number} touches what stream {touched.written[0]} may yet write")
        for tensor in writes:
            touched = self._touched.get(_address(tensor))
            for other, read in {} if touched is None else touched.read.items():
                if clock.get(other, 0) < read:
                    raise AssertionError(f"stream {stream.number} writes what stream {other} may yet read")
        clock[stream.number] = moment
        for tensor in reads:
            if (touched := self._touched.get(_address(tensor))) is not None:
                touched.read[stream.number] = moment
        for tensor in (*writes, *made):
            self._touched[_address(tensor)] = _Touched((stream.number, moment))
        return moment

    # Tensors

    def wrapped(self, held: torch.Tensor) -> OnDevice:
        """A tensor of the device."""
        with torch.inference_mode(False):  # a view of what was made outside must be so, too
            tensor = OnDevice(held)
        size = self._sizes.get(_address(held))
        if size is None:
            size = self._sizes[_address(held)] = [0, held.untyped_storage().nbytes()]
            capturing = self._capturing.get(threading.get_ident())
            if capturing is not None and capturing[0].pool is not None:
                capturing[0].pool.held.append(size)
            self.allocated += size[1]
            self.peak = max(self.peak, self.allocated)
        size[0] += 1
        tensor.share = _Share(self, _address(held), size)
        return tensor

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """An operator, on the host or on the device."""
        flat = _leaves((args, kwargs), [])
        there = any(isinstance(one, OnDevice) for one in flat)
        device = kwargs.get("device")
        wanted = None if device is None else torch.device(device).type
        if wanted is None and func in (aten.to.device, aten.to.dtype_layout):
            wanted = next((one.type for one in flat if isinstance(one, torch.device)), None)
        pinned = bool(kwargs.get("pin_memory")) or func in (aten._pin_memory.default, aten.pin_memory.default)
        if not there and wanted != "cuda" and not pinned:
            if func is aten.is_pinned.default:
                return _address(args[0]) in self._pinned
            return func(*args, **kwargs)
        if not pinned and _decomposes(func):
            with _Mode(self):
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        with self.lock:
            if pinned:
                return self._pin(func, args, kwargs)
            return self._run(func, args, kwargs, flat, wanted)

    def _pin(self, func: Any, args: Any, kwargs: dict[str, Any]) -> torch.Tensor:
        self._not_captured("pinning memory")
        if "pin_memory" in kwargs:
            result = func(*args, **{**kwargs, "pin_memory": False})
            _garbage(result)
        else:
            assert not isinstance(args[0], OnDevice)
            result = args[0].clone(memory_format=torch.contiguous_format)
        self._pinned.add(_address(result))
        return result

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any], flat: list[Any], wanted: str | None) -> Any:
        if func is aten.copy_.default and not (isinstance(args[0], OnDevice) and isinstance(args[1], OnDevice)):
            non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
            return self._cross(args[0], args[1], non_blocking)
        if func is aten._to_copy.default and wanted is not None and (wanted == "cuda") != isinstance(args[0], OnDevice):
            return self._moved(args[0], kwargs, wanted)
        name = str(func)
        masks = func in _INDEXED and any(one is not None and one.dtype in (torch.bool, torch.uint8) for one in args[1])
        if func in _WAITING or masks:
            self.wait(name)
        for one in flat:
            if isinstance(one, torch.Tensor) and not isinstance(one, OnDevice) and (one.dim() or func in _INDEXED):
                raise RuntimeError(f"{name}: tensors on cuda and on the host, {tuple(one.shape)} of {one.dtype}")
        if func in _PRODUCTS:
            if not args[0].is_floating_point():
                raise RuntimeError(f"{name} of integers")
            self.multiplied.add(self.stream.number)
        if name.startswith(_RANDOM) and self._generator_captures and self.tape is None:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")
        if func is aten._local_scalar_dense.default:
            return args[0].held.item()
        inner_args, inner_kwargs = _mapped(_held, args), _mapped(_held, kwargs)
        if inner_kwargs.get("device") is not None:
            inner_kwargs["device"] = "cpu"
        mutated = self._mutated(func, inner_args, inner_kwargs)
        self._remember(mutated)
        result = self._computed(func, inner_args, inner_kwargs)
        outputs = [one for one in _leaves((result,), []) if isinstance(one, torch.Tensor)]
        ours = {_address(one.held) for one in flat if isinstance(one, OnDevice)}
        made = [one for one in outputs if _address(one) not in ours or one.numel() == 0]
        if name.startswith(("aten.empty", "aten.new_empty")):
            for one in made:
                _garbage(one)
        reads = [one.held for one in flat if isinstance(one, OnDevice)]
        if made or mutated or not outputs:
            self._launched(func, (inner_args, inner_kwargs), made, reads, mutated)
        same = {id(one.held): one for one in flat if isinstance(one, OnDevice)}

        def ours_of(one: Any) -> Any:
            if not isinstance(one, torch.Tensor):
                return one
            return same[id(one)] if id(one) in same else self.wrapped(one)

        return _mapped(ours_of, result)

    @staticmethod
    def _computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if func is aten._scaled_mm.default:
            return _scaled(*args, **kwargs)
        if func is aten.histc.default and not args[0].is_floating_point():  # the host's is of real numbers alone
            return func(args[0].float(), *args[1:], **kwargs).to(args[0].dtype)
        return func(*args, **kwargs)

    def _launched(
        self, function: Any, arguments: Any, made: list[torch.Tensor], reads: list[torch.Tensor], writes: Any
    ) -> None:
        if (tape := self.tape) is not None:
            tape.append(_Taped(function, arguments, made, reads, writes))
            return
        self.launches += 1
        self._tick(reads, writes, made)

    @staticmethod
    def _mutated(func: Any, args: Any, kwargs: dict[str, Any]) -> list[torch.Tensor]:
        found = []
        for number, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            value = args[number] if number < len(args) else kwargs.get(argument.name)
            found += [one for one in _leaves((value,), []) if isinstance(one, torch.Tensor)]
        return found

    def _remember(self, written: list[torch.Tensor]) -> None:
        """A capture computes nothing: what was there before comes back."""
        capturing = self._capturing.get(threading.get_ident())
        if capturing is not None:
            capturing[1].extend((one, one.clone()) for one in written)

    # Copies

    def _moved(self, source: torch.Tensor, kwargs: dict[str, Any], wanted: str) -> torch.Tensor:
        dtype = kwargs.get("dtype") or source.dtype
        if wanted == "cuda":
            held = torch.empty_like(source, dtype=dtype)
            target: torch.Tensor = self.wrapped(held)
            self._touched[_address(held)] = _Touched((self.stream.number, 0))
        else:
            assert isinstance(source, OnDevice)
            target = torch.empty_like(source.held, dtype=dtype, device="cpu")
        return self._cross(target, source, bool(kwargs.get("non_blocking")))

    def _cross(self, target: torch.Tensor, source: torch.Tensor, non_blocking: bool) -> torch.Tensor:
        self._not_captured("a copy between host and device")
        if isinstance(target, OnDevice):
            queued = non_blocking and _address(source) in self._pinned
            if target.numel() and source.dim() and not queued:
                self.wait("copy from pageable memory" if non_blocking else "copy to the device")
            target.held.copy_(source)
            self.launches += 1
            moment = self._tick([], [target.held], [])
            if queued:
                self._pending.append(_FromHost(self.stream.number, moment, source, source.clone()))
            return target
        assert isinstance(source, OnDevice)
        self.launches += 1
        moment = self._tick([source.held], [], [])
        if non_blocking and _address(target) in self._pinned:
            copy = _ToHost(self.stream.number, moment, source.held, source.held.clone(), target)
            self._pending.append(copy)
            _garbage(target)
        else:
            self.wait("copy to the host")
            target.copy_(source.held)
        return target

    # Kernels and graphs

    def kernel(self, name: str, call: Callable[..., Any], args: Any, kwargs: Any) -> None:
        """Triton launches a kernel: nobody knows which of its tensors it writes."""
        if "WIDEN" in kwargs:  # the interpreter cannot multiply bfloat16
            kwargs = {**kwargs, "WIDEN": True}
        for one in _leaves((args, kwargs), []):
            if isinstance(one, torch.Tensor) and not isinstance(one, OnDevice):
                raise ValueError(f"{name}: a tensor of the host, {tuple(one.shape)}")
        given = _mapped(_held, args), _mapped(_held, kwargs)
        with self.lock, _disable_current_modes():
            tensors = [one for one in _leaves(given, []) if isinstance(one, torch.Tensor)]
            if self.tape is None:
                call(*given[0], **given[1])
            self.kernels[name] += 1
            self._launched(call, given, [], tensors, tensors)

    def begin_capture(self, graph: CUDAGraph, pool: _Pool | None) -> None:
        if self._capturing:
            raise RuntimeError("two captures at once")
        if pool is not None:
            pool.enter()
        graph.tape, graph.pool = [], pool
        self._generator_captures = True
        self._capturing[threading.get_ident()] = (graph, [])

    def end_capture(self) -> None:
        graph, before = self._capturing.pop(threading.get_ident())
        assert graph.tape is not None
        with torch.inference_mode():
            for tensor, contents in reversed(before):
                tensor.copy_(contents)
            for taped in graph.tape:
                for one in taped.outputs:
                    _garbage(one)
        if self._invalid:
            self._invalid, graph.pool = False, None  # nothing of it is given back
            self.captures_underway += 1  # until somebody ends it
            raise RuntimeError("operation failed due to a previous error during capture")
        self._generator_captures = False

    def replay(self, graph: CUDAGraph) -> None:
        """Launches what was captured."""
        self._not_captured("a replay")
        assert graph.tape is not None
        with self.lock, _disable_current_modes(), torch.inference_mode():
            self.replays += 1
            for taped in graph.tape:
                args, kwargs = taped.arguments
                result = self._computed(taped.function, args, kwargs)
                known = {_address(one) for one in taped.reads}
                fresh = [
                    one
                    for one in _leaves((result,), [])
                    if isinstance(one, torch.Tensor) and (_address(one) not in known or one.numel() == 0)
                ]
                for place, value in zip(taped.outputs, fresh, strict=True):
                    place.copy_(value)
                self._tick(taped.reads, taped.writes, taped.outputs)
            for taped in graph.tape:
                for one in taped.outputs:
                    if _address(one) not in self._sizes:
                        _garbage(one)


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool(
        np.array_equal(
            one.detach().contiguous().view(-1).view(torch.uint8).numpy(),
            other.detach().contiguous().view(-1).view(torch.uint8).numpy(),
        )
    )


def _scaled(
    a: torch.Tensor,
    b: torch.Tensor,
    scale_a: torch.Tensor,
    scale_b: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale_result: None = None,
    out_dtype: torch.dtype | None = None,
    use_fast_accum: bool = False,
) -> torch.Tensor:
    """As `torch._scaled_mm` by rows, and held to what that asks for on CUDA; torch 2.11 has none for the host."""
    assert a.dtype is b.dtype is torch.float8_e4m3fn and out_dtype is torch.bfloat16
    assert a.stride(1) == 1 and b.stride(0) == 1 and not any(size % 16 for size in (*b.shape, a.stride(0)))
    assert scale_a.shape == (len(a), 1) and scale_b.shape == (1, b.shape[1])
    assert all(each.dtype is torch.float32 and each.is_contiguous() for each in (scale_a, scale_b))
    assert bias is None or (bias.dtype is out_dtype and bias.is_contiguous())
    found = (a.float() @ b.float()) * scale_a * scale_b
    return (found if bias is None else found + bias).to(out_dtype)


class _Graph:
    """As `torch.cuda.graph`."""

    def __init__(
        self, cuda_graph: CUDAGraph, pool: Any = None, stream: Stream | None = None, capture_error_mode: str = "global"
    ) -> None:
        self._graph, self._pool, self._stream = cuda_graph, pool, stream
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> None:
        device = Pretended.present
        assert device is not None
        device.wait("a capture begins")
        self._stack.enter_context(device.on(self._stream))
        device.begin_capture(self._graph, self._pool)

    def __exit__(self, *error: Any) -> None:
        assert Pretended.present is not None
        Pretended.present.end_capture()  # what it raises keeps the stream, as in torch
        self._stack.close()


@functools.cache
def _guard() -> None:
    """Makes torch believe that a device is present, for the rest of the process; what runs on it is ours to say."""
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    home = Path(torch.__file__).parent
    recipe = builds.Recipe(
        "the guard of a device", "guard", (Path(__file__).with_name("guard.cpp"),),
        ("-O0", "-std=c++20", "-shared", "-fPIC", f"-I{home / 'include'}", f"-L{home / 'lib'}"), after=("-lc10",),
    )  # fmt: skip
    try:
        library = builds.build(recipe, builds.find_compiler())
    except builds.BuildError as error:
        pytest.skip(str(error))
    ctypes.CDLL(str(library)).guard_cuda()


@contextlib.contextmanager
def pretended() -> Iterator[Pretended]:
    """Pretends a device for whatever runs meanwhile, on threads that begin meanwhile as well."""
    import triton.runtime.interpreter as interpreter

    _guard()
    device = Pretended()
    patch = pytest.MonkeyPatch()
    Pretended.present = device
    cuda = torch.cuda
    properties = types.SimpleNamespace(
        name="Pretended", major=9, minor=0, multi_processor_count=1, total_memory=TOTAL, L2_cache_size=50 << 20,
        shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472, warp_size=32,
    )  # fmt: skip
    replaced = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda *_: "Pretended",
        "get_device_capability": lambda *_: (9, 0),
        "get_device_properties": lambda *_: properties,
        "mem_get_info": lambda *_: (TOTAL - device.allocated, TOTAL),
        "memory_allocated": lambda *_: device.allocated,
        "memory_reserved": lambda *_: device.allocated,
        "max_memory_allocated": lambda *_: device.peak,
        "reset_peak_memory_stats": lambda *_: setattr(device, "peak", device.allocated),
        "empty_cache": lambda: None,
        "_sleep": lambda cycles: None,
        "synchronize": lambda *_: device.wait("synchronize"),
        "current_stream": lambda *_: device.stream,
        "default_stream": lambda *_: device.default_stream,
        "stream": device.on,
        "set_stream": device.set_stream,
        "device": lambda *_: contextlib.nullcontext(),
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": CUDAGraph,
        "graph": _Graph,
        "graph_pool_handle": _Pool,
        "is_current_stream_capturing": lambda: device.tape is not None,
    }
    for name, replacement in replaced.items():
        patch.setattr(cuda, name, replacement)
    patch.setattr(torch._C, "_cuda_endAllocateToPool", device.end_allocate, raising=False)
    patch.setattr(graph_recorder, "_STREAMS", defaultdict(list))
    _device_constructors()  # keeps the functions that it finds
    on_host = torch.tensor

    def tensor(data: Any, *, device: Any = None, **options: Any) -> torch.Tensor:
        """torch makes it where nobody is asked, and moves it."""
        if isinstance(data, list):
            data = [each.item() if isinstance(each, torch.Tensor) else each for each in data]
        return on_host(data, device="cpu", **options).to(torch.empty(0).device if device is None else device)

    patch.setattr(torch, "tensor", tensor)
    launch = interpreter.GridExecutor.__call__

    def launched(executor: Any, *args: Any, **kwargs: Any) -> None:
        if not any(isinstance(one, OnDevice) for one in _leaves((args, kwargs), [])):
            launch(executor, *args, **kwargs)
            return
        device.kernel(executor.fn.__name__, lambda *a, **k: launch(executor, *a, **k), args, kwargs)

    patch.setattr(interpreter.GridExecutor, "__call__", launched)
    begin = threading.Thread.run

    def run(thread: threading.Thread) -> None:
        with _Mode(device):
            begin(thread)

    patch.setattr(threading.Thread, "run", run)
    try:
        torch.__future__.set_swap_module_params_on_conversion(True)
        with _Mode(device):
            yield device
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
        patch.undo()
        Pretended.present = None
