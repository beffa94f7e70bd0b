"""Registers, spills and width of loads of the fused kernels, compiled for Hopper. Needs triton, but no GPU.

What `asyncengine.model.fused` launches for models of known shapes, for one token and for several, what
`asyncengine.model.adapters` launches for adapters of several ranks, products with weights of four bits, and what
`asyncengine.model.recurrent` launches for a token of a recurrent layer, in bfloat16, float16 and float32. ptxas says
how many registers a thread takes and how many bytes it spills; how many loads of 16 bytes the code has is counted in
the assembly. Who is to stream at 4.8 TB/s with some 0.8 us between asking and getting must have 29 KiB on the way to
each of 132 multiprocessors; how much is, follows from stages, and from how many programs fit. A kernel that spills,
reads weights in smaller pieces or has less on the way is slow: the exit status is 1 if there is one. Factors of
adapters are small, so how much of them is on the way is not looked at. Whether the others are fast, only a device can
tell. Of weights of four bits that are streamed, `issue` is the share of a multiprocessor's issue slots that unpacking
and multiplying them takes at 4.8 TB/s and 1.755 GHz: with more than 1, that is what takes the time. The last line is
one JSON object.

    python -m benchmarks.fused_compile [--quick]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The kernels must not be made for the interpreter. Triton reads this when it is imported.
os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.compiler import ASTSource

from asyncengine.model.adapters import kernels as adapter_kernels
from asyncengine.model.adapters.factor_table import COLUMNS, options_of, outputs_of
from asyncengine.model.decoder.experts import CLAMPED
from asyncengine.model.fused import kernels, tiles
from asyncengine.model.fused.narrow_product import Shape, launch_options
from asyncengine.model.fused.tiles import MOST_TOKENS
from asyncengine.model.fused.wide_product import NUMBERS_EACH, norm_constants, norm_options
from asyncengine.model.launching import OPTIONS
from asyncengine.model.quantised import four_bit_kernels
from asyncengine.model.quantised.four_bit_product import TABLES, Gate, Matrices, routing_constants
from asyncengine.model.quantised.four_bit_product import launch_options as four_bit_options
from asyncengine.model.quantised.four_bit_tiles import rows_for, tile_for
from asyncengine.model.quantised.four_bits import FP4, NONLINEAR
from asyncengine.model.recurrent import kernels as recurrent_kernels
from asyncengine.model.recurrent import step_kernels
from benchmarks import sass
from benchmarks.attention_compile import HOPPER, NAMES, STREAM, resources
from benchmarks.fused_shapes import DECODERS, Decoder, products

_WIDE = re.compile(r"ld\.global[\w.:]*\.v4\.b32|cp\.async\.cg\.shared\.global[^;]*, 0x10")
_EVEN = ("gate_token", "up_token", "query_token", "key_token", "stride", "inputs", "outputs", "state_row")
"""Arguments that multiples of 16 are given for."""
_ROWS = (
    "query_row", "key_row", "value_row", "decay_row", "beta_row", "given_row", "step_row", "b_row", "c_row",
    "gate_row",
)  # fmt: skip
_PLACES = ("sources", "targets")
"""Pointers to what may lie anywhere."""
_SCALARS = {
    **dict.fromkeys(("tokens", "splits", "pairs", "most", "nowhere", *_EVEN, *_ROWS), "i32"),
    **dict.fromkeys(("offset", "epsilon", "factor", "cap", "query_scale", "scale"), "fp32"),
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
        streamed: Bytes of weights of four bits of a turn, scales and zeros among them; 0 if it has none.
    """

    name: str
    function: Any
    pointers: Mapping[str, str]
    constants: Mapping[str, Any]
    options: Mapping[str, Any]
    loads: int = 0
    stages: int = 0
    streamed: int = 0


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


def four_bits(name: str, matrices: Matrices, dtype: torch.dtype, tokens: float) -> Case:
    """A product with weights of four bits, of so many tokens that a matrix is multiplied with."""
    number, gated = f"*{NAMES[dtype]}", matrices.gate is not None
    there = {"x": number, "result": number, "codes": "*u8", "scales": "*fp32"}
    there |= ({"zeros": "*fp32"} if matrices.zeros else {}) | ({"bias": number} if matrices.bias else {})
    shares = bool(matrices.experts) and not gated
    there |= {"shares": "*fp32"} if shares else {}
    if tokens == 1:
        pairs = 4 if matrices.experts else 1
        rows = rows_for(matrices.inputs, pairs * matrices.outputs, gated)
        there |= {"chosen": "*i64"} if matrices.experts else {}
        constants, options = matrices.of_rows(rows, shares), four_bit_options(rows)
        numbers, stages = rows.outputs * rows.units * 32, rows.stages if matrices.inputs > 32 * rows.units else 2
    else:
        tile = tile_for(tokens, matrices.outputs * max(matrices.experts, 1), dtype.itemsize, gated)
        there |= {"items": "*i32", "order": "*i32"} if matrices.experts else {}
        constants, options = matrices.of_tile(tile, shares, dtype), four_bit_options(tile)
        numbers, stages = tile.outputs * tile.splits * tile.inputs, tile.stages if tile.splits > 1 else 0
    numbers *= 2 if gated else 1
    of_scales = numbers // matrices.group * (8 if matrices.zeros else 4)
    return Case(
        f"{name}, {tokens} tokens",
        four_bit_kernels.by_row if tokens == 1 else four_bit_kernels.by_tile,
        there,
        constants,
        options,
        numbers // 2 // (32 * options["num_warps"] * 16),
        stages if dtype.itemsize == 2 else 0,
        numbers // 2 + of_scales if stages and dtype.itemsize == 2 else 0,
    )


def all_of_four_bits(dtype: torch.dtype) -> Iterator[Case]:
    """For the experts of gpt-oss 20b and layers of llama 8b, of each kind of tile."""
    experts = {"table": TABLES.index(FP4), "bias": True, "experts": 32}
    shapes = {
        "gpt-oss gate and up": Matrices(2880, 5760, 32, shared=4, gate=Gate(CLAMPED, True, 1.702, 7.0), **experts),
        "gpt-oss down": Matrices(2880, 2880, 32, **experts),
        "llama 8b output int4": Matrices(4096, 4096, 128),
        "llama 8b down int4": Matrices(14336, 4096, 128),
        "llama 8b down int4, zeros": Matrices(14336, 4096, 128, zeros=True),
        "llama 8b down nonlinear": Matrices(14336, 4096, 32, TABLES.index(NONLINEAR)),
    }
    for name, matrices in shapes.items():
        for tokens in (1, 4, 16, 48, 160, 512):
            yield four_bits(f"{name} {NAMES[dtype]}", matrices, dtype, tokens)


def around_experts(dtype: torch.dtype) -> Iterator[Case]:
    """What sorts pairs of a token and an expert, and what adds up what came of them."""
    tables = {"chosen": "*i64", "order": "*i32", "items": "*i32"}
    for experts, tokens in ((8, 8), (32, 16), (128, 128)):
        yield Case(
            f"route to {experts}, {tokens}", four_bit_kernels.route, tables, routing_constants(experts, tokens), OPTIONS
        )
    number = f"*{NAMES[dtype]}"
    for parts in (number, "*fp32"):
        pointers = {"parts": parts, "chosen": "*i64", "result": number}
        constants = {"WIDTH": 2880, "TOP": 4, "EXPERTS": 32, "EACH": 1024}
        yield Case(f"add up {number} {parts}", four_bit_kernels.add_up, pointers, constants, OPTIONS)


def recurrent(dtype: torch.dtype) -> Iterator[Case]:
    """A token of recurrent layers, of known shapes: states of scans are in float32, and in the model's dtype, too."""
    number = f"*{NAMES[dtype]}"
    places = dict.fromkeys(_PLACES, "*i64")
    deltas = {
        "qwen3-next": ((16, 32), (128, 128), False),
        "olmo hybrid": ((30, 30), (96, 192), False),
        "small heads": ((4, 4), (64, 64), False),
        "kimi linear": ((32, 32), (128, 128), True),
        "large heads": ((4, 8), (256, 512), False),
    }
    for state in dict.fromkeys(("*fp32", number)):
        for name, (heads, dims, by_channel) in deltas.items():
            constants = step_kernels.delta_rule_constants(heads, dims, by_channel, normalise=True)
            pointers = places | dict.fromkeys(("query", "key", "value", "beta", "output"), number)
            pointers |= {"decay": "*fp32", "state": state}
            yield Case(
                f"delta rule {name} {number} {state}", recurrent_kernels.delta_rule, pointers, constants,
                options := step_kernels.delta_rule_options(constants),
                _of_state(constants["KEY_PAD"] * constants["VALUES"], state, dtype, options),
            )  # fmt: skip
        scans = {
            "mamba-2 2.7b": (80, 1, (64, 128), True),
            "granite 4": (128, 1, (64, 256), True),
            "falcon h1": (24, 2, (128, 256), True),
            "mamba 2.8b": (1, 1, (5120, 16), False),
        }
        for name, (count, groups, dims, by_head) in scans.items():
            constants = step_kernels.selective_scan_constants(count, groups, dims, by_head, softplus=True)
            pointers = places | dict.fromkeys(("given", "step", "b", "c"), number) | {"a": "*fp32", "state": state}
            pointers |= {"skip": number, "bias": number, "output": "*fp32"} if by_head else {}
            pointers |= {} if by_head else {"skip": "*fp32", "bias": "*fp32", "gate": number, "output": number}
            yield Case(
                f"scan {name} {number} {state}", recurrent_kernels.selective_scan, pointers, constants,
                options := step_kernels.selective_scan_options(constants),
                _of_state(constants["EACH"] * constants["STATE_PAD"], state, dtype, options),
            )  # fmt: skip
    for taps, kept in ((4, 4), (4, 3), (3, 3), (16, 16)):
        constants = step_kernels.convolution_constants(8192, taps, kept, silu=True)
        pointers = places | dict.fromkeys(("given", "weight", "bias", "state", "output"), number)
        yield Case(
            f"convolution of {taps} over {kept} {number}", recurrent_kernels.convolution, pointers, constants,
            step_kernels.CONVOLUTION_OPTIONS,
        )  # fmt: skip


def _of_state(numbers: int, state: str, dtype: torch.dtype, options: Mapping[str, Any]) -> int:
    """Loads of 16 bytes with which a thread reads its part of a state."""
    itemsize = 4 if state == "*fp32" else dtype.itemsize
    return numbers * itemsize // (32 * int(options["num_warps"]) * 16)


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
        if quick:
            yield from itertools.islice(all_of_four_bits(dtype), 2)
            yield next(recurrent(dtype))
        else:
            yield from all_of_four_bits(dtype)
            yield from around_experts(dtype)
            yield from recurrent(dtype)


def compiled(case: Case) -> dict[str, Any]:
    """Registers per thread, bytes spilled, bytes of shared memory, loads of 16 bytes, and what is said above."""
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
            if (types[name].startswith("*") and name not in _PLACES) or name in _EVEN
        },
    )
    kernel = triton.compile(source, target=HOPPER, options=dict(case.options))
    ptx = kernel.asm["ptx"]
    found = resources(ptx) | {"shared": int(kernel.metadata.shared), "wide": len(_WIDE.findall(ptx))}
    found |= {"needed": case.loads, "on the way": on_the_way(case, found["registers"], found["shared"])}
    return found | (issued(case, kernel.asm["cubin"]) if case.streamed else {})


def issued(case: Case, cubin: bytes) -> dict[str, Any]:
    """Instructions of a turn of the loop for a warp, and the share of issue slots; nothing, if all is read at once."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        turn = sass.turn(Path(file.name), ("FFMA", *sass.MATRIX)).total()
    cycles = turn * int(case.options["num_warps"]) / 4
    return {"turn": turn, "issue": round(cycles / (case.streamed / STREAM), 2)} if turn else {}


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
