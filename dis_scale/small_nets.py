"""The embedded example's own parts in one room: a small autoencoder and two classifiers, trained on the sweep's images in a minute.

They serve any small labelled images, not digits alone. One classifier gives the features of `fd_<name>`; the other, of another
architecture and seed, judges whether a sample is of the class that was asked for.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dis_scale import seeds, vae
from dis_scale.data.sources import Source
from dis_scale.errors import UndecodableImage
from dis_scale.recipe import TrainedVae
from dis_scale.vae import to_unit

if TYPE_CHECKING:
    from dis_scale.vae import AutoencoderKL

MOST_IMAGES = 8192
"""Small networks are trained on so many images at most, taken evenly from the source."""
HELD_OUT = 6
"""Every sixth image is kept from the classifiers' training and gives their accuracy."""
Report = Callable[[int], None]


def sample_images(source: Source, resolution: int, skip_undecodable: bool) -> tuple[np.ndarray, np.ndarray]:
    """Up to `MOST_IMAGES` images, uint8 (N, R, R, 3), and their labels, int64 (N)."""
    step = -(-len(source) // MOST_IMAGES)
    images, labels = [], []
    for i in range(0, len(source), step):
        try:
            images.append(source.pixels(i, resolution))
        except UndecodableImage:
            if not skip_undecodable:
                raise
            continue
        labels.append(source.labels[i])
    return np.stack(images), np.array(labels, dtype=np.int64)


def train_vae(settings: TrainedVae, images: np.ndarray, seed: int, report: Report) -> "AutoencoderKL":
    """An autoencoder whose scaled latents have unit variance: mean squared error and a little KL, as Stable Diffusion's."""
    with torch.random.fork_rng():
        torch.manual_seed(seeds.seed("vae", seed) % 2**63)
        net = vae.new(settings, images.shape[1])
    unit = to_unit(images)
    optimizer = torch.optim.AdamW(net.parameters(), settings.learning_rate)
    for step in range(settings.steps):
        batch, noise = _batch(unit, settings.batch_images, "vae batch", seed, step)
        posterior = net.encode(batch).latent_dist
        loss = F.mse_loss(net.decode(posterior.sample(noise)).sample, batch)
        loss = loss + settings.kl_weight * posterior.kl().mean() / batch[0].numel()
        _step(optimizer, loss, settings.learning_rate * min(1.0, 2 * (1 - step / settings.steps)))
        report(step + 1)
    with torch.no_grad():
        latents = torch.cat([net.encode(part).latent_dist.mode() for part in unit.split(256)])
    net.register_to_config(scaling_factor=float(1 / latents.std()))
    return net


def reconstruction_error(net: "AutoencoderKL", images: np.ndarray) -> float:
    """Mean squared error of decode(encode(x)) in [-1, 1]."""
    with torch.no_grad():
        errors = [
            (net.decode(net.encode(x).latent_dist.mode()).sample - x).square().mean((1, 2, 3))
            for x in to_unit(images).split(256)
        ]
    return float(torch.cat(errors).mean())


class Classifier(nn.Module):
    """uint8-range images in [-1, 1], (B, 3, R, R), to class scores; `features` gives its last hidden layer, (B, 64)."""

    def __init__(self, kind: str, num_classes: int) -> None:
        super().__init__()
        self.kind, self.num_classes = kind, num_classes
        self.features = _extractor() if kind == "extractor" else _judge()
        self.scores = nn.Linear(64, num_classes)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.scores(self.features(x_BCHW))


def train_classifier(
    kind: str, images: np.ndarray, labels: np.ndarray, num_classes: int, steps: int, seed: int, report: Report
) -> tuple[Classifier, float]:
    """A classifier (`extractor` or `judge`) and its accuracy on the images held out."""
    with torch.random.fork_rng():
        torch.manual_seed(seeds.seed(kind, seed) % 2**63)
        net = Classifier(kind, num_classes)
    unit, held = to_unit(images), np.arange(len(images)) % HELD_OUT == 0
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=1e-2)
    seen, names = unit[~held], torch.from_numpy(labels[~held])
    for step in range(steps):
        rows = torch.from_numpy(seeds.generator(f"{kind} batch", seed, step).integers(0, len(seen), 64))
        loss = F.cross_entropy(net(_jitter(seen[rows], kind, seed, step)), names[rows])
        _step(optimizer, loss, 2e-3 * (1 - step / steps))
        report(step + 1)
    net.eval()
    with torch.no_grad():
        right = net(unit[held]).argmax(1) == torch.from_numpy(labels[held])
    return net, float(right.float().mean())


def _extractor() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(), nn.Conv2d(64, 64, 3, 2, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(1024, 64), nn.ReLU(),
    )  # fmt: skip


def _judge() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 24, 5, 2, 2), nn.GELU(), nn.Conv2d(24, 48, 5, 2, 2), nn.GELU(), nn.AdaptiveAvgPool2d(6),
        nn.Flatten(), nn.Linear(48 * 36, 64), nn.GELU(),
    )  # fmt: skip


def _batch(unit: Tensor, size: int, *where: int | str) -> tuple[Tensor, torch.Generator]:
    rng = seeds.generator(*where)  # type: ignore[arg-type]
    rows = torch.from_numpy(rng.integers(0, len(unit), size))
    return unit[rows], torch.Generator().manual_seed(int(rng.integers(2**63)))


def _jitter(x_BCHW: Tensor, kind: str, seed: int, step: int) -> Tensor:
    """Shifted by up to a sixteenth and slightly noisy, so that the classifier looks at shapes."""
    rng = seeds.generator(f"{kind} jitter", seed, step)
    most = max(1, x_BCHW.shape[-1] // 16)
    down, right = rng.integers(-most, most + 1, 2).tolist()
    noise = torch.from_numpy(rng.standard_normal(x_BCHW.shape, np.float32))
    return torch.roll(x_BCHW, (down, right), (2, 3)) + 0.05 * noise


def _step(optimizer: torch.optim.Optimizer, loss: Tensor, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
