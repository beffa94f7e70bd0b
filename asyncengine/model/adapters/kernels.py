"""Triton kernels that add what each token's own adapter adds. Importing this needs triton; nothing else does.

As in "Punica: Multi-Tenant LoRA Serving" (Chen et al., 2023): a launch serves all adapters of a step, and each token
looks up where its factors lie. Nothing here depends on which adapters there are but for their largest rank, so what was
captured serves those that come later, too.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def shrink(
    numbers, which, pointers, ranks, sums, stride, inputs, splits,
    RANK: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The first factor's product with a token, of `COLUMNS` of its inputs: (tokens, splits, RANK) float32.

    Nothing is written for a token without an adapter, or whose adapter does not have the layer.
    """
    token, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = tl.load(which + token)
    if place >= 0:
        rank = tl.load(ranks + place)
        if rank > 0:
            factor = tl.multiple_of(tl.load(pointers + place).to(tl.pointer_type(numbers.dtype.element_ty)), 16)
            rows = tl.arange(0, RANK)
            total = tl.zeros((RANK,), tl.float32)
            for start in range(0, COLUMNS, BLOCK):
                columns = split * COLUMNS + start + tl.arange(0, BLOCK)
                mask = columns < inputs
                given = tl.load(numbers + token * stride + columns, mask=mask, other=0.0).to(tl.float32)
                weights = tl.load(
                    factor + rows[:, None] * inputs + columns[None, :],
                    mask=(rows < rank)[:, None] & mask[None, :], other=0.0,
                ).to(tl.float32)  # fmt: skip
                total += tl.sum(weights * given[None, :], 1)
            tl.store(sums + (token * splits + split) * RANK + rows, total)


@triton.jit
def expand(
    sums, which, pointers, ranks, scalings, results, stride, outputs, splits,
    RANK: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    """Adds the second factor's product with what `shrink` found to `OUTPUTS` of a token's results."""
    token, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = tl.load(which + token)
    if place >= 0:
        rank = tl.load(ranks + place)
        if rank > 0:
            factor = tl.multiple_of(tl.load(pointers + place).to(tl.pointer_type(results.dtype.element_ty)), 16)
            rows = tl.arange(0, RANK)
            inner = tl.zeros((RANK,), tl.float32)
            for split in range(splits):
                inner += tl.load(sums + (token * splits + split) * RANK + rows)
            at = block * OUTPUTS + tl.arange(0, OUTPUTS)
            mask = at < outputs
            weights = tl.load(
                factor + rows[:, None] * outputs + at[None, :], mask=(rows < rank)[:, None] & mask[None, :], other=0.0
            ).to(tl.float32)
            added = tl.sum(weights * inner[:, None], 0) * tl.load(scalings + place)
            place_of = results + token * stride + at
            tl.store(place_of, tl.load(place_of, mask=mask, other=0.0).to(tl.float32) + added, mask=mask)
