"""A tokenizer that marks reasoning and tool calls the way that models do, over the embedded model's."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from asyncengine import AsyncEngine, EngineConfig, Tokenizer
from asyncengine.testing import ScriptedLoader

RESPONSE_TEMPLATE: dict[str, Any] = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|assistant|>",
    "fields": {
        "reasoning_content": {"open": "<think>", "close": "</think>", "content": "text"},
        "tool_calls": {
            "open": "<tool_call>",
            "close": "</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close": "<|end|>", "content": "text"},
    },
}
CHAT_TEMPLATE = (
    "{%- for tool in tools or [] %}tool {{ tool.function.name }};{% endfor -%}"
    "{%- for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{%- for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.function.arguments | tojson }}]{% endfor -%}"
    "{%- endfor %}<|assistant|>"
)
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def think(text: str) -> str:
    return f"<think>{text}</think>"


@cache
def tokenizer() -> Tokenizer:
    from transformers import AutoTokenizer

    import asyncengine.tiny
    from asyncengine.model.tokenizer import FastTokenizer

    path = Path(asyncengine.tiny.__file__).parent / "checkpoint"
    made = AutoTokenizer.from_pretrained(path, local_files_only=True)
    made.chat_template = CHAT_TEMPLATE
    made.response_template = RESPONSE_TEMPLATE
    return FastTokenizer(made)


def tool_engine(answer: str) -> AsyncEngine:
    """Answers everything with `answer`, through a real tokenizer."""
    tokens = [*tokenizer().encode(answer)]
    ids = tokens[1:] if tokens[:1] == [1] else tokens
    loader = ScriptedLoader(lambda prompt, branch: [*ids, 2], tokenizer=tokenizer(), vocab_size=1024)
    return AsyncEngine(EngineConfig("scripted"), loader=loader)
