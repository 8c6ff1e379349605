"""A small autoencoder for small images, trained on the sweep's images in a minute (data/sources.py)."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dis_scale import vae
from dis_scale.process import seeds
from dis_scale.process.imports import adamw
from dis_scale.process.progress import ReportDone
from dis_scale.recipe import TrainedVae
from dis_scale.vae import to_unit

if TYPE_CHECKING:
    from dis_scale.vae.autoencoders import AutoencoderKL


HALVES = 2
"""Parts of a batch, each of which a thread has to itself."""


def train_vae(settings: TrainedVae, images: np.ndarray, seed: int, report: ReportDone) -> "AutoencoderKL":
    """Train an autoencoder with mean squared error and a little KL, as in Stable Diffusion, on two CPU threads.

    Each thread computes half of a batch: two threads that share layers of this size need 1.7 to 3.8 times the CPU time, and wait
    for each other if a core is busy. The net's scale gives the posterior means deviation 1; samples of the posteriors deviate by a
    little more.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seeds.seed("vae", seed) % 2**63)
        net = vae.new(settings, images.shape[1])
    parameters = list(net.parameters())
    optimizer = adamw()(parameters, settings.learning_rate)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 2 * (1 - step / settings.steps)))

    def gradients(half: tuple[Tensor, torch.Generator]) -> tuple[Tensor, ...]:
        batch, noise = half
        posterior = net.encode(batch).latent_dist
        loss = F.mse_loss(net.decode(posterior.sample(noise)).sample, batch)
        loss = loss + settings.kl_weight * posterior.kl().mean() / batch[0].numel()
        return torch.autograd.grad(loss * (len(batch) / settings.batch_images), parameters)

    with _one_thread_each(), ThreadPoolExecutor(HALVES) as pool:
        for step in range(settings.steps):
            halves = pool.map(gradients, _halves(images, settings.batch_images, "vae batch", seed, step))
            for parameter, *parts in zip(parameters, *halves, strict=True):
                parameter.grad = sum(parts)
            optimizer.step()
            rates.step()
            report(step + 1)
    with torch.no_grad():
        means = torch.cat([net.encode(part).latent_dist.mode() for part in _parts(images)])
    net.register_to_config(scaling_factor=float(1 / means.std()))
    return net


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Let PyTorch compute in one thread, also in each Python thread that begins within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def reconstruction_error(net: "AutoencoderKL", images: np.ndarray) -> float:
    """Return the mean squared error of decode(encode(x)) in [-1, 1]."""
    with torch.no_grad():
        errors = [(net.decode(net.encode(x).latent_dist.mode()).sample - x).square().mean((1, 2, 3)) for x in _parts(images)]
    return float(torch.cat(errors).mean())


def _parts(images: np.ndarray) -> Iterator[Tensor]:
    """Yield 256 images at a time in [-1, 1]: as floats all of them would take four times their bytes."""
    return (to_unit(images[first : first + 256]) for first in range(0, len(images), 256))


def _halves(images: np.ndarray, size: int, *where: int | str) -> Iterator[tuple[Tensor, torch.Generator]]:
    """Yield the halves of a batch, each with the generator of its noise."""
    rng = seeds.generator(*where)  # type: ignore[arg-type]
    for half in to_unit(images[rng.integers(0, len(images), size)]).chunk(HALVES):
        yield half, torch.Generator().manual_seed(int(rng.integers(2**63)))
