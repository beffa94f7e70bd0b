"""Images, audio and videos in prompts: values that any thread may have. Knows no torch, and nothing that decodes files.

Each token that stands for a piece of an image has the id of the model's image token, and so it is with audio and with
videos. On the step thread it has a negative id meanwhile, one for each image, audio or video, so that prompts share
blocks of the prefix cache where what stands in them is the same, too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from asyncengine.errors import InvalidRequestError
from asyncengine.step.batch import Int32, Int64
from asyncengine.transcription import Transcribing

Kind = Literal["image", "audio", "video", "text"]
"""A text is one of these where the decoder attends to it beside its own tokens (`PromptMedia.source`)."""
KINDS: tuple[Kind, ...] = ("image", "audio", "video")
"""Those that a prompt has beside its text."""
PLURALS: dict[Kind, str] = {"image": "images", "audio": "audio", "video": "videos", "text": "source texts"}
NOUNS: dict[Kind, str] = {"image": "an image", "audio": "an audio", "video": "a video", "text": "a source text"}
UNENCODED: dict[Kind, str] = {kind: f"its checkpoint has no encoder of {PLURALS[kind]}" for kind in KINDS}
"""Why a model takes none, where there is nothing more to say."""

ImageSource = Any
"""A ``PIL.Image.Image``; a (height, width, 3) or (height, width) array of bytes; an encoded file (PNG, JPEG, WebP, ...)
as ``bytes``, as the `pathlib.Path` where it is, or as a ``data:`` URL."""

AudioSource = Any
"""Samples and their sampling rate, as ``(samples, rate)`` or ``{"array": samples, "sampling_rate": rate}``, where the
samples are an array of floats of one dimension, -1 to 1; an encoded file (WAV, FLAC, MP3, Ogg, ...) as ``bytes``, as
the `pathlib.Path` where it is, or as a ``data:`` URL."""

VideoSource = Any
"""An encoded file (MP4, WebM, ...) as ``bytes``, as the `pathlib.Path` where it is, or as a ``data:`` URL; its frames,
as a list of ``PIL.Image.Image`` or of (height, width, 3) arrays of bytes, or as one (frames, height, width, 3) array;
or a `Video` of one of them."""

Sources = Mapping[Kind, Sequence[Any]]
"""By kind, `ImageSource`, `AudioSource` or `VideoSource` in the order of their marks in the prompt."""

_HIGHEST_FPS = sys.float_info.max
"""Integers may be larger than what a float can be."""

Write = Callable[[Callable[[str], list[int]]], list[int]]
"""Writes a prompt by a function that encodes each piece of text of it."""


@dataclass(frozen=True, slots=True)
class Video:
    """A video, and how many of its frames are looked at.

    Attributes:
        source: A file or frames, as `VideoSource` says.
        fps: Frames in a second: of a file, how many are looked at; of frames, how many there were when they were taken.
            None: as many as the model's own processor takes.
        num_frames: How many frames of a file are looked at, in place of `fps`.
    """

    source: VideoSource
    fps: float | None = None
    num_frames: int | None = None

    def __post_init__(self) -> None:
        fps, frames = self.fps, self.num_frames
        if isinstance(self.source, Video):
            raise InvalidRequestError("a video's source is another Video; expected a file or frames")
        if fps is not None and (
            isinstance(fps, bool) or not isinstance(fps, (int, float)) or not 0 < fps <= _HIGHEST_FPS
        ):
            raise InvalidRequestError(f"a video's fps is {fps!r:.40}; expected frames in a second, more than 0")
        if frames is not None and (isinstance(frames, bool) or not isinstance(frames, int) or frames < 1):
            raise InvalidRequestError(f"a video's num_frames is {frames!r:.40}; expected 1 or more")
        if fps is not None and frames is not None:
            raise InvalidRequestError(f"a video has fps {fps!r} and num_frames {frames!r}; allowed: one of them")


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
        _check_text(self.text)
        _check_sources("images", self.images)
        if not self.images:
            raise InvalidRequestError("images is []; a prompt without images is a string")

    @property
    def sources(self) -> Sources:
        """What is in it beside text."""
        return {"image": self.images}


@dataclass(frozen=True, slots=True)
class AudioPrompt:
    """A prompt with audio in it, where there is no chat template to place it.

    Attributes:
        text: Has the model's own marks, one for each audio and one for each image, where they go.
        audio: In the order of its marks.
        images: In the order of theirs, for models that take both.
    """

    text: str
    audio: Sequence[AudioSource]
    images: Sequence[ImageSource] = ()

    def __post_init__(self) -> None:
        _check_text(self.text)
        _check_sources("audio", self.audio)
        _check_sources("images", self.images)
        if not self.audio:
            raise InvalidRequestError("audio is []; a prompt without audio is a string or an ImagePrompt")

    @property
    def sources(self) -> Sources:
        """What is in it beside text."""
        return {"image": self.images, "audio": self.audio} if self.images else {"audio": self.audio}


@dataclass(frozen=True, slots=True)
class VideoPrompt:
    """A prompt with videos in it, where there is no chat template to place them.

    Attributes:
        text: Has the model's own marks, one for each video, image and audio, where they go.
        videos: In the order of their marks.
        images: In the order of theirs.
        audio: In the order of its, for models that take it.
    """

    text: str
    videos: Sequence[VideoSource]
    images: Sequence[ImageSource] = ()
    audio: Sequence[AudioSource] = ()

    def __post_init__(self) -> None:
        _check_text(self.text)
        for name in ("videos", "images", "audio"):
            _check_sources(name, getattr(self, name))
        if not self.videos:
            raise InvalidRequestError("videos is []; a prompt without videos is a string or an ImagePrompt")

    @property
    def sources(self) -> Sources:
        """What is in it beside text."""
        given: dict[Kind, Sequence[Any]] = {"image": self.images, "audio": self.audio, "video": self.videos}
        return {kind: own for kind, own in given.items() if own}


def _check_text(text: object) -> None:
    if not isinstance(text, str) or not text:
        raise InvalidRequestError(f"text is {text!r:.80}; expected a non-empty string")


def _check_sources(name: str, sources: object) -> None:
    if isinstance(sources, (str, bytes, Mapping)) or not isinstance(sources, Sequence):
        what = "audio, each of it samples with their rate, or a file" if name == "audio" else name
        raise InvalidRequestError(f"{name} is {sources!r:.80}; expected a list of {what}")


@dataclass(frozen=True, slots=True, eq=False)
class MediaItem:
    """One image, audio or video of a prompt, as the model's encoder takes it.

    Attributes:
        kind: Which of them.
        digest: Equal for items that are the same to the model.
        inputs: What the encoder takes, by name; tensors on the host.
        places: (tokens,) positions in the prompt of the tokens that stand for it, ascending.
        token_id: What stands for a piece of it.
        whole: Whether the tokens of each of its runs attend to all of the run. If so, no step ends within one.
        tokens: Those of its text alone, what stands around its pieces included, for encoders that want to see it.
    """

    kind: Kind
    digest: bytes
    inputs: Mapping[str, Any]
    places: Int64
    token_id: int
    whole: bool = False
    tokens: Sequence[int] = ()

    @property
    def runs(self) -> Int64:
        """(runs, 2) from and to of each run of places without others between them."""
        last = np.append(np.flatnonzero(np.diff(self.places) > 1), len(self.places) - 1)
        first = np.append(0, last[:-1] + 1)
        return np.stack((self.places[first], self.places[last] + 1), axis=1)


@dataclass(frozen=True, slots=True, eq=False)
class PromptMedia:
    """The images, the audio and the videos of one prompt.

    Attributes:
        items: In the order of their first tokens.
        reader: The `MediaReader.key` of who has read them.
        axes: (axes, prompt) where each token of the prompt is rotated to, by axis (M-RoPE, Wang et al., 2024); None
            if by its position.
        shift: What is added to the position of tokens behind the prompt, where there are axes.
        source: Of a prompt that begins with what its decoder attends to beside its own tokens, an audio or a text: how
            many tokens that has. It is the one item then, whose other places fill its last block. Else 0.
    """

    items: tuple[MediaItem, ...]
    reader: str = ""
    axes: Int32 | None = None
    shift: int = 0
    source: int = 0

    @property
    def kinds(self) -> set[Kind]:
        """Of its items."""
        return {item.kind for item in self.items}

    @property
    def beside(self) -> int:
        """Places of the source; 0 if there is none."""
        return len(self.items[0].places) if self.source else 0

    def meant(self, places: int) -> int:
        """How many of so many places at the prompt's beginning are not there only to fill a block."""
        return min(places, self.source) + max(places - self.beside, 0) if self.source else places

    def shown(self, prompt: Int32) -> Int32:
        """(tokens,) the tokens of a prompt without those that are there only to fill a block."""
        return np.concatenate((prompt[: self.source], prompt[self.beside :])) if self.source else prompt

    def num_tokens(self, kind: Kind) -> int:
        """How many tokens stand for items of a kind."""
        return self.meant(sum(len(item.places) for item in self.items if item.kind == kind))

    @property
    def whole(self) -> bool:
        """Whether some of its tokens must be computed in one step."""
        return any(item.whole for item in self.items)

    @property
    def whole_runs(self) -> list[tuple[int, int]]:
        """From and to of each run of tokens that attend to all of it, in their order."""
        return [(first, last) for item in self.items if item.whole for first, last in item.runs.tolist()]

    @property
    def longest_whole(self) -> int:
        """Tokens of the longest of those runs; 0 if there is none."""
        return max((last - first for first, last in self.whole_runs), default=0)

    def reach(self, start: int, end: int) -> Int32 | None:
        """How many tokens each of the tokens start:end attends to; None if each to those up to itself."""
        reach = np.arange(start + 1, end + 1, dtype=np.int32)
        found = False
        for first, last in self.whole_runs:
            within = reach[max(first - start, 0) : max(last - start, 0)]
            within[:] = last
            found |= len(within) > 0
        return reach if found else None

    def plain(self, token_ids: Int32, start: int = 0) -> Int32:
        """Token ids as the model has them, of some that are as in the prefix cache.

        Args:
            token_ids: Of the sequence, from `start` on; what is in none of the items' places stays as it is.
            start: Position of the first of them.
        """
        token_ids = token_ids.copy()
        for item in self.items:
            first, last = np.searchsorted(item.places, (start, start + len(token_ids))).tolist()
            token_ids[item.places[first:last] - start] = item.token_id
        return token_ids


@dataclass(frozen=True, slots=True)
class MediaPart:
    """Tokens of a step that stand for pieces of one item.

    Attributes:
        item: It.
        first: The first of its pieces.
        tokens: (pieces,) which of the step's tokens they are.
    """

    item: MediaItem
    first: int
    tokens: Int64


class MediaFailure(Exception):
    """A step could not begin, because one of its images, of its audio or of its videos could not be encoded.

    Args:
        item: It.
        cause: What its encoder raised.
    """

    def __init__(self, item: MediaItem, cause: BaseException) -> None:
        super().__init__(f"{NOUNS[item.kind]} cannot be encoded: {cause}")
        self.digest = item.digest


@dataclass(frozen=True, slots=True)
class ReadPrompt:
    """A prompt that was read with its images, its audio and its videos."""

    token_ids: list[int]
    media: PromptMedia


class MediaReader(Protocol):
    """Reads images, audio and videos as one model needs them. May be called from several threads.

    Attributes:
        key: Equal for readers that make the same of the same media.
        kinds: Of what it reads.
        token_ids: By kind, what stands for a piece.
        transcribing: How the model is asked to transcribe; None if there is no telling.
    """

    key: str
    kinds: Sequence[Kind]
    token_ids: Mapping[Kind, int]
    transcribing: Transcribing | None

    def read(self, sources: Sources, write: Write, encode: Callable[[str], list[int]], most_tokens: int) -> ReadPrompt:
        """Reads what is in a prompt beside text, and lets it be written with the tokens that stand for that.

        Args:
            sources: Of kinds that it reads.
            write: Writes the prompt.
            encode: Token ids of a piece of text; the reader gives `write` one that knows of media.
            most_tokens: That may stand for media. What comes after so many is not looked at.

        Raises:
            ContextLengthExceededError: They come to more.
            InvalidRequestError: One is not what it should be, or there are more or fewer marks than of them.
        """
        ...
