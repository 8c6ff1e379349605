"""The Triton backend for NVIDIA GPUs: the two-way scan and the two-way convolution, each one kernel a pass.

Takes float16, bfloat16 and float32 (float64 is refused), holds the state in float32, rounds outputs once. The last axis of
an input must be contiguous and its batch rows evenly spaced, as in chunks and splits of a product; anything else costs a
copy. Nothing is added atomically: gradients of B and C are summed over groups of channels, those of the parameters over
batch rows, in a buffer first; results are the same bits at each run. `TRITON_INTERPRET=1`, set before Triton is imported,
runs all of it on the CPU, slowly.

A thread holds one channel with all its states: no exchange between threads but for the gradients of B and C. The two
directions of a channel go towards each other in one loop: where the second to come to a step finds the first's output, it
adds, gates and writes, so that z is read once and nothing is flipped.

Axes: B batch, L time, E channels, N states, W taps of the convolution, K chunks. Symbols as in reference.py.
"""

import functools
import math
import os
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from dis_scale.errors import DisScaleError, UserError
from dis_scale.scan.backend import Backend, Direction

LANES = 32
"""Channels a program: one a thread of one warp. So a thread reads back what it wrote itself, and sums need no barrier."""
CHUNK = 16
"""Steps between the states that the forward pass keeps; the backward pass holds as many in registers."""
ROWS = 16
"""Steps of the convolution at a time."""


@functools.cache
def problem() -> DisScaleError | None:
    """What stands in the way of running here, or None."""
    if os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available():
        return None
    return DisScaleError("the triton scan needs an NVIDIA GPU, and PyTorch sees none: set the backend to auto")


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
        y += tl.load(sums + row * E + e, mask=inside & late, other=0.0)
        tl.store(sums + row * E + e, y, mask=inside)
        inside = inside & late
    if GATED:
        z_e = tl.load(z + row * z_row + e, mask=inside, other=0.0).to(tl.float32)
        y *= z_e * _sigmoid(z_e)
    tl.store(out + row * E + e, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _keep(h, starts, chunk, chunks, e, n, E, N):
    """The states at a chunk's beginning; `starts` points at this batch row's."""
    tl.store(starts + (chunk * N + n[:, None]) * E + e[None, :], h, mask=(n[:, None] < N) & (e[None, :] < E))


@triton.jit
def _scan_forward(
    u0, delta0, A0, B0, C0, D0, bias0, u0_row, delta0_row, B0_row, C0_row,
    u1, delta1, A1, B1, C1, D1, bias1, u1_row, delta1_row, B1_row, C1_row,
    z, out, sums, starts0, starts1, z_row, E, L: tl.constexpr, N: tl.constexpr,
    REVERSE: tl.constexpr, TWO_WAY: tl.constexpr, GATED: tl.constexpr, KEEP: tl.constexpr,
    LANES: tl.constexpr, STATES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The first direction, reversed or not, and in a two-way scan the opposite one."""
    e, n = tl.program_id(0) * LANES + tl.arange(0, LANES), tl.arange(0, STATES)
    batch, chunks = tl.program_id(1).to(tl.int64), (L + CHUNK - 1) // CHUNK
    starts0 += batch * chunks * N * E
    starts1 += batch * chunks * N * E
    A0_ne, D0_e, bias0_e = _weights(A0, D0, bias0, e, n, E, N)
    A1_ne, D1_e, bias1_e = _weights(A1, D1, bias1, e, n, E, N)
    h0 = tl.zeros([STATES, LANES], tl.float32)
    h1 = tl.zeros([STATES, LANES], tl.float32)
    for i in range(L):
        row0 = batch * L + (L - 1 - i if REVERSE else i)
        row1 = batch * L + (i if REVERSE else L - 1 - i)
        if KEEP:
            if i % CHUNK == 0:
                _keep(h0, starts0, i // CHUNK, chunks, e, n, E, N)
                if TWO_WAY:
                    _keep(h1, starts1, i // CHUNK, chunks, e, n, E, N)
        h0, y0 = _advance(h0, u0, delta0, B0, C0, u0_row, delta0_row, B0_row, C0_row, A0_ne, D0_e, bias0_e, row0, e, n, E, N)
        _deliver(y0, z, out, sums, z_row, row0, e, E, 2 * i > L - 1, TWO_WAY, GATED)
        if TWO_WAY:
            h1, y1 = _advance(h1, u1, delta1, B1, C1, u1_row, delta1_row, B1_row, C1_row, A1_ne, D1_e, bias1_e, row1, e, n, E, N)
            tl.debug_barrier()  # in the middle both directions meet in one step
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
def _scan_backward(
    u, delta, A, B, C, D, bias, u_row, delta_row, B_row, C_row,
    z, dy, sums, starts, z_row, dy_row,
    du, ddelta, dz, dA, dB, dC, dD, dbias, E, L: tl.constexpr, N: tl.constexpr,
    REVERSE: tl.constexpr, GATED: tl.constexpr, WRITE_DZ: tl.constexpr,
    LANES: tl.constexpr, STATES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One direction's gradients. Chunk by chunk from the last one: its states once more, state by state, and back."""
    e, n_all = tl.program_id(0) * LANES + tl.arange(0, LANES), tl.arange(0, STATES)
    inside, batch, rows = e < E, tl.program_id(1).to(tl.int64), tl.num_programs(1).to(tl.int64) * L
    D_e = tl.load(D + e, mask=inside, other=0.0).to(tl.float32)
    bias_e = tl.load(bias + e, mask=inside, other=0.0).to(tl.float32)
    chunks: tl.constexpr = (L + CHUNK - 1) // CHUNK
    carry_ne = tl.zeros([STATES, LANES], tl.float32)  # what later steps send to the states
    dA_ne = tl.zeros([STATES, LANES], tl.float32)
    dD_e = tl.zeros([LANES], tl.float32)
    dbias_e = tl.zeros([LANES], tl.float32)
    for k in range(chunks):
        first = (chunks - 1 - k) * CHUNK
        deltas, delta_us, dys, d_delta_us, d_deltas = (), (), (), (), ()
        for j in tl.static_range(CHUNK):
            i = first + j
            row = batch * L + (L - 1 - i if REVERSE else i)
            there = inside & (i < L)
            raw_e = tl.load(delta + row * delta_row + e, mask=there, other=0.0).to(tl.float32) + bias_e
            delta_e = tl.where(there, _softplus(raw_e), 0.0)
            u_e = tl.load(u + row * u_row + e, mask=there, other=0.0).to(tl.float32)
            dy_e = tl.load(dy + row * dy_row + e, mask=there, other=0.0).to(tl.float32)
            if GATED:
                dy_e = _gate_gradient(dy_e, z, sums, dz, z_row, row, e, there, E, WRITE_DZ)
            deltas, delta_us, dys = deltas + (delta_e,), delta_us + (delta_e * u_e,), dys + (dy_e,)
            d_delta_us += (tl.zeros([LANES], tl.float32),)
            d_deltas += (tl.zeros([LANES], tl.float32),)
        for n in range(N):
            A_e = tl.load(A + n * E + e, mask=inside, other=0.0)
            h_e = tl.load(starts + ((batch * chunks + chunks - 1 - k) * N + n) * E + e, mask=inside, other=0.0)
            carry_e = tl.sum(tl.where(n_all[:, None] == n, carry_ne, 0.0), axis=0)
            dA_e = tl.zeros([LANES], tl.float32)
            decays, states = (), (h_e,)
            for j in tl.static_range(CHUNK):
                row = batch * L + (L - 1 - first - j if REVERSE else first + j)
                B_t = tl.load(B + row * B_row + n, mask=first + j < L, other=0.0).to(tl.float32)
                decay_e = tl.exp2(deltas[j] * A_e)
                h_e = decay_e * h_e + delta_us[j] * B_t
                decays, states = decays + (decay_e,), states + (h_e,)
            sums_delta_u, sums_delta = (), ()
            for back in tl.static_range(CHUNK):
                j: tl.constexpr = CHUNK - 1 - back
                row = batch * L + (L - 1 - first - j if REVERSE else first + j)
                there = first + j < L
                B_t = tl.load(B + row * B_row + n, mask=there, other=0.0).to(tl.float32)
                C_t = tl.load(C + row * C_row + n, mask=there, other=0.0).to(tl.float32)
                dh_e = carry_e + dys[j] * C_t
                part = (tl.program_id(0) * rows + row) * N + n
                tl.store(dC + part, tl.sum(dys[j] * states[j + 1], axis=0), mask=there)
                tl.store(dB + part, tl.sum(dh_e * delta_us[j], axis=0), mask=there)
                carry_e = dh_e * decays[j]
                d_exponent_e = carry_e * states[j]
                sums_delta_u = (d_delta_us[j] + dh_e * B_t,) + sums_delta_u
                sums_delta = (d_deltas[j] + d_exponent_e * A_e,) + sums_delta
                dA_e += d_exponent_e * deltas[j]
            d_delta_us, d_deltas = sums_delta_u, sums_delta
            carry_ne = tl.where(n_all[:, None] == n, carry_e[None, :], carry_ne)
            dA_ne += tl.where(n_all[:, None] == n, dA_e[None, :], 0.0)
        for j in tl.static_range(CHUNK):
            i = first + j
            row = batch * L + (L - 1 - i if REVERSE else i)
            there = inside & (i < L)
            raw_e = tl.load(delta + row * delta_row + e, mask=there, other=0.0).to(tl.float32) + bias_e
            u_e = tl.load(u + row * u_row + e, mask=there, other=0.0).to(tl.float32)
            d_delta_e = d_deltas[j] * 0.6931471805599453 + d_delta_us[j] * u_e  # A came divided by ln 2
            d_raw_e = tl.where(there, d_delta_e * _sigmoid(raw_e), 0.0)
            du_e = d_delta_us[j] * deltas[j] + D_e * dys[j]
            tl.store(ddelta + row * E + e, d_raw_e.to(ddelta.dtype.element_ty), mask=there)
            tl.store(du + row * E + e, du_e.to(du.dtype.element_ty), mask=there)
            dD_e += dys[j] * u_e
            dbias_e += d_raw_e
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
def _conv_forward(
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
def _conv_backward(
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


def _rows(x_BLX: Tensor) -> Tensor:
    """Neighbouring channels, and rows at one distance through the whole batch: itself where it is so, a copy where not."""
    B, L, X = x_BLX.shape
    even = B == 1 or x_BLX.stride(0) == L * x_BLX.stride(1)
    return x_BLX if even and (X == 1 or x_BLX.stride(2) == 1) else x_BLX.contiguous()


def _fresh(x_BLE: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(x_BLE.shape, dtype=dtype or x_BLE.dtype, device=x_BLE.device)


class _Operands:
    """One direction as the kernels take it: pointers, and the distances of their rows."""

    def __init__(self, direction: Direction):
        u, delta, A, B, C, D, bias = direction
        self.u, self.delta, self.B, self.C = (_rows(x) for x in (u, delta, B, C))
        self.A = (A.float() / math.log(2)).t().contiguous()
        self.D, self.bias = D.contiguous(), bias.contiguous()

    def pointers(self) -> tuple[Tensor, ...]:
        return self.u, self.delta, self.A, self.B, self.C, self.D, self.bias

    def distances(self) -> tuple[int, ...]:
        return tuple(x.stride(1) for x in (self.u, self.delta, self.B, self.C))

    def arguments(self) -> tuple[Any, ...]:
        return *self.pointers(), *self.distances()

    def starts(self, keep: bool) -> Tensor:
        """(B, K, N, E): the states at each chunk's beginning, or nothing."""
        (B, L, E), N = self.u.shape, self.A.shape[0]
        return self.u.new_empty((B, triton.cdiv(L, CHUNK), N, E) if keep else 0, dtype=torch.float32)


def _grid(x_BLE: Tensor, *more: int) -> tuple[int, ...]:
    return triton.cdiv(x_BLE.shape[2], LANES), x_BLE.shape[0], *more


def _sizes(operands: _Operands) -> tuple[tuple[int, int, int], dict[str, int]]:
    """E, L and N; and the kernels' constants."""
    (_, L, E), N = operands.u.shape, operands.A.shape[0]
    constants = {"LANES": LANES, "STATES": triton.next_power_of_2(N), "CHUNK": CHUNK, "num_warps": LANES // 32}
    return (E, L, N), constants


class _Scan(torch.autograd.Function):
    """`reverse` is the first direction's; a second one runs against it. z is None or the gate of both."""

    @staticmethod
    def forward(ctx: Any, reverse: bool, z: Tensor | None, *inputs: Tensor) -> Tensor:
        ways = [_Operands(Direction(*inputs[i : i + 7])) for i in range(0, len(inputs), 7)]
        first, last, two_way = ways[0], ways[-1], len(ways) == 2
        keep = any(ctx.needs_input_grad)
        starts = [way.starts(keep) for way in ways]
        out, sums = _fresh(first.u), _fresh(first.u, torch.float32) if two_way else first.u
        gate = first.u if z is None else _rows(z)
        sizes, constants = _sizes(first)
        _scan_forward[_grid(first.u)](
            *first.arguments(), *last.arguments(), gate, out, sums, starts[0], starts[-1], gate.stride(1), *sizes,
            REVERSE=reverse, TWO_WAY=two_way, GATED=z is not None, KEEP=keep, **constants,
        )  # fmt: skip
        if keep:
            ctx.reverse, ctx.gated = reverse, z is not None
            ctx.save_for_backward(*inputs, gate, sums, *starts)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        *inputs, gate, sums = ctx.saved_tensors[: len(ctx.saved_tensors) // 8 * 7 + 2]
        starts, dy = ctx.saved_tensors[len(inputs) + 2 :], _rows(dy)
        dz = _fresh(gate) if ctx.gated else None
        gradients: list[Tensor] = []
        for i, kept in enumerate(starts):
            direction = Direction(*inputs[7 * i : 7 * i + 7])
            gradients += _one_way_gradients(direction, ctx.reverse != bool(i), gate, dy, sums, kept, dz, first=i == 0)
        return None, dz, *gradients


def _one_way_gradients(
    direction: Direction, reverse: bool, gate: Tensor, dy: Tensor, sums: Tensor, starts: Tensor,
    dz: Tensor | None, first: bool,
) -> list[Tensor]:  # fmt: skip
    """A direction's gradients in its order and types; the first direction writes dz, too."""
    way = _Operands(direction)
    (B, L, E), N = way.u.shape, way.A.shape[0]
    sizes, constants = _sizes(way)
    du, ddelta = _fresh(way.u), _fresh(way.delta)
    wide = functools.partial(torch.empty, dtype=torch.float32, device=way.u.device)
    dA, dB, dC, dD, dbias = wide(B, N, E), *(wide(_grid(way.u)[0], B, L, N) for _ in "BC"), wide(B, E), wide(B, E)
    _scan_backward[_grid(way.u)](
        *way.arguments(), gate, dy, sums, starts, gate.stride(1), dy.stride(1),
        du, ddelta, gate if dz is None else dz, dA, dB, dC, dD, dbias, *sizes,
        REVERSE=reverse, GATED=dz is not None, WRITE_DZ=first, **constants,
    )  # fmt: skip
    gradients = [du, ddelta, dA.sum(0).t(), dB.sum(0), dC.sum(0), dD.sum(0), dbias.sum(0)]
    return [g.to(x.dtype) for g, x in zip(gradients, direction, strict=True)]


class _Conv(torch.autograd.Function):
    """Looks back with the first weight and bias, on with the second; None where a direction is not wanted."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor | None) -> tuple[Tensor | None, ...]:
        x, pointers, ways = _rows(x), _conv_pointers(x, weights), {"BACK": weights[0] is not None, "ON": weights[2] is not None}
        outs = [_fresh(x) if way else None for way in ways.values()]
        _conv_forward[_grid(x, triton.cdiv(x.shape[1], ROWS))](
            x, *pointers, *(x if out is None else out for out in outs), x.stride(1), x.shape[2], x.shape[1],
            **ways, ROWS=ROWS, LANES=LANES, TAPS=pointers[0].shape[1], num_warps=LANES // 32,
        )  # fmt: skip
        ctx.ways = ways
        ctx.save_for_backward(x, *weights)
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        pointers, dx = _conv_pointers(x, weights), _fresh(x)
        rows = [x if dy is None else _rows(dy) for dy in dys]
        taps = pointers[0].shape[1]
        sums = [x.new_empty(x.shape[0], x.shape[2], taps + 1, dtype=torch.float32) for _ in rows]
        _conv_backward[_grid(x)](
            x, *pointers, *rows, dx, *sums, x.stride(1), *(dy.stride(1) for dy in rows), x.shape[2], x.shape[1],
            **ctx.ways, ROWS=ROWS, LANES=LANES, TAPS=taps, num_warps=LANES // 32,
        )  # fmt: skip
        gradients: list[Tensor | None] = [dx]
        for i, total in enumerate(sums):
            weight, bias = weights[2 * i : 2 * i + 2]
            both = None if weight is None else total.sum(0)
            gradients += [None, None] if both is None else [both[:, :taps].to(weight.dtype), both[:, taps].to(bias.dtype)]
        return tuple(gradients)


def _conv_pointers(x: Tensor, weights: Sequence[Tensor | None]) -> list[Tensor]:
    """An unwanted direction's weights are never read: the other's stand in."""
    there = [w.contiguous() for w in weights if w is not None]
    return (there * 2)[:4]


def _check(*tensors: Tensor | None) -> None:
    if error := problem():
        raise error
    for x in tensors:
        if x is not None and x.dtype == torch.float64:
            raise UserError("the triton scan computes in float32, got float64: convert, or set the backend to chunked")


def _selective_scan(direction: Direction, reverse: bool) -> Tensor:
    _check(*direction)
    return _Scan.apply(reverse, None, *direction)


def _two_way_scan(forward: Direction, backward: Direction, z_BLE: Tensor | None) -> Tensor:
    _check(*forward, *backward, z_BLE)
    return _Scan.apply(False, z_BLE, *forward, *backward)


def _causal_conv_silu(x_BLE: Tensor, weight_EW: Tensor, bias_E: Tensor, reverse: bool) -> Tensor:
    _check(x_BLE, weight_EW, bias_E)
    weights = (None, None, weight_EW, bias_E) if reverse else (weight_EW, bias_E, None, None)
    return _Conv.apply(x_BLE, *weights)[int(reverse)]


def _two_way_conv_silu(x_BLE: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
    _check(x_BLE, *weights)
    return _Conv.apply(x_BLE, *weights)


backend = Backend(_selective_scan, _two_way_scan, _causal_conv_silu, _two_way_conv_silu)
