"""The states of an engine and what each instruction does to them, as one table.

Theory, once: the step thread owns the state and is the only one to change it, through `next_state`. An instruction
that the table does not list for the present state raises `IllegalStateError` and changes nothing. Two states are
passed through while an instruction is at work: LOADING (reload, restart) and DRAINING (drain, shutdown).
"""

from __future__ import annotations

import enum

from asyncengine.errors import EngineClosedError, EngineFailedError, IllegalStateError, ModelNotLoadedError


class EngineState(enum.Enum):
    """Where an engine is in its life."""

    UNLOADED = "unloaded"
    LOADING = "loading"
    READY = "ready"
    PAUSED = "paused"
    SLEEPING = "sleeping"
    DRAINING = "draining"
    FAILED = "failed"
    CLOSED = "closed"


class Action(enum.Enum):
    """What can be asked of an engine, beyond requests."""

    RELOAD = "reload"
    LOADED = "finish loading"
    LOAD_FAILED = "fail loading"
    UNLOAD = "unload"
    RESET = "reset"
    PAUSE = "pause"
    RESUME = "resume"
    SLEEP = "sleep"
    WAKE = "wake"
    UPDATE_WEIGHTS = "update_weights"
    SAVE_PREFIX_CACHE = "save_prefix_cache"
    LOAD_PREFIX_CACHE = "load_prefix_cache"
    LOAD_ADAPTER = "load_adapter"
    UNLOAD_ADAPTER = "unload_adapter"
    DEBUG_CALL = "debug_call_func_on_all_workers"
    DRAIN = "drain"
    DRAINED = "finish draining"
    FAIL = "fail"
    RESTART = "restart"
    SHUTDOWN = "shutdown"


_S = EngineState
_MODEL = (_S.READY, _S.PAUSED, _S.SLEEPING)

TRANSITIONS: dict[Action, dict[EngineState, EngineState]] = {
    Action.RELOAD: dict.fromkeys((_S.UNLOADED, _S.FAILED, *_MODEL), _S.LOADING),
    Action.LOADED: {_S.LOADING: _S.READY},
    Action.LOAD_FAILED: {_S.LOADING: _S.UNLOADED},
    Action.UNLOAD: dict.fromkeys((_S.UNLOADED, _S.FAILED, _S.DRAINING, *_MODEL), _S.UNLOADED),
    Action.RESET: {state: state for state in _S if state not in (_S.CLOSED, _S.FAILED)},
    Action.PAUSE: {_S.READY: _S.PAUSED, _S.PAUSED: _S.PAUSED},
    Action.RESUME: {_S.PAUSED: _S.READY, _S.READY: _S.READY},
    Action.SLEEP: dict.fromkeys(_MODEL, _S.SLEEPING),
    Action.WAKE: {_S.SLEEPING: _S.READY, _S.READY: _S.READY},
    Action.UPDATE_WEIGHTS: {_S.READY: _S.READY, _S.PAUSED: _S.PAUSED},
    Action.SAVE_PREFIX_CACHE: {state: state for state in (_S.READY, _S.PAUSED, _S.DRAINING)},
    Action.LOAD_PREFIX_CACHE: {_S.READY: _S.READY, _S.PAUSED: _S.PAUSED},
    Action.LOAD_ADAPTER: {_S.READY: _S.READY, _S.PAUSED: _S.PAUSED},
    Action.UNLOAD_ADAPTER: {_S.READY: _S.READY, _S.PAUSED: _S.PAUSED},
    Action.DEBUG_CALL: {state: state for state in _MODEL},
    Action.DRAIN: {_S.READY: _S.DRAINING},
    Action.DRAINED: {_S.DRAINING: _S.READY},
    Action.FAIL: dict.fromkeys((_S.READY, _S.DRAINING), _S.FAILED),
    Action.RESTART: {_S.FAILED: _S.LOADING},
    Action.SHUTDOWN: dict.fromkeys((state for state in _S if state is not _S.CLOSED), _S.CLOSED),
}


def next_state(action: Action, state: EngineState) -> EngineState:
    """Looks `action` up for `state`.

    Raises:
        EngineClosedError: The engine was shut down.
        ModelNotLoadedError: The action needs a model and there is none.
        EngineFailedError: The device is lost and the action needs it.
        IllegalStateError: Any other pair that the table does not list.
    """
    after = TRANSITIONS[action].get(state)
    if after is not None:
        return after
    message = f"cannot {action.value} while the engine is {state.value}"
    if state is EngineState.CLOSED:
        raise EngineClosedError(message)
    if state is EngineState.UNLOADED:
        raise ModelNotLoadedError(f"{message}; call reload first")
    if state is EngineState.FAILED:
        raise EngineFailedError(f"{message}; call restart or reload")
    raise IllegalStateError(message)
