"""Beam search: which beams go on with which tokens, and which texts have been found. Owned by the step thread.

The search is that of transformers' ``generate(num_beams=...)``: a text is as good as the sum of its tokens'
log-probabilities, divided by its length to the power of the length penalty (Wu et al., 2016). It knows nothing of
blocks and slots: the scheduler moves those as it says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from asyncengine.generation import SamplingParams
from asyncengine.outputs import FinishReason
from asyncengine.step.batch import TokenLogprobs


@dataclass(frozen=True, slots=True)
class Choice:
    """A beam, by its number, and the token that it goes on with."""

    beam: int
    token_id: int


@dataclass(frozen=True, slots=True)
class _Text:
    """A text up to some token: a list from its end, so that texts share their beginnings.

    Attributes:
        before: It without its last token; None of a text of one token.
        beam: The beam that it came of.
        token_id: The last token.
        logprob: That token's.
        total: The sum of all tokens' log-probabilities, in float32, in which transformers adds them up, too.
        length: How many tokens.
    """

    before: _Text | None
    beam: int
    token_id: int
    logprob: TokenLogprobs
    total: np.float32
    length: int


@dataclass(frozen=True, slots=True)
class _Found:
    """A text, how good it is, and why it ended; None if it has not."""

    text: _Text
    score: np.float32
    finish_reason: FinishReason | None


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A text that a search has found.

    Attributes:
        token_ids: Its tokens, with the one that ended it.
        logprobs: One for each.
        score: The sum of their log-probabilities, divided by the length to the power of the length penalty.
        finish_reason: Why it ended; None if it has not.
        stop_reason: The token that ended it, if one did.
    """

    token_ids: list[int]
    logprobs: list[TokenLogprobs]
    score: float
    finish_reason: FinishReason | None
    stop_reason: int | None


class BeamSearch:
    """The search of one request.

    Args:
        params: The request's.

    Attributes:
        num_told: Tokens of texts that were told of.
    """

    def __init__(self, params: SamplingParams) -> None:
        assert params.search is not None
        self.num_told = 0
        self._search = params.search
        self._stops = frozenset(params.ending_token_ids)
        self._num_logprobs = max(params.num_logprobs, 0)
        self._num_candidates = params.num_candidates
        self.begin()

    def begin(self) -> None:
        """Begins anew: the prompt is the only beam."""
        self._beams: dict[int, _Text | None] = {0: None}  # by its number, from the likeliest on
        self._ahead: list[_Text] = []  # what they will be
        self._ended: list[_Found] = []  # from the best on
        self._length = 0

    def advance(self, candidates: Mapping[int, TokenLogprobs], most: int) -> list[Choice]:
        """Chooses what the beams go on with, the likeliest first; nothing where the search is over.

        Args:
            candidates: By beam, `SamplingParams.num_candidates` of its likeliest next tokens, or all that it may write.
            most: Most tokens of a text.
        """
        stuck = [text for beam, text in self._beams.items() if text is not None and not candidates[beam].top_ids]
        found = [*self._ended, *(self._found(text, FinishReason.STOP) for text in stuck)]
        self._length += 1
        likeliest = self._likeliest(candidates)
        width, full = self._search.num_beams, self._length >= most
        self._ahead = [] if full else [text for text in likeliest if text.token_id not in self._stops][:width]
        for text in likeliest[:width]:
            if text.token_id in self._stops:
                found.append(self._found(text, FinishReason.STOP))
            elif full:
                found.append(self._found(text, FinishReason.LENGTH))
        self._ended = sorted(found, key=lambda each: -each.score)[:width]
        if self._is_over(most):
            self._ahead, self._beams = [], {}
        return [Choice(text.beam, text.token_id) for text in self._ahead]

    def go_on(self, beams: Sequence[int]) -> None:
        """Notes which beams the choices have become."""
        self._beams = dict(zip(beams, self._ahead, strict=True))
        self._ahead = []

    def best(self, count: int) -> list[Hypothesis]:
        """The best of the texts that have come to their end, and where those are too few, the beams as they are."""
        under_way = [self._found(text, None) for text in self._beams.values() if text is not None]
        return [self._hypothesis(found) for found in [*self._ended, *under_way][:count]]

    def _likeliest(self, candidates: Mapping[int, TokenLogprobs]) -> list[_Text]:
        """What the beams may become, the likeliest first."""
        beams = list(self._beams)
        offered = [candidates[beam] for beam in beams]
        totals = np.concatenate([np.array(each.top_logprobs, dtype=np.float32) for each in offered])
        so_far = [np.float32(0) if (text := self._beams[beam]) is None else text.total for beam in beams]
        totals = totals + np.repeat(so_far, [len(each.top_ids) for each in offered])
        places = [(beam, at) for beam, each in zip(beams, offered, strict=True) for at in range(len(each.top_ids))]
        texts = []
        for best in np.argsort(-totals, kind="stable")[: self._num_candidates].tolist():
            beam, at = places[best]
            told, most = candidates[beam], self._num_logprobs
            logprob = TokenLogprobs(told.top_logprobs[at], told.top_ids[:most], told.top_logprobs[:most])
            texts.append(_Text(self._beams[beam], beam, told.top_ids[at], logprob, totals[best], self._length))
        return texts

    def _is_over(self, most: int) -> bool:
        if not self._ahead:
            return True
        if len(self._ended) < self._search.num_beams:
            return False
        if self._search.early_stopping is True:
            return True
        hopes = self._search.early_stopping == "never" and self._search.length_penalty > 0
        possible = self._score(self._ahead[0], most if hopes else self._length)
        return not possible > self._ended[-1].score

    def _score(self, text: _Text, length: int) -> np.float32:
        penalty = float(length + self._search.forced) ** self._search.length_penalty
        return np.float32(text.total / np.float32(penalty))

    def _found(self, text: _Text, finish_reason: FinishReason | None) -> _Found:
        return _Found(text, self._score(text, text.length), finish_reason)

    def _hypothesis(self, found: _Found) -> Hypothesis:
        tokens = list[_Text]()
        text: _Text | None = found.text
        while text is not None:
            tokens.append(text)
            text = text.before
        tokens.reverse()
        last = found.text.token_id
        stopped_by = last if found.finish_reason is FinishReason.STOP and last in self._stops else None
        ids, logprobs = [each.token_id for each in tokens], [each.logprob for each in tokens]
        return Hypothesis(ids, logprobs, float(found.score), found.finish_reason, stopped_by)
