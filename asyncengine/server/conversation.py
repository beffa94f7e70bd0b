"""Messages as clients send them, made into messages as chat templates want them."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from typing import Any

import msgspec

from asyncengine.server import media_data
from asyncengine.server.refusal import Refusal
from asyncengine.server.settings import MediaLimits

_ROLES = ("system", "developer", "user", "assistant", "tool")
_SAY_MEDIA = ("user", "tool")
"""Roles whose messages may have images, audio and videos in them."""
_TEXTS = ("text", "input_text", "output_text", "refusal")
_KNOWN = frozenset({"role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "reasoning"})
_EMPTY = frozenset({"audio", "refusal", "function_call", "annotations"})
"""What comes back in an answer's message, as null or empty, and is sent again in the next turn's history."""

_RESERVED = frozenset({
    "add_generation_prompt", "add_special_tokens", "chat_template", "continue_final_message", "conversation",
    "max_length", "padding", "return_assistant_tokens_mask", "return_dict", "return_tensors", "tokenize",
    "tokenizer_kwargs", "tools", "truncation",
    "config", "messages", "options", "prompts", "self",  # as arguments of `AsyncEngine.chat` and `classify`
    "truncate_prompt_tokens",
})  # fmt: skip


def conversation(messages: list[dict[str, Any]], most: MediaLimits, field: str = "messages") -> list[dict[str, Any]]:
    """Checked messages: text instead of parts, tool-call arguments as objects, the developer as system.

    Where there are images, audio or videos among the parts, these stay, as the engine has them; see
    `media_data.decoded`.

    Raises:
        Refusal: A message has something that no chat template here can take.
    """
    if not messages:
        raise Refusal(400, f"{field} is empty; expected at least one message", "invalid_field", field)
    return [_message(message, f"{field}[{index}]", most) for index, message in enumerate(messages)]


def template_arguments(arguments: dict[str, Any] | None) -> dict[str, Any]:
    """Checked arguments for the chat template.

    Raises:
        Refusal: One of them would change more than the template's text.
    """
    for name in arguments or {}:
        if name in _RESERVED:
            message = f"chat_template_kwargs has {name!r}, which is not the template's own"
            raise Refusal(400, message, "invalid_field", f"chat_template_kwargs.{name}")
    return dict(arguments or {})


def text_of(content: object, where: str) -> str:
    """Text, of a string or of a list of text parts.

    Raises:
        Refusal: There is something else in it.
    """
    text = content_of(content, where, None)
    assert isinstance(text, str)
    return text


def content_of(content: object, where: str, most: MediaLimits | None) -> str | list[dict[str, Any]]:
    """Text, of a string or of a list of parts; or the parts, if some of them are images, audio or videos.

    Args:
        content: It.
        where: Where it stands in the body.
        most: Sizes of the largest media that are taken; None where they have no place.

    Raises:
        Refusal: There is something else in it.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise Refusal(400, f"{where} is {content!r:.80}; expected text or a list of parts", "invalid_field", where)
    return joined(part_of(part, f"{where}[{index}]", most) for index, part in enumerate(content))


def part_of(part: object, where: str, most: MediaLimits | None) -> dict[str, Any]:
    """A part of a message, as the engine has it: a text, an image, audio or a video.

    Raises:
        Refusal: It is something else.
    """
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(part, dict) and kind in _TEXTS:
        text = part.get("refusal" if kind == "refusal" else "text")
        if not isinstance(text, str):
            raise Refusal(400, f"{where}.text is {text!r:.80}; expected a string", "invalid_field", f"{where}.text")
        return {"type": "text", "text": text}
    if isinstance(part, dict) and kind in media_data.TYPES and most is not None:
        return media_data.media_part(part, where, most)
    what = "only text can be read here" if most is None else "only text, images, audio and videos can be read here"
    if kind in media_data.TYPES:
        what += f"; images, audio and videos go into messages whose role is {' or '.join(_SAY_MEDIA)}"
    raise Refusal(400, f"{where}.type is {kind!r:.80}; {what}", "unsupported_field", f"{where}.type")


def joined(parts: Iterable[dict[str, Any]]) -> str | list[dict[str, Any]]:
    """Parts of a message as one text, if all are; else with texts that follow each other as one."""
    found: list[dict[str, Any]] = []
    for texts, run in groupby(parts, lambda part: part["type"] == "text"):
        if not texts:
            found += run
        elif text := "".join(part["text"] for part in run):
            found.append({"type": "text", "text": text})
    if not found:
        return ""
    return str(found[0]["text"]) if len(found) == 1 and found[0]["type"] == "text" else found


def _message(message: dict[str, Any], where: str, most: MediaLimits) -> dict[str, Any]:
    role = message.get("role")
    if role not in _ROLES:
        path = f"{where}.role"
        raise Refusal(400, f"{path} is {role!r}; allowed: {', '.join(_ROLES)}", "invalid_field", path)
    for name, value in message.items():
        if name in _EMPTY and not value:
            continue
        if name not in _KNOWN:
            path = f"{where}.{name}"
            raise Refusal(400, f"{path} cannot be honoured: no chat template here takes it", "unsupported_field", path)
    found: dict[str, Any] = {"role": "system" if role == "developer" else role}
    if message.get("content") is None and role != "assistant":
        path = f"{where}.content"
        raise Refusal(400, f"{path} is missing; expected text or a list of parts", "invalid_field", path)
    allowed = most if role in _SAY_MEDIA else None
    found["content"] = content_of(message.get("content"), f"{where}.content", allowed)
    for name in ("name", "tool_call_id"):
        if message.get(name) is not None:
            found[name] = message[name]
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    if reasoning:
        found["reasoning_content"] = text_of(reasoning, f"{where}.reasoning_content")
    calls = message.get("tool_calls")
    if calls:
        if not isinstance(calls, list):
            path = f"{where}.tool_calls"
            raise Refusal(400, f"{path} is {calls!r:.80}; expected a list", "invalid_field", path)
        found["tool_calls"] = [_call(call, f"{where}.tool_calls[{index}]") for index, call in enumerate(calls)]
    return found


def _call(call: object, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Refusal(400, f"{where} is {call!r:.80}; expected a function call with a name", "invalid_field", where)
    arguments, path = function.get("arguments") or "{}", f"{where}.function.arguments"
    if isinstance(arguments, str):
        try:
            arguments = msgspec.json.decode(arguments)
        except (msgspec.DecodeError, RecursionError) as error:
            raise Refusal(400, f"{path} is not JSON: {error}", "invalid_field", path) from error
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise Refusal(400, f"{path} is {arguments!r:.80}; expected a JSON object", "invalid_field", path)
    assert isinstance(call, dict)
    return {
        "type": "function",
        "id": call.get("id"),
        "function": {"name": function["name"], "arguments": arguments},
    }
