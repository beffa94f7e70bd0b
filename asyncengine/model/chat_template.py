"""How a checkpoint writes conversations: its chat template, as transformers renders it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from asyncengine.errors import CheckpointError
from asyncengine.model.text_files import json_in
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


def check_template(tokenizer: Any, path: Path) -> None:
    """Refuses a chat template in a file of its own that is none. Compiled once, it is not compiled again.

    Args:
        tokenizer: One of transformers'.
        path: Of its checkpoint.

    Raises:
        CheckpointError: As it says.
    """
    template = tokenizer.chat_template or {}
    texts = template if isinstance(template, dict) else {"default": template}
    found = {file: text for name, text in texts.items() if (file := _file_of(name, path)) is not None}
    if not found:
        return
    try:
        from jinja2 import TemplateSyntaxError
        from transformers.utils.chat_template_utils import _compile_jinja_template as compiled
    except ImportError:  # whoever has no jinja has no chat, and other versions have another name for it
        return
    for file, text in found.items():
        try:
            compiled(text)
        except TemplateSyntaxError as error:
            raise CheckpointError(f"{file} is no chat template: line {error.lineno}: {error.message}") from error
        except ImportError:  # jinja is too old
            return


def _file_of(name: str, path: Path) -> Path | None:
    files = (f"additional_chat_templates/{name}.jinja", "chat_template.jinja", "chat_template.json")
    return next((path / file for file in files if (path / file).is_file()), None)


def template_of_processor(path: Path) -> str | None:
    """The chat template of a checkpoint whose tokenizer has none, as older ones that take images keep it.

    Raises:
        CheckpointError: Its file is damaged.
    """
    template = json_in(path / "chat_template.json", {}).get("chat_template")
    return template if isinstance(template, str) else None
