"""Grids and numbers of the Triton backend's launches, computed once for each kind of call. triton.py passes the tensors."""

import functools
from typing import NamedTuple

import torch

from dis_scale.scan import triton_backward, triton_conv, triton_layout, triton_scan
from dis_scale.scan.triton_fill import Filling
from dis_scale.scan.triton_launch import CHUNK, LANES, WARPS, Launch, ceil_div, grid, next_power_of_2, padded
from dis_scale.scan.triton_memory import state_rows

ROWS = 16
"""Steps that a thread of the convolution computes at a time, limited by registers. The halo of each group is computed twice."""
SEGMENT = 6 * ROWS
"""Steps of a program of the convolution's backward pass. Each segment has one part of the weights' gradients."""
STEPS, SIZE = 32, 256
"""Steps of a program of `by_state`, and numbers of a program of `sum_scan` and `sum_conv` (triton_layout.py)."""


class ScanKind(NamedTuple):
    """Properties of a scan that determine its launches.

    `types` are the inputs' types. `rows` are the distances between rows of each direction's u and delta, `BC_rows` those of its B
    and C. `A` has the distances between A's channels and between its states. `z` has the gate's type and row distance, if any.
    `reverse`: the first direction runs from the end of the sequence to its start.
    """

    device: torch.device
    types: tuple[torch.dtype | None, ...]
    B: int
    L: int
    E: int
    N: int
    rows: tuple[tuple[int, int], ...]
    BC_rows: tuple[int, ...]
    A: tuple[int, ...]
    z: tuple[torch.dtype, int] | None
    reverse: bool
    fill: Filling

    @property
    def products(self) -> bool:
        """Choice to sum the gradients of B and C over channels on tensor cores, if B and C are bfloat16.

        Tensor cores truncate each term to 11 bits, and bfloat16 has only 8. The interpreter, on a CPU, has no tensor cores.
        """
        types = [self.types[7 * i + j] for i in range(len(self.rows)) for j in (3, 4)]
        return self.device.type != "cpu" and all(dtype == torch.bfloat16 for dtype in types)


class ScanForward(NamedTuple):
    """Launches of a forward pass; `scans` has one per direction."""

    by_state: Launch
    scans: tuple[Launch, ...]


class ScanBackward(NamedTuple):
    """Launches of a backward pass: `repeat` and `sums` have one per direction, `scans` one per direction or one for both."""

    repeat: tuple[Launch, ...]
    scans: tuple[Launch, ...]
    sums: tuple[Launch, ...]


@functools.cache
def scan_forward(kind: ScanKind, keep: bool) -> ScanForward:
    """Return the launches of a forward pass. With `keep`, they store the states and y before the gate for the backward pass."""
    length = padded(kind.L)
    by_state = Launch(
        triton_layout.by_state, (ceil_div(length, STEPS), kind.B, len(kind.BC_rows)), rows=kind.BC_rows, L=kind.L, N=kind.N,
        LENGTH=length, REVERSE=kind.reverse, STATES=next_power_of_2(kind.N), SIZE=STEPS,
    )  # fmt: skip
    count = len(kind.rows)
    scans = [_one_forward(kind, i, None, kind.E, i + 1 < count, i > 0, keep) for i in range(count)]
    return ScanForward(by_state, tuple(scans))


@functools.cache
def scan_backward(kind: ScanKind, kept: bool, dy_row: int, dz_row: int, dBC_row: int) -> ScanBackward:
    """Return the launches of a backward pass. `kept`: the forward pass stored the states and y before the gate. `dy_row`, `dz_row`
    and `dBC_row` are the distances between rows of the gradients of y, of the gate, and of B and C."""
    gated, count, lanes = kind.z is not None, len(kind.rows), kind.fill.backward
    repeat = [_one_forward(kind, i, dy_row, dz_row, gated and i + 1 < count, gated and i > 0, False) for i in range(count)]
    ways = [range(count)] if kind.fill.both and count == 2 else [range(i, i + 1) for i in range(count)]
    programs, B, _ = grid(kind.B, kind.L, kind.E, lanes=lanes)
    scans = [
        Launch(
            triton_backward.scan_backward, (programs, B, len(way)), u_rows=tuple(kind.rows[i][0] for i in way),
            delta_rows=tuple(kind.rows[i][1] for i in way), dz_row=dz_row,
            **_sizes(kind, lanes, dy_row), REVERSE=kind.reverse != bool(way[0]),
            GATED=gated, GATE_GRADIENT=gated and kept and count - 1 in way, PRODUCTS=kind.products,
            STATES=next_power_of_2(kind.N),
        )
        for way in ways
    ]  # fmt: skip
    return ScanBackward(tuple(repeat), tuple(scans), tuple(_sum_scan(kind, i, programs, dBC_row) for i in range(count)))


def _one_forward(kind: ScanKind, i: int, dy_row: int | None, out_row: int, first: bool, second: bool, keep: bool) -> Launch:
    """Return the launch of one direction's forward kernel. With `dy_row`, it is the repetition for the backward pass."""
    (u_row, delta_row), lanes = kind.rows[i], kind.fill.forward
    return Launch(
        triton_scan.scan_forward, grid(kind.B, kind.L, kind.E, lanes=lanes), u_row=u_row, delta_row=delta_row,
        out_row=out_row, **_sizes(kind, lanes, dy_row), REVERSE=kind.reverse != bool(i), FIRST=first, SECOND=second,
        GATED=kind.z is not None, FOR_BACKWARD=dy_row is not None, KEEP=keep,
    )  # fmt: skip


def _sizes(kind: ScanKind, lanes: int, dy_row: int | None) -> dict[str, int]:
    """Return sizes and row distances. An absent gate gets dy's row distance, or else u's; an absent dy the gate's, or else u's."""
    z_row, u_row = None if kind.z is None else kind.z[1], kind.rows[0][0]
    rows = {
        "z_row": next(row for row in (z_row, dy_row, u_row) if row is not None),
        "dy_row": next(row for row in (dy_row, z_row, u_row) if row is not None),
    }
    tile = {"LANES": LANES, "WARPS": WARPS, "SPLIT": lanes, "CHUNK": CHUNK, "num_warps": WARPS}
    sizes = {"A_channel": kind.A[0], "A_state": kind.A[1], "E": kind.E, "L": kind.L, "N": kind.N}
    return sizes | {"STATE_ROWS": state_rows(kind.N)} | rows | tile


def _sum_scan(kind: ScanKind, i: int, parts: int, dBC_row: int) -> Launch:
    """Return the launch that sums one direction's gradients of A, B, C, D and the bias; `parts` counts the parts of B's and C's."""
    B, L, E, N, length = kind.B, kind.L, kind.E, kind.N, padded(kind.L)
    blocks = ceil_div(max(2 * B * N * length, (N + 2) * E), SIZE)
    return Launch(
        triton_layout.sum_scan, (blocks, 2, 1), batch=B, BC_row=dBC_row, A_channel=kind.A[0],
        A_state=kind.A[1], E=E, L=L, N=N, LENGTH=length, REVERSE=kind.reverse != bool(i),
        PARTS=parts, SIZE=SIZE,
    )  # fmt: skip


class ConvKind(NamedTuple):
    """Properties of a convolution that determine its launches.

    `types` are the types of the input and the weights. `x_row` is the distance between the input's rows. `weight` has the distances
    between a weight's channels and between its taps. `ahead` is the number of steps that the first direction looks ahead.
    """

    device: torch.device
    types: tuple[torch.dtype | None, ...]
    B: int
    L: int
    E: int
    taps: int
    x_row: int
    weight: tuple[int, ...]
    ahead: int

    @property
    def directions(self) -> tuple[bool, bool]:
        return self.types[1] is not None, self.types[3] is not None

    @property
    def steps(self) -> int:
        """Steps for which a backward pass computes the values before SiLU."""
        return self.L + self.ahead

    @property
    def parts(self) -> int:
        """Parts of the weights' gradients."""
        return self.B * ceil_div(self.steps, SEGMENT)


class ConvBackward(NamedTuple):
    """Launches of a backward pass: the gradients, and the sums over their parts."""

    conv: Launch
    sums: Launch


@functools.cache
def conv_forward(kind: ConvKind) -> Launch:
    """Return the launch of a forward pass."""
    return Launch(triton_conv.conv_forward, grid(kind.B, kind.L, kind.E, ROWS), **_conv(kind))


@functools.cache
def conv_backward(kind: ConvKind, dy0_row: int, dy1_row: int, dx_row: int) -> ConvBackward:
    """Return the launches of a backward pass; the arguments are row distances of the gradients of both outputs and of the input."""
    B, E, taps, directions = kind.B, kind.E, kind.taps, sum(kind.directions)
    rows, blocks = {"dy0_row": dy0_row, "dy1_row": dy1_row, "dx_row": dx_row}, ceil_div((taps + 1) * E, SIZE)
    return ConvBackward(
        Launch(triton_conv.conv_backward, grid(B, kind.steps, E, SEGMENT), **_conv(kind), **rows, SEGMENT=SEGMENT),
        Launch(triton_layout.sum_conv, (blocks, directions, 1), parts=kind.parts, **_weight(kind), E=E, TAPS=taps, SIZE=SIZE),
    )


def _conv(kind: ConvKind) -> dict[str, int]:
    forward, backward = kind.directions
    sizes = {"E": kind.E, "L": kind.L, "TAPS": kind.taps, "x_row": kind.x_row, "FORWARD": forward, "BACKWARD": backward}
    return sizes | _weight(kind) | {"AHEAD": kind.ahead, "ROWS": ROWS, "LANES": LANES * WARPS, "num_warps": WARPS}


def _weight(kind: ConvKind) -> dict[str, int]:
    return {"w_channel": kind.weight[0], "w_tap": kind.weight[1]}
