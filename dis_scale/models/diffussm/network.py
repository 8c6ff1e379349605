"""DiffuSSM as specified here: gated bidirectional S4D with hourglass layers (after Yan, Gu and Rush, arXiv 2311.18257).

No code was released: W4, the depths of S and L, and the zero-initialised final layer are our choice. Axes: B samples, C
channels, L pixels of the latent (or patches) in raster order, G = L / M groups of M pixels, D width, S = 2D both directions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dis_scale.models.checkpointing import run_block
from dis_scale.models.diffussm.s4d import S4D, convolve
from dis_scale.models.diffussm.settings import DiffuSsm
from dis_scale.models.tokens import (
    FREQUENCIES,
    Backbone,
    Linear,
    TimeEmbedding,
    modulate,
    patchify,
    position_table,
    stream_norm,
    unpatchify,
    wide,
    zero_,
)
from dis_scale.process.errors import UserError
from dis_scale.process.settings import LatentShape
from dis_scale.scan.graphs import outside_graphs


class BiS4D(nn.Module):
    """Both directions' convolutions of (B, L, S): the first D channels forward (`rightward`), the others backward (`leftward`)."""

    def __init__(self, settings: DiffuSsm):
        super().__init__()
        self.rightward = S4D(settings.width, settings)
        self.leftward = S4D(settings.width, settings) if settings.bidirectional else None

    @outside_graphs  # torch.compile assumes another memory layout for an FFT's output, and fails
    def forward(self, u_BLS: Tensor) -> Tensor:
        spectrum, skip = self.rightward(u_BLS.shape[1])
        if self.leftward is not None:
            back_spectrum, back_skip = self.leftward(u_BLS.shape[1])
            spectrum = torch.cat([spectrum, back_spectrum.conj()], dim=1)
            skip = torch.cat([skip, back_skip])
        return convolve(u_BLS, spectrum, skip)


class SlotLinear(nn.Module):
    """A separate product for each of the M slots of a group: (B, G, M, in) to (B, G, M, out)."""

    def __init__(self, slots: int, inputs: int, outputs: int):
        super().__init__()
        bound = inputs**-0.5
        self.weight = nn.Parameter(torch.empty(slots, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(slots, outputs).uniform_(-bound, bound))

    def forward(self, y_BGMS: Tensor) -> Tensor:
        return torch.einsum("bgmi,mio->bgmo", y_BGMS, self.weight.to(y_BGMS.dtype)) + self.bias.to(y_BGMS.dtype)


class DiffuSSMBlock(nn.Module):
    """Hourglass up, both scans at full length, hourglass down, gate. Names are the paper's, except W4. The stream is float32."""

    def __init__(self, settings: DiffuSsm, *, skip: bool):
        super().__init__()
        D, self.M = settings.width, settings.hourglass
        self.skip = Linear(2 * D, D) if skip else None
        S = (2 if settings.bidirectional else 1) * D
        self.W0 = Linear(D, D)
        self.W_up = Linear(D, self.M * S)  # one product for all slots: they have the same input
        self.scan = BiS4D(settings)
        self.W_down = SlotLinear(self.M, S, 2 * D // self.M)
        self.W1 = Linear(D, D)
        self.W2 = Linear(2 * D, D)
        self.W3 = Linear(D, D)
        self.W4 = Linear(D, D)
        self.modulation = Linear(D, 3 * D)
        zero_(self.modulation)

    def forward(self, I_BGD: Tensor, c_BD: Tensor, skip_BGD: Tensor | None = None) -> Tensor:
        if self.skip is not None and skip_BGD is not None:
            I_BGD = wide(self.skip(torch.cat([I_BGD, skip_BGD], dim=-1).to(c_BD.dtype)))
        shift_BD, scale_BD, gate_BD = self.modulation(F.silu(c_BD)).chunk(3, dim=1)
        h_BGD = modulate(stream_norm(I_BGD, c_BD.dtype), shift_BD, scale_BD)
        B, G, D = h_BGD.shape
        U_BLS = F.gelu(self.W_up(F.gelu(self.W0(h_BGD)))).reshape(B, G * self.M, -1)
        Y_BGMS = self.scan(U_BLS).reshape(B, G, self.M, -1)
        down_BGE = F.gelu(self.W_down(Y_BGMS)).reshape(B, G, 2 * D)
        O_BGD = self.W4(self.W3(F.gelu(self.W2(down_BGE)) * F.gelu(self.W1(h_BGD))))
        return torch.addcmul(I_BGD, wide(gate_BD).unsqueeze(1), wide(O_BGD))


class DiffuSSM(Backbone):
    """The model. Outside the scan it works on groups of M neighbours in raster order. The published model has no patches."""

    settings: DiffuSsm
    dynamics = frozenset({"log_dt", "log_neg_re", "im", "B"})
    vectors = frozenset({"bias", "C"})

    def __init__(
        self, settings: DiffuSsm, shape: LatentShape, num_classes: int | None, scan: str = "auto", checkpointing: str = "none"
    ):
        super().__init__(settings, shape, num_classes, scan, checkpointing)
        D, M, P = settings.width, settings.hourglass, shape.channels * settings.patch**2
        side = shape.size // settings.patch
        if side**2 % M or 2 * D % M:
            raise UserError(
                f"hourglass {M} must divide both {side} x {side} = {side**2} positions and twice the width = {2 * D}: "
                "choose another hourglass"
            )
        self.embed = Linear(P * M, D)
        table = position_table(side, D).reshape(1, -1, M, D).mean(2) if settings.position == "sine" else None
        self.register_buffer("position", table, persistent=False)
        self.time = TimeEmbedding(FREQUENCIES, D, D)
        self.label = None if num_classes is None else nn.Embedding(num_classes + 1, D)
        self.first_out = (settings.depth + 1) // 2 if settings.skip == "concat" else settings.depth
        self.blocks = nn.ModuleList(DiffuSSMBlock(settings, skip=i >= self.first_out) for i in range(settings.depth))
        self.modulation = Linear(D, 2 * D)
        self.final = Linear(D, M * 2 * P)
        if self.label is not None:
            nn.init.normal_(self.label.weight, std=0.02)
        zero_(self.modulation, self.final)

    def forward(self, x_BCHW: Tensor, t_B: Tensor, y_B: Tensor | None = None, drop: Tensor | None = None) -> Tensor:  # noqa: ARG002
        self.check(x_BCHW, y_B)
        dtype = self.compute_dtype
        c_BD = self.condition(t_B, y_B)
        raster_BLP = patchify(x_BCHW.to(dtype), self.patch)
        B, L, P = raster_BLP.shape
        I_BGD = self.embed(raster_BLP.reshape(B, -1, P * self.settings.hourglass))
        if self.position is not None:
            I_BGD = I_BGD + self.position.to(dtype)
        I_BGD = wide(I_BGD)
        skips: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            I_BGD = run_block(self.checkpointing, i, block, I_BGD, c_BD, skips.pop() if i >= self.first_out else None)
            if i < len(self.blocks) - self.first_out:
                skips.append(I_BGD)
        shift_BD, scale_BD = self.modulation(F.silu(c_BD)).chunk(2, dim=1)
        out_BGP = self.final(modulate(stream_norm(I_BGD, dtype), shift_BD, scale_BD))
        return unpatchify(out_BGP.reshape(B, L, 2 * P), self.patch)
