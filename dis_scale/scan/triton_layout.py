"""The Triton backend's small kernels before and after the scan and the convolution, which triton.py launches.

`by_state` copies B and C into the layout of the scan's kernels. `sum_scan` and `sum_conv` sum the parts of gradients that the
backward passes stored, always in the same order. They write the gradients in the inputs' types and layouts, and each of their
programs computes SIZE numbers. Names are those of triton_tiles.py and triton_conv.py.
"""

import triton
import triton.language as tl

TOGETHER = tl.constexpr(8)
"""Number of parts loaded at the same time."""


@triton.jit
def _padding(L: tl.constexpr, LENGTH: tl.constexpr, REVERSE: tl.constexpr):
    """Return the position of row 0 in a padded sequence. The padding is where the direction ends: before row 0 if REVERSE."""
    return LENGTH - L if REVERSE else 0


@triton.jit(do_not_specialize_on_alignment=["B", "C", "other_B", "other_C"])
def by_state(
    B, C, other_B, other_C, outs, rows: tl.constexpr, L: tl.constexpr, N: tl.constexpr, LENGTH: tl.constexpr,
    REVERSE: tl.constexpr, STATES: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Copy (batch, L, N) to (batch, 2, LENGTH / 4, N, 4) in float32, padded with zeros: B and C of each direction.

    B and C are the first direction's, and so is REVERSE. `rows` has the row distances of the inputs that are used: two for each
    direction. The inputs are columns of a product, so they need not be aligned. `outs` has one tensor per direction.
    """
    inputs = (B, C, other_B, other_C)
    step, n = tl.program_id(0) * SIZE + tl.arange(0, SIZE)[None, :], tl.arange(0, STATES)[:, None]
    batch = tl.program_id(1).to(tl.int64)
    for i in tl.static_range(len(rows)):
        if tl.program_id(2) == i:
            t = step - _padding(L, LENGTH, (i < 2) == REVERSE)
            x = inputs[i] + (batch * L + t) * rows[i] + n
            x = tl.load(x, mask=(t >= 0) & (t < L) & (n < N), other=0.0).to(tl.float32)
            out = outs[i // 2] + (batch * 2 + i % 2) * (N * LENGTH)
            tl.store(out + (step // 4 * N + n) * 4 + step % 4, x, mask=(step < LENGTH) & (n < N))


@triton.jit
def _sum_parts(parts, i, inside, count, size):
    """Sum the numbers at `i` of `count` parts, which are `size` numbers apart."""
    total, k = tl.zeros(i.shape, tl.float32), 0
    while k < count:  # the interpreter's `range` does not accept a tensor
        for j in tl.static_range(TOGETHER):
            total += tl.load(parts + j * size + i, mask=inside & (k + j < count), other=0.0)
        parts, k = parts + TOGETHER * size, k + TOGETHER  # the pointer has 64 bits, k * size may have 32
    return total


@triton.jit
def _store(out, at, total, inside):
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["batch"])
def sum_scan(
    dBC, parameters, dA, dB, dC, dD, dbias, batch, BC_row: tl.constexpr, A_channel: tl.constexpr, A_state: tl.constexpr,
    E: tl.constexpr, L: tl.constexpr, N: tl.constexpr, LENGTH: tl.constexpr, REVERSE: tl.constexpr, PARTS: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    """Sum one direction's gradients: those of B and C over PARTS programs, those of the parameters over the batch.

    Axis 1 selects the sums: 0 for B and C, 1 for the parameters. BC_row is the distance between two rows of dB and of dC.
    """
    i = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    if tl.program_id(1) == 0:
        size = batch.to(tl.int64) * (2 * N * LENGTH)
        total = _sum_parts(dBC, i, i < size, PARTS, size)
        t = i // (4 * N) % (LENGTH // 4) * 4 + i % 4 - _padding(L, LENGTH, REVERSE)
        n, which = i // 4 % N, i // (LENGTH * N) % 2
        at, inside = (i // (2 * N * LENGTH) * L + t) * BC_row + n, (i < size) & (t >= 0) & (t < L)
        _store(dB, at, total, inside & (which == 0))
        _store(dC, at, total, inside & (which == 1))
    else:
        total = _sum_parts(parameters, i, i < (N + 2) * E, batch, (2 * N + 2) * E)
        n, e = i // E, i % E
        _store(dA, e * A_channel + n * A_state, total, n < N)
        _store(dD, e, total, n == N)
        _store(dbias, e, total, n == N + 1)


@triton.jit(do_not_specialize=["parts"])
def sum_conv(
    sums, dweights, dbiases, parts, w_channel: tl.constexpr, w_tap: tl.constexpr, E: tl.constexpr, TAPS: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    """Sum the gradients of weights and biases over their parts. Axis 1 is the direction."""
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    for way in tl.static_range(len(sums)):
        if tl.program_id(1) == way:
            total = _sum_parts(sums[way], i, i < (TAPS + 1) * E, parts, (TAPS + 1) * E)
            k, e = i // E, i % E
            _store(dweights[way], e * w_channel + k * w_tap, total, k < TAPS)
            _store(dbiases[way], e, total, k == TAPS)
