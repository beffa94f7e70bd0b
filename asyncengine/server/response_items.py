"""What a response puts out, item by item, and the events that tell of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from asyncengine.server.answer import new_id
from asyncengine.server.turn import Piece, Reasoning, Text, ToolCall

Event = tuple[str, dict[str, Any]]


class Items:
    """Output items; text goes into the last one as long as it is of that kind.

    Attributes:
        items: All of them, as they are now.
    """

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self._open: str | None = None
        self._texts: list[str] = []

    def add(self, piece: Piece) -> Iterator[Event]:
        """Events of a new piece."""
        if isinstance(piece, ToolCall):
            yield from self._call(piece)
            return
        kind = "message" if isinstance(piece, Text) else "reasoning"
        if self._open != kind:
            yield from self._close()
            yield from self._begin(kind)
        self._texts.append(piece.text)
        where = self._where()
        if isinstance(piece, Reasoning):
            yield "response.reasoning_text.delta", {**where, "delta": piece.text}
        else:
            yield "response.output_text.delta", {**where, "delta": piece.text, "logprobs": []}

    def finish(self, status: str) -> Iterator[Event]:
        """Events of the end of all; an answer without text is an empty message."""
        if not self.items:
            yield from self._begin("message")
        yield from self._close(status)

    def _close(self, status: str = "completed") -> Iterator[Event]:
        if self._open is None:
            return
        item, where, text = self.items[-1], self._where(), "".join(self._texts)
        item["status"] = status
        item["content"][0]["text"] = text
        if self._open == "reasoning":
            yield "response.reasoning_text.done", {**where, "text": text}
        else:
            yield "response.output_text.done", {**where, "text": text, "logprobs": []}
        yield "response.content_part.done", {**where, "part": item["content"][0]}
        yield "response.output_item.done", {"output_index": where["output_index"], "item": item}
        self._open, self._texts = None, []

    def _begin(self, kind: str) -> Iterator[Event]:
        self._open = kind
        item: dict[str, Any] = {"type": kind, "status": "in_progress", "content": []}
        if kind == "message":
            item |= {"id": new_id("msg"), "role": "assistant"}
            part: dict[str, Any] = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        else:
            item |= {"id": new_id("rs"), "summary": []}
            part = {"type": "reasoning_text", "text": ""}
        self.items.append(item)
        yield "response.output_item.added", {"output_index": len(self.items) - 1, "item": {**item}}
        item["content"] = [part]
        yield "response.content_part.added", {**self._where(), "part": {**part}}

    def _call(self, call: ToolCall) -> Iterator[Event]:
        if self._open is not None:
            yield from self._close()
        item = {
            "type": "function_call",
            "id": new_id("fc"),
            "call_id": call.call_id,
            "name": call.name,
            "arguments": call.arguments,
            "status": "completed",
        }
        self.items.append(item)
        index = len(self.items) - 1
        where = {"output_index": index, "item_id": item["id"]}
        begun = {**item, "arguments": "", "status": "in_progress"}
        yield "response.output_item.added", {"output_index": index, "item": begun}
        yield "response.function_call_arguments.delta", {**where, "delta": call.arguments}
        yield "response.function_call_arguments.done", {**where, "name": call.name, "arguments": call.arguments}
        yield "response.output_item.done", {"output_index": index, "item": item}

    def _where(self) -> dict[str, Any]:
        return {"output_index": len(self.items) - 1, "item_id": self.items[-1]["id"], "content_index": 0}
