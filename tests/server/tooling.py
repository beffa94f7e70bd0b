"""A tokenizer that marks reasoning and tool calls the way that models do, over the embedded model's."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from asyncengine import AsyncEngine, EngineConfig, Tokenizer, tiny
from asyncengine.testing import ScriptedLoader

CHECKPOINT = tiny.PATH
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
    "{%- for c in m.tool_calls or [] %}<tool_call>"
    "{{ dict(name=c.function.name, arguments=c.function.arguments) | tojson }}</tool_call>{% endfor -%}"
    "{%- endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
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
def _made() -> Any:
    from transformers import AutoTokenizer

    made = AutoTokenizer.from_pretrained(CHECKPOINT, local_files_only=True)
    made.chat_template = CHAT_TEMPLATE
    return made


def marked(**changes: Any) -> Tokenizer:
    """With other marks for tool calls, where some are given."""
    from asyncengine.model.tokenizer import FastTokenizer

    made, fields = copy.copy(_made()), RESPONSE_TEMPLATE["fields"]
    made.response_template = {**RESPONSE_TEMPLATE, "fields": fields | {"tool_calls": fields["tool_calls"] | changes}}
    return FastTokenizer(made)


@contextmanager
def tool_checkpoint() -> Iterator[Path]:
    """The embedded model with marks for tool calls, which it has never seen, and none for reasoning."""
    fields = {name: field for name, field in RESPONSE_TEMPLATE["fields"].items() if "reason" not in name}
    with TemporaryDirectory() as folder:
        path = Path(shutil.copytree(CHECKPOINT, Path(folder) / "tooled"))
        (path / "chat_template.jinja").write_text(CHAT_TEMPLATE)
        config = json.loads((path / "tokenizer_config.json").read_text())
        config["response_template"] = {**RESPONSE_TEMPLATE, "fields": fields}
        (path / "tokenizer_config.json").write_text(json.dumps(config))
        yield path


def tool_engine(answer: str, ends: bool = True, tokenizer: Tokenizer | None = None) -> AsyncEngine:
    """Answers everything with `answer`, through a real tokenizer; then with its end token, or with the engine's."""
    tokenizer = tokenizer or marked()
    tokens = [*tokenizer.encode(answer)]
    ids = tokens[1:] if tokens[:1] == [1] else tokens
    loader = ScriptedLoader(lambda prompt, branch: [*ids, 2] if ends else ids, tokenizer=tokenizer, vocab_size=1024)
    return AsyncEngine(EngineConfig("scripted"), loader=loader)
