"""How a checkpoint writes conversations: its chat template, as transformers renders it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from asyncengine.tokenizer import Message

_PROBE = "1f0c7"
_AS_IT_IS = "'type': 'text'", '"type": "text"'
"""Of parts that are written as Python or JSON has them: they are not what was said."""
_HELLO = {"role": "user", "content": [{"type": "text", "text": "hello"}]}


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        tokenizer: One of transformers'.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._found: dict[str, bool] = {}

    def write(self, messages: Sequence[Message], arguments: Any) -> str:
        """A conversation as text.

        Raises:
            ValueError: There is no template.
        """
        if not self._tokenizer.chat_template:
            raise ValueError("the model has no chat template")
        written = [dict(message) for message in messages]
        for message in written:
            content = message.get("content")
            if isinstance(content, str) and self._passes_over_strings(str(message.get("role")), arguments):
                message["content"] = [{"type": "text", "text": content}]
        return self._apply(written, {"add_generation_prompt": True, **arguments})

    def _passes_over_strings(self, role: str, arguments: Any) -> bool:
        """Whether it leaves out what a role says as a string and writes it in parts, as of some models with images.

        Nobody would notice that nothing was said.
        """
        found = self._found.get(role)
        if found is None:
            parts = [{"type": "text", "text": _PROBE}]
            found = self._writes(role, _PROBE, arguments) is False and self._writes(role, parts, arguments) is True
            self._found[role] = found
        return found

    def _writes(self, role: str, content: Any, arguments: Any) -> bool | None:
        """Whether what a role says is in a conversation; None if the template refuses it."""
        said = {"role": role, "content": content}
        around = {"system": [said, _HELLO], "user": [said]}.get(role, [_HELLO, said])
        try:
            text = self._apply(around, {**arguments, "add_generation_prompt": False})
        except Exception:  # of the template
            return None
        return _PROBE in text and not any(written in text for written in _AS_IT_IS)

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
