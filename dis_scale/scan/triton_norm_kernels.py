"""The norms behind a gate and behind a sum on NVIDIA GPUs: a program has one row after the other, all channels, in float32.

E channels, in tiles of SIZE; `first_row`, `second_row`, `dout_row` and `dz_row` are the distances between two rows of both inputs,
of the output's gradient and of the gate's. `parts` has the weight's gradient of each program's rows. An image has L tokens. The
norm's token i is token order[i] of the stream, and h's token place[order[i]]; L is 0 if all have one order. Read next: norms.py.
"""

import triton
import triton.language as tl


@triton.jit
def _store_normalised(x_E, weight, out, row, e, E: tl.constexpr, EPS: tl.constexpr):
    """Store x rsqrt(mean(x^2) + EPS) weight of a row; x is zero behind the last channel."""
    scale = tl.rsqrt(tl.sum(x_E * x_E, 0) / E + EPS)
    out_E = x_E * scale * tl.load(weight + e, mask=e < E, other=0.0)
    tl.store(out + row * E + e, out_E.to(out.dtype.element_ty), mask=e < E)


@triton.jit
def _through_norm(x_E, dout_E, weight_E, E: tl.constexpr, EPS: tl.constexpr):
    """Return the gradients of x and of the weight by a row."""
    scale = tl.rsqrt(tl.sum(x_E * x_E, 0) / E + EPS)
    dnormed_E = dout_E * weight_E
    dx_E = scale * (dnormed_E - x_E * (scale * scale * tl.sum(dnormed_E * x_E, 0) / E))
    return dx_E, dout_E * x_E * scale


@triton.jit
def gated_norm(
    y, z, weight, out, first_row: tl.constexpr, second_row: tl.constexpr, E: tl.constexpr, EPS: tl.constexpr, SIZE: tl.constexpr
):  # fmt: skip
    """out = h rsqrt(mean(h^2) + EPS) weight, of h = y SiLU(z)."""
    row, e = tl.program_id(0).to(tl.int64), tl.arange(0, SIZE)
    inside = e < E
    y_E = tl.load(y + row * first_row + e, mask=inside, other=0.0).to(tl.float32)
    z_E = tl.load(z + row * second_row + e, mask=inside, other=0.0).to(tl.float32)
    _store_normalised(y_E * z_E * tl.sigmoid(z_E), weight, out, row, e, E, EPS)


@triton.jit(do_not_specialize=["count"])
def gated_norm_backward(
    y, z, dout, weight, dy, dz, parts, count,
    first_row: tl.constexpr, second_row: tl.constexpr, dout_row: tl.constexpr, dz_row: tl.constexpr, E: tl.constexpr,
    ROWS: tl.constexpr, EPS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """The gradients of y and z, and the rows' part of the weight's. Rows behind the last one, count - 1, add nothing."""
    program, e = tl.program_id(0).to(tl.int64), tl.arange(0, SIZE)
    weight_E = tl.load(weight + e, mask=e < E, other=0.0)
    part_E = tl.zeros((SIZE,), tl.float32)
    for i in range(ROWS):
        row = program * ROWS + i
        inside = (e < E) & (row < count)
        y_E = tl.load(y + row * first_row + e, mask=inside, other=0.0).to(tl.float32)
        z_E = tl.load(z + row * second_row + e, mask=inside, other=0.0).to(tl.float32)
        dout_E = tl.load(dout + row * dout_row + e, mask=inside, other=0.0).to(tl.float32)
        open_E = tl.sigmoid(z_E)
        dh_E, dweight_E = _through_norm(y_E * z_E * open_E, dout_E, weight_E, E, EPS)
        part_E += dweight_E
        tl.store(dy + row * E + e, (dh_E * z_E * open_E).to(dy.dtype.element_ty), mask=inside)
        dz_E = dh_E * y_E * open_E * (1.0 + z_E * (1.0 - open_E))
        tl.store(dz + row * dz_row + e, dz_E.to(dz.dtype.element_ty), mask=inside)
    tl.store(parts + program * E + e, part_E, mask=e < E)


@triton.jit
def _places_of(row, place, order, L: tl.constexpr):
    """Return the rows of the stream and of h that belong to a row of the norm."""
    r_row, h_row = row, row
    if L > 0:
        first = row // L * L
        token = tl.load(order + (row - first))
        r_row, h_row = first + token, first + tl.load(place + token)
    return r_row, h_row


@triton.jit
def added_norm(
    r, h, weight, total, out, place, order,
    first_row: tl.constexpr, second_row: tl.constexpr, E: tl.constexpr, L: tl.constexpr, EPS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """total = r + h; out = total rsqrt(mean(total^2) + EPS) weight."""
    row, e = tl.program_id(0).to(tl.int64), tl.arange(0, SIZE)
    inside = e < E
    r_row, h_row = _places_of(row, place, order, L)
    x_E = tl.load(r + r_row * first_row + e, mask=inside, other=0.0)
    x_E += tl.load(h + h_row * second_row + e, mask=inside, other=0.0).to(tl.float32)
    tl.store(total + r_row * E + e, x_E, mask=inside)
    _store_normalised(x_E, weight, out, row, e, E, EPS)


@triton.jit(do_not_specialize=["count"])
def added_norm_backward(
    total, dtotal, dout, weight, dr, dh, parts, place, order, count,
    first_row: tl.constexpr, second_row: tl.constexpr, dout_row: tl.constexpr, E: tl.constexpr, L: tl.constexpr,
    ROWS: tl.constexpr, EPS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Store the gradients of r and h, equal but for type and order, and the rows' part of the weight's gradient."""
    program, e = tl.program_id(0).to(tl.int64), tl.arange(0, SIZE)
    weight_E = tl.load(weight + e, mask=e < E, other=0.0)
    part_E = tl.zeros((SIZE,), tl.float32)
    for i in range(ROWS):
        row = program * ROWS + i
        inside = (e < E) & (row < count)
        r_row, h_row = _places_of(row, place, order, L)
        x_E = tl.load(total + r_row * first_row + e, mask=inside, other=0.0)
        dout_E = tl.load(dout + row * dout_row + e, mask=inside, other=0.0).to(tl.float32)
        dx_E, dweight_E = _through_norm(x_E, dout_E, weight_E, E, EPS)
        part_E += dweight_E
        dx_E += tl.load(dtotal + r_row * second_row + e, mask=inside, other=0.0)
        tl.store(dr + r_row * E + e, dx_E, mask=inside)
        tl.store(dh + h_row * E + e, dx_E.to(dh.dtype.element_ty), mask=inside)
    tl.store(parts + program * E + e, part_E, mask=e < E)
