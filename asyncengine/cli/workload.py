"""A workload: requests that arrive in a closed or an open loop, and when their tokens came."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

_WORDS = (
    "river", "stone", "window", "garden", "winter", "paper", "morning", "bridge", "silver", "candle", "harbour",
    "meadow", "lantern", "copper", "forest", "letter", "market", "island", "thunder", "village", "orchard", "compass",
    "feather", "kitchen", "mountain", "saddle", "whisper", "ribbon", "castle", "journey",
)  # fmt: skip


@dataclass(slots=True)
class Sample:
    """One request.

    Attributes:
        arrived: When it was due, in seconds of the process's clock. In an open loop that is when its turn came, however
            busy the client was.
        deltas: When something came, and how many tokens it was.
        tokens: Tokens generated, by the server's own count where it gives one.
        prompt_tokens: Tokens of the prompt.
        ended: When it ended; None if it failed.
        error: Why it failed.
    """

    arrived: float
    deltas: list[tuple[float, int]] = field(default_factory=list)
    tokens: int = 0
    prompt_tokens: int = 0
    ended: float | None = None
    error: str | None = None

    def came(self, tokens: int) -> None:
        """Notes that tokens came, now."""
        self.deltas.append((time.perf_counter(), tokens))

    @property
    def first_token(self) -> float | None:
        """Seconds to the first token."""
        return self.deltas[0][0] - self.arrived if self.deltas else None

    @property
    def gaps(self) -> list[float]:
        """Seconds between tokens; tokens that came together share what it took."""
        found = []
        for (before, _), (now, count) in zip(self.deltas, self.deltas[1:], strict=False):
            found += [(now - before) / max(count, 1)] * max(count, 1)
        return found


class Target(Protocol):
    """What is measured."""

    async def ask(self, prompt: str, sample: Sample) -> None:
        """Sends a prompt and notes in `sample` what comes.

        Raises:
            Exception: The request failed.
        """
        ...


@dataclass(frozen=True, slots=True)
class Workload:
    """What is asked, and when.

    Attributes:
        num_prompts: How many requests.
        prompt_words: Words in each prompt.
        concurrency: Closed loop: so many requests at a time.
        rate: Open loop, if given: requests per second, in a Poisson process; `concurrency` is not looked at.
        seed: Of prompts and arrivals.
    """

    num_prompts: int
    prompt_words: int
    concurrency: int
    rate: float | None
    seed: int

    def prompts(self) -> list[str]:
        """Random words, all different, the same for the same seed."""
        draw = random.Random(self.seed)
        return [" ".join(draw.choices(_WORDS, k=self.prompt_words)) for _ in range(self.num_prompts)]

    def arrivals(self) -> list[float]:
        """Seconds after the beginning at which an open loop's requests arrive."""
        assert self.rate is not None
        draw, at, found = random.Random(f"arrivals {self.seed}"), 0.0, []
        for _ in range(self.num_prompts):
            at += draw.expovariate(self.rate)
            found.append(at)
        return found

    async def run(self, target: Target, advance: Callable[[], None]) -> list[Sample]:
        """Asks everything; `advance` is called whenever a request has ended. Cancelling it ends what is under way."""
        prompts = self.prompts()
        samples: list[Sample] = []

        async def one(prompt: str, arrived: float) -> None:
            sample = Sample(arrived)
            samples.append(sample)
            try:
                await target.ask(prompt, sample)
            except Exception as error:  # whatever it is, it is the target's, and is reported
                sample.error = str(error) or type(error).__name__
            else:
                sample.ended = time.perf_counter()
            advance()

        async with asyncio.TaskGroup() as group:
            if self.rate is None:
                waiting = iter(prompts)

                async def work() -> None:
                    for prompt in waiting:
                        await one(prompt, time.perf_counter())

                for _ in range(min(self.concurrency, len(prompts))):
                    group.create_task(work())
            else:
                begun = time.perf_counter()
                for prompt, at in zip(prompts, self.arrivals(), strict=True):
                    while (left := begun + at - time.perf_counter()) > 0:  # noqa: ASYNC110  # loops may wake early
                        await asyncio.sleep(left)
                    group.create_task(one(prompt, begun + at))
        return samples
