"""Images, audio and videos of scripted models, which know each piece that they were shown. No pixels, no torch."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from asyncengine.errors import ContextLengthExceededError, InvalidRequestError
from asyncengine.media import NOUNS, PLURALS, Kind, MediaItem, PromptMedia, ReadPrompt, Sources, Video, Write
from asyncengine.step.batch import Int32, StepBatch
from asyncengine.transcription import Transcribing, TranscriptionPrompt, WholeTranscription

_SEEN = 1 << 24
"""From here on, a number in the "KV cache" of a scripted model is a piece of an image, audio or video, not a token."""
_MOST = 7
MARKS: dict[Kind, str] = {"image": "\0", "audio": "\1", "video": "\2"}
"""What stands in a text for each of them."""
_IDS: dict[Kind, int] = {"image": 0, "audio": 1, "video": 2}


def pieces_of(source: bytes | str, kind: Kind = "image") -> list[int]:
    """What a scripted model sees of an image or video, or hears of audio; its script finds it in its place."""
    data = _data_of(source, kind)
    return _pieces(_digest(kind, data), _count(data))


def are_of_one_item(pieces: Collection[int]) -> bool:
    """Whether numbers in the "KV cache" may be pieces of one image, audio or video."""
    counts = {1 + (piece - _SEEN) % _MOST for piece in pieces}
    return min(pieces) >= _SEEN and len(counts) == 1 and len(pieces) <= max(counts)


class ScriptedTranscription(WholeTranscription):
    """Asks in three lines: the hint, the audio, the language. The only one that is known is ``"en"``."""

    def request(self, asked: TranscriptionPrompt) -> str:
        """As `asyncengine.transcription.Transcribing`."""
        self.check(asked)
        if asked.language not in (None, "en"):
            raise InvalidRequestError(f"language is {asked.language!r:.80}; allowed: 'en'")
        return f"{asked.hint or ''}\n{MARKS['audio']}\n{asked.language or ''}"


class ScriptedMediaReader:
    """Takes any bytes, or text, for an image, audio or video, which comes to one to seven tokens after their number.

    What a `asyncengine.Video` says of frames has no effect.

    Tokens have three axes. In the last of them, every second token of an item is one further on, so that it takes half
    as many positions as tokens.

    Args:
        whole: Whether an image must be seen in one step.
        kinds: Of what it reads.

    Attributes:
        token_ids: By kind, what stands for a piece, as `marks` has what does for one in a text.
    """

    key = "scripted media"
    transcribing: Transcribing | None = None

    def __init__(self, whole: bool = False, kinds: Sequence[Kind] = ("image",)) -> None:
        self._whole = whole
        self.kinds: Sequence[Kind] = tuple(kinds)
        self.marks = {kind: MARKS[kind] for kind in kinds}
        self.token_ids: Mapping[Kind, int] = {kind: _IDS[kind] for kind in kinds}
        if "audio" in kinds:
            self.transcribing = ScriptedTranscription()

    def read(self, sources: Sources, write: Write, encode: Callable[[str], list[int]], most_tokens: int) -> ReadPrompt:
        """As `asyncengine.media.MediaReader`."""
        left = {kind: [_data_of(source, kind) for source in own] for kind, own in sources.items()}
        if (come_to := sum(_count(data) for own in left.values() for data in own)) > most_tokens:
            what = " and ".join(PLURALS[kind] for kind in left)
            raise ContextLengthExceededError(f"the {what} come to {come_to} tokens; allowed: {most_tokens}")
        by_mark = {MARKS[kind]: kind for kind in left}
        marks = re.compile(f"([{''.join(by_mark)}])") if by_mark else re.compile("(?!)()")
        found: list[tuple[Kind, bytes, int]] = []  # data and where it begins

        def expanded(text: str) -> list[int]:
            before, *others = marks.split(text)
            ids = encode(before)
            for mark, piece in zip(others[::2], others[1::2], strict=True):
                kind = by_mark[mark]
                if not left[kind]:
                    what = PLURALS[kind]
                    raise InvalidRequestError(f"the prompt has more marks of {what} than {what}, {len(sources[kind])}")
                found.append((kind, left[kind].pop(0), len(ids)))
                ids = [*ids, *[_IDS[kind]] * _count(found[-1][1]), *encode(piece)]
            return ids

        ids = write(expanded)
        for kind, own in left.items():
            if own:
                number = len(sources[kind])
                raise InvalidRequestError(
                    f"the prompt has {number - len(own)} marks of {PLURALS[kind]}; expected {number}"
                )
        read = [
            MediaItem(
                kind,
                _digest(kind, data),
                {"data": data},
                np.arange(at, at + _count(data)),
                _IDS[kind],
                self._whole and kind == "image",
            )
            for kind, data, at in found
        ]
        axes = _axes(len(ids), {at: _count(data) for _, data, at in found})
        shift = int(axes[:, -1].max()) + 1 - len(ids)
        return ReadPrompt(ids, PromptMedia(tuple(read), self.key, axes, shift))


def see(batch: StepBatch, cells: NDArray[np.int64]) -> None:
    """Puts what a step sees of images, audio and videos in the place of the tokens that stand for them.

    Args:
        batch: The step.
        cells: (T,) its tokens.
    """
    for part in batch.media:
        assert (cells[part.tokens] == _IDS[part.item.kind]).all(), "tokens of images, audio or videos have other ids"
        pieces, last = _pieces(part.item.digest, len(part.item.places)), part.first + len(part.tokens)
        assert last == len(pieces) or not part.item.whole, "an image is parted that must not be"
        cells[part.tokens] = pieces[part.first : last]


def seen(tokens: Sequence[int], cells: Sequence[int]) -> list[int]:
    """Tokens of a sequence, with what was seen of its images and audio in the place of those that stand for them."""
    return [
        cell if cell >= _SEEN and token in _IDS.values() else token for token, cell in zip(tokens, cells, strict=True)
    ]


def check_positions(batch: StepBatch, row: int, cells: NDArray[np.int64]) -> None:
    """Compares where a row's tokens are rotated to with what the "KV cache" has of it, drafts included.

    Raises:
        AssertionError: It is somewhere else.
    """
    tokens = slice(batch.query_start[row], batch.query_start[row + 1])
    found = batch.positions[None, tokens] if batch.axes is None else batch.axes[:, tokens]
    context = int(batch.context_lens[row])
    images, at = np.flatnonzero(cells >= _SEEN).tolist(), 0
    if not images:
        assert (found == np.arange(context, len(cells))).all(), "tokens are not at their positions"
        return
    begins: dict[int, int] = {}
    for place in images:
        if place >= at:
            begins[place] = 1 + int(cells[place] - _SEEN) % _MOST
            at = place + begins[place]
    wanted = _axes(len(cells), begins)[:, context:]
    assert (found == wanted).all(), f"tokens are rotated to {found.tolist()}, not to {wanted.tolist()}"


def _axes(tokens: int, images: dict[int, int]) -> Int32:
    """(3, tokens) where tokens are rotated to, with images of so many tokens that begin at some of them."""
    steps = np.ones((3, tokens), dtype=np.int32)  # from one token to the next
    for at, count in images.items():
        within = np.arange(1, min(count, tokens - at))
        steps[:, at + within] = 0
        steps[2, at + within[1::2]] = 1
        if at + count < tokens:
            steps[:2, at + count] = 1 + (count - 1) // 2
    axes: Int32 = np.cumsum(steps, axis=1, dtype=np.int32) - 1
    return axes


def _data_of(source: object, kind: Kind) -> bytes:
    if isinstance(source, Video):
        source = source.source
    if isinstance(source, str):
        return source.encode()
    if not isinstance(source, bytes):
        raise InvalidRequestError(f"{NOUNS[kind]} is {source!r:.80}; the scripted model takes bytes or text")
    return source


def _digest(kind: Kind, data: bytes) -> bytes:
    return hashlib.sha256(kind.encode() + data).digest()


def _count(data: bytes) -> int:
    return 1 + len(data) % _MOST


def _pieces(digest: bytes, count: int) -> list[int]:
    """A number for each, from any of which the count can be told."""
    numbers = (int.from_bytes(hashlib.sha256(digest + bytes([piece])).digest()[:2], "big") for piece in range(count))
    return [_SEEN + number * _MOST + count - 1 for number in numbers]
