"""Errors that are kept without what the code that raised them was working on."""

from __future__ import annotations

import traceback


def released(error: BaseException) -> BaseException:
    """Empties the frames that an error, and those that led to it, came through; returns the error.

    Whoever keeps an error keeps the local variables of these frames. For an error of a step those are the step's
    tensors, for one of a load they are the model: memory of a device that the next step, or a load that is tried while
    the error is being handled, would not have. Which lines they were stays in the traceback.
    """
    seen: set[int] = set()
    left = [error]
    while left:
        each = left.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        traceback.clear_frames(each.__traceback__)
        left += [other for other in (each.__cause__, each.__context__) if other is not None]
    return error
