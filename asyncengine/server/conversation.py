"""Messages as clients send them, made into messages as chat templates want them."""

from __future__ import annotations

from typing import Any

import msgspec

from asyncengine.server.refusal import Refusal

_ROLES = ("system", "developer", "user", "assistant", "tool")
_KNOWN = frozenset({"role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "reasoning"})
_EMPTY = frozenset({"audio", "refusal", "function_call", "annotations"})
"""What comes back in an answer's message, as null or empty, and is sent again in the next turn's history."""

_RESERVED = frozenset({
    "add_generation_prompt", "add_special_tokens", "chat_template", "continue_final_message", "conversation",
    "max_length", "padding", "return_assistant_tokens_mask", "return_dict", "return_tensors", "tokenize",
    "tokenizer_kwargs", "tools", "truncation",
})  # fmt: skip


def conversation(messages: list[dict[str, Any]], field: str = "messages") -> list[dict[str, Any]]:
    """Checked messages: text instead of parts, tool-call arguments as objects, the developer as system.

    Raises:
        Refusal: A message has something that no chat template here can take.
    """
    if not messages:
        raise Refusal(400, f"{field} is empty; expected at least one message", "invalid_field", field)
    return [_message(message, f"{field}[{index}]") for index, message in enumerate(messages)]


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
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise Refusal(400, f"{where} is {content!r:.80}; expected text or a list of parts", "invalid_field", where)
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "input_text", "output_text", "refusal"):
            path = f"{where}[{index}].type"
            raise Refusal(400, f"{path} is {kind!r}; only text can be read here", "unsupported_field", path)
        text = part.get("refusal" if kind == "refusal" else "text")
        if not isinstance(text, str):
            path = f"{where}[{index}].text"
            raise Refusal(400, f"{path} is {text!r:.80}; expected a string", "invalid_field", path)
        texts.append(text)
    return "".join(texts)


def _message(message: dict[str, Any], where: str) -> dict[str, Any]:
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
    found = {"role": "system" if role == "developer" else role}
    if message.get("content") is None and role != "assistant":
        path = f"{where}.content"
        raise Refusal(400, f"{path} is missing; expected text or a list of parts", "invalid_field", path)
    found["content"] = text_of(message.get("content"), f"{where}.content")
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
