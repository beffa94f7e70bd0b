"""What a checkpoint's own processor makes of media, for its encoders and for prompts. On worker threads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from asyncengine.errors import InvalidRequestError
from asyncengine.media import AudioSource, ImageSource, Kind
from asyncengine.model.media.digest import digest_of
from asyncengine.model.media.pictures import MOST_PIXELS, picture_of
from asyncengine.model.media.sounds import Samples, sound_of

_OF_TEXT = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "text_replacement_offsets")
_OFFSETS = "text_replacement_offsets"
_END_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Prepared:
    """What was prepared at once: what the encoder takes, and the texts that stand for it."""

    inputs: dict[str, Any]
    texts: list[str]


class Preparation(Protocol):
    """Prepares one kind of media.

    Attributes:
        kind: Which.
        mark: What stands in a text where one goes.
        token_id: The id that the model looks for, and that stands for a piece.
        together: Whether all of a prompt are prepared at once, and are one to the model, for processors to whom their
            number matters. Else each is by itself, so that it is the same in whatever prompt it stands.
        most: How many of them may be in a prompt; None if any number.
        whole: As of `asyncengine.media.MediaItem`.
    """

    kind: Kind
    mark: str
    token_id: int
    together: bool
    most: int | None
    whole: bool

    def prepared(self, sources: Sequence[Any], group: range) -> Prepared:
        """Prepares those of a prompt that are to be prepared at once.

        Raises:
            InvalidRequestError: One is not what it should be; the message begins with which one.
        """
        ...


class ImagePreparation:
    """As `Preparation`, of images.

    Args:
        processor: Of transformers.
        token_id: As of the protocol.
        together: As of the protocol.
    """

    kind: Kind = "image"

    def __init__(self, processor: Any, token_id: int, together: bool = False) -> None:
        self.mark: str = processor.image_token
        self.token_id = token_id
        self.together = together
        self.most: int | None = None
        self.whole = False
        self._processor = processor

    def prepared(self, sources: Sequence[ImageSource], group: range) -> Prepared:
        """As the protocol says."""
        pictures = []
        for index in group:
            try:
                pictures.append(picture_of(sources[index]))
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
        return Prepared(inputs_of(made), replacements_of(made))


class AudioPreparation:
    """As `Preparation`, of audio, each by itself.

    Args:
        processor: Of transformers.
        token_id: As of the protocol.

    Attributes:
        rate: Samples in a second that the model needs.

    Raises:
        ValueError: The processor does not say which that is.
    """

    kind: Kind = "audio"

    def __init__(self, processor: Any, token_id: int) -> None:
        self.mark: str = processor.audio_token
        self.token_id = token_id
        self.together = False
        self.most: int | None = None
        self.whole = False
        self._processor = processor
        extractor = listening_part(processor)
        rate = getattr(extractor, "sampling_rate", None)
        if not isinstance(rate, int):
            raise ValueError(f"{type(extractor).__name__} does not say which sampling rate it needs")
        self.rate = rate
        self._heard = 0
        """Samples of the longest audio that the processor has been seen to listen to up to its end."""
        self._too_long: int | None = None
        """Samples of the shortest audio of which it has been seen to leave out the end."""

    def prepared(self, sources: Sequence[AudioSource], group: range) -> Prepared:
        """As the protocol says."""
        [index] = group
        try:
            sound = sound_of(sources[index], self.rate)
            self._check_known(sound)
            found = self._processed(sound)
            self._check_end(sound, found)
        except InvalidRequestError as error:
            raise InvalidRequestError(f"audio[{index}]: {error}") from error
        return found

    def _processed(self, sound: Samples) -> Prepared:
        try:
            made = processed(
                self._processor,
                text=[self.mark],
                audio=[sound],
                return_text_replacement_offsets=True,
                audio_kwargs={"sampling_rate": self.rate, "return_tensors": "pt"},
            )
        except Exception as error:  # it may refuse a length, say
            raise InvalidRequestError(
                f"an audio of {len(sound) / self.rate:.2f} s is refused by the model's processor: {error}"
            ) from error
        return Prepared(inputs_of(made), replacements_of(made))

    def _check_known(self, sound: Samples) -> None:
        if self._too_long is not None and len(sound) >= self._too_long:
            raise InvalidRequestError(
                f"an audio of {len(sound) / self.rate:.2f} s is too long for the model's processor, which leaves out "
                f"the end of one of {self._too_long / self.rate:.2f} s"
            )

    def _check_end(self, sound: Samples, found: Prepared) -> None:
        """Refuses an audio of which the processor leaves out the end, as many do without a word.

        If it hears another end, what comes out is something else. So long an audio is prepared twice, once.
        """
        if len(sound) <= self._heard:
            return
        other = sound.copy()
        end = other[-max(1, int(_END_SECONDS * self.rate)) :]
        end += np.random.default_rng(0).uniform(-0.5, 0.5, len(end)).astype(np.float32)
        if digest_of(self.kind, self._processed(other).inputs) == digest_of(self.kind, found.inputs):
            self._too_long = min(len(sound), self._too_long or len(sound))
            self._check_known(sound)
        self._heard = max(self._heard, len(sound))


def processed(processor: Any, **given: Any) -> Any:
    """What a processor of audio makes of what it is given; some want to be told that they make tensors of all of it."""
    try:
        return processor(**given)
    except Exception as error:
        try:
            return processor(**given, text_kwargs={"return_tensors": "pt"})
        except Exception:
            raise error from None


def listening_part(processor: Any) -> Any:
    """What prepares audio in a processor; None if nothing does."""
    return getattr(processor, "feature_extractor", None) or getattr(processor, "audio_processor", None)


def inputs_of(made: Any) -> dict[str, Any]:
    """What a processor made for the encoder."""
    return {name: value for name, value in made.items() if name not in _OF_TEXT}


def replacements_of(made: Any) -> list[str]:
    """What a processor has put into the text in the place of marks."""
    return [each["replacement"] for each in made[_OFFSETS][0]]
