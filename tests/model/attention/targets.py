"""Processors for which the compiled code is compiled here beside this machine's own."""

from __future__ import annotations

import platform

import pytest

from asyncengine import builds

_NEEDED = {
    "-march=native": "", "-march=x86-64": "sse2", "-march=x86-64-v3": "avx512vl", "-march=x86-64-v4": "avx512_bf16",
    "-march=native -mno-amx-tile": "amx_bf16",
}  # fmt: skip
"""Instructions that a processor has if the target's code runs on it, and is not what it compiles for itself anyway.

That is so of AVX2 where there is no AVX-512.
"""


def require_target(target: str) -> None:
    """Skips the test where the target's code cannot run, or is this machine's own, which is tested by itself."""
    if (target != "-march=native" and platform.machine() != "x86_64") or _NEEDED[target] not in builds.processor():
        pytest.skip("not this processor, or what is compiled for it anyway")
