"""Registers, spills and instructions of the Triton attention kernels for Hopper. Needs triton, but no GPU.

Every entry of the tables of tiles is compiled for sm_90, short and long tiles, with and without window, soft cap and
sinks, with a bias, and long ones of layers that look ahead; those of latents, whose values are in their keys, without.
ptxas says how many registers a thread takes and how many bytes it spills. Of the loop over the keys this says

* `turn`: instructions of a warp for one block of keys, splits that end and masks left out (`sass.py`),
* `issue`, of short tiles: the share of a multiprocessor's issue slots that this takes where keys and values stream at
  4.8 TB/s (an H200: 132 multiprocessors, 1.755 GHz). More than 1 cannot keep up with memory,
* `matrix`, of long tiles: the share of the matrix units' rate where nothing else is done while they multiply,
* `ahead`: KiB of keys and values that a multiprocessor has asked for, at most, while it computes. With some 0.8 us
  between asking and getting it must be 29.

A kernel that spills, or does not load ahead though it should, is slow: the exit status is 1 if there is one. The last
line is one JSON object.

    python -m benchmarks.attention_compile [--quick]
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The kernels must not be made for the interpreter. Triton reads this when it is imported.
os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from asyncengine.model.attention import fp8, tuned_tiles
from asyncengine.model.attention import triton_kernels as kernels
from asyncengine.model.attention.protocol import LayerSpec
from asyncengine.model.attention.token_major import numbers_kept
from asyncengine.model.attention.triton_launch import (
    MERGE_LAUNCH,
    WRITE_LAUNCH,
    attend_constants,
    launch_options,
    merge_constants,
    write_constants,
)
from asyncengine.model.attention.triton_tiles import EXACT, IN_KEYS, TABLE, Launch, Tiles, tiles_for
from benchmarks import sass

HOPPER = GPUTarget("cuda", 90, 32)
HEADS = [(16, 16), (24, 24), (40, 40), (64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256), (512, 512)]
LATENTS = [(72, 64), (160, 128), (288, 256), (576, 512), (584, 512)]
"""Sizes of keys whose beginnings are values: the last of a draft head's layer."""
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "window, soft cap, sinks": {"sliding_window": 1024, "soft_cap": 50.0, "has_sinks": True},
    "window, looks ahead": {"sliding_window": 1024, "looks_ahead": True},
    "bias": {"distances": 129},
}
QUICK = [(128, 128)]
QUICK_FEATURES = FEATURES | {"everything": FEATURES["window, soft cap, sinks"] | FEATURES["window, looks ahead"]}
QUICK_LOOPS = ("attend short bf16 128/128 plain", "attend long fp8e4nv 128/128 everything")
"""Kernels with a loop over the keys, in which each dtype, feature and tile occurs."""
STREAM = 4.8e12 / 132 / 1.755e9
"""Bytes of memory for each multiprocessor and cycle."""
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", fp8.E4M3: "fp8e4nv"}


@dataclass(frozen=True, slots=True)
class Case:
    """One kernel to compile.

    Attributes:
        block: Bytes of keys and values that a turn of its loop over the keys reads; 0 if it has no such loop.
        products: Multiplications and additions of such a turn.
    """

    name: str
    function: Any
    types: dict[str, str]
    constants: dict[str, Any]
    launch: Launch
    block: int = 0
    products: int = 0


def cases(
    heads: list[tuple[int, int]],
    dtypes: list[torch.dtype],
    features: dict[str, dict[str, Any]] = FEATURES,
    heads_of_query: int = 32,
    kv_heads: int = 8,
) -> Iterator[Case]:
    """Every kernel that layers with such heads would run."""
    for dtype in dtypes:
        number = NAMES[dtype]
        for key_dim, value_dim in heads:
            for named, values in features.items():
                spec = LayerSpec(heads_of_query, kv_heads, key_dim, value_dim, key_dim**-0.5, **values)
                tiles = tiles_for(dtype.itemsize, key_dim, value_dim, spec.values_in_keys, bool(spec.distances))
                assert tiles is not None
                name = f"{number} {key_dim}/{value_dim} {named}"
                yield from cases_of(name, spec, dtype, tiles)


def quick_cases() -> Iterator[Case]:
    """Of those with a loop over the keys, two, and all others, of one head size in bfloat16 and in fp8."""
    every = cases(QUICK, [torch.bfloat16, fp8.E4M3], QUICK_FEATURES)
    return (case for case in every if not case.block or case.name in QUICK_LOOPS)


def stored() -> Iterator[Case]:
    """Every kernel that tiles which were tuned on a device would run."""
    of_size = {1: fp8.E4M3, 2: torch.bfloat16, 4: torch.float32}
    for path in sorted(tuned_tiles.DIRECTORY.glob("*.json")):
        for (itemsize, key_dim, value_dim), tiles in tuned_tiles.read(path.stem).items():
            spec = LayerSpec(32, 8, key_dim, value_dim, key_dim**-0.5)
            yield from cases_of(f"{path.stem} {itemsize} {key_dim}/{value_dim}", spec, of_size[itemsize], tiles)


def cases_of(name: str, spec: LayerSpec, dtype: torch.dtype, tiles: Tiles) -> Iterator[Case]:
    """Every kernel that one layer would run, with one way to cut it."""
    number = NAMES[dtype]
    sinks = "*fp32" if spec.has_sinks else "constexpr"
    model = "bf16" if dtype is fp8.E4M3 else number  # what queries are in
    types = {
        "plan": "*i32", "query": f"*{model}", "keys": f"*{number}", "values": f"*{number}", "sinks": sinks,
        "bias": "*fp32" if spec.distances else "constexpr",
        "output": f"*{model}", "parts": "*fp32", "statistics": "*fp32", "query_token": "i32", "query_head": "i32",
        "scaling": "fp32", "soft_cap": "fp32", "value_scale": "fp32",
    }  # fmt: skip
    for kind, launch, index in (("short", tiles.short, 0), ("long", tiles.long, 1)):
        constants = attend_constants(spec, dtype, 16, index, launch, tiles, reach=True)
        if spec.looks_ahead and not constants["AHEAD"]:
            continue  # as of other layers
        case = Case(f"attend {kind} {name}", kernels.attend, types, constants, launch)
        products = 2 * launch.rows * tiles.keys * (spec.key_dim + spec.value_dim)
        yield dataclasses.replace(case, block=tiles.keys * numbers_kept(spec) * dtype.itemsize, products=products)
    types = {"plan": "*i32", "sinks": sinks, "output": f"*{model}", "parts": "*fp32", "statistics": "*fp32"}
    types["value_scale"] = "fp32"
    if spec.looks_ahead or spec.distances:
        return
    yield Case(f"merge {name}", kernels.merge, types, merge_constants(spec, 0), MERGE_LAUNCH)
    if not spec.has_sinks:
        cached = "u8" if dtype is fp8.E4M3 else number
        types = {
            "plan": "*i32", "key": f"*{model}", "value": f"*{model}", "keys": f"*{cached}", "values": f"*{cached}",
            "tokens": "i32", "key_token": "i32", "key_head": "i32", "value_token": "i32", "value_head": "i32",
            "key_scale": "fp32", "value_scale": "fp32",
        }  # fmt: skip
        yield Case(f"write {name}", kernels.write, types, write_constants(spec, dtype, 16), WRITE_LAUNCH)


def compiled(case: Case) -> dict[str, Any]:
    """Registers per thread, bytes spilled and of shared memory, and of the loop over the keys what is said above."""
    names = case.function.arg_names
    types = {name: case.types.get(name, "constexpr") for name in names}
    constants = case.constants | {name: None for name, kind in types.items() if kind == "constexpr"} | case.constants
    # As at run time: pointers are aligned, and strides are multiples of 16.
    aligned = [i for i, name in enumerate(names) if types[name].startswith("*") or types[name] == "i32"]
    aligned = [i for i in aligned if names[i] != "tokens"]
    source = ASTSource(
        fn=case.function,
        signature=types,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    kernel = triton.compile(source, target=HOPPER, options=launch_options(case.launch))
    ptx = kernel.asm["ptx"]
    found: dict[str, Any] = resources(ptx) | {"shared": int(kernel.metadata.shared)}
    if case.block:
        found |= loop(case, ptx, kernel.asm["cubin"], found)
    return found


def loop(case: Case, ptx: str, cubin: bytes, found: dict[str, Any]) -> dict[str, Any]:
    """What is said above of the loop over the keys."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        turn = sass.turn(Path(file.name))
    launch = case.launch
    cycles = turn.total() * launch.warps / 4
    multiplying = case.products / (4096 if turn["HGMMA"] else 2048)
    short = {"issue": round(cycles / (case.block / STREAM), 2)}
    long = {"matrix": round(multiplying / (multiplying + cycles), 2)}
    # Loads that are all waited for at once are not ahead of anything.
    waits = [int(pending) for pending in re.findall(r"cp\.async\.wait_group\s+(\d+)", ptx)]
    turns_ahead = launch.stages - 1 if max(waits, default=0) else 0
    programs = sass.programs(found["registers"], found["shared"], launch.warps)
    ahead = {"ahead": programs * turns_ahead * case.block >> 10}
    if not turn:  # float32 is multiplied without matrix units
        return ahead
    return {"turn": turn.total()} | (short if case.name.startswith("attend short") else long) | ahead


def resources(ptx: str) -> dict[str, int]:
    """What ptxas says of a kernel."""
    assembler = get_ptxas(HOPPER.arch).path
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory, "kernel.ptx")
        source.write_text(ptx)
        command = [assembler, "-v", "--gpu-name=sm_90a", str(source), "-o", str(source.with_suffix(".cubin"))]
        said = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    registers = re.search(r"Used (\d+) registers", said)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert registers is not None and spills is not None, said
    return {"registers": int(registers[1]), "spilled": int(spills[1]) + int(spills[2])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one head size, a few kernels in bfloat16 and in fp8")
    quick = parser.parse_args().quick
    results, loads_ahead = {}, {}
    of_latents = cases(LATENTS, list(NAMES), {"in keys": {"values_in_keys": True}}, 128, 1)
    wanted = quick_cases() if quick else itertools.chain(cases(HEADS, list(NAMES)), of_latents)
    for case in itertools.chain(wanted, stored()):
        results[case.name] = found = compiled(case)
        loads_ahead[case.name] = case.launch.stages > 1
        print(f"{case.name:<55} {found}", flush=True)
    spilling = [name for name, found in results.items() if found["spilled"]]
    waiting = [name for name, found in results.items() if found.get("ahead") == 0 and loads_ahead[name]]
    print(
        json.dumps(
            {
                "benchmark": "attention_compile",
                "triton": triton.__version__,
                "target": "sm_90a",
                "entries": len(TABLE) + len(EXACT) + len(IN_KEYS),
                "kernels": len(results),
                "spilling": spilling,
                "waiting": waiting,
                "most_registers": max(found["registers"] for found in results.values()),
            }
        )
    )
    sys.exit(bool(spilling or waiting))


if __name__ == "__main__":
    main()
