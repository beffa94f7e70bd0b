"""What a KV cache and weights of fewer bits cost in exactness: logits beside those of float32.

A model writes 8 texts of its own in float32 (sampled, from its most likely first tokens). Then their logits are
computed over a paged KV cache, in chunks and single tokens, in bfloat16 with and without fewer bits, and compared with
float32 without a cache, at every token. fp8 is what the engine does. int8 has one scale for each output, and int4 one
for 32 inputs, and a head in int8, as the compiled step stores them; both are multiplied in bfloat16 here.

* "error": distance of the logits from those in float32, relative to their norm; the median of all tokens;
* "same_token": share of tokens at which the most likely one is the same;
* "divergence": mean Kullback-Leibler divergence of the distribution from that of float32, in nats.

The last line is one JSON object.

    python -m benchmarks.precision [--model tiny] [--tokens 128]      # a checkpoint, or a shape of benchmarks/shapes.py
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as hf_logging

from asyncengine.model.attention.select import select
from asyncengine.model.location import locate
from asyncengine.model.quantised.four_bit_experts import round_experts
from asyncengine.model.quantised.four_bit_linear import round_layers
from asyncengine.model.quantised.fp8_linear import quantise
from benchmarks import shapes
from benchmarks.gpu_parity import Way, paged_logits, plain_logits

FP8 = torch.float8_e4m3fn
Change = Callable[[torch.nn.Module], object]


def int8(model: torch.nn.Module) -> None:
    """Rounds the weights of all linear layers to integers of eight bits."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            rows = module.weight.data.float()
            scales = rows.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127
            module.weight.data = ((rows / scales).round() * scales).to(module.weight.dtype)


def int4(model: torch.nn.Module) -> None:
    """Rounds the layers' weights to four bits, and what is left to eight."""
    round_experts(model)
    round_layers(model)
    int8(model)


WAYS: dict[str, tuple[Change | None, torch.dtype | None]] = {
    "bfloat16": (None, None),
    "KV cache in fp8_e4m3": (None, FP8),
    "weights in fp8": (quantise, None),
    "weights and KV cache in fp8": (quantise, FP8),
    "weights in int8": (int8, None),
    "weights in int4": (int4, None),
}


def texts(model: Any, count: int, tokens: int) -> list[np.ndarray]:
    """(tokens,) ids of each text that the model writes by itself."""
    with torch.inference_mode():
        first = model(input_ids=torch.ones(1, 1, dtype=torch.long)).logits[0, -1].topk(count).indices[:, None]
        torch.manual_seed(0)
        ids = model.generate(
            input_ids=first, attention_mask=torch.ones_like(first), do_sample=True, top_k=0, max_new_tokens=tokens - 1,
            min_new_tokens=tokens - 1, pad_token_id=0,
        )  # fmt: skip
    return [row.numpy().astype(np.int64) for row in ids]


def compare(model: Any, ids: list[np.ndarray]) -> dict[str, dict[str, float]]:
    """What each way of computing costs."""
    device, length = torch.device("cpu"), len(ids[0])
    expected = torch.cat(plain_logits(model, ids, device, length)).double()
    probabilities = expected.log_softmax(-1)
    half = model.to(torch.bfloat16)
    results = {}
    for name, (change, kv_dtype) in WAYS.items():
        tried = copy.deepcopy(half)
        if change is not None:
            change(tried)
        way = Way(last=length, fp8=kv_dtype is FP8)
        rows = paged_logits(tried, select("torch", device).backend, ids, device, way)
        found = torch.cat(rows).double()
        divergence = (probabilities.exp() * (probabilities - found.log_softmax(-1))).sum(-1)
        results[name] = {
            "error": round(float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).median()), 4),
            "same_token": round(float((found.argmax(-1) == expected.argmax(-1)).double().mean()), 4),
            "divergence": float(f"{float(divergence.mean()):.2g}"),
        }
        print(f"{name:<30} {results[name]}", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny", help="a checkpoint, or a shape: random weights")
    parser.add_argument("--tokens", type=int, default=128, help="of each text")
    options = parser.parse_args()
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    if options.model in shapes.SHAPES and options.model != "tiny":
        model = shapes.make(options.model, "bfloat16").float()
    else:
        model = AutoModelForCausalLM.from_pretrained(locate(options.model), dtype=torch.float32).eval()
    ids = texts(model, 8, options.tokens)
    result = {"benchmark": "precision", "model": options.model, "tokens": 8 * options.tokens}
    print(json.dumps(result | {"results": compare(model, ids)}))


if __name__ == "__main__":
    main()
