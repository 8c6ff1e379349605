"""S4D's convolution kernel by one launch on an NVIDIA GPU: `s4d_kernel`. Without a GPU models/s4d.py computes it by PyTorch.

Axes: H channels, M modes, L taps. Read next: triton_s4d.py.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dis_scale.process.errors import UserError
from dis_scale.scan import triton_s4d
from dis_scale.scan.triton_launch import Launch, ceil_div, next_power_of_2, plain

ROWS, COLUMNS, MOST_WARPS = 16, 64, 4
"""A warp's tile of taps, 32 in each thread, and the most warps of a program."""


class _S4DKernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, length: int, *parameters: Tensor) -> Tensor:
        H, M = parameters[1].shape
        inputs = [parameters[0].exp(), parameters[1].exp().contiguous(), *map(plain, parameters[2:])]
        K_HL = parameters[0].new_empty(H, length)
        with torch.cuda.device_of(K_HL):
            _forward_launch(K_HL.device, H, M, length)(*inputs, K_HL)
        ctx.save_for_backward(*inputs)
        return K_HL

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dK_HL: Tensor) -> tuple[Tensor | None, ...]:
        inputs = list(map(plain, ctx.saved_tensors))  # a hook may have returned copies
        (H, M), gradients = inputs[1].shape, [torch.empty_like(x) for x in inputs]
        with torch.cuda.device_of(dK_HL):
            _backward_launch(dK_HL.device, H, M, dK_HL.shape[1])(*inputs, plain(dK_HL), *gradients)
        return None, *gradients


@functools.cache
def _forward_launch(_: torch.device, H: int, M: int, length: int) -> Launch:
    tile = tile_of(length)
    grid = H, ceil_div(length, tile["ROWS"] * COLUMNS), 1
    return Launch(triton_s4d.s4d_forward, grid, L=length, M=M, **tile)


@functools.cache
def _backward_launch(_: torch.device, H: int, M: int, length: int) -> Launch:
    return Launch(triton_s4d.s4d_backward, (H, 1, 1), L=length, M=M, **tile_of(length))


def tile_of(length: int) -> dict[str, int]:
    """The tile of a program, and its warps."""
    warps = min(MOST_WARPS, next_power_of_2(ceil_div(length, ROWS * COLUMNS)))
    return {"ROWS": ROWS * warps, "COLUMNS": COLUMNS, "num_warps": warps}


def s4d_kernel(length: int, *parameters: Tensor) -> Tensor:
    """K (H, L) of log_dt (H), log_neg_re and im (H, M), B and C (H, M, 2), each with a gradient.

    UserError unless all are float32.
    """
    for x in parameters:
        if x.dtype != torch.float32:
            raise UserError(f"the triton kernel of S4D computes in float32, got {x.dtype}: set the backend to chunked")
    return _S4DKernel.apply(length, *parameters)
