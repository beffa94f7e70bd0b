"""Captured draws: what rows need behind a captured step, for each bucket and each kind. Owned by the step thread.

They are apart from the steps' own graphs: one graph for each kind would be a capture of the whole model for each.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch

from asyncengine.model import token_draw
from asyncengine.model.graph_recorder import Recorder, Tensors
from asyncengine.model.last_tokens import LastTokens
from asyncengine.model.token_draw import DrawKind, DrawSettings


@dataclass(frozen=True, slots=True)
class CapturedStep:
    """A bucket's graph: what it reads of what was sent, and what it writes.

    Attributes:
        key: Of the steps that it serves.
        replay: Launches it.
        logits: (rows, vocabulary).
        likeliest: (rows,) the likeliest token of each row.
        sent: The sections of a step, where it reads them.
    """

    key: Hashable
    replay: Callable[[], None]
    logits: torch.Tensor
    likeliest: torch.Tensor
    sent: Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class _CapturedDraw:
    replay: Callable[[], None]
    tokens: torch.Tensor


class DrawGraphs:
    """The captured draws of one model.

    Args:
        kinds: Which can be captured, besides greedy ones, which are part of the step.
        last: Where tokens are stored, if they stay on the device.

    Attributes:
        kinds: As given; none once one could not be captured.
    """

    def __init__(self, kinds: Sequence[DrawKind], last: LastTokens | None) -> None:
        self.kinds = tuple(kinds)
        self._last = last
        self._graphs: dict[tuple[int, DrawKind], _CapturedDraw] = {}

    @property
    def captured(self) -> tuple[tuple[int, DrawKind], ...]:
        """The buckets and kinds for which there is a graph."""
        return tuple(sorted(self._graphs))

    def of(self, size: int) -> list[DrawKind]:
        """The kinds for which there is a graph behind a bucket's."""
        return [kind for captured, kind in self._graphs if captured == size]

    def capture(self, recorder: Recorder, size: int, kind: DrawKind, step: CapturedStep) -> None:
        """Captures a draw behind a bucket's graph, from logits of nothing; what was sent last is that of padding."""
        step.logits.zero_()
        step.likeliest.zero_()
        replay, (tokens,) = recorder.record(lambda: self._draw(kind, step))
        self._graphs[size, kind] = _CapturedDraw(replay, tokens)

    def drawn(self, size: int, kind: DrawKind, step: CapturedStep, rows: int) -> torch.Tensor:
        """(rows,) the first tokens of a step that was replayed. Without a graph, these alone are drawn, by launches."""
        if kind is DrawKind.GREEDY:
            return step.likeliest[:rows]
        draw = self._graphs.get((size, kind))
        if draw is None:
            return self._draw(kind, step, rows)[0]
        draw.replay()
        return draw.tokens[:rows]

    def forget(self, size: int) -> None:
        """Lets go of those behind a bucket's graph."""
        for kind in self.of(size):
            del self._graphs[size, kind]

    def clear(self) -> None:
        """Lets go of all."""
        self._graphs.clear()

    def _draw(self, kind: DrawKind, step: CapturedStep, rows: int | None = None) -> Tensors:
        settings = DrawSettings.of(step.sent).first(rows)
        tokens = token_draw.draw(kind, step.logits[:rows], step.likeliest[:rows], settings)
        if self._last is not None:
            self._last.store(step.sent["slots"][:rows], tokens)
        return (tokens,)
