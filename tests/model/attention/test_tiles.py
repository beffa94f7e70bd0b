"""Tiles of AMX: that they multiply where the processor has them, and what happens where the system refuses them."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from attention_case import layer, random_row, run_paged
from targets import compile_attention_alone

from asyncengine.model.attention import kernel
from asyncengine.model.attention.cpu import CpuAttention

WITHOUT = ("-march=native", "-mno-amx-tile")


def _has_tiles() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists() or "amx_bf16" not in cpuinfo.read_text():
        return False
    command = [*kernel.find_compiler(), "-march=native", "-dM", "-E", "-x", "c++", "/dev/null"]
    defined = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return "__AMX_BF16__" in defined


pytestmark = pytest.mark.skipif(not _has_tiles(), reason="needs a processor, and a compiler, with AMX")


def outputs(target: tuple[str, ...] | None) -> torch.Tensor:
    """Of one case in bfloat16."""
    spec = layer(heads=4, kv_heads=2, key_dim=64, value_dim=64)
    row = random_row(spec, 300, 40, torch.bfloat16, 0)
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        if target is not None:
            compile_attention_alone(Path(directory), patch)
        return run_paged(CpuAttention("bfloat16", target=target), spec, [row], 32, torch.bfloat16)[0]


def test_tiles_multiply_where_there_are_some() -> None:
    """They add in another order, so some bits differ."""
    with_tiles, without = outputs(None), outputs(WITHOUT)
    torch.testing.assert_close(with_tiles, without, rtol=2e-2, atol=2e-2)
    assert not torch.equal(with_tiles, without)


REFUSED = """
import ctypes, sys

# The system gives tiles to nobody who has a stack for signals that is too small for them.
class Stack(ctypes.Structure):
    _fields_ = (("at", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))
memory = ctypes.create_string_buffer(6144)
assert ctypes.CDLL(None).sigaltstack(ctypes.byref(Stack(ctypes.addressof(memory), 0, 6144)), None) == 0

sys.path.insert(0, sys.argv[1])
import test_tiles, torch
assert torch.equal(test_tiles.outputs(None), test_tiles.outputs(test_tiles.WITHOUT))
"""


def test_a_process_that_may_not_use_tiles_multiplies_without() -> None:
    command = [sys.executable, "-c", REFUSED, str(Path(__file__).parent)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert finished.returncode == 0, finished.stderr
