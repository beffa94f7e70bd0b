"""What the engine asks of a grammar, and all that it knows of the libraries behind it."""

from __future__ import annotations

from typing import Protocol

from asyncengine.response_format import ResponseFormat
from asyncengine.step.batch import Int32


class Matcher(Protocol):
    """How far one branch has come in its grammar. Made and used on the step thread alone."""

    @property
    def finished(self) -> bool:
        """Whether the text is complete and nothing can follow it."""
        ...

    @property
    def forces(self) -> bool:
        """Whether it may be that one token alone can come next; takes far less time than `fill`.

        False where there is a choice for certain, and then nobody looks for tokens to jump over: a row is filled while
        the device computes the logits that it is for.
        """
        ...

    def fill(self, row: Int32) -> None:
        """Writes which tokens may come next.

        Args:
            row: (words,) token t is bit t % 32 of word t // 32. Every word is written; tokens beyond it are left out.

        Raises:
            Exception: The grammar cannot go on; its request ends.
        """
        ...

    def accept(self, token_id: int) -> None:
        """Goes on by one token.

        Raises:
            Exception: The token may not come here.
        """
        ...


class Grammar(Protocol):
    """A compiled response format. Immutable; may be shared by any number of requests.

    Attributes:
        end_token_ids: Tokens that end a text which may end; `Matcher.fill` sets them wherever it may.
    """

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """As above."""
        ...

    def matcher(self) -> Matcher:
        """One that has seen no token. Cheap. Safe on any thread."""
        ...


class GrammarBackend(Protocol):
    """Compiles response formats for one vocabulary. Never called on an event loop or on the step thread."""

    def compile(self, wanted: ResponseFormat) -> Grammar:
        """Compiles.

        Raises:
            ValueError: The format is wrong, or this back end does not know something that it uses.
        """
        ...
