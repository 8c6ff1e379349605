"""The norms of norms.py by Triton, with one kernel for each pass. For the backward pass, the gated norm keeps its inputs, and the
added norm keeps their sum, which is one of its outputs. All runs give the same bits.

Axes: B batch, L time, E or D channels, G groups of rows. Read next: triton_norm_kernels.py.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dis_scale.scan import triton_norm_kernels as kernels
from dis_scale.scan.backend import differentiable_once, refuse_float64
from dis_scale.scan.norms import EPS
from dis_scale.scan.triton_launch import Launch, ceil_div, empty_like, next_power_of_2, plain, rowwise

ROWS = 16
"""Rows of a program of the backward pass. The program sums their part of the weight's gradient."""


def gated_rms_norm(y_BLE: Tensor, z_BLE: Tensor, weight_E: Tensor) -> Tensor:
    """Compute `norms.gated_rms_norm` with sums in float32."""
    refuse_float64("triton", y_BLE)
    out_BLE: Tensor = _GatedNorm.apply(y_BLE, z_BLE.to(y_BLE.dtype), weight_E.float())
    return out_BLE


def added_rms_norm(
    r_BLD: Tensor, h_BLD: Tensor, weight_D: Tensor, places: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Compute `norms.added_rms_norm` of a float32 stream. The kernels read and write at the places, so these move no more data."""
    both: tuple[Tensor, Tensor] = _AddedNorm.apply(r_BLD, h_BLD, weight_D.float(), *(places or (None, None)))
    return both


class NormKind(NamedTuple):
    """Properties of a call that determine its launches. `distances` are the row distances of the tensors that the kernel reads."""

    device: torch.device
    dtypes: tuple[torch.dtype, ...]
    rows: int
    """Rows of all images."""
    E: int
    distances: tuple[int, ...]

    @classmethod
    def of(cls, *read_BLE: Tensor) -> "NormKind":
        """Return the kind of a call that reads these tensors: both inputs, and in a backward pass also the output's gradient."""
        (B, L, E), device = read_BLE[0].shape, read_BLE[0].device
        return cls(device, tuple([x.dtype for x in read_BLE]), B * L, E, tuple([x.stride(1) for x in read_BLE]))


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_BLE: Tensor, z_BLE: Tensor, weight_E: Tensor) -> Tensor:
        ctx.save_for_backward(y_BLE, z_BLE, weight_E)
        with torch.cuda.device_of(y_BLE):
            return run_gated_norm(rowwise(y_BLE), rowwise(z_BLE), plain(weight_E))

    @staticmethod
    @differentiable_once("triton norm")
    def backward(ctx: Any, dout_BLE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y_BLE, z_BLE, weight_E = ctx.saved_tensors
        with torch.cuda.device_of(dout_BLE):
            y_BLE, z_BLE, dz_BLE = rowwise(y_BLE), rowwise(z_BLE), empty_like(y_BLE)
            dy_BLE, dweight_E = run_gated_norm_backward(y_BLE, z_BLE, rowwise(dout_BLE), plain(weight_E), dz_BLE)
            return dy_BLE, dz_BLE, dweight_E


def run_gated_norm(y_BLE: Tensor, z_BLE: Tensor, weight_E: Tensor) -> Tensor:
    """Launch a forward pass for inputs in the kernel's layout; return the output."""
    out_BLE = empty_like(y_BLE)
    _forward(kernels.gated_norm, NormKind.of(y_BLE, z_BLE))(y_BLE, z_BLE, weight_E, out_BLE)
    return out_BLE


def run_gated_norm_backward(
    y_BLE: Tensor, z_BLE: Tensor, dout_BLE: Tensor, weight_E: Tensor, dz_BLE: Tensor
) -> tuple[Tensor, Tensor]:
    """Store the gate's gradient in `dz_BLE`; return the gradients of y and of the weight."""
    launch = _backward(kernels.gated_norm_backward, NormKind.of(y_BLE, z_BLE, dout_BLE), dz_row=dz_BLE.stride(1))
    parts_GE, dy_BLE = weight_E.new_empty(launch.grid[0], len(weight_E)), empty_like(y_BLE)
    launch(y_BLE, z_BLE, dout_BLE, weight_E, dy_BLE, dz_BLE, parts_GE)
    return dy_BLE, parts_GE.sum(0)


class _AddedNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, r_BLD: Tensor, h_BLD: Tensor, weight_D: Tensor, place_L: Tensor | None, order_L: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        with torch.cuda.device_of(r_BLD):
            r_BLD, h_BLD = rowwise(r_BLD), rowwise(h_BLD)
            sum_BLD, out_BLD = empty_like(r_BLD), empty_like(h_BLD)
            launch = _forward(kernels.added_norm, NormKind.of(r_BLD, h_BLD), L=_tokens(order_L))
            launch(r_BLD, h_BLD, plain(weight_D), sum_BLD, out_BLD, place_L, order_L)
        ctx.save_for_backward(sum_BLD, weight_D, place_L, order_L)
        return sum_BLD, out_BLD

    @staticmethod
    @differentiable_once("triton norm")
    def backward(ctx: Any, dsum_BLD: Tensor, dout_BLD: Tensor) -> tuple[Tensor | None, ...]:
        r_BLD, weight_D, place_L, order_L = ctx.saved_tensors
        with torch.cuda.device_of(r_BLD):
            r_BLD, dsum_BLD, dout_BLD = rowwise(r_BLD), rowwise(dsum_BLD), rowwise(dout_BLD)
            dr_BLD, dh_BLD = empty_like(r_BLD), empty_like(dout_BLD)
            kind = NormKind.of(r_BLD, dsum_BLD, dout_BLD)
            launch = _backward(kernels.added_norm_backward, kind, L=_tokens(order_L))
            parts_GD = weight_D.new_empty(launch.grid[0], len(weight_D))
            launch(r_BLD, dsum_BLD, dout_BLD, plain(weight_D), dr_BLD, dh_BLD, parts_GD, place_L, order_L)
            return dr_BLD, dh_BLD, parts_GD.sum(0), None, None


def _tokens(order_L: Tensor | None) -> int:
    """Return the number of tokens of an image if there is an order, otherwise 0."""
    return 0 if order_L is None else len(order_L)


@functools.cache
def _forward(kernel: Any, kind: NormKind, **numbers: int) -> Launch:
    """Return the launch of a forward pass, with one program per row."""
    return _launch(kernel, kind, kind.rows, **numbers)


@functools.cache
def _backward(kernel: Any, kind: NormKind, **numbers: int) -> Launch:
    return _launch(kernel, kind, ceil_div(kind.rows, ROWS), count=kind.rows, ROWS=ROWS, **numbers)


def _launch(kernel: Any, kind: NormKind, programs: int, **numbers: float) -> Launch:
    numbers |= zip(("first_row", "second_row", "dout_row"), kind.distances, strict=False)
    size = next_power_of_2(kind.E)
    return Launch(kernel, (programs, 1, 1), E=kind.E, EPS=EPS, SIZE=size, num_warps=8, **numbers)
