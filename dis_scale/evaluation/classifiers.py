"""Two small classifiers of small labelled images, trained on the sweep's images in a minute (data/sources.py).

One gives the features of `fd_<name>`. The other, of another architecture and seed, judges whether a sample is of the
requested class.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dis_scale.process import seeds
from dis_scale.process.imports import adamw
from dis_scale.process.progress import ReportDone
from dis_scale.process.threads import batched
from dis_scale.recipe.evaluate import FEATURE_DIMENSIONS
from dis_scale.vae import to_unit

HELD_OUT = 6
"""Every sixth image is held out from the classifiers' training and measures their accuracy."""
FEATURES = FEATURE_DIMENSIONS["trained"]


class Classifier(nn.Module):
    """Maps images in [-1, 1], (B, 3, R, R), to class scores; `features` is its last hidden layer, (B, 64)."""

    def __init__(self, kind: str, num_classes: int) -> None:
        super().__init__()
        self.kind, self.num_classes = kind, num_classes
        self.features = _extractor() if kind == "extractor" else _judge()
        self.scores = nn.Linear(FEATURES, num_classes)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        scores_BC: Tensor = self.scores(self.features(x_BCHW))
        return scores_BC


def train_classifier(
    kind: str, images: np.ndarray, labels: np.ndarray, num_classes: int, steps: int, seed: int, report: ReportDone
) -> tuple[Classifier, float]:
    """Train a classifier (`extractor` or `judge`); return it and its accuracy on the held-out images."""
    with torch.random.fork_rng():
        torch.manual_seed(seeds.seed(kind, seed) % 2**63)
        net = Classifier(kind, num_classes)
    held = np.arange(len(images)) % HELD_OUT == 0
    optimizer = adamw()(net.parameters(), 2e-3, weight_decay=1e-2)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    inputs, tested = (np.flatnonzero(chosen) for chosen in (~held, held))  # images stay bytes: as floats they take 4 x as much
    for step in range(steps):
        rows = inputs[seeds.generator(f"{kind} batch", seed, step).integers(0, len(inputs), 64)]
        loss = F.cross_entropy(net(_jitter(to_unit(images[rows]), kind, seed, step)), torch.from_numpy(labels[rows]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
        report(step + 1)
    net.eval()
    with torch.no_grad():
        right = sum(int((net(to_unit(images[rows])).argmax(1).numpy() == labels[rows]).sum()) for rows in batched(tested, 256))
    return net, right / len(tested)


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


def _jitter(x_BCHW: Tensor, kind: str, seed: int, step: int) -> Tensor:
    """Shift by up to a sixteenth and add a little noise, so that the classifier learns shapes."""
    rng = seeds.generator(f"{kind} jitter", seed, step)
    most = max(1, x_BCHW.shape[-1] // 16)
    down, right = rng.integers(-most, most + 1, 2).tolist()
    noise = torch.from_numpy(rng.standard_normal(x_BCHW.shape, np.float32))
    return torch.roll(x_BCHW, (down, right), (2, 3)) + 0.05 * noise
