"""The Triton backend's convolution: the kernels conv_forward and conv_backward, which triton.py launches.

A program computes a tile of ROWS steps and LANES channels, and loads the tile once for each tap. A direction's weight and
bias, and their gradients, are tuples of TAPS + 1 vectors over the channels.

    FORWARD     compute direction 0, which reads earlier steps (causal): weight0, bias0, out0, dy0, sums0
    BACKWARD    compute direction 1, which reads later steps: weight1, bias1, out1, dy1, sums1
    SIGN        1 for the forward direction, -1 for the backward direction
    sums        gradients of weight and bias, (batch, E, TAPS + 1), float32
    ..._row     distance between two rows of that tensor, in elements
"""

import triton
import triton.language as tl

from dis_scale.scan.triton_scan import sigmoid


@triton.jit
def _load_tile(x, x_row, batch, t, e, L, E):
    """Load (rows, channels) in float32; zeros outside the sequence and the width."""
    valid = (t[:, None] >= 0) & (t[:, None] < L) & (e[None, :] < E)
    return tl.load(x + (batch * L + t[:, None]) * x_row + e[None, :], mask=valid, other=0.0).to(tl.float32)


@triton.jit
def _load_taps(weight, bias, e, E, TAPS: tl.constexpr):
    """Load a weight and a bias as a tuple of TAPS + 1 vectors over the channels."""
    taps = ()
    for k in tl.static_range(TAPS):
        taps += (tl.load(weight + e * TAPS + k, mask=e < E, other=0.0).to(tl.float32),)
    return taps + (tl.load(bias + e, mask=e < E, other=0.0).to(tl.float32),)


@triton.jit
def _convolved(xs, taps, shift: tl.constexpr, SIGN: tl.constexpr, TAPS: tl.constexpr):
    """The convolution before SiLU, `shift` steps later. `xs`: tiles of x from TAPS - 1 steps earlier to TAPS - 1 later."""
    total = taps[TAPS][None, :] + tl.zeros(xs[0].shape, tl.float32)
    for k in tl.static_range(TAPS):
        total += taps[k][None, :] * xs[TAPS - 1 + shift - SIGN * (TAPS - 1 - k)]
    return total


@triton.jit
def _load_window(x, x_row, batch, t, e, L, E, TAPS: tl.constexpr):
    xs = ()
    for i in tl.static_range(2 * TAPS - 1):
        xs += (_load_tile(x, x_row, batch, t + (i - TAPS + 1), e, L, E),)
    return xs


@triton.jit
def _store_silu(total, out, batch, t, e, L, E):
    valid = (t[:, None] < L) & (e[None, :] < E)
    y = total * sigmoid(total)
    tl.store(out + (batch * L + t[:, None]) * E + e[None, :], y.to(out.dtype.element_ty), mask=valid)


@triton.jit
def conv_forward(
    x, weight0, bias0, weight1, bias1, out0, out1, x_row, E, L: tl.constexpr,
    FORWARD: tl.constexpr, BACKWARD: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """Convolution and SiLU of one tile, in one or both directions."""
    e, t = tl.program_id(0) * LANES + tl.arange(0, LANES), tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    batch = tl.program_id(1).to(tl.int64)
    xs = _load_window(x, x_row, batch, t, e, L, E, TAPS)
    if FORWARD:
        _store_silu(_convolved(xs, _load_taps(weight0, bias0, e, E, TAPS), 0, 1, TAPS), out0, batch, t, e, L, E)
    if BACKWARD:
        _store_silu(_convolved(xs, _load_taps(weight1, bias1, e, E, TAPS), 0, -1, TAPS), out1, batch, t, e, L, E)


@triton.jit
def _conv_gradients(
    dx, sums, xs, taps, dy, dy_row, batch, t, e, L, E,
    SIGN: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """Add one direction's part to dx, and to the sums over time for the weight and the bias."""
    for s in tl.static_range(TAPS):  # x at t contributes to y at t + s, by tap TAPS - 1 - s
        total = _convolved(xs, taps, SIGN * s, SIGN, TAPS)
        gate = sigmoid(total)
        g = _load_tile(dy, dy_row, batch, t + SIGN * s, e, L, E) * gate * (1.0 + total * (1.0 - gate))
        dx += g * taps[TAPS - 1 - s][None, :]
        if s == 0:
            here = g
    new = ()
    for k in tl.static_range(TAPS):
        new += (sums[k] + tl.sum(here * xs[TAPS - 1 - SIGN * (TAPS - 1 - k)], axis=0),)
    return dx, new + (sums[TAPS] + tl.sum(here, axis=0),)


@triton.jit
def _store_sums(sums, out, batch, e, E, TAPS: tl.constexpr):
    for k in tl.static_range(TAPS + 1):
        tl.store(out + (batch * E + e) * (TAPS + 1) + k, sums[k], mask=e < E)


@triton.jit
def conv_backward(
    x, weight0, bias0, weight1, bias1, dy0, dy1, dx, sums0, sums1, x_row, dy0_row, dy1_row, E, L: tl.constexpr,
    FORWARD: tl.constexpr, BACKWARD: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """Gradients of a batch row over its whole time. The values before SiLU are computed again."""
    e, batch = tl.program_id(0) * LANES + tl.arange(0, LANES), tl.program_id(1).to(tl.int64)
    taps0, taps1 = _load_taps(weight0, bias0, e, E, TAPS), _load_taps(weight1, bias1, e, E, TAPS)
    totals0, totals1 = (), ()
    for _ in tl.static_range(TAPS + 1):
        totals0 += (tl.zeros([LANES], tl.float32),)
        totals1 += (tl.zeros([LANES], tl.float32),)
    for first in range(0, L, ROWS):
        t = first + tl.arange(0, ROWS)
        xs = _load_window(x, x_row, batch, t, e, L, E, TAPS)
        dx_te = tl.zeros([ROWS, LANES], tl.float32)
        if FORWARD:
            dx_te, totals0 = _conv_gradients(dx_te, totals0, xs, taps0, dy0, dy0_row, batch, t, e, L, E, 1, TAPS)
        if BACKWARD:
            dx_te, totals1 = _conv_gradients(dx_te, totals1, xs, taps1, dy1, dy1_row, batch, t, e, L, E, -1, TAPS)
        valid = (t[:, None] < L) & (e[None, :] < E)
        tl.store(dx + (batch * L + t[:, None]) * E + e[None, :], dx_te.to(dx.dtype.element_ty), mask=valid)
    if FORWARD:
        _store_sums(totals0, sums0, batch, e, E, TAPS)
    if BACKWARD:
        _store_sums(totals1, sums1, batch, e, E, TAPS)
