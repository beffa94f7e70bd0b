"""Errors that are kept without what the code that raised them was working on."""

from __future__ import annotations

import contextlib
import inspect

_MAY_BE_SUSPENDED = (
    inspect.CO_COROUTINE | inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR | inspect.CO_ITERABLE_COROUTINE
)


def released(error: BaseException) -> BaseException:
    """Empties the frames that an error, and those that led to it, came through; returns the error.

    Whoever keeps an error keeps the local variables of these frames. For an error of a step those are the step's
    tensors, for one of a load they are the model: memory of a device that the next step, or a load that is tried while
    the error is being handled, would not have. Which lines they were stays in the traceback.

    Frames of coroutines and generators are left alone. An error that was raised before still has the frames of whoever
    caught it then, and to clear one that is suspended is to close it.
    """
    seen: set[int] = set()
    left = [error]
    while left:
        each = left.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        at = each.__traceback__
        while at is not None:
            code = at.tb_frame.f_code
            # A generator expression catches nothing, so it has ended.
            if not code.co_flags & _MAY_BE_SUSPENDED or code.co_name == "<genexpr>":
                with contextlib.suppress(RuntimeError):  # it runs
                    at.tb_frame.clear()
            at = at.tb_next
        left += [other for other in (each.__cause__, each.__context__) if other is not None]
    return error
