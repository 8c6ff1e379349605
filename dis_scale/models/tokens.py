"""The interface of every backbone, and common parts: images to tokens, times and labels to vectors, tokens to images.

Axes: B samples, C channels, H W height and width, T patches, L tokens, D width, P values of a patch. Read next: dis/network.py.
"""

import math
from collections.abc import Callable, Collection, Mapping
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dis_scale.models.settings import FamilySettings
from dis_scale.process.errors import UserError
from dis_scale.process.settings import LatentShape, Precision
from dis_scale.scan.graphs import prepare_to_compile

FREQUENCIES = 256
"""Sinusoidal features of the time (DiT's frequency_embedding_size)."""
TABLES = ("label.", "position")
"""Beginnings of the names of weights that are looked up, not multiplied."""


class Backbone(nn.Module):
    """Interface of every backbone: `model(x_BCHW, t_B, y_B=None, drop=None) -> (B, 2C, H, W)`, C noise and C variance channels.

    `drop_rates` are the rates of drop path. `drop` has a multiplier (0 or 1 / keep) for each branch and sample, sampled by
    the caller. `forward` uses no random numbers, so it is the same function in training and in evaluation. A block
    of a built-in family reads its weights in its own `forward` only (training/joined.py).
    """

    __call__: Callable[..., Tensor]
    settings: FamilySettings
    time: "TimeEmbedding"
    label: nn.Embedding | None
    process: ClassVar[Literal["gaussian", "flow"]] = "gaussian"
    """Process that public weights of this network were trained for."""
    dynamics: ClassVar[frozenset[str]] = frozenset()
    """Last name parts of the parameters of a scan's dynamics. They have a separate learning rate and no weight decay."""
    vectors: ClassVar[frozenset[str]] = frozenset({"bias"})
    """Last name parts of parameters with several axes that an optimizer treats as vectors, like parameters with one axis."""
    undecayed: ClassVar[frozenset[str]] = frozenset({"bias", "position"})
    """Last name parts of other parameters with several axes that get no weight decay, which would spoil them."""
    precision: Precision = "fp32"
    """Precision of the products; `bf16` is bfloat16. Weights, the scans' dynamics and the residual stream stay float32."""
    drop_rates: tuple[float, ...] = ()
    keeps_states: bool = False
    """Whether scans keep their states for the backward pass, so that it recomputes none; has an effect only with Triton."""

    def __init__(
        self, settings: FamilySettings, shape: LatentShape, num_classes: int | None, scan: str = "auto", checkpointing: str = "none"
    ):
        super().__init__()
        patch = settings.patch
        if shape.size % patch:
            raise UserError(f"size {shape.size} is not divisible by patch {patch}: choose a patch that divides it")
        self.settings, self.shape, self.num_classes, self.patch = settings, shape, num_classes, patch
        self.scan, self.checkpointing = scan, checkpointing

    @property
    def compute_dtype(self) -> torch.dtype:
        """Type of the products' inputs and outputs: the weights' own, unless `precision` is bf16."""
        return torch.bfloat16 if self.precision == "bf16" else next(self.parameters()).dtype

    @property
    def tokens(self) -> int:
        """Number of tokens of an image."""
        return (self.shape.size // self.patch) ** 2

    def condition(self, t_B: Tensor, y_B: Tensor | None) -> Tensor:
        """Return the sum of the embeddings of time and label (B, D), in the type of the products."""
        c_BD: Tensor = self.time(t_B, self.compute_dtype)
        return c_BD if self.label is None or y_B is None else c_BD + self.label(y_B).to(c_BD.dtype)

    def decays(self, name: str, parameter: Tensor) -> bool:
        """Return whether weight decay applies: not to scans' dynamics, norms, biases and positions (as in Mamba and S4)."""
        return parameter.ndim > 1 and name.rpartition(".")[2] not in self.dynamics | self.undecayed

    def rate_group(self, name: str, parameter: Tensor) -> str:
        """Return a parameter's kind for learning-rate transfer over widths: output, product, or own (tables and vectors)."""
        if name.startswith(TABLES) or parameter.ndim < 2 or name.rpartition(".")[2] in self.dynamics | self.vectors:
            return "own"
        return "output" if name.startswith("final.") else "product"

    def scale_initial(self, weights: Mapping[str, Tensor], growth: Mapping[str, float], base_width: int) -> None:
        """Scale in place the initial weights that break the rules of models/transfer.py, which scales the output's itself."""

    def resized(self, name: str, weight: Tensor) -> tuple[Tensor, str] | None:
        """Return a weight for another number of patches in this model's shape, and a description of the change; None if there is
        no such conversion."""
        del name, weight
        return None

    def as_ours(self) -> "Backbone":
        """Return an equivalent model with our conventions: this one, or a new one if its time or sign is that of a public model."""
        return self

    def verify_kernels(self, device: torch.device, images: Collection[int], *, training: bool) -> None:
        """Compare the GPU kernels that the model runs with the reference; see `models.verify_kernels`."""

    def compile_blocks(self) -> None:
        """Compile each block at its first run. Blocks of one shape share the compiled code."""
        assert isinstance(self.blocks, nn.ModuleList)
        prepare_to_compile()
        for block in self.blocks:
            block.compile(dynamic=False)

    def check(self, x_BCHW: Tensor, y_B: Tensor | None) -> None:
        """Raise a UserError for an input that does not fit. Labels on a GPU are not checked: that would stall it."""
        channels, size = self.shape
        if x_BCHW.shape[1:] != (channels, size, size):
            raise UserError(f"input of shape {tuple(x_BCHW.shape)}: expected (batch, {channels}, {size}, {size})")
        if (y_B is None) != (self.num_classes is None):
            need = "has no classes, pass no labels" if self.num_classes is None else "is conditional, pass labels"
            raise UserError(f"the model {need} (num_classes is {self.num_classes})")
        if y_B is not None and self.num_classes is not None and y_B.device.type == "cpu":
            check_labels(y_B, self.num_classes)


def check_labels(y_B: Tensor, num_classes: int) -> None:
    """Raise a UserError for a label outside 0..num_classes; num_classes is the null class."""
    if y_B.numel() and not 0 <= int(y_B.min()) <= int(y_B.max()) <= num_classes:
        wrong = y_B[(y_B < 0) | (y_B > num_classes)][0].item()
        raise UserError(f"label {wrong} is out of range: expected 0 to {num_classes - 1}, or {num_classes} for no label")


def wide(x: Tensor) -> Tensor:
    """Return x in float32 or better: for values that must not be rounded to the weights' dtype."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def stream_norm(x_BTD: Tensor, dtype: torch.dtype, weight_D: Tensor | None = None) -> Tensor:
    """Return the layer norm of a float32 stream without parameters, or the RMS norm if given a weight, in `dtype`."""
    if weight_D is None:
        return F.layer_norm(x_BTD, x_BTD.shape[-1:], eps=1e-6).to(dtype)
    return F.rms_norm(x_BTD, weight_D.shape, weight_D.to(x_BTD.dtype), 1e-6).to(dtype)


def time_features(t_B: Tensor, dim: int) -> Tensor:
    """Return sinusoidal features (B, dim) of times, which may be fractional: cosines first, max period 10,000 (GLIDE)."""
    t_B, half = wide(t_B), dim // 2
    frequencies = torch.arange(half, dtype=t_B.dtype, device=t_B.device).mul(-math.log(10000.0) / half).exp()
    angles = t_B[:, None] * frequencies
    features = torch.cat([angles.cos(), angles.sin()], dim=1)
    return F.pad(features, (0, 1)) if dim % 2 else features


def uniform(*shape: int, bound: float) -> nn.Parameter:
    """Return a parameter, uniform in [-bound, bound]. PyTorch's default for a product or a convolution is 1 / sqrt(fan_in)."""
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))


def product(x_BLI: Tensor, weight_OI: Tensor) -> Tensor:
    """Return x W^T in x's type. The weights are rounded to it at each use, never in place."""
    return F.linear(x_BLI, weight_OI.to(x_BLI.dtype))


class Linear(nn.Linear):
    """A product in the type of its input. The weights are rounded to it at each use, never in place."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class TimeEmbedding(nn.Module):
    """Times (B,) to vectors (B, width): sinusoidal features, then a two-layer MLP."""

    def __init__(self, features: int, hidden: int, width: int):
        super().__init__()
        self.features = features
        self.up = Linear(features, hidden)
        self.down = Linear(hidden, width)

    def forward(self, t_B: Tensor, dtype: torch.dtype) -> Tensor:
        features_BF = time_features(t_B, self.features).to(dtype)
        embedded_BD: Tensor = self.down(F.silu(self.up(features_BF)))
        return embedded_BD


class PatchEmbed(Linear):
    """Image (B, C, H, W) to patches (B, T, D), row by row. One product, equal to the public models' strided convolution."""

    def __init__(self, channels: int, patch: int, width: int):
        super().__init__(channels * patch * patch, width)
        self.patch = patch

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return super().forward(patchify(x_BCHW, self.patch))


def patchify(x_BCHW: Tensor, patch: int) -> Tensor:
    """Reshape (B, C, H, W) to (B, T, C p p), with values in the order of a convolution's weight."""
    B, C, H, W = x_BCHW.shape
    x = x_BCHW.reshape(B, C, H // patch, patch, W // patch, patch)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(B, (H // patch) * (W // patch), C * patch * patch)


def unpatchify(x_BTP: Tensor, patch: int) -> Tensor:
    """Reshape (B, T, p p C) of a square image to (B, C, H, W); a patch's values are ordered by row, column, channel, as in DiT."""
    B, T, P = x_BTP.shape
    side, C = math.isqrt(T), P // (patch * patch)
    x = x_BTP.reshape(B, side, side, patch, patch, C)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(B, C, side * patch, side * patch)


def position_table(side: int, width: int) -> Tensor:
    """Return the fixed sine-cosine table (1, side^2, width): half for the column, half for the row, sines first (MAE)."""
    quarter = torch.arange(width // 4, dtype=torch.float64)
    place = torch.arange(side, dtype=torch.float64)
    angles = place[:, None] * 10000.0 ** (-quarter / (width / 4))
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    table = torch.cat([axis.repeat(side, 1), axis.repeat_interleave(side, dim=0)], dim=1)
    return table.float().unsqueeze(0)


def axial_angles(side: int, size: int) -> Tensor:
    """Return the angles (side^2, size / 2) of a head's channel pairs: the first half depends on the row, the rest on the column.

    Axial rotary positions as in EVA-02 (arXiv 2303.11331).
    """
    quarter = size // 4
    place = torch.arange(side, dtype=torch.float32)
    axis = place[:, None] * 10000.0 ** (-torch.arange(quarter, dtype=torch.float32) / quarter)
    return torch.cat([axis.repeat_interleave(side, dim=0), axis.repeat(side, 1)], dim=1)


def rotate(x_BLHd: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Turn each pair of neighbouring channels of a head by its token's angles, whose cosines and sines are (L, d / 2).

    Attention's output has the memory layout of its queries. With heads as the last axis but one, it need not be copied.
    """
    a, b = x_BLHd.unflatten(-1, (-1, 2)).unbind(-1)
    cosines, sines = cosines.unsqueeze(1), sines.unsqueeze(1)
    return torch.stack([a * cosines - b * sines, a * sines + b * cosines], dim=-1).flatten(-2)


def modulate(x_BLD: Tensor, shift_BD: Tensor | None, scale_BD: Tensor) -> Tensor:
    """Apply adaptive layer norm's affine part (DiT): x (1 + scale) + shift."""
    if shift_BD is None:
        return x_BLD * (1 + scale_BD).unsqueeze(1)
    return torch.addcmul(shift_BD.unsqueeze(1), x_BLD, (1 + scale_BD).unsqueeze(1))


def zero_(*layers: nn.Linear) -> None:
    """Set weights and biases to zero: the layer's output is zero at the start of training."""
    for layer in layers:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
