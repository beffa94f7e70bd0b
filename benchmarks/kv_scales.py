"""What scales of a KV cache in fp8 are worth: errors of one layer's attention with keys and values of several kinds.

1,024 random keys and values, 8 heads of 128, and 64 queries whose scores have a deviation of 2 whatever the keys are;
the error is the distance of a head's output from that in float64, relative to its norm, the median of all. Scales are

* "one": none;
* "head", "channel": the largest number of all tokens / 448, for each head, or for each number of a head;
* "engine": what the engine takes (`asyncengine.model.attention.fp8`), for the layer, from the first 12 tokens.

The last line is one JSON object.

    python -m benchmarks.kv_scales
"""

from __future__ import annotations

import json
from collections.abc import Callable

import torch

from asyncengine.model.attention import fp8

TOKENS, HEADS, DIM, QUERIES, TRIAL = 1024, 8, 128, 64, 12
Scale = Callable[[torch.Tensor], torch.Tensor | float]


def largest_over(*dims: int) -> Scale:
    """The largest number over some dimensions of (tokens, heads, dim), as 448."""
    return lambda numbers: numbers.abs().amax(dims, keepdim=True) / fp8.LARGEST


WAYS: dict[str, Scale] = {
    "one": lambda numbers: 1.0,
    "head": largest_over(0, 2),
    "channel": largest_over(0),
    "engine": lambda numbers: fp8.scale_for(float(numbers[:TRIAL].abs().max())),
}


def in_some_channels(factor: float) -> torch.Tensor:
    """1, and `factor` in 4 channels of each head."""
    factors = torch.ones(1, HEADS, DIM, dtype=torch.double)
    factors[..., :4] = factor
    return factors


def in_some_tokens(factor: float) -> torch.Tensor:
    """1, and `factor` in one token of a hundred, not in the first of them."""
    factors = torch.ones(TOKENS, 1, 1, dtype=torch.double)
    factors[100::100] = factor
    return factors


ONE = torch.ones(1, dtype=torch.double)
BY_HEAD = torch.logspace(-2, 2, HEADS, dtype=torch.double)[None, :, None]
KINDS: dict[str, tuple[torch.Tensor, torch.Tensor]] = {
    "normal": (ONE, ONE),
    "keys x 10": (10 * ONE, ONE),
    "keys x 200": (200 * ONE, ONE),
    "4 channels of keys x 50": (in_some_channels(50), ONE),
    "4 channels of keys x 300": (in_some_channels(300), ONE),
    "values x 0.02": (ONE, 0.02 * ONE),
    "values x 0.005": (ONE, 0.005 * ONE),
    "a token in 100 x 40": (in_some_tokens(40), in_some_tokens(40)),
    "heads x 0.01 to x 100": (BY_HEAD, BY_HEAD),
}


def attended(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """(queries, heads, dim) over all keys."""
    scores = torch.einsum("qhd,khd->hqk", query, keys) * DIM**-0.5
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)


def kept(numbers: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    """What a cache in fp8 makes of keys or values."""
    return fp8.stored(numbers / scale, fp8.E4M3).double() * scale


def measure() -> dict[str, dict[str, float]]:
    """The errors, by kind of numbers and by scale."""
    results = {}
    for kind, (of_keys, of_values) in KINDS.items():
        torch.manual_seed(0)
        query = torch.randn(QUERIES, HEADS, DIM, dtype=torch.double)
        keys = torch.randn(TOKENS, HEADS, DIM, dtype=torch.double) * of_keys
        values = torch.randn(TOKENS, HEADS, DIM, dtype=torch.double) * of_values
        query *= 2 / (torch.einsum("qhd,khd->hqk", query, keys).std() * DIM**-0.5)
        expected = attended(query, keys, values)
        results[kind] = {}
        for way, scale in WAYS.items():
            found = attended(query, kept(keys, scale(keys)), kept(values, scale(values)))
            error = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
            results[kind][way] = round(float(error.median()), 4)
        print(f"{kind:<26} {results[kind]}", flush=True)
    return results


def main() -> None:
    print(json.dumps({"benchmark": "kv_scales", "results": measure()}))


if __name__ == "__main__":
    main()
