"""Log-probabilities as OpenAI's clients want them."""

from __future__ import annotations

from asyncengine.outputs import RequestOutput
from asyncengine.server.chunks import ChatLogprob, ChatLogprobs, CompletionLogprobs, TopLogprob
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
    """Log-probabilities of one branch of a completion; offsets go on from delta to delta."""

    def __init__(self, tokenizer: Tokenizer, top: int) -> None:
        self._tokenizer = tokenizer
        self._top = top
        self._offset = 0

    def of(self, output: RequestOutput) -> CompletionLogprobs | None:
        """Those of a delta; None if none were asked for."""
        if output.logprobs is None:
            return None
        found = CompletionLogprobs([], [], [] if self._top else None, [])
        for token_id, entry in _shown(output):
            token, _ = _token(self._tokenizer, token_id)
            found.tokens.append(token)
            found.token_logprobs.append(_finite(entry.logprob))
            found.text_offset.append(self._offset)
            self._offset += len(token)
            if found.top_logprobs is not None:
                pairs = zip(entry.top_ids, entry.top_logprobs, strict=True)
                found.top_logprobs.append({_token(self._tokenizer, i)[0]: _finite(p) for i, p in pairs})
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
