"""`AsyncEngine.transcribe`: an audio in pieces that the model hears at once, and what it says of them as one text."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Protocol, TypeVar

import anyio.to_thread

from asyncengine.generation import GenerationConfig
from asyncengine.loop.deadline import in_time
from asyncengine.loop.encoding import AnyPrompt, transcribing_of
from asyncengine.loop.many import ManyStream
from asyncengine.loop.prepare import RequestOptions, checked_config
from asyncengine.loop.stream import RequestStream
from asyncengine.loop.token_ids import typed
from asyncengine.media import AudioPrompt
from asyncengine.outputs import FinishReason, RequestResult, Transcript, Usage
from asyncengine.step.model import ModelView
from asyncengine.transcription import AudioPiece, LanguageQuestion, Transcribing, TranscriptionPrompt

T = TypeVar("T")


class _Add(Protocol):
    """As `AsyncEngine._add`."""

    def __call__(
        self,
        prompts: Sequence[AnyPrompt],
        configs: Sequence[Callable[[ModelView], GenerationConfig]],
        options: RequestOptions,
        *,
        many: bool = False,
    ) -> Awaitable[list[RequestStream]]:
        """Adds requests, and returns their streams."""
        ...


async def transcribe(
    add: _Add,
    view: ModelView,
    asked: TranscriptionPrompt,
    config: GenerationConfig | None,
    options: RequestOptions,
    clock: Callable[[], float],
) -> Transcript:
    """What is said in an audio.

    Args:
        add: Adds requests.
        view: What is loaded.
        asked: Of all of the audio.
        config: How to generate.
        options: Id, priority, deadlines, which have begun, of each request that comes of it.
        clock: Seconds of the deadlines' clock.
    """
    given, transcribing = checked_config(config), transcribing_of(view)
    typed(functools.partial(transcribing.request, asked))  # a wrong language need not wait for the audio
    cutting = _in_thread(lambda: list(transcribing.pieces(asked.audio)))
    pieces = await in_time(cutting, options.deadlines, clock())
    question, before = transcribing.question, []
    if question is not None and asked.language is None:
        before = [await _answer(add, question, pieces[0], options)]
        if not before[0].token_ids:  # it was aborted
            return Transcript("", before[0].usage, before[0].finish_reason)
        asked = replace(asked, language=question.languages[before[0].token_ids[0]])
    elif asked.language is not None:
        asked = replace(asked, language=transcribing.code(asked.language))

    def settings(view: ModelView) -> GenerationConfig:
        nonlocal transcribing
        transcribing = transcribing_of(view)  # of who hears it, whatever was loaded meanwhile
        return transcribing.settings(given, asked)

    prompts = [replace(asked, audio=piece.audio) for piece in pieces]
    if len(prompts) == 1:
        results = [await (await add(prompts, [settings], options))[0]]
    else:
        results = await ManyStream(lambda: add(prompts, [settings] * len(prompts), options, many=True))
    return await _in_thread(lambda: _joined(transcribing, asked, pieces, before, results))


async def _answer(add: _Add, question: LanguageQuestion, piece: AudioPiece, options: RequestOptions) -> RequestResult:
    """Which language is spoken. What was computed of the audio for it is in the prefix cache afterwards."""
    config = GenerationConfig(temperature=0.0, max_tokens=1, allowed_token_ids=question.languages, detokenize=False)
    prompt = AudioPrompt(question.text, [piece.audio])
    [stream] = await add([prompt], [lambda view: config], replace(options, request_id=None))
    return await stream


def _joined(
    transcribing: Transcribing,
    asked: TranscriptionPrompt,
    pieces: Sequence[AudioPiece],
    before: Sequence[RequestResult],
    results: Sequence[RequestResult],
) -> Transcript:
    texts, segments = [], []
    for piece, result in zip(pieces, results, strict=True):
        text = transcribing.text(result.token_ids)
        texts.append(result.text if text is None else text)
        if asked.timestamps:
            of_tokens = result.outputs[0].logprobs
            logprobs = None if of_tokens is None else [each.logprob for each in of_tokens if each is not None]
            segments += transcribing.segments(result.token_ids, logprobs, piece)
    reasons = [result.finish_reason for result in results]
    cut_off = [reason for reason in reasons if reason is not FinishReason.STOP]
    return Transcript(
        "".join(texts).strip(),
        _together([result.usage for result in (*before, *results)]),
        (cut_off or reasons)[0],
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


async def _in_thread(function: Callable[[], T]) -> T:
    return await anyio.to_thread.run_sync(lambda: typed(function), abandon_on_cancel=True)
