"""`AsyncEngine`: the public face. Lives on event loops; every method gives an instruction and awaits its future."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import secrets
from collections.abc import AsyncIterable, Collection, Iterable, Iterator, Sequence
from typing import Any

import anyio.lowlevel

from asyncengine import instructions as ins
from asyncengine.config import EngineConfig
from asyncengine.errors import InvalidRequestError
from asyncengine.fallback import TranscriptionFallback, check_fallback
from asyncengine.generation import GenerationConfig
from asyncengine.grammar.compiler import GrammarCompiler
from asyncengine.grammar.protocol import Grammar
from asyncengine.instructions import NewRequest, ReplyTo
from asyncengine.loop.deadline import in_time
from asyncengine.loop.embedding import ClassificationOptions, Reading
from asyncengine.loop.encoding import (
    AnyPrompt,
    Conversation,
    Encoded,
    Prompt,
    StreamedPrompt,
    check_media,
    encode,
)
from asyncengine.loop.feed import feed
from asyncengine.loop.many import ManyStream
from asyncengine.loop.observer import Operation, RequestBegun, begin
from asyncengine.loop.pending import PendingStream
from asyncengine.loop.prepare import (
    GENERATION,
    Purpose,
    RequestOptions,
    check_length,
    checked_config,
    compile_grammar,
    grammar_compiler,
    new_branches,
    new_request,
)
from asyncengine.loop.readings import DEFAULTS, Configured, EngineReadings, check_computed, checked_prompts
from asyncengine.loop.router import Inbox
from asyncengine.loop.stream import RequestStream
from asyncengine.loop.transcribing import Transcription
from asyncengine.loop.transcript_requests import Asked
from asyncengine.loop.transcript_stream import TranscriptStream
from asyncengine.media import AudioSource, Kind
from asyncengine.outputs import FinishReason, RequestResult
from asyncengine.step.batch import NO_TOKENS
from asyncengine.step.model import Loader, ModelView
from asyncengine.tokenizer import Message
from asyncengine.transcription import Timestamps, TranscriptionPrompt, TranscriptionTask

_ENCODED_AT_ONCE = 16
"""Prompts of one call that are encoded before others have their turn on the loop."""


class AsyncEngine(EngineReadings):
    """An LLM engine in this process, driven from asyncio.

    ``async with AsyncEngine(EngineConfig("tiny")) as engine`` loads the model and, on leaving, ends whatever is left
    and lets everything go. Without ``async with``, `reload` and `shutdown` do the same.

    An engine belongs to no event loop: it may be used from several, also one after the other. Cancelling any call
    leaves the engine as it is: an instruction that was given is carried out, a request that was being added is
    aborted.

    Args:
        config: What to load on entering ``async with``; an `EngineConfig` or its JSON. None loads nothing.
        loader: How models are loaded; None loads them with transformers. `asyncengine.testing` has another.

    Attributes:
        trace: The event trace; off until ``engine.trace.start()``.
        observer: Told when requests begin and end; None by default. `asyncengine.otel.instrument` sets one.
    """

    def __init__(self, config: EngineConfig | str | None = None, *, loader: Loader | None = None) -> None:
        super().__init__(config, loader)
        self._numbers = itertools.count(1)
        self._grammars: tuple[int, GrammarCompiler] | None = None
        self._transcripts: dict[str, Transcription] = {}

    async def add_request(
        self,
        prompt: Prompt | StreamedPrompt,
        config: GenerationConfig | None = None,
        options: RequestOptions = DEFAULTS,
    ) -> RequestStream:
        """Adds a request and returns its stream once it is admitted.

        Args:
            prompt: Text, or token ids; or an async iterator of pieces of either, computed as they arrive. Then this
                returns once the iterator has ended, or the request has (by a deadline, an abort, an unload).
            config: How to generate; None takes the model's defaults.
            options: Id, priority, deadlines, and what to do when the engine is full.

        Raises:
            BaseException: Whatever an iterator raises; the request is withdrawn.
            InvalidRequestError: The request is wrong; the message says how.
            EngineOverloadedError: The waiting queue is full and ``options.when_full`` is ``"raise"``.
            DeadlineExceededError: One of its deadlines passed before it was admitted.
            ModelNotLoadedError: There is no model, and none is being loaded.
            EngineDrainingError: The engine is draining.
            EngineFailedError: The device is lost.
            EngineClosedError: The engine was shut down.

        Cancelling it withdraws the request.
        """
        if not isinstance(prompt, AsyncIterable) or isinstance(prompt, Iterable):
            return (await self._add([prompt], [config], options))[0]
        view, streams = await self._admit([prompt], [config], options, Purpose(arriving=True))
        await feed(streams[0], prompt, view, self._put_quietly)
        return streams[0]

    def stream(
        self,
        prompt: Prompt | StreamedPrompt,
        config: GenerationConfig | None = None,
        options: RequestOptions = DEFAULTS,
    ) -> PendingStream:
        """A request that is added when it is first used; ``async with`` aborts it on leaving. See `PendingStream`."""
        return PendingStream(lambda: self.add_request(prompt, config, options))

    async def generate(
        self,
        prompt: Prompt | StreamedPrompt,
        config: GenerationConfig | None = None,
        options: RequestOptions = DEFAULTS,
    ) -> RequestResult:
        """Adds a request and returns its whole result.

        Raises:
            AsyncEngineError: As `add_request`, and whatever error the request ended by.

        Cancelling it aborts the request.
        """
        return await (await self.add_request(prompt, config, options))

    def chat(
        self,
        messages: Sequence[Message],
        config: GenerationConfig | None = None,
        options: RequestOptions = DEFAULTS,
        **template_arguments: Any,
    ) -> PendingStream:
        """The assistant's next turn, through the model's chat template.

        ``async for output in engine.chat(messages)`` streams it, ``await engine.chat(messages)`` returns it whole.

        Args:
            messages: Mappings with ``role`` and ``content``, which is text or a list of parts: ``{"type": "text",
                "text": ...}``, ``{"type": "image", "image": ...}``, ``{"type": "audio", "audio": ...}`` and ``{"type":
                "video", "video": ...}``, where these are what `asyncengine.media.ImageSource`, `AudioSource` and
                `VideoSource` there say; or OpenAI's ``image_url`` with a ``data:`` URL and ``input_audio`` with base64,
                and ``video_url``. A part that is a video may have ``fps`` or ``num_frames`` as `Video` has. The
                ``token_ids`` of an answer, given beside its content, take its place: nothing that the model wrote is
                then cut into other tokens and computed again.
            config: How to generate.
            options: Id, priority, deadlines.
            **template_arguments: Passed to the chat template.
        """
        conversation = Conversation(tuple(messages) if isinstance(messages, list) else messages, template_arguments)

        async def add() -> RequestStream:
            return (await self._add([conversation], [config], options))[0]

        return PendingStream(add)

    def transcribe(
        self,
        audio: AudioSource,
        config: GenerationConfig | None = None,
        options: RequestOptions = DEFAULTS,
        *,
        language: str | None = None,
        hint: str | None = None,
        task: TranscriptionTask = "transcribe",
        timestamps: Timestamps = False,
        fallback: TranscriptionFallback | None = None,
    ) -> TranscriptStream:
        """What is said in an audio, by a model that was trained to be asked for that.

        ``await engine.transcribe(audio)`` returns it whole, ``async for delta in engine.transcribe(audio)`` yields it
        as it comes.

        Whisper hears 30 seconds at once: of a longer audio it is given pieces, cut where it is quiet, which are
        requests of their own that run side by side. It must be told the language; where it is not, it is asked for it
        first, of the first piece.

        Args:
            audio: As `asyncengine.media.AudioSource` says.
            config: How to generate. Whisper is greedy where it does not say; of several branches the first counts.
            options: Id, priority, deadlines, which count for all of it from its first use. `abort_request` of its
                ``request_id`` ends all of it. Of several pieces, each has the id with ``-0``, ``-1``, ... appended.
            language: That is spoken, by its code or name; None leaves it to the model.
            hint: What it is about, or words that are in it, for models that are told such; each piece is.
            task: ``"translate"`` into English, for models that do.
            timestamps: Whether the transcript has segments with times, for models that know them. ``"word"``: and
                these words with theirs, found out by a request more for each piece (openai-whisper's way, by dynamic
                time warping).
            fallback: What is written down anew at other temperatures, piece by piece; None takes what comes. With it,
                a piece is given out when it is taken as it is.

        Raises:
            InvalidRequestError: Something of that is wrong. When it is used: the model takes no audio, or does not
                transcribe in that way or that language.
            AsyncEngineError: When it is used, as `generate`.

        Cancelling whoever uses it aborts the requests.
        """
        _check_options(options)
        config = checked_config(config)
        check_fallback(fallback, config)
        doubts = bool(timestamps) or (fallback is not None and fallback.no_speech_threshold is not None)
        prompt, clock = TranscriptionPrompt(audio, language, hint, task, timestamps, doubts), self._thread.core.clock

        def make() -> Transcription:
            asked = Asked(prompt, config, options.begun(clock()), fallback)
            return Transcription(self._add, self._view, asked, clock, self._transcripts)

        return TranscriptStream(make)

    async def check_request(
        self,
        config: GenerationConfig | None = None,
        options: RequestOptions = DEFAULTS,
        *,
        kinds: Collection[Kind] = (),
        reading: Reading | None = None,
    ) -> None:
        """Whether a request could be added, whatever its prompt is: for whom that costs something to get.

        Args:
            config: How to generate.
            options: Id, priority, deadlines.
            kinds: Of what there is in the prompt beside its text.
            reading: What is read off the prompt, if nothing is generated.

        Raises:
            InvalidRequestError: The model does not take it.
            AsyncEngineError: As `add_request`.

        Cancelling it leaves the engine as it is.
        """
        _check_options(options)
        clock = self._thread.core.clock
        options = options.begun(clock())
        view, [(none, config, grammar)] = await in_time(
            self._prepare(None, [config], False), options.deadlines, clock()
        )
        check_media(kinds, view)
        new_request(0, none, config, options, view, grammar, Purpose(arriving=True, reading=reading))

    async def check_media(self, kinds: Collection[Kind]) -> None:
        """Whether the model takes images, audio or videos.

        Raises:
            InvalidRequestError: It does not; the message says why.
            ModelNotLoadedError: There is no model.
        """
        check_media(kinds, await self._view())

    def generate_many(
        self,
        prompts: Sequence[Prompt],
        config: GenerationConfig | Sequence[GenerationConfig | None] | None = None,
        options: RequestOptions = DEFAULTS,
    ) -> ManyStream:
        """Many requests, added by one instruction, read as one stream of ``(index, output)``.

        Args:
            prompts: Text or token ids, each.
            config: One for all, or one per prompt.
            options: For all; ``request_id`` gets ``-0``, ``-1``, ... appended.

        Raises:
            InvalidRequestError: `prompts` is a string, or there are not as many configurations as prompts.
        """
        prompts = checked_prompts(prompts)
        if isinstance(config, Sequence):
            configs = list(config)
            if len(configs) != len(prompts):
                raise InvalidRequestError(f"config has {len(configs)} entries; expected one per prompt, {len(prompts)}")
        else:
            configs = [config] * len(prompts)
        return ManyStream(lambda: self._add(prompts, configs, options, many=True))

    async def tokenize_chat(self, messages: Sequence[Message], /, **template_arguments: Any) -> list[int]:
        """Token ids of a conversation, as `chat` would have them computed. Nothing is computed.

        Args:
            messages: As in `chat`. What stands for a piece of an image is one token, the same for all of them, and
                so is what stands for a piece of audio or of a video.
            **template_arguments: Passed to the chat template.

        Raises:
            InvalidRequestError: The model does not take them.
            ModelNotLoadedError: There is no model.

        Cancelling it leaves the engine as it is.
        """
        view = await self._view()
        ids: list[int] = (await encode(Conversation(messages, template_arguments), view)).ids.tolist()
        return ids

    async def abort_request(self, request_id: str) -> None:
        """Ends a request or a transcript with reason "abort"; returns once its blocks are free.

        An unknown id is passed over.

        Raises:
            InvalidRequestError: The id is not a string.
        """
        _name("request_id", request_id)
        if (transcript := self._transcripts.get(request_id)) is not None:
            await transcript.aborted()
        await self._call(lambda to: ins.AbortRequests(request_ids=(request_id,), reply_to=to))

    async def pin_prompt(self, prompt: Prompt, name: str | None = None, options: RequestOptions = DEFAULTS) -> str:
        """Computes a prompt and keeps it in the prefix cache, whole blocks of it, until `unpin_prompt`.

        Args:
            prompt: Text, or token ids.
            name: Of the pin; a pin of the same name is replaced. None makes one up.
            options: How it is computed; with an adapter, it is kept for requests with that adapter.

        Returns:
            The name.

        Raises:
            AsyncEngineError: As `generate`.
        """
        pin = f"pin-{next(self._numbers)}-{secrets.token_hex(4)}" if name is None else _name("name", name)
        try:
            streams = await self._add([prompt], [GenerationConfig(max_tokens=0)], options, Purpose(pin=pin))
            result = await streams[0]
            check_computed(result.request_id, result.finish_reason is FinishReason.LENGTH)
        except BaseException:
            if name is None:  # nobody could ever unpin it
                self._put_quietly(ins.Unpin(pin))
            raise
        return pin

    async def unpin_prompt(self, name: str) -> bool:
        """Lets a pinned prompt be evicted; returns whether there was such a pin."""
        _name("name", name)
        return bool(await self._call(lambda to: ins.Unpin(name, to)))

    # How

    def _abort(self, number: int) -> None:
        self._put_quietly(ins.AbortRequests(numbers=(number,)))

    def _compiler(self, view: ModelView) -> GrammarCompiler:
        """Compiles grammars for the model of this view, and keeps them as long as it is loaded."""
        kept = self._grammars
        if kept is None or kept[0] != view.epoch:
            kept = self._grammars = (view.epoch, grammar_compiler(view))
        return kept[1]

    async def _add(
        self,
        prompts: Sequence[AnyPrompt],
        configs: Sequence[Configured],
        options: RequestOptions,
        purpose: Purpose = GENERATION,
        many: bool = False,
    ) -> list[RequestStream]:
        if not prompts:
            _check_options(options)
            return []
        reusable = [_reusable(prompt) for prompt in prompts]
        return (await self._admit(reusable, configs, options, purpose, many))[1]

    async def _admit(
        self,
        prompts: Sequence[AnyPrompt | StreamedPrompt],
        configs: Sequence[Configured],
        options: RequestOptions,
        purpose: Purpose,
        many: bool = False,
    ) -> tuple[ModelView, list[RequestStream]]:
        _check_options(options)
        clock = self._thread.core.clock
        options = options.begun(clock())
        while True:
            preparing = self._prepare(None if purpose.arriving else prompts, configs, many)
            view, prepared = await in_time(preparing, options.deadlines, clock())
            news = []
            for index, (read, config, grammar) in enumerate(prepared):
                own = options
                if many and options.request_id is not None:
                    own = options.named(f"{options.request_id}-{index}")
                news.append(new_request(next(self._numbers), read, config, own, view, grammar, purpose))
            # From here to `admitted` there is no await: the engine does not know a request that nobody owns.
            router = self._router()
            streams = []
            try:
                for new, prompt, (_, config, _) in zip(news, prompts, prepared, strict=True):
                    inbox = self._inbox(new, config, _operation(prompt, purpose.reading), view)
                    shown = new.prompt if new.media is None else new.media.shown(new.prompt)
                    streams.append(RequestStream(new.request_id, inbox, router, self._abort, options.label, shown))
                    router.register(inbox)
                add = ins.AddRequests(tuple(news), view.epoch, router.stream_back, None, options.when_full)
                fits = await self._call(functools.partial(_addressed, add))
            except BaseException:
                for stream in streams:
                    stream.withdraw()
                raise
            if fits:
                return view, streams
            for stream in streams:  # another model was loaded meanwhile: prepare for that one
                stream.withdraw()

    async def _prepare(
        self, prompts: Sequence[AnyPrompt | StreamedPrompt] | None, configs: Sequence[Configured], many: bool
    ) -> tuple[ModelView, list[tuple[Encoded, GenerationConfig, Grammar | None]]]:
        """The model, and what takes time to find out for it of each request; prompts that are None come later."""
        view = await self._view()
        wanted = [checked_config(config(view) if callable(config) else config) for config in configs]
        encoded = [Encoded(NO_TOKENS)] * len(wanted) if prompts is None else await _encoded(prompts, view, many)
        compiler = self._compiler(view)
        grammars = [await compile_grammar(config, compiler) for config in wanted]
        return view, list(zip(encoded, wanted, grammars, strict=True))

    def _inbox(self, new: NewRequest, config: GenerationConfig, operation: Operation, view: ModelView) -> Inbox:
        """Where what comes for a request will be; tells the observer, which may even exit, that it begins."""
        inbox = Inbox(new.number, new_branches(new, view))
        if new.params.num_prompt_logprobs >= 0:
            inbox.prompt, inbox.prompt_logprobs = new.prompt, [None]
        elif isinstance(new.question, ins.PromptQuestion):
            inbox.prompt_logprobs = []
        if self.observer is not None:
            begun = RequestBegun(new.request_id, operation, view.config.model, new.prompt_tokens, config, new.adapter)
            inbox.on_over = begin(self.observer, begun)
        return inbox


async def _encoded(prompts: Sequence[AnyPrompt | StreamedPrompt], view: ModelView, many: bool) -> list[Encoded]:
    """Token ids of each prompt; of many, an error names the one that is wrong."""
    encoded = []
    for index, prompt in enumerate(prompts):
        try:
            encoded.append(await encode(prompt, view))
            if many:
                check_length(len(encoded[-1].ids), view)
        except InvalidRequestError as error:
            if not many:
                raise
            raise type(error)(f"prompts[{index}]: {error}") from error
        if index % _ENCODED_AT_ONCE == _ENCODED_AT_ONCE - 1:
            await anyio.lowlevel.checkpoint()
    return encoded


def _check_options(options: object) -> None:
    if not isinstance(options, RequestOptions):
        raise InvalidRequestError(f"options is {options!r:.80}; expected RequestOptions(...)")


def _operation(prompt: AnyPrompt | StreamedPrompt, reading: Reading | None) -> Operation:
    if reading is not None:
        return "classification" if isinstance(reading, ClassificationOptions) else "embeddings"
    return "chat" if isinstance(prompt, Conversation) else "text_completion"


def _addressed(add: ins.AddRequests, reply_to: ReplyTo) -> ins.AddRequests:
    return dataclasses.replace(add, reply_to=reply_to)


def _name(field: str, value: object) -> str:
    if not isinstance(value, str):
        raise InvalidRequestError(f"{field} is {value!r:.80}; expected a string")
    return value


def _reusable(prompt: AnyPrompt) -> AnyPrompt:
    """A prompt that can be read twice: iterators cannot."""
    return list(prompt) if isinstance(prompt, Iterator) else prompt
