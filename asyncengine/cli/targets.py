"""What `asyncengine bench` measures: an engine in this process, or any server that speaks OpenAI's API."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from asyncengine.cli.command import Failure
from asyncengine.cli.remote import events, problem
from asyncengine.cli.workload import Sample
from asyncengine.generation import GenerationConfig

if TYPE_CHECKING:
    import httpx

    from asyncengine.loop.engine import AsyncEngine
    from asyncengine.loop.prepare import RequestOptions

Endpoint = Literal["chat", "completions"]


class EngineTarget:
    """An engine in this process."""

    def __init__(
        self, engine: AsyncEngine, config: GenerationConfig, endpoint: Endpoint, options: RequestOptions
    ) -> None:
        self._engine = engine
        self._config = config.replace(ignore_eos=True)
        self._options = options
        self._endpoint = endpoint

    async def ask(self, prompt: str, sample: Sample) -> None:
        """As `Target`."""
        if self._endpoint == "chat":
            pending = self._engine.chat([{"role": "user", "content": prompt}], self._config, self._options)
        else:
            pending = self._engine.stream(prompt, self._config, self._options)
        async with pending as stream:
            async for output in stream:
                if output.token_ids:
                    sample.came(len(output.token_ids))
        assert stream.usage is not None
        sample.tokens, sample.prompt_tokens = stream.usage.completion_tokens, stream.usage.prompt_tokens


class HttpTarget:
    """A server that speaks OpenAI's API. An event counts as one token; the sum is the server's own, if it tells."""

    def __init__(self, client: httpx.AsyncClient, model: str, config: GenerationConfig, endpoint: Endpoint) -> None:
        self._client = client
        self._endpoint = endpoint
        self._body: dict[str, Any] = {
            "model": model,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
        }
        for name in ("max_tokens", "temperature", "top_p", "seed"):
            if getattr(config, name) is not None:
                self._body[name] = getattr(config, name)
        if config.num_beams > 1:
            self._body["num_beams"] = config.num_beams

    async def settle(self, prompt: str) -> None:
        """Finds out, with one request that is not counted, which fields the server takes.

        Raises:
            Failure: It takes none of the forms that are tried.
        """
        wrong: Failure | None = None
        for left_out in ((), ("ignore_eos",), ("ignore_eos", "stream_options")):
            for name in left_out:
                self._body.pop(name, None)
            try:
                return await self.ask(prompt, Sample(0.0))
            except Failure as error:
                wrong = wrong or error
        assert wrong is not None
        raise wrong

    async def ask(self, prompt: str, sample: Sample) -> None:
        """As `Target`."""
        if self._endpoint == "chat":
            path, asked = "/v1/chat/completions", {"messages": [{"role": "user", "content": prompt}]}
        else:
            path, asked = "/v1/completions", {"prompt": prompt}  # type: ignore[dict-item]
        async with self._client.stream("POST", path, json=self._body | asked) as response:
            if response.status_code != 200:
                await response.aread()
                raise Failure(f"{path} answers {response.status_code}: {problem(response)}")
            async for event in events(response):
                if any(_has_text(choice) for choice in event.get("choices") or ()):
                    sample.came(1)
                usage = event.get("usage")
                if usage:
                    sample.tokens = usage.get("completion_tokens") or 0
                    sample.prompt_tokens = usage.get("prompt_tokens") or 0
        sample.tokens = sample.tokens or len(sample.deltas)


def _has_text(choice: dict[str, Any]) -> bool:
    delta = choice.get("delta") or {}
    return bool(choice.get("text") or delta.get("content") or delta.get("reasoning_content") or delta.get("tool_calls"))
