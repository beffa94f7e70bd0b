from __future__ import annotations

import inspect
import pickle

import pytest

import asyncengine
from asyncengine import errors
from asyncengine.errors import AsyncEngineError

ALL = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, AsyncEngineError)]


def drawn() -> dict[str, tuple[str | None, list[str], bool]]:
    """The tree in the docstring: name to parent, further bases, retryable."""
    tree: dict[str, tuple[str | None, list[str], bool]] = {}
    above: list[tuple[int, str]] = []
    assert errors.__doc__ is not None
    for line in errors.__doc__.splitlines():
        name = next((word for word in line.replace("(", " ").split() if word.endswith("Error")), None)
        if name is None or not name.isidentifier():
            continue
        depth = line.index(name)
        while above and above[-1][0] >= depth:
            above.pop()
        rest = line[depth + len(name) :]
        bases = [rest[rest.index("(") + 1 : rest.index(")")]] if rest.lstrip().startswith("(") else []
        tree[name] = (above[-1][1] if above else None, bases, "(retryable)" in rest)
        above.append((depth, name))
    return tree


def test_the_docstring_draws_the_tree() -> None:
    tree = drawn()
    assert set(tree) == {error.__name__ for error in ALL}
    for error in ALL:
        parent, bases, retryable = tree[error.__name__]
        actual = [base.__name__ for base in error.__bases__]
        assert actual == ([parent] if parent else ["Exception"]) + bases
        assert error.retryable is retryable


def test_every_error_is_public_and_says_what_it_means() -> None:
    for error in ALL:
        assert getattr(asyncengine, error.__name__) is error
        assert inspect.getdoc(error)


@pytest.mark.parametrize("error", ALL)
def test_survives_pickling(error: type[AsyncEngineError]) -> None:
    again = pickle.loads(pickle.dumps(error("why")))
    assert type(again) is error and str(again) == "why"


def test_can_be_caught_as_what_they_are() -> None:
    assert issubclass(errors.ConfigError, ValueError)
    assert issubclass(errors.InvalidRequestError, ValueError)
    assert issubclass(errors.DeadlineExceededError, TimeoutError)
    assert not any(issubclass(error, (ValueError, TimeoutError)) and error.retryable for error in ALL
                   if error is not errors.DeadlineExceededError)  # fmt: skip
