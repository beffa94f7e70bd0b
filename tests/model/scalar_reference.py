"""What a request should have got, computed slowly: one row at a time, in float64, from one plain forward.

The reference is led along the tokens that the engine drew: at each position it says whether the token was the one to
draw. So a draw at the edge of two tokens' shares, which float32 may decide either way, costs nothing that follows.
What two tokens within `TIE` of each other's logits decide between them is left to the engine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from asyncengine import BranchResult, FinishReason, GenerationConfig, LogitsRow, TokenLogprobs
from asyncengine.grammar.protocol import Grammar, Matcher
from asyncengine.model.random_stream import uniforms

Row = NDArray[np.float64]
TIE = 1e-4
EDGE = 2e-3
CLOSE = 1e-3


@dataclass(frozen=True)
class Reference:
    """A model, its tokenizer, and how response formats become grammars."""

    model: Any
    tokenizer: Any
    compile: Callable[[Any], Grammar]
    end: int
    _told: dict[object, tuple[list[Row], list[Row]]] = field(default_factory=dict)

    def check(self, prompt: list[int], config: GenerationConfig, branch: BranchResult, limit: int) -> None:
        """Compares one branch with what its request asks for.

        Args:
            prompt: Token ids.
            config: What was asked for.
            branch: What came of it.
            limit: Most tokens in one sequence.

        Raises:
            AssertionError: It is something else.
        """
        ids = branch.token_ids
        most = limit - len(prompt)
        most = most if config.max_tokens is None else min(config.max_tokens, most)
        if most == 0:
            assert (ids, branch.text, branch.finish_reason) == ([], "", FinishReason.LENGTH)
            return
        assert ids, "at least one token was due"
        key = (tuple(prompt), id(config), branch.index, tuple(ids))
        told = self._told.get(key)
        if told is None:  # other engines drew the same tokens, most likely
            told = self._told[key] = self._follow(prompt, config, branch.index, ids, branch)
        raw_rows, rows = told
        self._check_end(prompt, ids, config, most, branch)
        assert (branch.logprobs is not None) == config.logprobs
        for token_id, entry, raw, row in zip(ids, branch.logprobs or [], raw_rows, rows, strict=False):
            check_logprobs(raw, row, token_id, entry, config)

    def check_contradiction(
        self, prompt: list[int], config: GenerationConfig, branches: list[BranchResult], limit: int
    ) -> None:
        """Looks whether a request that was dropped had a branch for which nothing was left to draw."""
        stuck = []
        for branch in branches:
            ids = branch.token_ids
            if branch.finish_reason is not FinishReason.ERROR:
                self.check(prompt, config, branch, limit)
                continue
            matcher = self._matcher(config, ids)
            if ids:
                self._follow(prompt, config, branch.index, ids, branch)
            row = self.logits(prompt + ids)[-1]
            stuck.append(not np.isfinite(self._adjusted(row, prompt, ids, config, branch.index, matcher)).any())
        assert any(stuck), "something could have been drawn"

    def logits(self, ids: list[int]) -> Row:
        """(tokens, vocabulary) of one plain forward."""
        with torch.inference_mode():
            logits: Row = self.model(torch.tensor([ids])).logits[0].double().numpy()
        return logits

    def _follow(
        self, prompt: list[int], config: GenerationConfig, index: int, ids: list[int], branch: BranchResult
    ) -> tuple[list[Row], list[Row]]:
        """Checks each token; returns the rows of logits, untouched and as they were drawn from."""
        logits = self.logits(prompt + ids)
        matcher = self._matcher(config, [])
        raws, rows = [], []
        for at, token_id in enumerate(ids):
            raw: Row = logits[len(prompt) - 1 + at]
            row = self._adjusted(raw.copy(), prompt, ids[:at], config, index, matcher)
            assert np.isfinite(row[token_id]), (at, token_id, "is forbidden", config)
            assert config.seed is not None
            u = float(uniforms(np.array([(config.seed + index) % 2**64], np.uint64), np.array([at]))[0])
            assert may_draw(row, token_id, u, config), (at, token_id, config)
            if matcher is not None:
                matcher.accept(token_id)
                assert not matcher.finished or at + 1 == len(ids), "it goes on after its grammar's end"
            raws.append(raw)
            rows.append(row)
        if matcher is not None and matcher.finished and branch.stop_reason is None:
            assert branch.finish_reason is FinishReason.STOP
        return raws, rows

    def _matcher(self, config: GenerationConfig, ids: list[int]) -> Matcher | None:
        if config.response_format is None:
            return None
        matcher = self.compile(config.response_format).matcher()
        for token_id in ids:
            matcher.accept(token_id)
        return matcher

    def _stops(self, config: GenerationConfig) -> set[int]:
        return set(config.stop_token_ids) | (set() if config.ignore_eos else {self.end})

    def _adjusted(
        self, row: Row, prompt: list[int], ids: list[int], config: GenerationConfig, index: int, matcher: Matcher | None
    ) -> Row:
        """A row of logits after biases, penalties, processors and masks, in the order of contract 15."""
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
        forbidden: set[int] = set()
        if matcher is not None:
            words = np.zeros(-(-len(row) // 32), np.int32)
            matcher.fill(words)
            allowed = {token for token in range(len(row)) if words[token // 32] >> (token % 32) & 1}
            if allowed == {self.end}:
                return np.where(np.arange(len(row)) == self.end, row, -np.inf)
            forbidden |= set(range(len(row))) - allowed
            if config.ignore_eos:
                forbidden.add(self.end)
        if config.allowed_token_ids is not None:
            forbidden |= set(range(len(row))) - set(config.allowed_token_ids)
        if len(ids) < config.min_tokens:
            forbidden |= self._stops(config)
        for word in self._bad_words(config):
            if len(ids) >= len(word) - 1 and ids[len(ids) - len(word) + 1 :] == word[:-1]:
                forbidden.add(word[-1])
        row[list(forbidden)] = -np.inf
        return row

    def _bad_words(self, config: GenerationConfig) -> list[list[int]]:
        """As token ids: a text stands for itself with and without a space before it."""
        words: list[list[int]] = []
        for word in config.bad_words:
            texts = [word.lstrip(), " " + word.lstrip()] if isinstance(word, str) else []
            words += [self.tokenizer.encode(text, add_special_tokens=False) for text in texts]
            words += [] if isinstance(word, str) else [[*word]]
        return words

    def _check_end(
        self, prompt: list[int], ids: list[int], config: GenerationConfig, most: int, branch: BranchResult
    ) -> None:
        """A branch ends at the first token at which it must, for the reason that it then has, and with its text."""
        seen = [self._end(prompt, ids[:count], config, most) for count in range(1, len(ids) + 1)]
        assert seen[:-1] == [None] * (len(ids) - 1), f"it should have ended after {seen}"
        end = seen[-1]
        if end is None or end[1] is None:  # the length, or the end of its grammar, which `_follow` has looked at
            by_grammar = config.response_format is not None and branch.finish_reason is FinishReason.STOP
            assert end is not None or by_grammar, f"it ended early, by {branch.finish_reason}"
            end = ("stop" if by_grammar else "length", None, self._text(prompt, ids, config))
        assert (branch.finish_reason, branch.stop_reason) == end[:2]
        assert branch.text == (end[2] if config.detokenize else "")

    def _end(
        self, prompt: list[int], ids: list[int], config: GenerationConfig, most: int
    ) -> tuple[str, int | str | None, str] | None:
        if ids[-1] in self._stops(config) and len(ids) > config.min_tokens:
            return "stop", ids[-1], self._text(prompt, ids[:-1], config)
        text = self._text(prompt, ids, config)
        found = [(text.index(stop) + len(stop), text.index(stop), stop) for stop in config.stop_strs if stop in text]
        if found:
            _, at, stop = min(found)
            return "stop", stop, text[:at]
        return ("length", None, text) if len(ids) == most else None

    def _text(self, prompt: list[int], ids: list[int], config: GenerationConfig) -> str:
        """What the tokens add to the prompt's text, whose last character may have been begun there."""
        before = self._decode(prompt, config)
        text = self._decode(prompt + ids, config)[len(before.rstrip("\ufffd")) :]
        for _ in range(len(before) - len(before.rstrip("\ufffd"))):
            text = text.removeprefix("\ufffd")
        return text

    def _decode(self, ids: list[int], config: GenerationConfig) -> str:
        text: str = self.tokenizer.decode(
            ids, skip_special_tokens=config.skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return text


def may_draw(row: Row, token_id: int, u: float, config: GenerationConfig) -> bool:
    """Whether the token is the one to draw, or as good as it."""
    if not config.temperature:
        return bool(row[token_id] >= row.max() - TIE)
    for weights in kept(row, config):
        shares = weights.cumsum() / weights.sum()
        low = shares[token_id] - weights[token_id] / weights.sum()
        if weights[token_id] > 0 and low - EDGE <= u <= shares[token_id] + EDGE:
            return True
    ranked = np.sort(row)[::-1]
    k = config.top_k
    tied = k is not None and k < len(row) and ranked[k - 1] - ranked[k] < TIE
    return bool(tied and row[token_id] >= ranked[(k or 1) - 1] - TIE)


def kept(row: Row, config: GenerationConfig) -> list[Row]:
    """Weights of the tokens that temperature, top-k, min-p and top-p leave; three times, for edges that are close."""
    found = []
    for slack in (0.0, CLOSE, -CLOSE):
        weights = np.exp((row - row.max()) / (config.temperature or 1.0))
        if config.temperature:
            ranked = np.lexsort((np.arange(len(row)), -row))
            if config.top_k is not None:
                weights[ranked[config.top_k :]] = 0.0
            weights[weights < (config.min_p or 0.0) * (1 - slack)] = 0.0
            mass = weights[ranked].cumsum() / weights.sum()
            before = np.concatenate([[0.0], mass[:-1]])
            weights[ranked[before >= (config.top_p or 1.0) * (1 + slack)]] = 0.0
        found.append(weights)
    return found


def check_logprobs(raw: Row, row: Row, token_id: int, entry: TokenLogprobs, config: GenerationConfig) -> None:
    """Compares an entry with the distribution of untouched logits, or with the one that was drawn from."""
    if config.logprobs_mode == "raw":
        check_entry(raw, token_id, entry, config.top_logprobs)
        return
    with np.errstate(divide="ignore"):
        ways = [np.log(weights / weights.sum()) for weights in kept(row, config)]
    top = config.top_logprobs
    assert any(
        abs(entry.logprob - way[token_id]) < CLOSE
        and len(entry.top_logprobs) == min(top, int(np.isfinite(way).sum()))
        and np.allclose(np.sort(way)[::-1][: len(entry.top_logprobs)], entry.top_logprobs, atol=CLOSE)
        for way in ways
    ) or (config.top_k is not None and config.temperature), (token_id, entry, config)


def check_entry(raw: Row, token_id: int, entry: TokenLogprobs, k: int) -> None:
    """Compares an entry with the distribution of untouched logits."""
    logprobs = raw - raw.max()
    logprobs = logprobs - np.log(np.exp(logprobs).sum())
    assert abs(entry.logprob - logprobs[token_id]) < CLOSE
    assert len(entry.top_logprobs) == k
    assert np.abs(np.sort(logprobs)[::-1][:k] - np.array(entry.top_logprobs)).max(initial=0.0) < CLOSE
    for token, value in zip(entry.top_ids, entry.top_logprobs, strict=True):
        assert abs(logprobs[token] - value) < CLOSE
