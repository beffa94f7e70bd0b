"""Log-probabilities of tokens: described on the device, listed once they are on the host."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from asyncengine.model.device_copy import to_device
from asyncengine.model.token_mass import log_total
from asyncengine.model.token_ranking import top_tokens
from asyncengine.step.batch import NO_INDEX, Int32, Int64, TokenLogprobs

_SCORED = 32  # rows of logits that are copied at once


@dataclass(frozen=True, slots=True)
class Described:
    """Log-probabilities of some rows of a batch, on the device.

    Attributes:
        rows: (rows,) of the batch.
        numbers: (rows,) how many of the likeliest were asked for.
        ids: (rows, 1 + most) the token itself and the likeliest.
        values: Theirs, float64.
    """

    rows: Int64
    numbers: Int64
    ids: Tensor
    values: Tensor

    @classmethod
    def of(cls, logits: Tensor, tokens: Tensor, rows: Int64, numbers: Int64) -> Described:
        """Describes tokens.

        Args:
            logits: (rows, vocab) float32; overwritten.
            tokens: (rows,) int64.
            rows: (rows,) of the batch.
            numbers: (rows,) how many of the likeliest to name.
        """
        found = cls.as_they_are(logits, tokens, rows, numbers)
        return replace(found, values=found.values - log_total(logits))

    @classmethod
    def as_they_are(cls, logprobs: Tensor, tokens: Tensor, rows: Int64, numbers: Int64) -> Described:
        """The same of what log-probabilities have become, which need not add up to 1.

        Args:
            logprobs: (rows, vocab) float32; overwritten.
            tokens: As of `of`.
            rows: As of `of`.
            numbers: As of `of`.
        """
        top = torch.finfo(torch.float32).max
        torch.nan_to_num_(logprobs, nan=-torch.inf, posinf=top, neginf=-torch.inf)
        ids = tokens.unsqueeze(1)
        if numbers.max() > 0:
            ids = torch.cat([ids, top_tokens(logprobs, min(int(numbers.max()), logprobs.shape[1]))], dim=1)
        return cls(rows, numbers, ids, logprobs.gather(1, ids).double())

    def listed(self, ids: NDArray[Any], values: NDArray[Any]) -> list[TokenLogprobs]:
        """One entry for each row, from `ids` and `values` on the host."""
        listed = []
        for row_ids, row_values, number in zip(ids.tolist(), values.tolist(), self.numbers.tolist(), strict=True):
            likeliest = [pair for pair in zip(row_ids[1:], row_values[1:], strict=True) if pair[1] > -np.inf][:number]
            listed.append(TokenLogprobs(row_values[0], tuple(i for i, _ in likeliest), tuple(v for _, v in likeliest)))
        return listed


def scores(logits: Tensor, token_ids: Int32, tops: Int64) -> list[TokenLogprobs]:
    """Log-probabilities of given tokens.

    Args:
        logits: (rows, vocab) of any float type.
        token_ids: (rows,)
        tops: (rows,) how many of the likeliest to name beside each.
    """
    entries: list[TokenLogprobs] = []
    with torch.inference_mode():
        for start in range(0, len(token_ids), _SCORED):
            rows = slice(start, start + _SCORED)
            part = logits[rows].to(torch.float32, copy=True)
            of = to_device(token_ids[rows].astype(np.int64), logits.device)
            described = Described.of(part, of, NO_INDEX, tops[rows])
            entries += described.listed(described.ids.cpu().numpy(), described.values.cpu().numpy())
    return entries
