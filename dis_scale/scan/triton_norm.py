"""The norm behind a gate by Triton: one kernel for each pass, which keeps only its inputs. Every run has the same bits.

Axes: B batch, L time, E channels, G groups of rows. Read next: triton_norm_kernels.py.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dis_scale.scan import triton_norm_kernels as kernels
from dis_scale.scan.gated_norm import EPS
from dis_scale.scan.triton_launch import Launch, ceil_div, next_power_of_2, plain, rowwise

ROWS = 16
"""Of a program of the backward pass, which adds up their part of the weight's gradient."""


def gated_rms_norm(y_BLE: Tensor, z_BLE: Tensor, weight_E: Tensor) -> Tensor:
    """`gated_norm.gated_rms_norm` with sums in float32."""
    out_BLE: Tensor = _GatedNorm.apply(y_BLE, z_BLE.to(y_BLE.dtype), weight_E.float())
    return out_BLE


class NormKind(NamedTuple):
    """All that distinguishes one call's launches from another's."""

    device: torch.device
    dtype: torch.dtype
    rows: int
    """Rows of all images."""
    E: int
    y_row: int
    z_row: int

    @classmethod
    def of(cls, y_BLE: Tensor, z_BLE: Tensor) -> "NormKind":
        B, L, E = y_BLE.shape
        return cls(y_BLE.device, y_BLE.dtype, B * L, E, y_BLE.stride(1), z_BLE.stride(1))


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_BLE: Tensor, z_BLE: Tensor, weight_E: Tensor) -> Tensor:
        ctx.save_for_backward(y_BLE, z_BLE, weight_E)
        with torch.cuda.device_of(y_BLE):
            y_BLE, z_BLE = rowwise(y_BLE), rowwise(z_BLE)
            out_BLE = torch.empty_like(y_BLE, memory_format=torch.contiguous_format)
            _forward(NormKind.of(y_BLE, z_BLE))(y_BLE, z_BLE, plain(weight_E), out_BLE)
            return out_BLE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_BLE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y_BLE, z_BLE, weight_E = ctx.saved_tensors
        with torch.cuda.device_of(dout_BLE):
            y_BLE, z_BLE, dout_BLE = rowwise(y_BLE), rowwise(z_BLE), rowwise(dout_BLE)
            dy_BLE, dz_BLE = (torch.empty_like(y_BLE, memory_format=torch.contiguous_format) for _ in range(2))
            launch = _backward(NormKind.of(y_BLE, z_BLE), dout_BLE.stride(1))
            parts_GE = weight_E.new_empty(launch.grid[0], len(weight_E))
            launch(y_BLE, z_BLE, dout_BLE, plain(weight_E), dy_BLE, dz_BLE, parts_GE)
            return dy_BLE, dz_BLE, parts_GE.sum(0)


@functools.cache
def _forward(kind: NormKind) -> Launch:
    """With a program for each row."""
    return _launch(kernels.gated_norm, kind, kind.rows, y_row=kind.y_row, z_row=kind.z_row)


@functools.cache
def _backward(kind: NormKind, dout_row: int) -> Launch:
    numbers = {"y_row": kind.y_row, "z_row": kind.z_row, "dout_row": dout_row, "COUNT": kind.rows, "ROWS": ROWS}
    return _launch(kernels.gated_norm_backward, kind, ceil_div(kind.rows, ROWS), **numbers)


def _launch(kernel: Any, kind: NormKind, programs: int, **numbers: int) -> Launch:
    return Launch(kernel, (programs, 1, 1), E=kind.E, EPS=EPS, SIZE=next_power_of_2(kind.E), num_warps=8, **numbers)
