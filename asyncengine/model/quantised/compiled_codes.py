"""The compiled code that takes blocks of ggml apart and makes numbers of codes, on the CPU: built on first use.

Where there is no compiler, or for what the code does not know, there is plain torch, which comes to the same bits in
several times as long; only what is no number may be another such. No call holds the GIL.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch

from asyncengine import builds
from asyncengine.builds import BuildError, Recipe
from asyncengine.model.attention.kernel import TARGETS, find_openmp

SOURCE = Path(__file__).with_name("codes.cpp")
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off")


class _Blocks(ctypes.Structure):
    """As `Blocks` in codes.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("blocks", "codes", "scales", "minima")),
        *((name, ctypes.c_int64) for name in ("type", "count", "threads")),
    )  # fmt: skip


class _Numbers(ctypes.Structure):
    """As `Numbers`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "zeros", "values", "to")),
        *((name, ctypes.c_int64) for name in ("outputs", "inputs", "group", "bfloat16", "threads")),
    )  # fmt: skip


def build() -> Path:
    """Returns the path of the compiled library, compiling it in a subprocess if the cache has none that fits.

    Raises:
        BuildError: There is no compiler, or it failed; the message says which.
    """
    openmp = find_openmp()
    recipe = Recipe(
        what="the code that reads quantised weights",
        name="codes",
        sources=(SOURCE,),
        before=_FLAGS,
        targets=TARGETS,
        after=(str(openmp), f"-Wl,-rpath,{openmp.parent}") if openmp else ("-DCODES_SERIAL",),
    )
    return builds.build(recipe, builds.find_compiler())


@cache
def library() -> Any:
    """The compiled code; None where there is none."""
    try:
        found = ctypes.CDLL(str(build()))
        found.codes_of_blocks.restype, found.codes_of_blocks.argtypes = ctypes.c_int, (ctypes.c_void_p,)
        found.numbers_of_codes.restype, found.numbers_of_codes.argtypes = None, (ctypes.c_void_p,)
    except (BuildError, OSError, AttributeError):
        return None
    return found


def take_apart(
    type_id: int, blocks: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, minima: torch.Tensor | None
) -> bool:
    """Writes the codes and scales of blocks, and what is added to them.

    Args:
        type_id: ggml's.
        blocks: (blocks, bytes of a block) uint8, dense.
        codes: (blocks, bytes of codes) dense: a byte each, less what their middle is, or two neighbours in a byte.
        scales: (blocks, groups) float32, dense: what a step is.
        minima: As `scales`, of types that have some.

    Returns:
        Whether it was done; if not, the code is not there or does not know the type.
    """
    code = library()
    if code is None:
        return False
    threads = torch.get_num_threads()
    of_minima = None if minima is None else minima.data_ptr()
    job = _Blocks(blocks.data_ptr(), codes.data_ptr(), scales.data_ptr(), of_minima, type_id, len(blocks), threads)
    done: int = code.codes_of_blocks(ctypes.addressof(job))
    return done == 0


def make_numbers(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    values: tuple[float, ...] | None,
    to: torch.Tensor,
) -> bool:
    """Writes ``scale * (code - zero)``, rounded once.

    Args:
        codes: (outputs, inputs) int8, or (outputs, inputs / 2) uint8 with two in a byte.
        scales: (outputs, groups).
        zeros: As `scales`, or None.
        values: What the sixteen codes of four bits stand for; None if codes have eight.
        to: (outputs, inputs), dense.

    Returns:
        Whether it was done; if not, the code is not there, or does not know such tensors.
    """
    if to.device.type != "cpu" or to.dtype not in (torch.float32, torch.bfloat16):
        return False
    if codes.dtype is not (torch.int8 if values is None else torch.uint8) or (code := library()) is None:
        return False
    outputs, inputs = to.shape
    group = inputs // max(scales.shape[-1], 1)
    if scales.shape != (outputs, inputs // max(group, 1)) or group * scales.shape[1] != inputs:
        return False
    if (zeros is not None and zeros.shape != scales.shape) or (values is not None and group % 2):
        return False
    table = None if values is None else torch.tensor(values, dtype=torch.float32)
    given = [None if each is None else each.contiguous() for each in (codes, scales.float(), zeros, table)]
    given[2] = None if given[2] is None else given[2].float()
    job = _Numbers(
        *(None if each is None else each.data_ptr() for each in (*given, to)),
        outputs,
        inputs,
        group,
        to.dtype is torch.bfloat16,
        torch.get_num_threads(),
    )
    code.numbers_of_codes(ctypes.addressof(job))
    return True
