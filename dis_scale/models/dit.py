"""DiT, the baseline: attention with adaLN-Zero (Peebles and Xie, arXiv 2212.09748), as in the first release of its code.

That release leaves the patches' bias at PyTorch's uniform default, as here; a later one starts it at zero.

Axes: B samples, C channels, T patches, D width. Read next: official.py for the published weights' layout.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dis_scale.models.checkpointing import run_block
from dis_scale.models.tokens import Backbone, Linear, PatchEmbed, TimeEmbedding, modulate, unpatchify, zero_
from dis_scale.recipe import Dit, LatentShape

FREQUENCIES = 256
"""Sinusoidal features of the time (DiT's frequency_embedding_size)."""


class DiTBlock(nn.Module):
    """Attention and MLP, each behind a layer norm whose shift, scale and gate come from the condition."""

    def __init__(self, settings: Dit):
        super().__init__()
        D, self.heads = settings.width, settings.heads
        self.qkv = Linear(D, 3 * D)
        self.out = Linear(D, D)
        self.up = Linear(D, 4 * D)
        self.down = Linear(4 * D, D)
        self.modulation = Linear(D, 6 * D)

    def forward(self, x_BTD: Tensor, c_BD: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(F.silu(c_BD)).chunk(6, dim=1)
        x_BTD = x_BTD + gate_a.unsqueeze(1) * self._attend(modulate(_norm(x_BTD), shift_a, scale_a))
        hidden_BTF = F.gelu(self.up(modulate(_norm(x_BTD), shift_m, scale_m)), approximate="tanh")
        return x_BTD + gate_m.unsqueeze(1) * self.down(hidden_BTF)

    def _attend(self, x_BTD: Tensor) -> Tensor:
        B, T, D = x_BTD.shape
        q, k, v = self.qkv(x_BTD).reshape(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4).unbind()
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, T, D))


def _norm(x_BTD: Tensor) -> Tensor:
    return F.layer_norm(x_BTD, x_BTD.shape[-1:], eps=1e-6)


def position_table(side: int, width: int) -> Tensor:
    """Fixed sine-cosine table (1, side^2, width): half for the column, half for the row, sines first (MAE)."""
    quarter = torch.arange(width // 4, dtype=torch.float64)
    place = torch.arange(side, dtype=torch.float64)
    angles = place[:, None] * 10000.0 ** (-quarter / (width / 4))
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    table = torch.cat([axis.repeat(side, 1), axis.repeat_interleave(side, dim=0)], dim=1)
    return table.float().unsqueeze(0)


class DiT(Backbone):
    """The model. Without classes it is conditioned on the time only."""

    settings: Dit

    def __init__(self, settings: Dit, shape: LatentShape, num_classes: int | None, checkpointing: str):
        super().__init__(shape, num_classes, settings.patch)
        self.settings, self.checkpointing = settings, checkpointing
        D = settings.width
        self.patches = PatchEmbed(shape.channels, settings.patch, D)
        self.time = TimeEmbedding(FREQUENCIES, D, D)
        self.label = None if num_classes is None else nn.Embedding(num_classes + 1, D)
        # Computed, not learned: not persistent, so that the state dict holds exactly what is trained.
        self.register_buffer("position", position_table(shape.size // settings.patch, D), persistent=False)
        blocks = [DiTBlock(settings) for _ in range(settings.depth)]
        self.blocks = nn.ModuleList(blocks)
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
        x_BTD = self.patches(x_BCHW.to(dtype)) + self.position.to(dtype)
        for i, block in enumerate(self.blocks):
            x_BTD = run_block(self.checkpointing, i, block, x_BTD, c_BD)
        shift_BD, scale_BD = self.modulation(F.silu(c_BD)).chunk(2, dim=1)
        return unpatchify(self.final(modulate(_norm(x_BTD), shift_BD, scale_BD)), self.patch)
