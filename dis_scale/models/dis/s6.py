"""The mixer of the published DiS: selective scans in both directions ("bimamba v2"). Read next: ../../scan.

Axes: B samples, L tokens, D width, E = 2D inner width, N states, R rank of the time step, W taps of the convolution.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dis_scale.models.dis.settings import Dis
from dis_scale.models.tokens import product, uniform, wide
from dis_scale.scan import Direction, causal_conv_silu, selective_scan, two_way_conv_silu, two_way_scan
from dis_scale.scan.mixer import fused_mixer

TAPS = 4
"""Width of the causal convolution (Mamba's d_conv)."""


def inner_width(width: int) -> int:
    """E: channels of the scan."""
    return 2 * width


def log_uniform_steps(E: int) -> Tensor:
    """Return E biases whose softplus is log-uniform in [0.001, 0.1] (Mamba's initialisation)."""
    steps_E = torch.empty(E).uniform_(math.log(1e-3), math.log(0.1)).exp()
    return steps_E + torch.log(-torch.expm1(-steps_E))


class Mixer(nn.Module):
    """The bidirectional mixer ("bimamba v2"): (s_f + s_b) SiLU(z) between two products, not averaged. With one way s_f SiLU(z).

    A parameter holds both directions, forward first: the kernels read both, and each parameter costs time in Python.

        conv        (ways, W + 1, E)    a row for each tap, the current token's last, and the bias
        x_proj      (ways, R + 2 N, E)  from the convolved u to the step, B and C (Gu and Dao 2023, Algorithm 2)
        dt_proj     (ways, E, R)
        dynamics    (ways, N + 2, E)    log(-A), a row for each state; D; and the step's bias

    With `spectrum: tied`, `dynamics` (ways, 3, E) has one row of log a: state n decays at n + 1 times the rate a.
    """

    log_rates_N1: Tensor | None

    def __init__(self, settings: Dis, scan: str):
        super().__init__()
        D, E, N = settings.width, inner_width(settings.width), settings.state_size
        R = math.ceil(D / 16)  # Mamba's `dt_rank = "auto"`
        self.scan, self.sizes = scan, [R, N, N]
        log_rates_N1 = torch.arange(1, N + 1, dtype=torch.float32).log()[:, None]
        tied = settings.spectrum == "tied"
        self.register_buffer("log_rates_N1", log_rates_N1 if tied else None, persistent=False)
        self.in_proj = uniform(2 * E, D, bound=D**-0.5)
        self.conv = conv_parameters(E, settings.ways)
        x_projs, dt_projs, dynamics = list[Tensor](), list[Tensor](), list[Tensor]()
        for way in range(settings.ways):
            x_projs.append(uniform(R + 2 * N, E, bound=E**-0.5))
            dt_projs.append(uniform(E, R, bound=R**-0.5))
            # The published code leaves the backward direction's bias at 0: softplus(0) = 0.69 remembers one or two tokens.
            bias_E = torch.zeros(E) if way and settings.init == "official" else log_uniform_steps(E)
            log_A_NE = log_rates_N1[: 1 if tied else N].expand(-1, E)
            dynamics.append(torch.cat([log_A_NE, torch.ones(1, E), bias_E[None]]))
        self.x_proj, self.dt_proj, self.dynamics = (nn.Parameter(torch.stack(each)) for each in (x_projs, dt_projs, dynamics))
        self.out_proj = uniform(D, E, bound=(E * settings.depth) ** -0.5)  # GPT-2's 1 / sqrt(depth)

    def forward(self, h_BLD: Tensor) -> Tensor:
        dynamics = self.free_dynamics()
        weights = self.in_proj, self.conv, self.x_proj, self.dt_proj, dynamics, self.out_proj
        if len(self.conv) == 2 and (fused := fused_mixer(h_BLD, *weights, backend=self.scan)) is not None:
            return fused
        x_BLE, z_BLE = product(h_BLD, self.in_proj).chunk(2, dim=-1)
        if len(self.conv) == 1:
            u_BLE = causal_conv_silu(x_BLE, *taps_and_bias(self.conv[0]), backend=self.scan)
            (direction,) = self.directions(dynamics, u_BLE)
            y_BLE = selective_scan(*direction, backend=self.scan) * F.silu(z_BLE)
        else:
            forward, backward = map(taps_and_bias, self.conv.unbind())
            u_of = two_way_conv_silu(x_BLE, *forward, *backward, backend=self.scan)
            front, back = self.directions(dynamics, *u_of)
            y_BLE = two_way_scan(front, back, z_BLE, backend=self.scan)
        return product(y_BLE, self.out_proj)

    def free_dynamics(self) -> Tensor:
        """Return `dynamics` with a row for each state."""
        if self.log_rates_N1 is None:
            return self.dynamics
        return torch.cat([self.dynamics[:, :1] + self.log_rates_N1, self.dynamics[:, 1:]], dim=1)

    def directions(self, dynamics: Tensor, *u_of: Tensor) -> list[Direction]:
        """Project each direction's convolved u (B, L, E) to the inputs of its scan."""
        rows_of, A_of, directions = dynamics.unbind(), (-wide(dynamics[:, :-2]).exp()).mT.unbind(), []
        for u_BLE, x_proj, dt_proj, rows, A_EN in zip(
            u_of, self.x_proj.unbind(), self.dt_proj.unbind(), rows_of, A_of, strict=True
        ):
            step_BLR, B_BLN, C_BLN = product(u_BLE, x_proj).split(self.sizes, dim=-1)
            directions.append(Direction(u_BLE, product(step_BLR, dt_proj), A_EN, B_BLN, C_BLN, rows[-2], rows[-1]))
        return directions


def conv_parameters(channels: int, ways: int, taps: int = TAPS) -> nn.Parameter:
    """Return the convolutions of each channel (ways, taps + 1, channels), the bias last, with PyTorch's default initial values."""
    rows = []
    for _ in range(ways):
        weight, bias = uniform(channels, taps, bound=taps**-0.5), uniform(channels, bound=taps**-0.5)
        rows.append(torch.cat([weight.T, bias[None]]))
    return nn.Parameter(torch.stack(rows))


def taps_and_bias(rows_XE: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weight (E, W) and the bias (E) of a convolution from its rows."""
    return rows_XE[:-1].T, rows_XE[-1]
