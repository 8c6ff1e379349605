"""The scan in plain PyTorch, for any device and dtype: about 2 sqrt(L) steps in Python instead of L.

The sequence is cut into chunks of about sqrt(L) steps. All chunks go through their own steps at once, each from a zero
state; then one pass over the chunks carries the states across. Only decays over one step or several are ever taken,
exp of numbers that are never positive, so nothing overflows however long the sequence. It holds O(B L E N) memory.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dis_scale.scan.backend import Direction, from_one_way
from dis_scale.scan.reference import causal_conv_silu


def selective_scan(direction: Direction, reverse: bool) -> Tensor:
    """As the reference's; K chunks of T steps, the last one filled up by steps of length zero."""
    state = torch.promote_types(direction.u_BLE.dtype, torch.float32)
    u, raw, A, B, C, D, bias = (x.to(state) for x in direction)
    length = u.shape[1]
    steps = math.isqrt(length - 1) + 1

    def chunks(x_BLX: Tensor) -> Tensor:
        x_BLX = F.pad(x_BLX.flip(1) if reverse else x_BLX, (0, 0, 0, -length % steps))
        return x_BLX.unflatten(1, (-1, steps))

    delta = F.softplus(raw + bias)
    delta_BKTE, input_BKTE, B_BKTN, C_BKTN = chunks(delta), chunks(delta * u), chunks(B), chunks(C)
    decay_BKTEN = torch.exp(delta_BKTE[..., None] * A)
    h_BKTEN = _scan(decay_BKTEN, input_BKTE[..., None] * B_BKTN[..., None, :], dim=2)
    past_BKTEN = torch.exp(delta_BKTE.cumsum(2)[..., None] * A)
    ends_BKEN = _scan(past_BKTEN[:, :, -1], h_BKTEN[:, :, -1], dim=1)
    starts_BKEN = F.pad(ends_BKEN[:, :-1], (0, 0, 0, 0, 1, 0))
    h_BKTEN = h_BKTEN + past_BKTEN * starts_BKEN[:, :, None]
    y_BLE = torch.einsum("bkten,bktn->bkte", h_BKTEN, C_BKTN).flatten(1, 2)[:, :length]
    return ((y_BLE.flip(1) if reverse else y_BLE) + D * u).to(direction.u_BLE.dtype)


def _scan(decay: Tensor, inputs: Tensor, dim: int) -> Tensor:
    """h_t = decay_t h_{t-1} + inputs_t along `dim`."""
    decays, (first, *rest) = decay.unbind(dim), inputs.unbind(dim)
    h = [first]
    for decay_t, input_t in zip(decays[1:], rest, strict=True):
        h.append(decay_t * h[-1] + input_t)
    return torch.stack(h, dim)


backend = from_one_way(selective_scan, causal_conv_silu)
