"""``asyncengine top``: a server's metrics, live."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from asyncengine.cli import remote
from asyncengine.cli.command import Failure
from asyncengine.cli.remote import ApiKey, Url

if TYPE_CHECKING:
    import httpx

_LINE = re.compile(r"^asyncengine_(\w+?)(?:\{(.*)\})? (\S+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


def top(
    url: Url = "http://127.0.0.1:8000",
    interval: Annotated[float, typer.Option(min=0.05, help="Seconds between two looks.")] = 1.0,
    count: Annotated[int | None, typer.Option(min=1, help="Looks; until Ctrl-C if not given.")] = None,
    api_key: ApiKey = None,
) -> int:
    """Watch a server: what runs and waits, KV cache, tokens/s, prefix-cache hits, latencies, loop lag.

    In a terminal the figures stay in place; elsewhere every look is a line. Rates and means are since the look before.
    """
    remote.root(url)
    from asyncengine.cli.loading import runner

    with runner() as running:
        try:
            running.run(_watch(url, api_key, interval, count))
        except KeyboardInterrupt:
            if count is not None:
                raise
    return 0


@dataclass(frozen=True, slots=True)
class Look:
    """What a server's metrics said at one time.

    Attributes:
        at: When, on this process's clock.
        values: By name without ``asyncengine_``; series that differ in labels alone are summed.
        model: The label ``model_name``.
        ended: Requests that ended, by their finish reason.
    """

    at: float
    values: dict[str, float]
    model: str = ""
    ended: dict[str, float] = field(default_factory=dict)

    @classmethod
    def read(cls, text: str, at: float) -> Look:
        """Reads Prometheus text.

        Raises:
            Failure: There are no metrics of asyncengine in it.
        """
        values: dict[str, float] = {}
        model, ended = "", {}
        for name, labels, value in _LINE.findall(text):
            if name.endswith("_bucket"):
                continue
            values[name] = values.get(name, 0.0) + float(value)
            found = dict(_LABEL.findall(labels))
            model = found.get("model_name", model)
            if name == "requests_total":
                ended[found.get("finish_reason", "")] = float(value)
        if "num_requests_running" not in values:
            raise Failure("the server's /metrics has no asyncengine_num_requests_running: it is another kind of server")
        return cls(at, values, model, ended)

    def of(self, name: str) -> float:
        """A value; 0 if it is not there."""
        return self.values.get(name, 0.0)

    def since(self, before: Look | None, name: str) -> float:
        """How much a counter grew; all of it where the server began anew meanwhile."""
        now, then = self.of(name), 0.0 if before is None else before.of(name)
        return now - then if now >= then else now

    def rate(self, before: Look | None, name: str) -> float | None:
        """How much a counter grew per second."""
        return None if before is None else self.since(before, name) / max(self.at - before.at, 1e-9)

    def mean(self, before: Look | None, name: str) -> float | None:
        """Mean of a histogram's new values, or of all if there are none."""
        for earlier in (before, None):
            count = self.since(earlier, f"{name}_count")
            if count:
                return self.since(earlier, f"{name}_sum") / count
        return None

    def rows(self, before: Look | None) -> list[tuple[str, str]]:
        """What is shown, named."""
        queries = self.since(before, "prefix_cache_queries_total")
        looked = before if queries else None
        queries = queries or self.of("prefix_cache_queries_total")
        hits = self.since(looked, "prefix_cache_hits_total") / queries if queries else None
        blocks = self.of("kv_blocks_total")
        cached = self.of("kv_blocks_cached") / blocks if blocks else 0.0
        return [
            ("running", f"{self.of('num_requests_running'):.0f}"),
            ("waiting", f"{self.of('num_requests_waiting') + self.of('num_requests_queued'):.0f}"),
            ("KV use", f"{100 * self.of('kv_cache_usage_ratio'):.1f} %"),
            ("KV cached", f"{100 * cached:.1f} %"),
            ("tokens/s", _number(self.rate(before, "generation_tokens_total"))),
            ("prompt/s", _number(self.rate(before, "prompt_tokens_total"))),
            ("hit rate", "-" if hits is None else f"{100 * hits:.0f} %"),
            ("first token", _time(self.mean(before, "time_to_first_token_seconds"))),
            ("inter-token", _time(self.mean(before, "inter_token_latency_seconds"))),
            ("step", _time(self.mean(before, "step_seconds"))),
            ("batch", _number(self.mean(before, "batch_size"))),
            ("loop lag", _time(self.mean(before, "event_loop_lag_seconds"))),
            ("preempted", f"{self.of('preemptions_total'):.0f}"),
            ("ended", f"{sum(self.ended.values()):.0f}"),
        ]


async def _watch(url: str, api_key: str | None, interval: float, count: int | None) -> None:
    import asyncio

    before: Look | None = None
    looks = 0
    async with remote.connected(url, api_key, seconds=10.0) as client:
        with _Screen(remote.root(url)) as screen:
            while count is None or looks < count:
                if looks:
                    await asyncio.sleep(interval)
                now = await _look(client)
                screen.show(now, before)
                before, looks = now, looks + 1


async def _look(client: httpx.AsyncClient) -> Look:
    from asyncengine.cli.remote import problem

    response = await client.get("/metrics")
    if response.status_code != 200:
        raise Failure(f"/metrics answers {response.status_code}: {problem(response)}")
    return Look.read(response.text, time.perf_counter())


class _Screen:
    """Where looks are shown: in place in a terminal, else a line each."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._live: Any = None
        self._headed = False

    def __enter__(self) -> _Screen:
        from rich.console import Console

        console = Console()
        if console.is_terminal and not console.is_dumb_terminal:
            from rich.live import Live

            self._live = Live(console=console, auto_refresh=False)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, now: Look, before: Look | None) -> None:
        rows = now.rows(before)
        if self._live is not None:
            self._live.update(_table(f"{now.model or 'no model'} at {self._address}", rows), refresh=True)
            return
        if not self._headed:
            self._headed = True
            print("  ".join(f"{name:>11}" for name, _ in rows))
        print("  ".join(f"{value:>11}" for _, value in rows), flush=True)


def _table(title: str, rows: list[tuple[str, str]]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left", show_header=False)
    for _ in range(4):
        table.add_column(justify="right")
    half = -(-len(rows) // 2)
    for left, right in zip(rows[:half], [*rows[half:], ("", "")], strict=False):
        table.add_row(*map(Text, (*left, *right)))
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _time(value: float | None) -> str:
    return "-" if value is None else f"{1000 * value:.2f} ms" if value < 1 else f"{value:.2f} s"
