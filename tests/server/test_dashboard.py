"""The Grafana dashboard asks for what there is; and what it shows of the event loop is what the loop does."""

from __future__ import annotations

import asyncio
import json
import re
import time
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from asyncengine import GenerationConfig
from asyncengine.testing import echo_engine
from tests.server.serving import completion, served

DASHBOARD: dict[str, Any] = json.loads((Path(__file__).parents[2] / "docs/grafana.json").read_text(encoding="utf-8"))


def samples(text: str) -> dict[str, dict[str, str]]:
    """Names of all samples, with the labels of the last of each."""
    families = text_string_to_metric_families(text)
    return {sample.name: sample.labels for family in families for sample in family.samples}


def value(text: str, name: str) -> float:
    families = text_string_to_metric_families(text)
    return next(sample.value for family in families for sample in family.samples if sample.name == name)


def block(seconds: float) -> None:
    """What nobody should do on a loop."""
    time.sleep(seconds)


async def test_every_metric_and_label_that_the_dashboard_asks_for_is_exported() -> None:
    async with served(max_concurrency=9) as client:
        await client.post("/v1/completions", json=completion("hello"))
        exported = samples((await client.get("/metrics")).text)
    queries = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    queries += [entry["query"] for entry in DASHBOARD["templating"]["list"] if entry["type"] == "query"]
    asked = {name for query in queries for name in re.findall(r"\basyncengine_\w+", query)}
    assert len(asked) > 30 and not asked - set(exported)
    for query in queries:
        [name, *_] = re.findall(r"\basyncengine_\w+", query)
        labels = re.findall(r"(?:by \(|, )([a-z_]+)\)", query) + re.findall(r"(\w+)=~", query)
        assert not set(labels) - set(exported[name]), query


def test_panels_stand_beside_each_other_and_are_told_apart() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}
    assert len(places) == len(panels)
    for panel in panels:
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])


async def test_a_loop_that_is_busy_shows_in_the_lag_and_in_the_hand_off() -> None:
    engine = echo_engine(step_seconds=0.002)
    async with served(engine) as client:
        before = value((await client.get("/metrics")).text, "asyncengine_event_loop_lag_seconds_sum")
        block(0.2)  # between two scrapes
        await asyncio.sleep(0)
        text = (await client.get("/metrics")).text
        assert value(text, "asyncengine_event_loop_lag_seconds_sum") - before > 0.1
        async with engine.stream([1] * 50, GenerationConfig(max_tokens=50)) as stream:
            await anext(stream)
            block(0.08)  # several steps post meanwhile
            await anext(stream)
        text = (await client.get("/metrics")).text
        assert value(text, "asyncengine_handoff_max_seconds") > 0.05
        assert value(text, "asyncengine_merged_deltas_total") > 0
