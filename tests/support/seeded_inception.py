"""Inception-v3 with seeded weights in the published file's layout: real architecture, useful features, no download.

Default initialisation gives features of 2e-8, which test nothing. Here weights are Kaiming-normal, BatchNorm's statistics are
calibrated on a batch, and the last layer is scaled until the Inception Score is well above 1.
"""

import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from dis_scale.evaluation.inception import WeightsFile

NAME = "weights-inception-seeded-for-tests.pth"
LOGITS_SPREAD = 3.0


def blobs(count: int, seed: int, size: int = 32) -> np.ndarray:
    """Make images that differ in colour, position and size of a soft blob, uint8 (N, size, size, 3)."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, size)] * 2, indexing="ij"), -1)
    centres, widths = rng.uniform(-0.7, 0.7, (count, 1, 1, 2)), rng.uniform(0.1, 0.6, (count, 1, 1))
    shapes = np.exp(-((grid - centres) ** 2).sum(-1) / widths**2)
    colours, ground = rng.uniform(0, 1, (2, count, 1, 1, 3))
    noise = rng.normal(0, 0.03, (count, size, size, 3))
    pixels: np.ndarray = (255 * np.clip(ground + shapes[..., None] * (colours - ground) + noise, 0, 1)).astype(np.uint8)
    return pixels


def as_tensor(pixels_BHWC: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels_BHWC.transpose(0, 3, 1, 2).copy())


@cache
def state() -> dict[str, Tensor]:
    """Return the seeded weights by name."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        net = _empty(["2048"])
        for part in net.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight)
            if isinstance(part, nn.BatchNorm2d):
                part.momentum = None
                part.train()
        pooled = net(as_tensor(blobs(16, 1)))[0]
        nn.init.normal_(net.fc.weight)
        net.fc.weight.mul_(LOGITS_SPREAD / (pooled @ net.fc.weight.T).std(0).mean())
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def _empty(outputs: list[str]) -> FeatureExtractorInceptionV3:
    with mock.patch.object(FeatureExtractorInceptionV3, "load_state_dict"), mock.patch("torch.load"):
        return FeatureExtractorInceptionV3("inception-v3-compat", outputs, feature_extractor_weights_path="none")


@contextmanager
def of_small_images() -> Iterator[None]:
    """Inception's input is 75 x 75 pixels, its minimum, instead of 299 x 299."""
    with mock.patch.object(FeatureExtractorInceptionV3, "INPUT_IMAGE_SIZE", 75):
        yield


def write(folder: Path) -> tuple[Path, WeightsFile]:
    """Write the seeded weights to a file; return it and its expected size and hash."""
    buffer = io.BytesIO()
    torch.save(state(), buffer)
    data = buffer.getvalue()
    (folder / NAME).write_bytes(data)
    return folder / NAME, WeightsFile("made by tests", len(data), hashlib.sha256(data).hexdigest())
