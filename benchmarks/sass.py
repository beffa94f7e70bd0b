"""Counts instructions in the machine code of a kernel. Needs what triton brings, but no GPU."""

from __future__ import annotations

import functools
import re
import subprocess
from collections import Counter
from collections.abc import Collection
from pathlib import Path

from triton import knobs

_LABEL = re.compile(r"(\.L_\w+):")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;")
_BRANCH = re.compile(r"(@!?U?P\w+ )?BRA\b(.*?)\(?(\.L_\w+)\)?$")
MATRIX = ("HMMA", "HGMMA", "QGMMA", "IMMA")
"""Products of matrix units."""


def turn(cubin: Path, products: Collection[str] = MATRIX) -> Counter[str]:
    """Instructions that a warp executes in one turn of the innermost loop with products, by name.

    Of all ways through the turn, the shortest is counted: what happens in few turns is left out. Empty if there is no
    such loop.

    Args:
        cubin: The kernel.
        products: Names of instructions, one of which is in the loop.
    """
    command = [knobs.nvidia.nvdisasm.path, "-c", str(cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := _LABEL.match(line.strip()):
            labels[label[1]] = len(code)
        elif instruction := _INSTRUCTION.search(line):
            code.append(instruction[1])
    branches = {at: found for at, text in enumerate(code) if (found := _BRANCH.match(text))}
    loops = [(labels[found[3]], at) for at, found in branches.items() if labels.get(found[3], at + 1) <= at]
    loops = [loop for loop in loops if any(_name(text) in products for text in code[loop[0] : loop[1] + 1])]
    if not loops:
        return Counter()
    first, last = min(loops, key=lambda loop: loop[1] - loop[0])
    # From the back: the fewest instructions until the next turn, and where to go for that.
    fewest: dict[int, tuple[float, int | None]] = {}
    for at in range(last, first - 1, -1):
        ways: list[int | None] = []
        if found := branches.get(at):
            target = labels[found[3]]
            ways.append(None if target == first else target)
        if found is None or found[1] or re.search(r"\bU?P\d", found[2]):
            ways.append(at + 1)
        lengths = {way: 0 if way is None else fewest.get(way, (float("inf"), None))[0] for way in ways}
        way = min(ways, key=lambda way: lengths[way])
        fewest[at] = 1 + lengths[way], way
    counts: Counter[str] = Counter()
    here: int | None = first
    while here is not None:
        counts[_name(code[here])] += 1
        here = fewest[here][1]
    return counts


def programs(registers: int, shared: int, warps: int) -> int:
    """How many programs a multiprocessor of an H100 or H200 holds at a time."""
    threads = 32 * warps
    of_registers = 65536 // (-(-registers // 8) * 8 * threads)
    return min(of_registers, (227 << 10) // (shared + 1024), 2048 // threads, 32)


@functools.cache
def _name(instruction: str) -> str:
    return re.sub(r"^@!?U?P\w+ +", "", instruction).split(maxsplit=1)[0].split(".")[0]
