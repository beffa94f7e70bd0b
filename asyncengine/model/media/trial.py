"""A last look before a model serves images, audio or videos: does it say of them what it says in transformers?"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from asyncengine.config import Quantization
from asyncengine.errors import InvalidRequestError, UnsupportedModelError
from asyncengine.media import NOUNS, PLURALS, Kind, MediaItem, MediaPart, ReadPrompt, Sources
from asyncengine.model import architecture, verification
from asyncengine.model.media.axes import Axes
from asyncengine.model.media.encoder import MediaEncoder
from asyncengine.model.media.patches import multiply_patches
from asyncengine.model.media.preparation import (
    AudioPreparation,
    ImagePreparation,
    Preparation,
    processed,
)
from asyncengine.model.media.reader import ProcessedMediaReader
from asyncengine.model.media.samples import large, samples
from asyncengine.model.media.transcription import ProcessedTranscription
from asyncengine.model.media.video_preparation import VideoPreparation
from asyncengine.model.recorded import Recorded
from asyncengine.model.trial_bound import relative
from asyncengine.model.widened import WidenedLinears, is_faster
from asyncengine.step.batch import Int32, StepBatch

_MANY = 768
"""Tokens of a trial with two of a kind that is too long: some processors make many of any picture. One will do then."""
_LAST = 24
"""Rows of logits at its end that are compared; what comes of its images is in all of them."""
BUDGET_TOKENS = 8192
"""Tokens of images, audio and videos whose embeddings are kept."""


class MediaTrial:
    """A prompt with two pictures, two sounds, two videos, or two of each, and what transformers makes of it.

    Attributes:
        reader: Reads the images, the audio and the videos of prompts.
        looks_ahead: Whether some of its tokens look at later ones.

    Args:
        model: With its weights.
        layers: Its layers.
        prepares: Its processor.
        kinds: What is tried.
        key: Of the reader.
        device: Where it is.
        one_audio: Whether a prompt may have one audio and no more.
        most_tokens: That the model takes.
        looked_ahead: Whether a trial before has found that tokens of an image look at later ones.

    Raises:
        UnsupportedModelError: It cannot take them; the message says why.
    """

    def __init__(
        self,
        model: Any,
        layers: Recorded,
        prepares: Any,
        kinds: Sequence[Kind],
        key: str,
        device: torch.device,
        one_audio: bool = False,
        most_tokens: int = 1 << 30,
        looked_ahead: bool = False,
    ) -> None:
        body = next((each for each in (model, model.base_model) if hasattr(each, "get_rope_index")), None)
        axes = None if body is None else Axes(type(body), body.config)
        self._device, self._dtype = device, model.dtype
        self._processor = prepares
        self._encode = functools.partial(prepares.tokenizer.encode, add_special_tokens=False)
        self._around = dict.fromkeys(kinds, "{}") | {"video": _around_videos(model.config, prepares.tokenizer)}
        self._numbers = {kind: 1 if kind == "audio" and one_audio else 2 for kind in kinds}
        for together in itertools.product(*((False,) if kind == "audio" else (False, True) for kind in kinds)):
            preparations = [self._preparation(*each, model.config) for each in zip(kinds, together, strict=True)]
            for preparation in preparations:
                if preparation.kind == "audio" and one_audio:
                    preparation.most = 1
            transcribing = ProcessedTranscription.of(prepares) if "audio" in kinds else None
            self.reader = ProcessedMediaReader(preparations, key, axes, transcribing)
            if self.reader.either:
                self._numbers.pop("image", None)
            given, read = self._read()
            if read.token_ids == given["input_ids"][0]:
                break
        else:
            what = " and ".join(PLURALS[kind] for kind in kinds)
            raise UnsupportedModelError(
                f"its processor makes other tokens of {what} in a conversation than of a prompt"
            )
        if len(read.token_ids) > min(_MANY, most_tokens):
            self._numbers = dict.fromkeys(self._numbers, 1)
            for preparation in preparations:
                if preparation.kind == "audio":
                    preparation.most = 1
            given, read = self._read()
        if len(read.token_ids) > most_tokens:  # what has passed a trial before may be left out
            self._numbers = {kinds[-1]: 1}
            given, read = self._read()
            if (length := len(read.token_ids)) > most_tokens:
                raise UnsupportedModelError(
                    f"{NOUNS[kinds[-1]]} alone comes to {length} tokens; the model is to take {most_tokens}"
                )
        self._ids: Int32 = np.array(read.token_ids, dtype=np.int32)
        given = {name: _sent(value, device, model.dtype) for name, value in given.items()}
        faster = WidenedLinears() if is_faster(device) else contextlib.nullcontext()
        with _plainly(model) as ahead, torch.inference_mode(), faster:
            if "logits_to_keep" in inspect.signature(model.forward).parameters:
                given["logits_to_keep"] = _LAST
            self._expected = model(**given, use_cache=False).logits[0, -_LAST:].float()
        if "image" in kinds and "image" not in self._numbers and (ahead or looked_ahead):
            raise UnsupportedModelError(
                "its tokens look at later ones, and it cannot be tried beside images how they do"
            )
        self.looks_ahead = bool(ahead)
        for preparation in preparations:
            if preparation.kind == "image":
                preparation.whole = bool(ahead)
        items = [dataclasses.replace(each, whole=bool(ahead) and each.kind == "image") for each in read.media.items]
        self._media = dataclasses.replace(read.media, items=tuple(items))
        self._ahead = self._looking_ahead(layers, ahead)

    def _read(self) -> tuple[dict[str, Any], ReadPrompt]:
        """The prompt, as transformers' processor has it and as the reader does."""
        given: dict[str, Any] = {}
        sources: dict[Kind, Sequence[Any]] = {}
        marks = []
        for kind, number in self._numbers.items():
            marks += [self._around[kind].format(self.reader.marks[kind])] * number
            sources[kind], of_kind = samples(kind, number, self._processor)
            given |= of_kind
        text = " a ".join(marks) + " b c"
        given = dict(processed(self._processor, text=[text], add_special_tokens=False, **given))
        given["input_ids"] = torch.as_tensor(given["input_ids"]).tolist()
        return given, self._reading(sources, text)

    def _preparation(self, kind: Kind, together: bool, config: Any) -> Preparation:
        if kind == "image":
            return ImagePreparation(self._processor, int(config.image_token_id), together)
        if kind == "audio":
            return AudioPreparation(self._processor, int(config.audio_token_id))
        return VideoPreparation(self._processor, config, self._encode, together)

    def _reading(self, sources: Sources, text: str) -> ReadPrompt:
        return self.reader.read(sources, lambda expanding: expanding(text), self._encode, 1 << 30)

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
        at, reach = torch.arange(len(self._ids)), self._media.reach(0, len(self._ids))
        for name, window in windows.items():
            allowed = at < (at + 1 if reach is None else torch.from_numpy(reach))[:, None]
            if window is not None:
                allowed &= at > at[:, None] - window
            if not torch.equal(ahead[name], allowed):
                strange = name
        if strange is not None:
            what = NOUNS[next(iter(self._numbers))]
            raise UnsupportedModelError(
                f"its tokens of {what} look at later ones, but not at all of it and those before: {strange}"
            )
        return set(windows)

    def layers_of(self, layers: Recorded) -> Recorded:
        """The model's layers, as they attend where there are images."""
        return layers.looking_ahead(self._ahead)

    def encoder(self, model: Any) -> MediaEncoder:
        """The encoder of a model."""
        multiply_patches(model)
        return MediaEncoder(model, self.reader.token_ids, self._device, BUDGET_TOKENS)

    def check_repeats(self, model: Any) -> None:
        """Has a sound encoded twice: some encoders add noise, of which nobody could say again what they said.

        Raises:
            UnsupportedModelError: They differ.
        """
        item, encoder = next(item for item in self._media.items if item.kind == "audio"), self.encoder(model)
        first = encoder.features(item).rows
        encoder.clear()
        if not torch.equal(first, encoder.features(item).rows):
            raise UnsupportedModelError("its encoder makes something else of the same audio each time")

    def large(self) -> list[MediaItem]:
        """An image, an audio and a video for whose computation a device must have room; larger ones may be too large.

        Of audio it is as long a piece as the processor takes, up to 30 seconds; of a video 16 frames of 512 x 512.
        """
        found: list[MediaItem] = []
        for kind in self.reader.kinds:
            for source in large(kind, self._processor):
                with contextlib.suppress(InvalidRequestError):
                    found += self._reading({kind: [source]}, self.reader.marks[kind]).media.items
                    break
        return found

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
        """Compares, with the prompt computed in pieces that part one of each kind, if it can be parted.

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
        firsts = {item.kind: item for item in reversed(self._media.items)}.values()
        middles = {int(item.runs[0, 1] if item.whole else item.places[len(item.places) // 2]) for item in firsts}
        with verification.stepping(model, layers, backend, program, dtypes, self._device, length, 1) as runner:
            runner.use_media(self.encoder(model))
            cuts = sorted({0, *middles, length - 1, length})
            with torch.inference_mode():
                found = [runner.logits(self._piece(*cut)) for cut in itertools.pairwise(cuts)]
        error = relative(torch.cat(found).float(), self._expected)
        if not error <= tolerance:
            what = " and ".join(PLURALS[kind] for kind in self._numbers)
            raise UnsupportedModelError(
                f"of {what} it says something else than in transformers: relative error {error:.2g}, allowed "
                f"{tolerance:g}"
            )

    def _piece(self, start: int, end: int) -> StepBatch:
        """Tokens start:end as one step."""
        batch, media = verification.piece(self._ids[None], start, end), self._media
        parts = []
        for item in media.items:
            first, last = np.searchsorted(item.places, (start, end)).tolist()
            if first < last:
                parts.append(MediaPart(item, first, item.places[first:last] - start))
        axes = None if media.axes is None else media.axes[:, start:end]
        looked_at = np.arange(max(len(self._ids) - _LAST - start, 0), end - start, dtype=np.int64)
        return dataclasses.replace(
            batch, media=tuple(parts), axes=axes, reach=media.reach(start, end), sample_index=looked_at
        )


def _sent(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """A value on a device, what is a list as a tensor."""
    tensor = torch.as_tensor(value) if isinstance(value, (torch.Tensor, list)) else None
    if tensor is None:
        return value
    return tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)


def _around_videos(config: Any, tokenizer: Any) -> str:
    """What a chat template writes around the mark of a video, where models have tokens of their own for that."""
    ids = [getattr(config, f"video_{side}_token_id", None) for side in ("start", "end")]
    return "{}" if None in ids else "{}".join(tokenizer.convert_ids_to_tokens(ids))


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
