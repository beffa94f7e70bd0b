"""What a conversation that goes on computes again, and what it gains if a prompt is computed while it comes.

Two figures, on the embedded model or any other:

* conversation: for each turn of one conversation, given through the chat template, the tokens of the prompt, those
  that are new in it, and those that were computed although an earlier turn had computed them. The last should be less
  than a block.
* streamed prompt: the seconds from the moment a prompt is whole until its first token is there; given at once, and
  given in pieces with pauses between them, as somebody speaks. The prefix cache is emptied between the rounds; medians.

The last line is one JSON object.

    python -m benchmarks.continuing [--model tiny] [--tokens 900] [--pieces 30] [--pause-ms 20] [--rounds 5]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import AsyncIterator
from typing import Any

from asyncengine import AsyncEngine, EngineConfig, GenerationConfig

QUESTIONS = [
    "What is the capital of France?", "What is 7 + 8?", "Tell me a story.", "And the capital of Italy?",
    "What color is the sky?", "Tell me a story about a dog.", "Thank you!", "What comes after Monday?",
]  # fmt: skip
FIRST = GenerationConfig(temperature=0, max_tokens=1)


async def conversation(engine: AsyncEngine) -> list[dict[str, int]]:
    """One entry per turn."""
    messages: list[dict[str, Any]] = []
    turns = []
    known = 0  # tokens that were computed: all but the last
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        answer = await engine.chat(messages, GenerationConfig(temperature=0, max_tokens=60))
        usage = answer.usage
        turns.append({
            "prompt": usage.prompt_tokens, "new": usage.prompt_tokens - known, "again": known - usage.cached_tokens,
        })  # fmt: skip
        known = usage.prompt_tokens + usage.completion_tokens - 1
        messages.append({"role": "assistant", "content": answer.text, "token_ids": answer.token_ids})
    return turns


async def first_token(engine: AsyncEngine, prompt: list[int], pieces: int, pause: float) -> float:
    """Seconds from the end of the prompt to the first token."""
    ended = 0.0
    size = -(-len(prompt) // pieces)

    async def spoken() -> AsyncIterator[list[int]]:
        nonlocal ended
        for start in range(0, len(prompt), size):
            await asyncio.sleep(pause)
            yield prompt[start : start + size]
        ended = time.perf_counter()

    await engine.reset()
    await engine.generate(spoken(), FIRST)
    return time.perf_counter() - ended


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--tokens", type=int, default=900)
    parser.add_argument("--pieces", type=int, default=30)
    parser.add_argument("--pause-ms", type=float, default=20.0)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    async with AsyncEngine(EngineConfig(arguments.model)) as engine:
        config = engine.complete_engine_config
        assert config is not None
        turns = await conversation(engine)
        prompt = [5 + (place * place) % 100 for place in range(arguments.tokens)]
        await first_token(engine, prompt, 1, 0.0)
        whole, streamed = [], []
        for _ in range(arguments.rounds):
            whole.append(await first_token(engine, prompt, 1, 0.0))
            streamed.append(await first_token(engine, prompt, arguments.pieces, arguments.pause_ms / 1e3))
    for turn in turns:
        print(f"prompt {turn['prompt']:5}  new {turn['new']:5}  computed again {turn['again']:5}")
    whole_ms, streamed_ms = (statistics.median(seconds) * 1e3 for seconds in (whole, streamed))
    print(f"first token: {whole_ms:.1f} ms after a prompt at once, {streamed_ms:.1f} ms after one in pieces")
    print(
        json.dumps({
            "block": config.kv_cache_page_size, "turns": turns,
            "first_token_ms": {"at_once": round(whole_ms, 2), "in_pieces": round(streamed_ms, 2)},
        })
    )  # fmt: skip


if __name__ == "__main__":
    asyncio.run(main())
