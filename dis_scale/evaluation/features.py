"""Images to features, by extractors with a name: Inception-v3, the sweep's own classifier, any TorchScript file.

Read next: inception.py for the first, measure.py for what becomes of the features.
"""

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from dis_scale import manifest
from dis_scale.errors import StorageError, UserError
from dis_scale.evaluation import inception
from dis_scale.recipe import Evaluate, ExtractorSettings, InceptionExtractor, TorchScriptExtractor, TrainedExtractor
from dis_scale.small_nets import Classifier
from dis_scale.storage import Folder, locate

JUDGE = "judge"
BATCH_IMAGES = 50
"""Images looked at at once: fixed, so that features are a function of the block alone."""
Net = Callable[[Tensor], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Features:
    """What one extractor sees in B images, float32: `pooled` (B, d); Inception adds `spatial` (B, 2023), `logits` (B, 1008)."""

    identity: str
    pooled: np.ndarray
    spatial: np.ndarray | None = None
    logits: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.pooled)


@dataclass(frozen=True)
class Extractor:
    """uint8 images (B, H, W, 3) to `Features`; `identity` is the sha256 of its weights and changes when the features do."""

    name: str
    identity: str
    net: Net
    """uint8 (B, 3, H, W) to one tensor (B, d) or Inception's three."""
    device: torch.device

    @torch.no_grad()
    def __call__(self, pixels_BHWC: np.ndarray) -> Features:
        images = torch.from_numpy(np.ascontiguousarray(pixels_BHWC.transpose(0, 3, 1, 2)))
        seen = [self.net(part.to(self.device)) for part in images.split(BATCH_IMAGES)]
        return Features(self.identity, *(torch.cat(parts).float().cpu().numpy() for parts in zip(*seen, strict=True)))


def load_extractors(settings: Evaluate, sweep: Folder, device: torch.device) -> list[Extractor]:
    """The recipe's extractors, the main one first, each one's weights checked by hash."""
    return [load_extractor(extractor, sweep, device) for extractor in settings.extractors]


def load_extractor(settings: ExtractorSettings, sweep: Folder, device: torch.device) -> Extractor:
    """One extractor; UserError or StorageError where its weights are missing or others."""
    found, net = identity(settings, sweep), _net(settings, sweep, device)
    return Extractor(settings.name, found, net, device)


def identity(settings: ExtractorSettings, sweep: Folder) -> str:
    """The sha256 of an extractor's weights, without opening them."""
    if isinstance(settings, InceptionExtractor):
        return inception.PUBLISHED.sha256
    if isinstance(settings, TrainedExtractor):
        return _classifier_manifest(sweep / "extractors" / settings.name)["files"]["weights.safetensors"]["sha256"]
    how = f"{settings.size}" if settings.size else ""
    return hashlib.sha256(_script(settings)).hexdigest() + how


def require_weights(settings: ExtractorSettings) -> None:
    """UserError where the recipe names weights that are not there or are others; before anything is spent."""
    if isinstance(settings, InceptionExtractor) and settings.weights:
        inception.read_weights(settings.weights)
    elif isinstance(settings, TorchScriptExtractor):
        _script(settings)


def _net(settings: ExtractorSettings, sweep: Folder, device: torch.device) -> Net:
    if isinstance(settings, InceptionExtractor):
        return inception.load(settings.weights).to(device)
    if isinstance(settings, TorchScriptExtractor):
        return _scripted(settings, device)
    classifier = load_classifier(sweep, settings.name).to(device)
    return lambda x_BCHW: (classifier.features(x_BCHW.float().div(127.5).sub(1)),)


def _scripted(settings: TorchScriptExtractor, device: torch.device) -> Net:
    try:
        net = torch.jit.load(io.BytesIO(_script(settings)), map_location=device).eval()
    except RuntimeError as error:
        raise UserError(f"{settings.path}: not a TorchScript file: {str(error).splitlines()[0]}") from error

    def run(x_BCHW: Tensor) -> tuple[Tensor]:
        output = net(_resized(x_BCHW, settings.size))
        features = output[0] if isinstance(output, tuple | list) else output
        if features.shape[:1] != x_BCHW.shape[:1] or features.ndim != 2:
            raise UserError(
                f"{settings.path}: features of shape {tuple(features.shape)} for {len(x_BCHW)} images, "
                f"expected ({len(x_BCHW)}, d) as its first output"
            )
        return (features,)

    return run


def _resized(x_BCHW: Tensor, size: int | None) -> Tensor:
    if size is None or x_BCHW.shape[-2:] == (size, size):
        return x_BCHW
    resized = F.interpolate(x_BCHW.float(), (size, size), mode="bilinear", antialias=True)
    return resized.round().clamp(0, 255).byte()


def _script(settings: TorchScriptExtractor) -> bytes:
    place, name = locate(settings.path)
    try:
        data = place.read(name)
    except FileNotFoundError as error:
        raise UserError(f"extractor {settings.name}: no file {settings.path}") from error
    found = hashlib.sha256(data).hexdigest()
    if settings.sha256 not in (None, found):
        raise UserError(f"{settings.path}: sha256 {found}, the recipe expects {settings.sha256}")
    return data


def store_classifier(sweep: Folder, name: str, net: Classifier, accuracy: float) -> None:
    """Puts a classifier below `extractors/`."""
    weights = safetensors.torch.save(net.state_dict())
    facts = {"kind": net.kind, "num_classes": net.num_classes, "held_out_accuracy": accuracy}
    manifest.put(sweep / "extractors" / name, {"weights.safetensors": weights}, **facts)


def load_classifier(sweep: Folder, name: str) -> Classifier:
    """A stored classifier in evaluation."""
    place = sweep / "extractors" / name
    found = _classifier_manifest(place)
    net = Classifier(found["kind"], found["num_classes"])
    net.load_state_dict(safetensors.torch.load(manifest.read(place, "weights.safetensors", found)))
    return net.eval()


def _classifier_manifest(place: Folder) -> dict:
    found = manifest.find(place)
    if found is None:
        raise StorageError(f"{place}: no classifier there: the prepare stage has not finished")
    return found
