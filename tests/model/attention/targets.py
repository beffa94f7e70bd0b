"""Processors for which the compiled code is compiled here beside this machine's own."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from asyncengine import builds
from asyncengine.model.attention import kernel

_NEEDED = {
    "-march=native": "", "-march=x86-64": "sse2", "-march=x86-64-v3": "avx512vl", "-march=x86-64-v4": "avx512_bf16",
    "-march=native -mno-amx-tile": "amx_bf16",
}  # fmt: skip
"""Instructions that a processor has if the target's code runs on it, and is not what it compiles for itself anyway.

That is so of AVX2 where there is no AVX-512.
"""

DECODERS = """
extern "C" void decoder_lanes() {}
extern "C" void decoder_round() {}
extern "C" void decoder_int8_router() {}
extern "C" void decoder_pack_codes() {}
extern "C" void decoder_pack() {}
extern "C" void decoder_step() {}
extern "C" void decoder_experts() {}
extern "C" void decoder_product() {}
extern "C" void decoder_products() {}
"""


def require_target(target: str) -> None:
    """Skips the test where the target's code cannot run, or is this machine's own, which is tested by itself."""
    if (target != "-march=native" and platform.machine() != "x86_64") or _NEEDED[target] not in builds.processor():
        pytest.skip("not this processor, or what is compiled for it anyway")


def compile_attention_alone(directory: Path, patch: pytest.MonkeyPatch) -> None:
    """The compiler takes twice as long for a decoder's step. What is compiled is one build, whoever asks for it."""
    source = directory / "attention.cpp"
    source.write_text(f'#include "{kernel.SOURCE.parents[1] / "attention" / "paged_attention.cpp"}"\n{DECODERS}')
    patch.setattr(kernel, "SOURCE", source)
    optimise_less(patch)


def optimise_less(patch: pytest.MonkeyPatch) -> None:
    """The branches for other processors are the same, and the compiler takes half of the time."""
    patch.setattr(kernel, "_FLAGS", less_optimised())


def less_optimised() -> tuple[str, ...]:
    return tuple("-O0" if flag == "-O2" else flag for flag in kernel._FLAGS)
