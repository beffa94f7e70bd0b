"""A tokenizer without files: a token is a byte of UTF-8."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from asyncengine.grammar.vocabulary import TokenTable
from asyncengine.known_turns import encode_known_turns, has_known_turns
from asyncengine.tokenizer import Message


class ByteTokenizer:
    """Ids 0 to 255 are bytes, 256 ends a text. Conversations become ``role: content`` lines."""

    vocab_size: ClassVar[int] = 257
    eos_token_id: ClassVar[int] = 256

    def encode(self, text: str) -> list[int]:
        """UTF-8 bytes of the text."""
        return list(text.encode())

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of the bytes; the end token is ``<end>`` or nothing."""
        end = "" if skip_special_tokens else "<end>"
        if self.eos_token_id in token_ids:
            pieces: list[list[int]] = [[]]
            for token_id in token_ids:
                if token_id == self.eos_token_id:
                    pieces.append([])
                else:
                    pieces[-1].append(token_id)
            return end.join(bytes(piece).decode(errors="replace") for piece in pieces)
        return bytes(token_ids).decode(errors="replace")

    def encode_piece(self, text: str) -> list[int]:
        """As `encode`."""
        return self.encode(text)

    def encode_chat(self, messages: Sequence[Message], template_arguments: Mapping[str, Any]) -> list[int]:
        """One line per message, then ``assistant: ``. Parts of a content are joined; NUL stands for an image."""
        return self.encode_chat_by(messages, template_arguments, self.encode)

    def encode_chat_by(
        self, messages: Sequence[Message], template_arguments: Mapping[str, Any], encode: Callable[[str], list[int]]
    ) -> list[int]:
        """As `encode_chat`, with each piece of text encoded by `encode`."""

        def render(messages: Sequence[Message]) -> str:
            lines = [f"{message['role']}: {_text_of(message.get('content'))}\n" for message in messages]
            return "".join(lines) + "assistant: "

        if has_known_turns(messages):
            return encode_known_turns(messages, render, encode, self.decode)
        return encode(render(messages))

    def token_bytes(self, token_id: int) -> bytes | None:
        """The byte that a token is."""
        if token_id < 256:
            return bytes([token_id])
        return b"<end>" if token_id == self.eos_token_id else None

    def token_table(self) -> TokenTable:
        """What grammars need to know of it."""
        tokens = [bytes([byte]) for byte in range(256)]
        return TokenTable({"<end>": self.eos_token_id}, tokens=(*tokens, b"<end>"))


def _text_of(content: Any) -> str:
    if not isinstance(content, (list, tuple)):
        return str(content or "")
    marks = {"image": "\0", "audio": "\1", "video": "\2"}  # of `asyncengine.testing.ScriptedMediaReader`
    return "".join(marks.get(part["type"]) or part["text"] for part in content)
