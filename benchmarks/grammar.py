"""What structured output costs those who do not ask for it: their tokens per second beside constrained requests.

A random checkpoint of a known shape, N requests at once, greedy, each with the same number of new tokens. Two kinds of
batch alternate in one run, over pairs of rounds:

* plain: all N requests are unconstrained;
* half: every other one writes a JSON array of integers under a schema.

Counted is the time from the first request given until the last plain request has its last token; the rate is that of
the plain requests alone. Before it, one round of each kind warms up, compilation of the schema included. The figure is
the median over the pairs of (rate of a plain request in "half" / rate of a plain request in "plain"), so 1.0 means that
nobody notices. Beside it, as the machine's other work disturbs it less, the same of the CPU seconds that the process
takes for the whole batch, which in "half" has the constrained requests' own work in it. Applying ready masks is also
timed on its own.

Besides, on the embedded model: the steps that documents of a fixed shape take, in which all but a few tokens are names
of properties, with and without jumping over tokens that leave no choice; 16 seeds at temperature 1, one at a time.

The last line is one JSON object. --rounds 0 leaves the timed part out.

    python -m benchmarks.grammar [--shape S] [--dtype bfloat16] [--requests 16] [--tokens 64] [--rounds 7]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import uvloop

from asyncengine import AsyncEngine, EngineConfig, GenerationConfig, JsonSchema
from benchmarks import shapes

PROMPT_TOKENS = 32
SCHEMA = JsonSchema({"type": "array", "items": {"type": "integer"}, "minItems": 400})


FIXED = {
    "first_measurement": {"type": "boolean"},
    "second_measurement": {"enum": ["low", "high"]},
    "third_measurement": {"type": "integer", "minimum": 0, "maximum": 9},
    "approved_by_reviewer": {"const": "automatically approved"},
}


async def steps_of_documents() -> dict[str, int]:
    """Steps of the embedded model with and without jumps, and the tokens, which are the same."""
    schema = {"type": "object", "properties": FIXED, "required": list(FIXED), "additionalProperties": False}
    wanted = GenerationConfig(response_format=JsonSchema(schema, "none"), max_tokens=200)
    found: dict[str, int] = {}
    texts: list[list[str]] = []
    async with AsyncEngine(EngineConfig("tiny", device="cpu", max_total_sequence_length=2048)) as engine:
        for name, jumps in (("jumping", True), ("walking", False)):
            await engine.reset()
            configs = [wanted.replace(jump_forward=jumps, seed=seed) for seed in range(16)]
            texts.append([(await engine.generate("Report:", config)).text for config in configs])
            await engine.abort_request("nobody")  # comes back after the step
            counters = engine.metrics().counters
            found[name], found["tokens"] = counters.steps, counters.generation_tokens
    assert texts[0] == texts[1], "jumps changed the text"
    return found


async def round_of(engine: AsyncEngine, requests: int, tokens: int, constrained: bool) -> tuple[float, float]:
    """Tokens per second of one plain request, and CPU seconds of the batch."""
    plain = GenerationConfig(temperature=0, max_tokens=tokens, ignore_eos=True)
    shaped = plain.replace(response_format=SCHEMA)
    prompts = [[(7 * i + j) % 900 + 10 for j in range(PROMPT_TOKENS)] for i in range(requests)]
    configs = [shaped if constrained and i % 2 else plain for i in range(requests)]
    begun, cpu = time.perf_counter(), time.process_time()
    ends: list[float] = []

    async def read(prompt: list[int], config: GenerationConfig) -> None:
        result = await engine.generate(prompt, config)
        assert len(result.token_ids) == tokens
        if config is plain:
            ends.append(time.perf_counter() - begun)

    await asyncio.gather(*(read(prompt, config) for prompt, config in zip(prompts, configs, strict=True)))
    cpu = time.process_time() - cpu
    await engine.reset()
    return tokens / max(ends), cpu


def mask_microseconds(vocab: int, rows: int) -> float:
    """Time to apply ready masks to (rows, vocab) logits, per row."""
    import numpy as np
    import torch

    from asyncengine.grammar.bits import num_words
    from asyncengine.model.token_masks import TokenMasks

    masks = TokenMasks(rows, vocab, torch.device("cpu"))
    logits = torch.randn(rows, vocab)
    bits = np.random.default_rng(0).integers(-(2**31), 2**31, (rows, num_words(vocab))).astype(np.int32)
    seconds = []
    for _ in range(30):
        begun = time.perf_counter()
        masks.apply(logits, np.arange(rows), bits)
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds) / rows * 1e6


async def measure(arguments: argparse.Namespace, path: Path) -> dict[str, Any]:
    """Both kinds of round, alternating."""
    config = EngineConfig(
        str(path),
        device="cpu",
        dtype=arguments.dtype,
        max_num_sequence=arguments.requests,
        max_total_sequence_length=arguments.requests * 256,
    )
    async with AsyncEngine(config) as engine:
        vocab = engine._thread.core.view.vocab_size  # type: ignore[union-attr]
        rates: dict[bool, list[float]] = {False: [], True: []}
        busy: dict[bool, list[float]] = {False: [], True: []}
        for attempt in range(arguments.rounds + 1):
            for constrained in (False, True) if attempt % 2 else (True, False):
                rate, seconds = await round_of(engine, arguments.requests, arguments.tokens, constrained)
                if attempt:
                    rates[constrained].append(rate)
                    busy[constrained].append(seconds)
        ratios = [half / plain for plain, half in zip(rates[False], rates[True], strict=True)]
        cpu_ratios = [plain / half for plain, half in zip(busy[False], busy[True], strict=True)]
    return {
        "plain": round(statistics.median(rates[False]), 2),
        "half": round(statistics.median(rates[True]), 2),
        "ratio": round(statistics.median(ratios), 4),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "cpu_ratio": round(statistics.median(cpu_ratios), 4),
        "mask_us_per_row": round(mask_microseconds(vocab, max(arguments.requests // 2, 1)), 1),
        "vocabulary": vocab,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=list(shapes.SHAPES), default="S")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7, help="0 leaves the timed part out")
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    result: dict[str, Any] = {"documents": uvloop.run(steps_of_documents())}
    print(f"steps of documents of a fixed shape: {result['documents']}")
    if arguments.rounds:
        with tempfile.TemporaryDirectory() as directory:
            path = shapes.write(Path(directory), arguments.shape, arguments.dtype)
            shapes.write_tokenizer(path, shapes.SHAPES[arguments.shape]["vocab_size"])
            result |= uvloop.run(measure(arguments, path))
    print(
        json.dumps({"benchmark": "grammar", "unit": "tokens/s per plain request", "shape": arguments.shape, **result})
    )


if __name__ == "__main__":
    main()
