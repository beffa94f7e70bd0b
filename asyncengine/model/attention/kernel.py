"""The compiled code for the CPU, attention and a decoder's whole step: built by the system's compiler on first use.

There is a library for each kind of numbers, and only what a model needs is compiled: each kind takes seconds.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch

from asyncengine import builds
from asyncengine.builds import BuildError, Recipe
from asyncengine.config import Quantization
from asyncengine.model.attention.protocol import BackendUnavailableError

SOURCE = Path(__file__).parents[1] / "decoder" / "decoder.cpp"
_INCLUDED = (
    *map(Path(__file__).with_name, ("paged_attention.cpp", "tiles.h")),
    *map(SOURCE.with_name, ("bundles.h", "bundle_tiles.h")),
)

# Infinities and NaN keep their meaning: masks are made of the former, and a model's own NaN must not be hidden.
_FLAGS = ("-std=c++17", "-O2", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")
_POINTER, _INTEGER = ctypes.c_void_p, ctypes.c_int64
_FUNCTIONS: dict[str, tuple[type | None, tuple[type, ...]]] = {
    "paged_attention": (ctypes.c_int, (_POINTER, _POINTER, _POINTER)),
    "paged_attention_advise": (None, (_POINTER, _INTEGER)),
    "decoder_lanes": (_INTEGER, ()),
    "decoder_pack": (None, (_POINTER, _INTEGER, _INTEGER)),
    "decoder_pack_codes": (None, (_POINTER, _INTEGER, _INTEGER)),
    "decoder_round": (None, (_POINTER, _INTEGER)),
    "decoder_int8_router": (_INTEGER, ()),
    "decoder_step": (ctypes.c_int, (_POINTER, _POINTER)),
    "decoder_experts": (
        ctypes.c_int,
        (_POINTER, _INTEGER, _POINTER, _INTEGER, _POINTER, _POINTER, _POINTER, _INTEGER),
    ),
    "decoder_product": (ctypes.c_int, (_POINTER, _POINTER, _INTEGER, _POINTER, _INTEGER)),
    "decoder_products": (ctypes.c_int, (_POINTER, _INTEGER, _POINTER, _INTEGER, _POINTER, _INTEGER)),
}
Kind = Literal["float32", "bfloat16", "float16", "int8", "int4"]
"""What a library computes with. The last two are bfloat16 with weights in int8 or four bits."""
NARROW: tuple[Kind, ...] = ("int8", "int4")
"""The kinds that keep what is not a weight in bfloat16."""
_KINDS: dict[Kind, int] = {"float32": 0, "bfloat16": 1, "float16": 2, "int8": 3, "int4": 4}  # see paged_attention.cpp
DTYPES: dict[torch.dtype, Kind] = {
    torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16",
}  # fmt: skip
"""The kind for each dtype that can be stored."""

TARGETS: tuple[tuple[str, ...], ...] = (("-march=native",), ("-mcpu=native",), ())
"""Flags for this machine's processor. Not every compiler knows the first for every processor."""


def kind_of(dtype: torch.dtype, quantization: Quantization = "none") -> Kind:
    """What a model of a dtype computes with."""
    return quantization if quantization in ("int8", "int4") else DTYPES.get(dtype, "float32")


def build(
    kind: Kind = "float32",
    progress: Callable[[str], None] | None = None,
    target: Sequence[str] | None = None,
) -> Path:
    """Returns the path of the library for a kind, compiling it in a subprocess if the cache has none that fits.

    Safe to call from several threads and processes at once. Waiting for the compiler does not hold the GIL.

    Args:
        kind: What it computes with.
        progress: Called with a sentence before something slow happens.
        target: The compiler's flags for the processor; None is this machine's own.

    Raises:
        BackendUnavailableError: There is no compiler, or it failed; the message says which.
    """
    openmp = find_openmp()
    recipe = Recipe(
        what="the cpu attention back end",
        name=f"{kind}-kernels",
        sources=(SOURCE, *_INCLUDED),
        before=(*_FLAGS, f"-DONE_KIND={_KINDS[kind]}"),
        targets=TARGETS if target is None else (tuple(target),),
        after=(str(openmp), f"-Wl,-rpath,{openmp.parent}") if openmp else ("-DPAGED_ATTENTION_SERIAL",),
    )
    compiler = find_compiler()
    try:
        return builds.build(recipe, compiler, progress)
    except BuildError as error:
        raise BackendUnavailableError(str(error)) from error


def load(library: Path) -> ctypes.CDLL:
    """Loads what `build` returned; calls through it release the GIL.

    Raises:
        BackendUnavailableError: The library cannot be loaded.
    """
    try:
        loaded = ctypes.CDLL(str(library))
    except OSError as error:
        raise BackendUnavailableError(f"cannot load the compiled attention kernel {library}: {error}") from error
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    return loaded


def find_compiler() -> list[str]:
    """The command that compiles C++.

    Raises:
        BackendUnavailableError: There is none.
    """
    try:
        return builds.find_compiler()
    except BuildError as error:
        raise BackendUnavailableError(f"the cpu attention back end needs a C++ compiler: {error}") from error


def find_openmp() -> Path | None:
    """Finds the OpenMP runtime that torch uses: its own, or else the one that it made the process load."""
    own = sorted((Path(torch.__file__).parent / "lib").glob("lib*omp*"))
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    loaded = [Path(line.split(maxsplit=5)[5]) for line in lines if "omp" in line and "/" in line]
    for candidates in (own, loaded):
        for stem in ("libgomp", "libiomp5", "libomp"):
            for candidate in candidates:
                if candidate.name.startswith((f"{stem}.", f"{stem}-")):
                    return candidate
    return None
