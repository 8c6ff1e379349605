"""Inception-v3 of FID with its 2015 TensorFlow weights, as torch-fidelity ships both. The door to torch-fidelity.

Pitfalls: torch-fidelity neither checks the hash of the weights nor loads them safely. This module does both: it hashes the bytes,
opens them without pickled code, and packs them again for torch-fidelity.
"""

import hashlib
import io
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dis_scale.process.errors import StorageAway, StorageError, UserError
from dis_scale.recipe.evaluate import FEATURE_DIMENSIONS, INCEPTION_SHA256
from dis_scale.storage.folder import locate

UNVERIFIED = "not verified against published tables"
"""Note on every absolute FID until these weights have reproduced a published one here."""
FEATURES, SPATIAL, CLASSES = FEATURE_DIMENSIONS["inception"], 17 * 17 * 7, 1008
SPATIAL_CHANNELS = 7


class WeightsFile(NamedTuple):
    """One published file, identified by its size and sha256."""

    url: str
    size: int
    sha256: str


PUBLISHED = WeightsFile(
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    95_628_359,
    INCEPTION_SHA256,
)


class Inception(nn.Module):
    """Maps uint8 images (B, 3, H, W) of any size to pooled features (B, 2048), spatial ones (B, 2023) and logits (B, 1008).

    Spatial features are ADM's for sFID: the first 7 channels of `Mixed_6d.branch1x1` after its ReLU, 17 x 17 x 7 flattened as
    (h, w, c). Logits have no bias, as in torch-fidelity's and ADM's Inception Score.
    """

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        packed = io.BytesIO()
        torch.save(state, packed)
        packed.seek(0)
        name, outputs = "inception-v3-compat", ["2048", "logits_unbiased"]
        self.net = FeatureExtractorInceptionV3(name, outputs, feature_extractor_weights_path=packed)
        self.net.to(memory_format=torch.channels_last)  # a third less time on a CPU, equal sums
        self.net.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial)
        self._spatial = torch.empty(0)

    def forward(self, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pooled, logits = self.net(pixels_BCHW)
        return pooled, self._spatial, logits

    def _keep_spatial(self, _: nn.Module, __: tuple[Tensor, ...], x_BCHW: Tensor) -> None:
        self._spatial = x_BCHW[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)


def load(weights: str | None) -> Inception:
    """Load Inception with the published weights, from a path or URL or by download; UserError for other weights."""
    return Inception(read_weights(weights or _downloaded()))


def read_weights(where: str, expected: WeightsFile = PUBLISHED) -> dict[str, Tensor]:
    """Read the weights of a file. It is opened only if its size and sha256 are those expected; UserError otherwise."""
    parent, name = locate(where)
    try:
        data = parent.read(name)
    except (FileNotFoundError, IsADirectoryError, StorageError) as error:
        raise UserError(
            f"evaluate.extractor.weights (measure: --weights): cannot read {where}; get {expected.url} and give its path"
        ) from error
    digest = hashlib.sha256(data).hexdigest()
    if (len(data), digest) != (expected.size, expected.sha256):
        raise UserError(
            f"{where}: not the Inception weights that FID is defined by: {len(data):,} bytes with sha256 {digest}, "
            f"expected {expected.size:,} bytes with {expected.sha256}; get {expected.url}"
        )
    state: dict[str, Tensor] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return state


def _downloaded() -> str:
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(PUBLISHED.url).name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(PUBLISHED.url, str(path), PUBLISHED.sha256[:8], progress=False)
        except (OSError, RuntimeError) as error:
            status = getattr(error, "code", 0)  # 0: no answer came, for example on a node without internet access
            raise (StorageAway if status == 429 or status >= 500 else UserError)(
                f"Inception weights cannot be downloaded ({error}); "
                f"get {PUBLISHED.url} and give its path as evaluate.extractor.weights, or as --weights to dis-scale measure"
            ) from error
    return str(path)
