"""S4D's convolution kernel by one launch on an NVIDIA GPU: `s4d_kernel`. Without a GPU models/s4d.py computes it by PyTorch.

Axes: H channels, M modes, L taps. Read next: triton_s4d.py.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dis_scale.errors import UserError
from dis_scale.scan import triton_s4d
from dis_scale.scan.triton_launch import ceil_div, launch, next_power_of_2

ROWS, COLUMNS, MOST_WARPS = 16, 64, 4
"""A warp's tile of taps, 32 in each thread, and the most warps of a program."""


class _S4DKernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, length: int, *parameters: Tensor) -> Tensor:
        H, M = parameters[1].shape
        inputs = [parameters[0].exp(), parameters[1].exp().contiguous(), *(x.contiguous() for x in parameters[2:])]
        K_HL = parameters[0].new_empty(H, length)
        tile = tile_of(length)
        tiles = ceil_div(length, tile["ROWS"] * COLUMNS)
        launch(triton_s4d.s4d_forward, (H, tiles, 1), *inputs, K_HL, L=length, M=M, **tile)
        ctx.save_for_backward(*inputs)
        return K_HL

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dK_HL: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        (H, M), gradients = inputs[1].shape, [torch.empty_like(x) for x in inputs]
        launch(
            triton_s4d.s4d_backward, (H, 1, 1), *inputs, dK_HL.contiguous(), *gradients,
            L=dK_HL.shape[1], M=M, **tile_of(dK_HL.shape[1]),
        )  # fmt: skip
        return None, *gradients


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
