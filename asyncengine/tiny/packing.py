"""Chats and texts as tokens, packed into rows of one length so that a step wastes no work on padding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from tokenizers import Tokenizer

from asyncengine.tiny.corpus import Chat, Message
from asyncengine.tiny.tokenizer import BOS, END, PAD, ROLES, token_id

IGNORED = -100  # the label that cross entropy leaves out
PADDING = 0  # the segment of padding
OPEN_ROWS = 32  # rows that may still take a document; more would pack tighter and take longer


@dataclass(frozen=True, slots=True)
class Document:
    """Token ids, and the same ids as labels: `IGNORED` where the model need not predict them."""

    ids: list[int]
    labels: list[int]


@dataclass(slots=True)
class Row:
    """Documents side by side. A token attends to earlier tokens of its own segment.

    Attributes:
        ids: Token ids.
        labels: What each position has to predict, which is the next token of its document.
        segments: The number of the document in its row; `PADDING` where there is none.
        positions: The position in the document.
    """

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    segments: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)

    def add(self, document: Document, segment: int) -> None:
        """Appends a document."""
        self.ids += document.ids
        self.labels += [*document.labels[1:], IGNORED]
        self.segments += [segment] * len(document.ids)
        self.positions += range(len(document.ids))


def encode_chat(tokenizer: Tokenizer, chat: Chat) -> Document:
    """A chat as the chat template writes it; only what the assistant says is to be predicted."""
    document = Document([token_id(BOS)], [IGNORED])
    for message in (*chat.prompt, Message(role="assistant", content=chat.answer)):
        ids = [*tokenizer.encode(message["content"], add_special_tokens=False).ids, token_id(END)]
        document.ids.extend([token_id(ROLES[message["role"]]), *ids])
        document.labels.extend([IGNORED, *(ids if message["role"] == "assistant" else [IGNORED] * len(ids))])
    return document


def encode_text(tokenizer: Tokenizer, text: str) -> Document:
    """A plain text, all of which is to be predicted."""
    ids = [*tokenizer.encode(text).ids, token_id(END)]
    return Document(ids, list(ids))


def pack(documents: Iterable[Document], length: int) -> Iterator[Row]:
    """Puts each document into the first row it fits into. Longer documents are left out."""
    rows: list[Row] = []
    for document in documents:
        if len(document.ids) > length:
            continue
        row = next((row for row in rows if len(row.ids) + len(document.ids) <= length), None)
        if row is None:
            if len(rows) == OPEN_ROWS:
                yield _padded(rows.pop(0), length)
            row = Row()
            rows.append(row)
        row.add(document, 1 + max(row.segments, default=0))
    for row in rows:
        yield _padded(row, length)


def _padded(row: Row, length: int) -> Row:
    padding = length - len(row.ids)
    if padding:
        row.add(Document([token_id(PAD)] * padding, [IGNORED] * padding), PADDING)
    return row
