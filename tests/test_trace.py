from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

from asyncengine import Trace

from .step.core_case import loaded


def test_is_valid_in_the_chrome_format() -> None:
    case = loaded()
    case.core.trace.start()
    case.add("abc", request_id='quotes " and \ud800 surrogates')
    aborted = case.add("def", n=2)
    case.step(2)
    case.abort(aborted)
    case.run()
    document = json.loads(case.core.trace.to_json())
    events = document["traceEvents"]
    open_requests: set[int] = set()
    for event in events:
        assert {"ph", "pid", "tid", "name"} <= set(event)
        match event["ph"]:
            case "M":
                assert event["args"]["name"]
            case "X":
                assert event["dur"] >= 0 and event["ts"] > 0
            case "b":
                assert event["id"] not in open_requests
                open_requests.add(event["id"])
            case "n":
                assert event["id"] in open_requests and event["cat"] == "request"
            case "e":
                open_requests.remove(event["id"])
            case other:
                raise AssertionError(other)
    assert not open_requests
    assert {event["name"] for event in events} >= {"step", "model", "request", "prefill", "first token"}


def test_model_time_lies_within_its_step() -> None:
    case = loaded()
    case.core.trace.start()
    case.add("abc")
    case.run()
    events = case.core.trace.events()
    steps = [event for event in events if event["name"] == "step"]
    models = [event for event in events if event["name"] == "model"]
    for step, model in zip(steps, models, strict=True):
        assert step["ts"] <= model["ts"] and model["ts"] + model["dur"] <= step["ts"] + step["dur"] + 1e-6


def test_is_bounded_and_keeps_the_newest() -> None:
    trace = Trace(capacity=10)
    for number in range(100):
        trace.mark("n", "x", 1.0, number)
    assert len(trace) == 10
    assert [event["id"] for event in trace.events()[2:]] == list(range(90, 100))


def test_off_records_nothing_and_executes_no_line_of_it() -> None:
    case = loaded()
    lines = 0

    def tracer(frame: object, event: str, argument: object) -> object:
        nonlocal lines
        lines += frame.f_code.co_filename.endswith("asyncengine/trace.py")  # type: ignore[attr-defined]
        return None

    before = sys.gettrace()
    sys.settrace(tracer)  # type: ignore[arg-type]
    try:
        case.add("abc", n=2)
        case.run()
    finally:
        sys.settrace(before)
    assert lines == 0 and len(case.core.trace) == 0


def test_stopping_keeps_what_was_recorded() -> None:
    trace = Trace()
    trace.start()
    assert trace.enabled
    trace.mark("b", "request", 1.0, 1)
    trace.stop()
    assert not trace.enabled and len(trace) == 1
    trace.clear()
    assert len(trace) == 0


def test_is_saved_as_a_file(tmp_path: Path) -> None:
    trace = Trace()
    trace.span("step", 1.0, 2.0, tokens=3)
    trace.save(tmp_path / "trace.json")
    [*_, event] = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert (event["ts"], event["dur"], event["args"]) == (1e6, 1e6, {"tokens": 3})


def test_may_be_read_while_it_is_written() -> None:
    trace = Trace(capacity=500)

    def write() -> None:
        for number in range(20_000):
            trace.mark("n", "x", 1.0, number)

    thread = threading.Thread(target=write)
    thread.start()
    while thread.is_alive():
        ids = [event["id"] for event in trace.events()[2:]]
        assert ids == sorted(ids)
    thread.join()
