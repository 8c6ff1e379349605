"""The Triton backend's kernels: scan_forward, scan_backward, conv_forward, conv_backward. triton.py launches them.

A program is one warp and a thread one channel with all its states: what a thread reads back it wrote itself, and nothing is
exchanged but for the gradients of B and C. A name's ending says its axes: e channels, n states, t time. Distances within a
batch row fit 32 bits. What stands in tuples stands in registers, step by step; all sums and states are float32.
"""

import triton
import triton.language as tl


@triton.jit
def _softplus(x):
    """max(x, 0) + log(1 + e), the logarithm true for small e, too (Kahan's quotient)."""
    e = tl.exp(-tl.abs(x))
    wide = 1.0 + e
    rest = wide - 1.0
    return tl.maximum(x, 0.0) + tl.where(rest == 0.0, e, e * (tl.log(wide) / tl.where(rest == 0.0, 1.0, rest)))


@triton.jit
def _sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def _row(i, L: tl.constexpr, REVERSE: tl.constexpr):
    """Where step i of a direction lies in its batch row."""
    return L - 1 - i if REVERSE else i


@triton.jit
def _weights(A, D, bias, e, n, E, N):
    """A / ln 2 as (states, channels), D and the bias as rows; zeros outside."""
    inside = e < E
    A_ne = tl.load(A + n[:, None] * E + e[None, :], mask=(n[:, None] < N) & inside[None, :], other=0.0)
    D_e = tl.load(D + e, mask=inside, other=0.0).to(tl.float32)
    return A_ne, D_e, tl.load(bias + e, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _advance(h, u, delta, B, C, u_row, delta_row, B_row, C_row, A, D, bias, row, e, n, E, N):
    """One step of all states of a row of channels: the new states and y."""
    inside, known = e < E, n < N
    u_e = tl.load(u + row * u_row + e, mask=inside, other=0.0).to(tl.float32)
    raw = tl.load(delta + row * delta_row + e, mask=inside, other=0.0).to(tl.float32)
    B_n = tl.load(B + row * B_row + n, mask=known, other=0.0).to(tl.float32)
    C_n = tl.load(C + row * C_row + n, mask=known, other=0.0).to(tl.float32)
    delta_e = _softplus(raw + bias)
    h = tl.exp2(delta_e[None, :] * A) * h + B_n[:, None] * (delta_e * u_e)[None, :]
    return h, tl.sum(h * C_n[:, None], axis=0) + D * u_e


@triton.jit
def _deliver(y, z, out, sums, z_row, row, e, E, late, TWO_WAY: tl.constexpr, GATED: tl.constexpr):
    """Writes y; of two directions the first to come leaves its part in `sums`, the `late` one completes it there."""
    inside = e < E
    if TWO_WAY:
        tl.debug_barrier()  # what the other direction wrote is there, in the middle since this step or the last one
        y += tl.load(sums + row * E + e, mask=inside & late, other=0.0)
        tl.store(sums + row * E + e, y, mask=inside)
        inside = inside & late
    if GATED:
        z_e = tl.load(z + row * z_row + e, mask=inside, other=0.0).to(tl.float32)
        y *= z_e * _sigmoid(z_e)
    tl.store(out + row * E + e, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _keep(h, starts, chunk, e, n, E, N):
    """The states at a chunk's beginning."""
    tl.store(starts + (chunk * N + n[:, None]) * E + e[None, :], h, mask=(n[:, None] < N) & (e[None, :] < E))


@triton.jit
def scan_forward(
    u0, delta0, A0, B0, C0, D0, bias0, u0_row, delta0_row, B0_row, C0_row,
    u1, delta1, A1, B1, C1, D1, bias1, u1_row, delta1_row, B1_row, C1_row,
    z, out, sums, starts0, starts1, z_row, E, L: tl.constexpr, N: tl.constexpr,
    REVERSE: tl.constexpr, TWO_WAY: tl.constexpr, GATED: tl.constexpr, KEEP: tl.constexpr,
    LANES: tl.constexpr, STATES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The first direction, reversed or not, and in a two-way scan the opposite one."""
    e, n = tl.program_id(0) * LANES + tl.arange(0, LANES), tl.arange(0, STATES)
    batch, chunks = tl.program_id(1).to(tl.int64), (L + CHUNK - 1) // CHUNK
    rows = batch * L  # the only wide number: within a batch row, distances fit 32 bits
    u0, delta0, B0, C0 = u0 + rows * u0_row, delta0 + rows * delta0_row, B0 + rows * B0_row, C0 + rows * C0_row
    u1, delta1, B1, C1 = u1 + rows * u1_row, delta1 + rows * delta1_row, B1 + rows * B1_row, C1 + rows * C1_row
    z, out, sums = z + rows * z_row, out + rows * E, sums + rows * E
    starts0, starts1 = starts0 + batch * chunks * N * E, starts1 + batch * chunks * N * E
    A0_ne, D0_e, bias0_e = _weights(A0, D0, bias0, e, n, E, N)
    A1_ne, D1_e, bias1_e = _weights(A1, D1, bias1, e, n, E, N)
    h0 = tl.zeros([STATES, LANES], tl.float32)
    h1 = tl.zeros([STATES, LANES], tl.float32)
    for i in range(L):
        row0, row1 = _row(i, L, REVERSE), _row(i, L, not REVERSE)
        if KEEP:
            if i % CHUNK == 0:
                _keep(h0, starts0, i // CHUNK, e, n, E, N)
                if TWO_WAY:
                    _keep(h1, starts1, i // CHUNK, e, n, E, N)
        h0, y0 = _advance(
            h0, u0, delta0, B0, C0, u0_row, delta0_row, B0_row, C0_row, A0_ne, D0_e, bias0_e, row0, e, n, E, N
        )
        _deliver(y0, z, out, sums, z_row, row0, e, E, 2 * i > L - 1, TWO_WAY, GATED)
        if TWO_WAY:
            h1, y1 = _advance(
                h1, u1, delta1, B1, C1, u1_row, delta1_row, B1_row, C1_row, A1_ne, D1_e, bias1_e, row1, e, n, E, N
            )
            _deliver(y1, z, out, sums, z_row, row1, e, E, 2 * i >= L - 1, TWO_WAY, GATED)


@triton.jit
def _gate_gradient(dy_e, z, sums, dz, z_row, row, e, inside, E, WRITE: tl.constexpr):
    """The gradient of what the gate takes; writes z's."""
    z_e = tl.load(z + row * z_row + e, mask=inside, other=0.0).to(tl.float32)
    gate = _sigmoid(z_e)
    if WRITE:
        y_e = tl.load(sums + row * E + e, mask=inside, other=0.0)
        dz_e = dy_e * y_e * gate * (1.0 + z_e * (1.0 - gate))
        tl.store(dz + row * E + e, dz_e.to(dz.dtype.element_ty), mask=inside)
    return dy_e * z_e * gate


@triton.jit
def _take_chunk(
    u, delta, u_row, delta_row, bias_e, z, dy, sums, dz, z_row, dy_row, first, e, E, L: tl.constexpr,
    REVERSE: tl.constexpr, GATED: tl.constexpr, WRITE_DZ: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """For each step delta, delta u and y's gradient before the gate; past the end, steps of length zero."""
    deltas, delta_us, dys = (), (), ()
    for j in tl.static_range(CHUNK):
        row, there = _row(first + j, L, REVERSE), (e < E) & (first + j < L)
        raw_e = tl.load(delta + row * delta_row + e, mask=there, other=0.0).to(tl.float32) + bias_e
        delta_e = tl.where(there, _softplus(raw_e), 0.0)
        u_e = tl.load(u + row * u_row + e, mask=there, other=0.0).to(tl.float32)
        dy_e = tl.load(dy + row * dy_row + e, mask=there, other=0.0).to(tl.float32)
        if GATED:
            dy_e = _gate_gradient(dy_e, z, sums, dz, z_row, row, e, there, E, WRITE_DZ)
        deltas, delta_us, dys = deltas + (delta_e,), delta_us + (delta_e * u_e,), dys + (dy_e,)
    return deltas, delta_us, dys


@triton.jit
def _replay(h_e, A_e, B, B_row, deltas, delta_us, first, n, L: tl.constexpr, REVERSE: tl.constexpr):
    """One state through a chunk once more: its decays, and what it was before each step and after the last."""
    decays, states = (), (h_e,)
    for j in tl.static_range(len(deltas)):
        row = _row(first + j, L, REVERSE)
        B_t = tl.load(B + row * B_row + n, mask=first + j < L, other=0.0).to(tl.float32)
        decay_e = tl.exp2(deltas[j] * A_e)
        h_e = decay_e * h_e + delta_us[j] * B_t
        decays, states = decays + (decay_e,), states + (h_e,)
    return decays, states


@triton.jit
def _retreat(
    carry_e, A_e, B, C, B_row, C_row, dB, dC, deltas, delta_us, dys, decays, states, d_delta_us, d_deltas,
    first, n, N, L: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """The same state's way back: what it sends on, its part of A's gradient, and the sums with its part added."""
    dA_e, sums_delta_u, sums_delta = tl.zeros_like(carry_e), (), ()
    for j in tl.static_range(len(deltas) - 1, -1, -1):
        row, there = _row(first + j, L, REVERSE), first + j < L
        B_t = tl.load(B + row * B_row + n, mask=there, other=0.0).to(tl.float32)
        C_t = tl.load(C + row * C_row + n, mask=there, other=0.0).to(tl.float32)
        dh_e = carry_e + dys[j] * C_t
        tl.store(dC + row * N + n, tl.sum(dys[j] * states[j + 1], axis=0), mask=there)
        tl.store(dB + row * N + n, tl.sum(dh_e * delta_us[j], axis=0), mask=there)
        carry_e = dh_e * decays[j]
        d_exponent_e = carry_e * states[j]
        sums_delta_u = (d_delta_us[j] + dh_e * B_t,) + sums_delta_u
        sums_delta = (d_deltas[j] + d_exponent_e * A_e,) + sums_delta
        dA_e += d_exponent_e * deltas[j]
    return carry_e, dA_e, sums_delta_u, sums_delta


@triton.jit
def _give_chunk(
    u, delta, u_row, delta_row, bias_e, D_e, du, ddelta, deltas, dys, d_delta_us, d_deltas, first, e, E,
    L: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Writes the gradients of u and delta; gives the chunk's parts of D's and the bias's."""
    dD_e, dbias_e = tl.zeros_like(D_e), tl.zeros_like(D_e)
    for j in tl.static_range(len(deltas)):
        row, there = _row(first + j, L, REVERSE), (e < E) & (first + j < L)
        raw_e = tl.load(delta + row * delta_row + e, mask=there, other=0.0).to(tl.float32) + bias_e
        u_e = tl.load(u + row * u_row + e, mask=there, other=0.0).to(tl.float32)
        d_delta_e = d_deltas[j] * 0.6931471805599453 + d_delta_us[j] * u_e  # A came divided by ln 2
        d_raw_e = tl.where(there, d_delta_e * _sigmoid(raw_e), 0.0)
        du_e = d_delta_us[j] * deltas[j] + D_e * dys[j]
        tl.store(ddelta + row * E + e, d_raw_e.to(ddelta.dtype.element_ty), mask=there)
        tl.store(du + row * E + e, du_e.to(du.dtype.element_ty), mask=there)
        dD_e += dys[j] * u_e
        dbias_e += d_raw_e
    return dD_e, dbias_e


@triton.jit
def scan_backward(
    u, delta, A, B, C, D, bias, u_row, delta_row, B_row, C_row,
    z, dy, sums, starts, z_row, dy_row,
    du, ddelta, dz, dA, dB, dC, dD, dbias, E, L: tl.constexpr, N: tl.constexpr,
    REVERSE: tl.constexpr, GATED: tl.constexpr, WRITE_DZ: tl.constexpr,
    LANES: tl.constexpr, STATES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One direction's gradients, chunk by chunk from the last one."""
    e, n_all = tl.program_id(0) * LANES + tl.arange(0, LANES), tl.arange(0, STATES)
    inside, batch = e < E, tl.program_id(1).to(tl.int64)
    D_e = tl.load(D + e, mask=inside, other=0.0).to(tl.float32)
    bias_e = tl.load(bias + e, mask=inside, other=0.0).to(tl.float32)
    chunks: tl.constexpr = (L + CHUNK - 1) // CHUNK
    rows = batch * L  # the only wide number: within a batch row, distances fit 32 bits
    u, delta, B, C = u + rows * u_row, delta + rows * delta_row, B + rows * B_row, C + rows * C_row
    z, dy, sums, starts = z + rows * z_row, dy + rows * dy_row, sums + rows * E, starts + batch * chunks * N * E
    du, ddelta, dz = du + rows * E, ddelta + rows * E, dz + rows * E
    part = (tl.program_id(0) * tl.num_programs(1).to(tl.int64) * L + rows) * N
    dB, dC = dB + part, dC + part
    carry_ne = tl.zeros([STATES, LANES], tl.float32)  # what later steps send to the states
    dA_ne = tl.zeros([STATES, LANES], tl.float32)
    dD_e = tl.zeros([LANES], tl.float32)
    dbias_e = tl.zeros([LANES], tl.float32)
    for k in range(chunks):
        chunk = chunks - 1 - k
        first = chunk * CHUNK
        deltas, delta_us, dys = _take_chunk(
            u, delta, u_row, delta_row, bias_e, z, dy, sums, dz, z_row, dy_row, first, e, E, L,
            REVERSE, GATED, WRITE_DZ, CHUNK,
        )  # fmt: skip
        d_delta_us, d_deltas = (), ()
        for _ in tl.static_range(CHUNK):
            d_delta_us += (tl.zeros([LANES], tl.float32),)
            d_deltas += (tl.zeros([LANES], tl.float32),)
        for n in range(N):
            chosen = n_all[:, None] == n
            A_e = tl.load(A + n * E + e, mask=inside, other=0.0)
            h_e = tl.load(starts + (chunk * N + n) * E + e, mask=inside, other=0.0)
            decays, states = _replay(h_e, A_e, B, B_row, deltas, delta_us, first, n, L, REVERSE)
            carry_e, dA_e, d_delta_us, d_deltas = _retreat(
                tl.sum(tl.where(chosen, carry_ne, 0.0), axis=0), A_e, B, C, B_row, C_row, dB, dC,
                deltas, delta_us, dys, decays, states, d_delta_us, d_deltas, first, n, N, L, REVERSE,
            )  # fmt: skip
            carry_ne = tl.where(chosen, carry_e[None, :], carry_ne)
            dA_ne += tl.where(chosen, dA_e[None, :], 0.0)
        more_D_e, more_bias_e = _give_chunk(
            u, delta, u_row, delta_row, bias_e, D_e, du, ddelta, deltas, dys, d_delta_us, d_deltas, first, e, E,
            L, REVERSE,
        )  # fmt: skip
        dD_e += more_D_e
        dbias_e += more_bias_e
    known = (n_all[:, None] < N) & inside[None, :]
    tl.store(dA + (batch * N + n_all[:, None]) * E + e[None, :], dA_ne, mask=known)
    tl.store(dD + batch * E + e, dD_e, mask=inside)
    tl.store(dbias + batch * E + e, dbias_e, mask=inside)


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
    y = total * _sigmoid(total)
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
        gate = _sigmoid(total)
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
