"""The Triton backend's convolution: the kernels conv_forward and conv_backward, which triton.py launches.

A program is a tile of rows, one a step, and channels; it loads the tile once for each tap. TAPS + 1 vectors over the
channels, in tuples, are a direction's weight and bias, or their gradients.
"""

import triton
import triton.language as tl

from dis_scale.scan.triton_scan import sigmoid


@triton.jit
def _tile(x, x_row, batch, t, e, L, E):
    """(rows, channels) in float32, zeros outside the sequence and the width."""
    there = (t[:, None] >= 0) & (t[:, None] < L) & (e[None, :] < E)
    return tl.load(x + (batch * L + t[:, None]) * x_row + e[None, :], mask=there, other=0.0).to(tl.float32)


@triton.jit
def _taps(weight, bias, e, E, TAPS: tl.constexpr):
    """A weight and a bias, channel by channel, as a tuple of TAPS + 1 rows."""
    taps = ()
    for k in tl.static_range(TAPS):
        taps += (tl.load(weight + e * TAPS + k, mask=e < E, other=0.0).to(tl.float32),)
    return taps + (tl.load(bias + e, mask=e < E, other=0.0).to(tl.float32),)


@triton.jit
def _convolved(xs, taps, shift: tl.constexpr, SIGN: tl.constexpr, TAPS: tl.constexpr):
    """Before SiLU, `shift` steps on. `xs` are tiles of x from TAPS - 1 steps back to as many on; SIGN 1 looks back."""
    total = taps[TAPS][None, :] + tl.zeros(xs[0].shape, tl.float32)
    for k in tl.static_range(TAPS):
        total += taps[k][None, :] * xs[TAPS - 1 + shift - SIGN * (TAPS - 1 - k)]
    return total


@triton.jit
def _window(x, x_row, batch, t, e, L, E, TAPS: tl.constexpr):
    xs = ()
    for i in tl.static_range(2 * TAPS - 1):
        xs += (_tile(x, x_row, batch, t + (i - TAPS + 1), e, L, E),)
    return xs


@triton.jit
def _silu_rows(total, out, batch, t, e, L, E):
    there = (t[:, None] < L) & (e[None, :] < E)
    y = total * sigmoid(total)
    tl.store(out + (batch * L + t[:, None]) * E + e[None, :], y.to(out.dtype.element_ty), mask=there)


@triton.jit
def conv_forward(
    x, weight0, bias0, weight1, bias1, out0, out1, x_row, E, L: tl.constexpr,
    BACK: tl.constexpr, ON: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """Direction 0 looks back, direction 1 looks on; either may be off."""
    e, t = tl.program_id(0) * LANES + tl.arange(0, LANES), tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    batch = tl.program_id(1).to(tl.int64)
    xs = _window(x, x_row, batch, t, e, L, E, TAPS)
    if BACK:
        _silu_rows(_convolved(xs, _taps(weight0, bias0, e, E, TAPS), 0, 1, TAPS), out0, batch, t, e, L, E)
    if ON:
        _silu_rows(_convolved(xs, _taps(weight1, bias1, e, E, TAPS), 0, -1, TAPS), out1, batch, t, e, L, E)


@triton.jit
def _conv_gradients(
    dx, sums, xs, taps, dy, dy_row, batch, t, e, L, E,
    SIGN: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """Adds one direction's part to dx, and to the sums over time for the weight and the bias."""
    for s in tl.static_range(TAPS):  # x at t is heard at t + s, there through tap TAPS - 1 - s
        total = _convolved(xs, taps, SIGN * s, SIGN, TAPS)
        gate = sigmoid(total)
        g = _tile(dy, dy_row, batch, t + SIGN * s, e, L, E) * gate * (1.0 + total * (1.0 - gate))
        dx += g * taps[TAPS - 1 - s][None, :]
        if s == 0:
            here = g
    new = ()
    for k in tl.static_range(TAPS):
        new += (sums[k] + tl.sum(here * xs[TAPS - 1 - SIGN * (TAPS - 1 - k)], axis=0),)
    return dx, new + (sums[TAPS] + tl.sum(here, axis=0),)


@triton.jit
def _give_sums(sums, to, batch, e, E, TAPS: tl.constexpr):
    for k in tl.static_range(TAPS + 1):
        tl.store(to + (batch * E + e) * (TAPS + 1) + k, sums[k], mask=e < E)


@triton.jit
def conv_backward(
    x, weight0, bias0, weight1, bias1, dy0, dy1, dx, sums0, sums1, x_row, dy0_row, dy1_row, E, L: tl.constexpr,
    BACK: tl.constexpr, ON: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """All of a batch row's time; what comes before SiLU is computed again where a gradient asks for it."""
    e, batch = tl.program_id(0) * LANES + tl.arange(0, LANES), tl.program_id(1).to(tl.int64)
    taps0, taps1 = _taps(weight0, bias0, e, E, TAPS), _taps(weight1, bias1, e, E, TAPS)
    totals0, totals1 = (), ()
    for _ in tl.static_range(TAPS + 1):
        totals0 += (tl.zeros([LANES], tl.float32),)
        totals1 += (tl.zeros([LANES], tl.float32),)
    for first in range(0, L, ROWS):
        t = first + tl.arange(0, ROWS)
        xs = _window(x, x_row, batch, t, e, L, E, TAPS)
        dx_te = tl.zeros([ROWS, LANES], tl.float32)
        if BACK:
            dx_te, totals0 = _conv_gradients(dx_te, totals0, xs, taps0, dy0, dy0_row, batch, t, e, L, E, 1, TAPS)
        if ON:
            dx_te, totals1 = _conv_gradients(dx_te, totals1, xs, taps1, dy1, dy1_row, batch, t, e, L, E, -1, TAPS)
        there = (t[:, None] < L) & (e[None, :] < E)
        tl.store(dx + (batch * L + t[:, None]) * E + e[None, :], dx_te.to(dx.dtype.element_ty), mask=there)
    if BACK:
        _give_sums(totals0, sums0, batch, e, E, TAPS)
    if ON:
        _give_sums(totals1, sums1, batch, e, E, TAPS)
