"""The mixer of state-space duality (Mamba-2; Dao and Gu, arXiv 2405.21060) in both directions. Read next: ../../scan/duality.py.

One product gives all inputs of both directions. Short convolutions apply to x, B and C. The norm of the output follows its gate.

Axes: B samples, L tokens, D width, E = 2D inner width, H heads, P channels of a head, N states.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dis_scale.models.dis.s6 import TAPS, conv_parameters, inner_width, log_uniform_steps, taps_and_bias
from dis_scale.models.dis.settings import Dis, head_size
from dis_scale.models.tokens import product, uniform, wide
from dis_scale.scan import causal_conv_silu, counts
from dis_scale.scan.duality import Way, ssd
from dis_scale.scan.mixer import fused_ssd_mixer
from dis_scale.scan.norms import gated_rms_norm

AROUND = 7
"""Taps of Hydra's convolution. Its window is centred on the token; with only one direction it ends at the token."""


class SsdMixer(nn.Module):
    """norm((y_f + y_b) SiLU(z)) between two products, or norm(y_f SiLU(z)).

    `sum`: each direction has its own convolution, and a token's weight on itself is step C . B + D. `hydra`: both directions share
    one convolution. A token's weight on itself comes from a product of x, plus D, so the directions mix only the other tokens.
    """

    def __init__(self, settings: Dis, scan: str):
        super().__init__()
        D, E, N, ways = settings.width, inner_width(settings.width), settings.state_size, settings.ways
        self.scan, self.ways, self.head, self.hydra = scan, ways, head_size(E), settings.combine == "hydra"
        self.ahead = 0 if settings.directions == 1 else AROUND // 2
        H = E // self.head
        self.mixed = [N, N, E, N, N][: 2 * ways + 1]
        """Widths of: B and C of the forward direction, x, B and C of the backward direction."""
        self.sizes = [sum(self.mixed), E, ways * H]
        self.in_proj = uniform(sum(self.sizes), D, bound=D**-0.5)
        convolved = sum(self.mixed) if self.hydra else E + 2 * N
        self.conv = conv_parameters(convolved, *((1, AROUND) if self.hydra else (ways, TAPS)))
        self.own_proj = uniform(H, E, bound=E**-0.5) if self.hydra else None
        # Both directions share one axis, so that an optimizer treats these parameters as vectors.
        self.dt_bias = nn.Parameter(log_uniform_steps(ways * H))
        self.A_log = nn.Parameter(torch.empty(ways * H).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(H if self.hydra else ways * H))
        self.norm = nn.Parameter(torch.ones(E))
        self.out_proj = uniform(D, E, bound=(E * settings.depth) ** -0.5)

    def forward(self, h_BLD: Tensor) -> Tensor:
        if self.own_proj is not None and self.ways == 2:
            vectors = self.dt_bias, self.A_log, self.D, self.norm
            weights = self.in_proj, self.conv, self.own_proj, *vectors, self.out_proj
            if (fused := fused_ssd_mixer(h_BLD, *weights, backend=self.scan)) is not None:
                return fused
        mixed_BLX, z_BLE, raw_BLH = product(h_BLD, self.in_proj).split(self.sizes, dim=-1)
        steps = F.softplus(wide(raw_BLH) + self.dt_bias).chunk(self.ways, dim=-1)
        decays = (-wide(self.A_log).exp()).chunk(self.ways)
        y_BLE = (self._hydra if self.hydra else self._sum)(mixed_BLX, steps, decays).flatten(2)
        return product(gated_rms_norm(y_BLE, z_BLE, self.norm, self.scan), self.out_proj)

    def _sum(self, mixed_BLX: Tensor, steps: tuple[Tensor, ...], decays: tuple[Tensor, ...]) -> Tensor:
        """Return the sum of both directions, each with its own convolution of x, B and C."""
        ys, D_of = [], self.D.chunk(self.ways)
        for i, rows_XE in enumerate(self.conv.unbind()):
            sizes = self.mixed[2 * i : 2 * i + 3]
            part_BLX = mixed_BLX[..., -sum(sizes) :] if i else mixed_BLX[..., : sum(sizes)]
            convolved_BLX = causal_conv_silu(part_BLX, *taps_and_bias(rows_XE), reverse=bool(i), backend=self.scan)
            parts = convolved_BLX.split(sizes, dim=-1)
            x_BLE, B_BLN, C_BLN = parts if i else (parts[2], parts[0], parts[1])
            way = Way(steps[i], decays[i], B_BLN, C_BLN)
            own_BLH = steps[i] * (wide(B_BLN) * C_BLN).sum(-1, keepdim=True) + D_of[i]
            ys.append(self._mix(x_BLE, own_BLH, None if i else way, way if i else None))
        return sum(ys[1:], ys[0])

    def _hydra(self, mixed_BLX: Tensor, steps: tuple[Tensor, ...], decays: tuple[Tensor, ...]) -> Tensor:
        """Apply Hydra's matrix: in each direction a token uses the C of its neighbour on that side."""
        convolved_BLX = _conv_silu(mixed_BLX, *taps_and_bias(self.conv[0]), self.ahead, self.scan)
        B_BLN, C_BLN, x_BLE, *back = convolved_BLX.split(self.mixed, dim=-1)
        earlier = Way(steps[0], decays[0], B_BLN, F.pad(C_BLN[:, :-1], (0, 0, 1, 0)))
        later = Way(steps[1], decays[1], back[0], F.pad(back[1][:, 1:], (0, 0, 0, 1))) if back else None
        assert self.own_proj is not None
        return self._mix(x_BLE, wide(product(x_BLE, self.own_proj)) + self.D, earlier, later)

    def _mix(self, x_BLE: Tensor, own_BLH: Tensor, earlier: Way | None, later: Way | None) -> Tensor:
        x_BLHP = x_BLE.unflatten(-1, (-1, self.head))
        return ssd(x_BLHP, own_BLH, earlier, later, exclusive=self.hydra, backend=self.scan)


def _conv_silu(x_BLX: Tensor, weight_XW: Tensor, bias_X: Tensor, ahead: int, scan: str) -> Tensor:
    """Return `causal_conv_silu` with a window that ends `ahead` tokens after each token."""
    if counts.active.get() and x_BLX.dtype != torch.float32:  # as on a GPU, whose mixer looks ahead without a copy
        return causal_conv_silu(x_BLX, weight_XW, bias_X, backend=scan)
    return causal_conv_silu(F.pad(x_BLX, (0, 0, 0, ahead)), weight_XW, bias_X, backend=scan)[:, ahead:]
