"""Time of one call of `Sampler.sample`, from logits on the device to token ids on the host.

The metric is milliseconds per call: the least and the median of `--repeats` calls, each on fresh logits whose copy is
not counted. Two kinds of logits: "peaked" ones, like a language model's, where about forty tokens have nearly all of
the mass, and "flat" ones, where a nucleus of 0.9 takes thousands. Every row of a batch has the same settings.
The last line is one JSON object: figures[rows x vocabulary][logits][settings] = [least, median].

    python benchmarks/sampler.py [--device cpu] [--threads 2] [--repeats 15]
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import numpy as np
import torch

from asyncengine.generation import GenerationConfig, SamplingParams, resolve
from asyncengine.model.sampler import Sampler

SHAPES = ((1, 49_152), (16, 49_152), (16, 151_936), (64, 151_936))
SETTINGS: dict[str, dict[str, Any]] = {
    "argmax": {"temperature": 0.0},
    "temperature": {"temperature": 0.7},
    "top_k=50": {"temperature": 0.7, "top_k": 50},
    "top_p=0.9": {"temperature": 0.7, "top_p": 0.9},
    "top_k=50 top_p=0.9": {"temperature": 0.7, "top_k": 50, "top_p": 0.9},
    "min_p=0.05": {"temperature": 0.7, "min_p": 0.05},
    "penalties": {"temperature": 0.7, "frequency_penalty": 0.5, "repetition_penalty": 1.1},
    "logprobs": {"temperature": 0.7, "logprobs": True, "top_logprobs": 5},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)

    figures: dict[str, dict[str, dict[str, list[float]]]] = {}
    for rows, vocab in SHAPES:
        for kind in ("peaked", "flat"):
            logits = make_logits(rows, vocab, kind).to(device)
            for name, changes in SETTINGS.items():
                found = measure(logits, params(vocab, changes), options.repeats)
                figures.setdefault(f"{rows}x{vocab}", {}).setdefault(kind, {})[name] = found
                print(f"{rows:3} x {vocab:6}  {kind:6}  {name:20}  {found[0]:9.3f}  {found[1]:9.3f}", flush=True)
    result = {"benchmark": "sampler", "unit": "ms", "device": str(device), "threads": options.threads}
    print(json.dumps({**result, "torch": torch.__version__, "figures": figures}))


def make_logits(rows: int, vocab: int, kind: str) -> torch.Tensor:
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(0)) * 2
    if kind == "peaked":
        logits[:, 1000:1040] += torch.linspace(20, 8, 40)
    return logits


def params(vocab: int, changes: dict[str, Any]) -> SamplingParams:
    defaults = GenerationConfig()
    config = GenerationConfig(**changes)
    return resolve(config, defaults, vocab_size=vocab, eos_token_ids=(), max_tokens=1000, seed=1)


def measure(logits: torch.Tensor, setting: SamplingParams, repeats: int) -> list[float]:
    rows, vocab = logits.shape
    sampler = Sampler(rows, vocab, logits.device)
    prompt = np.arange(500, dtype=np.int32)
    for slot in range(rows):
        sampler.place(slot, setting, 0, prompt, prompt[:100])
    slots, work, times = np.arange(rows), torch.empty_like(logits), []
    for position in range(repeats + 2):
        work.copy_(logits)
        if logits.is_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        sampler.sample(work, slots, np.full(rows, position))
        times.append((time.perf_counter() - start) * 1e3)
    times = sorted(times[2:])
    return [round(times[0], 3), round(times[len(times) // 2], 3)]


if __name__ == "__main__":
    main()
