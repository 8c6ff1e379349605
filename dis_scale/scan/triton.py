"""The Triton backend for NVIDIA GPUs: the two-way scan and the two-way convolution, each one kernel a pass.

Takes float16, bfloat16 and float32 (float64 is refused), holds the state in float32, rounds outputs once. The last axis of
an input must be contiguous and its batch rows evenly spaced, as in chunks and splits of a product; anything else costs a
copy. Nothing is added atomically: gradients of B and C are summed over groups of channels, those of the parameters over
batch rows, in a buffer first; results are the same bits at each run. `TRITON_INTERPRET=1`, set before Triton is imported,
runs all of it on the CPU, slowly.

The two directions of a channel go towards each other in one loop: where the second to come to a step finds the first's
output, it adds, gates and writes, so that z is read once and nothing is flipped. The backward pass goes through each
direction alone, from states that the forward pass kept; convolved values are computed again.

Axes: B batch, L time, E channels, N states, W taps of the convolution, K chunks. Read next: triton_kernels.py.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from dis_scale.errors import UserError
from dis_scale.scan import triton_kernels as kernels
from dis_scale.scan.backend import Backend, Direction

LANES = 32
"""Channels a program: one a thread of one warp. So a thread reads back what it wrote itself, and sums need no barrier."""
CHUNK = 12
"""Steps between the states that the forward pass keeps; the backward pass holds as many in registers."""
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
    """`reverse` is the first direction's; a second one runs against it. z is None or the gate of both.

    Without `keep` nothing is held for a backward pass.
    """

    @staticmethod
    def run(reverse: bool, z: Tensor | None, *inputs: Tensor) -> Tensor:
        wanted = any(x is not None and x.requires_grad for x in (z, *inputs))
        return _Scan.apply(reverse, torch.is_grad_enabled() and wanted, z, *inputs)

    @staticmethod
    def forward(ctx: Any, reverse: bool, keep: bool, z: Tensor | None, *inputs: Tensor) -> Tensor:
        ways = [_Operands(Direction(*inputs[i : i + 7])) for i in range(0, len(inputs), 7)]
        first, last, two_way = ways[0], ways[-1], len(ways) == 2
        starts = [way.starts(keep) for way in ways]
        out, sums = _fresh(first.u), _fresh(first.u, torch.float32) if two_way else first.u
        gate = first.u if z is None else _rows(z)
        sizes, constants = _sizes(first)
        _launch(
            kernels.scan_forward, _grid(first.u),
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
        return None, None, dz, *gradients


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
    _launch(
        kernels.scan_backward, _grid(way.u),
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
        x, pointers = _rows(x), _conv_pointers(weights)
        ways = {"BACK": weights[0] is not None, "ON": weights[2] is not None}
        outs = [_fresh(x) if way else None for way in ways.values()]
        _launch(
            kernels.conv_forward, _grid(x, triton.cdiv(x.shape[1], ROWS)),
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
            kernels.conv_backward, _grid(x),
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
    return _Scan.run(reverse, None, *direction)


def _two_way_scan(forward: Direction, backward: Direction, z_BLE: Tensor | None) -> Tensor:
    _check(*forward, *backward, z_BLE)
    return _Scan.run(False, z_BLE, *forward, *backward)


def _causal_conv_silu(x_BLE: Tensor, weight_EW: Tensor, bias_E: Tensor, reverse: bool) -> Tensor:
    _check(x_BLE, weight_EW, bias_E)
    weights = (None, None, weight_EW, bias_E) if reverse else (weight_EW, bias_E, None, None)
    return _Conv.apply(x_BLE, *weights)[int(reverse)]


def _two_way_conv_silu(x_BLE: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
    _check(x_BLE, *weights)
    return _Conv.apply(x_BLE, *weights)


backend = Backend(_selective_scan, _two_way_scan, _causal_conv_silu, _two_way_conv_silu)
