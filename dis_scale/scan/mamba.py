"""The published CUDA kernels, as the public code runs them: mamba-ssm's selective scan and causal-conv1d's convolution.

The only module that imports these packages, which the `gpu` extra installs; without them its import fails. Their time axis
is last: every tensor with a time axis is copied to that layout, flipped for the reversed direction, and the result is
copied back. In half precision each direction is gated and rounded before the sum. mamba-ssm adds some gradients atomically,
so runs with this backend are not bit-equal.

Axes: B batch, L time, E channels, N states, W taps of the convolution.
"""

import torch
from causal_conv1d import causal_conv1d_fn
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
from torch import Tensor

from dis_scale.process.errors import DisScaleError, UserError
from dis_scale.scan.backend import Direction, from_one_way, refuse_float64

TAPS = (2, 3, 4)
"""Widths for which causal-conv1d has kernels."""


def problem() -> DisScaleError | None:
    """Return why the kernels do not run, or None: a package may be there without them, and would fail at its first call."""
    x_BLE, weight_EW = torch.ones(1, 8, 8, device="cuda"), torch.ones(8, TAPS[-1], device="cuda")
    bias_E = weight_EW[:, 0].contiguous()
    direction = Direction(x_BLE, x_BLE, -weight_EW, x_BLE[..., :4], x_BLE[..., :4], bias_E, bias_E)
    try:
        causal_conv_silu(x_BLE, weight_EW, bias_E, False)
        selective_scan(direction, False)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        words = f"{type(error).__name__}: {error}"
        return UserError(f"the mamba scan does not run here ({words}): docs/performance.md has how its kernels are built")
    return None


def _time_last(x_BLX: Tensor, reverse: bool) -> Tensor:
    return (x_BLX.flip(1) if reverse else x_BLX).transpose(1, 2).contiguous()


def _time_second(x_BXL: Tensor, reverse: bool) -> Tensor:
    x_BLX = x_BXL.transpose(1, 2)
    return x_BLX.flip(1) if reverse else x_BLX.contiguous()


def _gated(direction: Direction, z_BLE: Tensor | None, reverse: bool) -> Tensor:
    u, delta, A, B, C, D, bias = direction
    refuse_float64("mamba", u)
    u, delta, B, C = (_time_last(x.to(u.dtype), reverse) for x in (u, delta, B, C))
    z = None if z_BLE is None else _time_last(z_BLE.to(u.dtype), reverse)
    y = selective_scan_fn(u, delta, A.float(), B, C, D.float(), z=z, delta_bias=bias.float(), delta_softplus=True)
    return _time_second(y, reverse)


def selective_scan(direction: Direction, reverse: bool) -> Tensor:
    return _gated(direction, None, reverse)


def two_way_scan(forward: Direction, backward: Direction, z_BLE: Tensor | None) -> Tensor:
    return _gated(forward, z_BLE, False) + _gated(backward, z_BLE, True)


def causal_conv_silu(x_BLE: Tensor, weight_EW: Tensor, bias_E: Tensor, reverse: bool) -> Tensor:
    refuse_float64("mamba", x_BLE)
    if weight_EW.shape[1] not in TAPS:
        raise UserError(f"causal-conv1d takes 2, 3 or 4 taps, got {weight_EW.shape[1]}: set the backend to triton")
    x = _time_last(x_BLE, reverse)
    return _time_second(causal_conv1d_fn(x, weight_EW.to(x.dtype), bias_E.to(x.dtype), activation="silu"), reverse)


backend = from_one_way(selective_scan, causal_conv_silu)._replace(two_way_scan=two_way_scan)
