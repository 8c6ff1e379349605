"""Attention in place of a block's scans: how much of it does a state-space backbone need?"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dis_scale.models.dis.settings import head_size
from dis_scale.models.tokens import product, uniform, wide

EPS = 1e-6


class Attention(nn.Module):
    """Attention of all tokens; queries and keys are normalised, and those of a patch rotate with its row and column.

    The first `extras` tokens, label and time, do not rotate. Axial rotary positions as in EVA-02 (arXiv 2303.11331), normalised
    queries and keys as in ViT-22B (arXiv 2302.05442).
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
        q_BHLd, k_BHLd, v_BHLd = product(h_BLD, self.qkv).unflatten(-1, (3, -1, size)).permute(2, 0, 3, 1, 4)
        q_BHLd, k_BHLd = self._placed(q_BHLd, self.q_norm), self._placed(k_BHLd, self.k_norm)
        y_BHLd = F.scaled_dot_product_attention(q_BHLd, k_BHLd, v_BHLd)
        return product(y_BHLd.transpose(1, 2).flatten(2), self.out_proj)

    def _placed(self, x_BHLd: Tensor, weight_d: Tensor) -> Tensor:
        """Normalise and rotate, in float32 or better."""
        a, b = F.rms_norm(wide(x_BHLd), weight_d.shape, wide(weight_d), EPS).chunk(2, dim=-1)
        turned = torch.cat([a * self.cosines - b * self.sines, a * self.sines + b * self.cosines], dim=-1)
        return turned.to(x_BHLd.dtype)


def axial_angles(side: int, size: int) -> Tensor:
    """Return the angles (side^2, size / 2) of a head's pairs: the first half turn with the row, the others with the column."""
    quarter = size // 4
    place = torch.arange(side, dtype=torch.float32)
    axis = place[:, None] * 10000.0 ** (-torch.arange(quarter, dtype=torch.float32) / quarter)
    return torch.cat([axis.repeat_interleave(side, dim=0), axis.repeat(side, 1)], dim=1)
