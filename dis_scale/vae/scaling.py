"""The scaling between an autoencoder's latents and those that the backbone sees. Training applies it, decoding undoes it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dis_scale.errors import UserError
from dis_scale.recipe import Normalise


@dataclass(frozen=True)
class Scaling:
    """z <- (z - shift) scale, each one number or one a channel."""

    shift: float | Sequence[float]
    scale: float | Sequence[float]

    @classmethod
    def of(cls, facts: Mapping[str, Any], normalise: Normalise) -> "Scaling":
        """Return the scaling of a set of latents from its manifest; UserError if it needs a deviation that is 0."""
        if normalise == "vae":
            return cls(facts["shift"], facts["scale"])
        if constant := [channel for channel, deviation in enumerate(facts["std"]) if not deviation]:
            raise UserError(f"data.normalise: channels {constant} of the latents are constant: set it to vae")
        return cls(facts["mean"], [1 / deviation for deviation in facts["std"]])

    def apply(self, latents_BCHW: np.ndarray) -> np.ndarray:
        """Scale float32 latents in place."""
        latents_BCHW -= _by_channel(self.shift).numpy()
        latents_BCHW *= _by_channel(self.scale).numpy()
        return latents_BCHW

    def undo(self, latents_BCHW: torch.Tensor) -> torch.Tensor:
        """Return the autoencoder's latents of scaled ones."""
        shift, scale = (_by_channel(value, latents_BCHW.device) for value in (self.shift, self.scale))
        return latents_BCHW / scale + shift


def _by_channel(value: float | Sequence[float], device: torch.device | None = None) -> torch.Tensor:
    """Return float32: (), which stays on the CPU, as PyTorch treats it as a number; or (C, 1, 1) on the device."""
    tensor = torch.tensor(value, dtype=torch.float32)
    return tensor[:, None, None].to(device) if tensor.ndim else tensor
