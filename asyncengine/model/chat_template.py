"""How a checkpoint writes conversations: its chat template, as transformers renders it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from asyncengine.tokenizer import Message

_PROBE = "1f0c7"


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        tokenizer: One of transformers'.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def write(self, messages: Sequence[Message], arguments: Any) -> str:
        """A conversation as text.

        Raises:
            ValueError: There is no template.
        """
        if not self._tokenizer.chat_template:
            raise ValueError("the model has no chat template")
        written = [dict(message) for message in messages]
        if self._passes_over_strings:
            for message in written:
                if isinstance(message.get("content"), str):
                    message["content"] = [{"type": "text", "text": message["content"]}]
        return self._apply(written, {"add_generation_prompt": True, **arguments})

    @cached_property
    def _passes_over_strings(self) -> bool:
        """Whether it writes the parts of a content and leaves out one that is a string, as of some models with images.

        It then says nothing at all of what was said, which nobody would notice.
        """
        return not self._writes(_PROBE) and self._writes([{"type": "text", "text": _PROBE}])

    def _writes(self, content: Any) -> bool:
        try:
            return _PROBE in self._apply([{"role": "user", "content": content}], {})
        except Exception:  # of the template, which may refuse such a conversation
            return False

    def _apply(self, messages: list[dict[str, Any]], arguments: dict[str, Any]) -> str:
        text: str = self._tokenizer.apply_chat_template(messages, **{**arguments, "tokenize": False})
        return text


def template_of_processor(path: Path) -> str | None:
    """The chat template of a checkpoint whose tokenizer has none, as older ones that take images keep it."""
    file = path / "chat_template.json"
    if not file.exists():
        return None
    template = json.loads(file.read_text(encoding="utf-8")).get("chat_template")
    return template if isinstance(template, str) else None
