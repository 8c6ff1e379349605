"""Gated depthwise convolutions along the raster of patches: an example of a family of backbones."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dis_scale.models.checkpointing import run_block
from dis_scale.models.family import Family
from dis_scale.models.settings import FamilySettings
from dis_scale.models.tokens import Backbone, Linear, PatchEmbed, TimeEmbedding, modulate, unpatchify, wide, zero_
from dis_scale.process.settings import Count, LatentShape


class GatedConvSettings(FamilySettings):
    """Gated depthwise convolutions."""

    kind: Literal["gated_conv"]
    width: Count
    """Channels of a token."""
    depth: Count
    """Number of blocks."""
    patch: Count
    """Pixels of the latent per side of a patch, which is one token."""
    reach: Count = 4
    """Tokens on each side that a block's convolution sees."""


class GatedConvBlock(nn.Module):
    def __init__(self, settings: GatedConvSettings):
        super().__init__()
        D, self.reach = settings.width, settings.reach
        self.up, self.down, self.modulation = Linear(D, 2 * D), Linear(D, D), Linear(D, 3 * D)
        self.taps = nn.Parameter(torch.randn(D, 1, 2 * self.reach + 1) * (2 * self.reach + 1) ** -0.5)
        zero_(self.modulation)

    def forward(self, x_BLD: Tensor, c_BD: Tensor) -> Tensor:
        shift_BD, scale_BD, gate_BD = self.modulation(F.silu(c_BD)).chunk(3, dim=1)
        h_BLD = modulate(F.layer_norm(x_BLD, x_BLD.shape[-1:]).to(c_BD.dtype), shift_BD, scale_BD)
        value_BLD, open_BLD = self.up(h_BLD).chunk(2, dim=-1)
        taps, value_BDL = self.taps.to(h_BLD.dtype), value_BLD.transpose(1, 2)
        mixed_BLD = F.conv1d(value_BDL, taps, padding=self.reach, groups=len(taps)).transpose(1, 2)
        out_BLD: Tensor = x_BLD + gate_BD.unsqueeze(1) * self.down(F.silu(open_BLD) * mixed_BLD)
        return out_BLD


class GatedConv(Backbone):
    def __init__(self, settings: GatedConvSettings, shape: LatentShape, num_classes: int | None, *options: str):
        super().__init__(settings, shape, num_classes, *options)
        D = settings.width
        self.patches = PatchEmbed(shape.channels, settings.patch, D)
        self.time = TimeEmbedding(256, D, D)
        self.label = None if num_classes is None else nn.Embedding(num_classes + 1, D)
        self.position = nn.Parameter(torch.zeros(1, self.tokens, D))
        self.blocks = nn.ModuleList(GatedConvBlock(settings) for _ in range(settings.depth))
        self.final = Linear(D, settings.patch**2 * 2 * shape.channels)
        zero_(self.final)

    def forward(self, x_BCHW: Tensor, t_B: Tensor, y_B: Tensor | None = None, drop: Tensor | None = None) -> Tensor:
        self.check(x_BCHW, y_B)
        dtype, c_BD = self.compute_dtype, self.condition(t_B, y_B)
        x_BLD = wide(self.patches(x_BCHW.to(dtype)) + self.position.to(dtype))  # the stream is float32
        for i, block in enumerate(self.blocks):
            x_BLD = run_block(self.checkpointing, i, block, x_BLD, c_BD)
        return unpatchify(self.final(F.layer_norm(x_BLD, x_BLD.shape[-1:]).to(dtype)), self.patch)


FAMILY = Family(GatedConvSettings, GatedConv, presets={"GatedConv-S/2": {"width": 384, "depth": 12, "patch": 2}})
