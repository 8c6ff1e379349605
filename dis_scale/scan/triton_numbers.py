"""The grids and numbers of the Triton backend's launches, computed once for each kind of call; triton.py passes the tensors."""

import functools
from typing import NamedTuple

import torch

from dis_scale.scan import triton_backward, triton_conv, triton_layout, triton_scan
from dis_scale.scan.triton_fill import Filling
from dis_scale.scan.triton_launch import CHUNK, LANES, WARPS, Launch, ceil_div, grid, next_power_of_2, padded
from dis_scale.scan.triton_memory import state_rows

ROWS = 16
"""Steps that a thread of the convolution computes at a time, limited by registers: the halo of a group is computed twice."""
SEGMENT = 6 * ROWS
"""Steps of a program of the convolution's backward pass, which has one part of the weights' gradients per segment."""
STEPS, SIZE = 32, 256
"""Steps, and numbers, of a program of triton_layout.py."""


class ScanKind(NamedTuple):
    """All that distinguishes one scan's launches from another's.

    `types` are those of the inputs; rows are the distances between the rows of each direction's u and delta, and of each
    direction's B and C; A has those between its channels and between its states, z the gate's type and its row, if there is one.
    `reverse` is the first direction's.
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
        """Whether tensor cores sum the gradients of B and C over channels: they truncate each term to 11 bits, and bfloat16 has 8.

        Not on a CPU: the interpreter has none.
        """
        types = [self.types[7 * i + j] for i in range(len(self.rows)) for j in (3, 4)]
        return self.device.type != "cpu" and all(dtype == torch.bfloat16 for dtype in types)


class ScanForward(NamedTuple):
    """The launches of a forward pass; `scans` has one per direction."""

    by_state: Launch
    scans: tuple[Launch, ...]


class ScanBackward(NamedTuple):
    """The launches of a backward pass: `repeat` and `sums` have one per direction, `scans` one, or one for both directions."""

    repeat: tuple[Launch, ...]
    scans: tuple[Launch, ...]
    sums: tuple[Launch, ...]


@functools.cache
def scan_forward(kind: ScanKind, keep: bool) -> ScanForward:
    """`keep`: the states for the backward pass, and y before the gate."""
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
    """For gradients of y, the gate, and B and C with rows at these distances; `kept`: the forward pass stored states and y."""
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
    """A direction's forward kernel; with `dy_row` as it is repeated for the backward pass."""
    (u_row, delta_row), lanes = kind.rows[i], kind.fill.forward
    return Launch(
        triton_scan.scan_forward, grid(kind.B, kind.L, kind.E, lanes=lanes), u_row=u_row, delta_row=delta_row,
        out_row=out_row, **_sizes(kind, lanes, dy_row), REVERSE=kind.reverse != bool(i), FIRST=first, SECOND=second,
        GATED=kind.z is not None, FOR_BACKWARD=dy_row is not None, KEEP=keep,
    )  # fmt: skip


def _sizes(kind: ScanKind, lanes: int, dy_row: int | None) -> dict[str, int]:
    """If there is no gate, dy takes its place, or u in the forward pass, where the gate takes dy's."""
    z_row, u_row = None if kind.z is None else kind.z[1], kind.rows[0][0]
    rows = {
        "z_row": next(row for row in (z_row, dy_row, u_row) if row is not None),
        "dy_row": next(row for row in (dy_row, z_row, u_row) if row is not None),
    }
    tile = {"LANES": LANES, "WARPS": WARPS, "SPLIT": lanes, "CHUNK": CHUNK, "num_warps": WARPS}
    sizes = {"A_channel": kind.A[0], "A_state": kind.A[1], "E": kind.E, "L": kind.L, "N": kind.N}
    return sizes | {"STATE_ROWS": state_rows(kind.N)} | rows | tile


def _sum_scan(kind: ScanKind, i: int, parts: int, dBC_row: int) -> Launch:
    """A direction's gradients of A, B, C, D and the bias; B's and C's have so many parts."""
    B, L, E, N, length = kind.B, kind.L, kind.E, kind.N, padded(kind.L)
    blocks = ceil_div(max(2 * B * N * length, (N + 2) * E), SIZE)
    return Launch(
        triton_layout.sum_scan, (blocks, 2, 1), batch=B, BC_row=dBC_row, A_channel=kind.A[0],
        A_state=kind.A[1], E=E, L=L, N=N, LENGTH=length, REVERSE=kind.reverse != bool(i),
        PARTS=parts, SIZE=SIZE,
    )  # fmt: skip


class ConvKind(NamedTuple):
    """All that distinguishes one convolution's launches from another's: types of input and weights, sizes, the distances between
    the input's rows and between a weight's channels and its taps, the directions, and how far the first one looks ahead."""

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
        """Steps whose values before SiLU a backward pass computes."""
        return self.L + self.ahead

    @property
    def parts(self) -> int:
        """Parts of the weights' gradients."""
        return self.B * ceil_div(self.steps, SEGMENT)


class ConvBackward(NamedTuple):
    """The launches of a backward pass."""

    conv: Launch
    sums: Launch


@functools.cache
def conv_forward(kind: ConvKind) -> Launch:
    """The launch of a forward pass."""
    return Launch(triton_conv.conv_forward, grid(kind.B, kind.L, kind.E, ROWS), **_conv(kind))


@functools.cache
def conv_backward(kind: ConvKind, dy0_row: int, dy1_row: int, dx_row: int) -> ConvBackward:
    """For gradients of the outputs and of the input with rows at these distances."""
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
