"""How fast products with weights of four bits are, on a CUDA device.

Linear layers of int4, beside torch's own in the dtype of the inputs, and whole experts, of MXFP4 and of int4, for
several numbers of tokens: the time of a captured call, what share of the bandwidth of a copy reading the weights once
comes to, and how far off the result is from that of the weights in float32. Calls go round over as many copies of the
weights as do not fit into the device's second-level cache. The last line is one JSON object.

    python -m benchmarks.four_bits [--tokens 1 4 16 64 512] [--dtype bfloat16]

Without a device nothing is measured that means anything; `--tiny` shows that the program works.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from asyncengine.model.decoder.experts import CLAMPED
from asyncengine.model.quantised.four_bit_product import Gate, multiply, multiply_experts
from asyncengine.model.quantised.four_bits import FP4, INT4, FourBits
from benchmarks.fused import bandwidth, off, seconds_each

_CACHE = 256 << 20
"""Bytes of weights that calls go round over; several times the second-level cache."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A linear layer."""

    inputs: int
    outputs: int
    group: int = 128


@dataclass(frozen=True, slots=True)
class Experts:
    """Experts in the place of an MLP, in MXFP4 if their gate is clamped."""

    hidden: int
    inner: int
    count: int
    top: int
    gate: Gate
    group: int = 32


LAYERS = {
    "llama 8b qkv": Layer(4096, 6144),
    "llama 8b output": Layer(4096, 4096),
    "llama 8b gate and up": Layer(4096, 28672),
    "llama 8b down": Layer(14336, 4096),
    "llama 70b down": Layer(28672, 8192),
}
EXPERTS = {
    "gpt-oss 20b": Experts(2880, 2880, 32, 4, Gate(CLAMPED, True, 1.702, 7.0)),
    "qwen3 30b": Experts(2048, 768, 128, 8, Gate(), 128),
    "mixtral 8x7b": Experts(4096, 14336, 8, 2, Gate(), 128),
}
TINY = {
    "tiny layer": Layer(128, 64),
    "tiny experts": Experts(64, 32, 4, 2, Gate(CLAMPED, True, 1.702, 7.0)),
    "other tiny experts": Experts(128, 128, 4, 2, Gate(), 128),
}

Timed = Callable[[Callable[[int], object], int], float]
"""Seconds of a call, which is given the number of the copy, and how many copies there are."""


def some(outputs: int, inputs: int, group: int, device: torch.device, floats: bool = False) -> FourBits:
    """Weights as small as those of a model."""
    codes = torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.uint8, device=device)
    scales = torch.exp2(torch.randint(-8, -5, (outputs, inputs // group), device=device).float())
    return FourBits(codes, scales if floats else scales * 0.7, None, FP4 if floats else INT4)


def layer(case: Layer, tokens: int, dtype: torch.dtype, device: torch.device, timed: Timed) -> dict[str, float]:
    """Seconds of both, bytes that are read, and the error."""
    first = some(case.outputs, case.inputs, case.group, device)
    copies = copies_of(first.nbytes, device)
    every = [first, *(some(case.outputs, case.inputs, case.group, device) for _ in range(copies - 1))]
    x = torch.randn(tokens, case.inputs, device=device).to(dtype)
    wide = first.weight(dtype)
    plain = [wide, *(wide.clone() for _ in range(copies_of(wide.nbytes, device) - 1))]
    return {
        "seconds": timed(lambda i: multiply(x, every[i]), copies),
        "torch": timed(lambda i: functional.linear(x, plain[i]), len(plain)),
        "bytes": first.nbytes,
        "off": off(multiply(x, first), functional.linear(x.float(), first.weight(torch.float32))),
    }


def experts(case: Experts, tokens: int, dtype: torch.dtype, device: torch.device, timed: Timed) -> dict[str, float]:
    """As `layer`, without torch; the error is that of the first token."""
    floats = case.gate.activation == CLAMPED
    shapes = (case.count * 2 * case.inner, case.hidden), (case.count * case.hidden, case.inner)
    copies = copies_of(sum(outputs * inputs for outputs, inputs in shapes) // 2, device)
    every = [[some(*shape, case.group, device, floats) for shape in shapes] for _ in range(copies)]
    x = torch.randn(tokens, case.hidden, device=device).to(dtype)
    scores, chosen = torch.rand(tokens, case.count, device=device).topk(case.top, -1)
    shares = scores.softmax(-1)

    def run(copy: int) -> torch.Tensor:
        gate_up, down = every[copy]
        return multiply_experts(x, gate_up, down, chosen, shares, case.gate)

    wanted = expected(case, every[0], x[0].float(), chosen[0].tolist(), shares[0])
    return {
        "seconds": timed(run, copies),
        "bytes": int(chosen.unique().numel()) / case.count * sum(part.nbytes for part in every[0]),
        "off": off(run(0)[0], wanted),
    }


def expected(
    case: Experts, weights: Sequence[FourBits], x: torch.Tensor, chosen: Sequence[int], shares: torch.Tensor
) -> torch.Tensor:
    """What one token should become."""
    gate_up, down = weights
    result = torch.zeros_like(x)
    for expert, share in zip(chosen, shares, strict=True):
        start = expert * 2 * case.inner
        both = gate_up.rows(start, start + 2 * case.inner).weight(torch.float32) @ x
        if case.gate.activation == CLAMPED:
            limit = case.gate.limit
            gate, up = both[::2].clamp(max=limit), both[1::2].clamp(-limit, limit)
            inner = (up + 1) * gate * torch.sigmoid(case.gate.alpha * gate)
        else:
            inner = functional.silu(both[: case.inner]) * both[case.inner :]
        of_expert = down.rows(expert * case.hidden, (expert + 1) * case.hidden).weight(torch.float32)
        result += share * (of_expert @ inner)
    return result


def copies_of(size: int, device: torch.device) -> int:
    """How many there are of so many bytes of weights."""
    return max(1, -(-_CACHE // size)) if device.type == "cuda" else 1


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 64, 512])
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--tiny", action="store_true", help="shapes that need no device")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type != "cuda" and not options.tiny:
        parser.error("torch finds no CUDA device here; --tiny needs none")
    torch.manual_seed(0)
    rate, results = bandwidth(device), dict[str, dict[str, Any]]()
    dtype = getattr(torch, options.dtype)
    cases: dict[str, Layer | Experts] = TINY if options.tiny else {**LAYERS, **EXPERTS}

    def timed(call: Callable[[int], object], copies: int) -> float:
        return seconds_each(call, copies, device)

    with torch.inference_mode():
        for name, case in cases.items():
            for tokens in options.tokens:
                if isinstance(case, Layer):
                    found = layer(case, tokens, dtype, device, timed)
                else:
                    found = experts(case, tokens, dtype, device, timed)
                results[f"{name}, {tokens}"] = row = {
                    "us": round(found["seconds"] * 1e6, 1),
                    "share": round(found["bytes"] / found["seconds"] / rate, 3),
                    **({"torch_us": round(found["torch"] * 1e6, 1)} if "torch" in found else {}),
                    "off": round(found["off"], 5),
                }
                print(f"{name + ', ' + str(tokens):<32} {row}", flush=True)
    result = {
        "benchmark": "four_bits",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "dtype": options.dtype,
        "copy_gb_s": round(rate / 1e9, 1),
        "results": results,
    }
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
