"""The Triton backend's convolution: the kernels conv_forward and conv_backward, which triton.py launches.

A thread computes one channel and reads only its own values: threads exchange no data. It computes a group of ROWS steps at a time.
Values in tuples are in registers, one per step. A step's output needs the HALO steps before it or after it. So a group loads
ROWS + 2 HALO steps of x. A tap is one number of a channel's weight. `taps` are the taps of a weight, and last its bias.

Names end in their axes: e channels, t time. Sizes and flags, all compile-time constants:

    E, L            channels, time
    x_row, ...      distance between two rows of that tensor, in elements
    w_channel, ...  distance between two channels of a weight and of its gradient, and between two taps
    FORWARD         compute direction 0, which reads earlier steps (causal): weights[0], biases[0], outs[0], dys[0], sums[0]
    BACKWARD        compute direction 1, which reads later steps: weights[1], ...
    SIGN            1 for the forward direction, -1 for the backward direction
    AHEAD           steps by which the forward direction's outputs come earlier: it reads as many later steps; 0 with BACKWARD
    LANES           channels of a program
    ROWS            steps of a group
    SEGMENT         steps of a program of conv_backward, a multiple of ROWS
    TAPS, HALO      taps of a weight; TAPS - 1

Pointers, (batch, time, channels) unless given otherwise. A kernel takes the pointers of both directions in tuples.

    x, dx           the input and its gradient
    weight, bias    (E, TAPS) and (E)
    out, dy         the output after SiLU, and its gradient
    sums            gradients of weight and bias, one part per batch row and segment: (parts, TAPS + 1, E), float32
"""

import triton
import triton.language as tl

from dis_scale.scan.triton_tiles import sigmoid


@triton.jit
def _load_taps(weight, bias, e, inside, w_channel: tl.constexpr, w_tap: tl.constexpr, TAPS: tl.constexpr):
    """Load a weight and its bias as TAPS + 1 vectors over the channels."""
    taps = ()
    for k in tl.static_range(TAPS):
        taps += (tl.load(weight + e * w_channel + k * w_tap, mask=inside, other=0.0).to(tl.float32),)
    return taps + (tl.load(bias + e, mask=inside, other=0.0).to(tl.float32),)


@triton.jit
def _load_steps(x, row: tl.constexpr, first, e, inside, L: tl.constexpr, BEGIN: tl.constexpr, END: tl.constexpr):
    """Load the steps from first + BEGIN to first + END - 1; zeros outside of the sequence."""
    x_t = ()
    for j in tl.static_range(BEGIN, END):
        valid = inside & (first + j >= 0) & (first + j < L)
        x_t += (tl.load(x + (first * row + e) + j * row, mask=valid, other=0.0).to(tl.float32),)
    return x_t


@triton.jit
def _store_step(out, row: tl.constexpr, first, j, e, value_e, inside, L: tl.constexpr):
    tl.store(out + (first * row + e) + j * row, value_e.to(out.dtype.element_ty), mask=inside & (first + j < L))


@triton.jit
def _convolved(x_t, taps, i, SIGN: tl.constexpr):
    """Compute the convolution, before SiLU, at the step of x_t[i]."""
    HALO: tl.constexpr = len(taps) - 2
    total_e = taps[HALO + 1]
    for k in tl.static_range(HALO + 1):
        total_e += taps[k] * x_t[i - SIGN * (HALO - k)]
    return total_e


@triton.jit
def _store_outputs(x_t, taps, out, first, e, inside, E: tl.constexpr, L: tl.constexpr, SIGN: tl.constexpr, ROWS: tl.constexpr):
    """Store one direction's convolution after SiLU, at a group of steps."""
    for j in tl.static_range(ROWS):
        total_e = _convolved(x_t, taps, j + len(taps) - 2, SIGN)
        _store_step(out, E, first, j, e, total_e * sigmoid(total_e), inside, L)


@triton.jit
def conv_forward(
    x, weights, biases, outs, x_row: tl.constexpr, w_channel: tl.constexpr, w_tap: tl.constexpr, E: tl.constexpr, L: tl.constexpr,
    FORWARD: tl.constexpr, BACKWARD: tl.constexpr, AHEAD: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr,
    TAPS: tl.constexpr,
):  # fmt: skip
    """Compute convolution and SiLU at one group of steps, in one direction or in both."""
    e, rows = tl.program_id(0) * LANES + tl.arange(0, LANES), tl.program_id(1).to(tl.int64) * L
    inside, first = e < E, tl.program_id(2) * ROWS
    taps0 = _load_taps(weights[0], biases[0], e, inside, w_channel, w_tap, TAPS)
    taps1 = _load_taps(
        weights[1], biases[1], e, inside, w_channel, w_tap, TAPS
    )  # loaded before the first store: a later load would wait for that store
    x_t = _load_steps(x + rows * x_row, x_row, first + AHEAD, e, inside, L, 1 - TAPS, ROWS + TAPS - 1)
    if FORWARD:
        _store_outputs(x_t, taps0, outs[0] + rows * E, first, e, inside, E, L, 1, ROWS)
    if BACKWARD:
        _store_outputs(x_t, taps1, outs[1] + rows * E, first, e, inside, E, L, -1, ROWS)


@triton.jit
def _add_gradients(
    dx_t, sums, x_t, taps, dy, dy_row: tl.constexpr, first, e, inside,
    L: tl.constexpr, SIGN: tl.constexpr, AHEAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Add one direction's part to dx, and to the sums over time for the weight and the bias. Return both.

    The gradient of the output at step t is row t - AHEAD of dy.
    """
    HALO: tl.constexpr = len(taps) - 2
    BEGIN: tl.constexpr = 0 if SIGN == 1 else -HALO  # a group's dx needs the gradients of HALO more outputs
    dy_t = _load_steps(dy, dy_row, first - AHEAD, e, inside, L, BEGIN, BEGIN + ROWS + HALO)
    g_t = ()  # gradients of the values before SiLU
    for i in tl.static_range(ROWS + HALO):
        total_e = _convolved(x_t, taps, i + BEGIN + HALO, SIGN)
        gate_e = sigmoid(total_e)
        g_t += (dy_t[i] * gate_e * (1.0 + total_e * (1.0 - gate_e)),)
    added, new = (), ()
    for j in tl.static_range(ROWS):
        dx_e = dx_t[j]
        for s in tl.static_range(HALO + 1):  # x contributes to y SIGN * s steps later, by tap HALO - s
            dx_e += g_t[j - BEGIN + SIGN * s] * taps[HALO - s]
        added += (dx_e,)
    for k in tl.static_range(HALO + 2):
        sum_e = sums[k]
        for j in tl.static_range(ROWS):
            sum_e += g_t[j - BEGIN] * (x_t[j + HALO - SIGN * (HALO - k)] if k <= HALO else 1.0)
        new += (sum_e,)
    return added, new


@triton.jit
def _zeros(e, COUNT: tl.constexpr):
    zeros = ()
    for _ in tl.static_range(COUNT):
        zeros += (tl.zeros(e.shape, tl.float32),)
    return zeros


@triton.jit
def _store_sums(sums, out, part, e, inside, E: tl.constexpr):
    for k in tl.static_range(len(sums)):
        tl.store(out + (part * len(sums) + k) * E + e, sums[k], mask=inside)


@triton.jit
def conv_backward(
    x, weights, biases, dys, dx, sums, x_row: tl.constexpr, w_channel: tl.constexpr, w_tap: tl.constexpr,
    dy0_row: tl.constexpr, dy1_row: tl.constexpr, dx_row: tl.constexpr,
    E: tl.constexpr, L: tl.constexpr, FORWARD: tl.constexpr, BACKWARD: tl.constexpr, AHEAD: tl.constexpr,
    LANES: tl.constexpr, ROWS: tl.constexpr, SEGMENT: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of one segment of a batch row. The values before SiLU are computed again."""
    e, batch = tl.program_id(0) * LANES + tl.arange(0, LANES), tl.program_id(1).to(tl.int64)
    inside, rows, first = e < E, batch * L, tl.program_id(2) * SEGMENT
    end = min(first + SEGMENT, L + AHEAD)  # the last AHEAD outputs belong to steps after the sequence
    part = batch * tl.num_programs(2) + tl.program_id(2)
    taps0 = _load_taps(weights[0], biases[0], e, inside, w_channel, w_tap, TAPS)
    taps1 = _load_taps(weights[1], biases[1], e, inside, w_channel, w_tap, TAPS)
    sums0, sums1 = _zeros(e, TAPS + 1), _zeros(e, TAPS + 1)
    while first < end:  # the interpreter's `range` does not accept a tensor
        x_t = _load_steps(x + rows * x_row, x_row, first, e, inside, L, 1 - TAPS, ROWS + TAPS - 1)
        dx_t = _zeros(e, ROWS)
        if FORWARD:
            dy = dys[0] + rows * dy0_row
            dx_t, sums0 = _add_gradients(dx_t, sums0, x_t, taps0, dy, dy0_row, first, e, inside, L, 1, AHEAD, ROWS)
        if BACKWARD:
            dy = dys[1] + rows * dy1_row
            dx_t, sums1 = _add_gradients(dx_t, sums1, x_t, taps1, dy, dy1_row, first, e, inside, L, -1, 0, ROWS)
        for j in tl.static_range(ROWS):
            _store_step(dx + rows * dx_row, dx_row, first, j, e, dx_t[j], inside, L)
        first += ROWS
    if FORWARD:
        _store_sums(sums0, sums[0], part, e, inside, E)
    if BACKWARD:
        _store_sums(sums1, sums[1], part, e, inside, E)
