"""Streams eight chats at once from the embedded model, swaps the model under them, and checks every answer.

Exit status: 0 if all answers were right, 1 if one was wrong or something failed, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from asyncengine import AsyncEngine, AsyncEngineError, EngineConfig, GenerationConfig
from asyncengine.tiny.conversations import article
from asyncengine.tiny.corpus import DEMO_CHATS, Chat, Message

CHATS = 8
HEROES = ("fox", "owl", "cat", "dog", "rabbit", "bear", "dragon", "robot")
GREEDY = GenerationConfig(temperature=0, max_tokens=256)
FRAME_SECONDS = 0.05


@dataclass
class Answer:
    """One question of one chat. Times are in seconds, as the asker sees them: waiting for a reload counts."""

    chat: Chat
    asked_at: float
    text: str = ""
    tokens: int = 0
    first_token: float | None = None
    seconds: float = 0.0
    right: bool | None = None  # None while it streams

    @property
    def rate(self) -> float:
        """Tokens per second since the question was asked."""
        return self.tokens / max(self.seconds, 1e-9)


@dataclass
class Show:
    """All that the screen and the summary are made of. Owned by the event loop."""

    console: Console
    live: bool = False  # whether the picture is on the screen
    begun: float = 0.0
    ended: float | None = None
    status: str = ""
    reload_seconds: float | None = None
    in_flight: list[Answer] = field(default_factory=list)  # when the reload began
    now: list[Answer | None] = field(default_factory=lambda: [None] * CHATS)
    answers: list[Answer] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Tokens of all answers so far."""
        return sum(answer.tokens for answer in self.answers)

    @property
    def seconds(self) -> float:
        """Since the first question."""
        return max((self.ended or time.perf_counter()) - self.begun, 1e-9)

    def say(self, text: str) -> None:
        """Shows a line of news."""
        self.status = text
        if not self.live:
            print(text, flush=True)

    def screen(self) -> Group:
        """The picture of this moment."""
        table = Table(box=box.SIMPLE, expand=True)
        table.add_column("", width=1)
        table.add_column("question", width=31, no_wrap=True)
        table.add_column("answer", ratio=1, no_wrap=True)
        table.add_column("tokens/s", justify="right", width=8)
        table.add_column("TTFT", justify="right", width=8)
        for answer in self.now:
            if answer is None:
                table.add_row("", "", "", "", "")
                continue
            mark = {None: Text("…", "yellow"), True: Text("✓", "green"), False: Text("✗", "bold red")}[answer.right]
            room = max(self.console.width - 66, 16)
            text = answer.text if len(answer.text) <= room else "…" + answer.text[1 - room :]
            table.add_row(
                mark, answer.chat.prompt[-1]["content"], Text(text), f"{answer.rate:.0f}", _ms(answer.first_token)
            )
        done = [answer for answer in self.answers if answer.right is not None]
        numbers = f"{len(done)} answers, {self.tokens} tokens, {self.tokens / self.seconds:.0f} tokens/s"
        times = f"TTFT p50 {_ms(self.ttft(0.5))}, p99 {_ms(self.ttft(0.99))}"
        return Group(table, Text(f" {numbers}, {times}", "bold"), Text(f" {self.status}", "cyan"))

    def ttft(self, share: float) -> float | None:
        """A quantile of the times to the first token."""
        times = sorted(answer.first_token for answer in self.answers if answer.first_token is not None)
        return times[min(math.ceil(share * len(times)), len(times)) - 1] if times else None

    def summary(self) -> Table:
        """The last words."""
        right = sum(answer.right is True for answer in self.answers)
        table = Table(box=box.SIMPLE, show_header=False)
        table.add_row("answers", f"{right} of {len(self.answers)} right, {CHATS} at a time")
        table.add_row("tokens", f"{self.tokens} in {self.seconds:.2f} s = {self.tokens / self.seconds:.0f} tokens/s")
        table.add_row("time to first token", f"p50 {_ms(self.ttft(0.5))}, p99 {_ms(self.ttft(0.99))}")
        if self.reload_seconds is not None:
            lost = sum(answer.right is not True for answer in self.in_flight)
            seconds, in_flight = _ms(self.reload_seconds), len(self.in_flight)
            table.add_row("hot reload", f"{seconds}, {in_flight} answers in flight, {lost} lost")
        return table


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.0f} ms"


def story(hero: str) -> Chat:
    """A request for a story. Any story that is about its hero and comes to its end is right."""
    question = Message(role="user", content=f"Tell me a story about {article(hero)}.")
    return Chat("story", (question,), "", rf"Once upon a time there was a \w+ {hero} .* the {hero} .*The end\.")


def questions(lane: int) -> list[Chat]:
    """What one chat asks before the reload, during it (a story), and after it (a story again at the end)."""
    short = collections.deque(chat for chat in DEMO_CHATS if chat.category != "story")
    short.rotate(-lane)
    half = len(short) // 2
    return [*list(short)[:half], story(HEROES[lane]), *list(short)[half:], story(HEROES[lane - 1])]


async def converse(engine: AsyncEngine, show: Show, lane: int) -> None:
    """Asks one chat's questions, one after the other."""
    for chat in questions(lane):
        answer = show.now[lane] = Answer(chat, time.perf_counter())
        show.answers.append(answer)
        async for output in engine.chat(chat.prompt, GREEDY):
            answer.text += output.text
            answer.tokens += len(output.token_ids)
            answer.seconds = time.perf_counter() - answer.asked_at
            if answer.first_token is None:
                answer.first_token = answer.seconds
        answer.right = chat.is_right(answer.text)
        if not show.console.is_terminal:
            verdict = "right" if answer.right else "WRONG"
            question = chat.prompt[-1]["content"]
            times = f"{answer.tokens} tokens, {answer.rate:.0f} tokens/s, TTFT {_ms(answer.first_token)}"
            print(f"chat {lane + 1}: {question} {answer.text} [{times}, {verdict}]", flush=True)


async def swap(engine: AsyncEngine, show: Show) -> None:
    """Reloads the model once every chat is in the middle of its story; the stories go on with the new one."""

    def telling() -> list[Answer]:
        return [a for a in show.now if a is not None and a.right is None and a.chat.category == "story" and a.tokens]

    while len(telling()) < CHATS:
        await asyncio.sleep(0.001)
        if any(a.right is not None and a.chat.category == "story" for a in show.answers):
            break  # some chat was so fast, or so slow, that they are never all at it
    show.in_flight = [a for a in show.now if a is not None and a.right is None]
    show.say(f"hot reload while {len(show.in_flight)} answers stream ...")
    begun = time.perf_counter()
    await engine.reload(EngineConfig("tiny"), in_flight="carry")
    show.reload_seconds = time.perf_counter() - begun
    show.say(f"reloaded in {_ms(show.reload_seconds)}; what was asked meanwhile is answered by the new model")


@contextlib.contextmanager
def screen(show: Show) -> Iterator[Live | None]:
    """The live picture; None where the output is no terminal."""
    if not show.console.is_terminal:
        yield None
        return
    with Live(show.screen(), console=show.console, auto_refresh=False) as live:
        show.live = True
        try:
            yield live
        finally:
            show.live = False


async def refresh(show: Show, live: Live) -> None:
    """Draws the picture again and again."""
    while True:
        live.update(show.screen(), refresh=True)
        await asyncio.sleep(FRAME_SECONDS)


async def run(show: Show) -> None:
    """The whole demonstration."""
    show.say("loading the embedded model ...")
    begun = time.perf_counter()
    async with AsyncEngine(EngineConfig("tiny")) as engine:
        show.say(f"loaded in {_ms(time.perf_counter() - begun)}; {CHATS} chats at once")
        show.begun = time.perf_counter()
        with screen(show) as live:
            drawing = None if live is None else asyncio.create_task(refresh(show, live))
            try:
                async with asyncio.TaskGroup() as group:
                    for lane in range(CHATS):
                        group.create_task(converse(engine, show, lane))
                    group.create_task(swap(engine, show))
            finally:
                show.ended = time.perf_counter()
                if drawing is not None:
                    drawing.cancel()
            if live is not None:
                live.update(show.screen(), refresh=True)
    show.console.print(show.summary())


def main() -> int:
    """Returns the exit status."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args()
    show = Show(Console())
    show.say("importing torch and transformers ...")
    try:
        # At program start, and not within the first load: importing them stalls an event loop.
        import torch
        from transformers.utils import logging

        logging.disable_progress_bar()
        torch.set_num_threads(1)  # a model this small loses more by sharing its work than it gains
        asyncio.run(run(show))
    except KeyboardInterrupt:
        print("interrupted")
        return 130
    except AsyncEngineError as error:  # the load; what fails later comes as a group, with its traceback
        print(f"failed: {error!r}", file=sys.stderr)
        return 1
    return 0 if show.answers and all(answer.right for answer in show.answers) else 1


if __name__ == "__main__":
    sys.exit(main())
