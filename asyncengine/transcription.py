"""Transcribing: how a model is asked for what is said in an audio, and how its answer is read. Values; no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from asyncengine.errors import InvalidRequestError
from asyncengine.generation import GenerationConfig
from asyncengine.outputs import TranscriptSegment

if TYPE_CHECKING:
    from asyncengine.media import AudioSource, Sources
    from asyncengine.step.batch import Float32

TranscriptionTask = Literal["transcribe", "translate"]

Timestamps = bool | Literal["word"]
"""Whether a transcript has segments with times, and these words with theirs."""


@dataclass(frozen=True, slots=True)
class TranscriptionPrompt:
    """Asks for what is said in an audio, in the words that a model was trained to be asked in.

    Attributes:
        audio: It.
        language: That is spoken, by its code or name; None leaves it to the model.
        hint: What it is about, words that are in it; what that does is the model's.
        task: Whether it is to be written down, or translated into English.
        timestamps: Whether the model is to say when each part of it is said; ``"word"``: and it is found out of each
            word.
        no_speech: Whether it is wanted to know how likely the model finds it that nothing is said.
    """

    audio: AudioSource
    language: str | None = None
    hint: str | None = None
    task: TranscriptionTask = "transcribe"
    timestamps: Timestamps = False
    no_speech: bool = False

    def __post_init__(self) -> None:
        for name, value in (("language", self.language), ("hint", self.hint)):
            if value is not None and not isinstance(value, str):
                raise InvalidRequestError(f"{name} is {value!r:.80}; expected text or None")
        if self.task not in ("transcribe", "translate"):
            raise InvalidRequestError(f"task is {self.task!r:.80}; allowed: 'transcribe', 'translate'")
        if not isinstance(self.timestamps, bool) and self.timestamps != "word":
            raise InvalidRequestError(f"timestamps is {self.timestamps!r:.80}; allowed: True, False, 'word'")

    @property
    def sources(self) -> Sources:
        """What is in it beside text."""
        return {"audio": [self.audio]}

    @property
    def words(self) -> bool:
        """Whether it is wanted to know when each word is said."""
        return self.timestamps == "word"


@dataclass(frozen=True, slots=True)
class AlignmentPrompt:
    """Asks how much the tokens of an answer attend to what they were said of.

    Attributes:
        asked: What was answered.
        token_ids: What of the answer is looked at, from its beginning.
        frames: How many frames of the audio are.
    """

    asked: TranscriptionPrompt
    token_ids: tuple[int, ...]
    frames: int


@dataclass(frozen=True, slots=True)
class Alignment:
    """What shows when each token of an answer is said.

    Attributes:
        attention: (heads, tokens, frames) each, one behind the other: how much those that were to be looked at
            (`Transcribing.to_align`) attend to what is heard; empty where none were.
        language: Code of the language that is written; None if nobody has said it.
    """

    attention: Sequence[Float32]
    language: str | None


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


@dataclass(frozen=True, slots=True)
class Quality:
    """How far what was written down of a piece can be trusted. Attributes as in `TranscriptSegment`."""

    avg_logprob: float | None = None
    compression_ratio: float | None = None
    no_speech_prob: float | None = None
    temperature: float | None = None


class AnswerReader(Protocol):
    """Reads one answer of a model, as it comes, for what is said in the audio."""

    def push(self, text: str, token_ids: Sequence[int]) -> str:
        """Takes the next of an answer, as `RequestOutput` has it, and returns what of its text is certain now."""
        ...

    def flush(self) -> str:
        """Returns the rest: the answer has ended."""
        ...


class Transcribing(Protocol):
    """How one model is asked to transcribe. May be called from several threads.

    Attributes:
        question: What finds out which language is spoken, for models that must be told; None for others.
        no_speech: The token behind which a model says that nothing is said, and the token by which it would; None if it
            does not.
    """

    question: LanguageQuestion | None
    no_speech: tuple[int, int] | None

    def pieces(self, audio: AudioSource) -> Iterator[AudioPiece]:
        """Cuts an audio into parts that the model hears at once, at least one, each when it is asked for.

        Raises:
            InvalidRequestError: It is no audio, from there on.
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

    def reader(self, stop_strs: tuple[str, ...]) -> AnswerReader:
        """Reads one answer.

        Args:
            stop_strs: What is said ends before the first of them.
        """
        ...

    def to_align(self, token_ids: Sequence[int], piece: AudioPiece) -> tuple[int, int]:
        """How many tokens of an answer, from its beginning, must be looked at to find out when its words are said, and
        how many frames of the audio; no tokens where there are no words.
        """
        ...

    def segments(
        self,
        token_ids: Sequence[int],
        logprobs: Sequence[float] | None,
        piece: AudioPiece,
        quality: Quality,
        alignment: Alignment | None = None,
    ) -> list[TranscriptSegment]:
        """What is said, with times, if it was asked for them.

        Args:
            token_ids: What the model has answered.
            logprobs: Log-probabilities of these; None if they were not asked for.
            piece: What it has heard.
            quality: How far that can be trusted.
            alignment: When each token is said. None leaves the words out.
        """
        ...


class _AsItIs:
    """Reads answers that are what is said."""

    def push(self, text: str, token_ids: Sequence[int]) -> str:
        """As `AnswerReader`."""
        return text

    def flush(self) -> str:
        """As `AnswerReader`."""
        return ""


class _AtItsEnd:
    """Reads answers that are read whole.

    Args:
        read: What is said, of the tokens of an answer; None if that is its text.
    """

    def __init__(self, read: Callable[[Sequence[int]], str | None]) -> None:
        self._read = read
        self._text: list[str] = []
        self._token_ids: list[int] = []

    def push(self, text: str, token_ids: Sequence[int]) -> str:
        """As `AnswerReader`."""
        self._text.append(text)
        self._token_ids += token_ids
        return ""

    def flush(self) -> str:
        """As `AnswerReader`."""
        found = self._read(self._token_ids)
        return "".join(self._text) if found is None else found


class WholeTranscription:
    """What is the same in models that hear an audio whole, need not be told its language and know no times.

    Attributes:
        parses: Whether there is more in an answer than what is said, so that only a whole one can be read.
    """

    question: LanguageQuestion | None = None
    no_speech: tuple[int, int] | None = None
    parses = False

    def pieces(self, audio: Any) -> Iterator[AudioPiece]:
        """As `Transcribing`: the audio."""
        return iter([AudioPiece(audio)])

    def code(self, language: str) -> str:
        """As `Transcribing`: as it is."""
        return language

    def settings(self, config: GenerationConfig, asked: TranscriptionPrompt) -> GenerationConfig:
        """As `Transcribing`: as it is."""
        return config

    def reader(self, stop_strs: tuple[str, ...]) -> AnswerReader:
        """As `Transcribing`."""
        return _AtItsEnd(self.text) if self.parses else _AsItIs()

    def text(self, token_ids: Sequence[int]) -> str | None:
        """What is said in the audio, of all that a model which `parses` has answered; None if that is as it is."""
        return None

    def to_align(self, token_ids: Sequence[int], piece: AudioPiece) -> tuple[int, int]:
        """As `Transcribing`: none."""
        return 0, 0

    def segments(
        self,
        token_ids: Sequence[int],
        logprobs: Sequence[float] | None,
        piece: AudioPiece,
        quality: Quality,
        alignment: Alignment | None = None,
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
            raise InvalidRequestError(f"timestamps is {asked.timestamps!r}; the model knows no times")
