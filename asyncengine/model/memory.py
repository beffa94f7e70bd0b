"""How much memory there is, and the arithmetic of what fits into it. Knows no model."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from asyncengine.errors import InsufficientMemoryError

GIB = 1 << 30
CPU_SHARE = 0.4
CUDA_SHARE = 0.9
_KEPT_STATES = 64
"""So many states of recurrent layers are kept at least, where there is memory."""
CAPTURES = threading.Lock()
"""Held while a CUDA graph is captured, and by whoever waits for a whole device or empties torch's cache of its memory:
torch captures one graph at a time in a process, and CUDA refuses to wait for a device while one is captured. Engines
that share a process come to do both at once, each on its own thread."""


def free_bytes(device: torch.device) -> int:
    """Bytes that can be had on a device now. On CPU: free and reclaimable memory, within the control group's limit."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What the caching allocator holds without using it can be had as well.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    available = _proc_available()
    if available is None:
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = _cgroup_available()
    return available if limit is None else min(available, limit)


def total_bytes(device: torch.device) -> int:
    """Bytes of memory that a device has."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def unheld_bytes(device: torch.device) -> int:
    """Bytes of a CUDA device that nobody holds, once the allocator has given back what it only keeps."""
    with torch.cuda.device(device):
        empty_cache()
    return int(torch.cuda.mem_get_info(device)[0])


def empty_cache() -> None:
    """Returns what the allocator of CUDA memory only keeps, where it can; waits for a capture that is under way.

    A device that was lost answers with its error, and torch refuses after a capture that broke off half-way. A model
    must be let go even then.
    """
    with CAPTURES, contextlib.suppress(RuntimeError):
        torch.cuda.empty_cache()


def give_back() -> None:
    """Returns to the operating system what the allocator keeps of freed memory, where it can be asked to."""
    if torch.cuda.is_available():
        empty_cache()
    if sys.platform == "linux":
        try:
            ctypes.CDLL(None).malloc_trim(0)
        except (OSError, AttributeError):
            pass  # not glibc


@dataclass(frozen=True, slots=True)
class GraphReserve:
    """Memory that is set aside for captured steps.

    Attributes:
        nbytes: How much.
        graphs: For how many graphs.
    """

    nbytes: int = 0
    graphs: int = 0

    def __add__(self, other: GraphReserve) -> GraphReserve:
        return GraphReserve(self.nbytes + other.nbytes, self.graphs + other.graphs)

    def __str__(self) -> str:
        return f"{self.nbytes / GIB:.2f} GiB for {self.graphs} CUDA graphs"


@dataclass(frozen=True, slots=True)
class KVBudget:
    """How many blocks of KV cache there will be, and why.

    Attributes:
        num_blocks: Blocks.
        text: The arithmetic, for messages.
    """

    num_blocks: int
    text: str


@dataclass(frozen=True, slots=True)
class StateBudget:
    """Memory of the states that a model keeps for its sequences.

    Attributes:
        sequences: That have one.
        kept: How many more are kept for sequences to come.
        drafted: How many more a step with drafts can set aside.
        nbytes: What all of them take.
    """

    sequences: int
    kept: int
    drafted: int
    nbytes: int


def state_budget(
    *,
    nbytes: int,
    bytes_per_state: int,
    sequences: int,
    wanted: bool,
    keeps: bool,
    beside: Callable[[int], int] = lambda sequences: 0,
    drafts: Callable[[int], int] = lambda sequences: 0,
) -> StateBudget:
    """Decides how many states there are.

    Half of the memory is left to keys and values at least. What is kept takes a quarter at most, and so do sequences,
    unless so many are demanded. What is set aside for drafts takes an eighth at most, and comes before what is kept.

    Args:
        nbytes: To be shared with the KV cache.
        bytes_per_state: Of all layers together.
        sequences: How many sequences there may be at once.
        wanted: Whether the configuration demands so many.
        keeps: Whether there is a prefix cache.
        beside: What so many sequences take of the memory besides.
        drafts: How many tokens may be drafted for so many sequences in a step; 0 for any if none are.

    Raises:
        InsufficientMemoryError: The demand does not fit, or not even one sequence's or one draft's does.
    """

    def fit(count: int) -> tuple[int, int]:
        """States that fit into half of what so many sequences leave, but for one that nobody reads; in a quarter."""
        left = max(nbytes - beside(count), 0)
        return max(left // 2 // bytes_per_state - 1, 0), left // 4 // bytes_per_state

    half, quarter = fit(sequences)
    while not wanted and sequences > 1 and sequences > min(half, max(quarter, 1)):
        sequences = max(min(half, quarter, sequences - 1), sequences // 2)  # fewer take less besides
        half, quarter = fit(sequences)
    text = f"{nbytes / GIB:.2f} GiB / 2 / {bytes_per_state / (1 << 20):.2f} MiB per sequence = {half} sequences"
    if half < sequences:
        asked = f"max_num_sequence = {sequences}, but " if wanted else ""
        raise InsufficientMemoryError(
            f"the states of recurrent layers do not fit: {asked}{text}; lower max_num_sequence or raise "
            "gpu_memory_utilization"
        )
    drafted = min(drafts(sequences), quarter // 2, half - sequences)
    if drafts(sequences) and not drafted:
        raise InsufficientMemoryError(
            f"the states of recurrent layers behind guessed tokens do not fit beside those of {sequences} sequences: "
            f"{text}; lower max_num_sequence, raise gpu_memory_utilization, or set speculative_mode to 'disable'"
        )
    kept = min(max(4 * sequences, _KEPT_STATES), quarter, half - sequences - drafted) if keeps else 0
    return StateBudget(sequences, kept, drafted, (sequences + kept + drafted + 1) * bytes_per_state)


def kv_budget(
    *,
    available: int,
    share: float,
    bytes_per_block: int,
    page_size: int,
    wanted_tokens: int | None,
    useful_tokens: int,
    graphs: GraphReserve | None = None,
) -> KVBudget:
    """Decides how many blocks the KV cache gets.

    Args:
        available: Bytes of which `share` may be used.
        share: In (0, 1].
        bytes_per_block: Of all layers together.
        page_size: Tokens per block.
        wanted_tokens: What the configuration demands; None takes what there is.
        useful_tokens: More could never be used.
        graphs: What of the available memory captured steps will take, if there will be any.

    Raises:
        InsufficientMemoryError: The demand does not fit, or not even two blocks do.
    """
    what, fewer = f"{available / GIB:.2f} GiB available", ""
    if graphs is not None:
        what, fewer = f"({what} - {graphs})", ", or lower max_num_sequence, so that there are fewer graphs"
        available = max(available - graphs.nbytes, 0)
    fitting = int(available * share) // bytes_per_block
    text = (
        f"{share:g} x {what} / {bytes_per_block / 1024:.1f} KiB per block of {page_size} tokens = {fitting} blocks = "
        f"{fitting * page_size} tokens"
    )
    if wanted_tokens is not None:
        wanted = -(-wanted_tokens // page_size)
        if wanted > fitting:
            raise InsufficientMemoryError(
                f"the KV cache does not fit: max_total_sequence_length = {wanted_tokens} needs {wanted} blocks = "
                f"{wanted * bytes_per_block / GIB:.2f} GiB, but {text}; lower max_total_sequence_length or raise "
                f"gpu_memory_utilization{fewer}"
            )
        return KVBudget(wanted, text)
    if fitting < 2:
        raise InsufficientMemoryError(
            f"the KV cache does not fit: {text}; raise gpu_memory_utilization or lower kv_cache_page_size{fewer}"
        )
    return KVBudget(min(fitting, -(-useful_tokens // page_size)), text)


def _proc_available() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def _cgroup_available() -> int | None:
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit == "max":
            return None
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        reclaimable = 0
        for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines():
            if line.startswith("inactive_file "):
                reclaimable = int(line.split()[1])
        return max(int(limit) - used + reclaimable, 0)
    except (OSError, ValueError):
        return None
