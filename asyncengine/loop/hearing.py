"""A transcript by one model: an audio in pieces that it hears side by side. Owned by the loop on which it runs."""

from __future__ import annotations

import asyncio
import functools
import itertools
import math
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from statistics import fmean
from typing import NamedTuple, TypeVarTuple, Unpack

import anyio
from anyio.abc import TaskGroup

from asyncengine.fallback import Verdict, compression_ratio
from asyncengine.generation import GenerationConfig
from asyncengine.loop.deadline import in_time
from asyncengine.loop.encoding import in_thread, media_readers, transcribing_of
from asyncengine.loop.in_order import InOrder, Tell
from asyncengine.loop.stream import RequestStream
from asyncengine.loop.transcript_requests import (
    Aborted,
    Asked,
    Configured,
    TranscriptRequests,
    followed,
    together,
)
from asyncengine.media import AudioPrompt
from asyncengine.outputs import FinishReason, Transcript, TranscriptDelta, TranscriptSegment, Usage
from asyncengine.step.model import ModelView
from asyncengine.transcription import (
    Alignment,
    AlignmentPrompt,
    AudioPiece,
    Quality,
    Transcribing,
    TranscriptionPrompt,
)

Given = TypeVarTuple("Given")

_AHEAD = 2
"""Pieces that are read and wait, beside as many as the model hears at the same time."""
_PROMPT_ALONE = GenerationConfig(max_tokens=0, detokenize=False)
_WORST = (FinishReason.ABORT, FinishReason.LENGTH, FinishReason.STOP)
"""Why pieces end; a transcript ends as the worst of its own. One with an error has no transcript."""


class Reloaded(Exception):
    """Another model was loaded meanwhile, which may hear otherwise and write other tokens."""


class _Attempt(NamedTuple):
    """A request for what is said in a piece, and the temperature at which it is drawn, if that is known."""

    stream: RequestStream
    temperature: float | None


class _Written(NamedTuple):
    """What has come of an attempt, its text apart."""

    token_ids: list[int]
    logprobs: list[float] | None
    quality: Quality
    finish_reason: FinishReason

    @property
    def aborted(self) -> bool:
        """Whether there would have been more."""
        return self.finish_reason is FinishReason.ABORT


class Hearing:
    """A transcript by one model, from the first question to the last piece.

    Args:
        requests: Those of the transcript.
        asked: What is wanted.
        clock: Seconds of the deadlines' clock.
        view: The model.
        tell: Told all of it, as it comes, in its order. None: nobody is.
    """

    def __init__(
        self, requests: TranscriptRequests, asked: Asked, clock: Callable[[], float], view: ModelView, tell: Tell | None
    ) -> None:
        self._requests, self._asked, self._clock = requests, asked, clock
        self._transcribing: Transcribing = transcribing_of(view)
        assert view.config.max_num_sequence is not None
        self._room = asyncio.Semaphore(view.config.max_num_sequence + _AHEAD)
        self._tell, self._told = tell, InOrder(self._give_out)
        self._usages: list[tuple[int, Usage]] = []  # and of which piece
        self._reasons: set[FinishReason] = set()
        self._prompt = self._asked.prompt
        self._pieces: Iterator[AudioPiece] = iter(())
        self._several = False
        self._seconds: float | None = None
        self._failure: Exception | None = None

    async def transcript(self) -> Transcript:
        """All of it.

        Raises:
            Reloaded: The model has gone before all was asked, and nothing was given out.
        """
        pieces = await in_time(self._cut(), self._asked.options.deadlines, self._clock())
        begun, self._several = self._clock(), pieces[1] is not None
        if not await self._know_language(pieces[0]):
            return Transcript("", self._usage(begun), FinishReason.ABORT)
        await self._hear_all(pieces)
        reasons = self._reasons or {FinishReason.ABORT}
        return Transcript(
            self._told.text,
            self._usage(begun),
            next(reason for reason in _WORST if reason in reasons),
            self._prompt.language,
            tuple(self._told.segments),
            self._seconds,
        )

    async def _cut(self) -> deque[AudioPiece | None]:
        """The first two pieces."""
        # A wrong language need not wait for the audio. A hint may be long.
        await in_thread(functools.partial(self._transcribing.request, self._prompt))
        audio, self._prompt = self._prompt.audio, replace(self._prompt, audio=None)
        self._pieces = await in_thread(lambda: iter(self._transcribing.pieces(audio)), media_readers())
        return deque([await self._next(), await self._next()])

    async def _next(self) -> AudioPiece | None:
        """One piece further, if there is one."""
        piece = await in_thread(lambda: next(self._pieces, None), media_readers())
        if piece is not None:
            self._seconds = piece.end
        return piece

    async def _know_language(self, piece: AudioPiece | None) -> bool:
        """Asks for the language, if it must be told and nobody has said it; False if that was aborted.

        What was computed of the audio for it is in the prefix cache afterwards.
        """
        question, told = self._transcribing.question, self._prompt.language
        if told is not None:
            self._prompt = replace(self._prompt, language=self._transcribing.code(told))
        if told is not None or question is None:
            return True
        assert piece is not None
        config = GenerationConfig(temperature=0.0, max_tokens=1, allowed_token_ids=question.languages, detokenize=False)
        options = replace(self._asked.options, request_id=None)
        asked = AudioPrompt(question.text, [piece.audio])
        try:
            stream = await self._requests.add(asked, self._here(config), options)
        except Aborted:
            return False
        result = await self._requests.result(stream, lambda *_: None)
        self._usages.append((-1, result.usage))
        if result.token_ids:
            self._prompt = replace(self._prompt, language=question.languages[result.token_ids[0]])
        return bool(result.token_ids)

    def _here(self, config: GenerationConfig) -> Configured:
        def of(view: ModelView) -> GenerationConfig:
            if transcribing_of(view) is not self._transcribing:
                raise Reloaded
            return config

        return of

    async def _hear_all(self, pieces: deque[AudioPiece | None]) -> None:
        """Hears pieces while there is room for their requests: no more are read than a few beside those that run.

        The first that fails ends the others: nobody would hear of them.
        """
        async with anyio.create_task_group() as group:
            await self._noting_failure(group, self._begin_all, pieces, group)
        if self._failure is not None:
            raise self._failure

    async def _noting_failure(
        self, group: TaskGroup, work: Callable[[Unpack[Given]], Awaitable[None]], *given: *Given
    ) -> None:
        """Does work of a group, which ends if that fails. A group that raised it would raise several at once, and might
        take them to be more than that somebody cancelled all.
        """
        try:
            await work(*given)
        except Exception as error:
            self._failure = self._failure or error
            group.cancel_scope.cancel()

    async def _begin_all(self, pieces: deque[AudioPiece | None], group: TaskGroup) -> None:
        """Gives the model all pieces in their order, the first of them at hand; none behind one that was aborted."""
        for index in itertools.count():
            await self._room.acquire()
            if FinishReason.ABORT in self._reasons:
                return
            if (piece := pieces.popleft() if pieces else await self._next()) is None:
                return
            prompt = replace(self._prompt, audio=piece.audio)
            piece = replace(piece, audio=None)
            if (attempt := await self._attempt(index, prompt)) is None:
                return
            # Nobody else needs the samples, which may be many, unless they are heard again.
            again = prompt if self._asked.fallback is not None or prompt.words else None
            del prompt
            group.start_soon(self._noting_failure, group, self._hear, index, piece, attempt, again)
            del piece, attempt, again

    def _give_out(self, delta: TranscriptDelta) -> None:
        """Tells it, unless all has failed: who was woken before that comes to its next await, and would tell what is
        told once more where all begins anew.
        """
        if self._tell is not None and self._failure is None:
            self._tell(delta)

    async def _attempt(
        self, index: int, prompt: TranscriptionPrompt, temperature: float | None = None
    ) -> _Attempt | None:
        """Asks for what is said in a piece, at the first temperature or at one further on. None where the transcript
        ends: it was aborted, or another model has come when some of it was given out.
        """
        config, fallback = self._asked.config, self._asked.fallback
        if fallback is not None:
            warmth = fallback.temperatures[0] if temperature is None else temperature
            config = (config.without_search() if warmth else config).replace(temperature=warmth, logprobs=True)
        config = self._transcribing.settings(config, prompt)
        stream = await self._request(index, prompt, config, bool(index or temperature is not None))
        return None if stream is None else _Attempt(stream, config.temperature)

    async def _request(
        self, index: int, prompt: TranscriptionPrompt | AlignmentPrompt, config: GenerationConfig, further: bool
    ) -> RequestStream | None:
        """A request of a piece; None as `_attempt` says.

        Args:
            index: Of the piece.
            prompt: What is asked of it.
            config: How to generate.
            further: Whether it is not the transcript's first.
        """
        options = self._asked.options
        if self._several and options.request_id is not None:
            options = options.named(f"{options.request_id}-{index}")
        if not self._requests.aborted:  # as it may be while nothing of it runs
            try:
                return await self._requests.add(prompt, self._here(config), followed(options) if further else options)
            except Aborted:
                pass
            except Reloaded:
                if self._tell is None or not self._told.begun:
                    raise
        self._reasons.add(FinishReason.ABORT)
        return None

    async def _hear(self, index: int, piece: AudioPiece, attempt: _Attempt, prompt: TranscriptionPrompt | None) -> None:
        """Reads what the model writes down of a piece, and tells it.

        Args:
            index: Of the piece.
            piece: It, without its samples.
            attempt: What is written down first.
            prompt: Asks for it once more; None where nobody does. Without fallback, what is written down is taken as it
                is, and told at once.
        """
        fallback, text = self._asked.fallback, list[str]()
        verdict = Verdict.GOOD
        if fallback is None or prompt is None:
            written = await self._written(attempt, index, piece, functools.partial(self._told.add, index))
        else:
            further = deque(fallback.temperatures[1:])
            while True:
                written = await self._written(attempt, index, piece, text.append)
                verdict = fallback.verdict(written.quality)
                if verdict is not Verdict.DOUBTED or not further or written.aborted:
                    break
                if (another := await self._attempt(index, prompt, further.popleft())) is None:
                    break
                attempt = another
                text.clear()
        self._reasons.add(written.finish_reason)
        silent = verdict is Verdict.SILENCE
        self._told.add(index, "" if silent else "".join(text))
        self._told.end(index, () if silent else await self._segments(index, piece, prompt, written))
        self._room.release()

    async def _written(self, attempt: _Attempt, index: int, piece: AudioPiece, tell: Callable[[str], None]) -> _Written:
        """What is written down of a piece by one request, whose text is told as it comes."""
        stop_strs, stream = self._asked.config.stop_strs, attempt.stream
        assert isinstance(stop_strs, tuple)
        reader, texts = self._transcribing.reader(stop_strs), list[str]()

        def read(text: str, token_ids: Sequence[int]) -> None:
            if new := reader.push(text, token_ids):
                texts.append(new)
                tell(new)

        result = await self._requests.result(stream, read)
        self._usages.append((index, result.usage))
        branch = result.outputs[0]
        listed = None if branch.logprobs is None else [each.logprob for each in branch.logprobs]

        def finished() -> tuple[str, Quality]:
            rest = reader.flush()
            silent = stream.prompt_logprobs
            quality = Quality(
                fmean(listed) if listed else None,
                compression_ratio(("".join(texts) + rest).strip()),
                math.exp(silent[0].logprob) if silent and silent[0] is not None else None,
                attempt.temperature,
            )
            return rest, quality

        rest, quality = await in_thread(finished)
        tell(rest)
        return _Written(result.token_ids, listed, quality, branch.finish_reason)

    async def _segments(
        self, index: int, piece: AudioPiece, prompt: TranscriptionPrompt | None, written: _Written
    ) -> list[TranscriptSegment]:
        """Those of what was written down of a piece, if they were asked for."""
        if not self._prompt.timestamps:
            return []
        alignment = None
        if prompt is not None and prompt.words and not written.aborted:
            alignment = await self._alignment(index, piece, prompt, written.token_ids)
        segments = functools.partial(
            self._transcribing.segments, written.token_ids, written.logprobs, piece, written.quality, alignment
        )
        return await in_thread(segments)

    async def _alignment(
        self, index: int, piece: AudioPiece, prompt: TranscriptionPrompt, token_ids: list[int]
    ) -> Alignment | None:
        """When the tokens of a piece are said: by a request more, which generates nothing. None where the transcript
        ends, as of `_attempt`, or the request was aborted.
        """
        language = "en" if prompt.task == "translate" else prompt.language
        tokens, frames = self._transcribing.to_align(token_ids, piece)
        if not tokens:
            return Alignment((), language)
        asked = AlignmentPrompt(prompt, tuple(token_ids[:tokens]), frames)
        stream = await self._request(index, asked, _PROMPT_ALONE, further=True)
        if stream is None:
            return None
        result = await self._requests.result(stream, lambda *_: None)
        self._usages.append((index, result.usage))
        if stream.attention is None:
            self._reasons.add(FinishReason.ABORT)
            return None
        return Alignment(stream.attention, language)

    def _usage(self, begun: float) -> Usage:
        """What all requests cost together."""
        usages = [usage for _, usage in sorted(self._usages, key=lambda each: each[0])]
        return together(usages, self._clock() - begun)
