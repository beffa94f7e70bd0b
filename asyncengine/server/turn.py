"""`Turn`: one branch's answer, taken apart into what clients call content, reasoning and tool calls."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import msgspec

from asyncengine.server.naming import fresh_id
from asyncengine.tokenizer import ResponseParser

_REASONING = ("reasoning_content", "thinking", "reasoning")


@dataclass(frozen=True, slots=True)
class Text:
    """New text of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """New text of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A whole tool call.

    Attributes:
        index: Which of the turn's.
        call_id: Names it in the conversation.
        name: Of the function.
        arguments: JSON.
    """

    index: int
    call_id: str
    name: str
    arguments: str


Piece = Text | Reasoning | ToolCall


class Turn:
    """What one branch says.

    Args:
        parser: Knows how the model marks things; None takes everything for content.
        parallel: Whether more than one tool call is delivered.
        takes_calls: Whether any is; else what looks like one is content.

    Attributes:
        calls: Tool calls so far.
    """

    def __init__(self, parser: ResponseParser | None = None, parallel: bool = True, takes_calls: bool = True) -> None:
        self.calls = 0
        self._parser = parser
        self._parallel = parallel
        self._takes_calls = takes_calls
        self._told = 0  # characters of a region that looks like a call, where none is taken
        self._blank: str | None = ""  # content since the last call, as long as it is white space; then None
        # What the prompt has begun goes on, and is no part of the answer.
        self._pieces(getattr(parser, "initial_events", None) or [])
        self._blank = None if self._blank is None else ""
        self.calls = 0

    @property
    def parses(self) -> bool:
        """Whether text may be something else than content."""
        return self._parser is not None

    def push(self, text: str) -> list[Piece]:
        """What new text adds. `text` may be empty."""
        if self._parser is None:
            return [Text(text)] if text else []
        return self._pieces(self._parser.feed(text)) if text else []

    def finish(self) -> list[Piece]:
        """What was held back."""
        if self._parser is None:
            return []
        pieces = self._pieces(self._parser.finalize()[1])
        if self._blank and not self.calls:
            pieces.append(Text(self._blank))
        return pieces

    def _pieces(self, events: list[dict[str, Any]]) -> list[Piece]:
        pieces: list[Piece] = []
        for event in events:
            kind, field = event["type"], event["field"]
            if field == "tool_calls":
                pieces += self._region(event) if self._takes_calls else self._refused(event)
            elif kind == "region_chunk" and field in _REASONING:
                pieces.append(Reasoning(event["text"]))
            elif kind == "region_chunk" and field == "content":
                pieces += self._content(event["text"])
        return pieces

    def _content(self, text: str) -> list[Piece]:
        """Text; white space before a call and between calls is none, so it waits for what comes next."""
        if not self._takes_calls or self._blank is None:
            return [Text(text)] if text else []
        text = self._blank + text
        self._blank = text if not text or text.isspace() else None
        return [] if self._blank is not None else [Text(text)]

    def _refused(self, event: dict[str, Any]) -> list[Piece]:
        """A region of calls as content, while it comes."""
        if event["type"] == "region_chunk":
            text = event["text"]
        else:
            text = event.get("raw", "")[self._told :]
        self._told = 0 if event["type"] == "region_close" else self._told + len(text)
        return self._content(text)

    def _region(self, event: dict[str, Any]) -> list[Piece]:
        """The calls of a region that has closed; it is content, as it stands, if they cannot be read."""
        if event["type"] != "region_close":
            return []
        value = event["value"]
        try:
            calls = [_read(call["function"]) for call in (value if isinstance(value, list) else [value])]
        except Exception:  # what a model writes need not be well-formed, in any way
            calls = []
        if not calls:
            return self._content(event.get("raw", ""))
        pieces: list[Piece] = []
        for name, arguments in calls if self._parallel else calls[: 0 if self.calls else 1]:
            pieces.append(ToolCall(self.calls, f"call_{fresh_id()}", name, arguments))
            self.calls += 1
        self._blank = ""
        return pieces


def _read(function: dict[str, Any]) -> tuple[str, str]:
    """Name and arguments of a call.

    Raises:
        ValueError: There is no name, or the arguments are no JSON object; there may be none.
    """
    name, arguments = function["name"], function.get("arguments")
    if arguments is None:
        arguments = "{}"
    elif not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    if not isinstance(name, str) or not name or not isinstance(msgspec.json.decode(arguments), dict):
        raise ValueError(f"not a call: {function!r:.80}")
    name.encode()  # half of a surrogate pair cannot be sent
    return name, arguments
