"""`CallLayout`: how a model writes a tool call. Found out by letting its chat template write one."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from asyncengine.response_format import StructuralTag
from asyncengine.server.turn import ToolCall, Turn
from asyncengine.tokenizer import ParsingTokenizer

_NAME = "probe_function"
_ARGUMENTS = '{"probe": 1}'
_WRITTEN = re.compile(r'\{\s*"probe"\s*:\s*1\s*\}')
_TOOL = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "Probes.",
        "parameters": {"type": "object", "properties": {"probe": {"type": "integer", "description": "One."}}},
    },
}
_CALL = {"id": "callprobe", "type": "function", "function": {"name": _NAME, "arguments": {"probe": 1}}}


@dataclass(frozen=True, slots=True)
class CallLayout:
    """A tool call is `begin`, its arguments as JSON, and `end`.

    Attributes:
        opening: What every call begins with.
        begin: Up to the arguments.
        end: After them.
    """

    opening: str
    begin: str
    end: str

    def tag(self, name: str, parameters: dict[str, Any]) -> StructuralTag:
        """A call of one function, with arguments that its parameters' schema accepts."""
        return StructuralTag(self.begin.replace(_NAME, name), parameters, self.end)


def call_layout(tokenizer: ParsingTokenizer) -> CallLayout | None:
    """How the model writes a call; None if that is not JSON between fixed texts, or cannot be read back.

    Blocks while the template is compiled.
    """
    if tokenizer.call_marks is None:
        return None
    opening, closing = tokenizer.call_marks
    asked = [{"role": "user", "content": "Probe."}]
    answer = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
    try:
        prompt = tokenizer.encode_chat(asked, {"tools": [_TOOL]})
        told = tokenizer.encode_chat([*asked, answer], {"tools": [_TOOL], "add_generation_prompt": False})
    except Exception:  # a template says what it does not like in its own way
        return None
    text = tokenizer.decode(told, skip_special_tokens=False)
    written = [*_WRITTEN.finditer(text)]
    if not written:
        return None
    start, stop = written[-1].span()
    first, last = text.rfind(opening, 0, start), text.find(closing, stop)
    if first < 0 or last < 0:
        return None
    layout = CallLayout(opening, text[first:start], text[stop : last + len(closing)])
    return layout if _reads(layout, tokenizer, prompt) else None


def _reads(layout: CallLayout, tokenizer: ParsingTokenizer, prompt: list[int]) -> bool:
    if layout.begin.count(_NAME) != 1:
        return False
    turn = Turn(tokenizer.response_parser(prompt, [_TOOL]))
    pieces = turn.push(layout.begin + _ARGUMENTS + layout.end) + turn.finish()
    calls = [piece for piece in pieces if isinstance(piece, ToolCall)]
    return [(call.name, json.loads(call.arguments)) for call in calls] == [(_NAME, json.loads(_ARGUMENTS))]
