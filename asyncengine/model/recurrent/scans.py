"""The compiled code for recurrent layers on the CPU: built by the system's compiler on first use, and called from here.

What it computes is described at the top of scans.cpp. No call holds the GIL.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from pathlib import Path

import torch

from asyncengine import builds
from asyncengine.builds import BuildError, Recipe
from asyncengine.model.attention.kernel import TARGETS, find_openmp

SOURCE = Path(__file__).with_name("scans.cpp")
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""What the code can read and write, and how it is told."""
MOST_TAPS = 16
"""Tokens that a convolution sees, or keeps, at most."""

# Nothing is contracted but what the source says: the same token is to get the same bits in every loop.
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off")
# The structures DeltaRule, SelectiveScan and Convolution of scans.cpp.
_TENSOR = "Pq4q"
_DELTA_RULE = struct.Struct("@" + 6 * _TENSOR + "P11qd")
_SELECTIVE_SCAN = struct.Struct("@" + 6 * _TENSOR + "4P11q2d")
_CONVOLUTION = struct.Struct("@" + 4 * _TENSOR + "P8q")
_FUNCTIONS = ("delta_rule", "selective_scan", "convolution")


def build(progress: Callable[[str], None] | None = None) -> Path:
    """Returns the path of the compiled library, compiling it in a subprocess if the cache has none that fits.

    Args:
        progress: Called with a sentence before something slow happens.

    Raises:
        BuildError: There is no compiler, or it failed; the message says which.
    """
    openmp = find_openmp()
    recipe = Recipe(
        what="the code of recurrent layers",
        name="scans",
        sources=(SOURCE,),
        before=_FLAGS,
        targets=TARGETS,
        after=(str(openmp), f"-Wl,-rpath,{openmp.parent}") if openmp else ("-DSCANS_SERIAL",),
    )
    return builds.build(recipe, builds.find_compiler(), progress)


class Scans:
    """The compiled code.

    Sizes are taken from the tensors, whose dtypes may be any of `CODES`, each its own, and whose strides are free
    but for what a function says. B is the number of sequences, T that of tokens of each.

    Args:
        library: What `build` returned.

    Raises:
        BuildError: It cannot be loaded.
    """

    def __init__(self, library: Path) -> None:
        try:
            loaded = ctypes.CDLL(str(library))
            self._functions = {name: getattr(loaded, name) for name in _FUNCTIONS}
        except (OSError, AttributeError) as error:
            raise BuildError(f"cannot load the compiled code of recurrent layers {library}: {error}") from error
        for function in self._functions.values():
            function.restype, function.argtypes = ctypes.c_int, (ctypes.c_char_p,)

    def delta_rule(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        decay: torch.Tensor,
        beta: torch.Tensor,
        state: torch.Tensor,
        *,
        fresh: bool,
        normalise: bool,
    ) -> torch.Tensor:
        """The gated delta rule (Yang et al., 2024), or with a decay for each key channel Kimi Delta Attention.

        Args:
            query: (B, T, key heads, key dim), and `key`.
            key: Each of its heads serves as many consecutive heads of the values as there are to one.
            value: (B, T, heads, value dim).
            decay: (B, T, heads), or (B, T, heads, key dim): its logarithm.
            beta: (B, T, heads).
            state: (B, heads, key dim, value dim) float32, dense but for the first stride; changed in place.
            fresh: Whether nothing came before: the state is written only.
            normalise: Whether queries and keys are given a length of 1.

        Returns:
            (B, T, heads, value dim) in the dtype of the queries.
        """
        batch, tokens, key_heads, key_dim = key.shape
        heads, value_dim = value.shape[2:]
        output = torch.empty((batch, tokens, heads, value_dim), dtype=query.dtype)
        if not tokens:
            if fresh:
                state.zero_()
            return output
        self._call(
            "delta_rule",
            _DELTA_RULE.pack(
                *_tensor(query),
                *_tensor(key),
                *_tensor(value),
                *_tensor(decay),
                *_tensor(beta),
                *_tensor(output),
                state.data_ptr(),
                state.stride(0),
                batch,
                tokens,
                key_heads,
                heads,
                key_dim,
                value_dim,
                fresh,
                decay.dim() == 4,
                normalise,
                torch.get_num_threads(),
                key_dim**-0.5,
            ),
        )
        return output

    def selective_scan(
        self,
        given: torch.Tensor,
        step: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        c: torch.Tensor,
        state: torch.Tensor,
        output: torch.Tensor,
        *,
        fresh: bool,
        skip: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        gate: torch.Tensor | None = None,
        softplus: bool = False,
        limits: tuple[float, float] = (float("-inf"), float("inf")),
    ) -> None:
        """The selective scan of Mamba (Gu & Dao, 2023), or with one step for each head that of Mamba-2.

        Args:
            given: (B, T, heads, dim).
            step: The same, or (B, T, heads): the time that passes with each token.
            a: (heads, dim, state dim) float32 and contiguous, or (heads).
            b: (B, T, groups, state dim), and `c`: each group serves as many consecutive heads as there are to one.
            c: What is read.
            state: (B, heads, dim, state dim) float32, dense but for the first stride; changed in place.
            output: As `given`, its last stride 1; written to.
            fresh: Whether nothing came before: the state is written only.
            skip: (heads, dim), or (heads): times the input, it is added to the output. Float32 and contiguous.
            bias: The same, of the step.
            gate: As `given`: its SiLU times the output is the output.
            softplus: Whether the step's softplus is what counts.
            limits: Of the step then.
        """
        batch, tokens, heads, dim = given.shape
        self._call(
            "selective_scan",
            _SELECTIVE_SCAN.pack(
                *_tensor(given),
                *_tensor(step),
                *_tensor(b),
                *_tensor(c),
                *_tensor(gate),
                *_tensor(output),
                a.data_ptr(),
                0 if skip is None else skip.data_ptr(),
                0 if bias is None else bias.data_ptr(),
                state.data_ptr(),
                state.stride(0),
                batch,
                tokens,
                b.shape[2],
                heads,
                dim,
                b.shape[3],
                fresh,
                a.dim() == 1,
                softplus,
                torch.get_num_threads(),
                *limits,
            ),
        )

    def convolution(
        self,
        given: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        state: torch.Tensor | None,
        *,
        silu: bool,
    ) -> torch.Tensor:
        """Each channel's convolution over the tokens up to each.

        Args:
            given: (B, channels, T); with a state, T is 1.
            weight: (channels, taps), contiguous.
            bias: (channels).
            state: (B, channels, kept) of the dtype of `given`, dense but for the first stride: the last tokens before,
                one less than there are taps at least. The token is put behind them in place. None: there were none.
            silu: Whether the output's SiLU is the output.

        Returns:
            As `given`, with channels beside each other.
        """
        batch, channels, tokens = given.shape
        output = torch.empty((batch, tokens, channels), dtype=given.dtype)
        self._call(
            "convolution",
            _CONVOLUTION.pack(
                *_tensor(given.transpose(1, 2)),
                *_tensor(weight),
                *_tensor(bias),
                *_tensor(output),
                0 if state is None else state.data_ptr(),
                0 if state is None else state.stride(0),
                0 if state is None else state.shape[2],
                batch,
                tokens,
                channels,
                weight.shape[1],
                silu,
                torch.get_num_threads(),
            ),
        )
        return output.transpose(1, 2)

    def _call(self, name: str, packed: bytes) -> None:
        if self._functions[name](packed):
            raise MemoryError("no memory for the scratch space of recurrent layers")


def _tensor(tensor: torch.Tensor | None) -> tuple[int, ...]:
    """The structure Tensor of scans.cpp."""
    if tensor is None:
        return (0,) * 6
    strides = tensor.stride()
    return (tensor.data_ptr(), CODES[tensor.dtype], *strides, *(0,) * (4 - len(strides)))
