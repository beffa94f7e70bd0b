"""What speculative decoding saves: steps of the model per token, and time.

Two parts, greedy throughout, so that every way gives the same tokens; that it does is checked.

* steps: the embedded chat model answers questions and goes on with texts that repeat themselves, one request at a time;
  counted are the steps of the model, prefills included, over the tokens that were generated. Without drafts that is 1.
* time: a Llama of a known shape whose layers but the first two add nothing (the last product of each is zero: it costs
  what it costs, and gives nothing), and a draft model that is its first two layers, so that every draft is right. That
  is the most that drafts can gain, and the price of a step that verifies. Tokens per second of N requests at once, with
  a draft length of 0 (adaptive) and fixed ones, over those without drafts; the ways alternate, and each figure is the
  median of the rounds' ratios. One round of each warms up.

The last line is one JSON object.

It takes about two minutes on two free cores; with --requests 1 16 about five.

    python -m benchmarks.speculation [--shape S] [--dtype float32] [--requests 1] [--tokens 96] [--rounds 5]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import uvloop

from asyncengine import AsyncEngine, EngineConfig, GenerationConfig
from benchmarks import shapes

DRAFT_LAYERS = 2
FIXED = (4, 8)
PROMPT_TOKENS = 32
QUESTIONS = (
    "What is the capital of France?",
    "Tell me a story about a duck.",
    "Count from 3 to 12.",
    "What is the opposite of hot?",
    "Spell the word garden.",
    "Who are you?",
)
REPEATING = "The horse liked to pick flowers. One day the horse found a ball. The horse liked to pick flowers. One day"


def ways(draft: str) -> dict[str, dict[str, Any]]:
    """Everything that is compared, as changes of a configuration."""
    small: dict[str, Any] = {"speculative_mode": "small_draft", "additional_models": [draft]}
    found: dict[str, dict[str, Any]] = {"none": {}, "ngram": {"speculative_mode": "ngram"}, "draft": small}
    return found | {f"draft, {length}": small | {"spec_draft_length": length} for length in FIXED}


async def steps_per_token(changes: dict[str, Any]) -> dict[str, Any]:
    """On the embedded model: of answers, of a text that repeats itself, and the share of drafts that were right."""
    config = EngineConfig("tiny", device="cpu", max_total_sequence_length=4096, **changes)
    greedy = GenerationConfig(temperature=0, max_tokens=120)
    found: dict[str, Any] = {}
    async with AsyncEngine(config) as engine:
        for name in ("answers", "repeating"):
            await engine.reset()
            if name == "answers":
                asked = [await engine.chat([{"role": "user", "content": text}], greedy) for text in QUESTIONS]
            else:
                asked = [await engine.generate(REPEATING, greedy.replace(ignore_eos=True))]
            counters = engine.metrics().counters
            found[name] = round(counters.steps / counters.generation_tokens, 3)
            if counters.draft_tokens:
                found[f"{name}, right"] = round(counters.accepted_draft_tokens / counters.draft_tokens, 3)
            found[f"{name}, tokens"] = [result.token_ids for result in asked]
    return found


def write_pair(directory: Path, shape: str, dtype: str) -> tuple[Path, Path]:
    """A model most of whose layers add nothing, and one that is its other layers."""
    import torch
    from transformers import AutoModelForCausalLM

    model = shapes.make(shape, dtype)
    with torch.no_grad():
        for layer in model.model.layers[DRAFT_LAYERS:]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    model.save_pretrained(directory / "target")
    config = type(model.config)(**model.config.to_dict() | {"num_hidden_layers": DRAFT_LAYERS, "layer_types": None})
    small = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    small.load_state_dict({name: model.state_dict()[name] for name in small.state_dict()})
    small.save_pretrained(directory / "draft")
    return directory / "target", directory / "draft"


async def rate_of(engine: AsyncEngine, requests: int, tokens: int) -> tuple[float, list[list[int]]]:
    """Tokens per second of all requests together, and what they are."""
    greedy = GenerationConfig(temperature=0, max_tokens=tokens, ignore_eos=True)
    prompts = [[(7 * i + 3 * j) % 500 + 10 for j in range(PROMPT_TOKENS)] for i in range(requests)]
    begun = time.perf_counter()
    results = await engine.generate_many(prompts, [greedy] * requests)
    seconds = time.perf_counter() - begun
    await engine.reset()
    return requests * tokens / seconds, [result.token_ids for result in results]


async def times(arguments: argparse.Namespace, target: Path, draft: Path) -> dict[str, Any]:
    """Ratios of tokens per second for each number of requests and way."""
    most = max(arguments.requests)
    plain = EngineConfig(
        str(target),
        device="cpu",
        dtype=arguments.dtype,
        max_num_sequence=most,
        max_total_sequence_length=most * (PROMPT_TOKENS + arguments.tokens + 64),
    )
    found: dict[str, Any] = {}
    async with AsyncExitStack() as stack:
        compared = {name: changes for name, changes in ways(str(draft)).items() if name != "ngram"}
        engines = {
            name: await stack.enter_async_context(AsyncEngine(plain.replace(**changes)))
            for name, changes in compared.items()
        }
        for requests in arguments.requests:
            rates: dict[str, list[float]] = {name: [] for name in engines}
            for attempt in range(arguments.rounds + 1):
                expected: list[list[int]] | None = None
                for name, engine in engines.items():
                    rate, tokens = await rate_of(engine, requests, arguments.tokens)
                    expected = expected or tokens
                    assert tokens == expected or arguments.dtype != "float32", f"{name} gives other tokens"
                    if attempt:
                        rates[name].append(rate)
            base = rates["none"]
            found[str(requests)] = {"none, tokens/s": round(statistics.median(base), 1)} | {
                name: round(statistics.median(own / plain for own, plain in zip(rate, base, strict=True)), 3)
                for name, rate in rates.items()
                if name != "none"
            }
            print(f"{requests} requests: {found[str(requests)]}")
    return found


async def measure(arguments: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Both parts."""
    eagle3: dict[str, Any] = {"speculative_mode": "eagle3", "additional_models": ["tiny-eagle3"]}
    compared = ways("tiny-draft") | {"eagle3": eagle3}
    compared |= {f"eagle3, {length}": eagle3 | {"spec_draft_length": length} for length in FIXED}
    steps = {name: await steps_per_token(changes) for name, changes in compared.items()}
    expected = steps["none"]
    for kind in ("answers, tokens", "repeating, tokens"):
        assert all(own[kind] == expected[kind] for own in steps.values()), "drafts changed the tokens"
    for name, own in steps.items():
        del own["answers, tokens"], own["repeating, tokens"]
        print(f"{name}: {own}")
    if not arguments.rounds:
        return {"steps_per_token": steps}
    target, draft = await asyncio.to_thread(write_pair, directory, arguments.shape, arguments.dtype)
    return {"steps_per_token": steps, "speed_over_none": await times(arguments, target, draft)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=["tiny", "S"], default="S")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--requests", type=int, nargs="+", default=[1])
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5, help="0 leaves the second part out")
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as directory:
        result = uvloop.run(measure(arguments, Path(directory)))
    print(json.dumps({"benchmark": "speculation", "shape": arguments.shape, "dtype": arguments.dtype, **result}))


if __name__ == "__main__":
    main()
