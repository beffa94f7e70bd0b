"""`AsyncEngine.transcribe`: an audio in pieces that the model hears at once, and what it says of them as one text."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Protocol

from asyncengine.generation import GenerationConfig
from asyncengine.loop.deadline import in_time
from asyncengine.loop.encoding import AnyPrompt, in_thread, media_readers, transcribing_of
from asyncengine.loop.many import ManyStream
from asyncengine.loop.prepare import RequestOptions, checked_config
from asyncengine.loop.stream import RequestStream
from asyncengine.media import AudioPrompt
from asyncengine.outputs import FinishReason, RequestResult, Transcript, Usage
from asyncengine.step.model import ModelView
from asyncengine.transcription import AudioPiece, LanguageQuestion, Transcribing, TranscriptionPrompt

_WORST = (FinishReason.ABORT, FinishReason.LENGTH, FinishReason.STOP)
"""Why pieces end; a transcript ends as the worst of its own. One with an error has no transcript."""
_Config = Callable[[ModelView], GenerationConfig]


class _Add(Protocol):
    """As `AsyncEngine._add`."""

    def __call__(
        self,
        prompts: Sequence[AnyPrompt],
        configs: Sequence[_Config],
        options: RequestOptions,
        *,
        many: bool = False,
    ) -> Awaitable[list[RequestStream]]:
        """Adds requests, and returns their streams."""
        ...


class _Reloaded(Exception):
    """Another model was loaded meanwhile, which may hear otherwise and write other tokens."""


async def transcribe(
    add: _Add,
    see: Callable[[], Awaitable[ModelView]],
    asked: TranscriptionPrompt,
    config: GenerationConfig | None,
    options: RequestOptions,
    clock: Callable[[], float],
) -> Transcript:
    """What is said in an audio.

    Args:
        add: Adds requests.
        see: What is loaded, once something is.
        asked: Of all of the audio.
        config: How to generate.
        options: Id, priority, deadlines, which have begun, of each request that comes of it.
        clock: Seconds of the deadlines' clock.
    """
    given = checked_config(config)
    while True:
        try:
            transcribing = transcribing_of(await in_time(see(), options.deadlines, clock()))
            return await _transcribed(add, transcribing, asked, given, options, clock)
        except _Reloaded:
            continue


async def _transcribed(
    add: _Add,
    transcribing: Transcribing,
    asked: TranscriptionPrompt,
    given: GenerationConfig,
    options: RequestOptions,
    clock: Callable[[], float],
) -> Transcript:
    """The same by one model, from the first question to the last piece.

    Raises:
        _Reloaded: It has gone before all was asked.
    """

    def here(config: GenerationConfig) -> _Config:
        def of(view: ModelView) -> GenerationConfig:
            if transcribing_of(view) is not transcribing:
                raise _Reloaded
            return config

        return of

    async def cut() -> Sequence[AudioPiece]:
        # A wrong language need not wait for the audio. A hint may be long.
        await in_thread(functools.partial(transcribing.request, asked))
        return await in_thread(lambda: list(transcribing.pieces(asked.audio)), media_readers())

    pieces = await in_time(cut(), options.deadlines, clock())
    question, before = transcribing.question, []
    if question is not None and asked.language is None:
        before = [await _answer(add, question, pieces[0], here, options)]
        if not before[0].token_ids:  # it was aborted
            return Transcript("", before[0].usage, before[0].finish_reason)
        asked = replace(asked, language=question.languages[before[0].token_ids[0]])
    elif asked.language is not None:
        asked = replace(asked, language=transcribing.code(asked.language))
    prompts = [replace(asked, audio=piece.audio) for piece in pieces]
    pieces = [replace(piece, audio=None) for piece in pieces]
    results = await _results(add, prompts, here(transcribing.settings(given, asked)), options)
    return await in_thread(lambda: _joined(transcribing, asked, pieces, before, results))


async def _answer(
    add: _Add,
    question: LanguageQuestion,
    piece: AudioPiece,
    here: Callable[[GenerationConfig], _Config],
    options: RequestOptions,
) -> RequestResult:
    """Which language is spoken. What was computed of the audio for it is in the prefix cache afterwards."""
    config = GenerationConfig(temperature=0.0, max_tokens=1, allowed_token_ids=question.languages, detokenize=False)
    prompt = AudioPrompt(question.text, [piece.audio])
    [stream] = await add([prompt], [here(config)], replace(options, request_id=None))
    return await stream


async def _results(
    add: _Add, prompts: list[TranscriptionPrompt], config: _Config, options: RequestOptions
) -> list[RequestResult]:
    """What is said in each piece. The first that fails ends the others: nobody would hear of them.

    The list of prompts is empty afterwards: once they are read, nobody needs the samples, which may be many.
    """
    if len(prompts) == 1:
        [stream] = await add(prompts, [config], options)
        prompts.clear()
        return [await stream]
    async with ManyStream(lambda: add(prompts, [config] * len(prompts), options, many=True)) as many:
        prompts.clear()
        async for index, _ in many:
            if (error := many.streams[index].error) is not None:
                raise error
        return await many


def _joined(
    transcribing: Transcribing,
    asked: TranscriptionPrompt,
    pieces: Sequence[AudioPiece],
    before: Sequence[RequestResult],
    results: Sequence[RequestResult],
) -> Transcript:
    texts, segments = [], []
    for piece, result in zip(pieces, results, strict=True):
        text, stop = transcribing.text(result.token_ids), result.outputs[0].stop_reason
        if text is None:
            text = result.text
        elif isinstance(stop, str):  # the text of a request ends before it, its tokens behind
            text = text.partition(stop)[0]
        texts.append(text)
        if asked.timestamps:
            of_tokens = result.outputs[0].logprobs
            logprobs = None if of_tokens is None else [each.logprob for each in of_tokens if each is not None]
            segments += transcribing.segments(result.token_ids, logprobs, piece)
    reasons = {result.finish_reason for result in results}
    return Transcript(
        "".join(texts).strip(),
        _together([result.usage for result in (*before, *results)]),
        next(reason for reason in _WORST if reason in reasons),
        asked.language,
        tuple(segments),
        pieces[-1].end,
    )


def _together(usages: Sequence[Usage]) -> Usage:
    """What several requests cost."""
    if len(usages) == 1:
        return usages[0]
    counts = ("prompt_tokens", "completion_tokens", "cached_tokens", "audio_tokens", "preemptions",
              "draft_tokens", "accepted_draft_tokens")  # fmt: skip
    firsts = [usage.first_token_seconds for usage in usages if usage.first_token_seconds is not None]
    return Usage(
        **{name: sum(getattr(usage, name) for usage in usages) for name in counts},
        queue_seconds=max(usage.queue_seconds for usage in usages),
        first_token_seconds=max(firsts, default=None),
        total_seconds=max(usage.total_seconds for usage in usages),
    )
