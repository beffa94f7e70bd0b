"""What a checkpoint says may not be written, in the words of transformers' ``generation_config.json``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from asyncengine.logits_processor import LogitsProcessor, LogitsRow

_SEARCHED = ("penalty_alpha", "num_beam_groups", "diversity_penalty")
_NOT_HERE = ("encoder_repetition_penalty", "forced_decoder_ids", "exponential_decay_length_penalty", "sequence_bias")


class Rules:
    """``suppress_tokens``, ``begin_suppress_tokens``, ``bad_words_ids``, ``no_repeat_ngram_size``,
    ``encoder_no_repeat_ngram_size``, ``min_length`` and ``min_new_tokens``.

    A text is the decoder's tokens, those included that it begins with, as it is to transformers.

    Args:
        generation: transformers' ``GenerationConfig`` of the checkpoint.
        ends: The tokens that end a text.
        vocab_size: How many tokens there are.

    Attributes:
        any: Whether there is something that may not be written.
    """

    def __init__(self, generation: Any, ends: Sequence[int], vocab_size: int) -> None:
        words = [list(word) for word in generation.bad_words_ids or () if list(word) not in [[end] for end in ends]]
        never = [*(generation.suppress_tokens or ()), *(word[0] for word in words if len(word) == 1)]
        self._never = _tensor(never, vocab_size)
        self._not_first = _tensor(generation.begin_suppress_tokens or (), vocab_size)
        self._ends = _tensor(ends, vocab_size)
        self._words = [np.array(word) for word in words if len(word) > 1 and word[-1] < vocab_size]
        self._again = int(generation.no_repeat_ngram_size or 0)
        self._again_of_source = int(generation.encoder_no_repeat_ngram_size or 0)
        self._least, self._least_new = int(generation.min_length or 0), int(generation.min_new_tokens or 0)
        self._vocab_size = vocab_size
        masks = bool(len(self._never) or len(self._not_first) or self._words)
        self.any = masks or max(self._again, self._again_of_source, self._least, self._least_new) > 0

    def of(self, source: Sequence[int]) -> tuple[LogitsProcessor, ...]:
        """What holds a request to them.

        Args:
            source: Its source's token ids.
        """
        if not self.any:
            return ()
        ids = np.array(source if self._again_of_source else (), dtype=np.int64)

        def hold(logits: torch.Tensor, row: LogitsRow) -> None:
            self._hold(logits, row, ids)

        return (hold,)

    def _hold(self, logits: torch.Tensor, row: LogitsRow, source: NDArray[np.int64]) -> None:
        if self._never.device != logits.device:
            self._never, self._not_first, self._ends = (
                each.to(logits.device) for each in (self._never, self._not_first, self._ends)
            )
        text = np.concatenate((row.prompt_token_ids, row.token_ids)).astype(np.int64)
        logits.index_fill_(0, self._never, -torch.inf)
        if not len(row.token_ids):
            logits.index_fill_(0, self._not_first, -torch.inf)
        if len(text) < self._least or len(row.token_ids) < self._least_new:
            logits.index_fill_(0, self._ends, -torch.inf)
        found = [int(word[-1]) for word in self._words if _ends_with(text, word[:-1])]
        found += [int(token) for token in _followers(text, text, self._again)]
        found += [int(token) for token in _followers(source, text, self._again_of_source)]
        if found:
            logits.index_fill_(0, _tensor(found, self._vocab_size).to(logits.device), -torch.inf)


def _followers(tokens: NDArray[np.int64], text: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """What stands in `tokens` behind the last ``size - 1`` tokens of a text (Klein et al., 2017)."""
    if not size or len(tokens) < size or len(text) < size - 1:
        return tokens[:0]
    at = np.arange(len(tokens)) if size == 1 else np.flatnonzero(tokens[size - 2 : -1] == text[-1]) + size - 1
    for back in range(2, size):  # nearly all are gone with the last token: this is done for each that is drawn
        at = at[tokens[at - back] == text[-back]]
    return tokens[at]


def _ends_with(text: NDArray[np.int64], word: NDArray[np.int64]) -> bool:
    return len(text) >= len(word) and np.array_equal(text[len(text) - len(word) :], word)


def _tensor(ids: Iterable[int], vocab_size: int) -> torch.Tensor:
    return torch.tensor([token for token in dict.fromkeys(ids) if 0 <= token < vocab_size]).long()


def notes_of(generation: Any) -> list[str]:
    """What a checkpoint says of generating that does not hold here, in words."""
    notes = []
    searched = [f"{name} = {value}" for name in _SEARCHED if _means(name, value := getattr(generation, name, None))]
    if searched:
        notes.append(f"generation: its checkpoint asks for a search ({', '.join(searched)}) that there is not here")
    if _means("num_beams", beams := getattr(generation, "num_beams", None)):
        notes.append(f"generation: its checkpoint asks for a beam search; requests with num_beams = {beams} get one")
    passed = [f"{name} = {value}" for name in _NOT_HERE if _means(name, value := getattr(generation, name, None))]
    if passed:
        notes.append(f"generation: its checkpoint says {', '.join(passed)}, which is passed over")
    return notes


def _means(name: str, value: Any) -> bool:
    """Whether a setting of generation changes anything."""
    return value not in (None, (), [], {}, 1 if name != "diversity_penalty" else 0, 0.0)
