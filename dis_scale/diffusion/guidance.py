"""Classifier-free guidance (Ho and Salimans 2022) by one doubled batch, with and without labels; or guidance by a worse model.

Axes: B samples, C channels, H W height and width.
"""

from collections.abc import Collection, Sequence
from typing import Protocol

import torch
from torch import Tensor

from dis_scale.diffusion.process import ModelFn
from dis_scale.process.errors import UserError
from dis_scale.recipe import Sampling


class Labelled(Protocol):
    """A model that takes labels; the label `num_classes` means none."""

    num_classes: int | None

    def __call__(self, x_BCHW: Tensor, t_B: Tensor, y_B: Tensor | None = None, /) -> Tensor: ...


def guided(model: Labelled, y_B: Tensor | None, sampling: Sampling, guide: Labelled | None = None) -> ModelFn:
    """Return a model function u + scale (c - u) on the first guided channels (by default all noise channels).

    c is the model; u the model without labels, or `guide`, a worse model with the same labels or without (Karras et al. 2024,
    arXiv 2406.02507, equation 5). Scale 1 is the conditional model. An interval limits guidance to model times low <= t <= high
    (Kynkaanniemi et al. 2024). The variance channels are those of the conditional model. The times are the same for all samples;
    they are on the host, so that no step waits for a GPU to read one. UserError if labels and model do not fit, or if an
    unconditional model has a scale other than 1 and no `guide`.
    """
    scale, interval = sampling.scale, sampling.guidance_interval
    if sampling.guide and guide is None:
        raise UserError(f"guidance {sampling.guide}: that model is not given")
    if y_B is None or model.num_classes is None:
        if y_B is not None or model.num_classes is not None:
            raise UserError(f"labels and model do not fit: num_classes is {model.num_classes}, labels are {y_B}")
        if scale != 1 and guide is None:
            raise UserError(f"guidance {scale:g}: an unconditional model cannot be guided without another one, expected 1")
        both_2B = None
    else:
        both_2B = torch.cat([y_B, torch.full_like(y_B, model.num_classes)])

    def with_and_without(x_BCHW: Tensor, t_B: Tensor) -> Sequence[Tensor]:
        if guide is not None:
            return model(x_BCHW, t_B, y_B), guide(x_BCHW, t_B, y_B)
        return model(torch.cat([x_BCHW, x_BCHW]), torch.cat([t_B, t_B]), both_2B).chunk(2)

    def model_fn(x_BCHW: Tensor, t_B: Tensor) -> Tensor:
        guides = scale != 1 and (interval is None or interval[0] <= float(t_B[0]) <= interval[1])
        t_B = _filled(t_B, x_BCHW)
        if not guides:
            return model(x_BCHW, t_B, y_B)
        n = min(sampling.guidance_channels or x_BCHW.shape[1], x_BCHW.shape[1])
        with_BCHW, without_BCHW = with_and_without(x_BCHW, t_B)
        noise_BCHW = torch.lerp(without_BCHW[:, :n], with_BCHW[:, :n], scale)
        return torch.cat([noise_BCHW, with_BCHW[:, n:]], dim=1)

    return model_fn


def _filled(t_B: Tensor, x_BCHW: Tensor) -> Tensor:
    """Return the times on the device of the images. Filling a tensor there avoids a copy, which could wait for the GPU."""
    return t_B.new_full(t_B.shape, float(t_B[0]), device=x_BCHW.device)


def forward_images(batches: Collection[int], sampling: Sampling, *, by_model: bool = False) -> set[int]:
    """Return the image counts of the model's calls for batches of these sizes. Classifier-free guidance doubles them within its
    interval; guidance by a model does not."""
    if sampling.scale == 1 or by_model:
        return set(batches)
    factors = (2,) if sampling.guidance_interval is None else (1, 2)
    return {factor * images for factor in factors for images in batches}
