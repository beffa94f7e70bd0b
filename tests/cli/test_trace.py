"""``asyncengine trace``: what is recorded, and that the page shows it."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx
import pytest

from asyncengine.cli.command import Failure
from asyncengine.cli.timeline import page
from asyncengine.cli.trace import read_trace
from tests.cli.programs import run
from tests.server.test_page import browser

__all__ = ["browser"]


class Script(HTMLParser):
    """The data of a page, as a browser would find it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.inside = False
        self.data = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.inside = ("id", "data") in attributes

    def handle_endtag(self, tag: str) -> None:
        self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.data += data


def test_records_in_process_and_writes_both_files(tmp_path: Path) -> None:
    done = run("trace", "--num-prompts", "5", "--concurrency", "2", "--max-tokens", "4", "--out", str(tmp_path / "t"))
    assert done.status == 0, done.err
    recorded = json.loads((tmp_path / "t.json").read_text())
    names = {event["name"] for event in recorded["traceEvents"]}
    assert {"step", "model", "request", "first token"} <= names
    ended = [event for event in recorded["traceEvents"] if event["ph"] == "e"]
    assert [event["args"]["completion_tokens"] for event in ended] == [4] * 5
    assert done.out.startswith("5 requests, ")
    html = (tmp_path / "t.html").read_text()
    assert json.loads(Script(html).data) == {"title": "tiny, in process", "trace": recorded}
    assert not re.search(r"https?://|innerHTML|eval\(", html)


def test_nothing_in_the_data_ends_the_script() -> None:
    trace = {"traceEvents": [{"name": "</script><script>alert(1)</script><!--"}]}
    found = Script(page(trace, "</title><b>"))
    assert json.loads(found.data) == {"title": "</title><b>", "trace": trace}


def test_reads_a_server_s(guarded: str, tmp_path: Path) -> None:
    common = ("trace", "--url", guarded, "--out", str(tmp_path / "t"))
    nothing = run(*common, "--api-key", "secret")
    assert nothing.status == 1 and "has recorded nothing; --seconds 10 records" in nothing.err
    refused = run(*common)
    assert refused.status == 1 and "/admin/trace answers 401" in refused.err
    with httpx.Client(base_url=guarded, headers={"authorization": "Bearer secret"}, trust_env=False) as client:
        client.post("/admin/trace", json={"action": "start"})
        client.post("/v1/completions", json={"prompt": "hello"})
    done = run(*common, "--api-key", "secret")
    assert done.status == 0 and done.out.startswith("1 requests, ")
    empty = run(*common, "--api-key", "secret", "--seconds", "0")  # which begins anew
    assert empty.status == 1 and "the server had no requests for 0 seconds" in empty.err


def test_a_server_without_the_route_is_told_apart(address: str, tmp_path: Path) -> None:
    wrong = run("trace", "--url", address, "--out", str(tmp_path / "t"))
    assert wrong.status == 1 and "start it with --admin and --api-key" in wrong.err


@pytest.mark.parametrize("body", [{"text": "<html>"}, {"json": []}, {"json": {"traceEvents": 3}}])
def test_another_kind_of_server_is_told_apart(body: Any) -> None:
    with pytest.raises(Failure, match="another kind of server"):
        read_trace(httpx.Response(200, **body))


def test_a_directory_that_is_not_there_is_refused_before_anything_is_recorded(tmp_path: Path) -> None:
    wrong = run("trace", "--out", str(tmp_path / "no" / "t"))
    assert wrong.status == 2 and "there is no directory" in wrong.err


def test_a_name_that_no_file_can_have_is_refused_before_anything_is_recorded(tmp_path: Path) -> None:
    assert "expected the name of a file" in run("trace", "--out", "/").err
    (tmp_path / "t.html").mkdir()
    wrong = run("trace", "--out", str(tmp_path / "t"))
    assert wrong.status == 2 and "t.html'; it is a directory; expected a file" in wrong.err


def test_the_page_shows_what_was_recorded(tmp_path: Path, browser: Any) -> None:
    run("trace", "--num-prompts", "3", "--max-tokens", "4", "--out", str(tmp_path / "t"))
    browser.get(f"file://{tmp_path / 't.html'}")
    assert browser.title == "tiny, in process"
    assert browser.find_element("id", "summary").text.startswith("3 requests, ")
    cells = [cell.text for cell in browser.find_elements("css selector", "#rows td")]
    assert len(cells) == 3 * 7 and cells[2] == "4" and cells[6] == "length"
    painted = browser.execute_script(
        "const c = at('timeline'); return c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some(v => v)"
    )
    assert painted
    box = browser.execute_script(
        "const b = boxes.find(b => b.text.startsWith('step')); return [b.x + b.width / 2, b.y + 8]"
    )
    browser.execute_script(
        "const c = at('timeline'), r = c.getBoundingClientRect(); c.dispatchEvent(new PointerEvent('pointermove',"
        " {clientX: r.left + arguments[0], clientY: r.top + arguments[1]}))",
        *box,
    )
    assert browser.find_element("id", "detail").text.startswith("step: ")
    before = browser.execute_script("return view[1] - view[0]")
    browser.find_element("id", "timeline").send_keys("+")
    assert browser.execute_script("return view[1] - view[0]") < before
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--num-prompts", "0"],
        ["--seconds", "-1"],
        ["--seconds", "1"],
        ["--url", "http://127.0.0.1:1", "--dtype", "auto"],
    ],
)
def test_wrong_numbers_and_flags_without_a_use_are_refused(arguments: list[str]) -> None:
    assert run("trace", *arguments).status == 2
