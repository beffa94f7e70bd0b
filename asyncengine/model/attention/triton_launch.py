"""What the Triton kernels of attention are compiled for, and how. Importing this needs no triton."""

from __future__ import annotations

from typing import Any

import torch

from asyncengine.model.attention import fp8, work_list
from asyncengine.model.attention.protocol import LayerSpec
from asyncengine.model.attention.triton_tiles import Launch, Tiles, padded

WRITE_LAUNCH = Launch(rows=16, warps=4, stages=1)
# A program folds the splits of a row one after the other, 128 of them in a context of 32 k: it would mostly wait for
# memory if it had not asked for the next seven by then.
MERGE_LAUNCH = Launch(rows=1, warps=1, stages=8)


def launch_options(launch: Launch) -> dict[str, Any]:
    """How the compiler is to make a kernel."""
    # Triton 3.10 will not fuse multiplications and additions unless it is asked to.
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True}
    return options if launch.registers is None else options | {"maxnreg": launch.registers}


def attend_constants(
    spec: LayerSpec,
    dtype: torch.dtype,
    page_size: int,
    index: int,
    launch: Launch,
    tiles: Tiles,
    widen: bool = False,
    reach: bool = False,
) -> dict[str, Any]:
    """What the kernel `attend` is compiled for: a layer, the index of a work list, and whether the step has a reach."""
    return {
        "LIST": work_list.LISTS + work_list.LIST * index,
        "KV_HEADS": spec.num_kv_heads,
        "GROUP": spec.num_heads // spec.num_kv_heads,
        "KEY_DIM": spec.key_dim,
        "VALUE_DIM": spec.value_dim,
        "KEY_PAD": padded(spec.key_dim - spec.value_dim if spec.values_in_keys else spec.key_dim),
        "VALUE_PAD": padded(spec.value_dim),
        "PAGE": page_size,
        "WINDOW": spec.sliding_window or 0,
        "HAS_SOFT_CAP": spec.soft_cap is not None,
        "HAS_SINKS": spec.has_sinks,
        "ROWS": launch.rows,
        "KEYS": tiles.keys,
        "SPLIT": tiles.split,
        # Without tf32, whose 10 bits of mantissa are not what float32 was asked for.
        "PRECISION": "ieee" if dtype is torch.float32 else None,
        "WIDEN": widen,
        "FP8": dtype is fp8.E4M3,
        "STAGES": launch.stages,
        # Rows that look ahead are in long lists.
        "AHEAD": reach and spec.looks_ahead and index % 2 == 1,
        "IN_KEYS": spec.values_in_keys,
        "DISTANCES": spec.distances,
    }


def write_constants(spec: LayerSpec, dtype: torch.dtype, page_size: int) -> dict[str, Any]:
    """What the kernel `write` is compiled for."""
    return {
        "KV_HEADS": spec.num_kv_heads,
        "KEY_DIM": spec.key_dim,
        "VALUE_DIM": spec.value_dim,
        "KEY_PAD": padded(spec.key_dim),
        "VALUE_PAD": padded(spec.value_dim),
        "PAGE": page_size,
        "ROWS": WRITE_LAUNCH.rows,
        "FP8": dtype is fp8.E4M3,
        "IN_KEYS": spec.values_in_keys,
    }


def merge_constants(spec: LayerSpec, index: int) -> dict[str, Any]:
    """What the kernel `merge` is compiled for."""
    return {
        "LIST": work_list.LISTS + work_list.LIST * index,
        "HEADS": spec.num_heads,
        "VALUE_DIM": spec.value_dim,
        "VALUE_PAD": padded(spec.value_dim),
        "HAS_SINKS": spec.has_sinks,
        "STAGES": MERGE_LAUNCH.stages,
    }
