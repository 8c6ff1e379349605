"""The scan in plain PyTorch, for any device and dtype: used without a compiler and on devices without a kernel.

It processes time in chunks. Everything that needs no state is computed for a whole chunk at once, so that Python makes one
call per step instead of ten. A chunk's tensors fit a processor's cache. Autograd sees none of them: the backward pass
recomputes them from the state at the chunk's beginning, so that only N / STEPS of u's size is kept. Differentiable once.

Axes: B batch, L time, T the steps of a chunk, E channels, N states. Time comes first inside.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dis_scale.scan.backend import Direction, differentiable_once, from_one_way
from dis_scale.scan.reference import causal_conv_silu

STEPS = 8
"""Steps of a chunk: 1.5 MB per tensor for four images at DiS-S/2."""


def selective_scan(direction: Direction, reverse: bool) -> Tensor:
    """The scan, as defined by reference.selective_scan."""
    state = torch.promote_types(direction.u_BLE.dtype, torch.float32)
    u, raw, A, B, C, D, bias = (x.to(state) for x in direction)
    delta = F.softplus(raw + bias)
    times = [(x.flip(1) if reverse else x).transpose(0, 1) for x in (delta, delta * u, B, C)]
    y_BLE: Tensor = _Recurrence.apply(A, *times).transpose(0, 1)
    return ((y_BLE.flip(1) if reverse else y_BLE) + D * u).to(direction.u_BLE.dtype)


class _Recurrence(torch.autograd.Function):
    """y_t = C_t . h_t of h_t = exp(delta_t A) h_{t-1} + x_t B_t, with x = delta u."""

    @staticmethod
    def forward(ctx: Any, A_EN: Tensor, *times: Tensor) -> Tensor:
        y_LBE, starts, buffers = torch.empty_like(times[0]), [], _buffers(3, times[0], A_EN)
        h_BEN = A_EN.new_zeros(times[0].shape[1], *A_EN.shape)
        for chunk in _chunks(y_LBE):
            delta, x, B, C = (each[chunk] for each in times)
            decays, states, scratch = (each[: len(x)] for each in buffers)
            starts.append(h_BEN)
            _recompute_states(h_BEN, delta, x, A_EN, B, decays, states)
            h_BEN = states[-1].clone()
            y_LBE[chunk] = _over_states(states, C[:, :, None], scratch)
        ctx.save_for_backward(A_EN, *times, *starts)
        return y_LBE

    @staticmethod
    @differentiable_once("chunked scan")
    def backward(ctx: Any, dy_LBE: Tensor) -> tuple[Tensor, ...]:
        A_EN, *rest = ctx.saved_tensors  # once: a recomputed block unpacks them once
        times, starts = rest[:4], rest[4:]
        dA_EN, gradients = torch.zeros_like(A_EN), [torch.empty_like(each) for each in times]
        carry_BEN, buffers = torch.zeros_like(starts[0]), _buffers(4, dy_LBE, A_EN)
        for chunk, start_BEN in reversed(list(zip(_chunks(dy_LBE), starts, strict=True))):
            dy, delta, x, B, C = (each[chunk] for each in (dy_LBE, *times))
            decays, states, dh, scratch = (each[: len(dy)] for each in buffers)
            _recompute_states(start_BEN, delta, x, A_EN, B, decays, states)
            _backpropagate_states(carry_BEN, dy, decays, C, dh)
            torch.mul(decays[0], dh[0], out=carry_BEN)
            exponents = decays.mul_(dh)  # from here on: gradient of delta A
            exponents[0] *= start_BEN
            exponents[1:] *= states[:-1]
            dA_EN += torch.mul(exponents, delta[..., None], out=scratch).sum((0, 1))
            d_delta, dx = _over_states(exponents, A_EN, scratch), _over_states(dh, B[:, :, None], scratch)
            parts = d_delta, dx, _over_channels(x, dh), _over_channels(dy, states)
            for gradient, part in zip(gradients, parts, strict=True):
                gradient[chunk] = part
        return dA_EN, *gradients


def _chunks(x_LBE: Tensor) -> Iterator[slice]:
    return (slice(first, first + STEPS) for first in range(0, len(x_LBE), STEPS))


def _buffers(count: int, x_LBE: Tensor, A_EN: Tensor) -> list[Tensor]:
    """Buffers for a chunk's (T, B, E, N) tensors, allocated once: fresh pages for each chunk would cost more than the scan."""
    steps = min(STEPS, len(x_LBE))
    return [A_EN.new_empty(steps, x_LBE.shape[1], *A_EN.shape) for _ in range(count)]


def _recompute_states(
    h_BEN: Tensor, delta_TBE: Tensor, x_TBE: Tensor, A_EN: Tensor, B_TBN: Tensor, decays: Tensor, states: Tensor
) -> None:
    """Compute a chunk's decays and, from the state h before it, its states."""
    torch.mul(delta_TBE[..., None], A_EN, out=decays).exp_()
    torch.mul(x_TBE[..., None], B_TBN[:, :, None], out=states)
    for decay, state in zip(decays.unbind(), states.unbind(), strict=True):
        h_BEN = state.addcmul_(decay, h_BEN)


def _backpropagate_states(carry_BEN: Tensor, dy_TBE: Tensor, decays: Tensor, C_TBN: Tensor, dh: Tensor) -> None:
    """Compute the gradients of a chunk's states; `carry` is the gradient from the next chunk."""
    torch.mul(dy_TBE[..., None], C_TBN[:, :, None], out=dh)
    dh[-1] += carry_BEN
    steps, factors = dh.unbind(), decays.unbind()
    for t in reversed(range(len(steps) - 1)):
        steps[t].addcmul_(factors[t + 1], steps[t + 1])


def _over_states(x_TBEN: Tensor, weights: Tensor, scratch: Tensor) -> Tensor:
    """Weighted sum over states, (T, B, E). A product with ones is the fastest way to add 16 neighbours."""
    return (torch.mul(x_TBEN, weights, out=scratch) @ x_TBEN.new_ones(x_TBEN.shape[-1], 1))[..., 0]


def _over_channels(weights_TBE: Tensor, x_TBEN: Tensor) -> Tensor:
    """Weighted sum over channels, (T, B, N)."""
    return (weights_TBE[:, :, None] @ x_TBEN)[:, :, 0]


backend = from_one_way(selective_scan, causal_conv_silu)
