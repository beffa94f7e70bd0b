"""The command line as a user has it: in this process for most tests, as a process or in a terminal where it matters."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from typer.testing import CliRunner

from asyncengine.cli import application
from asyncengine.step.model import Loader
from asyncengine.testing import ByteTokenizer, ScriptedLoader
from asyncengine.testing.scripted import Script

APP = application()
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "FORCE_COLOR"} | {
    "OMP_NUM_THREADS": "1",
    "PYTHONUNBUFFERED": "1",
    "TERM": "dumb",
}

SCRIPTED = """
import sys
from asyncengine.cli import main
from tests.cli.programs import scripted_loader
loader = scripted_loader(float(sys.argv.pop(1)))
loader.adapters = {"x": loader.script}
main(loader)
"""


IN_TURN = """
import contextlib, io, json, sys
commands, missing = json.loads(sys.argv[1])
sys.modules.update(dict.fromkeys(missing))
from asyncengine.cli import main
for sys.argv[1:] in commands:
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as end:
        modules = sorted({name.partition(".")[0] for name, module in sys.modules.items() if module is not None})
        print(json.dumps([end.code, out.getvalue(), err.getvalue(), modules]), flush=True)
"""


def last_line(prompt: Sequence[int], branch: int) -> bytes:
    """Answers a conversation with what the user said last, and a prompt with itself."""
    text = bytes(prompt).decode()
    if not text.endswith("assistant: "):
        return text.encode()
    return text.rsplit("user: ", 1)[1].removesuffix("\nassistant: ").encode()


def scripted_loader(
    step_seconds: float = 0.0,
    script: Script = last_line,
    takes_images: bool = False,
    takes_audio: bool = False,
    takes_videos: bool = False,
) -> ScriptedLoader:
    takes = {"takes_images": takes_images, "takes_audio": takes_audio, "takes_videos": takes_videos}
    return ScriptedLoader(script, step_seconds=step_seconds, tokenizer=ByteTokenizer(), **takes)


class Done:
    """A command that has ended."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err


def run(*arguments: str, stdin: str = "", loader: Loader | None = None) -> Done:
    """Runs a command in this process."""
    result = CliRunner().invoke(APP, arguments, input=stdin, obj=loader or scripted_loader(), catch_exceptions=False)
    return Done(result.exit_code, result.stdout, result.stderr)


def command(*arguments: str, step_seconds: float | None = None) -> list[str]:
    """A command line; with a scripted model if its steps' seconds are given."""
    if step_seconds is None:
        return [sys.executable, "-W", "error", "-m", "asyncengine", *arguments]
    return [sys.executable, "-W", "error", "-c", SCRIPTED, str(step_seconds), *arguments]


def run_process(*arguments: str, stdin: str = "", step_seconds: float | None = None) -> Done:
    """Runs a command as a process."""
    done = subprocess.run(
        command(*arguments, step_seconds=step_seconds),
        input=stdin,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def run_in_turn(*commands: Sequence[str], without: Sequence[str] = ()) -> list[tuple[Done, set[str]]]:
    """Runs commands, one after the other, in a new process, and says what each left imported.

    Args:
        *commands: The arguments of each.
        without: Modules that cannot be imported there.
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", IN_TURN, json.dumps([commands, without])],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    assert done.stderr == ""
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(commands)
    return [(Done(status or 0, out, err), set(modules)) for status, out, err, modules in found]


class Terminal:
    """A process in a terminal of its own, and what it wrote so far."""

    def __init__(self, process: subprocess.Popen[bytes], descriptor: int) -> None:
        self.process = process
        self.text = ""
        self._descriptor = descriptor

    def type(self, text: str) -> None:
        os.write(self._descriptor, text.encode())

    def read(self, seconds: float) -> bool:
        """Waits so long for anything; False if the process has gone."""
        if select.select([self._descriptor], [], [], seconds)[0]:
            try:
                read = os.read(self._descriptor, 65536)
            except OSError:
                read = b""
            self.text += read.decode().replace("\r\n", "\n")
            return bool(read)
        return True

    def until(self, piece: str, seconds: float = 60.0) -> str:
        """Waits for some text; returns what came up to it, and forgets that."""
        end = time.monotonic() + seconds
        while piece not in self.text:
            left = end - time.monotonic()
            assert left > 0, f"{piece!r} did not come in {self.text!r}"
            assert self.read(left), f"{piece!r} did not come in {self.text!r}"
        before, _, self.text = self.text.partition(piece)
        return before

    def ended(self) -> int:
        """The exit status, once there is one; everything written is read."""
        while True:
            try:
                read = os.read(self._descriptor, 65536)
            except OSError:
                break
            if not read:
                break
            self.text += read.decode().replace("\r\n", "\n")
        return self.process.wait(timeout=30)


@contextmanager
def terminal(*arguments: str, step_seconds: float | None = None, kind: str = "dumb") -> Iterator[Terminal]:
    """Runs a command in a terminal of some kind."""
    import pty

    ours, theirs = pty.openpty()
    with subprocess.Popen(
        command(*arguments, step_seconds=step_seconds),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=ENVIRONMENT | {"TERM": kind},
        start_new_session=True,
        preexec_fn=_take_terminal,
    ) as process:
        os.close(theirs)
        try:
            yield Terminal(process, ours)
        finally:
            process.kill()
            os.close(ours)


def _take_terminal() -> None:
    """Makes standard input the session's terminal, so that Ctrl-C comes as a signal."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@contextmanager
def server(*arguments: str, step_seconds: float | None = 0.0) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """Runs ``asyncengine serve``, as `command` has it; gives the process, its address and its log."""
    line = command("serve", "--port", "0", *arguments, step_seconds=step_seconds)
    with subprocess.Popen(line, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as process:
        log: list[str] = []
        ready = threading.Event()

        def read() -> None:
            for entry in process.stderr or ():
                log.append(entry)
                if "ready: " in entry:
                    ready.set()
            ready.set()

        reading = threading.Thread(target=read)
        reading.start()
        try:
            assert ready.wait(60)
            (address,) = {word.rstrip(";") for entry in log for word in entry.split() if word.startswith("http://")}
            yield process, address, log
        finally:
            process.kill()
            reading.join()


__all__: list[Any] = ["run", "run_in_turn", "run_process", "scripted_loader", "server", "terminal"]
