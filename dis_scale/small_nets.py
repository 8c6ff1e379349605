"""Small networks for small labelled images: an autoencoder and two classifiers, trained on the sweep's images in a minute.

One classifier gives the features of `fd_<name>`. The other, of another architecture and seed, judges whether a sample is of the
requested class.
"""

from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dis_scale import seeds, vae
from dis_scale.data.sources import Source, select_decodable
from dis_scale.progress import ReportDone
from dis_scale.recipe import TrainedVae
from dis_scale.recipe.evaluate import FEATURE_DIMENSIONS
from dis_scale.vae import to_unit

if TYPE_CHECKING:
    from dis_scale.vae.autoencoders import AutoencoderKL

MOST_IMAGES = 8192
"""Most images that small networks are trained on, taken evenly from the source."""
HELD_OUT = 6
"""Every sixth image is held out from the classifiers' training and measures their accuracy."""
FEATURES = FEATURE_DIMENSIONS["trained"]


def training_images(
    source: Source, resolution: int, undecodable: Literal["refuse", "skip"]
) -> tuple[np.ndarray, np.ndarray]:
    """Return up to `MOST_IMAGES` images, uint8 (N, R, R, 3), and their labels, int64 (N)."""
    step = -(-len(source) // MOST_IMAGES)
    images, labels = [], []
    for i in range(0, len(source), step):
        one = range(i, i + 1)
        decodable, _ = select_decodable(one, source.decoded(one, resolution), undecodable)
        images += [pixels for _, pixels in decodable]
        labels += [source.labels[position] for position, _ in decodable]
    return np.stack(images), np.array(labels, dtype=np.int64)


def train_vae(settings: TrainedVae, images: np.ndarray, seed: int, report: ReportDone) -> "AutoencoderKL":
    """Train an autoencoder: mean squared error and a little KL, as Stable Diffusion.

    Its scale gives the posterior means deviation 1; samples of the posteriors deviate by a little more.
    """
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
        means = torch.cat([net.encode(part).latent_dist.mode() for part in unit.split(256)])
    net.register_to_config(scaling_factor=float(1 / means.std()))
    return net


def reconstruction_error(net: "AutoencoderKL", images: np.ndarray) -> float:
    """Return the mean squared error of decode(encode(x)) in [-1, 1]."""
    with torch.no_grad():
        errors = [
            (net.decode(net.encode(x).latent_dist.mode()).sample - x).square().mean((1, 2, 3))
            for x in to_unit(images).split(256)
        ]
    return float(torch.cat(errors).mean())


class Classifier(nn.Module):
    """Maps images in [-1, 1], (B, 3, R, R), to class scores; `features` is its last hidden layer, (B, 64)."""

    def __init__(self, kind: str, num_classes: int) -> None:
        super().__init__()
        self.kind, self.num_classes = kind, num_classes
        self.features = _extractor() if kind == "extractor" else _judge()
        self.scores = nn.Linear(FEATURES, num_classes)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.scores(self.features(x_BCHW))


def train_classifier(
    kind: str, images: np.ndarray, labels: np.ndarray, num_classes: int, steps: int, seed: int, report: ReportDone
) -> tuple[Classifier, float]:
    """Train a classifier (`extractor` or `judge`); return it and its accuracy on the held-out images."""
    with torch.random.fork_rng():
        torch.manual_seed(seeds.seed(kind, seed) % 2**63)
        net = Classifier(kind, num_classes)
    unit, held = to_unit(images), np.arange(len(images)) % HELD_OUT == 0
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=1e-2)
    inputs, targets = unit[~held], torch.from_numpy(labels[~held])
    for step in range(steps):
        rows = torch.from_numpy(seeds.generator(f"{kind} batch", seed, step).integers(0, len(inputs), 64))
        loss = F.cross_entropy(net(_jitter(inputs[rows], kind, seed, step)), targets[rows])
        _step(optimizer, loss, 2e-3 * (1 - step / steps))
        report(step + 1)
    net.eval()
    with torch.no_grad():
        correct = net(unit[held]).argmax(1) == torch.from_numpy(labels[held])
    return net, float(correct.float().mean())


def _extractor() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(), nn.Conv2d(64, 64, 3, 2, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(1024, FEATURES), nn.ReLU(),
    )  # fmt: skip


def _judge() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 24, 5, 2, 2), nn.GELU(), nn.Conv2d(24, 48, 5, 2, 2), nn.GELU(), nn.AdaptiveAvgPool2d(6),
        nn.Flatten(), nn.Linear(48 * 36, FEATURES), nn.GELU(),
    )  # fmt: skip


def _batch(unit: Tensor, size: int, *where: int | str) -> tuple[Tensor, torch.Generator]:
    rng = seeds.generator(*where)  # type: ignore[arg-type]
    rows = torch.from_numpy(rng.integers(0, len(unit), size))
    return unit[rows], torch.Generator().manual_seed(int(rng.integers(2**63)))


def _jitter(x_BCHW: Tensor, kind: str, seed: int, step: int) -> Tensor:
    """Shift by up to a sixteenth and add a little noise, so that the classifier learns shapes."""
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
