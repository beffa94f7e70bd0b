"""`Turn`: one branch's answer, taken apart into what clients call content, reasoning and tool calls."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

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

    Attributes:
        calls: Tool calls so far.
    """

    def __init__(self, parser: ResponseParser | None = None, parallel: bool = True) -> None:
        self.calls = 0
        self._parser = parser
        self._parallel = parallel
        self._raw = ""  # of a region whose value comes when it closes
        begun = getattr(parser, "initial_events", None) or []
        self._begun: list[Piece] = [piece for piece in self._pieces(begun) if not isinstance(piece, ToolCall)]

    @property
    def parses(self) -> bool:
        """Whether text may be something else than content."""
        return self._parser is not None

    def push(self, text: str) -> list[Piece]:
        """What new text adds. `text` may be empty."""
        if self._parser is None:
            return [Text(text)] if text else []
        begun, self._begun = self._begun, []
        if not text:
            return begun
        return begun + self._parsed(lambda parser: parser.feed(text), text)

    def finish(self) -> list[Piece]:
        """What was held back."""
        if self._parser is None:
            return []
        return self._parsed(lambda parser: parser.finalize()[1], "")

    def _parsed(self, events_of: Any, text: str) -> list[Piece]:
        parser, raw = self._parser, self._raw
        assert parser is not None
        try:
            return self._pieces(events_of(parser))
        except Exception:
            # What a model writes need not be well-formed. What cannot be read is content, as it stands.
            self._parser, self._raw = None, ""
            return [Text(raw + text)] if raw + text else []

    def _pieces(self, events: list[dict[str, Any]]) -> list[Piece]:
        pieces: list[Piece] = []
        for event in events:
            kind, field = event["type"], event["field"]
            if kind == "region_open":
                self._raw = ""
            elif kind == "region_chunk":
                text = event["text"]
                if event.get("dirty"):
                    self._raw += text
                elif field in _REASONING:
                    pieces.append(Reasoning(text))
                elif field == "content":
                    pieces.append(Text(text))
            elif field == "tool_calls":
                self._raw = ""
                pieces += self._called(event["value"])
        return pieces

    def _called(self, value: Any) -> list[Piece]:
        pieces: list[Piece] = []
        for call in value if isinstance(value, list) else [value]:
            function = call["function"]
            if self.calls and not self._parallel:
                break
            arguments = function.get("arguments", {})
            text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
            pieces.append(ToolCall(self.calls, f"call_{fresh_id()}", str(function["name"]), text))
            self.calls += 1
        return pieces
