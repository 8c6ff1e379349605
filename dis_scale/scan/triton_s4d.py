"""S4D's kernel on an NVIDIA GPU: s4d_forward and s4d_backward, which s4d.py launches. models/s4d.py has the definition.

A tap is K_l = 2 Re sum_m w_m exp(l a_m), with a = dt A and w = C B (exp(a) - 1) / A. A program computes a tile of a channel's taps,
l = i + j, mode by mode: exp(l a) is a product of a power for the row and one for the column, so that few exponentials, sines and
cosines are computed, and nothing of size (channels, modes, taps) is stored. The backward pass sums g_l exp(l a) and
l g_l exp(l a) over the taps of a channel, and applies the chain rule to each parameter, of which dt and -Re A are given as their
exponentials: an approximate one would change every tap. All is float32.

Complex numbers are pairs of real ones: x_r and x_i. Axes: H channels, M modes, L taps.
"""

import triton
import triton.language as tl


@triton.jit
def _mul(a_r, a_i, b_r, b_i):
    return a_r * b_r - a_i * b_i, a_r * b_i + a_i * b_r


@triton.jit
def _expm1(x):
    """exp(x) - 1 for x <= 0, by its series where the difference would cancel."""
    series = 1.0 + x / 7.0 * (1.0 + x / 8.0)
    series = 1.0 + x / 5.0 * (1.0 + x / 6.0 * series)
    series = x * (1.0 + x / 2.0 * (1.0 + x / 3.0 * (1.0 + x / 4.0 * series)))
    return tl.where(x > -0.5, series, tl.exp2(x * 1.4426950408889634) - 1.0)


@triton.jit
def _sin_cos(x):
    """Sine and cosine, by Cephes' polynomials on -pi/4 .. pi/4 (Moshier, sinf.c)."""
    quarter = tl.floor(x * 0.6366197723675814 + 0.5)
    r = x - quarter * 1.5703125  # pi / 2 in three parts, of which the first two have few bits
    r = (r - quarter * 4.837512969970703e-4) - quarter * 7.549789948768648e-8
    q = r * r
    sine = r + r * q * (-1.6666654611e-1 + q * (8.3321608736e-3 - q * 1.9515295891e-4))
    cosine = 1.0 - 0.5 * q + q * q * (4.166664568298827e-2 + q * (-1.388731625493765e-3 + q * 2.443315711809948e-5))
    n = quarter.to(tl.int32) & 3
    swapped = (n & 1) == 1
    s, c = tl.where(swapped, cosine, sine), tl.where(swapped, sine, cosine)
    return tl.where(n >= 2, -s, s), tl.where((n == 1) | (n == 2), -c, c)


@triton.jit
def _power(a_r, a_i, tap):
    """exp(tap a)."""
    size = tl.exp2(tap * a_r * 1.4426950408889634)
    sine, cosine = _sin_cos(tap * a_i)
    return size * cosine, size * sine


@triton.jit
def _load_pair(x, at):
    return tl.load(x + 2 * at), tl.load(x + 2 * at + 1)


@triton.jit
def _store_pair(x, at, x_r, x_i):
    tl.store(x + 2 * at, x_r)
    tl.store(x + 2 * at + 1, x_i)


@triton.jit
def _discrete(dts, neg_re, im, h, at):
    """dt, A, a = dt A, exp(a), and F = (exp(a) - 1) / A of a mode, by the zero-order hold."""
    dt = tl.load(dts + h)
    A_r, A_i = -tl.load(neg_re + at), tl.load(im + at)
    a_r, a_i = dt * A_r, dt * A_i
    sine, cosine = _sin_cos(a_i)
    half_sine, _ = _sin_cos(0.5 * a_i)
    size = tl.exp(a_r)
    E_r, E_i = _expm1(a_r) * cosine - 2.0 * half_sine * half_sine, size * sine
    square = A_r * A_r + A_i * A_i
    F_r, F_i = _mul(E_r, E_i, A_r / square, -A_i / square)
    return dt, A_r, A_i, a_r, a_i, size * cosine, size * sine, F_r, F_i


@triton.jit
def s4d_forward(dts, neg_re, im, B, C, K, L: tl.constexpr, M: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Compute a tile of taps (axis 1) of a channel (axis 0)."""
    h = tl.program_id(0)
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)) * COLUMNS
    column = tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for m in range(M):
        at = h * M + m
        _, _, _, a_r, a_i, _, _, F_r, F_i = _discrete(dts, neg_re, im, h, at)
        B_r, B_i = _load_pair(B, at)
        C_r, C_i = _load_pair(C, at)
        dB_r, dB_i = _mul(B_r, B_i, F_r, F_i)
        w_r, w_i = _mul(C_r, C_i, dB_r, dB_i)
        p_r, p_i = _power(a_r, a_i, row.to(tl.float32))
        p_r, p_i = _mul(p_r, p_i, w_r, w_i)
        q_r, q_i = _power(a_r, a_i, column.to(tl.float32))
        total += p_r[:, None] * q_r[None, :] - p_i[:, None] * q_i[None, :]
    tap = row[:, None] + column[None, :]
    tl.store(K + h * L + tap, 2.0 * total, mask=tap < L)


@triton.jit
def s4d_backward(
    dts, neg_re, im, B, C, dK, dlog_dt, dlog_neg_re, dim, dB, dC,
    L: tl.constexpr, M: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of a channel's parameters."""
    h, dlog_dt_h = tl.program_id(0), 0.0
    rows, column = tl.arange(0, ROWS) * COLUMNS, tl.arange(0, COLUMNS)
    for m in range(M):
        at = h * M + m
        dt, A_r, A_i, a_r, a_i, e_r, e_i, F_r, F_i = _discrete(dts, neg_re, im, h, at)
        q_r, q_i = _power(a_r, a_i, column.to(tl.float32))
        s_r, s_i = tl.zeros([ROWS, COLUMNS], tl.float32), tl.zeros([ROWS, COLUMNS], tl.float32)
        t_r, t_i = tl.zeros([ROWS, COLUMNS], tl.float32), tl.zeros([ROWS, COLUMNS], tl.float32)
        for first in range(0, L, ROWS * COLUMNS):
            row = first + rows
            tap = row[:, None] + column[None, :]
            g = 2.0 * tl.load(dK + h * L + tap, mask=tap < L, other=0.0)
            p_r, p_i = _power(a_r, a_i, row.to(tl.float32))
            x_r, x_i = _mul(p_r[:, None], p_i[:, None], q_r[None, :], q_i[None, :])
            x_r, x_i = g * x_r, g * x_i
            s_r, s_i = s_r + x_r, s_i + x_i
            t_r, t_i = t_r + tap * x_r, t_i + tap * x_i
        s_r, s_i, t_r, t_i = tl.sum(s_r), tl.sum(s_i), tl.sum(t_r), tl.sum(t_i)
        B_r, B_i = _load_pair(B, at)
        C_r, C_i = _load_pair(C, at)
        BF_r, BF_i = _mul(B_r, B_i, F_r, F_i)
        CB_r, CB_i = _mul(C_r, C_i, B_r, B_i)
        CF_r, CF_i = _mul(C_r, C_i, F_r, F_i)
        w_r, w_i = _mul(CB_r, CB_i, F_r, F_i)
        # The derivative of a real loss with respect to the real part of a holomorphic function's argument z is Re(df/dz),
        # to the imaginary part -Im(df/dz). Below are df/dz.
        dC_r, dC_i = _mul(s_r, s_i, BF_r, BF_i)
        dB_r, dB_i = _mul(s_r, s_i, CF_r, CF_i)
        dF_r, dF_i = _mul(s_r, s_i, CB_r, CB_i)
        square = A_r * A_r + A_i * A_i
        dE_r, dE_i = _mul(dF_r, dF_i, A_r / square, -A_i / square)
        wt_r, wt_i = _mul(w_r, w_i, t_r, t_i)
        Ee_r, Ee_i = _mul(dE_r, dE_i, e_r, e_i)
        da_r, da_i = wt_r + Ee_r, wt_i + Ee_i
        EF_r, EF_i = _mul(dE_r, dE_i, F_r, F_i)
        dA_r, dA_i = dt * da_r - EF_r, dt * da_i - EF_i
        _store_pair(dC, at, dC_r, -dC_i)
        _store_pair(dB, at, dB_r, -dB_i)
        tl.store(dlog_neg_re + at, dA_r * A_r)
        tl.store(dim + at, -dA_i)
        dlog_dt_h += da_r * a_r - da_i * a_i
    tl.store(dlog_dt + h, dlog_dt_h)
