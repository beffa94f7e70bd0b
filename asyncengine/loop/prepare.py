"""From what a caller gives to a validated `NewRequest`. Runs on the caller, before anything reaches the step thread."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import operator
import os
import secrets
from collections.abc import AsyncIterable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar, cast

import anyio
import anyio.to_thread
import numpy as np
from anyio.lowlevel import RunVar

from asyncengine.detokenizer import BEFORE, TextStream
from asyncengine.errors import ContextLengthExceededError, InvalidRequestError
from asyncengine.generation import GenerationConfig, resolve
from asyncengine.grammar.compiler import GrammarCompiler
from asyncengine.grammar.protocol import Grammar
from asyncengine.grammar.select import make_backend
from asyncengine.images import ImagePrompt, ImageSource, PromptImages, Write
from asyncengine.instructions import Deadlines, NewRequest, WhenFull
from asyncengine.loop.branch import Branch
from asyncengine.loop.embedding import ClassificationOptions, Reading, pooling_of
from asyncengine.loop.image_parts import take_images
from asyncengine.loop.pairs import Pair
from asyncengine.step.adapters import unknown_adapter
from asyncengine.step.batch import Int32
from asyncengine.step.model import ModelView
from asyncengine.tokenizer import Message, Tokenizer, WritingTokenizer

T = TypeVar("T")

TextPrompt = str | Iterable[int]

Prompt = TextPrompt | ImagePrompt

Piece = str | int | Iterable[int]

StreamedPrompt = AsyncIterable[Piece]
"""A prompt that comes in pieces: text, or token ids, one or several at a time."""

NO_TOKENS: Int32 = np.empty(0, dtype=np.int32)

_READERS = min(4, os.cpu_count() or 1)
"""Threads that read images at once, for each event loop."""
_readers: RunVar[anyio.CapacityLimiter] = RunVar("asyncengine_image_readers")
_INLINE_CHARACTERS = 1024
"""Shorter texts are encoded on the loop: that takes less time than handing them to a thread."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOptions:
    """How a request is handled, as opposed to what it generates.

    Attributes:
        request_id: Public name; must not be that of a request that has not ended. None lets the engine choose.
        label: Anything; comes back as `RequestStream.label`. May repeat.
        priority: Lower goes first; within a priority, first come, first served.
        deadlines: How long it may take.
        when_full: With the waiting queue full, ``"wait"`` for room or ``"raise"`` `EngineOverloadedError`.
        adapter: Name of a loaded adapter to compute it with; None is the model alone.
    """

    request_id: str | None = None
    label: object = None
    priority: int = 0
    deadlines: Deadlines | None = None
    when_full: WhenFull = "wait"
    adapter: str | None = None

    def __post_init__(self) -> None:
        if self.request_id is not None and (not isinstance(self.request_id, str) or not self.request_id):
            raise InvalidRequestError(f"request_id is {self.request_id!r}; expected a non-empty string")
        if isinstance(self.priority, bool) or not isinstance(self.priority, int):
            raise InvalidRequestError(f"priority is {self.priority!r}; expected an integer")
        if self.deadlines is not None and not isinstance(self.deadlines, Deadlines):
            raise InvalidRequestError(f"deadlines is {self.deadlines!r}; expected Deadlines(...)")
        if self.when_full not in ("wait", "raise"):
            raise InvalidRequestError(f"when_full is {self.when_full!r}; allowed: 'wait', 'raise'")
        if self.adapter is not None and not isinstance(self.adapter, str):
            raise InvalidRequestError(f"adapter is {self.adapter!r:.80}; expected the name of one, or None")

    def named(self, request_id: str) -> RequestOptions:
        """A copy with another request id."""
        return dataclasses.replace(self, request_id=request_id)


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages that become a prompt through the model's chat template."""

    messages: Sequence[Message]
    template_arguments: Mapping[str, Any] = field(default_factory=dict)


class Encoded(NamedTuple):
    """A prompt as the model takes it.

    Attributes:
        ids: (tokens,) token ids.
        images: Those in it.
    """

    ids: Int32
    images: PromptImages | None = None


async def encode(prompt: Prompt | Conversation | Pair | StreamedPrompt, view: ModelView) -> Encoded:
    """Token ids of a prompt. Long texts and images are read on a worker thread; cancelling does not stop that.

    Raises:
        InvalidRequestError: Not text, token ids in the vocabulary, messages that the chat template takes, or images
            that the model does; or empty.
    """
    tokenizer = view.tokenizer
    if isinstance(prompt, Conversation):
        return await _encode_chat(prompt, view)
    elif isinstance(prompt, ImagePrompt):
        model, text = _tokenizer(tokenizer, view, "images need one"), prompt.text
        return await _read_images(prompt.images, view, lambda encode: encode(text), model.encode)
    elif isinstance(prompt, Pair):
        if prompt.size <= _INLINE_CHARACTERS and prompt.given is not None and prompt.given.template is not None:
            return Encoded(_typed(lambda: token_ids_of(prompt.encoded(view), view)))
        return Encoded(await _in_thread(lambda: token_ids_of(prompt.encoded(view), view)))
    elif isinstance(prompt, str):
        text = prompt
        if not text:
            raise InvalidRequestError("the prompt is ''; allowed: at least one token")
        model = _tokenizer(tokenizer, view, "pass the prompt as token ids")
        if len(text) <= _INLINE_CHARACTERS:
            ids = _typed(lambda: model.encode(text))
        else:
            return Encoded(await _in_thread(lambda: token_ids_of(model.encode(text), view)))
    elif isinstance(prompt, AsyncIterable) and not isinstance(prompt, Iterable):
        raise InvalidRequestError("the prompt is an async iterator; add_request, stream and generate take one")
    elif isinstance(prompt, (bytes, bytearray, Mapping)) or not isinstance(prompt, Iterable):
        raise InvalidRequestError(f"the prompt is {prompt!r:.80}; expected a string or token ids")
    else:
        ids = prompt  # type: ignore[assignment]
    return Encoded(token_ids_of(ids, view))


async def _encode_chat(conversation: Conversation, view: ModelView) -> Encoded:
    _check_messages(conversation.messages, view)
    model = _tokenizer(view.tokenizer, view, "messages need a tokenizer")
    arguments = conversation.template_arguments
    messages, images = take_images(conversation.messages)
    if not images:
        return Encoded(await _in_thread(lambda: token_ids_of(model.encode_chat(messages, arguments), view)))
    if not hasattr(model, "encode_chat_by"):
        raise InvalidRequestError("the messages have images; the tokenizer has no encode_chat_by, which they need")
    writing = cast("WritingTokenizer", model)
    return await _read_images(
        images, view, lambda encode: writing.encode_chat_by(messages, arguments, encode), writing.encode_piece
    )


async def _read_images(
    images: Sequence[ImageSource], view: ModelView, write: Write, encode: Callable[[str], list[int]]
) -> Encoded:
    reader = view.image_reader
    if reader is None:
        raise InvalidRequestError(f"the prompt has images; the model takes none: {view.no_images}")

    def read() -> Encoded:
        found = reader.read(images, write, encode, view.max_tokens - 1)
        return Encoded(token_ids_of(found.token_ids, view), found.images)

    return await _in_thread(read, _image_readers())


def _image_readers() -> anyio.CapacityLimiter:
    """Lets few of a loop's images be read at once, since a large one takes a lot of memory meanwhile."""
    try:
        return _readers.get()
    except LookupError:
        _readers.set(limiter := anyio.CapacityLimiter(_READERS))
        return limiter


def check_length(prompt_tokens: int, view: ModelView) -> None:
    """Raises ContextLengthExceededError if a prompt of so many tokens leaves no room for another."""
    if prompt_tokens >= view.max_tokens:
        raise ContextLengthExceededError(
            f"the prompt has {prompt_tokens} tokens; allowed: 1..{view.max_tokens - 1} ({view.limits_text})"
        )


async def compile_grammar(config: GenerationConfig, compiler: GrammarCompiler) -> Grammar | None:
    """The grammar of a request's response format, compiled on a worker thread unless it was before.

    Raises:
        InvalidRequestError: It does not compile.
    """
    wanted = config.response_format
    if wanted is None:
        return None
    assert not isinstance(wanted, Mapping)
    grammar = compiler.cached(wanted)
    if grammar is None:
        grammar = await anyio.to_thread.run_sync(compiler.compile, wanted, abandon_on_cancel=True)
    return grammar


def grammar_compiler(view: ModelView) -> GrammarCompiler:
    """Compiles grammars for a loaded model; costs nothing before it does."""
    return GrammarCompiler(
        lambda: make_backend(view.config.grammar_backend, view.tokenizer, view.vocab_size, view.eos_token_ids)
    )


def checked_config(config: GenerationConfig | None) -> GenerationConfig:
    """The configuration of a request.

    Raises:
        InvalidRequestError: It is something else.
    """
    if config is None:
        return GenerationConfig()
    if not isinstance(config, GenerationConfig):
        raise InvalidRequestError(f"config is {config!r:.80}; expected GenerationConfig(...)")
    return config


def new_request(
    number: int,
    prompt: Int32,
    config: GenerationConfig | None,
    options: RequestOptions,
    view: ModelView,
    pin: str | None = None,
    grammar: Grammar | None = None,
    arriving: bool = False,
    reading: Reading | None = None,
    images: PromptImages | None = None,
) -> NewRequest:
    """Checks a request against the model and fills in every default.

    Raises:
        InvalidRequestError: It cannot be served by this model.
    """
    config = checked_config(config)
    check_length(len(prompt), view)
    if options.adapter is not None and options.adapter not in view.adapters:
        raise InvalidRequestError(unknown_adapter(options.adapter, view.adapters))
    most = view.config.prefill_chunk_size
    if images is not None and images.whole and most is not None and images.longest > most:
        raise InvalidRequestError(
            f"an image of the prompt comes to {images.longest} tokens, which must be computed in one step; "
            f"prefill_chunk_size allows 1..{most}"
        )
    if reading is None and not view.has_head:
        can = "embed" if view.classifier is None else "embed and classify"
        raise InvalidRequestError(f"{view.config.model!r} can only {can}: its checkpoint has no language-model head")
    pooling = None if reading is None else pooling_of(reading, view)
    params = resolve(
        config,
        view.default_generation_config,
        vocab_size=view.vocab_size,
        eos_token_ids=view.eos_token_ids,
        max_tokens=view.max_tokens - len(prompt),
        seed=secrets.randbits(63) if config.seed is None else 0,
        grammar=grammar,
        bad_words=_bad_words(config.bad_words, view),
    )
    if params.stop_strs and view.tokenizer is None:
        raise InvalidRequestError(f"stop_strs is {params.stop_strs!r}; stop strings need a tokenizer and there is none")
    # The random part keeps it apart from whatever ids callers give.
    request_id = f"request-{number}-{secrets.token_hex(4)}" if options.request_id is None else options.request_id
    return NewRequest(
        number,
        request_id,
        prompt,
        params,
        options.priority,
        options.deadlines,
        pin,
        arriving,
        pooling,
        options.adapter,
        images,
        isinstance(reading, ClassificationOptions),
    )


def _bad_words(words: Iterable[str | Iterable[int]], view: ModelView) -> tuple[tuple[int, ...], ...]:
    """As tokens: those that stand for a text are what the tokenizer makes of it, with and without a space before it."""
    sequences: list[tuple[int, ...]] = []
    for word in words:
        if not isinstance(word, str):
            sequences.append(tuple(word))
            continue
        model = _tokenizer(view.tokenizer, view, f"pass bad_words as token ids, not as {word!r}")
        bare = word.lstrip()
        around = model.encode("")
        sequences += [_without(around, _typed(functools.partial(model.encode, text))) for text in (bare, f" {bare}")]
    return tuple(dict.fromkeys(sequence for sequence in sequences if sequence))


def _without(around: list[int], ids: list[int]) -> tuple[int, ...]:
    """Token ids without the special tokens that the tokenizer puts around every text."""
    before = 0
    while before < len(around) and before < len(ids) and ids[before] == around[before]:
        before += 1
    return tuple(ids[before : len(ids) - (len(around) - before)])


def new_branches(new: NewRequest, view: ModelView) -> list[Branch]:
    """The branches of a request, ready to decode the text if the outputs carry some."""
    params, before = new.params, new.prompt[-BEFORE:].tolist()
    tokenizer = view.tokenizer if params.detokenize else None
    return [
        Branch(
            None if tokenizer is None else TextStream(tokenizer, params.stop_strs, params.skip_special_tokens, before),
            logprobs=params.num_logprobs >= 0,
        )
        for _ in range(params.n)
    ]


def _tokenizer(tokenizer: Tokenizer | None, view: ModelView, otherwise: str) -> Tokenizer:
    if tokenizer is None:
        raise InvalidRequestError(f"{view.config.model!r} has no tokenizer; {otherwise}")
    return tokenizer


def _typed(function: Callable[[], T]) -> T:
    """Whatever a tokenizer or template raises, it is the input that it did not like."""
    try:
        return function()
    except InvalidRequestError:
        raise
    except Exception as error:
        raise InvalidRequestError(f"the prompt cannot be encoded: {error}") from error


async def _in_thread(function: Callable[[], T], limiter: anyio.CapacityLimiter | None = None) -> T:
    return await anyio.to_thread.run_sync(lambda: _typed(function), abandon_on_cancel=True, limiter=limiter)


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


def token_ids_of(ids: Iterable[int], view: ModelView) -> Int32:
    """Token ids as an array; raises InvalidRequestError if there are none, or some are not in the vocabulary."""
    values = list(ids)
    if set(map(type, values)) - {int}:
        values = [_index(token_id, view) for token_id in values]
    if not values:
        raise InvalidRequestError("the prompt is empty; allowed: at least one token")
    low, high = min(values), max(values)
    if low < 0 or high >= view.vocab_size:
        raise InvalidRequestError(
            f"the prompt has token id {low if low < 0 else high}; allowed: 0..{view.vocab_size - 1} "
            f"(vocabulary of {view.vocab_size})"
        )
    return np.array(values, dtype=np.int32)


def _index(token_id: object, view: ModelView) -> int:
    if not isinstance(token_id, bool):
        with contextlib.suppress(TypeError):
            return operator.index(token_id)  # type: ignore[arg-type]
    raise InvalidRequestError(
        f"the prompt is not a list of token ids: it has {token_id!r:.40}; allowed: integers in 0..{view.vocab_size - 1}"
    )
