"""Triton kernels of products with weights of four bits. Importing this needs triton; nothing else does.

Codes become floats by arithmetic on bits. Those of FP4 have a sign, two bits of exponent and one of mantissa: put where
a wider float has its sign, the end of its exponent and the beginning of its mantissa, they are that number times a
power of two, subnormal numbers included. Integers are put into the mantissa: of a float whose exponent is known, from
which what that adds is subtracted; or of one whose exponent is 0, which makes it a subnormal number.

`by_row` multiplies one token, number by number in float32. `by_tile` goes through the matrix units: weights are made in
registers, in the dtype of the inputs, and multiplied with a tile of tokens.

With experts, a pair is a token and one of the experts that it is sent to: pair `token * top + i`. `route` sorts them by
expert, as "MegaBlocks" (Gale et al., 2022) does, into a list whose length is that of the worst case.
"""

from __future__ import annotations

import triton
import triton.language as tl

from asyncengine.model.decoder import experts
from asyncengine.model.fused.kernels import activated
from asyncengine.model.quantised.four_bit_product import ITEM, TABLES
from asyncengine.model.quantised.four_bits import FP4, INT4, NONLINEAR

_CLAMPED, _ITEM = tl.constexpr(experts.CLAMPED), tl.constexpr(ITEM)
_INT4, _FP4, _NONLINEAR = (tl.constexpr(TABLES.index(values)) for values in (INT4, FP4, NONLINEAR))
_WORD_0, _WORD_1, _WORD_2, _WORD_3 = (
    tl.constexpr(int.from_bytes([int(value) + 128 for value in NONLINEAR[at : at + 4]], "little", signed=True))
    for at in range(0, 16, 4)
)


@triton.jit
def _pair(x, at, mask):
    """The numbers 2 * `at` and 2 * `at` + 1 of x, in float32."""
    if x.dtype.element_ty == tl.float32:
        even = tl.load(x + 2 * at, mask=mask, other=0.0)
        odd = tl.load(x + 2 * at + 1, mask=mask, other=0.0)
    else:
        both = tl.load(x.to(tl.pointer_type(tl.int32)) + at, mask=mask, other=0)
        if x.dtype.element_ty == tl.bfloat16:
            even = (both << 16).to(tl.float32, bitcast=True)
            odd = (both & -65536).to(tl.float32, bitcast=True)
        else:
            even = both.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            odd = (both >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return even, odd


@triton.jit
def _nonlinear(word):
    """What the lowest four bits of an int32 stand for: a byte of a table of four words, less 128."""
    low = tl.where((word & 4) == 0, _WORD_0, _WORD_1)
    high = tl.where((word & 4) == 0, _WORD_2, _WORD_3)
    four = tl.where((word & 8) == 0, low, high)
    bits = ((four >> ((word & 3) * 8)) & 255) | 0x4B000000  # of 2 ** 23 and more
    return bits.to(tl.float32, bitcast=True) - (2.0**23 + 128.0)


@triton.jit
def _number(word, AT: tl.constexpr, TABLE: tl.constexpr):
    """Of the code in the bits AT to AT + 3 of an int32, in float32 and times a power of two: `_raised` has the rest."""
    if TABLE == _NONLINEAR:
        number = _nonlinear(word >> AT)
    else:
        if TABLE == _FP4:
            high = word << (28 - AT) if AT < 28 else word
            bits = (high >> 6) & -0x7E400000  # the sign, and bits 24 to 22
        elif AT > 16:
            bits = (word >> 12) & (15 << (AT - 12))
        else:
            bits = word & (15 << AT)
        number = bits.to(tl.float32, bitcast=True)
    return number


@triton.jit
def _raised(x, AT: tl.constexpr, TABLE: tl.constexpr):
    """Times what `_number` lacks, but for what `by_row` has in its scales: all of it may be too much for a float."""
    if TABLE == _FP4:
        x *= 2.0**63
    elif TABLE == _NONLINEAR:
        x *= 1.0
    elif AT > 16:
        x *= 2.0 ** (81 - AT)
    else:
        x *= 2.0 ** (69 - AT)
    return x


@triton.jit
def _gated(gate, up, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr):
    if ACTIVATION == _CLAMPED:
        gate = tl.minimum(gate, LIMIT)
        up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
        result = (up + 1.0) * gate * tl.sigmoid(ALPHA * gate)
    else:
        result = activated(gate, ACTIVATION) * up
    return result


@triton.jit
def by_row(
    x, codes, scales, zeros, bias, chosen, shares, result,
    INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, OTHER: tl.constexpr,
    GROUP: tl.constexpr, TABLE: tl.constexpr, HAS_ZEROS: tl.constexpr, HAS_BIAS: tl.constexpr,
    EXPERTS: tl.constexpr, SHARED: tl.constexpr, HAS_SHARES: tl.constexpr,
    ACTIVATION: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr,
    OUTPUTS_EACH: tl.constexpr, UNITS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """OUTPUTS_EACH outputs of a pair, or of a token if there are no EXPERTS.

    SHARED pairs in a row have the same row of x. Output i is the row i * STEP of a matrix of ROWS rows; with OTHER it
    gates the row OTHER after that.

    UNITS units of 16 or 32 inputs are multiplied at a time, of which a thread has one: its 16 bytes share a scale. The
    order of the sums depends on the shape of a matrix alone.
    """
    UNIT: tl.constexpr = 32 if GROUP % 32 == 0 else 16
    WORDS: tl.constexpr = UNIT // 8
    RAISED: tl.constexpr = 2.0**63 if TABLE == _FP4 else 2.0**80 if TABLE == _INT4 else 1.0
    output = tl.program_id(0) * OUTPUTS_EACH + tl.arange(0, OUTPUTS_EACH)
    pair = tl.program_id(1)
    inside = output < OUTPUTS
    row = (output * STEP).to(tl.int64)
    if EXPERTS:
        expert = tl.load(chosen + pair)
        if (expert < 0) | (expert >= EXPERTS):
            return
        row += expert * ROWS
    numbers = x + (pair // SHARED).to(tl.int64) * INPUTS
    words = codes.to(tl.pointer_type(tl.int32))
    sums = tl.zeros((OUTPUTS_EACH, UNITS), tl.float32)
    others = tl.zeros((OUTPUTS_EACH, UNITS), tl.float32)
    for start in tl.range(0, INPUTS // UNIT, UNITS, num_stages=STAGES):
        word = start * WORDS + tl.arange(0, UNITS * WORDS)
        known = word < INPUTS // 8
        mask = inside[:, None] & known[None, :]
        at = row[:, None] * (INPUTS // 8) + word[None, :]
        given = tl.load(words + at, mask=mask, other=0, eviction_policy="evict_first")
        unit = start + tl.arange(0, UNITS)
        group = row[:, None] * (INPUTS // GROUP) + (unit * UNIT // GROUP)[None, :]
        there = inside[:, None] & (unit < INPUTS // UNIT)[None, :]
        scale = tl.load(scales + group, mask=there, other=0.0).to(tl.float32)
        if OTHER:
            at += OTHER * (INPUTS // 8)
            given_other = tl.load(words + at, mask=mask, other=0, eviction_policy="evict_first")
            group_other = group + OTHER * (INPUTS // GROUP)
            scale_other = tl.load(scales + group_other, mask=there, other=0.0).to(tl.float32)
        part = tl.zeros((OUTPUTS_EACH, UNITS * WORDS), tl.float32)
        part_other = tl.zeros((OUTPUTS_EACH, UNITS * WORDS), tl.float32)
        total = tl.zeros((UNITS * WORDS,), tl.float32)
        for k in tl.static_range(4):
            even, odd = _pair(numbers, word * 4 + k, known)
            if TABLE == _INT4:
                total += even + odd
            even = _raised(even, 8 * k, TABLE)[None, :]
            odd = _raised(odd, 8 * k + 4, TABLE)[None, :]
            part += _number(given, 8 * k, TABLE) * even
            part += _number(given, 8 * k + 4, TABLE) * odd
            if OTHER:
                part_other += _number(given_other, 8 * k, TABLE) * even
                part_other += _number(given_other, 8 * k + 4, TABLE) * odd
        of_unit = tl.sum(tl.reshape(part, (OUTPUTS_EACH, UNITS, WORDS)), 2)
        of_unit_other = tl.sum(tl.reshape(part_other, (OUTPUTS_EACH, UNITS, WORDS)), 2)
        if TABLE == _INT4:
            of_inputs = tl.sum(tl.reshape(total, (UNITS, WORDS)), 1)[None, :] * (1.0 / RAISED)
            centre = 8.0
            centre_other = 8.0
            if HAS_ZEROS:
                centre = 8.0 + tl.load(zeros + group, mask=there, other=0.0).to(tl.float32)
                if OTHER:
                    centre_other = 8.0 + tl.load(zeros + group_other, mask=there, other=0.0).to(tl.float32)
            of_unit -= centre * of_inputs
            of_unit_other -= centre_other * of_inputs
        sums += of_unit * (scale * RAISED)
        if OTHER:
            others += of_unit_other * (scale_other * RAISED)
    found = tl.sum(sums, 1)
    found_other = tl.sum(others, 1)
    if HAS_BIAS:
        found += tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)
        if OTHER:
            found_other += tl.load(bias + row + OTHER, mask=inside, other=0.0).to(tl.float32)
    if OTHER:
        found = _gated(found, found_other, ACTIVATION, ALPHA, LIMIT)
    if HAS_SHARES:
        found *= tl.load(shares + pair).to(tl.float32)
    tl.store(result + pair.to(tl.int64) * OUTPUTS + output, found.to(result.dtype.element_ty), mask=inside)


@triton.jit
def _numbers(code, TABLE: tl.constexpr, dtype: tl.constexpr, WIDEN: tl.constexpr):
    """Both codes of a byte as numbers in `dtype`, or in float32 if WIDEN; FP4 times 2 ** -63, but for float16."""
    CENTRE: tl.constexpr = 8.0 if dtype == tl.float32 else 1032.0 if dtype == tl.float16 else 136.0
    FOLD: tl.constexpr = 2.0**14 if dtype == tl.float16 else 2.0**63
    if dtype == tl.float32:
        even = (code & 15).to(tl.float32) if TABLE == _INT4 else _number(code, 0, TABLE)
        odd = (code >> 4).to(tl.float32) if TABLE == _INT4 else _number(code, 4, TABLE)
    elif TABLE == _NONLINEAR:
        even = _nonlinear(code)
        odd = _nonlinear(code >> 4)
        if not WIDEN:
            even = even.to(dtype)
            odd = odd.to(dtype)
    else:  # side by side in 32 bits: one instruction does what has to be done to both
        if TABLE == _FP4:
            sign = (code * 0x1001000) & -0x7FFF8000
            both = sign | ((code * 0x200200) & 0xE000E00 if dtype == tl.float16 else (code * 0x40040) & 0x1C001C0)
        else:
            both = ((code * 0x1001) & 0xF000F) | (0x64006400 if dtype == tl.float16 else 0x43004300)
        if WIDEN:
            even = (both << 16).to(tl.float32, bitcast=True)
            odd = (both & -65536).to(tl.float32, bitcast=True)
        else:
            even = both.to(tl.int16).to(dtype, bitcast=True)
            odd = (both >> 16).to(tl.int16).to(dtype, bitcast=True)
    if TABLE == _FP4:
        even *= FOLD
        odd *= FOLD
    elif TABLE == _INT4:
        even -= CENTRE
        odd -= CENTRE
    return even, odd


@triton.jit
def _spread(numbers, shape: tl.constexpr):
    """(splits, rows, units), for each of the bytes of a unit; `shape` has them as its last dimension."""
    if shape[2] > 1:
        numbers = tl.reshape(tl.broadcast_to(numbers[:, :, :, None], shape), (shape[0], shape[1], shape[2] * shape[3]))
    return numbers


@triton.jit
def _read(
    codes, scales, zeros, row, start, inside,
    INPUTS: tl.constexpr, GROUP: tl.constexpr, UNIT: tl.constexpr, TABLE: tl.constexpr, HAS_ZEROS: tl.constexpr,
    SPLITS: tl.constexpr, INPUTS_AT_ONCE: tl.constexpr, dtype: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """(SPLITS, rows, INPUTS_AT_ONCE) weights from the input `start` on, of as many pieces that follow each other."""
    OUTPUTS: tl.constexpr = row.shape[0]
    BYTES: tl.constexpr = INPUTS_AT_ONCE // 2
    UNITS: tl.constexpr = INPUTS_AT_ONCE // UNIT
    split = tl.arange(0, SPLITS)[:, None]
    place = (start // 2 + split * BYTES + tl.arange(0, BYTES)[None, :])[:, None, :]
    mask = inside[None, :, None] & (place < INPUTS // 2)
    code = tl.load(codes + row[None, :, None] * (INPUTS // 2) + place, mask=mask, other=0).to(tl.int32)
    unit = (start // UNIT + split * UNITS + tl.arange(0, UNITS)[None, :])[:, None, :]
    mask = inside[None, :, None] & (unit < INPUTS // UNIT)
    group = row[None, :, None] * (INPUTS // GROUP) + unit * UNIT // GROUP
    scale = tl.load(scales + group, mask=mask, other=0.0).to(tl.float32)
    if TABLE == _FP4 and dtype != tl.float16:
        scale *= 2.0**63
    computed: tl.constexpr = tl.float32 if WIDEN else dtype  # Triton's interpreter cannot compute with bfloat16
    shape: tl.constexpr = (SPLITS, OUTPUTS, UNITS, UNIT // 2)
    factor = _spread(scale.to(dtype).to(computed), shape)
    even, odd = _numbers(code, TABLE, dtype, WIDEN)
    if HAS_ZEROS:
        zero = _spread(tl.load(zeros + group, mask=mask, other=0.0).to(tl.float32).to(dtype).to(computed), shape)
        even -= zero
        odd -= zero
    weights = tl.reshape(tl.join(even * factor, odd * factor), (SPLITS, OUTPUTS, INPUTS_AT_ONCE))
    return weights.to(dtype)


@triton.jit
def _add(sums, weights, numbers, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """Adds (SPLITS, rows, inputs) weights times (SPLITS, inputs, tokens) numbers, or without the first dimension."""
    if WIDEN:
        weights = weights.to(tl.float32)
        numbers = numbers.to(tl.float32)
    if weights.shape[0] == 1:  # only matrices are for the larger matrix units
        weights = tl.reshape(weights, (weights.shape[1], weights.shape[2]))
        numbers = tl.reshape(numbers, (numbers.shape[1], numbers.shape[2]))
    return tl.dot(weights, numbers, sums, input_precision=PRECISION)


@triton.jit(do_not_specialize=["tokens"])
def by_tile(
    x, codes, scales, zeros, bias, items, order, shares, result, tokens,
    INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, OTHER: tl.constexpr,
    GROUP: tl.constexpr, UNIT: tl.constexpr, TABLE: tl.constexpr, HAS_ZEROS: tl.constexpr, HAS_BIAS: tl.constexpr,
    EXPERTS: tl.constexpr, SHARED: tl.constexpr, HAS_SHARES: tl.constexpr,
    ACTIVATION: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr,
    OUTPUTS_EACH: tl.constexpr, TOKENS: tl.constexpr, SPLITS: tl.constexpr, INPUTS_AT_ONCE: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """A tile of OUTPUTS_EACH outputs of up to TOKENS tokens, or pairs of an item of work; others are as for `by_row`.

    SPLITS parts of the inputs are added apart, and then to each other. The order of the sums depends on the number of
    inputs, on SPLITS and INPUTS_AT_ONCE.
    """
    dtype: tl.constexpr = x.dtype.element_ty
    token = tl.arange(0, TOKENS)
    output = tl.program_id(0) * OUTPUTS_EACH + tl.arange(0, OUTPUTS_EACH)
    inside = output < OUTPUTS
    row = (output * STEP).to(tl.int64)
    if EXPERTS:
        item = items + tl.program_id(1) * _ITEM
        some = token < tl.load(item + 2)
        if tl.load(item + 2) == 0:
            return
        pair = tl.load(order + tl.load(item + 1) + token, mask=some, other=0)
        row += tl.load(item).to(tl.int64) * ROWS
    else:
        pair = tl.program_id(1) * TOKENS + token
        some = pair < tokens
    from_row = (pair // SHARED).to(tl.int64) * INPUTS
    if SPLITS == 1:
        sums = tl.zeros((OUTPUTS_EACH, TOKENS), tl.float32)
        others = tl.zeros((OUTPUTS_EACH, TOKENS), tl.float32)
    else:
        sums = tl.zeros((SPLITS, OUTPUTS_EACH, TOKENS), tl.float32)
        others = tl.zeros((SPLITS, OUTPUTS_EACH, TOKENS), tl.float32)
    for start in tl.range(0, INPUTS, SPLITS * INPUTS_AT_ONCE, num_stages=STAGES):
        at = start + tl.arange(0, SPLITS)[:, None] * INPUTS_AT_ONCE + tl.arange(0, INPUTS_AT_ONCE)[None, :]
        mask = (at < INPUTS)[:, :, None] & some[None, None, :]
        numbers = tl.load(x + from_row[None, None, :] + at[:, :, None], mask=mask, other=0.0)
        weights = _read(
            codes, scales, zeros, row, start, inside, INPUTS, GROUP, UNIT, TABLE, HAS_ZEROS,
            SPLITS, INPUTS_AT_ONCE, dtype, WIDEN,
        )  # fmt: skip
        sums = _add(sums, weights, numbers, PRECISION, WIDEN)
        if OTHER:
            weights = _read(
                codes, scales, zeros, row + OTHER, start, inside, INPUTS, GROUP, UNIT, TABLE, HAS_ZEROS,
                SPLITS, INPUTS_AT_ONCE, dtype, WIDEN,
            )  # fmt: skip
            others = _add(others, weights, numbers, PRECISION, WIDEN)
    if SPLITS > 1:
        sums = tl.sum(sums, 0)
        others = tl.sum(others, 0)
    if HAS_BIAS:
        sums += tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)[:, None]
        if OTHER:
            others += tl.load(bias + row + OTHER, mask=inside, other=0.0).to(tl.float32)[:, None]
    if OTHER:
        sums = _gated(sums, others, ACTIVATION, ALPHA, LIMIT)
    if HAS_SHARES:
        sums *= tl.load(shares + pair, mask=some, other=0.0).to(tl.float32)[None, :]
    at_result = pair[None, :].to(tl.int64) * OUTPUTS + output[:, None]
    tl.store(result + at_result, sums.to(result.dtype.element_ty), mask=inside[:, None] & some[None, :])


@triton.jit
def _experts(chosen, at, pairs, EXPERTS: tl.constexpr):
    """Of the pairs `at`; EXPERTS for those that are not there, or have another expert."""
    found = tl.load(chosen + at, mask=at < pairs, other=EXPERTS).to(tl.int32)
    return tl.where((found >= 0) & (found < EXPERTS), found, EXPERTS)


@triton.jit(do_not_specialize=["pairs", "most"])
def route(
    chosen, order, items, pairs, most,
    EXPERTS: tl.constexpr, BINS: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes an expert's pairs where they are in the `order` of all, and its items, of up to TOKENS pairs each.

    The last expert's program writes items without pairs after them, up to `most`.
    """
    expert = tl.program_id(0)
    step = tl.arange(0, BLOCK)
    bins = tl.arange(0, BINS)
    counts = tl.zeros((BINS,), tl.int32)
    for start in range(0, pairs, BLOCK):
        counts += tl.histogram(_experts(chosen, start + step, pairs, EXPERTS), BINS)
    first = tl.sum(tl.where(bins < expert, counts, 0), 0)
    own = tl.sum(tl.where(bins == expert, counts, 0), 0)
    before = tl.sum(tl.where(bins < expert, (counts + TOKENS - 1) // TOKENS, 0), 0)
    place = first
    for start in range(0, pairs, BLOCK):
        mine = (_experts(chosen, start + step, pairs, EXPERTS) == expert).to(tl.int32)
        tl.store(order + place + tl.cumsum(mine, 0) - 1, start + step, mask=mine != 0)
        place += tl.sum(mine, 0)
    blocks = (own + TOKENS - 1) // TOKENS
    last = tl.where(expert == EXPERTS - 1, most, before + blocks)
    for start in range(before, last, BLOCK):
        item = start + step
        given = tl.minimum(tl.maximum(own - (item - before) * TOKENS, 0), TOKENS)
        tl.store(items + item * _ITEM, expert, mask=item < last)
        tl.store(items + item * _ITEM + 1, first + (item - before) * TOKENS, mask=item < last)
        tl.store(items + item * _ITEM + 2, given, mask=item < last)


@triton.jit
def add_up(parts, chosen, result, WIDTH: tl.constexpr, TOP: tl.constexpr, EXPERTS: tl.constexpr, EACH: tl.constexpr):
    """Adds what the TOP pairs of a token came to, (pairs, WIDTH), one after the other; EACH numbers a program."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * EACH + tl.arange(0, EACH)
    total = tl.zeros((EACH,), tl.float32)
    for i in tl.static_range(TOP):
        expert = tl.load(chosen + token * TOP + i)
        width = tl.where((expert >= 0) & (expert < EXPERTS), WIDTH, 0)
        total += tl.load(parts + (token * TOP + i) * WIDTH + at, mask=at < width, other=0.0).to(tl.float32)
    tl.store(result + token * WIDTH + at, total.to(result.dtype.element_ty), mask=at < WIDTH)
