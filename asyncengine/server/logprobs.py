"""Log-probabilities as OpenAI's clients want them."""

from __future__ import annotations

from collections.abc import Sequence

from asyncengine.detokenizer import Detokenizer
from asyncengine.outputs import RequestOutput
from asyncengine.server.chunks import (
    ChatLogprob,
    ChatLogprobs,
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobs,
    TopLogprob,
)
from asyncengine.server.token_text import REPLACEMENT, token_text
from asyncengine.step.batch import TokenLogprobs
from asyncengine.tokenizer import Tokenizer

_Token = tuple[str, bytes | None]
"""Text and bytes."""


def chat_logprobs(output: RequestOutput, tokenizer: Tokenizer) -> ChatLogprobs | None:
    """Those of a delta; None if none were asked for."""
    if output.logprobs is None:
        return None
    found = []
    for token_id, entry in _shown(output):
        top = [
            TopLogprob(*_named(tokenizer, other, logprob))
            for other, logprob in zip(entry.top_ids, entry.top_logprobs, strict=True)
        ]
        found.append(ChatLogprob(*_named(tokenizer, token_id, entry.logprob), top))
    return ChatLogprobs(found)


class CompletionTokens:
    """Log-probabilities of one branch of a completion; offsets go on from delta to delta.

    Args:
        tokenizer: Knows the tokens' texts.
        top: How many of the likeliest tokens are named.
        ending: Whether the token that ends the branch has an entry, though it is not part of the text.
        skips_special: Whether special tokens are not part of the text: they have entries, and no length.
        echo: What the text begins with before any token is generated.
        before: The end of the prompt.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        top: int,
        ending: bool,
        skips_special: bool,
        echo: str = "",
        before: Sequence[int] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._top = top
        self._ending = ending
        self._skips_special = skips_special
        self._echo = echo
        self._places = _Places(tokenizer, skips_special, len(echo), before)

    def of(self, output: RequestOutput) -> CompletionLogprobs | None:
        """Those of a delta; None if none were asked for."""
        if output.logprobs is None:
            return None
        pairs = _shown(output) if not self._ending else list(zip(output.token_ids, output.logprobs, strict=True))
        token_ids = [token_id for token_id, _ in pairs]
        tokens = self._texts(token_ids)
        return self._entries(token_ids, tokens, [entry for _, entry in pairs], self._places.of(token_ids, tokens))

    def prompt(
        self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None], written: bool
    ) -> CompletionLogprobs:
        """Those of the prompt, which come before.

        Args:
            token_ids: The prompt.
            logprobs: One entry per token.
            written: Whether the prompt was given as text. The echo is that text: what it says of special tokens is
                part of it, and those that the tokenizer puts around every text are not.
        """
        tokens, length = self._texts(token_ids), len(self._echo)
        before, behind = _around(self._tokenizer, token_ids) if written else (0, 0)
        body = slice(before, len(token_ids) - behind)
        places = _Places(self._tokenizer, self._skips_special and not written, 0)
        # A tokenizer may normalize a text, and so make another of it than the one that is echoed.
        found = [min(place, length) for place in places.of(token_ids[body], tokens[body])]
        return self._entries(token_ids, tokens, logprobs, [0] * before + found + [length] * behind)

    def _texts(self, token_ids: Sequence[int]) -> list[_Token]:
        return [token_text(self._tokenizer, token_id) for token_id in token_ids]

    def _entries(
        self,
        token_ids: Sequence[int],
        tokens: Sequence[_Token],
        logprobs: Sequence[TokenLogprobs | None],
        offsets: list[int],
    ) -> CompletionLogprobs:
        texts = [text for text, _ in tokens]
        scores = [None if entry is None else _finite(entry.logprob) for entry in logprobs]
        top = None
        if self._top:
            top = [
                None if entry is None else self._likeliest(token_id, text, entry)
                for token_id, text, entry in zip(token_ids, texts, logprobs, strict=True)
            ]
        return CompletionLogprobs(texts, scores, top, offsets)

    def _likeliest(self, token_id: int, token: str, entry: TokenLogprobs) -> dict[str, float]:
        """With the token itself, as OpenAI has it.

        Tokens may have one text and be different, above all parts of characters: they are named by their bytes, as
        OpenAI names them, or else by their ids.
        """
        found: dict[str, float] = {}
        for other, logprob in zip(entry.top_ids[: self._top], entry.top_logprobs, strict=False):
            name = token
            if other != token_id:
                name, raw = token_text(self._tokenizer, other)
                if raw is not None and REPLACEMENT in name:
                    name = "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
                if name == token or name in found:
                    name = f"token_id:{other}"
            found[name] = _finite(logprob)
        found.setdefault(token, _finite(entry.logprob))
        return found


class _Places:
    """Where tokens begin in a text, as they come: one with a part of a character begins where the character does.

    Args:
        tokenizer: Decodes them.
        skips_special: Whether special tokens are not part of the text.
        begin: Where the first one begins.
        before: The tokens before it.
    """

    def __init__(self, tokenizer: Tokenizer, skips_special: bool, begin: int, before: Sequence[int] = ()) -> None:
        self._detokenizer = Detokenizer(tokenizer, skips_special, before)
        self._at = begin
        self._broken = False  # whether the last token ends within a character

    def of(self, token_ids: Sequence[int], tokens: Sequence[_Token]) -> list[int]:
        """Places of the tokens that come next."""
        found = []
        for token_id, (text, raw) in zip(token_ids, tokens, strict=True):
            if self._broken and raw and not 0x80 <= raw[0] < 0xC0:  # what was begun before never becomes whole
                self._at += len(self._detokenizer.flush())
            found.append(self._at)
            self._at += len(self._detokenizer.push([token_id]))
            self._broken = text.endswith(REPLACEMENT)
        return found


def joined(first: CompletionLogprobs | None, second: CompletionLogprobs | None) -> CompletionLogprobs | None:
    """The first, with the second added to it."""
    if first is None or second is None:
        return second if first is None else first
    first.tokens += second.tokens
    first.token_logprobs += second.token_logprobs
    first.text_offset += second.text_offset
    if first.top_logprobs is not None and second.top_logprobs is not None:
        first.top_logprobs += second.top_logprobs
    return first


def prompt_logprobs(
    token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None], top: int, tokenizer: Tokenizer
) -> PromptLogprobs:
    """Those of a prompt's tokens and of the likeliest in their places, by the ids of the tokens."""
    found: PromptLogprobs = []
    for token_id, entry in zip(token_ids, logprobs, strict=True):
        if entry is None:
            found.append(None)
            continue
        likeliest = dict(zip(entry.top_ids[:top], entry.top_logprobs, strict=False))
        ranks = {other: rank for rank, other in enumerate(likeliest, 1)}
        named = {token_id: entry.logprob} | likeliest
        found.append(
            {
                str(other): PromptLogprob(_finite(logprob), ranks.get(other), token_text(tokenizer, other)[0])
                for other, logprob in named.items()
            }
        )
    return found


def _shown(output: RequestOutput) -> list[tuple[int, TokenLogprobs]]:
    """Tokens with their entries, without the token that ended the branch: it is not part of the text."""
    assert output.logprobs is not None
    pairs = list(zip(output.token_ids, output.logprobs, strict=True))
    return pairs[:-1] if type(output.stop_reason) is int else pairs


def _around(tokenizer: Tokenizer, token_ids: Sequence[int]) -> tuple[int, int]:
    """How many tokens before and behind a text are those that the tokenizer puts around every text."""
    around, before = tokenizer.encode(""), 0
    while before < min(len(around), len(token_ids)) and token_ids[before] == around[before]:
        before += 1
    behind = len(around) - before
    return before, behind if behind and list(token_ids[-behind:]) == around[before:] else 0


def _named(tokenizer: Tokenizer, token_id: int, logprob: float) -> tuple[str, float, list[int] | None]:
    text, raw = token_text(tokenizer, token_id)
    return text, _finite(logprob), None if raw is None else list(raw)


def _finite(logprob: float) -> float:
    """JSON has no infinity; what is impossible is very unlikely."""
    return max(logprob, -9999.0)
