"""Anthropic's content blocks: read from a conversation, and written as an answer comes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from asyncengine.server.conversation import content_of, joined, part_of, text_of
from asyncengine.server.refusal import Refusal
from asyncengine.server.settings import MediaLimits
from asyncengine.server.turn import Piece, Text, ToolCall

Event = tuple[str, dict[str, Any]]


class Blocks:
    """Content blocks; text goes into the last one as long as it is of that kind.

    Attributes:
        blocks: All of them, as they are now.
    """

    def __init__(self) -> None:
        self.blocks: list[dict[str, Any]] = []
        self._open: str | None = None
        self._texts: list[str] = []

    def add(self, piece: Piece) -> Iterator[Event]:
        """Events of a new piece."""
        if isinstance(piece, ToolCall):
            yield from self.close()
            block = {"type": "tool_use", "id": piece.call_id, "name": piece.name, "input": {}}
            yield from self._begin(block)
            yield self._delta({"type": "input_json_delta", "partial_json": piece.arguments})
            self.blocks[-1]["input"] = msgspec.json.decode(piece.arguments)
            yield from self.close()
            return
        kind = "text" if isinstance(piece, Text) else "thinking"
        if self._open != kind:
            yield from self.close()
            yield from self._begin({"type": kind, kind: "", **({"signature": ""} if kind == "thinking" else {})})
        self._texts.append(piece.text)
        yield self._delta({"type": f"{kind}_delta", kind: piece.text})

    def close(self) -> Iterator[Event]:
        """Events of the end of the last block, if it has not ended."""
        if self._open is None:
            return
        if self._open != "tool_use":
            self.blocks[-1][self._open] = "".join(self._texts)
        self._open, self._texts = None, []
        yield "content_block_stop", {"index": len(self.blocks) - 1}

    def _begin(self, block: dict[str, Any]) -> Iterator[Event]:
        self._open = block["type"]
        self.blocks.append(block)
        yield "content_block_start", {"index": len(self.blocks) - 1, "content_block": {**block}}

    def _delta(self, delta: dict[str, Any]) -> Event:
        return "content_block_delta", {"index": len(self.blocks) - 1, "delta": delta}


def tools_of(tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tools in OpenAI's words, which are those of chat templates.

    Raises:
        Refusal: One is not a function of the client's.
    """
    found = []
    for index, tool in enumerate(tools):
        if tool.get("type") not in (None, "custom"):
            path = f"tools[{index}].type"
            raise Refusal(400, f"{path} is {tool['type']!r}; allowed: 'custom'", "unsupported_field", path)
        function = {"name": tool.get("name"), "parameters": tool.get("input_schema", {})}
        if tool.get("description"):
            function["description"] = tool["description"]
        if tool.get("strict"):
            function["strict"] = True
        found.append({"type": "function", "function": function})
    return found


def messages_of(
    messages: list[dict[str, Any]], system: str | list[dict[str, Any]] | None, most: MediaLimits
) -> list[dict[str, Any]]:
    """Messages in OpenAI's words, which are those of chat templates; images are as `media_data.image_part` has them.

    Raises:
        Refusal: One has something that cannot be read here.
    """
    if not messages:
        raise Refusal(400, "messages is empty; expected at least one message", "invalid_field", "messages")
    found: list[dict[str, Any]] = []
    if system:
        found.append({"role": "system", "content": text_of(system, "system")})
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        role, content = message.get("role"), message.get("content")
        if role not in ("user", "assistant", "system"):
            raise Refusal(400, f"{where}.role is {role!r}; allowed: user, assistant", "invalid_field", f"{where}.role")
        if isinstance(content, list):
            found += _from_blocks(role, content, f"{where}.content", most)
        else:
            found.append({"role": role, "content": text_of(content, f"{where}.content")})
    return found


def _from_blocks(role: str, blocks: list[Any], where: str, most: MediaLimits) -> list[dict[str, Any]]:
    """A message, and before it one per result of a tool."""
    results: list[dict[str, Any]] = []
    message: dict[str, Any] = {"role": role, "content": ""}
    parts: list[dict[str, Any]] = []
    for index, block in enumerate(blocks):
        path = f"{where}[{index}]"
        kind = block.get("type") if isinstance(block, dict) else None
        if kind in ("text", "image"):
            parts.append(part_of(block, path, most if role == "user" else None))
        elif kind == "tool_use":
            given = block.get("input") or {}
            if not isinstance(given, dict):
                wrong = f"{path}.input is {given!r:.80}; expected an object"
                raise Refusal(400, wrong, "invalid_field", f"{path}.input")
            function = {"name": block.get("name"), "arguments": given}
            made = {"id": block.get("id"), "type": "function", "function": function}
            message.setdefault("tool_calls", []).append(made)
        elif kind == "tool_result":
            content = content_of(block.get("content"), f"{path}.content", most)
            results.append({"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": content})
        elif kind == "thinking":
            message["reasoning_content"] = message.get("reasoning_content", "") + str(block.get("thinking", ""))
        else:
            raise Refusal(
                400, f"{path}.type is {kind!r}, which cannot be read here", "unsupported_field", f"{path}.type"
            )
    message["content"] = joined(parts)
    if message["content"] or "tool_calls" in message or not results:
        results.append(message)
    return results
