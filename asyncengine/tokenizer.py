"""What the engine asks of a tokenizer. Implemented over transformers, and by `asyncengine.testing.ByteTokenizer`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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

        The `token_ids` of a message, if it has some, take the place of its content; see `asyncengine.known_turns`.

        Raises:
            ValueError: There is no chat template, or it refuses the messages.
        """
        ...


class WritingTokenizer(Tokenizer, Protocol):
    """A tokenizer that lets others encode what its chat template writes."""

    def encode_piece(self, text: str) -> list[int]:
        """Token ids of a piece of a prompt, without special tokens around it."""
        ...

    def encode_chat_by(
        self, messages: Sequence[Message], template_arguments: Mapping[str, Any], encode: Callable[[str], list[int]]
    ) -> list[int]:
        """As `encode_chat`, with each piece of text encoded by `encode`, in their order."""
        ...


class PairingTokenizer(Tokenizer, Protocol):
    """A tokenizer that makes one prompt of two texts, as encoders take them, and prompts that are not too long."""

    def encode_texts(self, texts: Sequence[str], most: int | None = None) -> tuple[list[int], int | None]:
        """Token ids of one text or two, with special tokens around and between them, and where those of the second
        begin; None if the model is not told which text a token is of.

        Args:
            texts: One, or two.
            most: How many tokens there may be, special ones included: the end of the last text is left out. None keeps
                all. There are more if something else is too long.
        """
        ...


class SpellingTokenizer(Tokenizer, Protocol):
    """A tokenizer that knows its tokens as bytes."""

    def token_bytes(self, token_id: int) -> bytes | None:
        """What a token adds to a text, be it part of a character; None if that is not known."""
        ...


class ResponseParser(Protocol):
    """Takes a model's answer apart while it comes: reasoning, content, tool calls. One per branch.

    Events are mappings as transformers' response parser makes them: ``type`` is ``"region_open"``, ``"region_chunk"``
    or ``"region_close"``, ``field`` says of what, ``text`` is new text and ``value`` what a closed region means; None
    if it cannot be read. ``raw`` is what was written: the mark of a region that opens, all of one that closes, with
    its marks.
    """

    def feed(self, text: str) -> list[dict[str, Any]]:
        """Events of new text."""
        ...

    def finalize(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The whole message, and the events of what was held back."""
        ...


class ParsingTokenizer(Tokenizer, Protocol):
    """A tokenizer that knows how its model writes reasoning and tool calls.

    Attributes:
        parses_responses: Whether it does: there is a response template.
        takes_tools: Whether the chat template has a place for tools.
        call_marks: The texts that open and close a tool call; None if they are not fixed texts.
        reasons: Whether an answer may have reasoning in it.
    """

    parses_responses: bool
    takes_tools: bool
    call_marks: tuple[str, str] | None
    reasons: bool

    def response_parser(self, prompt: Sequence[int], tools: Sequence[Mapping[str, Any]]) -> ResponseParser:
        """A parser of the answer to a prompt, which may have begun the answer.

        Raises:
            ValueError: There is no response template.
        """
        ...
