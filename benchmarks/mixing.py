"""What mixed batches are worth: `python -m benchmarks.mixing [steps]`. Training on mixed shards against shards class by class.

A small DiS on images made here: ten classes of coloured stripes, 16 x 16 pixels, in 50 shards, as many as CIFAR-10 has. Both runs
read by the product's order; only the listing differs. Seeds, times and noise are equal. Prints for each seed the held-out loss of
the averaged weights over training, how far the loss of single weights swings, and the mean distance of samples to real images by
class: Fréchet's, between pixels at half resolution; first that of other real images, which a perfect model would reach.
"""

import copy
import json
import sys

import numpy as np
import torch
import torch.nn.functional as F

from dis_scale import diffusion, models
from dis_scale.data.mixing import permutation
from dis_scale.data.order import Order
from dis_scale.diffusion.generate import generate
from dis_scale.evaluation import metrics
from dis_scale.models.dis.settings import Dis
from dis_scale.models.tokens import Backbone
from dis_scale.recipe import Flow, LatentShape

CLASSES, IMAGES, SHARDS, BATCH, SIDE = 10, 10_000, 50, 64, 16
HELD_OUT, SAMPLES, SAMPLING_STEPS = 500, 200, 10
LEARNING_RATE, AVERAGED = 1e-3, 0.99
MODEL = Dis(kind="dis", width=64, depth=2, patch=4, drop_path=0.0)
PROCESS = diffusion.build(Flow(kind="flow"))
SEEDS = (1, 2, 3)
EVERY = 200


def stripes(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (count, 3, 16, 16) in [-1, 1], class by class, and their labels: a class has an angle, a width and a colour."""
    random = np.random.default_rng(seed)
    labels = np.sort(np.arange(count) % CLASSES)
    y, x = np.meshgrid(*(np.linspace(-1, 1, SIDE),) * 2)
    angle = np.pi * labels / CLASSES + random.normal(0, 0.1, count)
    width = 4 + 2 * (labels % 3) + random.normal(0, 0.3, count)
    phase = random.uniform(0, 2 * np.pi, count)
    wave = np.cos(
        width[:, None, None] * (x * np.cos(angle)[:, None, None] + y * np.sin(angle)[:, None, None])
        + phase[:, None, None]
    )
    colours = np.random.default_rng(0).uniform(0.2, 1, (CLASSES, 3))[labels] * random.uniform(0.7, 1.1, (count, 3))
    images = wave[:, None] * colours[:, :, None, None] + random.normal(0, 0.05, (count, 3, SIDE, SIDE))
    return torch.from_numpy(images.clip(-1, 1)).float(), torch.from_numpy(labels)


def batch_loss(model: Backbone, x_BCHW: torch.Tensor, y_B: torch.Tensor, random: np.random.Generator) -> torch.Tensor:
    t_B = PROCESS.sample_times(random, len(x_BCHW))
    noise_BCHW = torch.from_numpy(random.standard_normal(x_BCHW.shape, np.float32))
    return PROCESS.losses(lambda x, t: model(x, t, y_B).float(), x_BCHW, t_B, noise_BCHW).total.mean()


@torch.no_grad()
def held_out_loss(model: Backbone) -> float:
    x, y = stripes(HELD_OUT, seed=99)
    return float(batch_loss(model, x, y, np.random.default_rng(7)))


def train(mixed: bool, seed: int, steps: int) -> dict[str, object]:
    """Return the curves and the distance of one run."""
    x, y = stripes(IMAGES, seed=0)
    if mixed:
        order = torch.from_numpy(permutation(IMAGES))
        x, y = x[order], y[order]
    reader = Order([IMAGES // SHARDS] * SHARDS, seed)
    model = models.build(MODEL, LatentShape(3, SIDE), CLASSES, seed=seed)
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, (0.9, 0.999), weight_decay=0.0)
    random = np.random.default_rng(seed)
    curve, single, labels = [], [], []
    for step in range(1, steps + 1):
        shards, rows = reader.locate(np.arange((step - 1) * BATCH, step * BATCH))
        chosen = torch.from_numpy(shards * (IMAGES // SHARDS) + rows)
        labels.append(len(y[chosen].unique()))
        optimizer.zero_grad()
        batch_loss(model, x[chosen], y[chosen], random).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        for mean, p in zip(average.parameters(), model.parameters(), strict=True):
            mean.lerp_(p.detach(), 1 - AVERAGED)
        if step % EVERY == 0:
            curve.append(held_out_loss(average))
            single.append(held_out_loss(model))
    return {
        "labels_a_batch": round(float(np.mean(labels)), 2),
        "held_out_loss": [round(loss, 4) for loss in curve],
        "of_single_weights": [round(loss, 4) for loss in single],
        "distance": round(distance(samples(average)), 4),
    }


def samples(model: Backbone) -> torch.Tensor:
    """SAMPLES images of each class, class by class."""
    made = [
        generate(
            model, PROCESS, [label] * SAMPLES, range(label * SAMPLES, (label + 1) * SAMPLES), sampler="heun",
            steps=SAMPLING_STEPS, guidance=1.0, device=torch.device("cpu"),
        )
        for label in range(CLASSES)
    ]  # fmt: skip
    return torch.cat(made)


def distance(made: torch.Tensor) -> float:
    """The mean over classes of the distance between a class's images and its real ones."""
    real, _ = stripes(CLASSES * SAMPLES, seed=5)

    def features(images: torch.Tensor) -> metrics.MeanCovariance:
        return metrics.fit(F.avg_pool2d(images, 2).flatten(1).numpy())

    return float(
        np.mean(
            [
                metrics.frechet(*map(features, pair))
                for pair in zip(made.split(SAMPLES), real.split(SAMPLES), strict=True)
            ]
        )
    )


def main(steps: int = 1000) -> None:
    print(
        json.dumps({"name": "a perfect model", "distance": distance(stripes(CLASSES * SAMPLES, seed=6)[0])}), flush=True
    )
    for mixed in (False, True):
        for seed in SEEDS:
            name = "mixed" if mixed else "class by class"
            print(json.dumps({"name": name, "seed": seed, "steps": steps} | train(mixed, seed, steps)), flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
