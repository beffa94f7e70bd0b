"""Reads images as a checkpoint's own processor prepares them, and places their tokens. On worker threads."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from asyncengine.errors import ContextLengthExceededError, InvalidRequestError
from asyncengine.images import Image, ImageSource, PromptImages, ReadPrompt, Write
from asyncengine.model.vision.pictures import MOST_PIXELS, picture_of
from asyncengine.step.batch import Int32, Int64

_PLACE = -1
"""In the place of a token that stands for a piece of an image, while a prompt is written."""
_OF_TEXT = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "text_replacement_offsets")


@dataclass(frozen=True, slots=True)
class _Prepared:
    """Images that were prepared at once: what the encoder takes, and the texts that stand for them."""

    inputs: dict[str, Any]
    texts: list[str]


class ProcessedImageReader:
    """As `asyncengine.images.ImageReader`, over a processor of transformers'.

    Args:
        processor: It.
        token_id: The id that the model looks for, and that stands for a piece of an image.
        key: As of `ImageReader`.
        axes: Finds where tokens are rotated to; None if by their position.
        together: Whether all images of a prompt are prepared at once, and are one to the model, for processors to whom
            their number matters. Else each is by itself, so that it is the same in whatever prompt it stands.

    Attributes:
        token_id: As given.
        whole: As of `asyncengine.images.PromptImages`.
    """

    def __init__(self, processor: Any, token_id: int, key: str, axes: Axes | None, together: bool = False) -> None:
        self.key = key
        self.mark: str = processor.image_token
        self.whole = False
        self._processor = processor
        self.token_id = token_id
        self._axes = axes
        self._together = together

    def read(
        self, images: Sequence[ImageSource], write: Write, encode: Callable[[str], list[int]], most_tokens: int
    ) -> ReadPrompt:
        """As the protocol says."""
        prepared, counts = [], []
        groups = [range(len(images))] if self._together and images else [range(at, at + 1) for at in range(len(images))]
        for group in groups:
            prepared.append(self._prepared(images, group))
            counts.append(sum(encode(text).count(self.token_id) for text in prepared[-1].texts))
            if sum(counts) > most_tokens:  # before the next one is decoded
                raise ContextLengthExceededError(
                    f"the prompt's first {group.stop} images come to {sum(counts)} tokens; allowed: {most_tokens}"
                )
        left = [text for each in prepared for text in each.texts]

        def expanded(text: str) -> list[int]:
            before, *others = text.split(self.mark)
            pieces = [before]
            for piece in others:
                if not left:
                    raise InvalidRequestError(
                        f"the prompt has more marks of images ({self.mark!r}) than images, {len(images)}"
                    )
                pieces += [left.pop(0), piece]
            ids = encode("".join(pieces))
            # Marked, since others may write tokens of the same id, which stand for nothing.
            return [_PLACE if token_id == self.token_id else token_id for token_id in ids]

        marked = np.array(write(expanded))
        if left:
            raise InvalidRequestError(
                f"the prompt has {len(images) - len(left)} marks of images ({self.mark!r}); expected {len(images)}"
            )
        places = np.flatnonzero(marked == _PLACE)
        if len(places) != sum(counts) or not all(counts):
            raise InvalidRequestError(
                f"the prompt has {len(places)} tokens that stand for images; its images come to {sum(counts)}"
            )
        ids: list[int] = np.where(marked == _PLACE, self.token_id, marked).tolist()
        found = tuple(
            Image(_digest(each.inputs), each.inputs, own)
            for each, own in zip(prepared, np.split(places, np.cumsum(counts)[:-1]), strict=True)
        )
        axes = None if self._axes is None else self._axes.of(ids, places, [each.inputs for each in prepared])
        shift = 0 if axes is None else int(axes.max()) + 1 - len(ids)
        return ReadPrompt(ids, PromptImages(found, self.token_id, self.key, axes, shift, self.whole))

    def _prepared(self, images: Sequence[ImageSource], group: range) -> _Prepared:
        pictures = []
        for index in group:
            try:
                pictures.append(picture_of(images[index]))
            except InvalidRequestError as error:
                raise InvalidRequestError(f"images[{index}]: {error}") from error
            if sum(picture.width * picture.height for picture in pictures) > MOST_PIXELS:
                raise InvalidRequestError(
                    f"images[{index}]: up to it they have more than {MOST_PIXELS} pixels, and this model must have all "
                    "of a prompt's images prepared at once"
                )
        try:
            made = self._processor(
                text=[self.mark * len(pictures)],
                images=[pictures],
                return_text_replacement_offsets=True,
                images_kwargs={"return_tensors": "pt"},
            )
        except Exception as error:  # it may refuse a shape, say
            sizes = ", ".join(f"{picture.width} x {picture.height}" for picture in pictures)
            raise InvalidRequestError(
                f"images[{group.start}]: {sizes} pixels are refused by the model's processor: {error}"
            ) from error
        inputs = {name: value for name, value in made.items() if name not in _OF_TEXT}
        return _Prepared(inputs, [each["replacement"] for each in made["text_replacement_offsets"][0]])


class Axes:
    """Where the tokens of a prompt with images are rotated to, as a model's own code says.

    Args:
        model_class: The class of its body, which has ``get_rope_index``.
        config: Its configuration.
    """

    def __init__(self, model_class: Any, config: Any) -> None:
        # The method needs the configuration alone, and must not keep the model's weights.
        self._bare = model_class.__new__(model_class)
        object.__setattr__(self._bare, "config", config)
        self._wanted = inspect.signature(model_class.get_rope_index).parameters

    def of(self, ids: Sequence[int], places: Int64, inputs: Sequence[Mapping[str, Any]]) -> Int32:
        """(axes, tokens) positions of a prompt.

        Args:
            ids: It.
            places: Of the tokens that stand for images.
            inputs: What the encoder takes of each image.
        """
        kinds = torch.zeros(1, len(ids), dtype=torch.int32)
        kinds[0, torch.from_numpy(places)] = 1
        given = {"input_ids": torch.tensor([list(ids)]), "mm_token_type_ids": kinds}
        for name in self._wanted:
            if isinstance(inputs[0].get(name), torch.Tensor):
                given[name] = torch.cat([each[name] for each in inputs])
        try:
            found, _ = self._bare.get_rope_index(**given)
        except Exception as error:
            raise InvalidRequestError(
                f"the model finds no positions for the prompt's images, which may stand beside each other: {error}"
            ) from error
        axes: Int32 = found[:, 0].numpy().astype(np.int32)
        return axes


def _digest(inputs: Mapping[str, Any]) -> bytes:
    found = hashlib.sha256()
    for name in sorted(inputs):
        found.update(f"{name}\0".encode())
        _add(found, inputs[name])
    return found.digest()


def _add(found: Any, value: Any) -> None:
    """Adds all of a value to a digest."""
    if isinstance(value, (list, tuple)):
        found.update(f"{len(value)} of ".encode())
        for each in value:
            _add(found, each)
    elif isinstance(value, (torch.Tensor, np.ndarray)):
        tensor = torch.as_tensor(value).contiguous()
        found.update(f"{tuple(tensor.shape)} {tensor.dtype} ".encode())
        if tensor.numel():
            found.update(tensor.flatten().view(torch.uint8).numpy().data)
    elif value is None or isinstance(value, (bool, int, float, str)):
        found.update(f"{value!r} ".encode())
    else:
        raise TypeError(f"the model's processor gives out a {type(value).__name__}, for which there is no place here")
