"""The loss on images that training never sees, at fixed noise levels with fixed noise: comparable between checkpoints."""

from collections import defaultdict

import numpy as np
import torch
from torch import Tensor

from dis_scale.data.latents import Latents, sample_posterior
from dis_scale.diffusion import Process
from dis_scale.diffusion.generate import batch_sizes
from dis_scale.models import verify_kernels
from dis_scale.models.tokens import Backbone
from dis_scale.process import seeds
from dis_scale.process.threads import batched

LEVELS = 8
"""Noise levels: the middles of this many equal parts of the process's time."""


@torch.no_grad()
def losses(model: Backbone, process: Process, latents: Latents, seed: int, batch: int) -> dict[str, float]:
    """Return `held_out_loss`, the mean over all levels, and one loss a level, as `held_out_loss/t0062` (time in thousandths).

    Memory holds a batch at a time.
    """
    device, times = next(model.parameters()).device, (torch.arange(LEVELS) + 0.5) / LEVELS
    verify_kernels(model, device, batch_sizes(len(latents.order.held_out.shards), batch), training=False)
    posterior, noise = (seeds.generator(f"held-out {what}", seed) for what in ("posterior", "noise"))
    by_level = defaultdict[str, list[Tensor]](list)
    for part in batched(latents.held_out(), batch):
        moments, labels = (np.stack(column) for column in zip(*part, strict=True))
        x = latents.scaling.apply(sample_posterior(moments, posterior))
        on_host = x, noise.standard_normal(x.shape, np.float32), labels
        x_BCHW, noise_BCHW, y_B = (torch.from_numpy(array).to(device) for array in on_host)
        for t in times:
            by_level[f"held_out_loss/t{1000 * t:04.0f}"].append(_losses_at(model, process, t, x_BCHW, noise_BCHW, y_B))
    means = {name: float(torch.cat(each).double().mean()) for name, each in by_level.items()}
    return {"held_out_loss": float(np.mean(list(means.values())))} | means


def _losses_at(model: Backbone, process: Process, share: Tensor, x_BCHW: Tensor, noise_BCHW: Tensor, y_B: Tensor) -> Tensor:
    """Return each image's loss at one level: `share` of the process's time."""
    t = (share * process.num_steps).long() if process.num_steps else share

    def model_fn(x_BCHW: Tensor, t_B: Tensor) -> Tensor:
        return model(x_BCHW, t_B, None if model.num_classes is None else y_B).float()

    parts = process.losses(model_fn, x_BCHW, t.to(x_BCHW.device).expand(len(x_BCHW)), noise_BCHW)
    return parts.mse + parts.vb  # comparable between losses of a flow, which weigh the times differently
