"""Images of scripted models, which know each piece of an image that they have seen. No pixels, no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from asyncengine.errors import ContextLengthExceededError, InvalidRequestError
from asyncengine.images import Image, ImageSource, PromptImages, ReadPrompt, Write
from asyncengine.step.batch import Int32, StepBatch

_SEEN = 1 << 24
"""From here on, a number in the "KV cache" of a scripted model is a piece of an image, not a token."""
_MOST = 7


def pieces_of(image: bytes | str) -> list[int]:
    """What a scripted model sees of an image, and what its script finds in the prompt in the image's place."""
    data = _data_of(image)
    return _pieces(_digest(data), _count(data))


def are_of_one_image(pieces: Collection[int]) -> bool:
    """Whether numbers in the "KV cache" may be pieces of one image."""
    counts = {1 + (piece - _SEEN) % _MOST for piece in pieces}
    return min(pieces) >= _SEEN and len(counts) == 1 and len(pieces) <= max(counts)


class ScriptedImageReader:
    """Takes any bytes, or text, for an image, which comes to one to seven tokens after their number.

    Tokens have three axes. In the last of them, every second token of an image is one further on, so that an image
    takes half as many positions as tokens.

    Args:
        whole: Whether an image must be seen in one step.

    Attributes:
        token_id: Stands for a piece of an image, as `mark` does for one in a text.
    """

    key = "scripted images"
    mark = "\0"
    token_id = 0

    def __init__(self, whole: bool = False) -> None:
        self._whole = whole

    def read(
        self, images: Sequence[ImageSource], write: Write, encode: Callable[[str], list[int]], most_tokens: int
    ) -> ReadPrompt:
        """As `asyncengine.images.ImageReader`."""
        left = [_data_of(source) for source in images]
        if (come_to := sum(map(_count, left))) > most_tokens:
            raise ContextLengthExceededError(f"the images come to {come_to} tokens; allowed: {most_tokens}")
        found: list[tuple[bytes, int]] = []  # data and where it begins

        def expanded(text: str) -> list[int]:
            before, *others = text.split(self.mark)
            ids = encode(before)
            for piece in others:
                if not left:
                    raise InvalidRequestError(f"the prompt has more marks of images than images, {len(images)}")
                found.append((left.pop(0), len(ids)))
                ids = [*ids, *[self.token_id] * _count(found[-1][0]), *encode(piece)]
            return ids

        ids = write(expanded)
        if left:
            raise InvalidRequestError(f"the prompt has {len(found)} marks of images; expected {len(images)}")
        read = [
            Image(_digest(data), {"data": data, "whole": self._whole}, np.arange(at, at + _count(data)))
            for data, at in found
        ]
        axes = _axes(len(ids), {at: _count(data) for data, at in found})
        shift = int(axes[:, -1].max()) + 1 - len(ids)
        return ReadPrompt(ids, PromptImages(tuple(read), self.token_id, self.key, axes, shift, self._whole))


def see(batch: StepBatch, cells: NDArray[np.int64]) -> None:
    """Puts what a step sees of images in the place of the tokens that stand for them.

    Args:
        batch: The step.
        cells: (T,) its tokens.
    """
    for part in batch.images:
        assert (cells[part.tokens] == ScriptedImageReader.token_id).all(), "tokens of images have other ids"
        pieces, last = _pieces(part.image.digest, len(part.image.places)), part.first + len(part.tokens)
        assert last == len(pieces) or not part.image.inputs["whole"], "an image is parted that must not be"
        cells[part.tokens] = pieces[part.first : last]


def seen(tokens: Sequence[int], cells: Sequence[int]) -> list[int]:
    """Tokens of a sequence, with what was seen of its images in the place of those that stand for them."""
    return [
        cell if cell >= _SEEN and token == ScriptedImageReader.token_id else token
        for token, cell in zip(tokens, cells, strict=True)
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


def _data_of(source: ImageSource) -> bytes:
    if isinstance(source, str):
        return source.encode()
    if not isinstance(source, bytes):
        raise InvalidRequestError(f"an image is {source!r:.80}; the scripted model takes bytes or text")
    return source


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _count(data: bytes) -> int:
    return 1 + len(data) % _MOST


def _pieces(digest: bytes, count: int) -> list[int]:
    """A number for each, from any of which the count can be told."""
    numbers = (int.from_bytes(hashlib.sha256(digest + bytes([piece])).digest()[:2], "big") for piece in range(count))
    return [_SEEN + number * _MOST + count - 1 for number in numbers]
