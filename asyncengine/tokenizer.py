"""What the engine asks of a tokenizer. Implemented over transformers, and by `asyncengine.testing.ByteTokenizer`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

Message = Mapping[str, Any]


class Tokenizer(Protocol):
    """Text to token ids and back. Must be safe to call from several threads at once."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with whatever special tokens the model expects around one."""
        ...

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        """Text of the tokens; incomplete UTF-8 becomes U+FFFD."""
        ...

    def encode_chat(self, messages: Sequence[Message], template_arguments: Mapping[str, Any]) -> list[int]:
        """Token ids of a conversation, ready for the assistant's next turn.

        Raises:
            ValueError: There is no chat template, or it refuses the messages.
        """
        ...
