"""``asyncengine chat``, from a pipe and in a terminal."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from asyncengine.testing import pieces_of
from tests.cli.programs import APP, ENVIRONMENT, last_line, run, scripted_loader, terminal

posix = pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals")


def test_every_line_of_a_pipe_is_a_question() -> None:
    done = run("chat", stdin="hello\n\nworld\n")
    assert done.status == 0
    assert done.out == "hello\nworld\n"
    assert "tiny loaded in" in done.err


def test_the_conversation_goes_on_until_it_is_reset() -> None:
    prompts: list[str] = []

    def remember(prompt: list[int], branch: int) -> bytes:
        prompts.append(bytes(prompt).decode())
        return last_line(prompt, branch)

    loader = scripted_loader(script=remember)  # type: ignore[arg-type]
    run("chat", "--system", "be brief", stdin="one\ntwo\n/reset\nthree\n/exit\nfour\n", loader=loader)
    assert prompts == [
        "system: be brief\nuser: one\nassistant: ",
        "system: be brief\nuser: one\nassistant: one\nuser: two\nassistant: ",
        "system: be brief\nuser: three\nassistant: ",
    ]


def test_an_answer_that_is_cut_off_says_so() -> None:
    assert run("chat", "--max-tokens", "3", stdin="hello\n").out == "hel [cut off: the limit is reached]\n"


def test_a_question_that_fails_is_an_error_and_the_next_one_is_answered() -> None:
    done = run("chat", "--max-model-len", "40", stdin=f"{'x' * 50}\nhello\n")
    assert done.status == 1
    assert done.out == "hello\n"
    assert "the prompt has 68 tokens; allowed: 1..39" in done.err


def test_images_go_before_the_first_question_of_each_conversation(tmp_path: Path) -> None:
    files = {"sea": b"a picture of the sea", "sky": b"and one of the sky"}
    shown = {data: bytes([first]) for first, data in enumerate(files.values(), ord("A"))}
    prompts: list[str] = []

    def look(prompt: list[int], branch: int) -> bytes:
        left = [*prompt]
        for data, letter in shown.items():
            pieces = pieces_of(data)
            if pieces[0] in left:
                at = left.index(pieces[0])
                assert left[at : at + len(pieces)] == pieces
                left[at : at + len(pieces)] = letter
        prompts.append(bytes(left).decode())
        return last_line(left, branch)

    flags = ["--max-model-len", "100"]
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        flags += ["--image", str(tmp_path / name)]
    loader = scripted_loader(script=look, takes_images=True)  # type: ignore[arg-type]
    done = run("chat", *flags, stdin=f"{'x' * 90}\none\ntwo\n/reset\nthree\n", loader=loader)
    assert "the prompt has" in done.err  # the first question, which is too long
    assert prompts == [
        "user: ABone\nassistant: ",
        "user: ABone\nassistant: ABone\nuser: two\nassistant: ",
        "user: ABthree\nassistant: ",
    ]


def test_audio_and_videos_go_before_the_first_question_behind_images(tmp_path: Path) -> None:
    image, audio, video = b"a picture", b"a sound", b"a film"
    prompts: list[list[int]] = []

    def listen(prompt: list[int], branch: int) -> bytes:
        prompts.append(list(prompt))
        return b"yes"

    flags = []
    for flag, data in (("--video", video), ("--audio", audio), ("--image", image)):
        (tmp_path / flag).write_bytes(data)
        flags += [flag, str(tmp_path / flag)]
    loader = scripted_loader(script=listen, takes_images=True, takes_audio=True, takes_videos=True)  # type: ignore[arg-type]
    assert run("chat", *flags, stdin="one\n", loader=loader).out == "yes\n"
    seen = [*pieces_of(image), *pieces_of(audio, "audio"), *pieces_of(video, "video")]
    assert prompts == [[*b"user: ", *seen, *b"one\nassistant: "]]


def test_images_are_looked_at_before_the_first_question(tmp_path: Path) -> None:
    loader = scripted_loader()
    missing = tmp_path / "missing.png"
    done = run("chat", "--image", str(missing), loader=loader)
    assert done.status == 2 and done.err == f"asyncengine: --image is {str(missing)!r}; No such file or directory\n"
    assert not loader.models
    there = tmp_path / "there.png"
    there.write_bytes(b"a picture")
    done = run("chat", "--image", str(there), stdin="hello\n", loader=loader)
    assert done.status == 1 and done.out == ""
    assert (
        last_error(done.err) == "the prompt has images; the model takes none: its checkpoint has no encoder of images"
    )


def last_error(err: str) -> str:
    return err.splitlines()[-1].removeprefix("asyncengine: ")


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [("--temperature", "-1", "--temperature (temperature) is -1.0"), ("--top-p", "2", "--top-p (top_p) is 2.0")],
)
def test_a_wrong_setting_is_refused_before_anything_is_loaded(flag: str, value: str, said: str) -> None:
    loader = scripted_loader()
    wrong = run("chat", flag, value, loader=loader)
    assert wrong.status == 1 and said in wrong.err
    assert not loader.models


def test_a_model_that_cannot_be_loaded_is_one_line() -> None:
    loader = scripted_loader()
    loader.load_errors["tiny"] = RuntimeError("the disk is gone")
    wrong = run("chat", stdin="hello\n", loader=loader)
    assert wrong.status == 1
    assert wrong.err.count("\n") == 1 and "the disk is gone" in wrong.err


@posix
def test_ctrl_c_stops_the_answer_and_not_the_program() -> None:
    with terminal("chat", step_seconds=0.05) as chat:
        chat.until("leaves, Ctrl-C stops an answer.\n")
        chat.until("> ")
        chat.type("x" * 60 + "\n")
        chat.until("x" * 60 + "\n")
        chat.until("xxx")  # it answers
        chat.type("\x03")
        assert len(chat.until(" [stopped]\n")) < 50
        chat.until("> ")
        chat.type("and now\n")
        chat.until("and now\n")
        chat.until("and now\n")
        chat.until("> ")
        # Where nothing is answered, it only says how to leave. Between the prompt and the reading it may go unheard.
        while "/exit or Ctrl-D leaves" not in chat.text:
            chat.type("\x03")
            chat.read(2.0)
        chat.until("/exit or Ctrl-D leaves")
        chat.until("> ")
        chat.type("/reset\n")
        chat.until("begins anew")
        chat.type("/what\n")
        chat.until("There is no /what.")
        chat.type("/exit\n")
        assert chat.ended() == 0
        assert "Traceback" not in chat.text


@posix
def test_ctrl_d_leaves_and_loading_shows_in_place() -> None:
    with terminal("chat", step_seconds=0) as chat:
        assert "\r\x1b[Ktiny: " in chat.until("tiny loaded in")
        chat.until("> ")
        chat.type("\x04")
        assert chat.ended() == 0


def test_with_the_embedded_model() -> None:
    """As a process of its own it is run with the wheel."""
    flags = ["--temperature", "0", "--max-num-seqs", "2"]
    done = CliRunner().invoke(APP, ["chat", *flags], input="What is 7 + 8?\n", catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    assert done.stdout == "7 + 8 = 15.\n"
    assert "tiny loaded in " in done.stderr and "2 sequences" in done.stderr


def test_ctrl_c_while_it_loads_ends_the_program() -> None:
    program = (
        "import threading\n"
        "from asyncengine.cli import main\n"
        "from tests.cli.programs import scripted_loader\n"
        "loader = scripted_loader()\n"
        "class Gate(threading.Event):\n"
        "    def wait(self, timeout=None):\n"
        "        print('loading', flush=True)\n"
        "        return super().wait(timeout)\n"
        "loader.gate = Gate()  # which never opens\n"
        "main(loader)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-c", program, "chat"],
        env=ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "loading\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130
        assert process.stderr.read() == "asyncengine: interrupted\n"
