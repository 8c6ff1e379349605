"""Images to features: the sweep's own classifier, or Inception-v3 for FID. The door to torch-fidelity.

Learnt the hard way: torch-fidelity neither checks the hash of the Inception weights nor loads them safely, so both happen here.
"""

import hashlib
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import nn

from dis_scale import manifest
from dis_scale.digits import Classifier
from dis_scale.errors import StorageError, UserError
from dis_scale.recipe import InceptionExtractor, TrainedExtractor
from dis_scale.storage import Folder
from dis_scale.vae import to_unit

JUDGE = "judge"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)


class Extractor:
    """Images to features; `identity` changes when the features do."""

    def __init__(self, identity: str, net: nn.Module, device: torch.device) -> None:
        self.identity, self._net, self._device = identity, net.to(device).eval(), device

    @torch.no_grad()
    def __call__(self, pixels_BHWC: np.ndarray) -> np.ndarray:
        """Features, float32 (B, d), of uint8 images (B, H, W, 3)."""
        if isinstance(self._net, Classifier):
            features = self._net.features(to_unit(pixels_BHWC).to(self._device))
        else:
            (features,) = self._net(
                torch.from_numpy(np.ascontiguousarray(pixels_BHWC.transpose(0, 3, 1, 2))).to(self._device)
            )
        return features.float().cpu().numpy()


def load_extractor(settings: TrainedExtractor | InceptionExtractor, sweep: Folder, device: torch.device) -> Extractor:
    """The recipe's extractor, its weights checked by hash."""
    if isinstance(settings, TrainedExtractor):
        net, identity = load_classifier(sweep, settings.name)
        return Extractor(identity, net, device)
    return Extractor(INCEPTION_SHA256, _inception(settings.weights), device)


def require_weights(settings: TrainedExtractor | InceptionExtractor) -> None:
    """UserError where the recipe names Inception weights that are not there or are others; before anything is spent."""
    if isinstance(settings, InceptionExtractor) and settings.weights:
        _check_weights(Path(settings.weights))


def store_classifier(sweep: Folder, name: str, net: Classifier, accuracy: float) -> None:
    """Puts a classifier below `extractors/`."""
    weights = safetensors.torch.save(net.state_dict())
    facts = {"kind": net.kind, "num_classes": net.num_classes, "held_out_accuracy": accuracy}
    manifest.put(sweep / "extractors" / name, {"weights.safetensors": weights}, **facts)


def load_classifier(sweep: Folder, name: str) -> tuple[Classifier, str]:
    """A stored classifier in evaluation, and its weights' sha256."""
    folder = sweep / "extractors" / name
    found = manifest.find(folder)
    if found is None:
        raise StorageError(f"{folder}: no classifier there: the prepare stage has not finished")
    net = Classifier(found["kind"], found["num_classes"])
    net.load_state_dict(safetensors.torch.load(manifest.read(folder, "weights.safetensors", found)))
    return net.eval(), found["files"]["weights.safetensors"]["sha256"]


def _inception(weights: str | None) -> nn.Module:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = Path(weights) if weights else _downloaded()
    _check_weights(path)
    return FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path))


def _check_weights(path: Path) -> None:
    if not path.exists():
        raise UserError(f"evaluate.extractor.weights: no file {path}; get {INCEPTION_URL} and name its path here")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != INCEPTION_SHA256:
        raise UserError(
            f"{path}: not the Inception weights that FID is defined by: sha256 {found}, expected {INCEPTION_SHA256}"
        )


def _downloaded() -> Path:
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(INCEPTION_URL).name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(INCEPTION_URL, str(path), hash_prefix=INCEPTION_SHA256[:8], progress=False)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"Inception weights cannot be downloaded ({error}); "
                f"get {INCEPTION_URL} and give its path as evaluate.extractor.weights"
            ) from error
    return path
