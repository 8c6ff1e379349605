"""Best learning rate at two widths, with and without `base_width`: `python -m benchmarks.learning_rates`.

Small DiTs on scikit-learn's 8x8 digits as they are, for a few hundred steps at each rate. Prints the loss over the last steps by
rate, and the best rate. Without `base_width` it falls with the width; with it, it should stay. Read next: coordinates.py.
"""

import json

import numpy as np
import torch
from sklearn.datasets import load_digits

from dis_scale import diffusion, models
from dis_scale.models import transfer
from dis_scale.models.dit.settings import Dit
from dis_scale.recipe import Flow, LatentShape, Train
from dis_scale.training.engine import parameter_groups

BASE_WIDTH, WIDTH, HEAD_SIZE, DEPTH = 32, 128, 16, 2
RATES = [2.0**-n for n in range(11, 4, -1)]
STEPS, LAST, BATCH = 300, 50, 64


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Images (n, 1, 8, 8) in [-1, 1] and their classes."""
    images, labels = load_digits(return_X_y=True)
    return torch.from_numpy(images / 8 - 1).float().reshape(-1, 1, 8, 8), torch.from_numpy(labels)


def last_loss(width: int, base_width: int | None, rate: float) -> float:
    """The mean loss of the last steps; all runs see the same images, times and noise."""
    heads = width // HEAD_SIZE
    model = models.build(Dit(kind="dit", width=width, depth=DEPTH, heads=heads, patch=2), LatentShape(1, 8), 10)
    if base_width:
        transfer.scale_initial(model, base_width)
    settings = Train(publish_images=(BATCH,), batch_images=BATCH, lanes=1, base_width=base_width)
    groups = [group | {"lr": rate * group["rate"]} for group in parameter_groups(model, settings)]
    optimizer, process, rng = torch.optim.AdamW(groups), diffusion.build(Flow(kind="flow")), np.random.default_rng(0)
    images, labels = digits()
    losses = []
    for _ in range(STEPS):
        chosen = rng.integers(len(images), size=BATCH)
        y, t_B = labels[chosen], process.sample_times(rng, BATCH)
        noise = torch.from_numpy(rng.standard_normal((BATCH, 1, 8, 8), np.float32))
        optimizer.zero_grad()
        loss = process.losses(lambda x, t, y=y: model(x, t, y), images[chosen], t_B, noise).total.mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return float(np.mean(losses[-LAST:]))


def main() -> None:
    torch.set_num_threads(1)
    for width, base_width in ((BASE_WIDTH, None), (WIDTH, None), (WIDTH, BASE_WIDTH)):
        by_rate = {rate: round(last_loss(width, base_width, rate), 4) for rate in RATES}
        best = min(by_rate, key=lambda rate: by_rate[rate])
        print(json.dumps({"width": width, "base_width": base_width, "best_rate": best, "loss": by_rate}), flush=True)


if __name__ == "__main__":
    main()
