"""Registers, spills and width of loads of the fused kernels, compiled for Hopper. Needs triton, but no GPU.

What `asyncengine.model.fused` launches for models of known shapes, for one token and for several, and what
`asyncengine.model.adapters` launches for adapters of several ranks, in bfloat16, float16 and float32. ptxas says how
many registers a thread takes and how many bytes it spills; how many loads of 16 bytes the code has is counted in the
assembly. Who is to stream at 4.8 TB/s with some 0.8 us between asking and getting must have 29 KiB on the way to each
of 132 multiprocessors; how much is, follows from stages, and from how many programs fit. A kernel that spills, reads
weights in smaller pieces or has less on the way is slow: the exit status is 1 if there is one. Factors of adapters are
small, so how much of them is on the way is not looked at. Whether the others are fast, only a device can tell. The last
line is one JSON object.

    python -m benchmarks.fused_compile [--quick]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# The kernels must not be made for the interpreter. Triton reads this when it is imported.
os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.compiler import ASTSource

from asyncengine.model.adapters import kernels as adapter_kernels
from asyncengine.model.adapters.factor_table import COLUMNS, options_of, outputs_of
from asyncengine.model.fused import kernels, tiles
from asyncengine.model.fused.launches import OPTIONS
from asyncengine.model.fused.narrow_product import Shape, launch_options
from asyncengine.model.fused.tiles import MOST_TOKENS
from asyncengine.model.fused.wide_product import NUMBERS_EACH, norm_constants, norm_options
from benchmarks import sass
from benchmarks.attention_compile import HOPPER, NAMES, resources
from benchmarks.fused_shapes import DECODERS, Decoder, products

_WIDE = re.compile(r"ld\.global[\w.:]*\.v4\.b32|cp\.async\.cg\.shared\.global[^;]*, 0x10")
_EVEN = ("gate_token", "up_token", "query_token", "key_token", "stride", "inputs", "outputs")
"""Arguments that multiples of 16 are given for."""
_SCALARS = {
    **dict.fromkeys(("tokens", "splits", *_EVEN), "i32"),
    **dict.fromkeys(("offset", "epsilon", "factor", "cap", "query_scale"), "fp32"),
}


ON_THE_WAY = 29 << 10
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True)
class Case:
    """One kernel to compile.

    Attributes:
        pointers: The arguments that are there, and what they point to.
        loads: Loads of 16 bytes that a thread needs for the weights of one turn of the loop.
        stages: How many turns are loaded for at a time, and one less is on the way; 0 if that is of no matter.
    """

    name: str
    function: Any
    pointers: Mapping[str, str]
    constants: Mapping[str, Any]
    options: Mapping[str, Any]
    loads: int = 0
    stages: int = 0


def product(name: str, shape: Shape, tokens: int) -> Case:
    """A product of one token, or of several."""
    tile, number = shape.tile(tokens), NAMES[shape.dtype]
    matrices = ("first", "second", "third")[: len(shape.outputs)]
    there = {"x", "result", *matrices}
    there |= {f"{matrix}_bias" for matrix in matrices if shape.bias} | ({"residual"} if shape.residual else set())
    there |= ({"norm"} if shape.normed else set()) | ({"norm_bias"} if shape.norm_bias else set())
    pieces = tile.outputs * tile.inputs * shape.dtype.itemsize * (2 if shape.gated else 1)
    return Case(
        f"{name}, {'one token' if tokens == 1 else 'several'}",
        kernels.project,
        dict.fromkeys(there, f"*{number}") | ({"result": "*fp32"} if "head" in name else {}),
        shape.constants(kernels, tokens, tile),
        launch_options(tile),
        pieces // (32 * tile.warps * 16),
        tile.stages,
    )


def others(name: str, decoder: Decoder, dtype: torch.dtype) -> Iterator[Case]:
    """What is launched beside the products."""
    number = f"*{NAMES[dtype]}"
    dim = decoder.head
    constants: dict[str, Any] = {
        "HEADS": decoder.heads, "KV_HEADS": decoder.kv_heads, "DIM": dim, "DIM_PAD": dim,
        "CENTRED": False, "QUERY_PAD": 8192, "KEY_PAD": 2048,
        "ROTARY": dim, "PAIRS": False, "HEADS_EACH": tiles.HEADS_EACH,
    }  # fmt: skip
    pointers = dict.fromkeys(("query", "key", "result"), number)
    pointers |= {"cosines": "*fp32", "sines": "*fp32", "positions": "*i64"}
    norms = {"query_norm": number, "key_norm": number}
    for kind, normed, of_heads in (("plain", False, False), ("heads", True, True), ("rows", True, False)):
        own = {"HAS_NORM": normed, "OF_HEADS": of_heads, "OWN_WEIGHTS": normed and not of_heads}
        present = pointers | (norms if normed else {})
        yield Case(f"{name} rotate {kind}", kernels.rotate, present, constants | own, OPTIONS | {"num_warps": 4})
    for kind, residual in (("norm", False), ("norm and residual", True)):
        pointers = dict.fromkeys(("x", "norm", "result", *(("residual",) if residual else ())), number)
        for centred in (False, True):
            constants = norm_constants(decoder.hidden, centred, bias=False, residual=residual)
            named = f"{name} {'layer ' if centred else ''}{kind}"
            yield Case(named, kernels.norm_rows, pointers, constants, norm_options(decoder.hidden))
    constants = {"INNER": decoder.intermediate, "GATED": True, "ACTIVATION": 0, "NUMBERS_EACH": NUMBERS_EACH}
    yield Case(
        f"{name} activate", kernels.activate, dict.fromkeys(("gate", "up", "result"), number), constants, OPTIONS
    )


def adapters(dtype: torch.dtype, rank: int) -> Iterator[Case]:
    """What adds adapters whose largest rank is that."""
    numbers, each = f"*{NAMES[dtype]}", outputs_of(rank)
    tables = {"which": "*i32", "pointers": "*i64", "ranks": "*i32", "sums": "*fp32"}
    named, options = f"adapters {NAMES[dtype]} rank {rank}", options_of(rank)
    loads = rank * each * dtype.itemsize // (32 * options["num_warps"] * 16)
    constants = {"RANK": rank, "COLUMNS": COLUMNS, "BLOCK": each}
    yield Case(f"{named} shrink", adapter_kernels.shrink, tables | {"numbers": numbers}, constants, options, loads)
    pointers = tables | {"scalings": "*fp32", "results": numbers}
    yield Case(f"{named} expand", adapter_kernels.expand, pointers, {"RANK": rank, "OUTPUTS": each}, options, loads)


def cases(quick: bool) -> Iterator[Case]:
    """Every kernel, but for the tiny model; if it has to be quick, those that read the most."""
    for name, decoder in list(DECODERS.items())[: 1 if quick else -1]:
        for dtype in DTYPES[: 1 if quick else None]:
            named = f"{name} {NAMES[dtype]}"
            for part, shape in list(products(decoder, dtype))[: 1 if quick else None]:
                for tokens in (1, MOST_TOKENS):
                    yield product(f"{named} {part}", shape, tokens)
            if not quick:
                yield from others(named, decoder, dtype)
    for dtype in DTYPES[: 1 if quick else None]:
        for rank in (16,) if quick else (8, 16, 64, 256):
            yield from adapters(dtype, rank)


def compiled(case: Case) -> dict[str, int]:
    """Registers per thread, bytes spilled, bytes of shared memory, and loads of 16 bytes."""
    names = case.function.arg_names
    types = {name: case.pointers.get(name) or _SCALARS.get(name, "constexpr") for name in names}
    constants = {name: case.constants.get(name) for name in names if types[name] == "constexpr"}
    source = ASTSource(
        fn=case.function,
        signature=types,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(names)
            if types[name].startswith("*") or name in _EVEN
        },
    )
    kernel = triton.compile(source, target=HOPPER, options=dict(case.options))
    ptx = kernel.asm["ptx"]
    found = resources(ptx) | {"shared": int(kernel.metadata.shared), "wide": len(_WIDE.findall(ptx))}
    return found | {"needed": case.loads, "on the way": on_the_way(case, found["registers"], found["shared"])}


def on_the_way(case: Case, registers: int, shared: int) -> int:
    """Bytes of weights that a multiprocessor of an H100 or H200 has asked for at a time."""
    warps = int(case.options.get("num_warps", 4))
    programs = sass.programs(registers, shared, warps)
    return programs * max(case.stages - 1, 0) * case.loads * 32 * warps * 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the largest product of one model, and adapters")
    results, streaming = {}, set()
    for case in cases(parser.parse_args().quick):
        results[case.name] = found = compiled(case)
        streaming |= {case.name} if case.stages else set()
        print(f"{case.name:<45} {found}", flush=True)
    spilling = [name for name, found in results.items() if found["spilled"]]
    starving = [name for name, found in results.items() if name in streaming and found["on the way"] < ON_THE_WAY]
    narrow = [name for name, found in results.items() if found["wide"] < found["needed"]]
    print(
        json.dumps(
            {
                "benchmark": "fused_compile",
                "triton": triton.__version__,
                "target": "sm_90a",
                "kernels": len(results),
                "spilling": spilling,
                "narrow": narrow,
                "starving": starving,
                "most_registers": max(found["registers"] for found in results.values()),
                "most_shared": max(found["shared"] for found in results.values()),
            }
        )
    )
    sys.exit(bool(spilling or narrow or starving))


if __name__ == "__main__":
    main()
