"""Hydra's two-way mixer of state-space duality by Triton as one function of autograd, around kernels and PyTorch's products.

Against one function for each part: gradients of all that one product gives, and of all that one convolution gives, lie in one
tensor each, x's second gradient is added by its product, and the convolution looks ahead without a copy.

Axes: B batch, L tokens, D width, E inner width, H heads, N states, X what is convolved (B, C, x, and B and C of the later tokens'
direction), S what in_proj gives (X, z of E, and the steps of both directions). Read first: triton_ssd.py.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dis_scale.scan.backend import keeps_states
from dis_scale.scan.triton import run_conv, run_conv_backward
from dis_scale.scan.triton_launch import ALIGNMENT, check_offsets
from dis_scale.scan.triton_norm import run_gated_norm, run_gated_norm_backward
from dis_scale.scan.triton_ssd import Chunks, SsdKind, run_ssd, run_ssd_backward

SHIFTS = 1, -1
"""Of C in each direction: a token takes what its neighbour there would."""


class Columns(NamedTuple):
    """Where the parts of what is convolved, and of in_proj's product, lie."""

    N: int
    E: int
    H: int

    @property
    def x(self) -> slice:
        return slice(2 * self.N, 2 * self.N + self.E)

    @property
    def ways(self) -> list[tuple[slice, slice]]:
        """B and C of each direction."""
        N, behind = self.N, 2 * self.N + self.E
        return [(slice(first, first + N), slice(first + N, first + 2 * N)) for first in (0, behind)]

    @property
    def convolved(self) -> int:
        return 4 * self.N + self.E

    @property
    def z(self) -> slice:
        return slice(self.convolved, self.convolved + self.E)

    @property
    def steps(self) -> slice:
        return slice(self.convolved + self.E, self.convolved + self.E + 2 * self.H)


def _columns(in_proj: Tensor, dt_bias: Tensor, norm_E: Tensor) -> Columns:
    E, H = len(norm_E), len(dt_bias) // 2
    return Columns((len(in_proj) - 2 * E - 2 * H) // 4, E, H)


def takes(h_BLD: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether all that kernels read begins at an aligned number, and types are those of training."""
    in_proj, conv, _, dt_bias, *_, norm_E, _ = weights
    columns, aligned = _columns(in_proj, dt_bias, norm_E), ALIGNMENT // min(h_BLD.element_size(), 4)
    fits = not (columns.x.start % aligned or columns.z.start % aligned or columns.H % 4 or conv.data_ptr() % ALIGNMENT)
    return fits and h_BLD.dtype != torch.float64 and all(weight.dtype == torch.float32 for weight in weights)


def mixer(h_BLD: Tensor, ahead: int, *weights: Tensor) -> Tensor:
    """The mixer's output; `weights` are in_proj, conv, own_proj, dt_bias, A_log, D, norm and out_proj, as SsdMixer has them."""
    out_BLD: Tensor = _HydraMixer.apply(h_BLD, ahead, *weights)
    return out_BLD


class _HydraMixer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h_BLD: Tensor,
        ahead: int,
        in_proj: Tensor,
        conv_1XE: Tensor,
        own_proj: Tensor,
        dt_bias: Tensor,
        A_log: Tensor,
        D_H: Tensor,
        norm_E: Tensor,
        out_proj: Tensor,
    ) -> Tensor:
        (B, L, _), columns = h_BLD.shape, _columns(in_proj, dt_bias, norm_E)
        check_offsets(L, len(in_proj))
        rounded = [weight.to(h_BLD.dtype) for weight in (in_proj, own_proj, out_proj)]
        h_TD = h_BLD.reshape(B * L, -1)
        all_BLS = (h_TD @ rounded[0].T).view(B, L, -1)
        convolved_BLX = h_BLD.new_empty(B, L, columns.convolved)
        with torch.cuda.device_of(h_BLD):
            run_conv(all_BLS[..., : columns.convolved], _taps(conv_1XE), [convolved_BLX, None], ahead)
            own_BLH = convolved_BLX[..., columns.x] @ rounded[1].T + D_H
            raw_BLH, A_H = all_BLS[..., columns.steps] + dt_bias, A_log.exp().neg_()
            y_BLE, states = run_ssd(*_inputs(columns, convolved_BLX, own_BLH, raw_BLH, A_H))
            normed_BLE = run_gated_norm(y_BLE, all_BLS[..., columns.z], norm_E)
            out_BLD = (normed_BLE.view(B * L, -1) @ rounded[2].T).view(B, L, -1)
        ctx.ahead, ctx.columns = ahead, columns
        ctx.save_for_backward(
            h_TD, all_BLS, convolved_BLX, own_BLH, raw_BLH, A_H, y_BLE, normed_BLE, conv_1XE, norm_E, *rounded,
            *(states if keeps_states() else ()),
        )  # fmt: skip
        return out_BLD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_BLD: Tensor) -> tuple[Tensor | None, ...]:
        h_TD, all_BLS, convolved_BLX, own_BLH, raw_BLH, A_H, y_BLE, normed_BLE, conv_1XE, norm_E, *saved = ctx.saved_tensors
        columns, (B, L, S), X, rounded, states = ctx.columns, all_BLS.shape, ctx.columns.convolved, saved[:3], saved[3:]
        dout_TD = dout_BLD.reshape(B * L, -1)
        with torch.cuda.device_of(dout_BLD):
            dall_BLS, dconvolved_BLX, dconv_1XE, dsteps_BLH = map(torch.empty_like, (all_BLS, convolved_BLX, conv_1XE, raw_BLH))
            dnormed_BLE = (dout_TD @ rounded[2]).view(B, L, -1)
            z_BLE, dz_BLE = all_BLS[..., columns.z], dall_BLS[..., columns.z]
            dy_BLE, dnorm_E = run_gated_norm_backward(y_BLE, z_BLE, dnormed_BLE, norm_E, dz_BLE)
            kind, x_BLE, _, ways = _inputs(columns, convolved_BLX, own_BLH, raw_BLH, A_H)
            into = dconvolved_BLX[..., columns.x], dsteps_BLH.chunk(2, -1)
            down_BLH, new = run_ssd_backward(kind, x_BLE, dy_BLE, own_BLH, ways, states, *into)
            for each, shift, (of_B, of_C) in zip(new, SHIFTS, columns.ways, strict=True):
                kind.join(each.B_BKQN, dconvolved_BLX[..., of_B])
                kind.join(each.C_BKQN, dconvolved_BLX[..., of_C], shift)
            down_TH = down_BLH.view(B * L, -1).to(dout_BLD.dtype)
            x_TE, dx_TE = (x_BLX.view(B * L, X)[:, columns.x] for x_BLX in (convolved_BLX, dconvolved_BLX))
            dx_TE.addmm_(down_TH, rounded[1])
            gradients = [dconvolved_BLX] * 2, dall_BLS[..., :X], _taps(dconv_1XE)
            run_conv_backward(all_BLS[..., :X], _taps(conv_1XE), *gradients, ctx.ahead)
            draw_BLH = torch.ops.aten.softplus_backward(dsteps_BLH, raw_BLH, 1, 20)
            dall_BLS[..., columns.steps] = draw_BLH
            dall_TS = dall_BLS.view(B * L, S)
            dweights = dall_TS.T @ h_TD, down_TH.T @ x_TE, dout_TD.T @ normed_BLE.view(B * L, -1)
            din, down_proj, dout_proj = (x.to(conv_1XE.dtype) for x in dweights)
            dh_BLD = (dall_TS @ rounded[0]).view_as(dout_BLD)
        vectors = draw_BLH.sum((0, 1)), torch.cat([each.A_H for each in new]).mul_(A_H), down_BLH.sum((0, 1))
        return dh_BLD, None, din, dconv_1XE, down_proj, *vectors, dnorm_E, dout_proj


def _inputs(
    columns: Columns, convolved_BLX: Tensor, own_BLH: Tensor, raw_BLH: Tensor, A_H: Tensor
) -> tuple[SsdKind, Tensor, Tensor, list[Chunks]]:
    """What `run_ssd` takes; `raw_BLH` are the steps of both directions before softplus."""
    (B, L, _), H, x_BLE = convolved_BLX.shape, columns.H, convolved_BLX[..., columns.x]
    sizes = B, L, H, columns.E // H, columns.N
    kind = SsdKind(x_BLE.device, x_BLE.dtype, *sizes, (True, True), exclusive=True, x_row=x_BLE.stride(1))
    ways, steps = list[Chunks](), F.softplus(raw_BLH).chunk(2, -1)
    for step_BLH, A, shift, (of_B, of_C) in zip(steps, A_H.chunk(2), SHIFTS, columns.ways, strict=True):
        ways.append(Chunks(step_BLH, A, kind.cut(convolved_BLX[..., of_B]), kind.cut(convolved_BLX[..., of_C], shift)))
    return kind, x_BLE, own_BLH, ways


def _taps(conv_1XE: Tensor) -> list[Tensor | None]:
    """Weight (X, W) and bias (X) of the convolution, and none of a second one."""
    return [conv_1XE[0, :-1].T, conv_1XE[0, -1], None, None]
