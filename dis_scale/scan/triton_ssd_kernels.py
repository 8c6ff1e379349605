"""State-space duality on NVIDIA GPUs: Triton kernels for the chunks of duality.py.

`ssd_exponents` and `ssd_exponents_backward` compute one direction. The other kernels compute both directions.

A program computes some heads of a chunk; in `ssd_states` it computes one head of an image. All heads share the scores C . B of the
chunk's pairs of tokens. Scores of the earlier direction are below the diagonal, those of the later direction above it. So one
product per head mixes both directions. Factors of products are rounded to x's type. Exponents and sums are float32, and so is the
state that passes from chunk to chunk. Stored states have x's type. No sum is atomic: programs store their parts of the gradients
that heads share, and the parts are summed afterwards.

Pointers, for images of K chunks of Q tokens; "chunks" are those of all images:

    x, y, dx, dy    (image, time, head, channel); v is x, or dy in a BACKWARD pass
    own, down       (image, time, head), float32
    scores, dscores (chunk, token, token), where dscores has one part for each program of a chunk, float32
    U, B, C         (chunk, token, state); U is B or C; dB and dC have parts, as dscores
    reach, leave, taken, weight   (chunk, head, token), float32, and their gradients, as `Mixed` of triton_ssd.py says
    decay, ddecay, dA (chunk, head), float32; dA are the parts of A's gradient
    step, dstep     (image, time, head), float32; A is (head)
    states, dstates (image, K - 1 chunks, head, state, channel): the state that enters a chunk, none of the first in the direction's
                    order, and the gradient of the one that leaves it, none of the last

Sizes and flags are compile-time constants. L, H, P, N, K and Q are as in duality.py. `x_row`, `v_row`, `dy_row`, `dx_row`,
`step_row` and `dstep_row` are the distances between two tokens. HEADS counts the heads of a program. EARLIER and LATER: this
direction is present. REVERSE: the direction is that of the later tokens. EXCLUSIVE is as in duality.ssd. BACKWARD: the states are
gradients; those of the earlier direction pass from the last chunk to the first. TOKENS, CHANNELS and STATES are the tile sizes for
Q, P and N. Each direction's pointers are a tuple. For an absent direction the kernels get the other direction's tuple, and do not
use it. Read next: duality.py.
"""

import triton
import triton.language as tl

LOG2_OF_E = tl.constexpr(1.4426950408889634)
LEAST_STEP = tl.constexpr(1e-30)
"""Lower limit of a step, as in duality.py."""


@triton.jit
def _tokens(chunk, K: tl.constexpr, L: tl.constexpr, Q: tl.constexpr, TOKENS: tl.constexpr):
    """Return a tile's tokens, the row of its first token in (image, time), and masks: tokens of the chunk, tokens of the image."""
    i, first = tl.arange(0, TOKENS), chunk % K * Q
    return i, chunk // K * L + first, i < Q, (i < Q) & (i < (L - first).to(tl.int32))


@triton.jit
def _matrix(pointer, rows, columns, row, inside_rows, inside_columns):
    """Load a tile of a matrix whose rows are `row` numbers apart; zeros outside. Within a tile, offsets fit 32 bits."""
    at = pointer + (rows[:, None] * row + columns[None, :])
    return tl.load(at, mask=inside_rows[:, None] & inside_columns[None, :], other=0.0)


@triton.jit
def _factors(early, late, at, i, inside, EARLIER: tl.constexpr, LATER: tl.constexpr):
    """Return exp(reach_i + leave_j) for all pairs of tokens, each by its direction; 0 on the diagonal and outside of the chunk."""
    exponent = tl.full((i.shape[0], i.shape[0]), float("-inf"), tl.float32)
    if EARLIER:
        reach = tl.load(early[0] + at + i, mask=inside, other=float("-inf")) * LOG2_OF_E
        leave = tl.load(early[1] + at + i, mask=inside, other=float("-inf")) * LOG2_OF_E
        exponent = tl.where(i[:, None] > i[None, :], reach[:, None] + leave[None, :], exponent)
    if LATER:
        reach = tl.load(late[0] + at + i, mask=inside, other=float("-inf")) * LOG2_OF_E
        leave = tl.load(late[1] + at + i, mask=inside, other=float("-inf")) * LOG2_OF_E
        exponent = tl.where(i[:, None] < i[None, :], reach[:, None] + leave[None, :], exponent)
    return tl.exp2(exponent)


@triton.jit
def _state(states, chunk, head, n, p, not_first, H, P: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """Load the state of a chunk. One chunk of an image has none, and gets zeros: the first if `not_first`, otherwise the last."""
    k = chunk % K
    if not_first:
        number, exists = k - 1, k > 0
    else:
        number, exists = k, k < K - 1
    at = ((chunk // K * (K - 1) + number) * H + head) * N * P
    return _matrix(states + at, n, p, P, (n < N) & exists, p < P)


@triton.jit
def _through_state(
    way, chunk, head, i, n, p, inside, not_first, H, P: tl.constexpr, N: tl.constexpr, K: tl.constexpr, Q: tl.constexpr
):  # fmt: skip
    """Return weight_i (U_i . state) for each token of the chunk and each channel; `way` is U, weight, states."""
    U, weight, states = way
    u_QN = _matrix(U + chunk * Q * N, i, n, N, inside, n < N)
    state_NP = _state(states, chunk, head, n, p, not_first, H, P, N, K)
    weight_Q = tl.load(weight + (chunk * H + head) * Q + i, mask=inside, other=0.0)
    return weight_Q[:, None] * tl.dot(u_QN, state_NP, input_precision="tf32x3")


@triton.jit
def _at_heads(L: tl.constexpr, H: tl.constexpr, K: tl.constexpr, Q: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr):
    """Return the program's chunk, the chunk's tokens, its first row, the mask of the image's tokens, the heads, and for a tile of
    (token, head) the offsets and the mask of what is inside."""
    chunk, h = tl.program_id(0).to(tl.int64), tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    i, row, inside, present = _tokens(chunk, K, L, Q, TOKENS)
    return chunk, i, row, present, h, chunk * H * Q + h[None, :] * Q + i[:, None], inside[:, None] & (h < H)[None, :]


@triton.jit
def ssd_exponents(
    step, A, reach, leave, taken, weight, decay,
    L: tl.constexpr, H: tl.constexpr, K: tl.constexpr, Q: tl.constexpr, step_row: tl.constexpr,
    REVERSE: tl.constexpr, EXCLUSIVE: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Store reach and leave, the exponents from the sums of decays (`Exponents` of duality.py), and taken, weight and decay, which
    are powers of e."""
    chunk, i, row, present, h, at, inside = _at_heads(L, H, K, Q, TOKENS, HEADS)
    step_QH = _matrix(step + row * step_row, i, h, step_row, present, h < H)
    decay_QH = step_QH * tl.load(A + h, mask=h < H, other=0.0)[None, :]
    sums_QH = tl.cumsum(decay_QH, 0, reverse=REVERSE)
    total_H = tl.sum(tl.where(i[:, None] == (0 if REVERSE else Q - 1), sums_QH, 0.0), 0)
    reach_QH = sums_QH - decay_QH if EXCLUSIVE else sums_QH
    leave_QH = tl.log(tl.maximum(step_QH, LEAST_STEP)) - sums_QH
    tl.store(reach + at, reach_QH, mask=inside)
    tl.store(leave + at, leave_QH, mask=inside)
    tl.store(taken + at, tl.exp(reach_QH), mask=inside)
    tl.store(weight + at, tl.exp(total_H[None, :] + leave_QH), mask=inside)
    tl.store(decay + chunk * H + h, tl.exp(total_H), mask=h < H)


@triton.jit
def ssd_exponents_backward(
    step, A, taken, weight, decay, dreach, dleave, dtaken, dweight, ddecay, dstep, dA,
    L: tl.constexpr, H: tl.constexpr, K: tl.constexpr, Q: tl.constexpr, step_row: tl.constexpr, dstep_row: tl.constexpr,
    REVERSE: tl.constexpr, EXCLUSIVE: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Store the gradients of step and A, from those of the outputs of `ssd_exponents`. Reads dtaken, dweight, ddecay if K > 1."""
    chunk, i, row, present, h, at, inside = _at_heads(L, H, K, Q, TOKENS, HEADS)
    step_QH = _matrix(step + row * step_row, i, h, step_row, present, h < H)
    dreach_QH = tl.load(dreach + at, mask=inside, other=0.0)
    dleave_QH = tl.load(dleave + at, mask=inside, other=0.0)
    dtotal_H = tl.zeros((HEADS,), tl.float32)
    if K > 1:
        dreach_QH += tl.load(dtaken + at, mask=inside, other=0.0) * tl.load(taken + at, mask=inside, other=0.0)
        through_QH = tl.load(dweight + at, mask=inside, other=0.0) * tl.load(weight + at, mask=inside, other=0.0)
        dleave_QH += through_QH
        of_decay, heads = chunk * H + h, h < H
        dtotal_H = tl.load(ddecay + of_decay, mask=heads, other=0.0) * tl.load(decay + of_decay, mask=heads, other=0.0)
        dtotal_H += tl.sum(through_QH, 0)
    dsums_QH = dreach_QH - dleave_QH + tl.where(i[:, None] == (0 if REVERSE else Q - 1), dtotal_H[None, :], 0.0)
    ddecay_QH = tl.cumsum(dsums_QH, 0, reverse=not REVERSE)
    if EXCLUSIVE:
        ddecay_QH -= dreach_QH
    dstep_QH = ddecay_QH * tl.load(A + h, mask=h < H, other=0.0)[None, :]
    dstep_QH += tl.where(step_QH >= LEAST_STEP, dleave_QH / tl.maximum(step_QH, LEAST_STEP), 0.0)
    at_step = dstep + row * dstep_row + (i[:, None] * dstep_row + h[None, :])
    tl.store(at_step, dstep_QH, mask=present[:, None] & (h < H)[None, :])
    tl.store(dA + chunk * H + h, tl.sum(ddecay_QH * step_QH, 0), mask=h < H)


@triton.jit
def _way_of(program, EARLIER: tl.constexpr, LATER: tl.constexpr):
    """Return a program's number within its direction, and whether its direction is that of the later tokens.

    The two directions' programs with one number are neighbours. So one of them finds in a cache the data that the other has read.
    """
    if EARLIER and LATER:
        return program // 2, program % 2 == 1
    return program, program < 0 if EARLIER else program >= 0  # tensors: each kernel has both tuples, and chooses one


@triton.jit
def ssd_states(
    v, early, late,
    L: tl.constexpr, H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, K: tl.constexpr, Q: tl.constexpr,
    v_row: tl.constexpr, EARLIER: tl.constexpr, LATER: tl.constexpr, BACKWARD: tl.constexpr, TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    """Store the state that enters each chunk of a head. After a chunk it is decay state + sum of weight_i U_i v_i over its tokens.

    `early` is U, weight, decay, states. In a BACKWARD pass U is C, weight is `taken`, and the order of the chunks is reversed.
    """
    number, of_late = _way_of(tl.program_id(0).to(tl.int64), EARLIER, LATER)
    image, head = number // H, number % H
    U, weight, decay, states = early
    if of_late:
        U, weight, decay, states = late
    reverse = of_late != BACKWARD
    n, p = tl.arange(0, STATES), tl.arange(0, CHANNELS)
    state_NP = tl.zeros((STATES, CHANNELS), tl.float32)
    for step in range(K - 1):
        chunk = image * K + tl.where(reverse, K - 1 - step, step)
        at = chunk * H + head
        i, row, inside, present = _tokens(chunk, K, L, Q, TOKENS)
        u_QN = _matrix(U + chunk * Q * N, i, n, N, inside, n < N)
        v_QP = _matrix(v + row * v_row + head * P, i, p, v_row, present, p < P)
        weight_Q = tl.load(weight + at * Q + i, mask=inside, other=0.0)
        weighted_QP = (v_QP * weight_Q[:, None]).to(v_QP.dtype)
        state_NP = tl.load(decay + at) * state_NP + tl.dot(tl.trans(u_QN), weighted_QP, input_precision="tf32x3")
        number = image * (K - 1) + tl.where(reverse, K - 2 - step, step)  # the next chunk's state in this order
        into = states + (number * H + head) * N * P + (n[:, None] * P + p[None, :])
        tl.store(into, state_NP.to(states.dtype.element_ty), mask=(n < N)[:, None] & (p < P)[None, :])


@triton.jit
def ssd_outputs(
    x, own, scores, early, late, early_state, late_state, y,
    L: tl.constexpr, H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, K: tl.constexpr, Q: tl.constexpr,
    x_row: tl.constexpr, EARLIER: tl.constexpr, LATER: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    """Store y: own x, the products over a chunk's pairs of tokens, and the parts of the states that enter the chunk.

    `early` is reach and leave; `early_state` is C, taken and states.
    """
    chunk, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * HEADS
    i, row, inside, present = _tokens(chunk, K, L, Q, TOKENS)
    n, p = tl.arange(0, STATES), tl.arange(0, CHANNELS)
    scores_QQ = _matrix(scores + chunk * Q * Q, i, i, Q, inside, inside)
    for j in range(HEADS):
        head = first + j
        x_QP = _matrix(x + row * x_row + head * P, i, p, x_row, present, p < P)
        own_Q = tl.load(own + row * H + head + i * H, mask=present, other=0.0)
        mixing_QQ = scores_QQ * _factors(early, late, (chunk * H + head) * Q, i, inside, EARLIER, LATER)
        y_QP = own_Q[:, None] * x_QP + tl.dot(mixing_QQ.to(x_QP.dtype), x_QP, input_precision="tf32x3")
        if K > 1 and EARLIER:
            y_QP += _through_state(early_state, chunk, head, i, n, p, inside, True, H, P, N, K, Q)
        if K > 1 and LATER:
            y_QP += _through_state(late_state, chunk, head, i, n, p, inside, False, H, P, N, K, Q)
        at = y + row * (H * P) + head * P + (i[:, None] * (H * P) + p[None, :])
        tl.store(at, y_QP.to(y.dtype.element_ty), mask=present[:, None] & (p < P)[None, :])


@triton.jit
def ssd_pairs_backward(
    x, dy, own, scores, early, late, early_state, late_state, dx, down, dscores, d_early, d_late,
    L: tl.constexpr, H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, K: tl.constexpr, Q: tl.constexpr,
    x_row: tl.constexpr, dy_row: tl.constexpr, dx_row: tl.constexpr, EARLIER: tl.constexpr, LATER: tl.constexpr,
    HEADS: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    """Store the gradients of x, own, scores, reach and leave. `early_state` is B, weight, dstates; `d_early` is dreach, dleave."""
    chunk, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * HEADS
    i, row, inside, present = _tokens(chunk, K, L, Q, TOKENS)
    n, p = tl.arange(0, STATES), tl.arange(0, CHANNELS)
    scores_QQ = _matrix(scores + chunk * Q * Q, i, i, Q, inside, inside)
    dscores_QQ = tl.zeros((TOKENS, TOKENS), tl.float32)
    for j in range(HEADS):
        head = first + j
        at = (chunk * H + head) * Q
        x_QP = _matrix(x + row * x_row + head * P, i, p, x_row, present, p < P)
        dy_QP = _matrix(dy + row * dy_row + head * P, i, p, dy_row, present, p < P)
        own_Q = tl.load(own + row * H + head + i * H, mask=present, other=0.0)
        factors_QQ = _factors(early, late, at, i, inside, EARLIER, LATER)
        dmixing_QQ = tl.dot(dy_QP, tl.trans(x_QP), input_precision="tf32x3")
        down_Q = tl.sum(tl.where(i[:, None] == i[None, :], dmixing_QQ, 0.0), 1)
        tl.store(down + row * H + head + i * H, down_Q, mask=present)
        dscores_QQ += dmixing_QQ * factors_QQ
        mixing_QQ = scores_QQ * factors_QQ
        dexponent_QQ = dmixing_QQ * mixing_QQ
        if EARLIER:
            mine_QQ = tl.where(i[:, None] > i[None, :], dexponent_QQ, 0.0)
            tl.store(d_early[0] + at + i, tl.sum(mine_QQ, 1), mask=inside)
            tl.store(d_early[1] + at + i, tl.sum(mine_QQ, 0), mask=inside)
        if LATER:
            mine_QQ = tl.where(i[:, None] < i[None, :], dexponent_QQ, 0.0)
            tl.store(d_late[0] + at + i, tl.sum(mine_QQ, 1), mask=inside)
            tl.store(d_late[1] + at + i, tl.sum(mine_QQ, 0), mask=inside)
        dx_QP = own_Q[:, None] * dy_QP
        dx_QP += tl.dot(tl.trans(mixing_QQ.to(dy_QP.dtype)), dy_QP, input_precision="tf32x3")
        if K > 1 and EARLIER:
            dx_QP += _through_state(early_state, chunk, head, i, n, p, inside, False, H, P, N, K, Q)
        if K > 1 and LATER:
            dx_QP += _through_state(late_state, chunk, head, i, n, p, inside, True, H, P, N, K, Q)
        at_QP = dx + row * dx_row + head * P + (i[:, None] * dx_row + p[None, :])
        tl.store(at_QP, dx_QP.to(dx.dtype.element_ty), mask=present[:, None] & (p < P)[None, :])
    part = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + chunk
    at_QQ = dscores + part * Q * Q + (i[:, None] * Q + i[None, :])
    tl.store(at_QQ, dscores_QQ, mask=inside[:, None] & inside[None, :])


@triton.jit
def _factor_gradient(
    v, v_row, U, weight, state_NP, dweight, chunk, head, row, i, n, p, inside, present, H, P: tl.constexpr, N: tl.constexpr,
    Q: tl.constexpr,
):  # fmt: skip
    """Return a head's part of the gradient of U, and store that of weight, for the products weight_i U_i . (state v_i)."""
    at = chunk * H + head
    v_QP = _matrix(v + row * v_row + head * P, i, p, v_row, present, p < P)
    weight_Q = tl.load(weight + at * Q + i, mask=inside, other=0.0)
    product_QN = tl.dot(v_QP, tl.trans(state_NP), input_precision="tf32x3")
    u_QN = _matrix(U + chunk * Q * N, i, n, N, inside, n < N)
    tl.store(dweight + at * Q + i, tl.sum(product_QN * u_QN, 1), mask=inside)
    return weight_Q[:, None] * product_QN


@triton.jit
def ssd_states_backward(
    x, dy, early, late, d_early, d_late,
    L: tl.constexpr, H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, K: tl.constexpr, Q: tl.constexpr,
    x_row: tl.constexpr, dy_row: tl.constexpr, EARLIER: tl.constexpr, LATER: tl.constexpr, HEADS: tl.constexpr,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    """Store the gradients of B, C, taken, weight and decay through the states; pairs of tokens add theirs to B and C elsewhere.

    `early` is B, C, taken, weight, states and dstates; `d_early` is dtaken, dweight, ddecay, dB and dC.
    """
    chunk, of_late = _way_of(tl.program_id(0).to(tl.int64), EARLIER, LATER)
    first = tl.program_id(1) * HEADS
    B, C, taken, weight, states, dstates = early
    dtaken, dweight, ddecay, dB, dC = d_early
    if of_late:
        B, C, taken, weight, states, dstates = late
        dtaken, dweight, ddecay, dB, dC = d_late
    i, row, inside, present = _tokens(chunk, K, L, Q, TOKENS)
    n, p = tl.arange(0, STATES), tl.arange(0, CHANNELS)
    dB_QN, dC_QN = tl.zeros((TOKENS, STATES), tl.float32), tl.zeros((TOKENS, STATES), tl.float32)
    for j in range(HEADS):
        head = first + j
        at = chunk * H + head
        # Both states are loaded twice, the second time from a cache: tiles kept until then would take registers and shared memory.
        both_NP = _state(states, chunk, head, n, p, not of_late, H, P, N, K).to(tl.float32)
        both_NP *= _state(dstates, chunk, head, n, p, of_late, H, P, N, K)
        tl.store(ddecay + at, tl.sum(tl.sum(both_NP, 1), 0))
        state_NP = _state(states, chunk, head, n, p, not of_late, H, P, N, K)
        dC_QN += _factor_gradient(dy, dy_row, C, taken, state_NP, dtaken, chunk, head, row, i, n, p, inside, present, H, P, N, Q)
        dstate_NP = _state(dstates, chunk, head, n, p, of_late, H, P, N, K)
        dB_QN += _factor_gradient(x, x_row, B, weight, dstate_NP, dweight, chunk, head, row, i, n, p, inside, present, H, P, N, Q)
    chunks = tl.num_programs(0) // 2 if EARLIER and LATER else tl.num_programs(0)
    part = tl.program_id(1).to(tl.int64) * chunks + chunk
    at_QN, inside_QN = part * Q * N + (i[:, None] * N + n[None, :]), inside[:, None] & (n < N)[None, :]
    tl.store(dB + at_QN, dB_QN, mask=inside_QN)
    tl.store(dC + at_QN, dC_QN, mask=inside_QN)
