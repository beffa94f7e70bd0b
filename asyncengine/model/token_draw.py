"""A draw whose launches depend on nothing but its kind, so that it can be captured and waits for nothing.

The settings of the rows come as columns at fixed places on the device (`DrawSettings`), together with everything else
that a step brings there. The result is that of `Sampler.draw`, bit for bit, where the device is one whose values the
host cannot look at without waiting. Functions without state.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from asyncengine.model.token_filters import drop_outside_nucleus, is_sound, narrow, plain
from asyncengine.model.token_mass import draw_dense
from asyncengine.step.batch import Int32, Int64

MOST_CANDIDATES = 128
"""The largest top-k of a captured draw."""
GREEDY_ROW = -1
"""Stands in `DrawSettings.top_k` of a row that takes its likeliest token."""


class DrawKind(enum.IntEnum):
    """What the rows of a step need, greedy rows aside, which each of these can have."""

    GREEDY = 0
    PLAIN = 1  # temperature and min-p
    NARROW = 2  # these, and top-k up to MOST_CANDIDATES with or without top-p
    NUCLEUS = 3  # temperature and min-p, and top-p without top-k


FILTERED = (DrawKind.PLAIN, DrawKind.NARROW, DrawKind.NUCLEUS)


@dataclass(frozen=True, slots=True)
class DrawSettings:
    """Columns of shape (rows, 1) on the device.

    Attributes:
        u: float64 in [0, 1), the row's random number.
        top_p: float64.
        scale: float32, one over the temperature.
        min_p: float32.
        top_k: int32; 0 is off, GREEDY_ROW takes the likeliest token.
    """

    u: Tensor
    top_p: Tensor
    scale: Tensor
    min_p: Tensor
    top_k: Tensor

    @classmethod
    def of(cls, sent: Mapping[str, Tensor]) -> DrawSettings:
        """The settings in what was sent, as views of it."""
        u, top_p = (sent[name].view(torch.float64).unsqueeze(1) for name in ("u", "top_p"))
        scale, min_p = (sent[name].view(torch.float32).unsqueeze(1) for name in ("scale", "min_p"))
        return cls(u, top_p, scale, min_p, sent["top_k"].unsqueeze(1))

    def first(self, rows: int | None) -> DrawSettings:
        """Those of so many rows; of all, if None."""
        return DrawSettings(self.u[:rows], self.top_p[:rows], self.scale[:rows], self.min_p[:rows], self.top_k[:rows])


def sections(
    rows: int,
    u: NDArray[np.float64] | None = None,
    top_p: NDArray[np.float64] | None = None,
    scale: NDArray[np.float32] | None = None,
    min_p: NDArray[np.float32] | None = None,
    top_k: Int64 | None = None,
) -> dict[str, Int32]:
    """What `DrawSettings.of` reads, as int32 arrays for `rows` rows; those beyond the given ones are greedy."""
    filled: dict[str, NDArray[Any]] = {
        "u": np.zeros(rows, np.float64),
        "top_p": np.ones(rows, np.float64),
        "scale": np.ones(rows, np.float32),
        "min_p": np.zeros(rows, np.float32),
        "top_k": np.full(rows, GREEDY_ROW, np.int32),
    }
    given = {"u": u, "top_p": top_p, "scale": scale, "min_p": min_p, "top_k": top_k}
    for name, column in given.items():
        if column is not None:
            filled[name][: len(column)] = column
    return {name: column.view(np.int32) for name, column in filled.items()}


def draw(kind: DrawKind, logits: Tensor, likeliest: Tensor, settings: DrawSettings) -> Tensor:
    """Draws one token for each row.

    Args:
        kind: Of the step.
        logits: (rows, vocab) of any float type; may be overwritten.
        likeliest: (rows,) int64, `argmax` of the logits.
        settings: Of the rows.

    Returns:
        (rows,) int64.
    """
    if kind is DrawKind.GREEDY:
        return likeliest
    logits = logits.float()
    scale, min_p, top_p, top_k = settings.scale, settings.min_p, settings.top_p, settings.top_k
    sound = is_sound(logits, scale)
    few = None
    if kind is DrawKind.NARROW:
        candidates = min(MOST_CANDIDATES, logits.shape[1])
        [kept] = narrow(logits, scale, top_k.clamp(min=1), candidates, min_p, top_p)
        few = kept.draw(settings.u)
    weights = plain(logits, scale, min_p)[0].mass
    if kind is DrawKind.NUCLEUS:
        inside = weights.clone()
        drop_outside_nucleus(inside, top_p)
        weights = torch.where(top_p < 1, inside, weights)
    tokens = draw_dense(weights, settings.u)
    top_k = top_k.squeeze(1)
    if few is not None:
        tokens = torch.where(top_k > 0, few, tokens)
    return torch.where(sound & (top_k > GREEDY_ROW), tokens, likeliest)
