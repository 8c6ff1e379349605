"""DiS's two-way mixer by Triton: one autograd function around the launches of triton.py and PyTorch's products.

Compared with one function for each part, Python launches two thirds as much, and the GPU copies less. One batched product computes
both directions. The gradients of x and z are halves of one tensor. u has two gradients: the product that computes the second one
adds it to the first. Each weight is rounded once.

Axes: B batch, L time, D width, E channels, N states, R rank of the time step, X rows of a parameter. Read first: triton.py.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dis_scale.scan.backend import Direction, differentiable_once, keeps_states
from dis_scale.scan.triton import BackwardPass, Operands, run_conv, run_conv_backward, run_scan, run_scan_backward
from dis_scale.scan.triton_launch import ALIGNMENT, check_offsets, of_training
from dis_scale.scan.triton_memory import Gradients, KeptStates, ScanGradients


def takes(h_BLD: Tensor, weights: Sequence[Tensor]) -> bool:
    """Return whether `mixer` supports these tensors: all directions and halves begin aligned, and types are those of training."""
    in_proj, conv, _, _, dynamics, _ = weights
    aligned = not (conv.data_ptr() | dynamics.data_ptr()) % ALIGNMENT
    return aligned and of_training(h_BLD, weights, in_proj.shape[0] // 2)


def mixer(h_BLD: Tensor, *weights: Tensor) -> Tensor:
    """Compute the mixer's output. `weights` are s6.Mixer's in_proj, conv, x_proj, dt_proj, dynamics and out_proj."""
    out_BLD: Tensor = _Mixer.apply(h_BLD, *weights)
    return out_BLD


class _Mixer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h_BLD: Tensor,
        in_proj: Tensor,
        conv_2XE: Tensor,
        x_proj: Tensor,
        dt_proj: Tensor,
        dynamics_2XE: Tensor,
        out_proj: Tensor,
    ) -> Tensor:
        (B, L, D), E, R = h_BLD.shape, dynamics_2XE.shape[2], dt_proj.shape[2]
        check_offsets(L, 2 * E)
        rounded = [weight.to(h_BLD.dtype) for weight in (in_proj, x_proj, dt_proj, out_proj)]
        h_TD = h_BLD.reshape(B * L, D)
        xz_BLE = (h_TD @ rounded[0].T).view(B, L, 2 * E)
        u_2BLE = h_BLD.new_empty(2, B, L, E)
        with torch.cuda.device_of(h_BLD):
            run_conv(xz_BLE[..., :E], _taps(conv_2XE), u_2BLE.unbind())
            projected_2TP = torch.bmm(u_2BLE.view(2, B * L, E), rounded[1].mT)
            delta_2BLE = torch.bmm(projected_2TP[..., :R], rounded[2].mT).view(2, B, L, E)
            A_2NE = dynamics_2XE[:, :-2].exp().neg_()
            inputs = u_2BLE, delta_2BLE, A_2NE.mT, *_columns(projected_2TP, B, R), *_vectors(dynamics_2XE)
            directions = [Direction(*each) for each in _by_direction(*inputs)]
            keep = any(ctx.needs_input_grad) and keeps_states()
            y_BLE, ctx.kind, operands, kept = run_scan(xz_BLE[..., E:], directions, keep)
            out_BLD = (y_BLE.view(B * L, E) @ rounded[3].T).view(B, L, D)
        BC = [x.BC for x in operands]
        ctx.save_for_backward(
            h_TD, xz_BLE, u_2BLE, projected_2TP, delta_2BLE, A_2NE, y_BLE, *BC, conv_2XE, dynamics_2XE, *rounded,
            kept.y, *kept.states,
        )  # fmt: skip
        return out_BLD

    @staticmethod
    @differentiable_once("triton scan")
    def backward(ctx: Any, dout_BLD: Tensor) -> tuple[Tensor, ...]:
        h_TD, xz_BLE, u_2BLE, projected_2TP, delta_2BLE, A_2NE, y_BLE, *saved = ctx.saved_tensors
        BC, (conv_2XE, dynamics_2XE, *rounded), (kept_y, *states) = saved[:2], saved[2:8], saved[8:]
        (_, B, L, E), R = u_2BLE.shape, rounded[2].shape[2]
        inputs = _by_direction(u_2BLE, delta_2BLE, A_2NE.mT, *_vectors(dynamics_2XE))
        operands = [Operands(u, delta, A, BC_i, D, bias) for (u, delta, A, D, bias), BC_i in zip(inputs, BC, strict=True)]
        dout_TD, kept = dout_BLD.reshape(B * L, -1), KeptStates(states, kept_y)
        with torch.cuda.device_of(dout_BLD):
            dy_TE = dout_TD @ rounded[3]
            dxz_BLE, dprojected_2TP = torch.empty_like(xz_BLE), torch.empty_like(projected_2TP)
            du_2BLE, ddelta_2BLE = torch.empty_like(u_2BLE), torch.empty_like(delta_2BLE)
            dconv_2XE, ddynamics_2XE = torch.empty_like(conv_2XE), torch.empty_like(dynamics_2XE)
            outs = ddynamics_2XE[:, :-2].mT, *_columns(dprojected_2TP, B, R), *_vectors(ddynamics_2XE)
            memory = [Gradients(*each) for each in _by_direction(du_2BLE, ddelta_2BLE)]
            into = [ScanGradients(x, *each) for x, each in zip(memory, _by_direction(*outs), strict=True)]
            x_BLE, z_BLE = xz_BLE.chunk(2, -1)
            dx_BLE, dz_BLE = dxz_BLE.chunk(2, -1)
            run_scan_backward(ctx.kind, BackwardPass(z_BLE, operands, dy_TE.view(B, L, E), kept, dz_BLE, into))
            ddynamics_2XE[:, :-2].mul_(A_2NE)  # from the gradient of A to that of log(-A)
            du_2TE, ddelta_2TE, u_2TE = (x.view(2, B * L, E) for x in (du_2BLE, ddelta_2BLE, u_2BLE))
            dprojected_2TP[..., :R] = torch.bmm(ddelta_2TE, rounded[2])
            du_2TE.baddbmm_(dprojected_2TP, rounded[1])
            run_conv_backward(x_BLE, _taps(conv_2XE), [x.du for x in memory], dx_BLE, _taps(dconv_2XE))
            dxz_TE = dxz_BLE.view(B * L, 2 * E)
            dweights = (
                dxz_TE.T @ h_TD,
                torch.bmm(dprojected_2TP.mT, u_2TE),
                torch.bmm(ddelta_2TE.mT, projected_2TP[..., :R]),
                dout_TD.T @ y_BLE.view(B * L, E),
            )
            din, dx_proj, ddt_proj, dout_proj = (x.to(conv_2XE.dtype) for x in dweights)
            dh_BLD = (dxz_TE @ rounded[0]).view_as(dout_BLD)
        return dh_BLD, din, dconv_2XE, dx_proj, ddt_proj, ddynamics_2XE, dout_proj


def _taps(conv_2XE: Tensor) -> list[Tensor]:
    """Return the convolution's weight (E, W) and bias (E) of each direction, W taps."""
    return [x for pair in _by_direction(conv_2XE[:, :-1].mT, conv_2XE[:, -1]) for x in pair]


def _by_direction(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Return the forward direction's part of each tensor, and the backward direction's parts."""
    return list(zip(*[x.unbind() for x in tensors], strict=True))


def _vectors(dynamics_2XE: Tensor) -> tuple[Tensor, Tensor]:
    """Return both directions' D, and both directions' bias of the step."""
    return dynamics_2XE[:, -2], dynamics_2XE[:, -1]


def _columns(projected_2TP: Tensor, B: int, R: int) -> tuple[Tensor, ...]:
    """Return both directions' B and both directions' C, each (2, B, L, N), from the columns after those of the step."""
    return projected_2TP.view(2, B, -1, projected_2TP.shape[2])[..., R:].chunk(2, -1)
