"""The Triton kernels of paged attention. Importing this needs triton; nothing else does.

Everything that differs between two steps lies in one int32 buffer on the device, `plan` (`work_list.py` writes it), so
that a captured launch can be replayed for any batch. Its first numbers say where the rest is:

    plan[SLOTS]             first of (tokens) cache slots, -1 for tokens that are not written
    plan[TABLES]            first of all block tables, one after the other
    plan[REACH]             first of (tokens) numbers of tokens that each sees in layers that look ahead, if any do
    plan[list], [list + 1]  how many items a work list has, and where its first is; ITEM numbers each
    plan[list + 2], [+ 3]   the same for its merges; MERGE numbers each

An item is a tile of query tokens and a range of splits of their context:

    token, tokens           its query tokens are token .. token + tokens - 1 of the step
    position                of the first
    table                   where the row's block table begins, from plan[TABLES] on
    split, end              splits to attend to; none (padding) gives zeros
    part                    -1: these are all splits, write the output. Else the row of `parts` for the first split's
                            first token; the others follow, all tokens of a split after those of the split before

A merge is one query token whose splits were shared out: (token, part, stride, splits), stride rows from one split's
part to the next one's.

The order of every sum is: keys of a split in blocks of KEYS, from the split's start; then the splits, in order, each
folded into what came before. Blocks that a token does not see change no bit. So it depends on the token's position
and reach alone, not on the tile, the step or the batch that it is in.
"""

from __future__ import annotations

import triton
import triton.language as tl

from asyncengine.model.attention import work_list
from asyncengine.model.quantised.fp8_kernels import e4m3

_SLOTS = tl.constexpr(work_list.SLOTS)
_TABLES = tl.constexpr(work_list.TABLES)
_REACH = tl.constexpr(work_list.REACH)
_ITEM = tl.constexpr(work_list.ITEM)
_MERGE = tl.constexpr(work_list.MERGE)
_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _dot(left, right, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    if WIDEN:  # Triton's interpreter cannot multiply bfloat16
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, input_precision=PRECISION)


@triton.jit
def _fold(total, total_max, total_sum, part, part_max, part_sum):
    """Folds one split, (rows, dim) with its maximum and sum, into those before it."""
    new_max = tl.maximum(total_max, part_max)
    safe = tl.where(new_max == -float("inf"), 0.0, new_max)
    keep = tl.exp2(total_max - safe)
    add = tl.exp2(part_max - safe)
    total = tl.fma(part, tl.broadcast_to(add[:, None], part.shape), total * keep[:, None])
    return total, new_max, tl.fma(part_sum, add, total_sum * keep)


@triton.jit
def _rows(zero, tokens, heads, ROWS: tl.constexpr, TILE_HEADS: tl.constexpr, HEADS: tl.constexpr):
    """Where the rows of a tile are, from its first token and head on, and which of them are some.

    Nothing is added, as `zero` is 0 or more. But so this is computed where it is needed, and takes no registers before.
    """
    row = tl.arange(0, ROWS) + tl.minimum(zero, 0)
    return row // TILE_HEADS * HEADS + row % TILE_HEADS, (row // TILE_HEADS < tokens) & (row % TILE_HEADS < heads)


@triton.jit
def _hand_on(
    parts, statistics, at, tokens, head, heads, part, part_max, part_sum,
    HEADS: tl.constexpr, TILE_HEADS: tl.constexpr, VALUE_DIM: tl.constexpr,
):  # fmt: skip
    """Writes one split of a tile, (rows, dim) with its maximum and sum, for `merge`: from row `at` of `parts` on."""
    row, valid = _rows(at, tokens, heads, part.shape[0], TILE_HEADS, HEADS)
    first = at.to(tl.int64) * HEADS + head
    dim = tl.arange(0, part.shape[1])[None, :]
    tl.store(parts + first * VALUE_DIM + row[:, None] * VALUE_DIM + dim, part, mask=valid[:, None] & (dim < VALUE_DIM))
    tl.store(statistics + first * 2 + row * 2, part_max, mask=valid)
    tl.store(statistics + first * 2 + row * 2 + 1, part_sum, mask=valid)


@triton.jit
def _pages(table, start, stop, KEYS: tl.constexpr, PAGE: tl.constexpr):
    """Looks up the pages of the keys from `start` on, a multiple of KEYS; 0 for those from `stop` on."""
    if KEYS % PAGE == 0:  # once for each page, not for each key
        index = tl.arange(0, KEYS // PAGE)
        page = tl.load(table + start // PAGE + index, mask=start + index * PAGE < stop, other=0)
    else:
        at = start + tl.arange(0, KEYS)
        page = tl.load(table + at // PAGE, mask=at < stop, other=0)
    return page


@triton.jit
def _first_rows(page, WAYS: tl.constexpr, KEYS: tl.constexpr, PAGE: tl.constexpr):
    """Of the page of each key, (keys,), as `_pages` looked them up."""
    row = page.to(tl.int64) * (WAYS * PAGE)
    if KEYS % PAGE == 0:
        row = tl.reshape(tl.broadcast_to(row[:, None], (KEYS // PAGE, PAGE)), (KEYS,))
    return row


@triton.jit
def _queries(query, at, dim, valid, DIM: tl.constexpr, NUMBER: tl.constexpr, FP8: tl.constexpr):
    """The queries of a tile from `at` on, (rows, dim), as they are multiplied; zeros from DIM on."""
    mask = valid[:, None] & (dim[None, :] < DIM)
    found = tl.load(query + at[:, None] + dim[None, :], mask=mask, other=0.0)
    if FP8:
        found = tl.clamp(found.to(tl.float32), -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL)
    return found.to(NUMBER)


@triton.jit
def _block(
    cached, first_row, in_page, dim, written, DIM: tl.constexpr, ROW: tl.constexpr, NUMBER: tl.constexpr
):  # fmt: skip
    """A block of keys or of values, (keys, dim), of rows that are ROW numbers apart; zeros from DIM on."""
    return tl.load(
        cached + in_page[:, None] * ROW + dim[None, :] + (first_row * ROW)[:, None],
        mask=written[:, None] & (dim[None, :] < DIM),
        other=0.0,
    ).to(NUMBER)  # fmt: skip


@triton.jit
def _finish(total, total_max, total_sum, sink, HAS_SINKS: tl.constexpr):
    """The weighted mean, (rows, dim); zeros where nothing was attended to."""
    if HAS_SINKS:
        new_max = tl.maximum(total_max, sink)
        keep = tl.exp2(total_max - new_max)
        total = total * keep[:, None]
        total_sum = tl.fma(total_sum, keep, tl.exp2(sink - new_max))
    return total / tl.where(total_sum == 0.0, 1.0, total_sum)[:, None]


@triton.jit(do_not_specialize=["tokens"])
def write(
    plan, key, value, keys, values, tokens,
    key_token, key_head, value_token, value_head, key_scale, value_scale,
    KV_HEADS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    KEY_PAD: tl.constexpr, VALUE_PAD: tl.constexpr, PAGE: tl.constexpr, ROWS: tl.constexpr, FP8: tl.constexpr,
    IN_KEYS: tl.constexpr,
):  # fmt: skip
    """Writes keys and values to their slots; a row is a pair of a token and a head.

    With FP8 the slots are bytes, and what they hold was divided by the scales. With IN_KEYS values are in keys.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = row // KV_HEADS
    head = row % KV_HEADS
    slot = tl.load(plan + tl.load(plan + _SLOTS) + token, mask=token < tokens, other=-1)
    written = (slot >= 0)[:, None]
    here = ((slot // PAGE).to(tl.int64) * (KV_HEADS * PAGE) + head * PAGE + slot % PAGE)[:, None]
    token = token.to(tl.int64)[:, None]
    head = head[:, None]
    dim = tl.arange(0, KEY_PAD)[None, :]
    mask = written & (dim < KEY_DIM)
    numbers = tl.load(key + token * key_token + head * key_head + dim, mask=mask)
    numbers = e4m3(numbers.to(tl.float32) / key_scale) if FP8 else numbers.to(keys.dtype.element_ty)
    tl.store(keys + here * KEY_DIM + dim, numbers, mask=mask)
    if not IN_KEYS:
        dim = tl.arange(0, VALUE_PAD)[None, :]
        mask = written & (dim < VALUE_DIM)
        numbers = tl.load(value + token * value_token + head * value_head + dim, mask=mask)
        numbers = e4m3(numbers.to(tl.float32) / value_scale) if FP8 else numbers.to(values.dtype.element_ty)
        tl.store(values + here * VALUE_DIM + dim, numbers, mask=mask)


@triton.jit
def attend(
    plan, query, keys, values, sinks, bias, output, parts, statistics,
    query_token, query_head, scaling, soft_cap, value_scale,
    LIST: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
    KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, KEY_PAD: tl.constexpr, VALUE_PAD: tl.constexpr,
    PAGE: tl.constexpr, WINDOW: tl.constexpr, HAS_SOFT_CAP: tl.constexpr, HAS_SINKS: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr, FP8: tl.constexpr, AHEAD: tl.constexpr, IN_KEYS: tl.constexpr,
    DISTANCES: tl.constexpr,
):  # fmt: skip
    """Works through one work list, all programs together. Each KV head (and each tile of query heads) is apart.

    With FP8, products are made of float16: the device turns two e4m3 into that at once, and it holds all of them. In
    any other case keys and values are multiplied as they are stored.

    With AHEAD a token sees as many tokens of its row as the plan says; else those up to itself.

    With IN_KEYS the value of a token is the beginning of its key, and is loaded once. Products of queries and keys are
    then made of two: of what is a value, too, and of the rest, which is what KEY_PAD is the size of.

    With DISTANCES, scores get a bias by their distance, of which so many are told apart.
    """
    NUMBER: tl.constexpr = tl.float16 if FP8 else keys.dtype.element_ty
    TILE_HEADS: tl.constexpr = GROUP if GROUP < ROWS else ROWS
    HEAD_TILES: tl.constexpr = (GROUP + TILE_HEADS - 1) // TILE_HEADS
    WAYS: tl.constexpr = KV_HEADS * HEAD_TILES
    HEADS: tl.constexpr = KV_HEADS * GROUP
    FIRST: tl.constexpr = VALUE_DIM if IN_KEYS else 0

    row = tl.arange(0, ROWS)
    step = tl.arange(0, KEYS)
    key_dim = FIRST + tl.arange(0, KEY_PAD)
    value_dim = tl.arange(0, VALUE_PAD)
    row_token = row // TILE_HEADS
    first_item = plan + tl.load(plan + LIST + 1)
    tables = plan + tl.load(plan + _TABLES)
    raw = soft_cap if HAS_SOFT_CAP else scaling
    unit = _LOG2E if DISTANCES else raw * _LOG2E

    for index in range(tl.program_id(0), tl.load(plan + LIST) * WAYS, tl.num_programs(0)):
        item = first_item + index // WAYS * _ITEM
        way = index % WAYS
        kv_head = way // HEAD_TILES
        token = tl.load(item).to(tl.int64)
        tokens = tl.load(item + 1)
        position = tl.load(item + 2)
        table = tables + tl.load(item + 3)
        split = tl.load(item + 4)
        end_split = tl.load(item + 5)
        part = tl.load(item + 6)

        end = position + tokens
        start = split * SPLIT
        all_see = position + 1
        most_see = end
        if AHEAD:
            reach = plan + tl.load(plan + _REACH) + token
            all_see = tl.load(reach)
            most_see = tl.load(reach + tokens - 1)
        stop = tl.minimum(end_split * SPLIT, most_see)
        if WINDOW:
            start = tl.maximum(start, (position - WINDOW + 1) // KEYS * KEYS)
        # Pages are looked up one turn ahead, so that keys and values need not wait for it.
        page = _pages(table, start, stop, KEYS, PAGE)

        first_head = kv_head * GROUP + way % HEAD_TILES * TILE_HEADS
        heads = GROUP - way % HEAD_TILES * TILE_HEADS
        valid = (row_token < tokens) & (row % TILE_HEADS < heads)
        head = first_head + row % TILE_HEADS
        row_query = (token + row_token) * query_token + head * query_head
        queries = _queries(query, row_query, key_dim, valid, KEY_DIM, NUMBER, FP8)
        if IN_KEYS:
            of_values = _queries(query, row_query, value_dim, valid, VALUE_DIM, NUMBER, FP8)
        row_position = position + row_token
        row_last = row_position
        if AHEAD:
            row_last = tl.load(reach + row_token, mask=row_token < tokens, other=0) - 1

        total = tl.zeros((ROWS, VALUE_PAD), tl.float32)
        total_max = tl.full((ROWS,), -float("inf"), tl.float32)
        total_sum = tl.zeros((ROWS,), tl.float32)
        part_total = tl.zeros((ROWS, VALUE_PAD), tl.float32)
        part_max = tl.full((ROWS,), -float("inf"), tl.float32)
        part_sum = tl.zeros((ROWS,), tl.float32)
        # One loop over the blocks of all splits, so that loads for a split are under way while the one before ends.
        for block in tl.range(start, stop, KEYS, num_stages=STAGES):
            at = block + step
            written = at < stop
            in_page = kv_head * PAGE + (step % PAGE if KEYS % PAGE == 0 else at % PAGE)
            first_row = _first_rows(page, KV_HEADS, KEYS, PAGE)
            page = _pages(table, block + KEYS, stop, KEYS, PAGE)
            block_keys = _block(keys, first_row, in_page, key_dim, written, KEY_DIM, KEY_DIM, NUMBER)
            scores = _dot(queries, tl.trans(block_keys), PRECISION, WIDEN)
            if IN_KEYS:
                block_values = _block(values, first_row, in_page, value_dim, written, VALUE_DIM, KEY_DIM, NUMBER)
                scores += _dot(of_values, tl.trans(block_values), PRECISION, WIDEN)
            if HAS_SOFT_CAP:
                # tanh(score / cap); an exponential that overflows gives 1, one that vanishes -1
                scores = 1.0 - 2.0 / (tl.exp2(scores * (scaling * (2.0 * _LOG2E) / soft_cap)) + 1.0)
            if DISTANCES:
                distance = tl.minimum(tl.maximum(row_position[:, None] - at[None, :], 0), DISTANCES - 1)
                scores = scores * raw + tl.load(
                    bias + head[:, None] * DISTANCES + distance, mask=valid[:, None], other=0.0
                )
            begins = block % SPLIT == 0
            bounded = begins | (block + KEYS > all_see)
            if WINDOW:
                bounded |= block < end - WINDOW
            if bounded:  # Most blocks lie in the midst of a split, and all rows see all of them.
                # A split is folded behind the first product of the next one: the compiler has to wait for that anyway,
                # and would wait for the last product of a turn in every turn if what it gives were looked at before.
                seen = at[None, :] <= row_last[:, None]
                if WINDOW:
                    seen &= at[None, :] > row_position[:, None] - WINDOW
                scores = tl.where(seen, scores, -float("inf"))
                if begins & (block > start):
                    if part < 0:
                        total, total_max, total_sum = _fold(total, total_max, total_sum, part_total, part_max, part_sum)
                    else:
                        _hand_on(
                            parts, statistics, part + (block // SPLIT - 1 - split) * tokens, tokens,
                            first_head, heads, part_total, part_max, part_sum,
                            HEADS, TILE_HEADS, VALUE_DIM,
                        )  # fmt: skip
                    part_total = tl.zeros((ROWS, VALUE_PAD), tl.float32)
                    part_max = tl.full((ROWS,), -float("inf"), tl.float32)
                    part_sum = tl.zeros((ROWS,), tl.float32)
            new_max = tl.maximum(part_max, tl.max(scores, 1) * unit)
            safe = tl.where(new_max == -float("inf"), 0.0, new_max)
            units = tl.full(scores.shape, unit, tl.float32)
            weights = tl.exp2(tl.fma(scores, units, tl.broadcast_to(-safe[:, None], scores.shape)))
            keep = tl.exp2(part_max - safe)
            part_sum = tl.fma(part_sum, keep, tl.sum(weights, 1))
            part_max = new_max
            if not IN_KEYS:
                block_values = _block(values, first_row, in_page, value_dim, written, VALUE_DIM, VALUE_DIM, NUMBER)
            weights = weights.to(NUMBER)
            part_total = part_total * keep[:, None] + _dot(weights, block_values, PRECISION, WIDEN)
        if part < 0:
            total, total_max, total_sum = _fold(total, total_max, total_sum, part_total, part_max, part_sum)
            sink = total_max
            if HAS_SINKS:
                sink = tl.load(sinks + head, mask=valid, other=0.0).to(tl.float32) * _LOG2E
            mean = _finish(total, total_max, total_sum, sink, HAS_SINKS)
            if FP8:
                mean *= value_scale
            place, there = _rows(stop, tokens, heads, ROWS, TILE_HEADS, HEADS)
            tl.store(
                output + (token * HEADS + first_head) * VALUE_DIM + place[:, None] * VALUE_DIM + value_dim[None, :],
                mean.to(output.dtype.element_ty),
                mask=there[:, None] & (value_dim[None, :] < VALUE_DIM),
            )  # fmt: skip
        else:
            _hand_on(
                parts, statistics, part + ((stop - 1) // SPLIT - split) * tokens, tokens,
                first_head, heads, part_total, part_max, part_sum,
                HEADS, TILE_HEADS, VALUE_DIM,
            )  # fmt: skip


@triton.jit
def merge(
    plan, sinks, output, parts, statistics, value_scale,
    LIST: tl.constexpr, HEADS: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr,
    HAS_SINKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Folds the parts of the tokens whose splits were shared out, one head at a time."""
    dim = tl.arange(0, VALUE_PAD)[None, :]
    one = tl.arange(0, 1)
    first = plan + tl.load(plan + LIST + 3)
    for index in range(tl.program_id(0), tl.load(plan + LIST + 2) * HEADS, tl.num_programs(0)):
        merge = first + index // HEADS * _MERGE
        head = index % HEADS
        token = tl.load(merge).to(tl.int64)
        part = tl.load(merge + 1)
        stride = tl.load(merge + 2)
        total = tl.zeros((1, VALUE_PAD), tl.float32)
        total_max = tl.full((1,), -float("inf"), tl.float32)
        total_sum = tl.zeros((1,), tl.float32)
        for here in tl.range(0, tl.load(merge + 3), num_stages=STAGES):
            at = (part + here * stride).to(tl.int64) * HEADS + head
            total, total_max, total_sum = _fold(
                total, total_max, total_sum,
                tl.load(parts + at * VALUE_DIM + dim, mask=dim < VALUE_DIM, other=0.0),
                tl.load(statistics + at * 2 + one),
                tl.load(statistics + at * 2 + 1 + one),
            )  # fmt: skip
        sink = total_max
        if HAS_SINKS:
            sink = tl.load(sinks + head + one).to(tl.float32) * _LOG2E
        mean = _finish(total, total_max, total_sum, sink, HAS_SINKS) * value_scale
        tl.store(
            output + (token * HEADS + head) * VALUE_DIM + dim, mean.to(output.dtype.element_ty), mask=dim < VALUE_DIM
        )
