"""Images to features by named extractors: Inception-v3, the sweep's own classifier, any program of torch.export.

Read next: inception.py, and measure.py for the metrics.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from dis_scale.data.encode import tf32
from dis_scale.evaluation import inception
from dis_scale.evaluation.classifiers import Classifier
from dis_scale.process.errors import UserError
from dis_scale.recipe import ExportedExtractor, ExtractorSettings, InceptionExtractor
from dis_scale.sweep import Sweep
from dis_scale.sweep.documents import WEIGHTS_FILE, StoredClassifier
from dis_scale.sweep.extractors import read_extractor, weights_identity
from dis_scale.vae.exported import Programs

BATCH_IMAGES = 50
"""Images in a forward pass: fixed, so that features depend on the block only."""
Net = Callable[[Tensor], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Features:
    """One extractor's features of B images, float32: `pooled` (B, d); Inception adds `spatial` (B, 2023), `logits` (B, 1008)."""

    identity: str
    pooled: np.ndarray
    spatial: np.ndarray | None = None
    logits: np.ndarray | None = None


@dataclass(frozen=True)
class Extractor:
    """Maps uint8 images (B, H, W, 3) to `Features`; `identity` is the sha256 of its weights and changes when the features do."""

    name: str
    identity: str
    net: Net
    """Maps uint8 (B, 3, H, W) to one tensor (B, d) or Inception's three."""
    device: torch.device

    @torch.no_grad()
    @tf32(allowed=False)
    def __call__(self, pixels_BHWC: np.ndarray) -> Features:
        images = torch.from_numpy(np.ascontiguousarray(pixels_BHWC.transpose(0, 3, 1, 2)))
        outputs = [self.net(part.to(self.device)) for part in images.split(BATCH_IMAGES)]
        features = [torch.cat(parts).float().cpu().numpy() for parts in zip(*outputs, strict=True)]
        if bad := len(images) - int(np.all([np.isfinite(each).all(axis=1) for each in features], axis=0).sum()):
            raise UserError(f"{self.name}: its features of {bad} of {len(images)} images are not finite: is it in float16?")
        return Features(self.identity, *features)


def load_extractors(sweep: Sweep, device: torch.device) -> list[Extractor]:
    """Load the recipe's extractors, the main one first; checks the hash of their weights."""
    return [load_extractor(extractor, sweep, device) for extractor in sweep.recipe.evaluate.extractors]


def load_extractor(settings: ExtractorSettings, sweep: Sweep, device: torch.device) -> Extractor:
    """Load one extractor; UserError or StorageError if its weights are missing or have another hash."""
    return Extractor(settings.name, weights_identity(sweep, settings), _load_net(settings, sweep, device), device)


def require_weights(settings: ExtractorSettings) -> None:
    """Raise UserError if weights that the recipe names are missing or have another hash. Cheap enough for the start of a sweep."""
    if isinstance(settings, InceptionExtractor) and settings.weights:
        inception.read_weights(settings.weights)
    elif isinstance(settings, ExportedExtractor):
        read_extractor(settings)


def _load_net(settings: ExtractorSettings, sweep: Sweep, device: torch.device) -> Net:
    if isinstance(settings, InceptionExtractor):
        return inception.load(settings.weights).to(device)
    if isinstance(settings, ExportedExtractor):
        return _load_exported(settings, device, sweep.recipe.data.resolution)
    classifier = load_classifier(sweep, settings.name).to(device)
    return lambda x_BCHW: (classifier.features(x_BCHW.float().div(127.5).sub(1)),)


def _load_exported(settings: ExportedExtractor, device: torch.device, resolution: int) -> Net:
    """Load a program; UserError if it does not take both two images and one: a block's last batch may have any size."""
    programs = Programs({"features": read_extractor(settings)}, settings.path).to(device)

    def run(x_BCHW: Tensor) -> tuple[Tensor]:
        output = programs.run("features", _resized(x_BCHW, settings.size))
        features = output[0] if isinstance(output, tuple | list) and output else output
        shape = tuple(features.shape) if isinstance(features, Tensor) else ()
        if len(shape) != 2 or shape[0] != len(x_BCHW):
            got = f"of shape {shape}" if isinstance(features, Tensor) else f"in a {type(features).__name__}"
            raise UserError(
                f"{settings.path}: features {got} for {len(x_BCHW)} images, expected ({len(x_BCHW)}, d) as its first output"
            )
        return (features,)

    for images in (2, 1):
        run(torch.zeros((images, 3, resolution, resolution), dtype=torch.uint8, device=device))
    return run


def _resized(x_BCHW: Tensor, size: int | None) -> Tensor:
    if size is None or x_BCHW.shape[-2:] == (size, size):
        return x_BCHW
    resized = F.interpolate(x_BCHW.float(), (size, size), mode="bilinear", antialias=True)
    return resized.round().clamp(0, 255).byte()


def store_classifier(sweep: Sweep, name: str, net: Classifier, accuracy: float) -> None:
    """Write a classifier below `extractors/`."""
    classifier = StoredClassifier(files={}, kind=net.kind, num_classes=net.num_classes, held_out_accuracy=accuracy)
    classifier.put(sweep.extractor(name), {WEIGHTS_FILE: safetensors.torch.save(net.state_dict())})


def load_classifier(sweep: Sweep, name: str) -> Classifier:
    """Load a stored classifier in evaluation mode."""
    folder = sweep.extractor(name)
    stored = StoredClassifier.require(folder)
    net = Classifier(stored.kind, stored.num_classes)
    net.load_state_dict(safetensors.torch.load(stored.read_file(folder, WEIGHTS_FILE)))
    return net.eval()
