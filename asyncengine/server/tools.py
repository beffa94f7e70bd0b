"""Tools: which of them the model is shown, which it may or must call, and whether its answer can be taken apart."""

from __future__ import annotations

import json
from dataclasses import dataclass
from types import NoneType
from typing import Any, cast

from asyncengine.loop.stream import RequestStream
from asyncengine.response_format import JsonObject, JsonSchema, ResponseFormat, StructuralTags
from asyncengine.server.call_layout import CallLayout
from asyncengine.server.refusal import Refusal
from asyncengine.server.turn import Turn
from asyncengine.tokenizer import ParsingTokenizer, Tokenizer

Tool = dict[str, Any]


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """What a client wants of its tools.

    Attributes:
        shown: The tools that the chat template gets.
        allowed: Those that may be called, with their places in the request.
        forced: Whether there must be a call.
        single: Whether one call is enough.
    """

    shown: list[Tool]
    allowed: list[tuple[str, Tool]]
    forced: bool = False
    single: bool = False

    @property
    def constrains(self) -> bool:
        """Whether the answer must keep to a grammar."""
        return self.forced or any(tool["function"].get("strict") for _, tool in self.allowed)

    def grammar(
        self, tokenizer: Tokenizer, layout: CallLayout | None, otherwise: ResponseFormat | None = None
    ) -> StructuralTags:
        """Free text, until the opening of a call begins one that the function's parameters accept.

        A call that must come comes at once, unless the model may reason before it. The arguments of a function that is
        not strict are any object, unless a call must come. With `otherwise` the answer is calls, or else JSON of that
        format; a call that must come leaves no room for it.

        Raises:
            Refusal: The model's calls cannot be told by a grammar.
        """
        known = parsing(tokenizer)
        if layout is None or known is None:
            reason = "the model does not write its calls as JSON between fixed texts, as its template has them"
            if self.forced:
                param = "tool_choice"
            elif self.constrains:
                param = f"{next(at for at, tool in self.allowed if tool['function'].get('strict'))}.function.strict"
            else:
                param, reason = "response_format", f"{reason}, and there are tools that may be called"
            raise Refusal(400, f"{param} cannot be honoured: {reason}", "unsupported_field", param)
        tags = []
        for where, tool in self.allowed:
            function = tool["function"]
            name = function["name"]
            if json.dumps(name) != f'"{name}"':
                path = f"{where}.function.name"
                raise Refusal(400, f"{path} is {name!r}; expected letters and digits", "invalid_field", path)
            parameters = function.get("parameters") or {}
            kept = parameters if self.forced or function.get("strict") else {}
            tags.append(layout.tag(name, {"type": "object", **kept}))
        if otherwise is not None and not self.forced:
            if not isinstance(otherwise, (JsonObject, JsonSchema)):
                message = (
                    "response_format.type cannot be honoured beside tools that may be called; allowed there: 'text', "
                    "'json_object', 'json_schema'"
                )
                raise Refusal(400, message, "unsupported_field", "response_format")
            return StructuralTags(
                tags, [layout.opening], free_text=False, stop_after_first=self.single, otherwise=otherwise
            )
        return StructuralTags(
            tags,
            [layout.opening],
            free_text=known.reasons or not self.forced,
            at_least_one=self.forced,
            stop_after_first=self.single,
        )


def tool_choice(tools: list[Tool] | None, choice: object, parallel: bool, tokenizer: Tokenizer) -> ToolChoice:
    """What is asked for, checked.

    Raises:
        Refusal: The tools are malformed, or the model has no way to call them, or the choice is not among them.
    """
    tools = tools or []
    for index, tool in enumerate(tools):
        _check_tool(tool, f"tools[{index}]")
    name = _named(choice)
    if name is None and choice not in (None, "auto", "none", "required"):
        message = f"tool_choice is {choice!r:.80}; allowed: 'auto', 'none', 'required', a function's name"
        raise Refusal(400, message, "unsupported_field", "tool_choice")
    if choice not in (None, "none") and not tools:
        raise Refusal(400, f"tool_choice is {choice!r:.80} and there are no tools", "invalid_field", "tool_choice")
    if not tools or choice == "none":
        return ToolChoice([], [])
    known = parsing(tokenizer)
    if known is None or not known.takes_tools:
        raise Refusal(400, "tools: the model's chat template has no place for tools", "unsupported_field", "tools")
    if not known.parses_responses:
        message = "tools: the model's tokenizer has no response_template, so its calls could not be told from its text"
        raise Refusal(400, message, "unsupported_field", "tools")
    placed = [(f"tools[{index}]", tool) for index, tool in enumerate(tools)]
    if name is None:
        return ToolChoice(tools, placed, choice == "required", not parallel)
    wanted = [(where, tool) for where, tool in placed if tool["function"]["name"] == name]
    if not wanted:
        names = ", ".join(repr(tool["function"]["name"]) for tool in tools)
        message = f"tool_choice names {name!r}, which is not one of the tools: {names}"
        raise Refusal(400, message, "invalid_field", "tool_choice")
    return ToolChoice(tools, wanted, forced=True, single=True)


def parses(tokenizer: Tokenizer | None) -> bool:
    """Whether answers are taken apart; their special tokens must be part of the text then."""
    known = parsing(tokenizer)
    return known is not None and known.parses_responses


def turns(stream: RequestStream, tokenizer: Tokenizer, n: int, tools: list[Tool], parallel: bool) -> list[Turn]:
    """One per branch. Without tools no call is taken."""
    known = parsing(tokenizer)
    if known is None or not known.parses_responses:
        return [Turn() for _ in range(n)]
    prompt = stream.prompt_token_ids.tolist()
    return [Turn(known.response_parser(prompt, tools), parallel, bool(tools)) for _ in range(n)]


def parsing(tokenizer: Tokenizer | None) -> ParsingTokenizer | None:
    """The tokenizer, if it is one that knows of responses. By one attribute: looking at a protocol's all is slow."""
    return cast(ParsingTokenizer, tokenizer) if hasattr(tokenizer, "parses_responses") else None


def _named(choice: object) -> str | None:
    """The function's name in ``{"type": "function", "function": {"name": ...}}``, if it is that."""
    if not isinstance(choice, dict) or choice.get("type") != "function" or not isinstance(choice.get("function"), dict):
        return None
    name = choice["function"].get("name")
    return name if isinstance(name, str) else None


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
    if not isinstance(function.get("parameters"), (dict, NoneType)):
        path = f"{where}.function.parameters"
        raise Refusal(400, f"{path} is not an object; expected a JSON schema", "invalid_field", path)
