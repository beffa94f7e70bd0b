"""Tools: which of them the model is shown, and whether its answer can be taken apart."""

from __future__ import annotations

from typing import Any, cast

from asyncengine.loop.stream import RequestStream
from asyncengine.server.refusal import Refusal
from asyncengine.server.turn import Turn
from asyncengine.tokenizer import ParsingTokenizer, Tokenizer

Tool = dict[str, Any]


def shown_tools(tools: list[Tool] | None, choice: object, tokenizer: Tokenizer) -> list[Tool]:
    """The tools that the chat template gets: all, or none where the client wants no call.

    Raises:
        Refusal: They are malformed, or the model has no way to call them, or a call is to be forced.
    """
    for index, tool in enumerate(tools or []):
        _check_tool(tool, f"tools[{index}]")
    if choice not in (None, "auto", "none"):
        message = f"tool_choice is {choice!r:.80}; allowed: 'auto', 'none': a call cannot be forced"
        raise Refusal(400, message, "unsupported_field", "tool_choice")
    if choice == "auto" and not tools:
        raise Refusal(400, "tool_choice is 'auto' and there are no tools", "invalid_field", "tool_choice")
    if not tools or choice == "none":
        return []
    parsing = _parsing(tokenizer)
    if parsing is None or not parsing.takes_tools:
        raise Refusal(400, "tools: the model's chat template has no place for tools", "unsupported_field", "tools")
    if not parsing.parses_responses:
        message = "tools: the model's tokenizer has no response_template, so its calls could not be told from its text"
        raise Refusal(400, message, "unsupported_field", "tools")
    return tools


def parses(tokenizer: Tokenizer | None) -> bool:
    """Whether answers are taken apart; their special tokens must be part of the text then."""
    parsing = _parsing(tokenizer)
    return parsing is not None and parsing.parses_responses


def turns(stream: RequestStream, tokenizer: Tokenizer, n: int, tools: list[Tool], parallel: bool) -> list[Turn]:
    """One per branch."""
    parsing = _parsing(tokenizer)
    if parsing is None or not parsing.parses_responses:
        return [Turn() for _ in range(n)]
    prompt = stream.prompt_token_ids.tolist()
    return [Turn(parsing.response_parser(prompt, tools), parallel) for _ in range(n)]


def _parsing(tokenizer: Tokenizer | None) -> ParsingTokenizer | None:
    """The tokenizer, if it is one that knows of responses. By one attribute: looking at a protocol's all is slow."""
    return cast(ParsingTokenizer, tokenizer) if hasattr(tokenizer, "parses_responses") else None


def _check_tool(tool: object, where: str) -> None:
    kind = tool.get("type") if isinstance(tool, dict) else None
    if kind != "function":
        message = f"{where}.type is {kind!r}; allowed: 'function'"
        raise Refusal(400, message, "unsupported_field", f"{where}.type")
    assert isinstance(tool, dict)
    function = tool.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        path = f"{where}.function.name"
        raise Refusal(400, f"{path} is missing; expected the name of a function", "invalid_field", path)
    if not isinstance(function.get("parameters", {}), dict):
        path = f"{where}.function.parameters"
        raise Refusal(400, f"{path} is not an object; expected a JSON schema", "invalid_field", path)
    if function.get("strict"):
        path = f"{where}.function.strict"
        raise Refusal(400, f"{path} cannot be honoured: calls are not constrained", "unsupported_field", path)
