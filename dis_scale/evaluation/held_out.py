"""The loss on images that training never sees, at fixed noise levels with fixed noise: comparable between checkpoints."""

import numpy as np
import torch

from dis_scale.data.latents import Latents, sample_posterior
from dis_scale.diffusion import Process
from dis_scale.diffusion.generate import batch_sizes
from dis_scale.models import verify_kernels
from dis_scale.models.tokens import Backbone
from dis_scale.process import seeds

LEVELS = 8
"""Noise levels: the middles of this many equal parts of the process's time."""


@torch.no_grad()
def losses(model: Backbone, process: Process, latents: Latents, seed: int, batch: int) -> dict[str, float]:
    """Return `held_out_loss`, the mean over all levels, and one loss a level, as `held_out_loss/t0062` (time in thousandths)."""
    moments, labels = (np.stack(column) for column in zip(*latents.held_out(), strict=True))
    x_BCHW = latents.scaling.apply(sample_posterior(moments, seeds.generator("held-out posterior", seed)))
    noise_BCHW = seeds.generator("held-out noise", seed).standard_normal(x_BCHW.shape, np.float32)
    device = next(model.parameters()).device
    verify_kernels(model, device, batch_sizes(len(x_BCHW), batch), training=False)
    data = [torch.from_numpy(array).split(batch) for array in (x_BCHW, noise_BCHW, labels)]  # a GPU gets a batch at a time
    times = (torch.arange(LEVELS) + 0.5) / LEVELS
    by_level = {f"held_out_loss/t{1000 * t:04.0f}": _loss_at(model, process, t, data) for t in times}
    return {"held_out_loss": float(np.mean(list(by_level.values())))} | by_level


def _loss_at(model: Backbone, process: Process, share: torch.Tensor, data: list[tuple[torch.Tensor, ...]]) -> float:
    """Return the mean over all images at one level: `share` of the process's time."""
    t = (share * process.num_steps).long() if process.num_steps else share
    each, device = [], next(model.parameters()).device
    for on_host in zip(*data, strict=True):
        x_BCHW, noise_BCHW, y_B = (part.to(device) for part in on_host)
        t_B = t.to(x_BCHW.device).expand(len(x_BCHW))

        def model_fn(x_BCHW: torch.Tensor, t_B: torch.Tensor, y_B: torch.Tensor = y_B) -> torch.Tensor:
            return model(x_BCHW, t_B, None if model.num_classes is None else y_B).float()

        parts = process.losses(model_fn, x_BCHW, t_B, noise_BCHW)
        each.append(parts.mse + parts.vb)  # comparable between losses of a flow, which weigh the times differently
    return float(torch.cat(each).double().mean())
