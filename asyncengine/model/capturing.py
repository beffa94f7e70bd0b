"""What is captured when: a few steps while a model is loaded, the others while its engine is idle.

Owned by the step thread; the loader's until the model is handed over. What `Capturing.warmth` says is read anywhere.
"""

from __future__ import annotations

import dataclasses
import enum
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from asyncengine.model.buckets import Buckets
from asyncengine.model.fused.choice import Choice
from asyncengine.model.graphs import Ran, Seconds, StepGraphs
from asyncengine.model.memory import GIB
from asyncengine.model.sampler import Sampler
from asyncengine.model.token_draw import DrawKind
from asyncengine.step.batch import StepBatch
from asyncengine.warm_up import WarmUp

FIRST_SECONDS = 3.0
"""How long a load captures what serves every step at once, though not as well as it could be served."""


class _Task(enum.Enum):
    STEP = "step"
    CHOICE = "choice"
    DRAW = "draw"


class _Sort(enum.Enum):
    DECODES = ""
    MIXED = "mixed "
    """Of anything."""
    ADAPTED = "adapted "
    """Of decodes, some of which have adapters."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """One capture.

    Attributes:
        task: What is captured: a step, the same again for a choice between two ways to run it, or a draw behind it.
        size: The bucket.
        first: Whether it is to be there when the model begins to serve.
        kind: Of a draw.
        sort: Of a step.
    """

    task: _Task
    size: int
    first: bool
    kind: DrawKind = DrawKind.GREEDY
    sort: _Sort = _Sort.DECODES

    def __str__(self) -> str:
        draw = f", {self.kind.name.lower()}" if self.task is _Task.DRAW else ""
        return f"{self.sort.value}{self.task.value} of {self.size} tokens{draw}"


@dataclass(frozen=True, slots=True)
class Room:
    """Memory of a device that was set aside.

    Attributes:
        nbytes: How much.
        free: How much the device has left, whoever uses it; what an allocator only keeps counts as left.
    """

    nbytes: int
    free: Callable[[], int]


class Capturing:
    """The captures of one model, in their order.

    At first a few buckets and their draws, the largest first: from then on every step of decodes is replayed, padded
    to at most four times its tokens unless the time was too short for all of them; and a few of steps with prompts.
    Then the others.

    Args:
        graphs: What is captured of steps that decode alone.
        choice: Between two ways to run steps of few tokens.
        mixed: What is captured of steps with prompts, if anything is.
        adapted: What is captured of steps with adapters, while there are any.
        seconds: Tells which steps with prompts are worth a graph; all are, without.
        at_once: Whether everything is to be captured before the model serves.
        room: What the graphs may take; when they have taken more, there are no others. None is no limit.
        clock: Tells the time.

    Attributes:
        graphs: As given.
    """

    def __init__(
        self,
        graphs: StepGraphs,
        choice: Choice | None = None,
        *,
        mixed: StepGraphs | None = None,
        adapted: StepGraphs | None = None,
        seconds: Seconds | None = None,
        at_once: bool = False,
        room: Room | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.graphs = graphs
        self._choice = choice
        self._of_sort = {_Sort.DECODES: graphs, _Sort.MIXED: mixed, _Sort.ADAPTED: adapted}
        self._all = [each for each in self._of_sort.values() if each is not None]
        self._generation: int | None = None
        self._seconds = seconds
        self._at_once = at_once
        self._room = room
        self._clock = clock
        self._left: list[_Piece] = []
        self._done, self._of = Counter[_Sort](), Counter[_Sort]()
        self._taken = 0
        self._warmth = WarmUp(0, 0, False)

    @property
    def warmth(self) -> WarmUp:
        """How far it is. Read from any thread."""
        choice = () if self._choice is None else self._choice.notes
        graphs = [note for graphs in self._all for note in graphs.notes]
        return dataclasses.replace(self._warmth, notes=(*graphs, *choice, *self._warmth.notes))

    def run(self, batch: StepBatch, sampler: Sampler | None = None) -> Ran | None:
        """As `StepGraphs.run`, by a graph of whatever sort it is."""
        return next((ran for graphs in self._all if (ran := graphs.run(batch, sampler)) is not None), None)

    def begin(self) -> None:
        """Captures what is to be there when the model begins to serve; anew, if it was there before.

        No capture is begun after `FIRST_SECONDS`, unless everything is to be there.
        """
        self.clear()
        self._left = self._pieces()
        self._of = Counter(piece.sort for piece in self._left)
        self._look()
        until = self._clock() + FIRST_SECONDS
        while self._left and (self._at_once or (self._left[0].first and self._clock() < until)):
            self.advance()

    def advance(self) -> str:
        """Captures the next; returns what it was, in words. One that cannot be captured ends those of its sort."""
        piece = self._left.pop(0)
        before = 0 if self._room is None else self._room.free()
        if self._capture(piece):
            self._done[piece.sort] += 1
        if self._room is not None:
            self._taken += max(before - self._room.free(), 0)
        self._look()
        return str(piece)

    def adapters_changed(self) -> None:
        """Captures steps with adapters anew, while there are no requests, if what was captured no longer holds."""
        graphs, sort = self._of_sort[_Sort.ADAPTED], _Sort.ADAPTED
        if graphs is None or graphs.adapters is None or graphs.adapters.generation == self._generation:
            return
        self._generation = graphs.adapters.generation
        graphs.clear()
        again = [piece for first in (True, False) for piece in self._further(sort, first)]
        self._left = [piece for piece in self._left if piece.sort is not sort] + again
        self._done[sort], self._of[sort] = 0, len(again)
        self._look()

    def clear(self) -> None:
        """Lets go of all graphs. `begin` makes new ones."""
        for graphs in self._all:
            graphs.clear()
        self._left = []
        self._done.clear()
        self._of.clear()
        self._taken = 0
        self._warmth = WarmUp(0, 0, False)

    def _pieces(self) -> list[_Piece]:
        pieces = []
        adapted = self._of_sort[_Sort.ADAPTED]
        self._generation = None if adapted is None or adapted.adapters is None else adapted.adapters.generation
        for first in (True, False):
            some = _of(self.graphs.sizes, coarse=first)
            for size in some:
                pieces.append(_Piece(_Task.STEP, size, first))
                if self._choice is not None and self._choice.is_open(size):
                    pieces.append(_Piece(_Task.CHOICE, size, first))
            pieces += [_Piece(_Task.DRAW, size, first, kind) for kind in self.graphs.kinds for size in some]
            pieces += self._further(_Sort.MIXED, first) + self._further(_Sort.ADAPTED, first)
        return pieces

    def _further(self, sort: _Sort, first: bool) -> list[_Piece]:
        """The steps of a sort beside decodes, those that are captured first, or the others."""
        graphs = self._of_sort[sort]
        if graphs is None or (graphs.adapters is not None and not graphs.adapters.capturable):
            return []
        return [_Piece(_Task.STEP, size, first, sort=sort) for size in _of(graphs.sizes, coarse=first)]

    def _capture(self, piece: _Piece) -> bool:
        if not self._possible(piece):  # any longer: a step that needed another graph has found out
            return False
        if piece.sort is not _Sort.DECODES:
            graphs = self._of_sort[piece.sort]
            assert graphs is not None
            captured = graphs.capture(piece.size)
            if captured and self._seconds is not None and piece.sort is _Sort.MIXED:
                graphs.keep_if_faster(piece.size, self._seconds)
            return captured
        if piece.task is _Task.STEP:
            return self.graphs.capture(piece.size)
        if not self.graphs.renew(piece.size):  # steps that were run meanwhile may have needed more memory
            return False
        if piece.task is _Task.DRAW:
            return self.graphs.capture_draw(piece.size, piece.kind)
        assert self._choice is not None
        return self._choice.decide(piece.size)

    def _look(self) -> None:
        """Notes how far it is, and which captures will never be done."""
        room, notes = self._room, list[str]()
        done, of = self._done.total(), self._of.total()
        if room is not None and self._taken > room.nbytes and self._left:
            notes.append(
                f"graphs: {done} of {of} are captured, no others: they take {self._taken / GIB:.2f} GiB, "
                f"and {room.nbytes / GIB:.2f} GiB were set aside"
            )
            self._left = []
        self._left = [piece for piece in self._left if self._possible(piece)]
        if self._left:
            notes.append(f"graphs: {done} of {of} are captured, the others while there are no requests")
        self._warmth = WarmUp(done, of, bool(self._left), self._taken, tuple(notes))

    def _possible(self, piece: _Piece) -> bool:
        if not self.graphs.capturable:
            return False
        if piece.sort is not _Sort.DECODES:
            graphs = self._of_sort[piece.sort]
            return graphs is not None and graphs.capturable
        if piece.task is _Task.DRAW:
            return piece.kind in self.graphs.kinds
        return piece.task is _Task.STEP or (self._choice is not None and self._choice.is_open(piece.size))


def _of(sizes: Sequence[int], coarse: bool) -> Sequence[int]:
    """Those that are captured first, or the others; the largest before all."""
    first = Buckets(tuple(sizes)).coarse()
    return first if coarse else [size for size in reversed(sizes) if size not in first]


class CapturesOf:
    """As `asyncengine.step.model.WarmingModel`: the captures of a model, then those of the one that drafts for it."""

    def __init__(self, capturing: Sequence[Capturing]) -> None:
        self._capturing = tuple(capturing)

    @property
    def warmth(self) -> WarmUp:
        """As the protocol says."""
        each = [capturing.warmth for capturing in self._capturing]
        return WarmUp(
            sum(one.done for one in each),
            sum(one.of for one in each),
            any(one.goes_on for one in each),
            sum(one.nbytes for one in each),
            tuple(note for one in each for note in one.notes),
        )

    def warm_up(self) -> str:
        """As the protocol says."""
        return next(one for one in self._capturing if one.warmth.goes_on).advance()
