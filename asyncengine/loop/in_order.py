"""What is said in the pieces of an audio, in their order, though they are heard side by side. On the event loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from asyncengine.outputs import TranscriptDelta, TranscriptSegment

Tell = Callable[[TranscriptDelta], None]


class InOrder:
    """Puts what comes of pieces one behind the other. Of the first that has not ended all is told at once.

    Space at the beginning and at the end of the whole is left out.

    Args:
        tell: Told all of it.

    Attributes:
        segments: What was told of them.
    """

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self._first = 0  # piece that has not ended
        self._texts: dict[int, list[str]] = {}  # of those behind it
        self._ended: dict[int, Sequence[TranscriptSegment]] = {}
        self._told: list[str] = []
        self._space = ""  # behind what was told
        self.segments: list[TranscriptSegment] = []

    @property
    def begun(self) -> bool:
        """Whether anything was told."""
        return bool(self._told or self.segments)

    @property
    def text(self) -> str:
        """What was told of it."""
        return "".join(self._told)

    def add(self, index: int, text: str) -> None:
        """Adds text of a piece."""
        if index == self._first:
            self._show(text)
        else:
            self._texts.setdefault(index, []).append(text)

    def end(self, index: int, segments: Sequence[TranscriptSegment]) -> None:
        """Notes that no more comes of a piece, and its segments."""
        self._ended[index] = segments
        while (found := self._ended.pop(self._first, None)) is not None:
            if found:
                self.segments += found
                self._tell(TranscriptDelta("", tuple(found)))
            self._first += 1
            self._show("".join(self._texts.pop(self._first, ())))

    def _show(self, text: str) -> None:
        text = self._space + text
        if not self._told:
            text = text.lstrip()
        shown = text.rstrip()
        self._space = text[len(shown) :]
        if shown:
            self._told.append(shown)
            self._tell(TranscriptDelta(shown))
