"""The Triton backend for NVIDIA GPUs: the two-way scan and the two-way convolution.

Takes float16, bfloat16 and float32 (float64 is refused), holds the state in float32, rounds outputs once. The last axis of
an input must be contiguous and its batch rows evenly spaced, as in chunks and splits of a product; anything else costs a
copy. Nothing is added atomically: gradients of B and C are summed over groups of channels, those of the parameters over
batch rows, in a buffer first; results are the same bits at each run. `TRITON_INTERPRET=1`, set before Triton is imported,
runs all of it on the CPU, slowly.

A scan is a kernel a direction; the first leaves its output to the second in float32, which adds, gates and writes, so that
nothing is flipped. Of the forward pass only the inputs are kept. The backward pass scans once more and leaves the states of
every 16th step where the gradients of u and delta will be written, so that it needs next to no memory of its own; then it
goes back through each direction alone. y's gradient before the gate is computed again for each: to keep it for the second
would move as many bytes as to read z and dy again, or in bf16 twice as many. Convolved values are computed again, too.

Axes: B batch, L time, E channels, N states, W taps of the convolution. Read next: triton_scan.py.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from dis_scale.errors import UserError
from dis_scale.scan import triton_conv, triton_scan
from dis_scale.scan.backend import Backend, Direction

LANES = 32
"""Channels a warp: one a thread. So a thread reads back what it wrote itself."""
WARPS = 4
"""Warps of a scan's program, whose parts of the gradients of B and C are summed before they leave it."""
CHUNK = LANES // 2
"""Steps between the states that are kept, as many as stand in registers: each has a lane for B's gradient and one for C's."""
ROWS = 4
"""Steps of the convolution at a time."""


def _rows(x_BLX: Tensor) -> Tensor:
    """Neighbouring channels, and rows at one distance through the whole batch: itself where it is so, a copy where not."""
    B, L, X = x_BLX.shape
    even = B == 1 or x_BLX.stride(0) == L * x_BLX.stride(1)
    return x_BLX if even and (X == 1 or x_BLX.stride(2) == 1) else x_BLX.contiguous()


def _fresh(x_BLE: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(x_BLE.shape, dtype=dtype or x_BLE.dtype, device=x_BLE.device)


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    with torch.cuda.device_of(arguments[0]):
        kernel[grid](*arguments, **constants)


def _grid(x_BLE: Tensor, channels: int, *more: int) -> tuple[int, ...]:
    return triton.cdiv(x_BLE.shape[2], channels), x_BLE.shape[0], *more


class _Operands:
    """One direction as the kernels take it."""

    def __init__(self, direction: Direction, reverse: bool):
        u, delta, A, B, C, D, bias = direction
        self.u, self.delta, self.reverse = _rows(u), _rows(delta), reverse
        A_NE = (A.float() / math.log(2)).t().contiguous()
        self.pointers = self.u, self.delta, A_NE, self._by_state(B, C), D.contiguous(), bias.contiguous()

    def _steps(self) -> slice:
        """Where the sequence lies in a whole number of chunks: at the beginning, or reversed at the end."""
        L = self.u.shape[1]
        return slice(-L, None) if self.reverse else slice(L)

    def _by_state(self, B: Tensor, C: Tensor) -> Tensor:
        """(B, 2, N, L): each state's B and C in float32, step beside step, with zeros up to a whole number of chunks."""
        batch, L, N = B.shape
        both = B.new_zeros(batch, 2, N, triton.cdiv(L, CHUNK) * CHUNK, dtype=torch.float32)
        for i, x in enumerate((B, C)):
            both[:, i, :, self._steps()] = x.transpose(1, 2)
        return both

    def from_states(self, both: Tensor) -> list[Tensor]:
        """Back from there."""
        return [x[..., self._steps()].transpose(1, 2) for x in both.unbind(1)]

    def constants(self, z: Tensor, dy: Tensor) -> dict[str, int]:
        (_, L, E), N = self.u.shape, self.pointers[2].shape[0]
        named = {"u_row": self.u, "delta_row": self.delta, "z_row": z, "dy_row": dy}
        rows = {name: x.stride(1) for name, x in named.items()}
        tile = {"LANES": LANES, "WARPS": WARPS, "CHUNK": CHUNK, "num_warps": WARPS}
        return {"E": E, "L": L, "N": N, "REVERSE": self.reverse, **rows, **tile}


class _Gradients(NamedTuple):
    """A direction's gradients of u and delta. Until they are written they have room for other things."""

    du: Tensor
    ddelta: Tensor

    def halves(self) -> tuple[Tensor, Tensor]:
        """For a float32 number a channel and step: one of them, or where they are narrow half of it in each."""
        for x in self:
            if x.dtype == torch.float32:
                return x, x
        return self.du.view(torch.int16), self.ddelta.view(torch.int16)

    def starts(self, N: int) -> tuple[tuple[Tensor, Tensor], int]:
        """For the states after each chunk, and how many rows a chunk has: its own, or of a buffer if they are too few."""
        if N <= CHUNK:
            return self.halves(), CHUNK
        B, L, E = self.du.shape
        buffer = self.du.new_empty(B, triton.cdiv(L, CHUNK), N, E, dtype=torch.float32)
        return (buffer, buffer), N


class _Scan(torch.autograd.Function):
    """`reverse` is the first direction's; a second one runs against it. z is None or the gate of both."""

    @staticmethod
    def forward(ctx: Any, reverse: bool, z: Tensor | None, *inputs: Tensor) -> Tensor:
        ways = _ways(reverse, inputs)
        out, gate = _fresh(ways[0].u), ways[0].u if z is None else _rows(z)
        sums = _fresh(out, torch.float32) if len(ways) == 2 else out
        for i, way in enumerate(ways):
            _launch(
                triton_scan.scan_forward, _grid(out, LANES * WARPS), *way.pointers, gate, gate, out, sums, sums, sums, sums,
                **way.constants(gate, gate), LEAVE=i + 1 < len(ways), JOIN=i > 0, GATED=z is not None,
                AGAIN=False, ROOM=CHUNK,
            )  # fmt: skip
        ctx.reverse = reverse
        ctx.save_for_backward(z, *inputs)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        z, *inputs = ctx.saved_tensors
        ways, dy, dz = _ways(ctx.reverse, inputs), _rows(dy), None if z is None else _fresh(z)
        rooms = [_Gradients(_fresh(way.u), _fresh(way.delta)) for way in ways]
        gradients: list[Tensor] = []
        z = None if z is None else _rows(z)
        for i, (way, room) in enumerate(zip(ways, rooms, strict=True)):
            turn = {"LEAVE": dz is not None and i + 1 < len(ways), "JOIN": dz is not None and i > 0}
            found = _one_way_gradients(way, z, dy, dz, room, rooms[-1].halves(), turn)
            gradients += [g.to(x.dtype) for g, x in zip(found, inputs[7 * i : 7 * i + 7], strict=True)]
        return None, dz, *gradients


def _ways(reverse: bool, inputs: Sequence[Tensor]) -> list[_Operands]:
    starts = range(0, len(inputs), 7)
    return [_Operands(Direction(*inputs[i : i + 7]), reverse != bool(i)) for i in starts]


def _one_way_gradients(
    way: _Operands, z: Tensor | None, dy: Tensor, dz: Tensor | None, room: _Gradients, y: tuple[Tensor, Tensor],
    turn: dict[str, bool],
) -> list[Tensor]:  # fmt: skip
    """A direction's gradients in its order; `y` is where the first one leaves its output to the second, which writes dz."""
    B, N, E = way.u.shape[0], *way.pointers[2].shape
    gate, grid = dy if z is None else z, _grid(way.u, LANES * WARPS)
    starts, rows = room.starts(N)
    constants = way.constants(gate, dy) | {"GATED": z is not None, "ROOM": rows}
    _launch(
        triton_scan.scan_forward, grid, *way.pointers, gate, dy, dy if dz is None else dz, *y, *starts,
        **constants, **turn, AGAIN=True,
    )  # fmt: skip
    wide = functools.partial(torch.empty, dtype=torch.float32, device=way.u.device)
    warp_sums, dBC = wide(*grid, N, WARPS * LANES), wide(grid[0], *way.pointers[3].shape)
    parameters = wide(B, 2 * N + 2, E)
    _launch(
        triton_scan.scan_backward, grid, *way.pointers, gate, dy, *starts, warp_sums, *room, dBC, parameters,
        **constants, STATES=triton.next_power_of_2(N),
    )  # fmt: skip
    dA, dD, dbias = parameters[:, : N + 2].sum(0).split((N, 1, 1))
    return [*room, dA.t(), *way.from_states(dBC.sum(0)), dD[0], dbias[0]]


class _Conv(torch.autograd.Function):
    """Looks back with the first weight and bias, on with the second; None where a direction is not wanted."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor | None) -> tuple[Tensor | None, ...]:
        x, pointers = _rows(x), _conv_pointers(weights)
        ways = {"BACK": weights[0] is not None, "ON": weights[2] is not None}
        outs = [_fresh(x) if way else None for way in ways.values()]
        _launch(
            triton_conv.conv_forward, _grid(x, LANES, triton.cdiv(x.shape[1], ROWS)),
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
        pointers, dx = _conv_pointers(weights), _fresh(x)
        rows = [x if dy is None else _rows(dy) for dy in dys]
        taps = pointers[0].shape[1]
        sums = [x.new_empty(x.shape[0], x.shape[2], taps + 1, dtype=torch.float32) for _ in rows]
        _launch(
            triton_conv.conv_backward, _grid(x, LANES),
            x, *pointers, *rows, dx, *sums, x.stride(1), *(dy.stride(1) for dy in rows), x.shape[2], x.shape[1],
            **ctx.ways, ROWS=ROWS, LANES=LANES, TAPS=taps, num_warps=LANES // 32,
        )  # fmt: skip
        gradients: list[Tensor | None] = [dx]
        for i, total in enumerate(sums):
            weight, bias = weights[2 * i : 2 * i + 2]
            if weight is None:
                gradients += [None, None]
            else:
                both = total.sum(0)
                gradients += [both[:, :taps].to(weight.dtype), both[:, taps].to(bias.dtype)]
        return tuple(gradients)


def _conv_pointers(weights: Sequence[Tensor | None]) -> list[Tensor]:
    """An unwanted direction's weights are never read: the other's stand in."""
    there = [w.contiguous() for w in weights if w is not None]
    return (there * 2)[:4]


def _check(*tensors: Tensor | None) -> None:
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
