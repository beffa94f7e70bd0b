"""`AsyncEngine`: the public face. Lives on event loops; every method gives an instruction and awaits its future."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import itertools
import secrets
import threading
import weakref
from collections.abc import AsyncIterable, Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from asyncengine import instructions as ins
from asyncengine.builds import BuildError
from asyncengine.config import EngineConfig
from asyncengine.errors import (
    ConfigError,
    EngineClosedError,
    InvalidRequestError,
    ModelNotLoadedError,
    RequestDroppedError,
)
from asyncengine.generation import GenerationConfig
from asyncengine.grammar.compiler import GrammarCompiler
from asyncengine.instructions import InFlight, Instruction, NewRequests, ReplyTo
from asyncengine.loop import delivery
from asyncengine.loop.embedding import EmbeddingOptions
from asyncengine.loop.feed import feed
from asyncengine.loop.health import Health, health_of
from asyncengine.loop.many import ManyStream, PendingStream
from asyncengine.loop.observer import Operation, RequestBegun, RequestObserver, begin
from asyncengine.loop.prepare import (
    NO_TOKENS,
    Conversation,
    Prompt,
    RequestOptions,
    StreamedPrompt,
    checked_config,
    compile_grammar,
    encode,
    grammar_compiler,
    new_branches,
    new_request,
)
from asyncengine.loop.router import Inbox, Router
from asyncengine.loop.stream import RequestStream
from asyncengine.metrics import EngineMetrics
from asyncengine.outputs import Embedding, Pooling, PromptScore, RequestResult
from asyncengine.state import EngineState
from asyncengine.step.model import LoadedModel, Loader, LoadPlan, ModelView
from asyncengine.step.thread import StepThread
from asyncengine.tokenizer import Message, Tokenizer
from asyncengine.trace import Trace

_DEFAULTS = RequestOptions()
_PROMPT_ALONE = GenerationConfig(max_tokens=0, detokenize=False)


class AsyncEngine:
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
        self._config = None if config is None else _config(config)
        self.trace = Trace()
        self.observer: RequestObserver | None = None
        self._thread = StepThread(_DefaultLoader() if loader is None else loader, self.trace)
        self._numbers = itertools.count(1)
        self._routers: dict[asyncio.AbstractEventLoop, Router] = {}
        self._routers_lock = threading.Lock()
        self._grammars: tuple[int, GrammarCompiler] | None = None
        # An engine that is dropped ends its thread. The finalizer must not hold the engine itself.
        self._finalizer = weakref.finalize(self, _shut_down, self._thread)
        self._finalizer.atexit = False

    # What it is

    @property
    def state(self) -> EngineState:
        """Where the engine is in its life."""
        return self._thread.core.state

    @property
    def complete_engine_config(self) -> EngineConfig | None:
        """The loaded model's configuration with every default filled in; None without a model."""
        view = self._thread.core.view
        return None if view is None else view.config

    @property
    def default_generation_config(self) -> GenerationConfig:
        """What the loaded model generates with where a request does not say.

        Raises:
            ModelNotLoadedError: There is no model.
        """
        view = self._thread.core.view
        if view is None:
            raise ModelNotLoadedError("there is no model; call reload first")
        return view.default_generation_config

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The loaded model's tokenizer; None if it has none.

        Raises:
            ModelNotLoadedError: There is no model.
        """
        view = self._thread.core.view
        if view is None:
            raise ModelNotLoadedError("there is no model; call reload first")
        return view.tokenizer

    def metrics(self) -> EngineMetrics:
        """A snapshot of counts and latencies. Never waits for a step."""
        metrics = self._thread.core.metrics()
        try:
            router = self._routers.get(asyncio.get_running_loop())
        except RuntimeError:
            router = None
        if router is None:
            return metrics
        back = router.stream_back
        return metrics.on_loop(back.wakeups, back.handoff_seconds, back.handoff_max_seconds, router.merged)

    def health(self) -> Health:
        """Whether the engine is well, and if not, why. Never waits for a step."""
        return health_of(self._thread)

    # Requests

    async def add_request(
        self,
        prompt: Prompt | StreamedPrompt,
        config: GenerationConfig | None = None,
        options: RequestOptions = _DEFAULTS,
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
            ModelNotLoadedError: There is no model, and none is being loaded.
            EngineDrainingError: The engine is draining.
            EngineFailedError: The device is lost.
            EngineClosedError: The engine was shut down.

        Cancelling it withdraws the request.
        """
        if not isinstance(prompt, AsyncIterable) or isinstance(prompt, Iterable):
            return (await self._add([prompt], [config], options))[0]
        view, streams = await self._admit([prompt], [config], options, arriving=True)
        await feed(streams[0], prompt, view, self._put_quietly)
        return streams[0]

    def stream(
        self,
        prompt: Prompt | StreamedPrompt,
        config: GenerationConfig | None = None,
        options: RequestOptions = _DEFAULTS,
    ) -> PendingStream:
        """A request that is added when it is first used; ``async with`` aborts it on leaving. See `PendingStream`."""
        return PendingStream(lambda: self.add_request(prompt, config, options))

    async def generate(
        self,
        prompt: Prompt | StreamedPrompt,
        config: GenerationConfig | None = None,
        options: RequestOptions = _DEFAULTS,
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
        options: RequestOptions = _DEFAULTS,
        **template_arguments: Any,
    ) -> PendingStream:
        """The assistant's next turn, through the model's chat template.

        ``async for output in engine.chat(messages)`` streams it, ``await engine.chat(messages)`` returns it whole.

        Args:
            messages: Mappings with ``role`` and ``content``. The ``token_ids`` of an answer, given beside its content,
                take its place: nothing that the model wrote is then cut into other tokens and computed again.
            config: How to generate.
            options: Id, priority, deadlines.
            **template_arguments: Passed to the chat template.
        """
        conversation = Conversation(tuple(messages) if isinstance(messages, list) else messages, template_arguments)

        async def add() -> RequestStream:
            return (await self._add([conversation], [config], options))[0]

        return PendingStream(add)

    def generate_many(
        self,
        prompts: Sequence[Prompt],
        config: GenerationConfig | Sequence[GenerationConfig | None] | None = None,
        options: RequestOptions = _DEFAULTS,
    ) -> ManyStream:
        """Many requests, added by one instruction, read as one stream of ``(index, output)``.

        Args:
            prompts: Text or token ids, each.
            config: One for all, or one per prompt.
            options: For all; ``request_id`` gets ``-0``, ``-1``, ... appended.

        Raises:
            InvalidRequestError: `prompts` is a string, or there are not as many configurations as prompts.
        """
        prompts = _prompts(prompts)
        if isinstance(config, Sequence):
            configs = list(config)
            if len(configs) != len(prompts):
                raise InvalidRequestError(f"config has {len(configs)} entries; expected one per prompt, {len(prompts)}")
        else:
            configs = [config] * len(prompts)
        return ManyStream(lambda: self._add(prompts, configs, options, many=True))

    async def score(
        self, prompts: Sequence[Prompt], top_logprobs: int = 0, options: RequestOptions = _DEFAULTS
    ) -> list[PromptScore]:
        """How likely texts are under the model; nothing is generated.

        Args:
            prompts: Text or token ids, each.
            top_logprobs: 0 to 20. How many of the likeliest tokens to name at each position.
            options: For all; ``request_id`` gets ``-0``, ``-1``, ... appended.

        Raises:
            AsyncEngineError: As `generate`.

        Cancelling it ends the requests.
        """
        config = GenerationConfig(max_tokens=0, prompt_logprobs=top_logprobs, detokenize=False)
        scores = []
        for result in await self.generate_many(prompts, config, options):
            assert result.prompt_token_ids is not None and result.prompt_logprobs is not None
            scores.append(PromptScore(result.prompt_token_ids, result.prompt_logprobs))
        return scores

    async def embed(
        self,
        prompts: Sequence[Prompt],
        pooling: Pooling | None = None,
        *,
        normalize: bool = True,
        dimensions: int | None = None,
        options: RequestOptions = _DEFAULTS,
    ) -> list[Embedding]:
        """Texts as vectors: the model's hidden states behind its last norm, pooled. Nothing is generated.

        The prompts are computed in the same steps as everything else. A mean is over all tokens that the tokenizer
        makes of a text, those that it adds included.

        Args:
            prompts: Text or token ids, each.
            pooling: ``"mean"`` or ``"last"``, the last token's. None is what the checkpoint says
                (``1_Pooling/config.json``), and without that the mean.
            normalize: Whether the vectors have length 1.
            dimensions: How many numbers are kept of each vector, from the front; None keeps all.
            options: For all; ``request_id`` gets ``-0``, ``-1``, ... appended.

        Raises:
            AsyncEngineError: As `generate`.

        Cancelling it ends the requests.
        """
        wanted = EmbeddingOptions(pooling=pooling, normalize=normalize, dimensions=dimensions)
        prompts = _prompts(prompts)
        configs = [_PROMPT_ALONE] * len(prompts)
        many = ManyStream(lambda: self._add(prompts, configs, options, many=True, embedding=wanted))
        results = await many
        found = []
        for stream, result in zip(many.streams, results, strict=True):
            if stream.pooled is None:
                raise RequestDroppedError(f"request {stream.request_id}: it was aborted before its prompt was computed")
            found.append(Embedding(wanted.vector(stream.pooled), result.usage))
        return found

    async def abort_request(self, request_id: str) -> None:
        """Ends a request with reason "abort"; returns once its blocks are free. An unknown id is passed over.

        Raises:
            InvalidRequestError: The id is not a string.
        """
        _name("request_id", request_id)
        await self._call(lambda to: ins.AbortRequests(request_ids=(request_id,), reply_to=to))

    async def pin_prompt(self, prompt: Prompt, name: str | None = None) -> str:
        """Computes a prompt and keeps it in the prefix cache, whole blocks of it, until `unpin_prompt`.

        Args:
            prompt: Text, or token ids.
            name: Of the pin; a pin of the same name is replaced. None makes one up.

        Returns:
            The name.

        Raises:
            AsyncEngineError: As `generate`.
        """
        pin = f"pin-{next(self._numbers)}-{secrets.token_hex(4)}" if name is None else _name("name", name)
        try:
            streams = await self._add([prompt], [GenerationConfig(max_tokens=0)], _DEFAULTS, pin=pin)
            await streams[0]
        except BaseException:
            if name is None:  # nobody could ever unpin it
                self._put_quietly(ins.Unpin(pin))
            raise
        return pin

    async def unpin_prompt(self, name: str) -> bool:
        """Lets a pinned prompt be evicted; returns whether there was such a pin."""
        _name("name", name)
        return bool(await self._call(lambda to: ins.Unpin(name, to)))

    # Life cycle

    async def reload(
        self, config: EngineConfig | str, in_flight: InFlight = "abort", new_requests: NewRequests = "wait"
    ) -> EngineConfig:
        """Loads a model in place of the present one, if there is one; returns its completed configuration.

        Everything that can be checked is checked before the present model is let go, and where both fit in memory,
        it serves until the new one is ready.

        Args:
            config: An `EngineConfig`, or its JSON.
            in_flight: What happens to requests that were given before: ``"abort"`` ends them at the swap, ``"wait"``
                lets them finish first, ``"carry"`` goes on with them on the new model, which must have the same
                tokenizer.
            new_requests: What happens to requests that are given after the reload: ``"wait"`` keeps the order, they
                wait for the new model; ``"serve"`` lets the present model serve them as long as it is there, and
                then `in_flight` holds for them as well.

        Raises:
            ConfigError: The configuration is wrong; nothing was changed.
            ReloadError: It cannot be loaded. `state` tells whether the former model still serves.
            IllegalStateError: Not now: the engine is draining.
            EngineClosedError: The engine was shut down.

        Cancelling it does not stop the load.
        """
        complete = _config(config)
        if in_flight not in ("abort", "wait", "carry"):
            raise ConfigError(f"in_flight is {in_flight!r}; allowed: 'abort', 'wait', 'carry'")
        if new_requests not in ("wait", "serve"):
            raise ConfigError(f"new_requests is {new_requests!r}; allowed: 'wait', 'serve'")
        loaded: EngineConfig = await self._call(lambda to: ins.Reload(complete, in_flight, to, new_requests))
        return loaded

    async def unload(self) -> None:
        """Ends all requests and lets the model go; returns once readers have their ends and the memory is free."""
        await self._call(ins.Unload)

    async def reset(self) -> None:
        """Ends all requests, empties the prefix cache (pins included) and zeroes the metrics."""
        await self._call(ins.Reset)

    async def pause(self) -> None:
        """Stops stepping after the present step; requests keep their place and new ones wait."""
        await self._call(ins.Pause)

    async def resume(self) -> None:
        """Steps again after `pause`."""
        await self._call(ins.Resume)

    async def sleep(self) -> None:
        """Gives the KV cache's memory back; requests keep their tokens and are computed again after `wake`."""
        await self._call(ins.Sleep)

    async def wake(self) -> None:
        """Goes on after `sleep`."""
        await self._call(ins.Wake)

    async def update_weights(self, weights: Mapping[str, Any]) -> int:
        """Replaces weights in place between two steps; requests go on with the new ones.

        Args:
            weights: Tensors by their names in the checkpoint. Names, shapes and dtypes are checked first; either all
                are replaced or none. A draft model keeps its own.

        Returns:
            The new weight version. The prefix cache begins anew with it.

        Raises:
            ReloadError: A name, shape or dtype does not fit; nothing was changed.
        """
        return int(await self._call(lambda to: ins.UpdateWeights(weights, to)))

    async def drain(self) -> None:
        """Refuses new requests until all that there are have ended, then takes them again."""
        await self._call(ins.Drain)

    async def restart(self) -> EngineConfig:
        """Loads the model again after its device was lost; waiting requests go on.

        Raises:
            IllegalStateError: The engine has not failed.
            ReloadError: It cannot be loaded.
        """
        loaded: EngineConfig = await self._call(ins.Restart)
        return loaded

    async def debug_call_func_on_all_workers(self, name: str, *args: Any) -> list[Any]:
        """Calls a function beside the model, between two steps; returns one result per worker.

        Args:
            name: One of the model's own debug functions, or ``"package.module:function"``, which is called with the
                model first.
            *args: Passed on.

        Raises:
            ModelNotLoadedError: There is no model.
            Exception: Whatever the function raises.
        """
        results: list[Any] = await self._call(lambda to: ins.DebugCall(name, args, to))
        return results

    async def shutdown(self, drain: float = 0.0) -> tuple[str, ...]:
        """Ends the engine. May be called in any state, and again.

        Args:
            drain: Seconds that requests get to finish; new ones are refused meanwhile. May be infinite.

        Returns:
            Ids of the requests that had to be ended.

        Raises:
            ConfigError: `drain` is not a number >= 0.

        Cancelling it does not stop it.
        """
        if isinstance(drain, bool) or not isinstance(drain, (int, float)) or not drain >= 0:
            raise ConfigError(f"drain is {drain!r}; allowed: seconds >= 0")
        try:
            left: tuple[str, ...] = await self._call(lambda to: ins.Shutdown(drain, to))
        except EngineClosedError:
            return ()
        finally:
            if self._thread.core.closed:
                # The thread has nothing left to do but return.
                self._thread.join(1.0)
        return left

    def reload_nowait(self) -> None:
        """Begins to load the engine's configuration; what is given next waits for it. Needs no event loop.

        A load that fails leaves the engine unloaded: whoever waits gets `ModelNotLoadedError`.
        """
        if self._config is None:
            raise ConfigError("the engine was made without a configuration")
        self._thread.put(ins.Reload(self._config))

    def shutdown_nowait(self, timeout: float = 10.0) -> None:
        """Ends the engine and blocks until its thread has ended, at most `timeout` seconds. Needs no event loop."""
        self._put_quietly(ins.Shutdown())
        self._thread.join(timeout)

    async def __aenter__(self) -> Self:
        if self._config is not None:
            try:
                await self.reload(self._config)
            except BaseException:
                _shut_down(self._thread)
                raise
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.shutdown()

    # How

    def _router(self) -> Router:
        """The running loop's router."""
        loop = asyncio.get_running_loop()
        router = self._routers.get(loop)
        if router is None:
            with self._routers_lock:
                for other in [other for other in self._routers if other.is_closed()]:
                    del self._routers[other]
                router = self._routers[loop] = Router(loop)
        return router

    async def _call(self, make: Callable[[ReplyTo], Instruction]) -> Any:
        """Gives an instruction, synchronously, then awaits its reply."""
        router = self._router()
        reply_to, future = router.expect_reply()
        try:
            self._thread.put(make(reply_to))
        except BaseException:
            router.expect_no_reply(reply_to)
            raise
        return await future

    def _put_quietly(self, instruction: Instruction) -> None:
        try:
            self._thread.put(instruction)
        except EngineClosedError:
            pass  # it has ended everything

    def _abort(self, number: int) -> None:
        self._put_quietly(ins.AbortRequests(numbers=(number,)))

    async def _view(self) -> ModelView:
        """The loaded model, after a reload that is under way."""
        core, router = self._thread.core, self._router()
        view = None if core.state is EngineState.LOADING else core.view
        while view is None:
            # No requests, for no model: the reply comes when a reload that was given before is through. It raises if
            # there is no model then; there may be none either when the reply has arrived.
            await self._call(lambda to: ins.AddRequests((), -1, router.stream_back, to))
            view = core.view
        return view

    def _compiler(self, view: ModelView) -> GrammarCompiler:
        """Compiles grammars for the model of this view, and keeps them as long as it is loaded."""
        kept = self._grammars
        if kept is None or kept[0] != view.epoch:
            kept = self._grammars = (view.epoch, grammar_compiler(view))
        return kept[1]

    async def _add(
        self,
        prompts: Sequence[Prompt | Conversation],
        configs: Sequence[GenerationConfig | None],
        options: RequestOptions,
        pin: str | None = None,
        many: bool = False,
        embedding: EmbeddingOptions | None = None,
    ) -> list[RequestStream]:
        if not prompts:
            _check_options(options)
            return []
        reusable = [_reusable(prompt) for prompt in prompts]
        return (await self._admit(reusable, configs, options, pin, many, embedding=embedding))[1]

    async def _admit(
        self,
        prompts: Sequence[Prompt | Conversation | StreamedPrompt],
        configs: Sequence[GenerationConfig | None],
        options: RequestOptions,
        pin: str | None = None,
        many: bool = False,
        arriving: bool = False,
        embedding: EmbeddingOptions | None = None,
    ) -> tuple[ModelView, list[RequestStream]]:
        _check_options(options)
        while True:
            view = await self._view()
            wanted = [checked_config(config) for config in configs]
            encoded = [NO_TOKENS if arriving else await encode(prompt, view) for prompt in prompts]
            compiler = self._compiler(view)
            grammars = [await compile_grammar(config, compiler) for config in wanted]
            news = []
            for index, (ids, config, grammar) in enumerate(zip(encoded, wanted, grammars, strict=True)):
                own = options
                if many and options.request_id is not None:
                    own = options.named(f"{options.request_id}-{index}")
                news.append(new_request(next(self._numbers), ids, config, own, view, pin, grammar, arriving, embedding))
            # From here to `admitted` there is no await: the engine does not know a request that nobody owns.
            router = self._router()
            streams = []
            for new, prompt, config in zip(news, prompts, wanted, strict=True):
                inbox = Inbox(new.number, new_branches(new.params, view))
                if new.params.num_prompt_logprobs >= 0:
                    inbox.prompt, inbox.prompt_logprobs = new.prompt, [None]
                if self.observer is not None:
                    operation = _operation(prompt, embedding)
                    begun = RequestBegun(new.request_id, operation, view.config.model, len(new.prompt), config)
                    inbox.on_over = begin(self.observer, begun)
                router.register(inbox)
                streams.append(RequestStream(new.request_id, inbox, router, self._abort, options.label, new.prompt))
            add = ins.AddRequests(tuple(news), view.epoch, router.stream_back, None, options.when_full)
            try:
                fits = await self._call(functools.partial(_addressed, add))
            except BaseException:
                for stream in streams:
                    stream.withdraw()
                raise
            if fits:
                return view, streams
            for stream in streams:  # another model was loaded meanwhile: prepare for that one
                stream.withdraw()


def _config(config: EngineConfig | str) -> EngineConfig:
    if isinstance(config, str):
        return EngineConfig.from_json(config)
    if not isinstance(config, EngineConfig):
        raise ConfigError(f"config is {config!r:.80}; expected EngineConfig(...) or its JSON")
    return config


def _check_options(options: object) -> None:
    if not isinstance(options, RequestOptions):
        raise InvalidRequestError(f"options is {options!r:.80}; expected RequestOptions(...)")


def _prompts(prompts: Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, (str, bytes, Mapping)) or not isinstance(prompts, Iterable):
        raise InvalidRequestError(f"prompts is {prompts!r:.80}; expected a list of prompts")
    return list(prompts)


def _operation(prompt: Prompt | Conversation | StreamedPrompt, embedding: EmbeddingOptions | None) -> Operation:
    if embedding is not None:
        return "embeddings"
    return "chat" if isinstance(prompt, Conversation) else "text_completion"


def _addressed(add: ins.AddRequests, reply_to: ReplyTo) -> ins.AddRequests:
    return dataclasses.replace(add, reply_to=reply_to)


def _name(field: str, value: object) -> str:
    if not isinstance(value, str):
        raise InvalidRequestError(f"{field} is {value!r:.80}; expected a string")
    return value


def _reusable(prompt: Prompt | Conversation) -> Prompt | Conversation:
    """A prompt that can be read twice: iterators cannot."""
    if isinstance(prompt, (str, Conversation, Sequence)) or not hasattr(prompt, "__next__"):
        return prompt
    return list(prompt)


class _DefaultLoader:
    """Loads with transformers, which is imported on the loader's thread: making an engine costs the loop nothing."""

    def check(self, config: EngineConfig, current: LoadedModel | None) -> LoadPlan:
        from asyncengine.model.loader import TransformersLoader

        return TransformersLoader().check(config, current)

    def load(self, plan: LoadPlan) -> LoadedModel:
        from asyncengine.model.loader import TransformersLoader

        loaded = TransformersLoader().load(plan)
        try:
            delivery.use_compiled()
        except BuildError as error:
            return dataclasses.replace(loaded, notes=(*loaded.notes, f"tokens are delivered by Python code: {error}"))
        return loaded


def _shut_down(thread: StepThread) -> None:
    if thread.alive:
        try:
            thread.queue.put(ins.Shutdown())
        except EngineClosedError:
            pass
