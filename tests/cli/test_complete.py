"""``asyncengine complete``: order, errors per line, JSON lines."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from typing import Any

import pytest

from asyncengine.testing import pieces_of
from tests.cli.programs import ENVIRONMENT, command, run, scripted_loader, terminal


def entries(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_lines_are_answered_in_their_order() -> None:
    prompts = ["x" * (1 + 37 * index % 11) for index in range(40)]  # which end in another order
    done = run("complete", "--max-num-seqs", "4", stdin="\n".join(prompts))
    assert done.status == 0
    assert done.out.splitlines() == prompts


def test_nothing_in_is_nothing_out() -> None:
    done = run("complete", stdin="\n\n")
    assert (done.status, done.out, done.err) == (0, "", "")  # no model is loaded for it


def test_a_line_that_fails_is_empty_and_the_exit_status_says_so() -> None:
    done = run("complete", "--max-model-len", "10", stdin=f"one\n{'x' * 11}\nthree\n")
    assert done.status == 1
    assert done.out == "one\n\nthree\n"
    assert "asyncengine: line 2: the prompt has 11 tokens" in done.err


def test_json_lines_carry_their_own_settings() -> None:
    lines: list[Any] = [
        {"prompt": "hello", "id": 7},
        {"messages": [{"role": "user", "content": "hi"}], "n": 2},
        {"prompt": "hello", "max_tokens": 2, "id": "short"},
        {"prompt": [104, 105]},
    ]
    done = run("complete", "--jsonl", "--max-tokens", "4", stdin="\n".join(map(json.dumps, lines)))
    assert done.status == 0
    usage = {"prompt_tokens": 5, "completion_tokens": 4}
    assert entries(done.out) == [
        {"index": 0, "id": 7, "text": "hell", "finish_reason": "length", "usage": usage},
        {
            "index": 1, "text": "hi", "finish_reason": "stop", "texts": ["hi", "hi"],
            "usage": {"prompt_tokens": 20, "completion_tokens": 6},
        },
        {"index": 2, "id": "short", "text": "he", "finish_reason": "length", "usage": usage | {"completion_tokens": 2}},
        {"index": 3, "text": "hi", "finish_reason": "stop", "usage": {"prompt_tokens": 2, "completion_tokens": 3}},
    ]  # fmt: skip


def test_messages_of_json_lines_may_have_images() -> None:
    url = "data:image/png;base64,AAAA"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "hi"}]
    line = json.dumps({"messages": [{"role": "user", "content": parts}]})
    seen: list[list[int]] = []

    def look(prompt: list[int], branch: int) -> bytes:
        seen.append(prompt)
        return b"a sea"

    done = run("complete", "--jsonl", stdin=line, loader=scripted_loader(script=look, takes_images=True))  # type: ignore[arg-type]
    assert [entry["text"] for entry in entries(done.out)] == ["a sea"]
    assert seen == [[*b"user: ", *pieces_of(url), *b"hi\nassistant: "]]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("hello", "the line is not JSON"),
        ("[1]", "the line is a JSON list; expected an object"),
        ("{}", "expected one of 'prompt' and 'messages'"),
        ('{"prompt": "x", "messages": []}', "expected one of 'prompt' and 'messages'"),
        ('{"prompt": ""}', "the prompt is ''"),
        ('{"prompt": 3}', "the prompt is 3; expected a string or token ids"),
        ('{"prompt": [300]}', "token id 300; allowed: 0..256"),
        ('{"messages": "hello"}', "messages is 'hello'"),
        ('{"messages": [3]}', "messages has 3"),
        ('{"prompt": "x", "temprature": 1}', "did you mean 'temperature'?"),
        ('{"prompt": "x", "temperature": "hot"}', "temperature is 'hot'"),
        ('{"prompt": "x", "logit_bias": 3}', "logit_bias is 3"),
        ('{"prompt": "x", "stop_token_ids": ["a"]}', "stop_token_ids"),
    ],
)
def test_a_wrong_line_is_an_error_in_its_place(line: str, said: str) -> None:
    done = run("complete", "--jsonl", stdin=f'{line}\n{{"prompt": "fine"}}\n')
    assert done.status == 1
    wrong, fine = entries(done.out)
    assert wrong["index"] == 0 and wrong["error"]["type"] == "InvalidRequestError"
    assert said in wrong["error"]["message"]
    assert fine["text"] == "fine"


def test_a_bar_moves_in_a_terminal_and_nowhere_else() -> None:
    assert "completing" not in run("complete", stdin="one\ntwo\n").err
    if sys.platform != "win32":
        with terminal("complete", step_seconds=0) as complete:
            complete.until("Prompts, one per line; Ctrl-D ends them.")
            complete.type("one\ntwo\n\x04")
            complete.until("2/2")
            assert complete.ended() == 0


def test_ctrl_c_ends_it() -> None:
    with subprocess.Popen(
        command("complete", step_seconds=0.05),
        env=ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        process.stdin.write("short\n" + "x" * 3000 + "\n")
        process.stdin.close()
        assert process.stdout.readline() == "short\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130
        assert "asyncengine: interrupted" in process.stderr.read()


def test_a_reader_that_goes_away_ends_it_quietly() -> None:
    with subprocess.Popen(
        command("complete", step_seconds=0.01),
        env=ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        process.stdin.write("".join(f"{'x' * count}\n" for count in range(1, 60)))
        process.stdin.close()
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(timeout=30) == 1
        assert "Traceback" not in process.stderr.read()


def test_only_an_end_of_line_ends_a_line() -> None:
    lines = [json.dumps({"prompt": f"a{mark}b"}, ensure_ascii=False) for mark in ("\u2028", "\x85", "\u00e9")]
    done = run("complete", "--jsonl", stdin="\ufeff" + "\r\n".join(lines))
    assert done.status == 0, done.out
    assert [json.loads(line)["text"] for line in done.out.split("\n")[:-1]] == ["a\u2028b", "a\x85b", "a\u00e9b"]


def test_what_is_no_character_is_an_error_of_its_line_alone() -> None:
    lines = ['{"prompt": "\\ud800"}', '{"prompt": "fine", "id": "\\ud800"}', '{"prompt": "fine"}']
    done = run("complete", "--jsonl", stdin="\n".join(lines))
    assert done.status == 1
    wrong, strange, fine = entries(done.out)
    assert "surrogates not allowed" in wrong["error"]["message"]
    assert strange["id"] == "\ud800" and strange["text"] == fine["text"] == "fine"


@pytest.mark.parametrize("name", ["complete", pytest.param("chat", marks=pytest.mark.long)])
def test_bytes_that_are_no_text_are_an_error_of_their_line_alone(name: str) -> None:
    done = subprocess.run(
        command(name, step_seconds=0), input=b"one\n\n\xff\xfe\nthree\n", capture_output=True, timeout=60, check=False,
        env=ENVIRONMENT | {"PYTHONIOENCODING": "utf-8:strict"},
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stdout.split() == [b"one", b"three"]
    assert b"surrogates not allowed" in done.stderr and b"Traceback" not in done.stderr
    assert name == "chat" or b"asyncengine: line 3: " in done.stderr
