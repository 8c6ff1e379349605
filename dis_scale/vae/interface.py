"""The interface of autoencoders, `Vae`: uint8 images to latents and back; and the one that leaves images as they are.

Read next: autoencoders.py, for those of diffusers.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import nn

from dis_scale.process.errors import NotFinite
from dis_scale.recipe import LatentShape
from dis_scale.vae.scaling import Scaling

NO_VARIANCE = float(torch.finfo(torch.float16).min)
"""A log-variance with deviation exp(NO_VARIANCE / 2) = 0 exactly in float32: a sample of the posterior is its mean."""


@dataclass(frozen=True)
class Vae(ABC):
    """Encodes uint8 images to moments, the parameters of their posterior, and decodes scaled latents to images."""

    net: Any
    """The network, to be moved between devices; the identity if there is none."""
    normalised: Scaling | None = field(default=None, kw_only=True)
    """Scaling of the latents that `decode` gets, if it is not the VAE's own."""

    @property
    def scale(self) -> float | list[float]:
        """Scale of the latents, one number or one a channel."""
        return 1.0

    @property
    def shift(self) -> float | list[float]:
        """Shift of the latents, one number or one a channel."""
        return 0.0

    @property
    @abstractmethod
    def identity(self) -> str:
        """Hash that changes when the latents of an image do."""

    @property
    def posterior(self) -> bool:
        """Whether moments are mean and log-variance, (B, 2C, h, w); otherwise only the latents, (B, C, h, w)."""
        return True

    @abstractmethod
    def latent(self, resolution: int) -> LatentShape:
        """Return the latents' shape for images of `resolution` pixels a side."""

    @abstractmethod
    def _encode(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """Return the moments of images in [-1, 1], on the network's device or on the CPU."""

    @abstractmethod
    def _decode(self, latents_BCHW: torch.Tensor) -> torch.Tensor:
        """Return images in [-1, 1] of the network's own latents."""

    @property
    def device(self) -> torch.device:
        """The network's device; the CPU if it has neither weights nor buffers."""
        return next((tensor.device for tensor in chain(self.net.parameters(), self.net.buffers())), torch.device("cpu"))

    @property
    def scaling(self) -> Scaling:
        """Scaling of the latents that `decode` gets."""
        return self.normalised or Scaling(self.shift, self.scale)

    @torch.no_grad()
    def encode(self, pixels_BHWC: np.ndarray) -> torch.Tensor:
        """Return the moments of uint8 images (B, H, W, 3)."""
        return self._encode(to_unit(pixels_BHWC, self.device))

    @torch.no_grad()
    def begin(self, pixels_BHWC: np.ndarray, precision: str = "fp32") -> Callable[[], np.ndarray]:
        """Begin to encode uint8 images and their horizontal flips; return a function that waits for the moments.

        Moments are float16 (B, 2, 2C or C, h, w). A GPU gets bytes and computes the rest; only that function waits for it.
        """
        images_BCHW = to_unit(pixels_BHWC, self.device, pinned=self.device.type == "cuda")
        with torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16"):
            sides = [self._encode(side).half() for side in (images_BCHW, images_BCHW.flip(3))]
        moments = torch.stack(sides, dim=1)
        if moments.device.type != "cuda":
            return moments.numpy
        on_host = torch.empty_like(moments, device="cpu", pin_memory=True).copy_(moments, non_blocking=True)
        (copied := torch.cuda.Event()).record()

        def wait() -> np.ndarray:
            copied.synchronize()
            return on_host.numpy()

        return wait

    @torch.no_grad()
    def decode(self, latents_BCHW: torch.Tensor) -> np.ndarray:
        """Return uint8 images (B, H, W, 3) of scaled latents; NotFinite if an image is not finite."""
        images = self._decode(self.scaling.undo(latents_BCHW))
        # as pixels, a value that is not finite would be black
        if bad := int((~images.isfinite()).flatten(1).any(1).sum()):
            raise NotFinite(f"the VAE decoded {bad} of {len(images)} latents to values that are not finite")
        return to_pixels(images)


@dataclass(frozen=True)
class PixelVae(Vae):
    """No VAE: a latent is the image in [-1, 1], with 3 channels and factor 1. Its posterior has no variance.

    Moments are 3 channels of pixels, whose 256 values float16 keeps distinct, and 3 of `NO_VARIANCE`: the format is older than
    moments without a log-variance.
    """

    net: nn.Module = field(default_factory=nn.Identity)

    @cached_property
    def identity(self) -> str:
        return hashlib.sha256(b"pixels in [-1, 1]").hexdigest()

    def latent(self, resolution: int) -> LatentShape:
        return LatentShape(3, resolution)

    def _encode(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        return torch.cat([images_BCHW, torch.full_like(images_BCHW, NO_VARIANCE)], dim=1)

    def _decode(self, latents_BCHW: torch.Tensor) -> torch.Tensor:
        return latents_BCHW


def to_unit(pixels_BHWC: np.ndarray, device: torch.device | None = None, *, pinned: bool = False) -> torch.Tensor:
    """Convert uint8 (B, H, W, 3) to float32 (B, 3, H, W) in [-1, 1], on the device. If `pinned`, the copy is asynchronous."""
    pixels = torch.from_numpy(np.ascontiguousarray(pixels_BHWC))
    if pinned:
        pixels = pixels.pin_memory()
    unit = pixels.to(device, non_blocking=True).permute(0, 3, 1, 2).contiguous().float()
    # By a tensor: a GPU divides by a Python number by multiplying, which rounds twice.
    return unit.div_(unit.new_full((), 127.5)).sub_(1)


def to_pixels(images_BCHW: torch.Tensor) -> np.ndarray:
    """Convert float (B, 3, H, W) in [-1, 1] to uint8 (B, H, W, 3)."""
    return images_BCHW.add(1).mul(127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
