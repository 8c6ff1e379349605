"""Attention in place of a block's scans, to measure how much attention a state-space backbone needs."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dis_scale.models.dis.settings import head_size
from dis_scale.models.tokens import axial_angles, product, rotate, uniform, wide

EPS = 1e-6


class Attention(nn.Module):
    """Attention of all tokens. Queries and keys are normalised; those of a patch are rotated by its row and column.

    The first `extras` tokens, label and time, do not rotate. Normalised queries and keys as in ViT-22B (arXiv 2302.05442).
    """

    cosines: Tensor
    sines: Tensor

    def __init__(self, width: int, depth: int, extras: int, side: int):
        super().__init__()
        size = head_size(width)
        self.qkv = uniform(3 * width, width, bound=width**-0.5)
        self.q_norm, self.k_norm = (nn.Parameter(torch.ones(size)) for _ in range(2))
        self.out_proj = uniform(width, width, bound=(width * depth) ** -0.5)
        angles = torch.cat([torch.zeros(extras, size // 2), axial_angles(side, size)])
        # Computed, not learned: not persistent, so that the state dict holds exactly what is trained.
        self.register_buffer("cosines", angles.cos(), persistent=False)
        self.register_buffer("sines", angles.sin(), persistent=False)

    def forward(self, h_BLD: Tensor) -> Tensor:
        """Map tokens to tokens, (B, L, D)."""
        size = len(self.q_norm)
        q_BLHd, k_BLHd, v_BLHd = product(h_BLD, self.qkv).unflatten(-1, (3, -1, size)).unbind(2)
        q_BLHd, k_BLHd = self._placed(q_BLHd, self.q_norm), self._placed(k_BLHd, self.k_norm)
        q_BHLd, k_BHLd, v_BHLd = (x_BLHd.transpose(1, 2) for x_BLHd in (q_BLHd, k_BLHd, v_BLHd))
        y_BHLd = F.scaled_dot_product_attention(q_BHLd, k_BHLd, v_BHLd)
        return product(y_BHLd.transpose(1, 2).flatten(2), self.out_proj)

    def _placed(self, x_BLHd: Tensor, weight_d: Tensor) -> Tensor:
        """Normalise and rotate, in float32 or better."""
        normal_BLHd = F.rms_norm(wide(x_BLHd), weight_d.shape, wide(weight_d), EPS)
        return rotate(normal_BLHd, self.cosines, self.sines).to(x_BLHd.dtype)
