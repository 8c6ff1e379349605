"""Hydra's two-way mixer of state-space duality by Triton: one autograd function around kernels and PyTorch's products.

A separate function for each part would make more copies. Here, one tensor holds the gradients of all outputs of in_proj, and one
those of all outputs of the convolution. x has two gradients: the product that computes the second one adds it to the first. The
convolution looks ahead without a copy.

Axes: B batch, L tokens, T tokens of all images, D width, E inner width, H heads, N states, W taps of the convolution and its bias,
X what is convolved (B, C, x, and B and C of the later tokens' direction), S what in_proj gives (X, z of E, and the steps of both
directions). Read first: triton_ssd.py.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dis_scale.scan.backend import differentiable_once
from dis_scale.scan.triton import run_conv, run_conv_backward
from dis_scale.scan.triton_launch import ALIGNMENT, check_offsets, of_training
from dis_scale.scan.triton_norm import run_gated_norm, run_gated_norm_backward
from dis_scale.scan.triton_ssd import CutWay, SsdKind, run_ssd, run_ssd_backward

SHIFTS = 1, -1
"""Shift of C in each direction, earlier tokens first: token i uses the C of token i - shift."""


class Sizes(NamedTuple):
    """Numbers of columns: each B and each C has N, x and z have E, the steps of one direction have H."""

    N: int
    E: int
    H: int

    @classmethod
    def of(cls, in_proj: Tensor, dt_bias: Tensor, norm_E: Tensor) -> "Sizes":
        """Return the sizes of a mixer with these weights."""
        E, H = len(norm_E), len(dt_bias) // 2
        return cls((len(in_proj) - 2 * E - 2 * H) // 4, E, H)

    def projected(self, all_BLS: Tensor) -> tuple[Tensor, ...]:
        """Split in_proj's output: return the convolution's input, z, and the steps of both directions."""
        parts: tuple[Tensor, ...] = all_BLS.split([4 * self.N + self.E, self.E, 2 * self.H], -1)
        return parts

    def convolved(self, x_BLX: Tensor) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
        """Split the convolution's output: return x as (B, L, E) and as (T, E), both directions' B, and both directions' C."""
        B0_BLN, C0_BLN, x_BLE, B1_BLN, C1_BLN = x_BLX.split([self.N, self.N, self.E, self.N, self.N], -1)
        return x_BLE, x_BLE.view(-1, self.E), [B0_BLN, B1_BLN], [C0_BLN, C1_BLN]


def takes(h_BLD: Tensor, weights: Sequence[Tensor]) -> bool:
    """Return whether `mixer` supports these tensors: all that the kernels read is aligned, and the types are those of training."""
    in_proj, conv, _, dt_bias, *_, norm_E, _ = weights
    (N, E, H), aligned = Sizes.of(in_proj, dt_bias, norm_E), not (conv.data_ptr() | norm_E.data_ptr()) % ALIGNMENT
    aligned &= H % 4 == 0  # the later direction's steps and A, in float32, begin at head H
    return aligned and of_training(h_BLD, weights, 2 * N, 4 * N + E)


def mixer(h_BLD: Tensor, *weights: Tensor) -> Tensor:
    """Compute the mixer's output. `weights` are SsdMixer's in_proj, conv, own_proj, dt_bias, A_log, D, norm and out_proj."""
    out_BLD: Tensor = _HydraMixer.apply(h_BLD, *weights)
    return out_BLD


class _HydraMixer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h_BLD: Tensor,
        in_proj: Tensor,
        conv_1WX: Tensor,
        own_proj: Tensor,
        dt_bias: Tensor,
        A_log: Tensor,
        D_H: Tensor,
        norm_E: Tensor,
        out_proj: Tensor,
    ) -> Tensor:
        (B, L, _), ctx.sizes = h_BLD.shape, (sizes := Sizes.of(in_proj, dt_bias, norm_E))
        check_offsets(L, len(in_proj))
        rounded = [weight.to(h_BLD.dtype) for weight in (in_proj, own_proj, out_proj)]
        h_TD = h_BLD.reshape(B * L, -1)
        all_BLS = (h_TD @ rounded[0].T).view(B, L, -1)
        mixed_BLX, z_BLE, steps_BLH = sizes.projected(all_BLS)
        convolved_BLX = h_BLD.new_empty(mixed_BLX.shape)
        with torch.cuda.device_of(h_BLD):
            run_conv(mixed_BLX, _taps(conv_1WX), [convolved_BLX, None], _ahead(conv_1WX))
            raw_BLH, A_H = steps_BLH + dt_bias, A_log.exp().neg_()
            kind, x_BLE, ways = _inputs(sizes, convolved_BLX, raw_BLH, A_H)
            own_BLH = x_BLE @ rounded[1].T + D_H
            y_BLE, states = run_ssd(kind, x_BLE, own_BLH, ways)
            normed_BLE = run_gated_norm(y_BLE, z_BLE, norm_E)
            out_BLD = (normed_BLE.view(B * L, -1) @ rounded[2].T).view(B, L, -1)
        ctx.save_for_backward(
            h_TD, all_BLS, convolved_BLX, own_BLH, raw_BLH, A_H, y_BLE, normed_BLE, conv_1WX, norm_E, *rounded, *states
        )  # fmt: skip
        return out_BLD

    @staticmethod
    @differentiable_once("triton scan")
    def backward(ctx: Any, dout_BLD: Tensor) -> tuple[Tensor | None, ...]:
        h_TD, all_BLS, convolved_BLX, own_BLH, raw_BLH, A_H, y_BLE, normed_BLE, conv_1WX, norm_E, *saved = ctx.saved_tensors
        sizes, rounded, states, dout_TD = ctx.sizes, saved[:3], saved[3:], dout_BLD.flatten(0, 1)
        with torch.cuda.device_of(dout_BLD):
            dall_BLS, dconvolved_BLX, dconv_1WX, dsteps_BLH = map(torch.empty_like, (all_BLS, convolved_BLX, conv_1WX, raw_BLH))
            (mixed_BLX, z_BLE, _), (dmixed_BLX, dz_BLE, draw_BLH) = sizes.projected(all_BLS), sizes.projected(dall_BLS)
            dnormed_BLE = (dout_TD @ rounded[2]).view_as(y_BLE)
            dy_BLE, dnorm_E = run_gated_norm_backward(y_BLE, z_BLE, dnormed_BLE, norm_E, dz_BLE)
            kind, x_BLE, ways = _inputs(sizes, convolved_BLX, raw_BLH, A_H)
            dx_BLE, dx_TE, dBs, dCs = sizes.convolved(dconvolved_BLX)
            into = dx_BLE, dsteps_BLH.chunk(2, -1)
            down_BLH, new = run_ssd_backward(kind, x_BLE, dy_BLE, own_BLH, ways, states, *into)
            for each, shift, dB_BLN, dC_BLN in zip(new, SHIFTS, dBs, dCs, strict=True):
                kind.join(each.B_BKQN, dB_BLN)
                kind.join(each.C_BKQN, dC_BLN, shift)
            down_TH = down_BLH.flatten(0, 1).to(dout_BLD.dtype)
            dx_TE.addmm_(down_TH, rounded[1])
            gradients = [dconvolved_BLX] * 2, dmixed_BLX, _taps(dconv_1WX)
            run_conv_backward(mixed_BLX, _taps(conv_1WX), *gradients, _ahead(conv_1WX))
            wide_BLH = torch.ops.aten.softplus_backward(dsteps_BLH, raw_BLH, 1, 20)
            draw_BLH.copy_(wide_BLH)
            dall_TS = dall_BLS.flatten(0, 1)
            dweights = dall_TS.T @ h_TD, down_TH.T @ x_BLE.flatten(0, 1), dout_TD.T @ normed_BLE.flatten(0, 1)
            din_proj, down_proj, dout_proj = (x.to(conv_1WX.dtype) for x in dweights)
            dh_BLD = (dall_TS @ rounded[0]).view_as(dout_BLD)
        vectors = wide_BLH.sum((0, 1)), torch.cat([each.A_H for each in new]).mul_(A_H), down_BLH.sum((0, 1))
        return dh_BLD, din_proj, dconv_1WX, down_proj, *vectors, dnorm_E, dout_proj


def _inputs(sizes: Sizes, convolved_BLX: Tensor, raw_BLH: Tensor, A_H: Tensor) -> tuple[SsdKind, Tensor, list[CutWay]]:
    """Return the kind, x and both directions' inputs for `run_ssd`. `raw_BLH` are both directions' steps before softplus."""
    (B, L, _), (x_BLE, _, Bs, Cs) = convolved_BLX.shape, sizes.convolved(convolved_BLX)
    shape = B, L, sizes.H, sizes.E // sizes.H, sizes.N
    kind = SsdKind(x_BLE.device, x_BLE.dtype, *shape, (True, True), exclusive=True, x_row=x_BLE.stride(1))
    ways, steps = list[CutWay](), F.softplus(raw_BLH).chunk(2, -1)
    for step_BLH, A, B_BLN, C_BLN, shift in zip(steps, A_H.chunk(2), Bs, Cs, SHIFTS, strict=True):
        ways.append(CutWay(step_BLH, A, kind.cut(B_BLN), kind.cut(C_BLN, shift)))
    return kind, x_BLE, ways


def _ahead(conv_1WX: Tensor) -> int:
    """Return how many later tokens the convolution reads: it is centred on its token."""
    return (conv_1WX.shape[1] - 1) // 2


def _taps(conv_1WX: Tensor) -> list[Tensor | None]:
    """Return the convolution's weight (X, W - 1) and bias (X), and None in place of a second direction's."""
    return [conv_1WX[0, :-1].T, conv_1WX[0, -1], None, None]
