"""The definition of the scan and of the convolution: plain loops, float32 state (float64 for float64 inputs).

For reading and for tests: every other backend is tested against this one. Read next: native.py.

Axes: B batch, L time, E channels, N states, W taps of the convolution. Symbols as in Gu and Dao 2023, Algorithm 2.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dis_scale.scan.backend import Direction, from_one_way


def selective_scan(direction: Direction, reverse: bool) -> Tensor:
    """h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t;  y_t = C_t . h_t + D u_t;  delta = softplus(raw + bias)."""
    state = torch.promote_types(direction.u_BLE.dtype, torch.float32)
    u, raw, A, B, C, D, bias = (x.to(state) for x in direction)
    steps = list(zip(u.unbind(1), F.softplus(raw + bias).unbind(1), B.unbind(1), C.unbind(1), strict=True))
    h_BEN, y = u.new_zeros(u.shape[0], *A.shape), []
    for u_BE, delta_BE, B_BN, C_BN in reversed(steps) if reverse else steps:
        h_BEN = torch.exp(delta_BE[..., None] * A) * h_BEN + (delta_BE * u_BE)[..., None] * B_BN[:, None]
        y.append((h_BEN * C_BN[:, None]).sum(-1) + D * u_BE)
    return torch.stack(y[::-1] if reverse else y, dim=1).to(direction.u_BLE.dtype)


def causal_conv_silu(x_BLE: Tensor, weight_EW: Tensor, bias_E: Tensor, reverse: bool) -> Tensor:
    """SiLU(bias + sum over k of weight[:, k] x[t - (W - 1) + k]), zeros outside; if reversed, x[t + (W - 1) - k]."""
    state = torch.promote_types(x_BLE.dtype, torch.float32)
    taps, length = weight_EW.shape[1], x_BLE.shape[1]
    weight_EW = weight_EW.to(state)
    padded = F.pad(x_BLE.to(state), (0, 0, 0, taps - 1) if reverse else (0, 0, taps - 1, 0))
    y_BLE = bias_E.to(state).expand(x_BLE.shape)
    for k in range(taps):
        y_BLE = y_BLE + weight_EW[:, taps - 1 - k if reverse else k] * padded[:, k : k + length]
    return F.silu(y_BLE).to(x_BLE.dtype)


backend = from_one_way(selective_scan, causal_conv_silu)
