"""From what a caller gives to a validated `NewRequest`. Runs on the caller, before anything reaches the step thread."""

from __future__ import annotations

import dataclasses
import functools
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import anyio
import anyio.to_thread

from asyncengine.detokenizer import BEFORE, TextStream
from asyncengine.errors import ContextLengthExceededError, InvalidRequestError
from asyncengine.generation import GenerationConfig, resolve
from asyncengine.grammar.compiler import GrammarCompiler
from asyncengine.grammar.protocol import Grammar
from asyncengine.grammar.select import make_backend
from asyncengine.instructions import Deadlines, NewRequest, WhenFull
from asyncengine.loop.branch import Branch
from asyncengine.loop.embedding import ClassificationOptions, Reading, pooling_of
from asyncengine.loop.encoding import Encoded
from asyncengine.loop.token_ids import tokenizer_of, typed
from asyncengine.step.adapters import unknown_adapter
from asyncengine.step.model import ModelView


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOptions:
    """How a request is handled, as opposed to what it generates.

    Attributes:
        request_id: Public name; must not be that of a request that has not ended. None lets the engine choose.
        label: Anything; comes back as `RequestStream.label`. May repeat.
        priority: Lower goes first; within a priority, first come, first served.
        deadlines: How long it may take, from the call that adds it.
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

    def begun(self, now: float) -> RequestOptions:
        """A copy whose deadlines count from now on, if they do not yet."""
        if self.deadlines is None or self.deadlines.since is not None:
            return self
        return dataclasses.replace(self, deadlines=self.deadlines.begun(now))

    def named(self, request_id: str) -> RequestOptions:
        """A copy with another request id."""
        return dataclasses.replace(self, request_id=request_id)


@dataclass(frozen=True, slots=True)
class Purpose:
    """What a request is for, where it does not just generate.

    Attributes:
        pin: Name under which its prompt is kept in the prefix cache.
        arriving: Whether its prompt comes in pieces.
        reading: What is read off its prompt; nothing is generated.
    """

    pin: str | None = None
    arriving: bool = False
    reading: Reading | None = None


GENERATION = Purpose()


def check_length(prompt_tokens: int, view: ModelView) -> None:
    """Raises ContextLengthExceededError if a prompt has more tokens than the model takes."""
    if prompt_tokens > view.max_prompt_tokens:
        raise ContextLengthExceededError(
            f"the prompt has {prompt_tokens} tokens; allowed: 1..{view.max_prompt_tokens} ({view.limits_text})"
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
    encoded: Encoded,
    config: GenerationConfig | None,
    options: RequestOptions,
    view: ModelView,
    grammar: Grammar | None = None,
    purpose: Purpose = GENERATION,
) -> NewRequest:
    """Checks a request against the model and fills in every default.

    Raises:
        InvalidRequestError: It cannot be served by this model.
    """
    config, reading = checked_config(config), purpose.reading
    prompt, media, second, question = encoded
    if view.begins_with_audio or view.source_reader is not None:
        _check_begins(encoded, config, view)
    check_length(len(prompt), view)
    room = view.max_tokens - len(prompt)
    if view.source_reader is not None:
        assert media is not None
        room = min(room, view.source_reader.written - (len(prompt) - media.beside))
        processors = view.source_reader.processors(media.items[0].inputs["input_ids"][0])
        if processors:
            config = dataclasses.replace(config, logits_processors=(*config.logits_processors, *processors))
    if config.num_beams > 1:
        room = min(room, _room_for_beams(config.num_beams, len(prompt), view))
    if options.adapter is not None and options.adapter not in view.adapters:
        raise InvalidRequestError(unknown_adapter(options.adapter, view.adapters))
    most = view.config.prefill_chunk_size
    if media is not None and most is not None and media.longest_whole > most:
        raise InvalidRequestError(
            f"an image of the prompt comes to {media.longest_whole} tokens, which must be computed in one step; "
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
        max_tokens=room,
        seed=secrets.randbits(63) if config.seed is None else 0,
        grammar=grammar,
        bad_words=_bad_words(config.bad_words, view),
    )
    if params.search is not None and media is not None and view.source_reader is not None:
        forced = view.source_reader.forced(prompt[media.beside :].tolist())
        params = dataclasses.replace(params, search=dataclasses.replace(params.search, forced=forced))
    if params.stop_strs and view.tokenizer is None:
        raise InvalidRequestError(f"stop_strs is {params.stop_strs!r}; stop strings need a tokenizer and there is none")
    # The random part keeps it apart from whatever ids callers give.
    request_id = f"request-{number}-{secrets.token_hex(4)}" if options.request_id is None else options.request_id
    return NewRequest(
        number=number,
        request_id=request_id,
        prompt=prompt,
        params=params,
        priority=options.priority,
        deadlines=options.deadlines,
        pin=purpose.pin,
        arriving=purpose.arriving,
        pooling=pooling,
        adapter=options.adapter,
        media=media,
        classifies=isinstance(reading, ClassificationOptions),
        second=second,
        question=question,
    )


def _room_for_beams(num_beams: int, prompt_tokens: int, view: ModelView) -> int:
    """How many tokens each beam of a search may write.

    Raises:
        InvalidRequestError: The model never has room for so many beams.
    """
    limits = view.limits
    assert limits is not None
    if num_beams > limits.max_num_sequence:
        raise InvalidRequestError(
            f"num_beams is {num_beams}; allowed: 1..max_num_sequence = {limits.max_num_sequence}: all beams are "
            "computed at the same time"
        )
    room = limits.written_by_beams(prompt_tokens, num_beams)
    if room < 1:
        raise InvalidRequestError(
            f"num_beams is {num_beams}; behind a prompt of {prompt_tokens} tokens the KV cache has no room for so many "
            f"({limits.num_blocks} blocks of {limits.page_size} tokens)"
        )
    return room


def _check_begins(encoded: Encoded, config: GenerationConfig, view: ModelView) -> None:
    """Raises InvalidRequestError where a model is not given what its decoder attends to beside its own tokens."""
    reads = view.source_reader is not None
    if encoded.media is None and reads:
        raise InvalidRequestError(
            f"the prompt has no source, and {view.config.model!r} writes one text of another: it takes a string, token "
            "ids or a SourcePrompt, whole and not in pieces"
        )
    if encoded.media is None:
        raise InvalidRequestError(
            f"the prompt has no audio, and {view.config.model!r} writes what it hears: transcribe takes one, and "
            "AudioPrompt(text, [audio]) what its text begins with"
        )
    if config.prompt_logprobs is not None:
        raise InvalidRequestError(
            f"prompt_logprobs is {config.prompt_logprobs}; tokens that stand for what {view.config.model!r} "
            f"{'reads' if reads else 'hears'} have no log-probabilities"
        )


def _bad_words(words: Iterable[str | Iterable[int]], view: ModelView) -> tuple[tuple[int, ...], ...]:
    """As tokens: those that stand for a text are what the tokenizer makes of it, with and without a space before it."""
    sequences: list[tuple[int, ...]] = []
    for word in words:
        if not isinstance(word, str):
            sequences.append(tuple(word))
            continue
        model = tokenizer_of(view, f"pass bad_words as token ids, not as {word!r}")
        bare = word.lstrip()
        around = model.encode("")
        sequences += [_without(around, typed(functools.partial(model.encode, text))) for text in (bare, f" {bare}")]
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
