"""Images in prompts: values that any thread may have. Knows neither torch nor Pillow.

Each token that stands for a piece of an image has the id of the model's image token. On the step thread it has a
negative id meanwhile, one for each image, so that prompts share blocks of the prefix cache where their images are the
same, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from asyncengine.errors import InvalidRequestError
from asyncengine.step.batch import Int32, Int64

ImageSource = Any
"""A ``PIL.Image.Image``; a (height, width, 3) or (height, width) array of bytes; an encoded file (PNG, JPEG, WebP, ...)
as ``bytes``, as the `pathlib.Path` where it is, or as a ``data:`` URL."""

Write = Callable[[Callable[[str], list[int]]], list[int]]
"""Writes a prompt by a function that encodes each piece of text of it."""


@dataclass(frozen=True, slots=True)
class ImagePrompt:
    """A prompt with images in it, where there is no chat template to place them.

    Attributes:
        text: Has the model's own mark once for each image, where it goes; which that is, is in the model's card.
        images: In the order of the marks.
    """

    text: str
    images: Sequence[ImageSource]

    def __post_init__(self) -> None:
        if not isinstance(self.text, str) or not self.text:
            raise InvalidRequestError(f"text is {self.text!r:.80}; expected a non-empty string")
        if isinstance(self.images, (str, bytes, Mapping)) or not isinstance(self.images, Sequence):
            raise InvalidRequestError(f"images is {self.images!r:.80}; expected a list of images")
        if not self.images:
            raise InvalidRequestError("images is []; a prompt without images is a string")


@dataclass(frozen=True, slots=True, eq=False)
class Image:
    """One image of a prompt, as the model's encoder takes it.

    Attributes:
        digest: Equal for images that are the same to the model.
        inputs: What the encoder takes, by name; tensors on the host.
        places: (tokens,) positions in the prompt of the tokens that stand for it, ascending.
    """

    digest: bytes
    inputs: Mapping[str, Any]
    places: Int64

    @property
    def runs(self) -> Int64:
        """(runs, 2) from and to of each run of places without others between them."""
        last = np.append(np.flatnonzero(np.diff(self.places) > 1), len(self.places) - 1)
        first = np.append(0, last[:-1] + 1)
        return np.stack((self.places[first], self.places[last] + 1), axis=1)


@dataclass(frozen=True, slots=True, eq=False)
class PromptImages:
    """The images of one prompt.

    Attributes:
        images: In their order.
        token_id: What stands for a piece of any of them.
        reader: The `ImageReader.key` of who has read them.
        axes: (axes, prompt) where each token of the prompt is rotated to, by axis (M-RoPE, Wang et al., 2024); None
            if by its position.
        shift: What is added to the position of tokens behind the prompt, where there are axes.
        whole: Whether the tokens of each run of an image attend to all of it. If so, no step ends within a run.
    """

    images: tuple[Image, ...]
    token_id: int
    reader: str = ""
    axes: Int32 | None = None
    shift: int = 0
    whole: bool = False

    @property
    def num_tokens(self) -> int:
        """How many tokens stand for them."""
        return sum(len(image.places) for image in self.images)

    @property
    def runs(self) -> list[tuple[int, int]]:
        """From and to of each run of tokens of an image without others between them, in their order."""
        return [(first, last) for image in self.images for first, last in image.runs.tolist()]

    @property
    def longest(self) -> int:
        """Tokens of the longest of those runs."""
        return max(last - first for first, last in self.runs)

    def reach(self, start: int, end: int) -> Int32 | None:
        """How many tokens each of the tokens start:end attends to; None if each to those up to itself."""
        if not self.whole or not self.images:
            return None
        reach = np.arange(start + 1, end + 1, dtype=np.int32)
        found = False
        for first, last in self.runs:
            within = reach[max(first - start, 0) : max(last - start, 0)]
            within[:] = last
            found |= len(within) > 0
        return reach if found else None

    def plain(self, token_ids: Int32) -> Int32:
        """Token ids as the model has them, of some that are as in the prefix cache."""
        return np.where(token_ids < 0, np.int32(self.token_id), token_ids)


@dataclass(frozen=True, slots=True)
class ImagePart:
    """Tokens of a step that stand for pieces of one image.

    Attributes:
        image: It.
        first: The first of its pieces.
        tokens: (pieces,) which of the step's tokens they are.
    """

    image: Image
    first: int
    tokens: Int64


class ImageFailure(Exception):
    """A step could not begin, because one of its images could not be encoded.

    Args:
        digest: Of the image.
        cause: What its encoder raised.
    """

    def __init__(self, digest: bytes, cause: BaseException) -> None:
        super().__init__(f"an image cannot be encoded: {cause}")
        self.digest = digest


@dataclass(frozen=True, slots=True)
class ReadPrompt:
    """A prompt that was read with its images."""

    token_ids: list[int]
    images: PromptImages


class ImageReader(Protocol):
    """Reads images as one model needs them. May be called from several threads.

    Attributes:
        key: Equal for readers that make the same of the same images.
        mark: What stands in a text where an image goes.
    """

    key: str
    mark: str

    def read(
        self, images: Sequence[ImageSource], write: Write, encode: Callable[[str], list[int]], most_tokens: int
    ) -> ReadPrompt:
        """Reads the images of a prompt, and lets the prompt be written with the tokens that stand for them.

        Args:
            images: In the order of their marks.
            write: Writes the prompt.
            encode: Token ids of a piece of text; the reader gives `write` one that knows of images.
            most_tokens: That may stand for images. Those that come after so many are not looked at.

        Raises:
            ContextLengthExceededError: The images come to more.
            InvalidRequestError: One is no image, or there are more or fewer marks than images.
        """
        ...
