"""``asyncengine bench``: in process, over HTTP, in both loops; what it reports and draws."""

from __future__ import annotations

import asyncio
import json
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from asyncengine.cli.command import Failure
from asyncengine.cli.figures import Figures, percentile
from asyncengine.cli.plot import Panel, draw, ticks
from asyncengine.cli.targets import HttpTarget
from asyncengine.cli.workload import Sample, Workload
from asyncengine.generation import GenerationConfig
from tests.cli.programs import last_line, run, scripted_loader

# Steps take their time: else a reader may find all tokens of a request at once, and nothing is between two of them.
LONG = scripted_loader(0.001, lambda prompt, branch: b"a" * 300)


def figures(text: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(text.splitlines()[-1])
    return found


class Clockwork:
    """A target that takes no time, and notes how many requests were under way."""

    def __init__(self, turns: int = 3, fail: str | None = None) -> None:
        self.most = self.active = 0
        self.asked: list[tuple[float, str]] = []
        self._turns = turns
        self._fail = fail

    async def ask(self, prompt: str, sample: Sample) -> None:
        self.active += 1
        self.most = max(self.most, self.active)
        self.asked.append((time.perf_counter(), prompt))
        for _ in range(self._turns):
            await asyncio.sleep(0)
            sample.came(2)
        sample.tokens, sample.prompt_tokens = 2 * self._turns, 5
        self.active -= 1
        if self._fail is not None and self._fail in prompt:
            raise RuntimeError("no")


async def test_a_closed_loop_keeps_so_many_under_way() -> None:
    target, ended = Clockwork(), []
    samples = await Workload(20, 4, 3, None, 0).run(target, lambda: ended.append(1))
    assert target.most == 3 and len(samples) == len(ended) == 20
    assert all(sample.tokens == 6 and len(sample.gaps) == 4 for sample in samples)


async def test_an_open_loop_sends_at_its_times_whatever_is_under_way() -> None:
    workload = Workload(30, 4, 1, 400.0, 0)
    target = Clockwork(turns=200)
    begun = time.perf_counter()
    samples = await workload.run(target, lambda: None)
    sent = [at - begun for at, _ in target.asked]
    assert all(at >= due for at, due in zip(sent, workload.arrivals(), strict=True))
    arrived = [sample.arrived - samples[0].arrived for sample in samples]
    due = [at - workload.arrivals()[0] for at in workload.arrivals()]
    assert arrived == pytest.approx(due)


def test_the_same_seed_gives_the_same_workload() -> None:
    one, same, other = (Workload(2000, 4, 1, 50.0, seed) for seed in (1, 1, 2))
    assert one.prompts() == same.prompts() != other.prompts()
    assert one.arrivals() == same.arrivals() != other.arrivals()
    assert all(len(prompt.split()) == 4 for prompt in one.prompts())
    gaps = [after - before for before, after in zip(one.arrivals(), one.arrivals()[1:], strict=False)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(1 / 50, rel=0.1)
    assert sum(gap > mean for gap in gaps) / len(gaps) == pytest.approx(0.368, abs=0.04)  # exponential


async def test_a_request_that_fails_is_counted_and_disturbs_no_other() -> None:
    workload = Workload(10, 4, 2, None, 0)
    bad = workload.prompts()[3]
    samples = await workload.run(Clockwork(fail=bad), lambda: None)
    summed = Figures.of(samples)
    assert (summed.requests, summed.errors) == (9, ["no"])
    assert summed.tokens == 9 * 6


def sample(arrived: float, times: list[tuple[float, int]], ended: float) -> Sample:
    return Sample(arrived, times, sum(count for _, count in times), 3, ended)


def test_figures_are_what_they_say() -> None:
    summed = Figures.of([sample(10.0, [(11.0, 1), (12.0, 2)], 12.5), sample(11.0, [(11.5, 1), (14.5, 1)], 15.0)])
    assert summed.first_token == [0.5, 1.0]
    assert summed.inter_token == [0.5, 0.5, 3.0]
    assert summed.end_to_end == [2.5, 4.0]
    assert (summed.seconds, summed.tokens, summed.prompt_tokens) == (5.0, 5, 6)
    assert summed.json()["ttft_ms"] == {"mean": 750.0, "p50": 500.0, "p90": 1000.0, "p95": 1000.0, "p99": 1000.0}
    assert summed.json()["tokens_per_second"] == 1.0


@pytest.mark.parametrize(("percent", "value"), [(50, 50), (99, 99), (1, 1), (100, 100), (0, 1)])
def test_percentiles_are_values_that_occurred(percent: float, value: int) -> None:
    assert percentile(list(range(1, 101)), percent) == value


def test_the_plot_shows_each_distribution_within_its_panel() -> None:
    samples = [sample(0.0, [(0.01 * n, 1), (0.02 * n, 1)], 0.03 * n) for n in range(1, 50)]
    svg = ElementTree.fromstring(draw(Figures.of(samples), "a <model> & more"))
    space = "{http://www.w3.org/2000/svg}"
    assert svg.findtext(f"{space}title") == "a <model> & more"
    curves = [path for path in svg.iter(f"{space}path") if path.get("stroke-width") == "2"]
    assert len(curves) == 4
    for curve, (left, top) in zip(curves, ((70, 80), (510, 80), (70, 360), (510, 360)), strict=True):
        for point in (curve.get("d") or "")[1:].split("L"):
            x, y = map(float, point.split())
            assert left <= x <= left + 360 and top <= y <= top + 200
    texts = [text.text for text in svg.iter(f"{space}text")]
    assert "p50 250" in texts and "p99 490" in texts


@pytest.mark.parametrize(("value", "anchor"), [(5.0, None), (900.0, "end")])
def test_the_name_of_a_mark_stands_within_the_panel(value: float, anchor: str | None) -> None:
    parts = "".join(Panel((70, 80), "ms", "%", [(0.0, 0.0), (1000.0, 100.0)]).draw([("p50", value)]))
    [name] = [text for text in ElementTree.fromstring(f"<svg>{parts}</svg>").iter("text") if "p50" in (text.text or "")]
    assert name.get("text-anchor") == anchor and float(name.get("x") or 0) > 70


def test_the_name_of_a_mark_does_not_stand_on_the_curve() -> None:
    values = [(float(n), float(n)) for n in range(101)]
    parts = "".join(Panel((70, 80), "ms", "%", values, 100.0).draw([("p50", 50.0), ("p99", 99.0)]))
    found = ElementTree.fromstring(f"<svg>{parts}</svg>")
    p50, p99 = [text for text in found.iter("text") if (text.text or "").startswith("p")]
    half_way = 80 + 200 / 2
    assert float(p50.get("x") or 0) > 70 + 360 / 2 and float(p50.get("y") or 0) - 12 > half_way
    assert float(p99.get("y") or 0) - 12 > half_way and p99.get("text-anchor") == "end"
    assert p50.get("paint-order") == "stroke" and list(found)[-1] is p99  # over the lines, with a rim of its own


def test_a_plot_of_nothing_is_a_plot() -> None:
    ElementTree.fromstring(draw(Figures.of([]), "nothing"))


@pytest.mark.parametrize("most", [1e-6, 0.03, 1, 7, 100, 123456])
def test_ticks_are_few_and_round(most: float) -> None:
    found = ticks(most)
    assert found[0] == 0 and 4 <= len(found) <= 9 and found[-1] <= most * (1 + 1e-9)
    assert f"{found[1]:e}"[0] in "125"


def test_measures_the_engine_in_process(tmp_path: Path) -> None:
    plot = tmp_path / "plot.svg"
    arguments = ("bench", "--num-prompts", "12", "--concurrency", "4", "--max-tokens", "16", "--plot", str(plot))
    done = run(*arguments, loader=LONG)
    assert done.status == 0, done.err
    found = figures(done.out)
    assert found["requests"] == 12 and found["failed"] == 0
    assert found["completion_tokens"] == 12 * 16
    assert found["loop"] == "closed" and found["concurrency"] == 4 and found["target"] == "in process"
    assert found["ttft_ms"]["p50"] <= found["e2e_ms"]["p50"] <= found["e2e_ms"]["p99"]
    assert "tiny, in process, 4 at a time" in plot.read_text()
    rows = [line.split()[0:2] for line in done.out.splitlines() if line.startswith(("first", "inter", "end"))]
    assert [row[0] for row in rows] == ["first", "inter-token", "end"]


def test_the_end_of_a_text_does_not_shorten_an_answer() -> None:
    done = run("bench", "--num-prompts", "2", "--prompt-words", "1", "--max-tokens", "40", "--endpoint", "completions")
    assert figures(done.out)["completion_tokens"] == 80


def test_measures_a_server_in_an_open_loop(guarded: str) -> None:
    common = ("bench", "--url", f"{guarded}/v1", "--num-prompts", "10", "--max-tokens", "8")
    done = run(*common, "--rate", "200", "--api-key", "secret", loader=LONG)
    assert done.status == 0, done.err + done.out
    found = figures(done.out)
    assert found["model"] == "mine" and found["target"] == guarded
    assert found["loop"] == "open" and found["rate"] == 200
    assert found["completion_tokens"] == 80 and found["prompt_tokens"] > 0
    refused = run(*common)
    assert refused.status == 1 and "/v1/models answers 401" in refused.err
    wrong = run(*common[:1], "other", *common[1:], "--api-key", "secret")
    assert wrong.status == 1 and "/v1/chat/completions answers 404" in wrong.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rate", "0"], "--rate is 0.0; expected requests per second > 0"),
        (["--url", "ftp://here"], "the URL is 'ftp://here'; expected http://HOST:PORT"),
        (["--url", "http://127.0.0.1:1"], "http://127.0.0.1:1 cannot be reached"),
        (["--rate", "inf"], "--rate is inf; expected requests per second > 0"),
        (["--plot", "no/such/place.svg"], "--plot is 'no/such/place.svg'; there is no directory 'no/such'"),
        (["--plot", "/"], "--plot is '/'; it is a directory; expected a file"),
        (["--concurrency", "0"], "--concurrency"),
        (["--concurrency", "2", "--rate", "3"], "--concurrency is given, and --rate"),
        (["--api-key", "secret"], "--api-key is given, without --url"),
        (["--url", "http://127.0.0.1:1", "--max-num-seqs", "2"], "--max-num-seqs is given, and --url"),
    ],
)
def test_wrong_input_is_one_line(arguments: list[str], said: str) -> None:
    wrong = run("bench", *arguments)
    assert wrong.status in (1, 2) and said in wrong.err


def test_requests_that_fail_are_reported() -> None:
    def sometimes(prompt: list[int], branch: int) -> bytes:
        if sometimes.calls == 3:  # type: ignore[attr-defined]
            sometimes.calls += 1  # type: ignore[attr-defined]
            raise RuntimeError("a fault")
        sometimes.calls += 1  # type: ignore[attr-defined]
        return last_line(prompt, branch)

    sometimes.calls = 0  # type: ignore[attr-defined]
    done = run("bench", "--num-prompts", "8", "--max-tokens", "2", loader=scripted_loader(script=sometimes))  # type: ignore[arg-type]
    assert done.status == 1
    found = figures(done.out)
    assert (found["requests"], found["failed"]) == (7, 1)
    assert "first error: " in done.out


def answering(handle: Callable[[dict[str, Any]], httpx.Response]) -> HttpTarget:
    transport = httpx.MockTransport(lambda request: handle(json.loads(request.content)))
    client = httpx.AsyncClient(transport=transport, base_url="http://there")
    return HttpTarget(client, "m", GenerationConfig(max_tokens=3, temperature=0.5), "chat")


STREAM = 'data: {"choices": [{"delta": {"role": "assistant", "content": ""}}]}\n\n' + "".join(
    f'data: {{"choices": [{{"delta": {{"content": "{word}"}}}}]}}\n\n' for word in ("one", "two")
)


async def test_a_server_that_refuses_our_own_fields_is_measured_without_them() -> None:
    bodies: list[dict[str, Any]] = []

    def handle(body: dict[str, Any]) -> httpx.Response:
        bodies.append(body)
        if "ignore_eos" in body:
            return httpx.Response(400, json={"error": {"message": "unknown field"}})
        return httpx.Response(200, text=STREAM + "data: [DONE]\n\n")

    target = answering(handle)
    await target.settle("hello")
    found = Sample(0.0)
    await target.ask("hello", found)
    assert len(bodies) == 3 and "stream_options" in bodies[-1]
    assert bodies[-1]["max_tokens"] == 3 and bodies[-1]["temperature"] == 0.5
    assert found.tokens == 2  # its events, as it does not tell


@pytest.mark.parametrize("usage", ['{"total_tokens": 9}', '{"completion_tokens": null, "prompt_tokens": 7}'])
async def test_a_server_whose_usage_says_little_has_its_events_counted(usage: str) -> None:
    text = f'{STREAM}data: {{"choices": [], "usage": {usage}}}\n\ndata: [DONE]\n\n'
    found = Sample(0.0)
    await answering(lambda body: httpx.Response(200, text=text)).ask("hello", found)
    assert found.tokens == 2


async def test_an_error_within_a_stream_is_a_failure() -> None:
    target = answering(lambda body: httpx.Response(200, text=STREAM + 'data: {"error": {"message": "lost"}}\n\n'))
    with pytest.raises(Failure, match="lost"):
        await target.ask("hello", Sample(0.0))
