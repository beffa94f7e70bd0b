"""The Triton kernels of a step in which each sequence has one token. Importing this needs triton; nothing else does.

Such a step computes little and moves much: a state is read, changed and written, and is some hundred times as large as
what it is changed by. So a program takes a part of one sequence's state, as much as its threads hold in registers at
once, reads it where the sequence keeps it, and writes it where it is to lie: in the same place, or, if the state is to
be set aside, in another. Whatever is reduced (over keys, or over the numbers of a state) is whole within a program.

Places are read on the device, so a captured launch serves any sequences. Rows that stand for nobody have the place
`nowhere`: of these nothing is read, as if they had a state of zeros, and nothing is written but their output.

What differs from step to step, or between a load's trial and what is served, is not compiled for: distances between
rows, alignment of places, and which place is nowhere. Else a step would wait for a compiler. Of states, which are read
and written in wide pieces, the distance is a multiple of 16 numbers and the compiler is told.

All arithmetic is in float32; states, inputs and parameters are read, and states and outputs written, in their own
dtype.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _softplus(x):
    """log(1 + exp(x)), also where exp(x) is lost beside 1."""
    power = tl.exp(tl.where(x > 20.0, 20.0, x))
    above = 1.0 + power
    # What rounding has made of the sum is made good by the quotient of what was added and what came of it.
    small = tl.where(above == 1.0, power, tl.log(above) * (power / tl.where(above == 1.0, 1.0, above - 1.0)))
    return tl.where(x > 20.0, x, small)


@triton.jit
def _up_to(at, size, place, nowhere):
    """Which of the first so many are there: none of those that are nowhere."""
    return at < tl.where(place == nowhere, 0, size)


@triton.jit(
    do_not_specialize=[
        "sources", "targets", "nowhere", "query_row", "key_row", "value_row", "decay_row", "beta_row",
    ]
)  # fmt: skip
def delta_rule(
    query, key, value, decay, beta, state, output, sources, targets,
    query_row, key_row, value_row, decay_row, beta_row, state_row, nowhere, scale,
    HEADS: tl.constexpr, SHARED: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    KEY_PAD: tl.constexpr, VALUES: tl.constexpr, BY_CHANNEL: tl.constexpr, NORMALISE: tl.constexpr,
):  # fmt: skip
    """One token of the gated delta rule, or of Kimi's, whose decay is BY_CHANNEL of the keys.

    `query` and `key` (rows, HEADS / SHARED, KEY_DIM), `value` and `output` (rows, HEADS, VALUE_DIM), `decay` (rows,
    HEADS), or (rows, HEADS, KEY_DIM), `beta` (rows, HEADS), `state` (places, HEADS, KEY_DIM, VALUE_DIM). A program
    takes VALUES columns of one head's state.
    """
    head = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    source = tl.load(sources + row)
    target = tl.load(targets + row)
    of_key = tl.arange(0, KEY_PAD)
    of_value = tl.program_id(0) * VALUES + tl.arange(0, VALUES)
    is_key = of_key < KEY_DIM
    is_value = of_value < VALUE_DIM
    within = head * KEY_DIM * VALUE_DIM + of_key[:, None] * VALUE_DIM + of_value[None, :]
    to_read = _up_to(of_key, KEY_DIM, source, nowhere)[:, None] & is_value[None, :]
    to_write = _up_to(of_key, KEY_DIM, target, nowhere)[:, None] & is_value[None, :]
    old = tl.load(state + source * state_row + within, mask=to_read, other=0.0)
    numbers = old.to(tl.float32)
    of_shared = head // SHARED * KEY_DIM + of_key
    q = tl.load(query + row * query_row + of_shared, mask=is_key, other=0.0).to(tl.float32)
    k = tl.load(key + row * key_row + of_shared, mask=is_key, other=0.0).to(tl.float32)
    v = tl.load(value + row * value_row + head * VALUE_DIM + of_value, mask=is_value, other=0.0).to(tl.float32)
    step = tl.load(beta + row * beta_row + head).to(tl.float32)
    if NORMALISE:
        q *= 1.0 / tl.sqrt(tl.sum(q * q, 0) + 1e-6)
        k *= 1.0 / tl.sqrt(tl.sum(k * k, 0) + 1e-6)
    q *= scale
    if BY_CHANNEL:
        lost = tl.load(decay + row * decay_row + head * KEY_DIM + of_key, mask=is_key, other=0.0).to(tl.float32)
        numbers *= tl.exp(lost)[:, None]
    else:
        numbers *= tl.exp(tl.load(decay + row * decay_row + head).to(tl.float32))
    change = (v - tl.sum(numbers * k[:, None], 0)) * step
    numbers += k[:, None] * change[None, :]
    answer = tl.sum(numbers * q[:, None], 0)
    at = (row * HEADS + head) * VALUE_DIM + of_value
    tl.store(output + at, answer.to(output.dtype.element_ty), mask=is_value)
    tl.store(state + target * state_row + within, numbers.to(state.dtype.element_ty), mask=to_write)


@triton.jit(do_not_specialize=["sources", "targets", "nowhere", "given_row", "step_row", "b_row", "c_row", "gate_row"])
def selective_scan(
    given, step, a, b, c, state, output, skip, bias, gate, sources, targets,
    given_row, step_row, b_row, c_row, gate_row, state_row, nowhere,
    HEADS: tl.constexpr, SHARED: tl.constexpr, DIM: tl.constexpr, STATE_DIM: tl.constexpr,
    EACH: tl.constexpr, STATE_PAD: tl.constexpr, BY_HEAD: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """One token of the selective scan: of Mamba-2, where step, `a`, `skip` and `bias` are BY_HEAD, or of Mamba.

    `given`, `gate` and `output` (rows, HEADS, DIM), `step` the same, or (rows, HEADS), `a` (HEADS, DIM, STATE_DIM), or
    (HEADS), `b` and `c` (rows, HEADS / SHARED, STATE_DIM), `skip` and `bias` (HEADS, DIM), or (HEADS), `state` (places,
    HEADS, DIM, STATE_DIM). A program takes EACH rows of one head's state.
    """
    head = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    source = tl.load(sources + row)
    target = tl.load(targets + row)
    at = tl.program_id(0) * EACH + tl.arange(0, EACH)
    of_state = tl.arange(0, STATE_PAD)
    is_one = at < DIM
    is_state = of_state < STATE_DIM
    within = head * DIM * STATE_DIM + at[:, None] * STATE_DIM + of_state[None, :]
    to_read = _up_to(at, DIM, source, nowhere)[:, None] & is_state[None, :]
    to_write = _up_to(at, DIM, target, nowhere)[:, None] & is_state[None, :]
    old = tl.load(state + source * state_row + within, mask=to_read, other=0.0)
    own = head * DIM + at
    x = tl.load(given + row * given_row + own, mask=is_one, other=0.0).to(tl.float32)
    of_shared = head // SHARED * STATE_DIM + of_state
    to_state = tl.load(b + row * b_row + of_shared, mask=is_state, other=0.0).to(tl.float32)
    of_answer = tl.load(c + row * c_row + of_shared, mask=is_state, other=0.0).to(tl.float32)
    if BY_HEAD:
        time = tl.load(step + row * step_row + head).to(tl.float32)
        if bias is not None:
            time += tl.load(bias + head).to(tl.float32)
        if SOFTPLUS:
            time = _softplus(time)
        numbers = old.to(tl.float32) * tl.exp(time * tl.load(a + head).to(tl.float32))
        numbers += (time * x)[:, None] * to_state[None, :]
    else:
        time = tl.load(step + row * step_row + own, mask=is_one, other=0.0).to(tl.float32)
        if bias is not None:
            time += tl.load(bias + own, mask=is_one, other=0.0).to(tl.float32)
        if SOFTPLUS:
            time = _softplus(time)
        rate = tl.load(a + within, mask=is_one[:, None] & is_state[None, :], other=0.0).to(tl.float32)
        numbers = old.to(tl.float32) * tl.exp(time[:, None] * rate)
        numbers += (time * x)[:, None] * to_state[None, :]
    answer = tl.sum(numbers * of_answer[None, :], 1)
    if skip is not None:
        if BY_HEAD:
            answer += tl.load(skip + head).to(tl.float32) * x
        else:
            answer += tl.load(skip + own, mask=is_one, other=0.0).to(tl.float32) * x
    if gate is not None:
        by = tl.load(gate + row * gate_row + own, mask=is_one, other=0.0).to(tl.float32)
        answer *= by * tl.sigmoid(by)
    tl.store(output + row * HEADS * DIM + own, answer.to(output.dtype.element_ty), mask=is_one)
    tl.store(state + target * state_row + within, numbers.to(state.dtype.element_ty), mask=to_write)


@triton.jit(do_not_specialize=["sources", "targets", "nowhere", "given_row"])
def convolution(
    given, weight, bias, state, output, sources, targets, given_row, state_row, nowhere,
    CHANNELS: tl.constexpr, TAPS: tl.constexpr, KEPT: tl.constexpr, KEPT_PAD: tl.constexpr,
    EACH: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """One token of each channel's convolution over the tokens before, of which KEPT are the state.

    `given` and `output` (rows, CHANNELS), `weight` (CHANNELS, TAPS), `bias` (CHANNELS), `state` (places, CHANNELS,
    KEPT). A program takes EACH channels of one row.
    """
    row = tl.program_id(1).to(tl.int64)
    source = tl.load(sources + row)
    target = tl.load(targets + row)
    channel = tl.program_id(0) * EACH + tl.arange(0, EACH)
    token = tl.arange(0, KEPT_PAD)
    is_one = channel < CHANNELS
    is_kept = token < KEPT
    to_read = _up_to(channel, CHANNELS, source, nowhere)[:, None] & is_kept[None, :]
    to_write = _up_to(channel, CHANNELS, target, nowhere)[:, None] & is_kept[None, :]
    within = channel[:, None] * KEPT + token[None, :]
    read = state + source * state_row + within
    old = tl.load(read, mask=to_read, other=0.0)
    moved = tl.load(read + 1, mask=to_read & (token < KEPT - 1)[None, :], other=0.0)
    x = tl.load(given + row * given_row + channel, mask=is_one, other=0.0)
    # The last tap is of the token itself, the others of the last tokens that are kept.
    tap = token + (TAPS - 1 - KEPT)
    of_tap = weight + channel[:, None] * TAPS + tap[None, :]
    by = tl.load(of_tap, mask=is_one[:, None] & (is_kept & (tap >= 0))[None, :], other=0.0).to(tl.float32)
    last = tl.load(weight + channel * TAPS + (TAPS - 1), mask=is_one, other=0.0).to(tl.float32)
    answer = tl.sum(old.to(tl.float32) * by, 1) + x.to(tl.float32) * last
    if bias is not None:
        answer += tl.load(bias + channel, mask=is_one, other=0.0).to(tl.float32)
    if SILU:
        answer *= tl.sigmoid(answer)
    tl.store(output + row * CHANNELS + channel, answer.to(output.dtype.element_ty), mask=is_one)
    new = tl.where((token == KEPT - 1)[None, :], x.to(state.dtype.element_ty)[:, None], moved)
    # What a thread moves another may have read as it was: none is to write before all have read.
    tl.debug_barrier()
    tl.store(state + target * state_row + within, new, mask=to_write)
