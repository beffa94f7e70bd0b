"""The table of states in docs/reload.md, made from `asyncengine.state`. Run it to print the table."""

from __future__ import annotations

from asyncengine import AsyncEngineError, EngineState
from asyncengine.state import Action, next_state

FROM_WITHIN = (Action.LOADED, Action.LOAD_FAILED, Action.DRAINED, Action.FAIL)
NEVER_HELD = (Action.SHUTDOWN,)


def table() -> str:
    header = ["", *(f"`{state.value}`" for state in EngineState)]
    rows = [[_link(action), *(_cell(action, state) for state in EngineState)] for action in Action]
    shown = [row for action, row in zip(Action, rows, strict=True) if action not in FROM_WITHIN]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *shown))


def _link(action: Action) -> str:
    return f"`{action.value}`"


def _cell(action: Action, state: EngineState) -> str:
    if state is EngineState.LOADING and action not in NEVER_HELD:
        return "waits"
    try:
        return next_state(action, state).value
    except AsyncEngineError as error:
        return f"`{type(error).__name__}`"


if __name__ == "__main__":
    print(table())
