"""Texts as vectors by an encoder, in tokens per second, beside transformers in sorted batches.

A random BERT in the shape of all-MiniLM-L6 or of BERT base, and prompts whose lengths are uniform in a range, seed 0.
Timed are three ways to embed all of them, to the last vector:

* many: one call, `engine.embed(prompts)`;
* single: as many calls at once, with one prompt each, as requests to a service come;
* peer: transformers' own forward over batches of 32 prompts in the order of their length, padded to the longest, and
  the mean over each prompt, as Sentence Transformers' `encode` does it.

Each figure is the median of the rounds, in which the three take turns; one round warms up. `error` is the largest
difference between a number of the engine's and the peer's. The last line is one JSON object.

    python -m benchmarks.encoders [--shape minilm] [--dtype float32] [--device cpu] [--prompts 128] [--lengths 8 200]
                                  [--chunk TOKENS] [--rounds 5]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

from asyncengine import AsyncEngine, EngineConfig

SHAPES: dict[str, dict[str, int]] = {
    "minilm": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "tiny": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64},
}
VOCABULARY, BATCH = 30522, 32


def write(path: Path, shape: str) -> Path:
    """Writes the checkpoint."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=VOCABULARY, **SHAPES[shape])).save_pretrained(path)
    return path


def prompts_of(count: int, shortest: int, longest: int) -> list[list[int]]:
    """Random token ids."""
    draw = np.random.default_rng(0)
    lengths = draw.integers(shortest, longest, endpoint=True, size=count).tolist()
    return [draw.integers(1000, VOCABULARY, size=length).tolist() for length in lengths]


def peer(path: Path, dtype: str, device: str, prompts: list[list[int]]) -> Callable[[], list[Any]]:
    """What embeds the prompts by transformers."""
    import torch
    from transformers import BertModel

    model = BertModel.from_pretrained(path, dtype=getattr(torch, dtype), add_pooling_layer=False).to(device).eval()
    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))

    @torch.inference_mode()
    def embed() -> list[Any]:
        found: list[Any] = [None] * len(prompts)
        for begin in range(0, len(order), BATCH):
            rows = order[begin : begin + BATCH]
            ids = torch.zeros(len(rows), len(prompts[rows[0]]), dtype=torch.long)
            mask = torch.zeros_like(ids)
            for place, row in enumerate(rows):
                ids[place, : len(prompts[row])] = torch.tensor(prompts[row])
                mask[place, : len(prompts[row])] = 1
            ids, mask = ids.to(device), mask.to(device)
            hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state.float() * mask[..., None]
            means = (hidden.sum(1) / mask.sum(1, keepdim=True)).cpu().numpy()
            for row, mean in zip(rows, means, strict=True):
                found[row] = mean
        return found

    return embed


async def run(arguments: argparse.Namespace, path: Path) -> dict[str, Any]:
    """Times all three."""
    prompts = prompts_of(arguments.prompts, *arguments.lengths)
    config = EngineConfig(str(path), dtype=arguments.dtype, device=arguments.device, prefill_chunk_size=arguments.chunk)
    embed = peer(path, arguments.dtype, arguments.device, prompts)
    seconds: dict[str, list[float]] = {"many": [], "single": [], "peer": []}
    async with AsyncEngine(config) as engine:

        async def one(prompt: list[int]) -> Any:
            return (await engine.embed([prompt], "mean", normalize=False))[0].vector

        for _ in range(arguments.rounds + 1):
            begun = time.perf_counter()
            many = [each.vector for each in await engine.embed(prompts, "mean", normalize=False)]
            seconds["many"].append(time.perf_counter() - begun)
            begun = time.perf_counter()
            await asyncio.gather(*map(one, prompts))
            seconds["single"].append(time.perf_counter() - begun)
            begun = time.perf_counter()
            theirs = embed()
            seconds["peer"].append(time.perf_counter() - begun)
    tokens = sum(map(len, prompts))
    rates = {name: tokens / statistics.median(each[1:]) for name, each in seconds.items()}
    return {
        "shape": arguments.shape,
        "dtype": arguments.dtype,
        "prompts": len(prompts),
        "tokens": tokens,
        "tokens_per_second": {name: round(rate, 1) for name, rate in rates.items()},
        "ratios": {name: round(rates[name] / rates["peer"], 3) for name in ("many", "single")},
        "error": max(float(np.abs(one - other).max()) for one, other in zip(many, theirs, strict=True)),
    }


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="minilm")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--lengths", type=int, nargs=2, default=[8, 200], metavar=("SHORTEST", "LONGEST"))
    parser.add_argument("--chunk", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        result = uvloop.run(run(arguments, write(Path(directory), arguments.shape)))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
