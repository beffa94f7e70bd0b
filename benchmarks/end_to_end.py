"""End to end: generated tokens per second at N concurrent requests, against transformers on the same checkpoint.

A random checkpoint of a known shape; N random prompts of 128 tokens, others in each round, 64 new tokens each, greedy,
end-of-sequence ignored. Counted is the time from the first request given to the last token read, without what is set up
once. Sides, alternating in one run, each
as its users would call it, with the same weights, dtype and number of threads:

* asyncengine: ``generate_many``;
* transformers ``generate``: one padded batch (all prompts have one length, so there is no padding);
* transformers continuous batching: one manager, with room for these requests. Left to itself it takes most of the
  host's memory for its cache, and each of its steps is the slower for it.

The last line is one JSON object.

``--decoder transformers`` takes the compiled step out of asyncengine, so that both sides run the same modules.

    python -m benchmarks.end_to_end [--shape S] [--dtype bfloat16] [--requests 1 16] [--rounds 3] [--decoder auto]
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import uvloop

from asyncengine import AsyncEngine, EngineConfig, GenerationConfig
from benchmarks import shapes

PROMPT_TOKENS = 128
NEW_TOKENS = 64


async def ours(engine: AsyncEngine, prompts: list[list[int]]) -> float:
    """Seconds of asyncengine."""
    config = GenerationConfig(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    begun = time.perf_counter()
    results = await engine.generate_many(prompts, config)
    seconds = time.perf_counter() - begun
    assert all(len(result.token_ids) == NEW_TOKENS for result in results)
    await engine.reset()
    return seconds


def generate(model: Any, prompts: list[list[int]]) -> float:
    """Seconds of transformers' generate."""
    import torch

    ids = torch.tensor(prompts)
    begun = time.perf_counter()
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False
    )
    seconds = time.perf_counter() - begun
    assert output.shape == (len(prompts), PROMPT_TOKENS + NEW_TOKENS)
    return seconds


def continuous_batching(model: Any, prompts: list[list[int]]) -> float:
    """Seconds of transformers' continuous batching."""
    from transformers import ContinuousBatchingConfig
    from transformers import GenerationConfig as HFGenerationConfig

    count = len(prompts)
    config = HFGenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0)
    room = ContinuousBatchingConfig(num_blocks=2 * count, max_batch_tokens=max(512, count * PROMPT_TOKENS))
    with model.continuous_batching_context_manager(
        config, continuous_batching_config=room, persistent_manager=True
    ) as manager:
        begun = time.perf_counter()
        manager.add_requests(prompts, max_new_tokens=NEW_TOKENS)
        lengths: list[int] = []
        while len(lengths) < count:
            output = manager.get_result(timeout=60)
            assert output is not None, "continuous batching has stopped"
            if output.is_finished():
                lengths.append(len(output.generated_tokens))
        seconds = time.perf_counter() - begun
    assert lengths == [NEW_TOKENS] * count, lengths
    return seconds


async def measure(arguments: argparse.Namespace, path: Path) -> dict[str, Any]:
    """All sides, alternating."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, arguments.dtype))
    model.generation_config.eos_token_id = None
    vocab = model.config.vocab_size
    results: dict[str, Any] = {}
    config = EngineConfig(
        str(path), device="cpu", dtype=arguments.dtype, decoder_backend=arguments.decoder,
        max_total_sequence_length=64 * 256, max_num_sequence=64,
    )  # fmt: skip
    async with AsyncEngine(config) as engine:
        for requests in arguments.requests:
            rates: dict[str, list[float]] = {"asyncengine": [], "generate": [], "continuous_batching": []}
            for attempt in range(arguments.rounds + 1):
                prompts = torch.randint(1, vocab, (requests, PROMPT_TOKENS)).tolist()
                seconds = {
                    "asyncengine": await ours(engine, prompts),
                    "generate": generate(model, prompts),
                    "continuous_batching": continuous_batching(model, prompts),
                }
                if attempt:  # the first round warms all sides up
                    for side, value in seconds.items():
                        rates[side].append(requests * NEW_TOKENS / value)
            model.destroy_cached_continuous_batching_manager()
            row = {side: round(statistics.median(values), 1) for side, values in rates.items()}
            for side in ("generate", "continuous_batching"):
                pairs = zip(rates["asyncengine"], rates[side], strict=True)
                row[f"ratio_{side}"] = round(statistics.median(a / b for a, b in pairs), 2)
            results[str(requests)] = row
            print(f"{requests:>4} requests: {row}", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=list(shapes.SHAPES), default="S")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--decoder", default="auto", choices=["auto", "compiled", "transformers"])
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as directory:
        path = shapes.write(Path(directory), arguments.shape, arguments.dtype)
        results = uvloop.run(measure(arguments, path))
    print(
        json.dumps(
            {
                "benchmark": "end_to_end",
                "unit": "tokens/s",
                "shape": arguments.shape,
                "dtype": arguments.dtype,
                "decoder": arguments.decoder,
                "results": results,
            }
        )
    )


if __name__ == "__main__":
    main()
