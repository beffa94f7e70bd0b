"""What a request should have got, computed slowly: one row at a time, in float64, from one plain forward.

The reference is led along the tokens that the engine drew: at each position it says whether the token was the one to
draw. So a draw at the edge of two tokens' shares, which float32 may decide either way, costs nothing that follows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from asyncengine import BranchResult, GenerationConfig, LogitsRow, TokenLogprobs
from asyncengine.grammar.protocol import Grammar, Matcher
from asyncengine.model.random_stream import uniforms

Row = NDArray[np.float64]
EDGE = 2e-3


@dataclass(frozen=True)
class Reference:
    """A model, its tokenizer, and how response formats become grammars."""

    model: Any
    tokenizer: Any
    compile: Callable[[Any], Grammar]
    end: int = 2

    def check(
        self, prompt: list[int], config: GenerationConfig, branch: BranchResult, seed: int, max_tokens: int
    ) -> None:
        """Raises AssertionError where a branch is not what the configuration asks for."""
        ids = branch.token_ids
        with torch.inference_mode():
            logits = self.model(torch.tensor([prompt + ids])).logits[0].double().numpy()
        stops = set(config.stop_token_ids) | (set() if config.ignore_eos else {self.end})
        wanted = config.response_format
        matcher = None if wanted is None else self.compile(wanted).matcher()
        for at, token_id in enumerate(ids):
            raw: Row = logits[len(prompt) - 1 + at]
            row = self._adjusted(raw.copy(), prompt, ids[:at], config, branch.index, stops, matcher)
            assert np.isfinite(row[token_id]), (at, token_id, "is forbidden")
            u = float(uniforms(np.array([(seed + branch.index) % 2**64], np.uint64), np.array([at]))[0])
            assert may_draw(row, token_id, u, config), (at, token_id, config)
            if config.logprobs:
                assert branch.logprobs is not None
                check_logprobs(raw, token_id, branch.logprobs[at], config.top_logprobs)
            if matcher is not None:
                matcher.accept(token_id)
            ended = self._end(ids[: at + 1], config, stops, matcher, max_tokens)
            assert (ended is not None) == (at + 1 == len(ids)), (at, ended, branch.finish_reason)
            if ended is not None:
                assert (branch.finish_reason, branch.stop_reason, branch.text) == ended
        assert ids, "at least one token was due"

    def _adjusted(
        self,
        row: Row,
        prompt: list[int],
        ids: list[int],
        config: GenerationConfig,
        index: int,
        stops: set[int],
        matcher: Matcher | None,
    ) -> Row:
        for token, bias in (config.logit_bias or {}).items():
            row[token] += bias
        for token in set(ids):
            row[token] -= (config.frequency_penalty or 0.0) * ids.count(token) + (config.presence_penalty or 0.0)
        repetition = config.repetition_penalty or 1.0
        for token in set(prompt + ids):
            row[token] = row[token] / repetition if row[token] > 0 else row[token] * repetition
        for processor in config.logits_processors:
            values = torch.from_numpy(row).float()
            processor(values, LogitsRow(np.array(prompt, np.int32), np.array(ids, np.int32), index))
            row = values.double().numpy()
        allowed = set(range(len(row)))
        if matcher is not None:
            words = np.zeros(-(-len(row) // 32), np.int32)
            matcher.fill(words)
            allowed = {token for token in allowed if words[token // 32] >> (token % 32) & 1}
            if allowed == {self.end}:
                return np.where(np.arange(len(row)) == self.end, row, -np.inf)
            if config.ignore_eos:
                allowed -= {self.end}
        if config.allowed_token_ids is not None:
            allowed &= set(config.allowed_token_ids)
        if len(ids) < config.min_tokens:
            allowed -= stops
        for word in config.bad_words:
            assert isinstance(word, tuple)
            if tuple(ids[len(ids) - len(word) + 1 :]) == word[:-1] and len(ids) >= len(word) - 1:
                allowed -= {word[-1]}
        keep = np.zeros(len(row), bool)
        keep[list(allowed)] = True
        return np.where(keep, row, -np.inf)

    def _end(
        self, ids: list[int], config: GenerationConfig, stops: set[int], matcher: Matcher | None, max_tokens: int
    ) -> tuple[str, int | str | None, str] | None:
        if ids[-1] in stops and len(ids) > config.min_tokens:
            return "stop", ids[-1], self._text(ids[:-1])
        text = self._text(ids)
        found = [(text.index(stop) + len(stop), stop) for stop in config.stop_strs if stop in text]
        if found:
            stop = min(found)[1]
            return "stop", stop, text[: text.index(stop)]
        if matcher is not None and matcher.finished:
            return "stop", None, text
        return ("length", None, text) if len(ids) == max_tokens else None

    def _text(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


def may_draw(row: Row, token_id: int, u: float, config: GenerationConfig) -> bool:
    """Whether the token is the one to draw, or as good as it."""
    if not config.temperature:
        return bool(row[token_id] >= row.max() - 1e-4)
    return any(_share_has(row, token_id, u, config, 1 + slack, 1 - slack) for slack in (0.0, 1e-3, -1e-3))


def _share_has(row: Row, token_id: int, u: float, config: GenerationConfig, top: float, least: float) -> bool:
    assert config.temperature
    weights = np.exp((row - row.max()) / config.temperature)
    ranked = np.lexsort((np.arange(len(row)), -row))
    if config.top_k is not None:
        weights[ranked[config.top_k :]] = 0.0
    weights[weights < (config.min_p or 0.0) * least] = 0.0
    mass = weights[ranked].cumsum() / weights.sum()
    before = np.concatenate([[0.0], mass[:-1]])
    weights[ranked[before >= (config.top_p or 1.0) * top]] = 0.0
    until = weights.cumsum() / weights.sum()
    low = until[token_id] - weights[token_id] / weights.sum()
    return bool(weights[token_id] > 0 and low - EDGE <= u <= until[token_id] + EDGE)


def check_logprobs(raw: Row, token_id: int, entry: TokenLogprobs, k: int) -> None:
    """Compares an entry with the distribution of untouched logits."""
    logprobs = raw - raw.max()
    logprobs = logprobs - np.log(np.exp(logprobs).sum())
    assert abs(entry.logprob - logprobs[token_id]) < 1e-3
    assert len(entry.top_logprobs) == k
    assert np.abs(np.sort(logprobs)[::-1][:k] - np.array(entry.top_logprobs)).max(initial=0.0) < 1e-3
