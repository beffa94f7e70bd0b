from __future__ import annotations

import pytest

from asyncengine.errors import (
    AsyncEngineError,
    EngineClosedError,
    EngineFailedError,
    IllegalStateError,
    ModelNotLoadedError,
)
from asyncengine.state import TRANSITIONS, Action, EngineState, next_state

S = EngineState


def test_the_states_are_those_of_the_contract() -> None:
    names = ["unloaded", "loading", "ready", "paused", "sleeping", "draining", "failed", "closed"]
    assert [state.value for state in EngineState] == names


def test_every_action_has_a_row() -> None:
    assert set(TRANSITIONS) == set(Action)
    assert all(TRANSITIONS.values())


@pytest.mark.parametrize("action", Action)
@pytest.mark.parametrize("state", EngineState)
def test_every_pair_moves_or_raises(action: Action, state: EngineState) -> None:
    after = TRANSITIONS[action].get(state)
    if after is not None:
        assert next_state(action, state) is after
        return
    with pytest.raises(AsyncEngineError, match=f"cannot {action.value} while the engine is {state.value}") as caught:
        next_state(action, state)
    expected = {
        S.CLOSED: EngineClosedError,
        S.UNLOADED: ModelNotLoadedError,
        S.FAILED: EngineFailedError,
    }.get(state, IllegalStateError)
    assert type(caught.value) is expected


def test_nothing_leaves_closed() -> None:
    assert not any(S.CLOSED in row for row in TRANSITIONS.values())


def test_shutdown_is_possible_everywhere_else() -> None:
    assert set(TRANSITIONS[Action.SHUTDOWN]) == set(EngineState) - {S.CLOSED}


def test_only_a_failed_engine_restarts() -> None:
    assert set(TRANSITIONS[Action.RESTART]) == {S.FAILED}


def test_what_passes_through_comes_back() -> None:
    assert TRANSITIONS[Action.LOADED] == {S.LOADING: S.READY}
    assert TRANSITIONS[Action.LOAD_FAILED] == {S.LOADING: S.UNLOADED}
    assert TRANSITIONS[Action.DRAINED] == {S.DRAINING: S.READY}


def test_loading_is_entered_by_reload_and_restart_alone() -> None:
    assert {action for action, row in TRANSITIONS.items() if S.LOADING in row.values()} - {Action.RESET} == {
        Action.RELOAD,
        Action.RESTART,
    }


@pytest.mark.parametrize("action", [Action.PAUSE, Action.RESUME, Action.SLEEP, Action.WAKE, Action.UNLOAD])
def test_given_again_changes_nothing(action: Action) -> None:
    for after in set(TRANSITIONS[action].values()):
        assert next_state(action, after) is after
