"""The languages that a tokenizer of transformers' knows, and which tokens stand for them. Immutable."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from asyncengine.errors import InvalidRequestError

_CODE = re.compile(r"[a-z]{3}_[A-Z][a-z]{3}")
"""How NLLB writes languages: there is no list of them in its tokenizer but that of its special tokens."""
_NEAR = 5
_STARTS = ("MBartTokenizer", "PLBartTokenizer")
"""Tokenizers of models whose decoder begins with the language itself: with others, it is forced behind its start."""


@dataclass(frozen=True, slots=True)
class Languages:
    """What a tokenizer knows of languages.

    Attributes:
        ids: By code, the token that stands for a language; none where it knows none.
        before: What it puts before a source, and so behind it, where `own` stands for the source's language.
        behind: As `before`.
        own: The token of the language that a source is in where nothing is said.
        starts: Whether the decoder begins with its language, in place of the token that it begins with otherwise.
        marks: By code, what stands before a source to say which language its answer is in, for models told so (Marian).
    """

    ids: Mapping[str, int] = field(default_factory=dict)
    before: tuple[int, ...] = ()
    behind: tuple[int, ...] = ()
    own: int | None = None
    starts: bool = False
    marks: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, tokenizer: Any) -> Languages:
        """Those of one of transformers' tokenizers."""
        if not hasattr(tokenizer, "set_src_lang_special_tokens"):
            marks = getattr(tokenizer, "supported_language_codes", None) or ()
            return cls(marks={mark.strip("<>"): mark for mark in marks})
        codes = getattr(tokenizer, "lang_code_to_id", None)
        if not codes:
            codes = {
                token: tokenizer.convert_tokens_to_ids(token)
                for token in tokenizer.all_special_tokens
                if _CODE.fullmatch(token)
            }
        ids = {code.strip("_"): int(token) for code, token in codes.items()}
        before, behind = tuple(tokenizer.prefix_tokens), tuple(tokenizer.suffix_tokens)
        return cls(
            ids,
            before,
            behind,
            next((token for token in (*before, *behind) if token in ids.values()), None),
            type(tokenizer).__name__.removesuffix("Fast") in _STARTS,
        )

    def around(self, src_lang: str) -> tuple[list[int], list[int]]:
        """What stands before and behind a source in some language.

        Raises:
            InvalidRequestError: It is not known.
        """
        token = self._token("src_lang", src_lang)
        before, behind = ([token if each == self.own else each for each in side] for side in (self.before, self.behind))
        if self.own is None:  # one that says none by itself has it behind the source
            behind.append(token)
        return before, behind

    def target(self, tgt_lang: str) -> int:
        """The token of an answer's language.

        Raises:
            InvalidRequestError: It is not known.
        """
        return self._token("tgt_lang", tgt_lang)

    def mark(self, tgt_lang: str) -> str:
        """As `marks` has it.

        Raises:
            InvalidRequestError: It is not known.
        """
        mark = self.marks.get(tgt_lang.strip("<>"))
        if mark is None:
            raise _unknown("tgt_lang", tgt_lang, list(self.marks))
        return mark

    def _token(self, name: str, code: str) -> int:
        token = self.ids.get(code.strip("_"))
        if token is None:
            raise _unknown(name, code, list(self.ids))
        return token


def _unknown(name: str, code: str, known: Sequence[str]) -> InvalidRequestError:
    if not known:
        return InvalidRequestError(
            f"{name} is {code!r:.80}; the model's tokenizer tells no languages apart: leave it out"
        )
    lower = {each.lower(): each for each in known}
    near = [lower[each] for each in difflib.get_close_matches(code.lower(), lower, n=_NEAR, cutoff=0.4)]
    begun = [each for each in known if each.lower().startswith(code.lower()[:2]) and each not in near]
    some = (near + begun)[:_NEAR] or sorted(known)[:_NEAR]
    return InvalidRequestError(
        f"{name} is {code!r:.80}, which the model does not know; near it: {', '.join(map(repr, some))} "
        f"({len(known)} in all)"
    )
