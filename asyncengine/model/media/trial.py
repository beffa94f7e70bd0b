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
from asyncengine.media import NOUNS, PLURALS, Kind, MediaItem, MediaPart, ReadPrompt, Sources, Video
from asyncengine.model import architecture, verification
from asyncengine.model.media.axes import Axes
from asyncengine.model.media.encoder import MediaEncoder
from asyncengine.model.media.frames import Frames, Stated
from asyncengine.model.media.patches import multiply_patches
from asyncengine.model.media.preparation import (
    AudioPreparation,
    ImagePreparation,
    Preparation,
    listening_part,
    processed,
)
from asyncengine.model.media.reader import ProcessedMediaReader
from asyncengine.model.media.transcription import ProcessedTranscription
from asyncengine.model.media.video_preparation import VideoPreparation, told
from asyncengine.model.recorded import Recorded
from asyncengine.model.trial_bound import relative
from asyncengine.model.widened import WidenedLinears, is_faster
from asyncengine.step.batch import Int32, StepBatch

_SIZES = (48, 32), (40, 56)
"""Width and height of the pictures of a trial, and of the frames of its videos."""
_FRAMES, _FPS = 4, 0.8
"""Of its videos, of which a second is no unit of what models count time in."""
_SECONDS = 0.5, 0.81
"""Length of its sounds."""
_MANY = 768
"""Tokens of a trial with two of a kind that is too long: some processors make many of any picture. One will do then."""
_LAST = 24
"""Rows of logits at its end that are compared; what comes of its images is in all of them."""
_LARGE = 1024, 1024
_LARGE_FRAMES = 512, 512, 16
"""Width, height and number of frames."""
_LONG_SECONDS = 30.0
BUDGET_TOKENS = 8192
"""Tokens of images, audio and videos whose embeddings are kept."""


class MediaTrial:
    """A prompt with two pictures, two sounds, two videos, or two of each, and what transformers makes of it.

    Attributes:
        reader: Reads the images, the audio and the videos of prompts.

    Args:
        model: With its weights.
        layers: Its layers.
        prepares: Its processor.
        kinds: What is tried.
        key: Of the reader.
        device: Where it is.
        one_audio: Whether a prompt may have one audio and no more.
        most_tokens: That the model takes.

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
    ) -> None:
        body = next((each for each in (model, model.base_model) if hasattr(each, "get_rope_index")), None)
        axes = None if body is None else Axes(type(body), body.config)
        self._device, self._dtype = device, model.dtype
        self._processor = prepares
        self._encode = functools.partial(prepares.tokenizer.encode, add_special_tokens=False)
        self._around = dict.fromkeys(kinds, "{}") | {"video": _around_videos(model.config, prepares.tokenizer)}
        self._numbers = {kind: 1 if kind == "audio" and one_audio else 2 for kind in kinds}
        for together in (False, True) if "image" in kinds else (False,):
            preparations = [self._preparation(kind, model.config, together) for kind in kinds]
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
        if ahead and self.reader.either:
            raise UnsupportedModelError("its tokens of videos look at later ones, as nobody has seen images do beside")
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
            if kind == "image":
                sources[kind] = pictures = [_picture(*size) for size in _SIZES[:number]]
                given |= {"images": [pictures], "images_kwargs": {"return_tensors": "pt"}}
            elif kind == "video":
                films = [_film(*size) for size in _SIZES[:number]]
                sources[kind] = [Video(film.shown, fps=_FPS) for film in films]
                of_each = [told(film) for film in films]
                stated = [each["video_metadata"][0] for each in of_each]
                given["videos"] = [film.shown for film in films]
                given["videos_kwargs"] = of_each[0] | {"video_metadata": stated, "return_tensors": "pt"}
            else:
                rate = int(listening_part(self._processor).sampling_rate)
                sounds = [_sound(seconds, rate) for seconds in _SECONDS[:number]]
                sources[kind] = [(sound, rate) for sound in sounds]
                given |= {"audio": sounds, "audio_kwargs": {"return_tensors": "pt", "sampling_rate": rate}}
        text = " a ".join(marks) + " b c"
        given = dict(processed(self._processor, text=[text], add_special_tokens=False, **given))
        given["input_ids"] = torch.as_tensor(given["input_ids"]).tolist()
        return given, self._reading(sources, text)

    def _preparation(self, kind: Kind, config: Any, together: bool) -> Preparation:
        if kind == "image":
            return ImagePreparation(self._processor, int(config.image_token_id), together)
        if kind == "audio":
            return AudioPreparation(self._processor, int(config.audio_token_id))
        return VideoPreparation(self._processor, config, self._encode)

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
            mark = self.reader.marks[kind]
            if kind == "image":
                found += self._reading({kind: [_picture(*_LARGE)]}, mark).media.items
                continue
            if kind == "video":
                found += self._reading({kind: [Video(_film(*_LARGE_FRAMES).shown, fps=_FPS)]}, mark).media.items
                continue
            rate = int(listening_part(self._processor).sampling_rate)
            for seconds in (_LONG_SECONDS, _LONG_SECONDS / 2, 1.0):
                with contextlib.suppress(InvalidRequestError):
                    found += self._reading({kind: [(_sound(seconds, rate), rate)]}, mark).media.items
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


def _sound(seconds: float, rate: int) -> Any:
    samples = int(seconds * rate)
    return np.random.default_rng(samples).uniform(-0.5, 0.5, samples).astype(np.float32)


def _picture(width: int, height: int) -> Any:
    from PIL import Image

    drawn = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(drawn)


def _film(width: int, height: int, frames: int = _FRAMES) -> Frames:
    shown = np.random.default_rng(height).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)
    return Frames(shown, list(range(frames)), Stated(frames, _FPS, width, height))


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
