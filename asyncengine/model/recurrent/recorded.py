"""A model's recurrent layers: what was recorded of them. Knows no transformers.

transformers has all of them keep their states in the cache that they are given (from 5.22 on, through
`get_conv_state`, `update_conv_state`, `get_recurrent_state` and `update_recurrent_state`). A dummy forward with a cache
that notes who asks for what yields, per layer, everything that is needed to keep the states of many sequences.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.nn import functional

from asyncengine.errors import UnsupportedModelError

if TYPE_CHECKING:
    from asyncengine.model.recurrent.functions import Functions

Kind = Literal["conv", "recurrent"]
Key = tuple[Kind, int, int]
"""Which state of a layer: its kind, and the numbers of layer and state by which transformers calls it."""

_CACHES = ("cache", "cache_params", "past_key_values")
"""What transformers calls the cache among the arguments of a forward."""
_KERNELS_LOG = "transformers.integrations.hub_kernels"


@dataclass(frozen=True, slots=True)
class StateSpec:
    """One state of one layer.

    Attributes:
        key: Which.
        shape: For one sequence: (channels, tokens) of a convolution, (heads, key dim, value dim) or the like else.
        dtype: None if it is the model's own.
    """

    key: Key
    shape: tuple[int, ...]
    dtype: torch.dtype | None

    def nbytes(self, dtype: torch.dtype) -> int:
        """For one sequence, of a model in a dtype."""
        count = 1
        for size in self.shape:
            count *= size
        return count * (self.dtype or dtype).itemsize


@dataclass(frozen=True, slots=True)
class CacheArgument:
    """Which argument of a forward is the cache.

    Attributes:
        name: Its name.
        position: How many come before it.
    """

    name: str
    position: int

    @classmethod
    def of(cls, module: nn.Module) -> CacheArgument | None:
        """That of a module; None if it takes no cache."""
        parameters = list(inspect.signature(module.forward).parameters)
        return next((cls(name, parameters.index(name)) for name in _CACHES if name in parameters), None)

    def put(self, args: tuple[Any, ...], kwargs: dict[str, Any], cache: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call, with another cache."""
        if self.position < len(args):
            return (*args[: self.position], cache, *args[self.position + 1 :]), kwargs
        return args, {**kwargs, self.name: cache}


@dataclass(frozen=True, slots=True)
class RecurrentSpec:
    """What a recurrent layer needs.

    Attributes:
        cache: Which of its arguments is the cache.
        states: What it keeps.
        entries: Names of those linear layers within it that take its input as it is.
        last: Name of the linear layer within it whose output is its own.
        products: Names of all linear layers within it that it calls. Of others it may read the weights.
        continues: Whether it computes several tokens at once behind others. Those of Mamba's first version begin anew
            with every call of more than one token.
    """

    cache: CacheArgument
    states: tuple[StateSpec, ...]
    entries: tuple[str, ...]
    last: str | None
    products: tuple[str, ...]
    continues: bool = True


@dataclass(frozen=True, slots=True)
class RecurrentLayer:
    """One recurrent layer in the order of execution.

    Attributes:
        name: Of the module.
        module: Itself.
        spec: What it needs.
        functions: What it calls instead of transformers' own; None is what does without a compiler.
        in_place: Whether, where it decodes, these change states where they lie among those of all sequences.
    """

    name: str
    module: nn.Module
    spec: RecurrentSpec
    functions: Functions | None = None
    in_place: bool = False


@dataclass(slots=True)
class _Call:
    """A call that is under way of a module that may turn out to be a recurrent layer."""

    module: nn.Module
    cache: CacheArgument
    given: Any
    states: dict[Key, StateSpec] = field(default_factory=dict)
    products: list[tuple[nn.Module, Any, Any]] = field(default_factory=list)


class _Recorder:
    """A cache that is empty, and notes who keeps what in it.

    Args:
        calls: Those that are under way, the innermost last.
        dtype: Of the model.
        whose: The model's name.
    """

    def __init__(self, calls: list[_Call], dtype: torch.dtype, whose: str) -> None:
        self._calls = calls
        self._dtype = dtype
        self._whose = whose

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        kind = type(self._calls[-1].module).__name__ if self._calls else "it"
        raise UnsupportedModelError(f"{self._whose}: {kind} asks its cache for {name!r}, which is not known here")

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> None:
        """There is none yet."""

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> None:
        """There is none yet."""

    def update_conv_state(
        self, conv_states: torch.Tensor, layer_idx: int, state_idx: int = 0, conv_kernel_size: int | None = None
    ) -> torch.Tensor:
        """Notes a state; returns what transformers' own cache would."""
        tokens = conv_states.shape[-1] if conv_kernel_size is None else conv_kernel_size
        self._note(("conv", layer_idx, state_idx), (*conv_states.shape[1:-1], tokens), conv_states.dtype)
        return padded(conv_states, tokens)

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **_: Any
    ) -> torch.Tensor:
        """Notes a state."""
        self._note(("recurrent", layer_idx, state_idx), tuple(recurrent_states.shape[1:]), recurrent_states.dtype)
        return recurrent_states

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """It has none."""
        return False

    def is_recording_past(self, layer_idx: int) -> bool:
        """No state is ever taken back."""
        return False

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        """Attention's part: the keys and values that there are, which are those of this call."""
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Nothing came before."""
        return 0

    def _note(self, key: Key, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self._calls[-1].states[key] = StateSpec(key, shape, None if dtype is self._dtype else dtype)


def padded(states: torch.Tensor, tokens: int) -> torch.Tensor:
    """What a convolution sees, with zeros before it where that is fewer tokens; (..., tokens) at least."""
    missing = tokens - states.shape[-1]
    return functional.pad(states, (missing, 0)) if missing > 0 else states


@contextlib.contextmanager
def recording(model: nn.Module, whose: str) -> Iterator[list[RecurrentLayer]]:
    """Notes the recurrent layers that run within the block, in order.

    Each part of a model that takes a cache is given one, though the model itself is run without: what a model does with
    a cache as a whole (masks, positions, the length so far) is not wanted here.

    Args:
        model: What is run.
        whose: Its name, for messages.

    Raises:
        UnsupportedModelError: A layer asks of its cache what is not known here.
    """
    found: list[RecurrentLayer] = []
    calls: list[_Call] = []
    recorder = _Recorder(calls, next(model.parameters()).dtype, whose)
    names = {module: name for name, module in model.named_modules()}
    caches = {
        module: cache
        for module in names
        if not hasattr(module, "get_input_embeddings") and (cache := CacheArgument.of(module)) is not None
    }

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = args[0] if args else kwargs.get("hidden_states")
        calls.append(_Call(module, caches[module], given))
        return caches[module].put(args, kwargs, recorder)

    def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        call = calls.pop()
        if call.states and call.given is None:
            raise UnsupportedModelError(f"{whose}: {names[module]} does not call its input hidden_states")
        if call.states:
            found.append(RecurrentLayer(names[module], module, _spec(call, output)))

    def multiplied(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if calls and args:
            calls[-1].products.append((module, args[0], output))

    hooks = [module.register_forward_pre_hook(enter, with_kwargs=True) for module in caches]
    hooks += [module.register_forward_hook(leave, with_kwargs=True) for module in caches]
    hooks += [module.register_forward_hook(multiplied) for module in names if hasattr(module, "in_features")]
    log = logging.getLogger(_KERNELS_LOG)
    log.addFilter(_is_no_fallback)
    try:
        yield found
    finally:
        log.removeFilter(_is_no_fallback)
        for hook in hooks:
            hook.remove()


def _is_no_fallback(record: logging.LogRecord) -> bool:
    """Says of transformers' plain functions, once in a process, that they are slow: a load says what runs instead."""
    return "is falling back to its reference" not in record.getMessage()


def _spec(call: _Call, output: Any) -> RecurrentSpec:
    names = {module: name for name, module in call.module.named_modules()}
    first = output[0] if isinstance(output, tuple) and output else output
    lasts = [names[module] for module, _, product in call.products if product is first]
    others = {module for module, given, _ in call.products if given is not call.given}
    entries = [names[module] for module, _, _ in call.products if module not in others]
    return RecurrentSpec(
        call.cache,
        tuple(call.states.values()),
        tuple(name for name in entries if name not in lasts),
        lasts[-1] if lasts and not isinstance(output, tuple) else None,
        tuple(dict.fromkeys(names[module] for module, _, _ in call.products)),
    )
