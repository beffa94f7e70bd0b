"""Prompts as token ids: texts, pairs of them, conversations, media. Runs on the caller or a thread of its."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import threading
from collections.abc import AsyncIterable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar, cast

import anyio
import anyio.to_thread
import numpy as np
from anyio.lowlevel import RunVar

from asyncengine.errors import ContextLengthExceededError, InvalidRequestError
from asyncengine.instructions import AlignmentQuestion, PromptQuestion
from asyncengine.loop.media_parts import take_media
from asyncengine.loop.pairs import Pair, TextPair
from asyncengine.loop.token_ids import encode_piece, token_ids_of, tokenizer_of, typed
from asyncengine.media import (
    KINDS,
    PLURALS,
    UNENCODED,
    AudioPrompt,
    ImagePrompt,
    Kind,
    PromptMedia,
    Sources,
    VideoPrompt,
    Write,
)
from asyncengine.source import SourcePrompt, SourceReader
from asyncengine.step.batch import Int32
from asyncengine.step.model import ModelView
from asyncengine.tokenizer import Message, PairingTokenizer, Tokenizer, WritingTokenizer
from asyncengine.transcription import AlignmentPrompt, Transcribing, TranscriptionPrompt
from asyncengine.waiting import run_until

T = TypeVar("T")

TextPrompt = str | Iterable[int]

MediaPrompt = ImagePrompt | AudioPrompt | VideoPrompt

Prompt = TextPrompt | MediaPrompt | SourcePrompt

Piece = str | int | Iterable[int]

StreamedPrompt = AsyncIterable[Piece]
"""A prompt that comes in pieces: text, or token ids, one or several at a time."""

_READERS = min(4, os.cpu_count() or 1)
"""Threads that read images, audio or videos at once, for each event loop."""
_readers: RunVar[anyio.CapacityLimiter] = RunVar("asyncengine_media_readers")
_INLINE_CHARACTERS = 1024
"""Shorter texts are encoded on the loop: that takes less time than handing them to a thread."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages that become a prompt through the model's chat template."""

    messages: Sequence[Message]
    template_arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PromptedText:
    """A text to embed, behind what the model's checkpoint puts in front of texts for that purpose.

    Attributes:
        name: Of the purpose.
    """

    text: str
    name: str

    def written(self, view: ModelView) -> str:
        """Both.

        Raises:
            InvalidRequestError: The checkpoint does not know the purpose.
        """
        prompts = view.embedding_prompts
        if self.name not in prompts:
            known = ", ".join(map(repr, prompts)) if prompts else f"{view.config.model!r} has none"
            raise InvalidRequestError(f"prompt_name is {self.name!r:.80}; allowed: {known}")
        return prompts[self.name] + self.text


@dataclass(frozen=True, slots=True)
class Cut:
    """A prompt whose end is left out if it is too long; of a pair, that of the second text.

    Attributes:
        most: How many tokens there may be, special ones included; -1 means as many as the model takes.
    """

    prompt: TextPrompt | PromptedText | Pair | TextPair
    most: int

    def within(self, view: ModelView) -> int:
        """How many tokens there may be.

        Raises:
            InvalidRequestError: The model does not take so many.
        """
        if self.most > view.max_prompt_tokens:
            raise InvalidRequestError(
                f"truncate_prompt_tokens is {self.most}; allowed: -1 and 1..{view.max_prompt_tokens} "
                f"({view.limits_text})"
            )
        return view.max_prompt_tokens if self.most < 0 else self.most


AnyPrompt = Prompt | TranscriptionPrompt | AlignmentPrompt | Conversation | PromptedText | Pair | TextPair | Cut
"""Whatever becomes token ids at once."""


class Encoded(NamedTuple):
    """A prompt as the model takes it.

    Attributes:
        ids: (tokens,) token ids.
        media: Images, audio and videos in it.
        second: Where the second of two texts begins, if it is of two.
        question: What is wanted to know of it besides.
    """

    ids: Int32
    media: PromptMedia | None = None
    second: int | None = None
    question: PromptQuestion | AlignmentQuestion | None = None


async def encode(prompt: AnyPrompt | StreamedPrompt, view: ModelView) -> Encoded:
    """Token ids of a prompt. Long texts and media are read on a worker thread; cancelling does not stop that.

    Raises:
        InvalidRequestError: Not text, token ids in the vocabulary, messages that the chat template takes, or images,
            audio or videos that the model does; or empty.
    """
    if view.source_reader is not None:
        return await _read_source(prompt, view, view.source_reader)
    if isinstance(prompt, SourcePrompt):
        raise InvalidRequestError(
            f"the prompt is a SourcePrompt; {view.config.model!r} does not write one text of another: pass a string"
        )
    most = None
    if isinstance(prompt, Cut):
        most, prompt = prompt.within(view), prompt.prompt
    if isinstance(prompt, PromptedText):
        prompt = prompt.written(view)
    if isinstance(prompt, Conversation):
        return await _encode_chat(prompt, view)
    elif isinstance(prompt, MediaPrompt):
        sources, text = prompt.sources, prompt.text
        model = tokenizer_of(view, f"{_named(sources)} need one")
        return await _read_media(sources, view, lambda encode: encode(text), model.encode)
    elif isinstance(prompt, TranscriptionPrompt):
        return await _encode_transcription(prompt, view)
    elif isinstance(prompt, AlignmentPrompt):
        return await _encode_alignment(prompt, view)
    elif isinstance(prompt, (Pair, TextPair)):
        if prompt.size <= _INLINE_CHARACTERS and (view.takes_pairs or prompt.has_template):
            return typed(lambda: _encode_pair(prompt, view, most))
        return await in_thread(lambda: _encode_pair(prompt, view, most))
    elif isinstance(prompt, str):
        text = prompt
        if not text:
            raise InvalidRequestError("the prompt is ''; allowed: at least one token")
        model = tokenizer_of(view, "pass the prompt as token ids")
        if len(text) <= _INLINE_CHARACTERS:
            ids = typed(lambda: _encode_text(text, model, most))
        else:
            return Encoded(await in_thread(lambda: token_ids_of(_encode_text(text, model, most), view)))
    elif isinstance(prompt, AsyncIterable) and not isinstance(prompt, Iterable):
        raise InvalidRequestError("the prompt is an async iterator; add_request, stream and generate take one")
    elif isinstance(prompt, (bytes, bytearray, Mapping)) or not isinstance(prompt, Iterable):
        raise InvalidRequestError(f"the prompt is {prompt!r:.80}; expected a string or token ids")
    else:
        ids = prompt if most is None else list(prompt)[:most]  # type: ignore[assignment]
    return Encoded(token_ids_of(ids, view))


async def _read_source(prompt: AnyPrompt | StreamedPrompt, view: ModelView, reader: SourceReader) -> Encoded:
    """A prompt whose decoder attends to its source beside its own tokens: a plain one is the source."""
    if isinstance(prompt, MediaPrompt):
        check_media([kind for kind, own in prompt.sources.items() if own], view)
    if isinstance(prompt, TranscriptionPrompt):
        transcribing_of(view)
    if not isinstance(prompt, SourcePrompt):
        if not isinstance(prompt, Iterable) or isinstance(prompt, (bytes, bytearray, Mapping)):
            what = "a conversation" if isinstance(prompt, Conversation) else f"{prompt!r:.80}"
            raise InvalidRequestError(
                f"the prompt is {what}; {view.config.model!r} writes one text of another and takes that alone: a "
                "string, token ids or a SourcePrompt"
            )
        prompt = SourcePrompt(prompt)
    asked = prompt

    def read() -> Encoded:
        found = reader.read(asked)
        return Encoded(token_ids_of(found.token_ids, view), found.media)

    return typed(read) if asked.size <= _INLINE_CHARACTERS else await in_thread(read)


def _encode_text(text: str, tokenizer: Tokenizer, most: int | None) -> list[int]:
    if most is None:
        return tokenizer.encode(text)
    if not hasattr(tokenizer, "encode_texts"):
        return tokenizer.encode(text)[:most]
    return _within(most, cast("PairingTokenizer", tokenizer).encode_texts([text], most)[0])


def _within(most: int | None, ids: list[int]) -> list[int]:
    """Token ids of a prompt that was cut; raises ContextLengthExceededError if there are still too many."""
    if most is not None and len(ids) > most:
        raise ContextLengthExceededError(
            f"the prompt is to be cut to {most} tokens, and without its last text it has {len(ids)}"
        )
    return ids


def _encode_pair(pair: Pair | TextPair, view: ModelView, most: int | None) -> Encoded:
    ids, second = pair.encoded(view, most)
    return Encoded(token_ids_of(_within(most, ids), view), second=second)


async def _encode_chat(conversation: Conversation, view: ModelView) -> Encoded:
    _check_messages(conversation.messages, view)
    model = tokenizer_of(view, "messages need a tokenizer")
    arguments = conversation.template_arguments
    messages, sources = take_media(conversation.messages)
    if not sources:
        return Encoded(await in_thread(lambda: token_ids_of(model.encode_chat(messages, arguments), view)))
    if not hasattr(model, "encode_chat_by"):
        raise InvalidRequestError(
            f"the messages have {_named(sources)}; the tokenizer has no encode_chat_by, which they need"
        )
    writing = cast("WritingTokenizer", model)
    return await _read_media(
        sources, view, lambda encode: writing.encode_chat_by(messages, arguments, encode), writing.encode_piece
    )


async def _encode_transcription(prompt: TranscriptionPrompt, view: ModelView) -> Encoded:
    transcribing = transcribing_of(view)
    model = tokenizer_of(view, "transcription needs one")
    encode = functools.partial(encode_piece, model)
    read = await _read_media(prompt.sources, view, lambda encode: encode(transcribing.request(prompt)), encode)
    if not prompt.no_speech or transcribing.no_speech is None:
        return read
    behind, token_id = transcribing.no_speech
    return read._replace(question=PromptQuestion(int(np.flatnonzero(read.ids == behind)[-1]), token_id))


async def _encode_alignment(prompt: AlignmentPrompt, view: ModelView) -> Encoded:
    transcribing, said = transcribing_of(view), prompt.token_ids
    encode = functools.partial(encode_piece, tokenizer_of(view, "transcription needs one"))
    asked = prompt.asked
    read = await _read_media(asked.sources, view, lambda encode: [*encode(transcribing.request(asked)), *said], encode)
    return read._replace(question=AlignmentQuestion(len(read.ids) - len(said), prompt.frames))


def transcribing_of(view: ModelView) -> Transcribing:
    """How the model is asked to transcribe.

    Raises:
        InvalidRequestError: It takes no audio, or there is no telling.
    """
    reader = view.media_reader
    if reader is None or "audio" not in reader.kinds:
        reason = view.no_media.get("audio", UNENCODED["audio"])
        raise InvalidRequestError(f"an audio is to be transcribed; the model takes none: {reason}")
    if reader.transcribing is None:
        raise InvalidRequestError(
            "the model's processor does not say how it is asked to transcribe; ask it in a conversation"
        )
    return reader.transcribing


async def _read_media(sources: Sources, view: ModelView, write: Write, encode: Callable[[str], list[int]]) -> Encoded:
    check_media([kind for kind, own in sources.items() if own], view)
    reader = view.media_reader
    assert reader is not None

    def read() -> Encoded:
        found = reader.read(sources, write, encode, view.max_tokens - 1)
        return Encoded(token_ids_of(found.token_ids, view), found.media)

    return await in_thread(read, media_readers())


def check_media(kinds: Collection[Kind], view: ModelView) -> None:
    """Whether a model takes what there is in a prompt beside its text.

    Raises:
        InvalidRequestError: It does not.
    """
    reader = view.media_reader
    for kind in KINDS:
        if kind in kinds and (reader is None or kind not in reader.kinds):
            reason = view.no_media.get(kind, UNENCODED[kind])
            raise InvalidRequestError(f"the prompt has {PLURALS[kind]}; the model takes none: {reason}")


def _named(sources: Sources) -> str:
    return " and ".join(PLURALS[kind] for kind in KINDS if sources.get(kind))


def media_readers() -> anyio.CapacityLimiter:
    """Lets few media of a loop be read at once, since a large one takes a lot of memory meanwhile."""
    try:
        return _readers.get()
    except LookupError:
        _readers.set(limiter := anyio.CapacityLimiter(_READERS))
        return limiter


async def in_thread(function: Callable[[], T], limiter: anyio.CapacityLimiter | None = None) -> T:
    """As `typed`, on a worker thread. Cancelling lets it end where it asks (`check_awaited`); until then it counts to
    `limiter`.
    """
    left = threading.Event()
    try:
        return await _on_a_worker(lambda: run_until(left, lambda: typed(function)), limiter)
    finally:
        left.set()


async def _on_a_worker(function: Callable[[], T], limiter: anyio.CapacityLimiter | None) -> T:
    if limiter is None:
        return await anyio.to_thread.run_sync(function, abandon_on_cancel=True)
    # anyio would have it count no more once nobody waits: whoever asks and leaves, again and again, would have any
    # number of threads at work.
    loop, borrower, taken = asyncio.get_running_loop(), object(), threading.Lock()  # taken by the thread, once
    await limiter.acquire_on_behalf_of(borrower)

    def work() -> T:
        if not taken.acquire(blocking=False):
            raise RuntimeError("nobody waits for it")
        try:
            return function()
        finally:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(limiter.release_on_behalf_of, borrower)

    try:
        return await anyio.to_thread.run_sync(work, abandon_on_cancel=True, limiter=anyio.CapacityLimiter(1))
    finally:
        if taken.acquire(blocking=False):  # cancelled before the thread came to it
            limiter.release_on_behalf_of(borrower)


def _check_messages(messages: object, view: ModelView) -> None:
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise InvalidRequestError(f"messages is {messages!r:.80}; expected a non-empty list of messages")
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InvalidRequestError(f"messages has {message!r:.80}; expected a mapping with 'role' and 'content'")
        known = message.get("token_ids")
        if known is not None and not isinstance(known, (list, tuple)):
            raise InvalidRequestError(f"messages has token_ids {known!r:.80}; expected a list of token ids")
        for token_id in known or ():
            if type(token_id) is not int or not 0 <= token_id < view.vocab_size:
                raise InvalidRequestError(
                    f"messages has token_ids with {token_id!r:.40}; allowed: 0..{view.vocab_size - 1}"
                )
