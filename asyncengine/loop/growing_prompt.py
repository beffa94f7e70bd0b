"""A prompt that comes in pieces, and those of its tokens that are certain. Owned by the loop that reads the pieces."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping

import numpy as np

from asyncengine.errors import InvalidRequestError
from asyncengine.loop.encoding import encode
from asyncengine.loop.prepare import check_length
from asyncengine.loop.token_ids import token_ids_of
from asyncengine.step.batch import NO_TOKENS, Int32
from asyncengine.step.model import ModelView

_HELD_BACK = 8
"""Tokens at the end of a text that what follows may still change, or that the tokenizer puts after every text."""
_GROWTH = 16
"""A text is encoded anew once it has grown by this share: all that work together is some 16 times that of the last."""


class GrowingPrompt:
    """Takes pieces and says which tokens are new.

    Of a text nothing is certain before its end: what follows a word may change its tokens. So all but the last few are
    given ahead, and where a later look finds others, they are taken back from there. In the end the tokens are those
    of the whole text, encoded at once.
    """

    def __init__(self, view: ModelView) -> None:
        self._view = view
        self._texts: list[str] = []
        self._length = 0  # characters
        self._encoded = 0  # characters, when the text was last encoded
        self._page_size = view.config.kv_cache_page_size or 1
        self._given = NO_TOKENS
        self._behind: list[Int32] = []  # pieces given after those: put together once, not each time
        self._count = 0  # tokens given

    @property
    def token_ids(self) -> Int32:
        """(tokens,) those that were given so far."""
        if self._behind:
            self._given = np.concatenate([self._given, *self._behind])
            self._behind.clear()
        return self._given

    async def add(self, piece: object) -> tuple[int, Int32]:
        """Takes a piece; returns how many of the tokens given before still hold, and what comes after them.

        Raises:
            InvalidRequestError: It is not text or token ids, as the others are; or the prompt is too long.
        """
        if isinstance(piece, str):
            if self._count and not self._texts:
                raise InvalidRequestError(
                    f"the prompt's pieces are token ids and {piece!r:.40}; expected token ids alone"
                )
            return await self._add_text(piece)
        if self._texts:
            raise InvalidRequestError(f"the prompt's pieces are text and {piece!r:.40}; expected text alone")
        return self._add_ids(piece)

    async def finish(self) -> tuple[int, Int32]:
        """As `add`, once all pieces have come.

        Raises:
            InvalidRequestError: The prompt is empty, cannot be encoded, or is too long.
        """
        if self._texts:
            return self._give((await encode("".join(self._texts), self._view)).ids)
        if not self._count:
            raise InvalidRequestError("the prompt is empty: no piece had a token; allowed: at least one token")
        return self._count, self._given[:0]

    def _add_ids(self, piece: object) -> tuple[int, Int32]:
        if isinstance(piece, (bytes, bytearray, Mapping)):
            raise InvalidRequestError(f"the prompt has the piece {piece!r:.40}; expected text or token ids")
        if isinstance(piece, Iterable):
            ids = list(piece)
        else:
            try:
                ids = [operator.index(piece)]  # type: ignore[arg-type]  # that is what is found out
            except TypeError as error:
                raise InvalidRequestError(
                    f"the prompt has the piece {piece!r:.40}; expected text or token ids"
                ) from error
        kept = self._count
        if not ids:
            return kept, self._given[:0]
        new = token_ids_of(ids, self._view)
        check_length(kept + len(new), self._view)
        self._behind.append(new)
        self._count += len(new)
        return kept, new

    async def _add_text(self, piece: str) -> tuple[int, Int32]:
        if piece:
            self._texts.append(piece)
            self._length += len(piece)
        if self._length - self._encoded < max(self._page_size, self._length // _GROWTH):
            return len(self._given), self._given[:0]
        self._encoded = self._length
        self._texts = ["".join(self._texts)]
        if not self._texts[0].strip():  # there may not be a token in it
            return len(self._given), self._given[:0]
        certain = (await encode(self._texts[0], self._view)).ids[:-_HELD_BACK]
        if len(certain) < len(self._given) and np.array_equal(certain, self._given[: len(certain)]):
            return len(self._given), self._given[:0]  # a word became whole, and its tokens fewer
        return self._give(certain)

    def _give(self, token_ids: Int32) -> tuple[int, Int32]:
        check_length(len(token_ids), self._view)
        length = min(len(token_ids), len(self._given))
        different = np.flatnonzero(token_ids[:length] != self._given[:length])
        keep = int(different[0]) if len(different) else length
        self._given = token_ids
        self._count = len(token_ids)
        return keep, token_ids[keep:]
