"""Held-out loss after training in fp32 and in bf16, three seeds each: `python -m benchmarks.precision [steps]`.

DiS and DiffuSSM of two blocks at 256 tokens, on the digits at 16 x 16 pixels. With dynamics rounded to bfloat16, DiffuSSM's
loss was 6 to 9 % higher. Seeds, batches, times and noise are the same in both precisions.
"""

import json
import statistics
import sys

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from dis_scale import diffusion, models
from dis_scale.diffusion.process import Process
from dis_scale.models.diffussm.settings import DiffuSsm
from dis_scale.models.dis.settings import Dis
from dis_scale.models.tokens import Backbone
from dis_scale.recipe import Flow, LatentShape, Precision

SHAPE, BATCH, HELD_OUT, LEARNING_RATE = LatentShape(1, 16), 32, 256, 1e-3
SETTINGS = {
    "dis": Dis(kind="dis", width=32, depth=2, patch=1, drop_path=0.0),
    "diffussm": DiffuSsm(kind="diffussm", width=32, depth=2),
}
SEEDS = (1, 2, 3)


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Images (1797, 1, 16, 16) in [-1, 1] and labels, in a fixed random order."""
    order = np.random.default_rng(0).permutation(1797)
    images, labels = load_digits(return_X_y=True)
    x_N1HW = torch.from_numpy(images[order]).float().view(-1, 1, 8, 8) / 8 - 1
    return F.interpolate(x_N1HW, scale_factor=2, mode="bilinear"), torch.from_numpy(labels[order])


def held_out_loss(family: str, precision: Precision, seed: int, steps: int) -> float:
    """Train with AdamW on all but the held-out digits; return the mean loss of these."""
    x, y = digits()
    process = diffusion.build(Flow(kind="flow"))
    model = models.build(SETTINGS[family], SHAPE, 10, precision=precision, seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, (0.9, 0.999), weight_decay=0.0)
    random = np.random.default_rng(seed)
    for _ in range(steps):
        chosen = torch.from_numpy(random.integers(HELD_OUT, len(x), BATCH))
        optimizer.zero_grad()
        _loss(model, process, x[chosen], y[chosen], random).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    random = np.random.default_rng(seed + 1000)
    with torch.no_grad():
        return float(_loss(model, process, x[:HELD_OUT], y[:HELD_OUT], random))


def _loss(
    model: Backbone, process: Process, x_B1HW: torch.Tensor, y_B: torch.Tensor, random: np.random.Generator
) -> torch.Tensor:
    t_B = process.sample_times(random, len(x_B1HW))
    noise_B1HW = torch.from_numpy(random.standard_normal(x_B1HW.shape, np.float32))
    return process.losses(lambda x, t: model(x, t, y_B).float(), x_B1HW, t_B, noise_B1HW).total.mean()


def main(steps: int = 330) -> None:
    for family in SETTINGS:
        fp32, bf16 = ([held_out_loss(family, p, seed, steps) for seed in SEEDS] for p in ("fp32", "bf16"))
        differences = [b / a - 1 for a, b in zip(fp32, bf16, strict=True)]
        facts = {"spread": statistics.stdev(fp32) / statistics.mean(fp32), "difference": statistics.mean(differences)}
        print(json.dumps({"name": family, "steps": steps, "fp32": fp32, "bf16": bf16} | facts), flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
