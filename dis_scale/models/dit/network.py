"""DiT, the baseline: attention with adaLN-Zero (Peebles and Xie, arXiv 2212.09748), as in the first release of its code.

That release initialises the patches' bias by PyTorch's uniform default, as does this module; a later release starts it at zero.
`modern` adds parts of LightningDiT (Yao, Yang and Wang, arXiv 2501.01423).

Axes: B samples, C channels, T patches, D width. Read next: public.py for the published weights' layout.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dis_scale.models.checkpointing import run_block
from dis_scale.models.dit.settings import Dit
from dis_scale.models.tokens import (
    FREQUENCIES,
    Backbone,
    Linear,
    PatchEmbed,
    TimeEmbedding,
    axial_angles,
    modulate,
    position_table,
    rotate,
    stream_norm,
    unpatchify,
    wide,
    zero_,
)
from dis_scale.process.settings import LatentShape


class DiTBlock(nn.Module):
    """Attention and MLP, each behind a norm whose shift, scale and gate come from the condition. The stream is float32.

    `angles` (T, d / 2) are the patches' rotations for heads of size d, if the settings have them.
    """

    cosines: Tensor | None
    sines: Tensor | None

    def __init__(self, settings: Dit, angles: Tensor | None = None):
        super().__init__()
        D, self.heads = settings.width, settings.heads
        rms, self.swiglu = "rms_norm" in settings.modern, "swiglu" in settings.modern
        hidden = int(2 / 3 * 4 * D) if self.swiglu else 4 * D
        self.qkv = Linear(D, 3 * D)
        self.out = Linear(D, D)
        self.up = Linear(D, 2 * hidden if self.swiglu else hidden)
        self.down = Linear(hidden, D)
        self.shifts = "no_shift" not in settings.modern
        self.modulation = Linear(D, 6 * D if self.shifts else 4 * D)
        self.norm_a, self.norm_m = (nn.Parameter(torch.ones(D)) if rms else None for _ in range(2))
        self.q_norm, self.k_norm = (_head_norm(settings, rms=rms) if "qk_norm" in settings.modern else None for _ in range(2))
        self.register_buffer("cosines", None if angles is None else angles.cos(), persistent=False)
        self.register_buffer("sines", None if angles is None else angles.sin(), persistent=False)

    def forward(self, x_BTD: Tensor, c_BD: Tensor) -> Tensor:
        parts = self.modulation(F.silu(c_BD)).chunk(6 if self.shifts else 4, dim=1)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = parts if self.shifts else (None, *parts[:2], None, *parts[2:])
        normal_BTD = modulate(stream_norm(x_BTD, c_BD.dtype, self.norm_a), shift_a, scale_a)
        x_BTD = x_BTD + gate_a.unsqueeze(1) * self._attend(normal_BTD)
        hidden_BTF = self.up(modulate(stream_norm(x_BTD, c_BD.dtype, self.norm_m), shift_m, scale_m))
        if self.swiglu:
            gate_BTF, value_BTF = hidden_BTF.chunk(2, dim=-1)
            active_BTF = F.silu(gate_BTF) * value_BTF
        else:
            active_BTF = F.gelu(hidden_BTF, approximate="tanh")
        x_BTD = x_BTD + gate_m.unsqueeze(1) * self.down(active_BTF)
        return x_BTD

    def _attend(self, x_BTD: Tensor) -> Tensor:
        B, T, D = x_BTD.shape
        q, k, v = self.qkv(x_BTD).reshape(B, T, 3, self.heads, D // self.heads).unbind(2)
        q, k, v = (x.transpose(1, 2) for x in (self._placed(q, self.q_norm), self._placed(k, self.k_norm), v))
        x_BTD = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, T, D))
        return x_BTD

    def _placed(self, x_BTHd: Tensor, norm: nn.RMSNorm | nn.LayerNorm | None) -> Tensor:
        """Normalise and rotate, in float32 or better."""
        placed_BTHd = x_BTHd if norm is None else norm(x_BTHd.to(norm.weight.dtype))
        if self.cosines is not None and self.sines is not None:
            placed_BTHd = rotate(wide(placed_BTHd), self.cosines, self.sines)
        return placed_BTHd.to(x_BTHd.dtype)


def _head_norm(settings: Dit, *, rms: bool) -> nn.RMSNorm | nn.LayerNorm:
    """Return LightningDiT's norm of a head's channels, with weights."""
    return nn.RMSNorm(settings.head_size, eps=1e-6) if rms else nn.LayerNorm(settings.head_size)


class DiT(Backbone):
    """The model. Without classes it is conditioned on the time only."""

    settings: Dit

    def __init__(self, settings: Dit, shape: LatentShape, num_classes: int | None, scan: str = "auto", checkpointing: str = "none"):
        super().__init__(settings, shape, num_classes, scan, checkpointing)
        D = settings.width
        self.patches = PatchEmbed(shape.channels, settings.patch, D)
        self.time = TimeEmbedding(FREQUENCIES, D, D)
        self.label = None if num_classes is None else nn.Embedding(num_classes + 1, D)
        # Computed, not learned: not persistent, so that the state dict holds exactly what is trained.
        self.register_buffer("position", position_table(shape.size // settings.patch, D), persistent=False)
        rotary = "rotary" in settings.modern
        angles = axial_angles(shape.size // settings.patch, settings.head_size) if rotary else None
        blocks = [DiTBlock(settings, angles) for _ in range(settings.depth)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.Parameter(torch.ones(D)) if "rms_norm" in settings.modern else None
        self.modulation = Linear(D, 2 * D)
        self.final = Linear(D, settings.patch**2 * 2 * shape.channels)
        self._initialise()
        zero_(self.modulation, self.final, *(block.modulation for block in blocks))

    def _initialise(self) -> None:
        for layer in self.modules():
            if isinstance(layer, Linear) and layer not in (self.time.up, self.time.down):
                nn.init.xavier_uniform_(layer.weight)
                if layer is not self.patches:
                    nn.init.zeros_(layer.bias)
        for layer in (self.time.up, self.time.down):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        if self.label is not None:
            nn.init.normal_(self.label.weight, std=0.02)

    def forward(self, x_BCHW: Tensor, t_B: Tensor, y_B: Tensor | None = None, drop: Tensor | None = None) -> Tensor:  # noqa: ARG002
        self.check(x_BCHW, y_B)
        dtype = self.compute_dtype
        c_BD = self.condition(t_B, y_B)
        x_BTD = wide(self.patches(x_BCHW.to(dtype)) + self.position.to(dtype))
        for i, block in enumerate(self.blocks):
            x_BTD = run_block(self.checkpointing, i, block, x_BTD, c_BD)
        shift_BD, scale_BD = self.modulation(F.silu(c_BD)).chunk(2, dim=1)
        return unpatchify(self.final(modulate(stream_norm(x_BTD, dtype, self.norm), shift_BD, scale_BD)), self.patch)

    def scale_initial(self, weights: Mapping[str, Tensor], growth: Mapping[str, float], base_width: int) -> None:
        """Scale the patches' weight, whose Xavier deviation falls with the width, and the time's second product, whose deviation
        does not."""
        inputs = weights["patches.weight"].shape[1]
        weights["patches.weight"].mul_(((inputs + self.settings.width) / (inputs + base_width)) ** 0.5)
        weights["time.down.weight"].mul_(growth["time.down.weight"] ** -0.5)
