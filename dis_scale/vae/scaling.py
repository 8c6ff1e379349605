"""The scaling between an autoencoder's latents and those that the backbone sees. Training applies it, decoding undoes it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dis_scale.process.errors import UserError
from dis_scale.recipe import Normalise
from dis_scale.sweep.documents import LatentsManifest

FLOAT16 = np.finfo(np.float16)
"""Format of stored latents: a channel that deviates by less than the rounding of its mean is constant."""


@dataclass(frozen=True)
class Scaling:
    """z <- (z - shift) scale, each one number or one a channel."""

    shift: float | Sequence[float]
    scale: float | Sequence[float]

    @classmethod
    def of(cls, latents: LatentsManifest, normalise: Normalise) -> "Scaling":
        """Return the scaling of a set of latents from its manifest; by channel, samples of the posteriors get deviation 1.

        UserError if a channel is constant.
        """
        if normalise == "vae":
            return cls(latents.encoding.shift, latents.encoding.scale)
        deviations = np.sqrt(np.square(latents.std) + latents.posterior_variance)
        constant = deviations <= FLOAT16.smallest_subnormal + FLOAT16.eps / 2 * np.abs(latents.mean)
        if constant.any():
            raise UserError(f"data.normalise: channels {constant.nonzero()[0].tolist()} of the latents are constant: set it to vae")
        return cls(latents.mean, (1 / deviations).tolist())

    def is_close(self, other: "Scaling") -> bool:
        """Return whether both scale alike, within the differences between kinds of devices for the same images."""
        return bool(np.allclose(self.shift, other.shift, 0.01, 0.01) and np.allclose(self.scale, other.scale, 0.01))

    def apply(self, latents_BCHW: np.ndarray) -> np.ndarray:
        """Scale float32 latents in place."""
        latents_BCHW -= _by_channel(self.shift).numpy()
        latents_BCHW *= _by_channel(self.scale).numpy()
        return latents_BCHW

    def undo(self, latents_BCHW: torch.Tensor) -> torch.Tensor:
        """Return the autoencoder's latents for scaled latents."""
        shift, scale = (_by_channel(value, latents_BCHW.device) for value in (self.shift, self.scale))
        return latents_BCHW / scale + shift


def _by_channel(value: float | Sequence[float], device: torch.device | None = None) -> torch.Tensor:
    """Return a float32 tensor: (C, 1, 1) on the device, or () on the CPU, which PyTorch treats as a number."""
    tensor = torch.tensor(value, dtype=torch.float32)
    return tensor[:, None, None].to(device) if tensor.ndim else tensor
