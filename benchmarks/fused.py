"""How fast the fused products of `asyncengine.model.fused` read weights, beside torch's own layers, on a CUDA device.

For every product of a layer and for the head, with one token and with 8: bytes of weights over the time of one launch,
as a share of what a copy on the same device moves (read and written); and the time of torch's linear layers with the
same norm and activation, captured likewise. Launches go round over as many copies of the weights as do not fit into
the device's second-level cache. `--sweep` tries other ways to cut each product and says which was fastest: those
belong into `asyncengine/model/fused/tiles.py`. The last line is one JSON object.

    python -m benchmarks.fused [--model "llama 8b"] [--sweep]

Without a device nothing is measured that means anything; `--model tiny` shows that the program works.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from asyncengine.model.decoder.parts import NormPart, Projection
from asyncengine.model.fused import tiles
from asyncengine.model.fused.launches import Formula
from asyncengine.model.fused.narrow_product import Shape
from asyncengine.model.fused.product import Product
from asyncengine.model.fused.tiles import MOST_TOKENS, Tile
from benchmarks.fused_shapes import DECODERS, products

_CACHE = 256 << 20
"""Bytes of weights that launches go round over; several times the second-level cache."""
_ROUNDS = 7


def seconds_each(function: Callable[[int], object], copies: int, device: torch.device) -> float:
    """Median time of one call, of captured launches that go round over copies."""
    if device.type != "cuda":
        begun = time.perf_counter()
        function(0)
        return time.perf_counter() - begun
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        for copy in range(copies):
            function(copy)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for copy in range(copies):
            function(copy)
    taken = []
    for _ in range(_ROUNDS + 1):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end) / 1e3 / copies)
    return statistics.median(taken[1:])


def bandwidth(device: torch.device) -> float:
    """Bytes per second that a large copy reads and writes."""
    count = (1 << 30) if device.type == "cuda" else 1 << 20
    source = torch.randint(0, 255, (count,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * count / seconds_each(lambda _: target.copy_(source), 1, device)


class Case:
    """One product with weights on a device, in several copies."""

    def __init__(self, shape: Shape, tokens: int, device: torch.device) -> None:
        self._shape, self._device = shape, device
        numbers = {"dtype": shape.dtype, "device": device}
        self.bytes = sum(shape.outputs) * shape.inputs * shape.dtype.itemsize
        self._copies = max(1, -(-_CACHE // self.bytes)) if device.type == "cuda" else 1
        self._norm = nn.RMSNorm(shape.inputs, eps=1e-6, **numbers).requires_grad_(False) if shape.normed else None
        self._layers = [
            [
                nn.Linear(shape.inputs, width, bias=shape.bias, **numbers).requires_grad_(False)
                for width in shape.outputs
            ]
            for _ in range(self._copies)
        ]
        width = shape.outputs[0] if shape.gated else sum(shape.outputs)
        self._x = torch.randn(tokens, shape.inputs, device=device).to(shape.dtype)
        self._residual = torch.randn(tokens, width, device=device).to(shape.dtype) if shape.residual else None

    def fused(self) -> tuple[float, torch.Tensor]:
        """Seconds of a launch, and a result; with the tiles that hold."""
        norm = None if self._norm is None else NormPart(self._norm, 1e-6, 0.0, centred=False)
        shape = self._shape
        made = [
            Product(Formula([Projection(layer) for layer in layers], norm, shape.gated, shape.activation))
            for layers in self._layers
        ]
        result = made[0](self._x, self._residual)
        return seconds_each(lambda i: made[i](self._x, self._residual), self._copies, self._device), result

    def plain(self) -> tuple[float, torch.Tensor]:
        """Likewise, of torch's own modules."""
        return seconds_each(self._plain, self._copies, self._device), self._plain(0)

    def _plain(self, copy: int) -> torch.Tensor:
        x = self._x if self._norm is None else self._norm(self._x)
        results = [layer(x) for layer in self._layers[copy]]
        if self._shape.gated:
            return functional.silu(results[0]) * results[1]
        result = torch.cat(results, 1) if len(results) > 1 else results[0]
        return result if self._residual is None else result + self._residual


def candidates(tokens: int) -> Iterator[Tile]:
    """Ways to cut a product."""
    outputs, inputs = ((2, 4, 8), (512, 1024)) if tokens == 1 else ((16, 32, 64), (128, 256))
    for each, at_once, stages in itertools.product(outputs, inputs, (1, 3, 4)):
        yield Tile(each, at_once, stages=stages)


def swept(case: Case, tokens: int) -> dict[str, Any]:
    """The fastest of all candidates that compute the same."""
    rule, (_, wanted) = tiles.tile_for, case.plain()
    best: tuple[float, Tile] | None = None
    try:
        for tile in candidates(tokens):
            tiles.tile_for = lambda *_, tile=tile: tile
            try:
                seconds, found = case.fused()
            except Exception as error:  # it needs more shared memory than there is
                print(f"  {tile}: {str(error).splitlines()[0] if str(error) else error!r}", flush=True)
                continue
            if off(found, wanted) < 2e-2 and (best is None or seconds < best[0]):
                best = seconds, tile
    finally:
        tiles.tile_for = rule
    return {} if best is None else {"best_us": round(best[0] * 1e6, 1), "tile": str(best[1])}


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative difference."""
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=list(DECODERS), default="llama 8b")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--sweep", action="store_true", help="try other ways to cut each product")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type != "cuda" and options.model != "tiny":
        parser.error("torch finds no CUDA device here; --model tiny needs none")
    torch.manual_seed(0)
    rate, results = bandwidth(device), dict[str, dict[str, Any]]()
    with torch.inference_mode():
        for part, shape in products(DECODERS[options.model], getattr(torch, options.dtype)):
            if shape.centred:
                continue
            for tokens in (1, MOST_TOKENS):
                case = Case(shape, tokens, device)
                (fused, found), (plain, wanted) = case.fused(), case.plain()
                name = f"{part}, {tokens}"
                results[name] = row = {
                    "fused_us": round(fused * 1e6, 1),
                    "torch_us": round(plain * 1e6, 1),
                    "share": round(case.bytes / fused / rate, 3),
                    "off": round(off(found, wanted), 5),
                }
                row |= swept(case, tokens) if options.sweep else {}
                print(f"{name:<16} {row}", flush=True)
    report = {
        "benchmark": "fused",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "model": options.model,
        "dtype": options.dtype,
        "copy_gb_per_s": round(rate / 1e9, 1),
        "results": results,
    }
    print(json.dumps(report))
    return report


if __name__ == "__main__":
    main()
