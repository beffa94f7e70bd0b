"""Log-probabilities as OpenAI's clients want them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from asyncengine.outputs import RequestOutput
from asyncengine.server.chunks import (
    ChatLogprob,
    ChatLogprobs,
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobs,
    TopLogprob,
)
from asyncengine.step.batch import TokenLogprobs
from asyncengine.tokenizer import Tokenizer


def chat_logprobs(output: RequestOutput, tokenizer: Tokenizer) -> ChatLogprobs | None:
    """Those of a delta; None if none were asked for."""
    if output.logprobs is None:
        return None
    found = []
    for token_id, entry in _shown(output):
        token, raw = _token(tokenizer, token_id)
        top = [
            TopLogprob(*_named(_token(tokenizer, other), logprob))
            for other, logprob in zip(entry.top_ids, entry.top_logprobs, strict=True)
        ]
        found.append(ChatLogprob(token, _finite(entry.logprob), raw, top))
    return ChatLogprobs(found)


class CompletionTokens:
    """Log-probabilities of one branch of a completion; offsets go on from delta to delta.

    Args:
        tokenizer: Knows the tokens' texts.
        top: How many of the likeliest tokens are named.
        ending: Whether the token that ends the branch has an entry, though it is not part of the text.
        skips_special: Whether special tokens are not part of the text: they have entries, and no length.
    """

    def __init__(self, tokenizer: Tokenizer, top: int, ending: bool, skips_special: bool) -> None:
        self._tokenizer = tokenizer
        self._top = top
        self._ending = ending
        self._skips_special = skips_special
        self._offset = 0

    def of(self, output: RequestOutput) -> CompletionLogprobs | None:
        """Those of a delta; None if none were asked for."""
        if output.logprobs is None:
            return None
        if self._ending:
            return self._entries(zip(output.token_ids, output.logprobs, strict=True))
        return self._entries(_shown(output))

    def prompt(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None]) -> CompletionLogprobs:
        """Those of the prompt, which come before."""
        return self._entries(zip(token_ids, logprobs, strict=True))

    def _entries(self, pairs: Iterable[tuple[int, TokenLogprobs | None]]) -> CompletionLogprobs:
        found = CompletionLogprobs([], [], [] if self._top else None, [])
        for token_id, entry in pairs:
            token, _ = _token(self._tokenizer, token_id)
            found.tokens.append(token)
            found.token_logprobs.append(None if entry is None else _finite(entry.logprob))
            found.text_offset.append(self._offset)
            self._offset += len(self._tokenizer.decode([token_id], self._skips_special))
            if found.top_logprobs is not None:
                found.top_logprobs.append(None if entry is None else self._likeliest(token, entry))
        return found

    def _likeliest(self, token: str, entry: TokenLogprobs) -> dict[str, float]:
        """With the token itself, as OpenAI has it."""
        found: dict[str, float] = {}
        for other, logprob in zip(entry.top_ids[: self._top], entry.top_logprobs, strict=False):
            # Two tokens may have one text, as pieces of characters do: the likelier of them stays.
            found.setdefault(_token(self._tokenizer, other)[0], _finite(logprob))
        found.setdefault(token, _finite(entry.logprob))
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
                str(other): PromptLogprob(_finite(logprob), ranks.get(other), _token(tokenizer, other)[0])
                for other, logprob in named.items()
            }
        )
    return found


def _shown(output: RequestOutput) -> list[tuple[int, TokenLogprobs]]:
    """Tokens with their entries, without the token that ended the branch: it is not part of the text."""
    assert output.logprobs is not None
    pairs = list(zip(output.token_ids, output.logprobs, strict=True))
    return pairs[:-1] if type(output.stop_reason) is int else pairs


def _token(tokenizer: Tokenizer, token_id: int) -> tuple[str, list[int] | None]:
    """A token's text and bytes. The bytes of a token that is only part of a character are not known."""
    text = tokenizer.decode([token_id], skip_special_tokens=False)
    return text, None if "\ufffd" in text else list(text.encode())


def _named(token: tuple[str, list[int] | None], logprob: float) -> tuple[str, float, list[int] | None]:
    return token[0], _finite(logprob), token[1]


def _finite(logprob: float) -> float:
    """JSON has no infinity; what is impossible is very unlikely."""
    return max(logprob, -9999.0)
