"""The public DiS in plain PyTorch: its layout and names, a loop for the scan, flips for the backward direction."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dis_scale.models import build
from dis_scale.models.dit.settings import Dit
from dis_scale.models.public import to_official
from dis_scale.models.tokens import Backbone
from dis_scale.recipe import LatentShape


class Mamba(nn.Module):
    """mamba_simple's bimamba v2."""

    def __init__(self, D: int, N: int = 16) -> None:
        super().__init__()
        E, self.R, self.N = 2 * D, math.ceil(D / 16), N
        self.in_proj = nn.Linear(D, 2 * E, bias=False)
        self.out_proj = nn.Linear(E, D, bias=False)
        for side, A_log, skip in (("", "A_log", "D"), ("_b", "A_b_log", "D_b")):
            setattr(self, f"conv1d{side}", nn.Conv1d(E, E, 4, groups=E, padding=3))
            setattr(self, f"x_proj{side}", nn.Linear(E, self.R + 2 * N, bias=False))
            setattr(self, f"dt_proj{side}", nn.Linear(self.R, E))
            setattr(self, A_log, nn.Parameter(torch.arange(1.0, N + 1).log().repeat(E, 1)))
            setattr(self, skip, nn.Parameter(torch.ones(E)))

    def forward(self, hidden: Tensor) -> Tensor:
        xz = self.in_proj(hidden).transpose(1, 2)
        forward = self.one_way(xz, self.conv1d, self.x_proj, self.dt_proj, self.A_log, self.D)
        backward = self.one_way(xz.flip(2), self.conv1d_b, self.x_proj_b, self.dt_proj_b, self.A_b_log, self.D_b)
        mixed: Tensor = self.out_proj((forward + backward.flip(2)).transpose(1, 2))
        return mixed

    def one_way(self, xz: Tensor, conv: Any, x_proj: Any, dt_proj: Any, A_log: Any, D: Any) -> Tensor:
        x, z = xz.chunk(2, dim=1)
        L = x.shape[2]
        x = F.silu(conv(x)[:, :, :L])
        dt, B, C = x_proj(x.transpose(1, 2)).split([self.R, self.N, self.N], dim=2)
        delta = F.softplus(dt_proj(dt)).transpose(1, 2)
        A, state, ys = -A_log.exp(), 0.0, []
        for i in range(L):
            drive = delta[:, :, i, None] * B[:, None, i] * x[:, :, i, None]
            state = torch.exp(delta[:, :, i, None] * A) * state + drive
            ys.append((state * C[:, None, i]).sum(2))
        y: Tensor = (torch.stack(ys, dim=2) + D[:, None] * x) * F.silu(z)
        return y


class RMSNorm(nn.Module):
    def __init__(self, D: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(D))

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * self.weight


class Block(nn.Module):
    def __init__(self, D: int, *, skip: bool) -> None:
        super().__init__()
        self.mixer, self.norm = Mamba(D), RMSNorm(D)
        self.skip_linear = nn.Linear(2 * D, D) if skip else None

    def forward(
        self, hidden: Tensor, residual: Tensor | None, skip: Tensor | None = None, drop: Tensor | float = 1.0
    ) -> tuple[Tensor, Tensor]:
        if self.skip_linear is not None:
            assert skip is not None
            hidden = self.skip_linear(torch.cat([hidden, skip], dim=-1))
        residual = hidden if residual is None else residual + drop * hidden
        return self.mixer(self.norm(residual)), residual


class Proj(nn.Module):
    def __init__(self, C: int, p: int, D: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(C, D, p, p)


class Label(nn.Module):
    def __init__(self, classes: int, D: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, D)


class Final(nn.Module):
    def __init__(self, D: int, out: int, *, conditional: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(D, out)
        if conditional:
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 2 * D))


class PublicDiS(nn.Module):
    def __init__(self, D: int, depth: int, p: int, C: int, size: int, classes: int | None = None) -> None:
        super().__init__()
        self.D, self.p, self.C, self.extras = D, p, C, 1 if classes is None else 2
        self.patch_embed = Proj(C, p, D)
        self.time_embed = nn.Sequential(nn.Linear(D, 4 * D), nn.SiLU(), nn.Linear(4 * D, D))
        if classes is not None:
            self.label_emb = Label(classes, D)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.extras + (size // p) ** 2, D))
        self.in_blocks = nn.ModuleList([Block(D, skip=False) for _ in range(depth // 2)])
        self.mid_block = Block(D, skip=False)
        self.out_blocks = nn.ModuleList([Block(D, skip=True) for _ in range(depth // 2)])
        self.norm_f = RMSNorm(D)
        self.final_layer = Final(D, p * p * 2 * C, conditional=classes is not None)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, drops: Sequence[Tensor | float] | None = None) -> Tensor:
        """`drops`: drop path's multiplier (B, 1, 1) of each block, in order, and of the last branch."""
        half = self.D // 2
        angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(half) / half)
        features = F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, self.D % 2))
        time = self.time_embed(features)[:, None]
        tokens = torch.cat([time, self.patch_embed.proj(x).flatten(2).transpose(1, 2)], dim=1)
        if y is not None:
            label = self.label_emb.embedding_table(y)[:, None]
            tokens = torch.cat([label, tokens], dim=1)
        hidden, residual, skips = tokens + self.pos_embed, None, []
        drops = [1.0] * (2 * len(self.in_blocks) + 2) if drops is None else list(drops)
        for block in self.in_blocks:
            hidden, residual = block(hidden, residual, drop=drops.pop(0))
            skips.append(hidden)
        hidden, residual = self.mid_block(hidden, residual, drop=drops.pop(0))
        for block in self.out_blocks:
            hidden, residual = block(hidden, residual, skips.pop(), drop=drops.pop(0))
        out = F.layer_norm(self.norm_f(residual + drops.pop() * hidden), (self.D,), eps=1e-6)
        if y is not None:
            shift, scale = self.final_layer.adaLN_modulation(time[:, 0] + label[:, 0]).chunk(2, dim=1)
            out = out * (1 + scale[:, None]) + shift[:, None]
        out = self.final_layer.linear(out)[:, self.extras :]
        side = x.shape[2] // self.p
        out = out.reshape(len(x), side, side, self.p, self.p, 2 * self.C)
        return torch.einsum("nhwpqc->nchpwq", out).reshape(len(x), 2 * self.C, x.shape[2], x.shape[3])


DIT = Dit(kind="dit", width=64, depth=3, heads=4, patch=2)


def public_model(D: int, depth: int, p: int, C: int, size: int, classes: int | None) -> PublicDiS:
    """A public model with every weight changed from its initial value, so that a forgotten weight is detected."""
    torch.manual_seed(0)
    model = PublicDiS(D, depth, p, C, size, classes)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.add_(torch.randn_like(weight) * (0.02 if "A_" in name else 0.1))
    return model


def dit_model() -> Backbone:
    model = build(DIT, LatentShape(4, 8), 10)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.05)
    return model


def sit_state() -> dict[str, Tensor]:
    """Weights that SiT's training would leave: its loss has no variance, whose rows stay at zero."""
    state = to_official(dit_model())
    rows = {name: state[f"final_layer.linear.{name}"].unflatten(0, (4, 2, 4)).clone() for name in ("weight", "bias")}
    for weight in rows.values():
        weight[:, 1] = 0
    return state | {f"final_layer.linear.{name}": weight.flatten(0, 2) for name, weight in rows.items()}
