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

TAPS = 4
"""Width of the causal convolution (Mamba's d_conv)."""


def inner_width(width: int) -> int:
    """E: channels of the scan."""
    return 2 * width


def step_rank(width: int) -> int:
    """R: rank of the projection that gives the time step (Mamba's `dt_rank = "auto"`)."""
    return math.ceil(width / 16)


class DirectionProjections(nn.Module):
    """Projections of one direction: the convolved u_BLE to the scan's inputs (Gu and Dao 2023, Algorithm 2)."""

    def __init__(self, settings: Dis, reverse: bool):
        super().__init__()
        E, N, R = inner_width(settings.width), settings.state_size, step_rank(settings.width)
        self.sizes = [R, N, N]
        self.x_proj = uniform(R + 2 * N, E, bound=E**-0.5)
        self.dt_proj = uniform(E, R, bound=R**-0.5)
        # The published code leaves the backward direction's bias at 0: softplus(0) = 0.69 remembers one or two tokens.
        bias_is_zero = reverse and settings.init == "official"
        self.dt_bias = nn.Parameter(torch.zeros(E) if bias_is_zero else log_uniform_steps(E))
        self.A_log = nn.Parameter(torch.arange(1, N + 1, dtype=torch.float32).log().repeat(E, 1))
        self.D = nn.Parameter(torch.ones(E))

    def forward(self, u_BLE: Tensor) -> Direction:
        step_BLR, B_BLN, C_BLN = product(u_BLE, self.x_proj).split(self.sizes, dim=-1)
        delta_BLE = product(step_BLR, self.dt_proj)
        return Direction(u_BLE, delta_BLE, -wide(self.A_log).exp(), B_BLN, C_BLN, self.D, self.dt_bias)


def log_uniform_steps(E: int, low: float = 1e-3, high: float = 0.1, floor: float = 1e-4) -> Tensor:
    """Return E biases whose softplus is log-uniform in [low, high] (Mamba's initialisation)."""
    steps_E = torch.empty(E).uniform_(math.log(low), math.log(high)).exp().clamp(min=floor)
    return steps_E + torch.log(-torch.expm1(-steps_E))


class Mixer(nn.Module):
    """The bidirectional mixer ("bimamba v2"): (s_f + s_b) SiLU(z) between two products; the sum is not averaged. Or s_f SiLU(z).

    `rightward` and `leftward` are the forward and the backward direction in token order. They are state-dict keys, so their
    names stay; everywhere else the directions are called forward and backward.
    """

    def __init__(self, settings: Dis, scan: str):
        super().__init__()
        D, E = settings.width, inner_width(settings.width)
        self.scan = scan
        self.in_proj = uniform(2 * E, D, bound=D**-0.5)
        self.conv_weight, self.conv_bias = conv_parameters(E)
        if settings.ways == 2:
            self.back_conv_weight, self.back_conv_bias = conv_parameters(E)
        self.rightward = DirectionProjections(settings, reverse=False)
        self.leftward = DirectionProjections(settings, reverse=True) if settings.ways == 2 else None
        self.out_proj = uniform(D, E, bound=(E * settings.depth) ** -0.5)  # GPT-2's 1 / sqrt(depth)

    def forward(self, h_BLD: Tensor) -> Tensor:
        x_BLE, z_BLE = product(h_BLD, self.in_proj).chunk(2, dim=-1)
        if self.leftward is None:
            u_BLE = causal_conv_silu(x_BLE, self.conv_weight, self.conv_bias, backend=self.scan)
            direction: Direction = self.rightward(u_BLE)
            y_BLE = selective_scan(*direction, backend=self.scan) * F.silu(z_BLE)
        else:
            convs = (self.conv_weight, self.conv_bias, self.back_conv_weight, self.back_conv_bias)
            forward_BLE, backward_BLE = two_way_conv_silu(x_BLE, *convs, backend=self.scan)
            y_BLE = two_way_scan(self.rightward(forward_BLE), self.leftward(backward_BLE), z_BLE, backend=self.scan)
        return product(y_BLE, self.out_proj)


def conv_parameters(E: int, taps: int = TAPS) -> tuple[nn.Parameter, nn.Parameter]:
    """Return weight (E, taps) and bias (E) of a convolution of each channel, at PyTorch's default."""
    return uniform(E, taps, bound=taps**-0.5), uniform(E, bound=taps**-0.5)
