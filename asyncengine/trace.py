"""The event trace: every request's life and every step, in the Chrome trace format (opens in Perfetto).

Written by the step thread, read from anywhere. Bounded: the newest events are kept. When off, its cost is one
attribute look-up where an event would be written.
"""

from __future__ import annotations

import json
import os
from collections import deque
from pathlib import Path
from typing import Any


class Trace:
    """A ring of trace events.

    Attributes:
        enabled: Whether events are recorded.
    """

    __slots__ = ("_events", "enabled")

    def __init__(self, capacity: int = 100_000) -> None:
        self.enabled = False
        self._events: deque[tuple[str, str, float, float, int, dict[str, Any] | None]] = deque(maxlen=capacity)

    def start(self) -> None:
        """Begins to record."""
        self.enabled = True

    def stop(self) -> None:
        """Ends recording; what was recorded stays."""
        self.enabled = False

    def clear(self) -> None:
        """Forgets what was recorded."""
        self._events.clear()

    def __len__(self) -> int:
        return len(self._events)

    def span(self, name: str, start: float, end: float, **args: Any) -> None:
        """Records that the step thread did something from `start` to `end`, in seconds."""
        self._events.append(("X", name, start, end - start, 0, args))

    def mark(self, phase: str, name: str, at: float, number: int, **args: Any) -> None:
        """Records a point in a request's life: `phase` is "b" where it begins, "n" within, "e" where it ends."""
        self._events.append((phase, name, at, 0.0, number, args))

    def events(self) -> list[dict[str, Any]]:
        """What was recorded, as Chrome trace events; times in microseconds."""
        process = os.getpid()
        events: list[dict[str, Any]] = [
            {"ph": "M", "pid": process, "tid": 0, "name": "process_name", "args": {"name": "asyncengine"}},
            {"ph": "M", "pid": process, "tid": 0, "name": "thread_name", "args": {"name": "step thread"}},
        ]
        for phase, name, at, seconds, number, args in self._snapshot():
            event = {"ph": phase, "pid": process, "tid": 0, "name": name, "ts": at * 1e6, "cat": "step"}
            if phase == "X":
                event["dur"] = seconds * 1e6
            else:
                event["cat"] = "request"
                event["id"] = number
            if args:
                event["args"] = args
            events.append(event)
        return events

    def to_json(self) -> str:
        """The trace as one JSON document."""
        return json.dumps({"traceEvents": self.events(), "displayTimeUnit": "ms"})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes `to_json` to a file."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    def _snapshot(self) -> list[tuple[str, str, float, float, int, dict[str, Any] | None]]:
        while True:
            try:
                return list(self._events)
            except RuntimeError:  # the step thread wrote meanwhile
                continue
