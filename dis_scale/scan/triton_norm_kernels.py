"""The norm behind a gate on NVIDIA GPUs: a program has one row after the other, all channels at once, in float32.

E channels, in tiles of SIZE; `y_row`, `z_row` and `dout_row` are the distances between two rows. `parts` has the weight's
gradient of each program's rows. Read next: gated_norm.py.
"""

import triton
import triton.language as tl


@triton.jit
def gated_norm(
    y, z, weight, out, E: tl.constexpr, y_row: tl.constexpr, z_row: tl.constexpr, EPS: tl.constexpr, SIZE: tl.constexpr
):  # fmt: skip
    """out = h rsqrt(mean(h^2) + EPS) weight, of h = y SiLU(z)."""
    row, e = tl.program_id(0).to(tl.int64), tl.arange(0, SIZE)
    inside = e < E
    y_E = tl.load(y + row * y_row + e, mask=inside, other=0.0).to(tl.float32)
    z_E = tl.load(z + row * z_row + e, mask=inside, other=0.0).to(tl.float32)
    h_E = y_E * z_E * tl.sigmoid(z_E)
    scale = tl.rsqrt(tl.sum(h_E * h_E, 0) / E + EPS)
    out_E = h_E * scale * tl.load(weight + e, mask=inside, other=0.0)
    tl.store(out + row * E + e, out_E.to(out.dtype.element_ty), mask=inside)


@triton.jit
def gated_norm_backward(
    y, z, dout, weight, dy, dz, parts,
    E: tl.constexpr, y_row: tl.constexpr, z_row: tl.constexpr, dout_row: tl.constexpr, COUNT: tl.constexpr, ROWS: tl.constexpr,
    EPS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """The gradients of y and z, and the rows' part of the weight's. Rows behind the last one, COUNT - 1, add nothing."""
    program, e = tl.program_id(0).to(tl.int64), tl.arange(0, SIZE)
    weight_E = tl.load(weight + e, mask=e < E, other=0.0)
    part_E = tl.zeros((SIZE,), tl.float32)
    for i in range(ROWS):
        row = program * ROWS + i
        inside = (e < E) & (row < COUNT)
        y_E = tl.load(y + row * y_row + e, mask=inside, other=0.0).to(tl.float32)
        z_E = tl.load(z + row * z_row + e, mask=inside, other=0.0).to(tl.float32)
        dout_E = tl.load(dout + row * dout_row + e, mask=inside, other=0.0).to(tl.float32)
        open_E = tl.sigmoid(z_E)
        h_E = y_E * z_E * open_E
        scale = tl.rsqrt(tl.sum(h_E * h_E, 0) / E + EPS)
        part_E += dout_E * h_E * scale
        dnormed_E = dout_E * weight_E
        dh_E = scale * (dnormed_E - h_E * (scale * scale * tl.sum(dnormed_E * h_E, 0) / E))
        tl.store(dy + row * E + e, (dh_E * z_E * open_E).to(dy.dtype.element_ty), mask=inside)
        dz_E = dh_E * y_E * open_E * (1.0 + z_E * (1.0 - open_E))
        tl.store(dz + row * E + e, dz_E.to(dz.dtype.element_ty), mask=inside)
    tl.store(parts + program * E + e, part_E, mask=e < E)
