"""Transcribing: how a model is asked for what is said in an audio, and how its answer is read. Values; no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from asyncengine.errors import InvalidRequestError
from asyncengine.generation import GenerationConfig
from asyncengine.outputs import TranscriptSegment

if TYPE_CHECKING:
    from asyncengine.media import AudioSource, Sources

TranscriptionTask = Literal["transcribe", "translate"]


@dataclass(frozen=True, slots=True)
class TranscriptionPrompt:
    """Asks for what is said in an audio, in the words that a model was trained to be asked in.

    Attributes:
        audio: It.
        language: That is spoken, by its code or name; None leaves it to the model.
        hint: What it is about, words that are in it; what that does is the model's.
        task: Whether it is to be written down, or translated into English.
        timestamps: Whether the model is to say when each part of it is said.
    """

    audio: AudioSource
    language: str | None = None
    hint: str | None = None
    task: TranscriptionTask = "transcribe"
    timestamps: bool = False

    def __post_init__(self) -> None:
        for name, value in (("language", self.language), ("hint", self.hint)):
            if value is not None and not isinstance(value, str):
                raise InvalidRequestError(f"{name} is {value!r:.80}; expected text or None")
        if self.task not in ("transcribe", "translate"):
            raise InvalidRequestError(f"task is {self.task!r:.80}; allowed: 'transcribe', 'translate'")
        if not isinstance(self.timestamps, bool):
            raise InvalidRequestError(f"timestamps is {self.timestamps!r:.80}; expected True or False")

    @property
    def sources(self) -> Sources:
        """What is in it beside text."""
        return {"audio": [self.audio]}


@dataclass(frozen=True, slots=True)
class AudioPiece:
    """A part of an audio that a model hears at once.

    Attributes:
        audio: It.
        start: Seconds of the audio before it.
        end: Seconds up to its end; None if nobody has counted them.
    """

    audio: AudioSource
    start: float = 0.0
    end: float | None = None


@dataclass(frozen=True, slots=True)
class LanguageQuestion:
    """What a model is asked to find out which language is spoken: the likeliest of some tokens is the answer.

    Attributes:
        text: Stands behind the audio.
        languages: By token, codes of languages.
    """

    text: str
    languages: Mapping[int, str] = field(default_factory=dict)


class Transcribing(Protocol):
    """How one model is asked to transcribe. May be called from several threads.

    Attributes:
        question: What finds out which language is spoken, for models that must be told; None for others.
    """

    question: LanguageQuestion | None

    def pieces(self, audio: AudioSource) -> Sequence[AudioPiece]:
        """Cuts an audio into parts that the model hears at once.

        Raises:
            InvalidRequestError: It is no audio.
        """
        ...

    def request(self, asked: TranscriptionPrompt) -> str:
        """The text of a prompt for one piece.

        Raises:
            InvalidRequestError: The model is not told any language, or no such, or no hints; it does not translate, or
                knows no times.
        """
        ...

    def code(self, language: str) -> str:
        """What a language is called that `request` takes, as far as the model tells names and codes apart."""
        ...

    def settings(self, config: GenerationConfig, asked: TranscriptionPrompt) -> GenerationConfig:
        """How it is generated, with the rules that the model was trained to be held to."""
        ...

    def text(self, token_ids: Sequence[int]) -> str | None:
        """What is said in the audio, of what the model has answered; None if that is its text as it is."""
        ...

    def segments(
        self, token_ids: Sequence[int], logprobs: Sequence[float] | None, piece: AudioPiece
    ) -> list[TranscriptSegment]:
        """The same with times, if it was asked for them.

        Args:
            token_ids: What the model has answered.
            logprobs: Log-probabilities of these; None if they were not asked for.
            piece: What it has heard.
        """
        ...


class WholeTranscription:
    """What is the same in models that hear an audio whole, need not be told its language and know no times."""

    question: LanguageQuestion | None = None

    def pieces(self, audio: Any) -> Sequence[AudioPiece]:
        """As `Transcribing`: the audio."""
        return [AudioPiece(audio)]

    def code(self, language: str) -> str:
        """As `Transcribing`: as it is."""
        return language

    def settings(self, config: GenerationConfig, asked: TranscriptionPrompt) -> GenerationConfig:
        """As `Transcribing`: as it is."""
        return config

    def segments(
        self, token_ids: Sequence[int], logprobs: Sequence[float] | None, piece: AudioPiece
    ) -> list[TranscriptSegment]:
        """As `Transcribing`: none."""
        return []

    @staticmethod
    def check(asked: TranscriptionPrompt) -> None:
        """Refuses what such models cannot do.

        Raises:
            InvalidRequestError: As it says.
        """
        if asked.task != "transcribe":
            raise InvalidRequestError(f"task is {asked.task!r}; the model only transcribes")
        if asked.timestamps:
            raise InvalidRequestError("timestamps is True; the model knows no times")
