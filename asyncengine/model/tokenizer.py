"""A transformers tokenizer behind the engine's protocol. Immutable once loaded; safe from several threads."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from asyncengine.errors import CheckpointError, ContextLengthExceededError
from asyncengine.grammar.vocabulary import TokenTable
from asyncengine.known_turns import encode_known_turns, has_known_turns
from asyncengine.model import kept_tokenizer
from asyncengine.model.chat_template import ChatTemplate, check_template, template_of_processor
from asyncengine.model.checkpoint import has_tokenizer, tokenizer_sources
from asyncengine.model.text_files import check_tokenizer
from asyncengine.model.token_spelling import spelling_of
from asyncengine.tokenizer import Message, ResponseParser, Tokenizer, WritingTokenizer

_LONG = 4096
"""Characters beyond which a text is encoded as a batch: for nothing else the library lets go of the lock."""

_BEYOND = 64
"""Tokens that are looked at beyond those that are left of a text."""


class _WithTemplate(ABC):
    """Writes conversations by a chat template; the template writes special tokens itself, so pieces get none."""

    _template: ChatTemplate

    def encode_chat(self, messages: Sequence[Message], template_arguments: Mapping[str, Any]) -> list[int]:
        """As `asyncengine.tokenizer.Tokenizer`."""
        return self.encode_chat_by(messages, template_arguments, self.encode_piece)

    def encode_chat_by(
        self, messages: Sequence[Message], template_arguments: Mapping[str, Any], encode: Callable[[str], list[int]]
    ) -> list[int]:
        """As `asyncengine.tokenizer.WritingTokenizer`."""
        if has_known_turns(messages):
            return encode_known_turns(
                messages, lambda marked: self._template.write(marked, template_arguments), encode, self.decode
            )
        return encode(self._template.write(messages, template_arguments))

    @abstractmethod
    def encode_piece(self, text: str) -> list[int]:
        """As `asyncengine.tokenizer.WritingTokenizer`."""

    @abstractmethod
    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        """As `asyncengine.tokenizer.Tokenizer`."""


class FastTokenizer(_WithTemplate):
    """Over the `tokenizers` library, whose calls may overlap.

    Attributes:
        sources: Digest of what it was made of; None if that is not known.
        keep_at: Where it is to be kept for the next load; None if it is kept already, or not to be.
    """

    def __init__(self, tokenizer: Any, sources: str | None = None, keep_at: Path | None = None) -> None:
        self.sources = sources
        self.keep_at = keep_at
        self._chat = tokenizer
        self._template = ChatTemplate(tokenizer)
        # The library's own object: the wrapper's encode changes shared truncation settings on every call.
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._spelling = spelling_of(self._backend.decoder)
        template = getattr(tokenizer, "response_template", None)
        fields = template.get("fields", {}) if isinstance(template, dict) else {}
        marks = [fields.get("tool_calls", {}).get(name) for name in ("open", "close")]
        self.parses_responses = template is not None
        self.call_marks = (marks[0], marks[1]) if all(isinstance(mark, str) and mark for mark in marks) else None
        self.reasons = any(name in fields for name in ("reasoning_content", "reasoning", "thinking"))
        self.takes_tools = "tools" in str(tokenizer.chat_template or "")

    def keep(self) -> None:
        """Keeps it where it is to be kept. Takes about as long as reading the vocabulary."""
        kept_tokenizer.keep(self.keep_at, self._chat)
        self.keep_at = None

    def encode(self, text: str) -> list[int]:
        """As `asyncengine.tokenizer.Tokenizer`."""
        return self._encoded(text, True)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        """As `asyncengine.tokenizer.Tokenizer`."""
        text: str = self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text

    def encode_piece(self, text: str) -> list[int]:
        """As `asyncengine.tokenizer.WritingTokenizer`."""
        return self._encoded(text, False)

    def encode_texts(self, texts: Sequence[str], most: int | None = None) -> tuple[list[int], int | None]:
        """As `asyncengine.tokenizer.PairingTokenizer`."""
        try:
            encoding = self._backend.encode_batch_fast([tuple(texts) if len(texts) == 2 else texts[0]])[0]
            if most is not None and len(encoding) > most:
                encoding = self._cut(texts, most)
        except TypeError:
            "".join(texts).encode()
            raise
        return encoding.ids, _second(encoding.type_ids, self._chat)

    def _cut(self, texts: Sequence[str], most: int) -> Any:
        """The same in so many tokens at most: the end of the last text is left out.

        Raises:
            ContextLengthExceededError: Nothing of it would be left.
        """
        around = self._backend.num_special_tokens_to_add(len(texts) == 2)
        before = [self._backend.encode_batch([text], add_special_tokens=False)[0] for text in texts[:-1]]
        left = most - around - sum(map(len, before))
        if left < 1:
            raise ContextLengthExceededError(
                f"the prompt is to be cut to {most} tokens, and what is not cut of it has {most - left}; allowed: more"
            )
        # What follows holds the interpreter's lock for as long as the encoding is long, so that is made of the text's
        # beginning alone: with some tokens more, since the last ones would be others if the text went on.
        size, text = 8 * left + _BEYOND, texts[-1]
        while True:
            piece = self._backend.encode_batch([text[:size]], add_special_tokens=False)[0]
            if size >= len(text) or len(piece) >= left + _BEYOND:
                break
            size *= 2
        piece.truncate(left)
        return self._backend.post_process(*before, piece)

    def _encoded(self, text: str, add_special_tokens: bool) -> list[int]:
        try:
            if len(text) > _LONG:
                encoding = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0]
            else:
                encoding = self._backend.encode(text, add_special_tokens=add_special_tokens)
            ids: list[int] = encoding.ids
        except TypeError:  # which says that a string is none
            text.encode()  # says which half of a surrogate pair stands where
            raise
        return ids

    def token_bytes(self, token_id: int) -> bytes | None:
        """As `asyncengine.tokenizer.SpellingTokenizer`."""
        if self._spelling is None:
            return None
        token = self._backend.id_to_token(token_id)
        return b"" if token is None else self._spelling.bytes_of(token)

    def token_table(self) -> TokenTable:
        """As `asyncengine.grammar.vocabulary.TokenSource`."""
        added = self._backend.get_added_tokens_decoder().items()
        special = {token.content: token_id for token_id, token in added if token.special}
        others = {token.content: token_id for token_id, token in added if not token.special}
        return TokenTable(special, tokenizer_json=self._backend.to_str(), huggingface=self._chat, added=others)

    def response_parser(self, prompt: Sequence[int], tools: Sequence[Mapping[str, Any]]) -> ResponseParser:
        """As `asyncengine.tokenizer.ParsingTokenizer`."""
        if not self.parses_responses:
            raise ValueError("the tokenizer has no response_template")
        from asyncengine.model.answer_parser import AnswerParser  # not in the oldest transformers

        prefix = self.decode(prompt, skip_special_tokens=False)
        return AnswerParser(self._chat.response_template, prefix, tools)


class SlowTokenizer(_WithTemplate):
    """Over a tokenizer that is pure Python; one call at a time."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._template = ChatTemplate(tokenizer)
        self._lock = threading.Lock()

    def encode(self, text: str) -> list[int]:
        """As `asyncengine.tokenizer.Tokenizer`."""
        with self._lock:
            return list(self._tokenizer.encode(text))

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        """As `asyncengine.tokenizer.Tokenizer`."""
        with self._lock:
            text: str = self._tokenizer.decode(
                list(token_ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
            )
        return text

    def encode_piece(self, text: str) -> list[int]:
        """As `asyncengine.tokenizer.WritingTokenizer`."""
        with self._lock:
            return list(self._tokenizer.encode(text, add_special_tokens=False))

    def encode_target(self, text: str) -> list[int]:
        """As `encode_piece`, of what a model writes of another text: that may have a vocabulary of its own."""
        with self._lock:
            own = self._tokenizer
            own._switch_to_target_mode()
            try:
                return list(own.encode(text, add_special_tokens=False))
            finally:
                own._switch_to_input_mode()

    def encode_texts(self, texts: Sequence[str], most: int | None = None) -> tuple[list[int], int | None]:
        """As `asyncengine.tokenizer.PairingTokenizer`."""
        cut = {} if most is None else {"truncation": "only_second" if len(texts) == 2 else True, "max_length": most}
        with self._lock:
            found = self._tokenizer(*texts, **cut)
        return list(found["input_ids"]), _second(found.get("token_type_ids", ()), self._tokenizer)


def _second(types: Sequence[int], tokenizer: Any) -> int | None:
    """Where the second text begins, by the types of tokens, if the tokenizer gives those to its model."""
    told = "token_type_ids" in tokenizer.model_input_names and 1 in types
    return list(types).index(1) if told else None


def special_ids(tokenizer: Tokenizer | None) -> list[int]:
    """Ids of a tokenizer's special tokens, as far as it is one of transformers'."""
    own = own_of(tokenizer)
    return [] if own is None else list(own.all_special_ids)


def own_of(tokenizer: Tokenizer | None) -> Any:
    """Transformers' own tokenizer within one, to be looked at alone; None if it is none of these."""
    return getattr(tokenizer, "_chat", None) or getattr(tokenizer, "_tokenizer", None)


def encode_target(tokenizer: WritingTokenizer, text: str) -> list[int]:
    """Token ids of a piece of what a model writes, where it writes one text of another and has two vocabularies."""
    encode = tokenizer.encode_target if isinstance(tokenizer, SlowTokenizer) else tokenizer.encode_piece
    return encode(text)


def keep_for_next_load(tokenizer: Tokenizer | None) -> None:
    """Keeps what `load_tokenizer` has read, if it can be kept and is not."""
    if isinstance(tokenizer, FastTokenizer) and tokenizer.keep_at is not None:
        tokenizer.keep()


def load_tokenizer(path: Path, present: Tokenizer | None = None) -> Tokenizer | None:
    """The tokenizer of a checkpoint directory; None if it has none.

    Args:
        path: The directory.
        present: One that is loaded. It is returned if it was made of the same files: to read them again would hold the
            interpreter's lock for hundreds of milliseconds if the vocabulary is large.

    Raises:
        CheckpointError: Its files cannot be read.
    """
    if not has_tokenizer(path):
        return None
    sources = tokenizer_sources(path)
    if isinstance(present, FastTokenizer) and present.sources == sources:
        return present
    place = kept_tokenizer.place_of(path, sources)
    if (kept := kept_tokenizer.recall(place)) is not None:
        kept.chat_template = kept.chat_template or template_of_processor(path)
        return FastTokenizer(kept, sources)
    try:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:
        check_tokenizer(path)
        raise CheckpointError(f"the tokenizer in {path} cannot be loaded: {error}") from error
    if not tokenizer.chat_template:
        tokenizer.chat_template = template_of_processor(path)
    check_template(tokenizer, path)
    return FastTokenizer(tokenizer, sources, place) if tokenizer.is_fast else SlowTokenizer(tokenizer)
