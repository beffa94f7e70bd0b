"""`AnswerParser`: transformers' response parser, which keeps what was written. One per answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers.utils.chat_parsing import ResponseParser

Event = dict[str, Any]


class AnswerParser(ResponseParser):  # type: ignore[misc]
    """Says of each region what was written there, marks included, and goes on after one that cannot be read.

    transformers' own raises then, and with that loses the events of all the text that it was fed at once. Its public
    methods do not tell where a region begins and ends; these two private ones have been the same since there is one.
    """

    _begins: int | None = None  # where the mark that opened the region begins, if a mark did

    def __init__(self, template: Mapping[str, Any], prefix: str, tools: Sequence[Mapping[str, Any]]) -> None:
        # An answer that lacks what its template requires is an answer all the same.
        fields = {name: {**field, "optional": True} for name, field in template["fields"].items()}
        super().__init__({**template, "fields": fields}, prefix=prefix, tools=[dict(tool) for tool in tools])

    def _open_explicit(self, events: list[Event], field: Any, match: Any) -> None:
        super()._open_explicit(events, field, match)
        self._begins = match.start()
        events[-1]["raw"] = match.group()

    def _close_current(self, events: list[Event]) -> None:
        name, opened, begins = self._current, self._opened, self._begins
        raw = self._body if begins is None else self._buffer[begins : self._pos]
        self._begins = None
        try:
            super()._close_current(events)
        except Exception:  # a template's parsers fail in many ways
            events.append({"type": "region_close", "field": name, "value": None})
            self._reset_to_implicit()
        if opened:
            events[-1]["raw"] = raw
