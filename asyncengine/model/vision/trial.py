"""A last look before a model serves images: does it say of them what it says in transformers?"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from asyncengine.config import Quantization
from asyncengine.errors import UnsupportedModelError
from asyncengine.images import Image, ImagePart, ReadPrompt
from asyncengine.model import architecture, verification
from asyncengine.model.recorded import Recorded
from asyncengine.model.vision.encoder import ImageEncoder
from asyncengine.model.vision.patches import multiply_patches
from asyncengine.model.vision.processor import processor
from asyncengine.model.vision.reader import Axes, ProcessedImageReader
from asyncengine.model.widened import WidenedLinears, is_faster
from asyncengine.step.batch import Int32, StepBatch

_SIZES = (48, 32), (40, 56)
"""Width and height of the pictures of a trial."""
_MANY = 768
"""Tokens of a trial with two pictures that is too long: some processors make many of any picture. One will do then."""
_LAST = 24
"""Rows of logits at its end that are compared; what comes of its images is in all of them."""
_LARGE = 1024, 1024
BUDGET_TOKENS = 8192
"""Tokens of images whose embeddings are kept."""


class ImageTrial:
    """A prompt with two pictures, and what transformers makes of it.

    Attributes:
        reader: Reads the images of prompts.

    Args:
        model: With its weights.
        layers: Its layers.
        path: Of its checkpoint.
        key: Of the reader.
        device: Where it is.

    Raises:
        UnsupportedModelError: It cannot take images; the message says why.
    """

    def __init__(self, model: Any, layers: Recorded, path: Path, key: str, device: torch.device) -> None:
        try:
            prepares = processor(path)
        except Exception as error:
            raise UnsupportedModelError(f"its processor cannot be loaded: {_first_line(error)}") from error
        token_id = int(model.config.image_token_id)
        body = next((each for each in (model, model.base_model) if hasattr(each, "get_rope_index")), None)
        axes = None if body is None else Axes(type(body), body.config)
        self._device, self._dtype = device, model.dtype
        self._encode = functools.partial(prepares.tokenizer.encode, add_special_tokens=False)
        for together in (False, True):
            self.reader = ProcessedImageReader(prepares, token_id, key, axes, together)
            given, read = self._read(prepares, _SIZES)
            if read.token_ids == given["input_ids"][0]:
                break
        else:
            raise UnsupportedModelError("its processor makes other tokens of images in a conversation than of a prompt")
        if len(read.token_ids) > _MANY:
            given, read = self._read(prepares, _SIZES[:1])
        self._ids: Int32 = np.array(read.token_ids, dtype=np.int32)
        given = {name: _sent(value, device, model.dtype) for name, value in given.items()}
        faster = WidenedLinears() if is_faster(device) else contextlib.nullcontext()
        with _plainly(model) as ahead, torch.inference_mode(), faster:
            if "logits_to_keep" in inspect.signature(model.forward).parameters:
                given["logits_to_keep"] = _LAST
            self._expected = model(**given, use_cache=False).logits[0, -_LAST:].float()
        self.reader.whole = bool(ahead)
        self._images = dataclasses.replace(read.images, whole=self.reader.whole)
        self._ahead = self._looking_ahead(layers, ahead)

    def _read(self, prepares: Any, sizes: Sequence[tuple[int, int]]) -> tuple[dict[str, Any], ReadPrompt]:
        """A prompt with pictures, as transformers' processor has it and as the reader does."""
        pictures, marks = [_picture(*size) for size in sizes], [self.reader.mark] * len(sizes)
        text = " a ".join(marks) + " b c"
        given = prepares(
            text=[text], images=[pictures], images_kwargs={"return_tensors": "pt"}, add_special_tokens=False
        )
        given = dict(given)
        given["input_ids"] = torch.as_tensor(given["input_ids"]).tolist()
        return given, self.reader.read(pictures, lambda expanding: expanding(text), self._encode, 1 << 30)

    def _looking_ahead(self, layers: Recorded, ahead: dict[str, torch.Tensor]) -> set[str]:
        """The layers whose tokens of an image attend to all of it, by their names.

        Args:
            layers: All of them.
            ahead: As `_plainly` yields it.

        Raises:
            UnsupportedModelError: Some look at later tokens otherwise.
        """
        windows = {layer.name: layer.spec.sliding_window for layer in layers.attention if layer.name in ahead}
        strange = None if windows else next(iter(ahead), None)
        at, reach = torch.arange(len(self._ids)), self._images.reach(0, len(self._ids))
        for name, window in windows.items():
            assert reach is not None
            allowed = at < torch.from_numpy(reach)[:, None]
            if window is not None:
                allowed &= at > at[:, None] - window
            if not torch.equal(ahead[name], allowed):
                strange = name
        if strange is not None:
            raise UnsupportedModelError(
                f"its tokens of an image look at later ones, but not at all of the image and those before: {strange}"
            )
        return set(windows)

    def layers_of(self, layers: Recorded) -> Recorded:
        """The model's layers, as they attend where there are images."""
        return layers.looking_ahead(self._ahead)

    def encoder(self, model: Any) -> ImageEncoder:
        """The encoder of a model."""
        multiply_patches(model)
        return ImageEncoder(model, self._images.token_id, self._device, BUDGET_TOKENS)

    def large(self) -> Image:
        """An image for whose computation a device must have room; what is larger may be too large for it."""
        mark = self.reader.mark
        read = self.reader.read([_picture(*_LARGE)], lambda expanding: expanding(mark), self._encode, 1 << 30)
        return read.images.images[0]

    def run(
        self,
        model: Any,
        layers: Recorded,
        backend: Any,
        program: Any = None,
        quantization: Quantization = "none",
        kv_dtype: torch.dtype | None = None,
        narrow: bool = False,
    ) -> None:
        """Compares, with the prompt computed in pieces that part an image, if it can be parted.

        Args:
            model: As it was given before; without its weights, if they are in `program`.
            layers: Its layers, as `layers_of` has them.
            backend: How it attends.
            program: Runs in the model's place.
            quantization: What weights were rounded to since.
            kv_dtype: Of its KV cache, if that is not the model's.
            narrow: Whether weights or KV cache are in fp8.

        Raises:
            UnsupportedModelError: It says something else.
        """
        dtypes = self._dtype, kv_dtype or self._dtype
        tolerance = verification.tolerance_of(self._dtype, program, quantization, narrow)
        length = len(self._ids)
        middle = int(self._images.images[0].places[len(self._images.images[0].places) // 2])
        if self._images.whole:
            middle = int(self._images.images[0].runs[0, 1])
        with verification.stepping(model, layers, backend, program, dtypes, self._device, length, 1) as runner:
            runner.use_images(self.encoder(model))
            cuts = sorted({0, middle, length - 1, length})
            with torch.inference_mode():
                found = [runner.logits(self._piece(*cut)) for cut in itertools.pairwise(cuts)]
        error = verification.relative(torch.cat(found).float(), self._expected)
        if not error <= tolerance:
            raise UnsupportedModelError(
                f"of images it says something else than in transformers: relative error {error:.2g}, allowed "
                f"{tolerance:g}"
            )

    def _piece(self, start: int, end: int) -> StepBatch:
        """Tokens start:end as one step."""
        batch, images = verification.piece(self._ids[None], start, end), self._images
        parts = []
        for image in images.images:
            first, last = np.searchsorted(image.places, (start, end)).tolist()
            if first < last:
                parts.append(ImagePart(image, first, image.places[first:last] - start))
        axes = None if images.axes is None else images.axes[:, start:end]
        looked_at = np.arange(max(len(self._ids) - _LAST - start, 0), end - start, dtype=np.int64)
        return dataclasses.replace(
            batch, images=tuple(parts), axes=axes, reach=images.reach(start, end), sample_index=looked_at
        )


def _sent(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """A value on a device, what is a list as a tensor."""
    tensor = torch.as_tensor(value) if isinstance(value, (torch.Tensor, list)) else None
    if tensor is None:
        return value
    return tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)


def _picture(width: int, height: int) -> Any:
    from PIL import Image

    drawn = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(drawn)


@contextlib.contextmanager
def _plainly(model: Any) -> Iterator[dict[str, torch.Tensor]]:
    """Has a model attend as transformers does; yields which modules are given a mask by which some token looks at later
    ones, by their names, and what each token may look at: (tokens, tokens).
    """
    ahead: dict[str, torch.Tensor] = {}
    decoder = set(model.get_decoder().modules())

    def look(name: str) -> Any:
        def looking(module: nn.Module, arguments: Any, keywords: Any) -> None:
            for mask in (*arguments, *keywords.values()):
                if isinstance(mask, torch.Tensor) and mask.dim() == 4 and mask.shape[-1] == mask.shape[-2] > 1:
                    allowed = mask if mask.dtype is torch.bool else mask == 0
                    if bool(allowed.triu(1).any()):
                        ahead[name] = allowed[0, 0].cpu()

        return looking

    handles = [
        module.register_forward_pre_hook(look(name), with_kwargs=True)
        for name, module in model.named_modules()
        if module in decoder
    ]
    try:
        model.set_attn_implementation("eager")
        yield ahead
    finally:
        for handle in handles:
            handle.remove()
        architecture.attend_here(model)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [repr(error)]
    return lines[0]
