"""The Triton kernels of a fused step. Importing this needs triton; nothing else does.

A step of few tokens reads every weight once and computes little, so it takes as long as reading takes. `project` is
written for that: a program takes OUTPUTS_EACH rows of a matrix, reads them whole in wide pieces, and does what stands
before and after the product (norm, bias, activation, residual) on the few numbers that it has at hand.

One token is multiplied in float32, number by number: the sums stay spread over the threads until all inputs are read.
More tokens go through the matrix units, as the narrow side of a product; they are padded to TOKENS.

Up to three matrices that have the same input are one launch, read where their modules keep them: a program belongs to
the matrix into which its outputs fall. Gate and up projection are read side by side by the same program.

x / rms(x) * g is multiplied as x * g, and the sum divided by rms(x), of which the squares are summed on the way. Where
a norm has more to it (a mean, a bias) or x * g could be too large for a number (float16 in matrix units), a program
reads x once more before.
"""

from __future__ import annotations

import triton
import triton.language as tl

NO_NORM, NORM_AFTER, NORM_BEFORE = 0, 1, 2
"""What `project` does about the norm: nothing; it divides the sums; it norms the inputs."""

_NO_NORM, _NORM_AFTER, _NORM_BEFORE = tl.constexpr(NO_NORM), tl.constexpr(NORM_AFTER), tl.constexpr(NORM_BEFORE)


@triton.jit
def _tanh(x):
    # An exponential that overflows gives 1, one that vanishes -1.
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """By the number that `blueprint.ACTIVATIONS` gives it; -1 is none."""
    if ACTIVATION == 0:
        x = x * tl.sigmoid(x)
    elif ACTIVATION == 1:
        x = 0.5 * x * (1.0 + _tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif ACTIVATION == 2:
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == 3:
        x = tl.maximum(x, 0.0)
    elif ACTIVATION == 4:
        x = tl.maximum(x, 0.0) * tl.maximum(x, 0.0)
    return x


@triton.jit
def _statistics(x, token, tokens, INPUTS: tl.constexpr, INPUTS_AT_ONCE: tl.constexpr, CENTRED: tl.constexpr):
    """Mean (0, if it is not CENTRED) and mean square around it of each of (tokens, INPUTS); (TOKENS,) both."""
    step = tl.arange(0, INPUTS_AT_ONCE)
    total = tl.zeros(token.shape, tl.float32)
    squares = tl.zeros(token.shape, tl.float32)
    if CENTRED:
        for start in range(0, INPUTS, INPUTS_AT_ONCE):
            at = start + step[None, :]
            mask = (at < INPUTS) & (token[:, None] < tokens)
            total += tl.sum(tl.load(x + token[:, None] * INPUTS + at, mask=mask, other=0.0).to(tl.float32), 1)
    mean = total / INPUTS
    for start in range(0, INPUTS, INPUTS_AT_ONCE):
        at = start + step[None, :]
        mask = (at < INPUTS) & (token[:, None] < tokens)
        numbers = tl.load(x + token[:, None] * INPUTS + at, mask=mask, other=0.0).to(tl.float32)
        numbers = tl.where(mask, numbers - mean[:, None], 0.0)
        squares += tl.sum(numbers * numbers, 1)
    return mean, squares / INPUTS


@triton.jit
def _normed(numbers, norm, norm_bias, at, there, mean, scale, offset, NORM: tl.constexpr, HAS_NORM_BIAS: tl.constexpr):
    """What goes into the product; `mean` and `scale` are as `numbers`, `at` too."""
    if NORM != _NO_NORM:
        if NORM == _NORM_BEFORE:
            numbers = (numbers - mean) * scale
        numbers *= tl.load(norm + at, mask=there, other=0.0).to(tl.float32) + offset
        if HAS_NORM_BIAS:
            numbers += tl.load(norm_bias + at, mask=there, other=0.0).to(tl.float32)
    return numbers


@triton.jit
def _one_token(
    x, norm, norm_bias, first, second, output, outputs, mean, scale, offset, epsilon,
    INPUTS: tl.constexpr, OUTPUTS_EACH: tl.constexpr, INPUTS_AT_ONCE: tl.constexpr,
    NORM: tl.constexpr, HAS_NORM_BIAS: tl.constexpr, GATED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sums of one token for the rows `output` of one matrix, or of two if GATED; (OUTPUTS_EACH, 1) both."""
    step = tl.arange(0, INPUTS_AT_ONCE)
    row = output.to(tl.int64)[:, None] * INPUTS
    sums = tl.zeros((OUTPUTS_EACH, INPUTS_AT_ONCE), tl.float32)
    second_sums = tl.zeros((OUTPUTS_EACH, INPUTS_AT_ONCE), tl.float32)
    squares = tl.zeros((INPUTS_AT_ONCE,), tl.float32)
    for start in tl.range(0, INPUTS, INPUTS_AT_ONCE, num_stages=STAGES):
        at = start + step
        there = at < INPUTS
        mask = there[None, :] & (output < outputs)[:, None]
        weights = tl.load(first + row + at[None, :], mask=mask, other=0.0, eviction_policy="evict_first")
        if GATED:
            others = tl.load(second + row + at[None, :], mask=mask, other=0.0, eviction_policy="evict_first")
        numbers = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
        if NORM == _NORM_AFTER:
            squares += numbers * numbers
        numbers = _normed(numbers, norm, norm_bias, at, there, mean, scale, offset, NORM, HAS_NORM_BIAS)
        sums += weights.to(tl.float32) * numbers[None, :]
        if GATED:
            second_sums += others.to(tl.float32) * numbers[None, :]
    total = tl.sum(sums, 1)
    second_total = tl.sum(second_sums, 1)
    if NORM == _NORM_AFTER:
        factor = 1.0 / tl.sqrt(tl.sum(squares, 0) / INPUTS + epsilon)
        total *= factor
        second_total *= factor
    return total[:, None], second_total[:, None]


@triton.jit
def _some_tokens(
    x, norm, norm_bias, first, second, output, outputs, token, tokens, mean, scale, offset, epsilon,
    INPUTS: tl.constexpr, OUTPUTS_EACH: tl.constexpr, INPUTS_AT_ONCE: tl.constexpr,
    TOKENS: tl.constexpr, NORM: tl.constexpr, HAS_NORM_BIAS: tl.constexpr, GATED: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """As `_one_token`, of several: (OUTPUTS_EACH, TOKENS) both."""
    step = tl.arange(0, INPUTS_AT_ONCE)
    row = output.to(tl.int64)[:, None] * INPUTS
    sums = tl.zeros((OUTPUTS_EACH, TOKENS), tl.float32)
    second_sums = tl.zeros((OUTPUTS_EACH, TOKENS), tl.float32)
    squares = tl.zeros((TOKENS,), tl.float32)
    for start in tl.range(0, INPUTS, INPUTS_AT_ONCE, num_stages=STAGES):
        at = start + step
        there = at < INPUTS
        mask = there[None, :] & (output < outputs)[:, None]
        weights = tl.load(first + row + at[None, :], mask=mask, other=0.0, eviction_policy="evict_first")
        of_token = there[:, None] & (token < tokens)[None, :]
        numbers = tl.load(x + token[None, :] * INPUTS + at[:, None], mask=of_token, other=0.0)
        if NORM != _NO_NORM:
            numbers = numbers.to(tl.float32)
            if NORM == _NORM_AFTER:
                squares += tl.sum(numbers * numbers, 0)
            numbers = _normed(
                numbers, norm, norm_bias, at[:, None], there[:, None], mean[None, :], scale[None, :], offset,
                NORM, HAS_NORM_BIAS,
            )  # fmt: skip
            numbers = numbers.to(weights.dtype)
        if WIDEN:  # Triton's interpreter cannot multiply bfloat16
            numbers = numbers.to(tl.float32)
            weights = weights.to(tl.float32)
        sums = tl.dot(weights, numbers, sums, input_precision=PRECISION)
        if GATED:
            others = tl.load(second + row + at[None, :], mask=mask, other=0.0, eviction_policy="evict_first")
            if WIDEN:
                others = others.to(tl.float32)
            second_sums = tl.dot(others, numbers, second_sums, input_precision=PRECISION)
    if NORM == _NORM_AFTER:
        factor = 1.0 / tl.sqrt(squares / INPUTS + epsilon)
        sums *= factor[None, :]
        second_sums *= factor[None, :]
    return sums, second_sums


@triton.jit(do_not_specialize=["tokens"])
def project(
    x, norm, norm_bias, first, second, third, first_bias, second_bias, third_bias, residual, result,
    tokens, offset, epsilon, factor, cap,
    INPUTS: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, THIRD: tl.constexpr,
    NORM: tl.constexpr, CENTRED: tl.constexpr, HAS_NORM_BIAS: tl.constexpr, GATED: tl.constexpr,
    ACTIVATION: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_CAP: tl.constexpr, HAS_BIAS: tl.constexpr,
    TOKENS: tl.constexpr, OUTPUTS_EACH: tl.constexpr, INPUTS_AT_ONCE: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Computes cap(residual + factor * activation(norm(x) @ weights.T + biases)) of (tokens, INPUTS).

    The matrices are (FIRST, INPUTS), (SECOND, INPUTS) and (THIRD, INPUTS); those of size 0 are not there. If GATED,
    they are the gate and the up projection, of the same size. The result is (tokens, outputs of all matrices), or
    (tokens, FIRST) if GATED; the residual is like it. `offset` is added to the weights of the norm, `epsilon` to the
    mean square.
    """
    BLOCKS: tl.constexpr = (FIRST + OUTPUTS_EACH - 1) // OUTPUTS_EACH
    SECOND_BLOCKS: tl.constexpr = 0 if GATED else (SECOND + OUTPUTS_EACH - 1) // OUTPUTS_EACH
    WIDTH: tl.constexpr = FIRST if GATED else FIRST + SECOND + THIRD
    block = tl.program_id(0)
    token = tl.arange(0, TOKENS)
    matrix = first
    bias = first_bias
    before = 0
    outputs = FIRST
    if SECOND_BLOCKS:  # noqa: SIM102 - what the compiler knows must stand alone
        if block >= BLOCKS:
            matrix = second
            bias = second_bias
            before = FIRST
            outputs = SECOND
            block -= BLOCKS
            if THIRD:  # noqa: SIM102
                if block >= SECOND_BLOCKS:
                    matrix = third
                    bias = third_bias
                    before = FIRST + SECOND
                    outputs = THIRD
                    block -= SECOND_BLOCKS
    output = block * OUTPUTS_EACH + tl.arange(0, OUTPUTS_EACH)
    mean = tl.zeros((TOKENS,), tl.float32)
    scale = mean
    if NORM == _NORM_BEFORE:
        mean, square = _statistics(x, token, tokens, INPUTS, INPUTS_AT_ONCE, CENTRED)
        scale = 1.0 / tl.sqrt(square + epsilon)
    if TOKENS == 1:
        sums, second_sums = _one_token(
            x, norm, norm_bias, matrix, second, output, outputs, mean, scale, offset, epsilon,
            INPUTS, OUTPUTS_EACH, INPUTS_AT_ONCE, NORM, HAS_NORM_BIAS, GATED, STAGES,
        )  # fmt: skip
    else:
        sums, second_sums = _some_tokens(
            x, norm, norm_bias, matrix, second, output, outputs, token, tokens, mean, scale, offset, epsilon,
            INPUTS, OUTPUTS_EACH, INPUTS_AT_ONCE, TOKENS, NORM, HAS_NORM_BIAS, GATED,
            STAGES, PRECISION, WIDEN,
        )  # fmt: skip
    inside = output < outputs
    if HAS_BIAS:
        sums += tl.load(bias + output, mask=inside, other=0.0).to(tl.float32)[:, None]
        if GATED:
            second_sums += tl.load(second_bias + output, mask=inside, other=0.0).to(tl.float32)[:, None]
    sums = activated(sums, ACTIVATION)
    if GATED:
        sums *= second_sums
    sums *= factor
    at = token[None, :].to(tl.int64) * WIDTH + before + output[:, None]
    mask = inside[:, None] & (token < tokens)[None, :]
    if HAS_RESIDUAL:
        sums += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    if HAS_CAP:
        sums = _tanh(sums / cap) * cap
    tl.store(result + at, sums.to(result.dtype.element_ty), mask=mask)


@triton.jit
def _mean_square(x, COUNT: tl.constexpr, PAD: tl.constexpr):
    """Of COUNT numbers."""
    at = tl.arange(0, PAD)
    numbers = tl.load(x + at, mask=at < COUNT, other=0.0).to(tl.float32)
    return tl.sum(numbers * numbers, 0) / COUNT


@triton.jit
def rotate(
    query, key, query_norm, key_norm, cosines, sines, positions, result, query_token, key_token,
    offset, epsilon, query_scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    HAS_NORM: tl.constexpr, OF_HEADS: tl.constexpr, OWN_WEIGHTS: tl.constexpr, CENTRED: tl.constexpr,
    QUERY_PAD: tl.constexpr, KEY_PAD: tl.constexpr,
    ROTARY: tl.constexpr, PAIRS: tl.constexpr, HEADS_EACH: tl.constexpr,
):  # fmt: skip
    """Norms and rotates the queries and keys of one token, HEADS_EACH heads a program.

    Queries are (tokens, HEADS * DIM), keys (tokens, KV_HEADS * DIM); `query_token` and `key_token` are strides. Norms
    are (DIM,), or (heads, DIM) where heads have OWN_WEIGHTS; unless OF_HEADS, all heads are normed as one row. Cosines
    and sines are (positions, ROTARY / 2). The result is (tokens, HEADS + KV_HEADS, DIM).
    """
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS_EACH + tl.arange(0, HEADS_EACH))[:, None]
    dim = tl.arange(0, DIM_PAD)[None, :]
    is_query = head < HEADS
    mask = (head < HEADS + KV_HEADS) & (dim < DIM)
    if PAIRS:
        partner = dim ^ 1
        angle = dim // 2
        sign = tl.where(dim % 2 == 0, -1.0, 1.0)
    else:
        partner = tl.where(dim < ROTARY // 2, dim + ROTARY // 2, dim - ROTARY // 2)
        angle = tl.where(dim < ROTARY // 2, dim, dim - ROTARY // 2)
        sign = tl.where(dim < ROTARY // 2, -1.0, 1.0)
    turns = mask & (dim < ROTARY)
    query_row = query + token * query_token
    key_row = key + token * key_token
    row = tl.where(is_query, query_row + head * DIM, key_row + (head - HEADS) * DIM)
    own = tl.load(row + dim, mask=mask, other=0.0).to(tl.float32)
    other = tl.load(row + partner, mask=turns, other=0.0).to(tl.float32)
    if HAS_NORM:
        if OF_HEADS:
            if CENTRED:
                mean = (tl.sum(own, 1) / DIM)[:, None]
                own = tl.where(mask, own - mean, 0.0)
                other = other - mean
            square = (tl.sum(own * own, 1) / DIM)[:, None]
        else:
            square = tl.where(
                is_query,
                _mean_square(query_row, HEADS * DIM, QUERY_PAD),
                _mean_square(key_row, KV_HEADS * DIM, KEY_PAD),
            )
        scale = 1.0 / tl.sqrt(square + epsilon)
        of_head = tl.where(is_query, head, head - HEADS) * (DIM if OWN_WEIGHTS else 0)
        own_weight = (
            tl.load(query_norm + of_head + dim, mask=mask & is_query, other=0.0).to(tl.float32)
            + tl.load(key_norm + of_head + dim, mask=mask & (is_query == 0), other=0.0).to(tl.float32)
        )  # fmt: skip
        other_weight = (
            tl.load(query_norm + of_head + partner, mask=turns & is_query, other=0.0).to(tl.float32)
            + tl.load(key_norm + of_head + partner, mask=turns & (is_query == 0), other=0.0).to(tl.float32)
        )  # fmt: skip
        own = own * scale * (own_weight + offset)
        other = other * scale * (other_weight + offset)
    if ROTARY:
        at = tl.load(positions + token) * (ROTARY // 2) + angle
        cosine = tl.load(cosines + at, mask=dim < ROTARY, other=1.0)
        sine = tl.load(sines + at, mask=dim < ROTARY, other=0.0)
        own = tl.where(dim < ROTARY, own * cosine + sign * other * sine, own)
    own *= tl.where(is_query, query_scale, 1.0)
    to = result + token * ((HEADS + KV_HEADS) * DIM) + head * DIM + dim
    tl.store(to, own.to(result.dtype.element_ty), mask=mask)


@triton.jit
def norm_rows(
    x, norm, norm_bias, residual, result, offset, epsilon, factor,
    WIDTH: tl.constexpr, PAD: tl.constexpr, CENTRED: tl.constexpr, HAS_NORM_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Computes residual + factor * norm(x), all (tokens, WIDTH); a program has one token."""
    at = tl.arange(0, PAD)
    mask = at < WIDTH
    row = tl.program_id(0).to(tl.int64) * WIDTH
    numbers = tl.load(x + row + at, mask=mask, other=0.0).to(tl.float32)
    if CENTRED:
        numbers = tl.where(mask, numbers - tl.sum(numbers, 0) / WIDTH, 0.0)
    numbers /= tl.sqrt(tl.sum(numbers * numbers, 0) / WIDTH + epsilon)
    numbers *= tl.load(norm + at, mask=mask, other=0.0).to(tl.float32) + offset
    if HAS_NORM_BIAS:
        numbers += tl.load(norm_bias + at, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        numbers = tl.load(residual + row + at, mask=mask, other=0.0).to(tl.float32) + factor * numbers
    tl.store(result + row + at, numbers.to(result.dtype.element_ty), mask=mask)


@triton.jit
def activate(
    gate, up, result, gate_token, up_token,
    INNER: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr, NUMBERS_EACH: tl.constexpr,
):  # fmt: skip
    """Computes activation(gate) * up, or activation(gate) if it is not GATED; all (tokens, INNER).

    A program has NUMBERS_EACH results of one token. `gate_token` and `up_token` are strides.
    """
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * NUMBERS_EACH + tl.arange(0, NUMBERS_EACH)
    mask = at < INNER
    numbers = activated(tl.load(gate + token * gate_token + at, mask=mask, other=0.0).to(tl.float32), ACTIVATION)
    if GATED:
        numbers *= tl.load(up + token * up_token + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(result + token * INNER + at, numbers.to(result.dtype.element_ty), mask=mask)
