"""The door to diffusers: an AutoencoderKL that encodes images to posterior moments and decodes latents, or none at all.

Callers see one interface, `Vae`, for a VAE trained by the sweep, a published one, and latents that are the pixels.
"""

import hashlib
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import safetensors.torch
import torch
from torch import nn

from dis_scale.errors import DisScaleError, UserError
from dis_scale.imports import hidden
from dis_scale.recipe import LatentShape, NoVae, PretrainedVae, TrainedVae, VaeSettings
from dis_scale.storage import manifest
from dis_scale.storage.folder import Folder
from dis_scale.sweep import Sweep

if TYPE_CHECKING:
    from diffusers import AutoencoderKL as AutoencoderKL

NO_VARIANCE = float(torch.finfo(torch.float16).min)
"""A log-variance with deviation exp(NO_VARIANCE / 2) = 0 exactly in float32: a sample of the posterior is its mean."""
CONFIG, WEIGHTS_FILE = "config.json", "diffusion_pytorch_model.safetensors"


class Vae(Protocol):
    """Encodes uint8 images to posterior moments and decodes scaled latents, z <- (z - shift) scale, to images."""

    @property
    def net(self) -> Any:
        """The network, to be moved between devices; the identity if there is none."""

    @property
    def scale(self) -> float: ...
    @property
    def shift(self) -> float: ...
    @property
    def factor(self) -> int:
        """Pixels per latent position, a side."""

    @property
    def identity(self) -> str:
        """Hash that changes when the latents of an image do."""

    def latent(self, resolution: int) -> LatentShape:
        """Return the latents' shape for images of `resolution` pixels a side."""

    def encode(self, pixels_BHWC: np.ndarray) -> torch.Tensor:
        """Return posterior moments (B, 2C, h, w), mean and log-variance, of uint8 images (B, H, W, 3)."""

    def decode(self, latents_BCHW: torch.Tensor) -> np.ndarray:
        """Return uint8 images (B, H, W, 3) of scaled latents; DisScaleError if an image is not finite."""


@dataclass(frozen=True)
class KlVae:
    """An AutoencoderKL in evaluation mode."""

    net: "AutoencoderKL"

    @property
    def scale(self) -> float:
        return float(self.net.config.scaling_factor)

    @property
    def shift(self) -> float:
        return float(self.net.config.get("shift_factor") or 0.0)

    @property
    def factor(self) -> int:
        return 2 ** (len(self.net.config.block_out_channels) - 1)

    def latent(self, resolution: int) -> LatentShape:
        return LatentShape(int(self.net.config.latent_channels), resolution // self.factor)

    @cached_property
    def identity(self) -> str:
        """sha256 over the weights and the settings that differ from diffusers' defaults, which grow with its releases."""
        defaults = {name: parameter.default for name, parameter in inspect.signature(type(self.net)).parameters.items()}
        config = {
            k: v for k, v in sorted(self.net.config.items()) if k[0] != "_" and _plain(v) != _plain(defaults.get(k))
        }
        total = hashlib.sha256(json.dumps(config, default=str).encode())
        for name, tensor in sorted(self.net.state_dict().items()):
            total.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
        return total.hexdigest()

    @torch.no_grad()
    def encode(self, pixels_BHWC: np.ndarray) -> torch.Tensor:
        moments = self.net.encode(to_unit(pixels_BHWC).to(self.net.device)).latent_dist
        return torch.cat([moments.mean, moments.logvar], dim=1)

    @torch.no_grad()
    def decode(self, latents_BCHW: torch.Tensor) -> np.ndarray:
        images = self.net.decode(latents_BCHW / self.scale + self.shift).sample
        # as pixels, a value that is not finite would be black
        if bad := int((~images.isfinite()).flatten(1).any(1).sum()):
            raise DisScaleError(f"the VAE decoded {bad} of {len(images)} latents to values that are not finite")
        return to_pixels(images)


@dataclass(frozen=True)
class PixelVae:
    """No VAE: a latent is the image in [-1, 1], with 3 channels and factor 1. Its posterior has no variance.

    Moments are 3 channels of pixels, whose 256 values float16 keeps distinct, and 3 of `NO_VARIANCE`.
    """

    net: nn.Module = field(default_factory=nn.Identity)

    @property
    def scale(self) -> float:
        return 1.0

    @property
    def shift(self) -> float:
        return 0.0

    @property
    def factor(self) -> int:
        return 1

    @cached_property
    def identity(self) -> str:
        return hashlib.sha256(b"pixels in [-1, 1]").hexdigest()

    def latent(self, resolution: int) -> LatentShape:
        return LatentShape(3, resolution)

    def encode(self, pixels_BHWC: np.ndarray) -> torch.Tensor:
        unit = to_unit(pixels_BHWC)
        return torch.cat([unit, torch.full_like(unit, NO_VARIANCE)], dim=1)

    def decode(self, latents_BCHW: torch.Tensor) -> np.ndarray:
        return to_pixels(latents_BCHW)


def _plain(value: Any) -> Any:
    """Return a setting as JSON stores it: a tuple as a list."""
    return list(value) if isinstance(value, tuple) else value


def to_unit(pixels_BHWC: np.ndarray) -> torch.Tensor:
    """Convert uint8 (B, H, W, 3) to float32 (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels_BHWC.transpose(0, 3, 1, 2))).float().div_(127.5).sub_(1)


def to_pixels(images_BCHW: torch.Tensor) -> np.ndarray:
    """Convert float (B, 3, H, W) in [-1, 1] to uint8 (B, H, W, 3)."""
    return images_BCHW.add(1).mul(127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


def _autoencoder() -> Any:
    """Import diffusers' class only when needed: it takes seconds, and most of a sweep's processes open no VAE."""
    with hidden("scipy"):  # needed by some of diffusers' schedulers, which we do not use: one second
        from diffusers import AutoencoderKL

    return AutoencoderKL


def new(settings: TrainedVae, resolution: int) -> "AutoencoderKL":
    """Build an untrained small autoencoder; its factor is 2 ** (len(widths) - 1)."""
    levels = len(settings.widths)
    return _autoencoder()(
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=settings.widths, latent_channels=settings.latent_channels, layers_per_block=1,
        norm_num_groups=8, sample_size=resolution,
    )  # fmt: skip


def save(folder: Folder, net: "AutoencoderKL") -> None:
    """Write the autoencoder to storage in diffusers' layout."""
    config = json.dumps(
        {k: v for k, v in net.config.items() if not k.startswith("_")} | {"_class_name": "AutoencoderKL"}, indent=1
    )
    weights = {name: tensor.contiguous() for name, tensor in net.state_dict().items()}
    manifest.put(folder, {CONFIG: config.encode(), WEIGHTS_FILE: safetensors.torch.save(weights)})


def latent_shape(settings: VaeSettings, resolution: int) -> LatentShape:
    """Return the latents' shape from the VAE's settings or configuration, without weights; UserError if the images do not fit."""
    if isinstance(settings, NoVae):
        return LatentShape(3, resolution)
    if isinstance(settings, TrainedVae):
        channels, levels = settings.latent_channels, len(settings.widths)
    else:
        config = _from_path(_autoencoder().load_config, settings)
        channels, levels = config["latent_channels"], len(config["block_out_channels"])
    factor = 2 ** (levels - 1)
    if resolution % factor:
        raise UserError(f"data.resolution: {resolution} is not a multiple of the VAE's factor {factor}")
    return LatentShape(channels, resolution // factor)


def load(sweep: Sweep) -> Vae:
    """Load the sweep's VAE: the prepare stage's, a published one from a local folder or hub id, or `PixelVae`."""
    settings = sweep.recipe.vae
    if isinstance(settings, NoVae):
        return PixelVae()
    if isinstance(settings, PretrainedVae):
        return load_pretrained(settings)
    return KlVae(_stored(sweep.vae).eval().requires_grad_(False))


def load_pretrained(settings: PretrainedVae) -> Vae:
    """Load a published VAE from a local folder or hub id; UserError if there is none."""
    return KlVae(_from_path(_autoencoder().from_pretrained, settings).eval().requires_grad_(False))


def _stored(folder: Folder) -> "AutoencoderKL":
    facts = manifest.find(folder)
    if facts is None:
        raise UserError(f"{folder}: no VAE there: the prepare stage has not finished")
    net = _autoencoder().from_config(json.loads(manifest.read(folder, CONFIG, facts)))
    net.load_state_dict(safetensors.torch.load(manifest.read(folder, WEIGHTS_FILE, facts)))
    return net


def _from_path(read: Callable[..., Any], settings: PretrainedVae) -> Any:
    try:
        return read(settings.path, subfolder=settings.subfolder)
    except (OSError, ValueError) as error:
        first = " ".join(str(error).split())[:200]
        raise UserError(f"vae.path: no AutoencoderKL at {settings.path!r} (folder or hub id): {first}") from error
