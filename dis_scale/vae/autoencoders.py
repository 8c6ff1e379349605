"""The door to diffusers: its autoencoders for images, trained by the sweep or published."""

import hashlib
import inspect
import json
import os
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch

from dis_scale.process.errors import StorageAway, UserError
from dis_scale.process.imports import hidden, without_compiler
from dis_scale.recipe import LatentShape, PretrainedVae, TrainedVae
from dis_scale.storage.folder import Folder
from dis_scale.storage.manifest import Manifest
from dis_scale.vae.interface import Vae

if TYPE_CHECKING:
    from diffusers import AutoencoderKL as AutoencoderKL

CONFIG, WEIGHTS_FILE = "config.json", "diffusion_pytorch_model.safetensors"
DETERMINISTIC = ("AutoencoderDC", "AutoencoderRAE", "AutoencoderTiny", "VQModel")
SUPPORTED = (
    "AutoencoderKL", "AsymmetricAutoencoderKL", "AutoencoderKLFlux2", "AutoencoderKLHunyuanImage", "AutoencoderKLKVAE",
    *DETERMINISTIC,
)  # fmt: skip
"""diffusers' classes for images; those in `DETERMINISTIC` have no posterior."""


@dataclass(frozen=True)
class DiffusersVae(Vae):
    """An autoencoder of one of the `SUPPORTED` classes, in evaluation mode."""

    @property
    def scale(self) -> float | list[float]:
        scale, deviations = float(self.net.config.get("scaling_factor") or 1.0), self._of_channels("std")
        return [scale / deviation for deviation in deviations] if deviations else scale

    @property
    def shift(self) -> float | list[float]:
        return self._of_channels("mean") or float(self.net.config.get("shift_factor") or 0.0)

    @property
    def posterior(self) -> bool:
        return type(self.net).__name__ not in DETERMINISTIC

    def latent(self, resolution: int) -> LatentShape:
        return shape_of(type(self.net), self.net.config, resolution)

    @cached_property
    def identity(self) -> str:
        """sha256 over the weights and the settings that differ from diffusers' defaults, which grow with its releases."""
        defaults = _defaults(type(self.net))
        config = {k: v for k, v in sorted(self.net.config.items()) if k[0] != "_" and _plain(v) != _plain(defaults.get(k))}
        if (name := type(self.net).__name__) != "AutoencoderKL":  # it was the only class when its first latents were made
            config["_class_name"] = name
        total = hashlib.sha256(json.dumps(config, default=str).encode())
        for name, tensor in sorted(self.net.state_dict().items()):
            total.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
        return total.hexdigest()

    def _of_channels(self, key: str) -> list[float]:
        """Return `latents_mean` or `latents_std`, which SDXL's pipeline uses if the config has both; otherwise an empty list."""
        values = {name: self.net.config.get(f"latents_{name}") for name in ("mean", "std")}
        return list(values[key]) if all(values.values()) else []

    def _encode(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        (encoded,) = self.net.encode(images_BCHW, return_dict=False)
        return torch.cat([encoded.mean, encoded.logvar], dim=1) if self.posterior else encoded

    def _decode(self, latents_BCHW: torch.Tensor) -> torch.Tensor:
        images: torch.Tensor = self.net.decode(latents_BCHW).sample
        return images


@dataclass(frozen=True)
class RepresentationVae(DiffusersVae):
    """diffusers' AutoencoderRAE (arXiv 2510.11690). Takes images in [0, 1], normalises its latents itself, has no posterior."""

    @property
    def scale(self) -> float:
        return 1.0

    @property
    def shift(self) -> float:
        return 0.0

    def _encode(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        return super()._encode(images_BCHW.add(1).div(2))

    def _decode(self, latents_BCHW: torch.Tensor) -> torch.Tensor:
        return super()._decode(latents_BCHW).mul(2).sub(1)


def _plain(value: Any) -> Any:
    """Return a setting as JSON stores it: a tuple as a list."""
    return list(value) if isinstance(value, tuple) else value


def _diffusers(name: str) -> Any:
    """Import a class of diffusers only when needed: it takes seconds, and most of a sweep's processes open no VAE."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import diffusers

    return getattr(diffusers, name)


def import_without_others() -> None:
    """Import diffusers without the packages that only its other models need, which takes a third of the time.

    For processes that use diffusers only to open a sweep's autoencoder: diffusers takes these packages as missing from then on.
    """
    if "diffusers" not in sys.modules:
        with hidden("transformers", "torchvision", "scipy", "peft", "xformers"), without_compiler():
            _diffusers("AutoencoderKL")


def _defaults(kind: type) -> dict[str, Any]:
    """Return the defaults of a class's settings."""
    return {name: parameter.default for name, parameter in inspect.signature(kind).parameters.items()}


def shape_of(kind: type, config: Mapping[str, Any], resolution: int) -> LatentShape:
    """Return the latents' shape from the class and its settings; UserError if the images do not fit."""
    given = _defaults(kind) | dict(config)
    if kind.__name__ == "AutoencoderRAE":  # tokens of a frozen network; images of one size
        side = given["encoder_input_size"] // given["encoder_patch_size"]
        if resolution != (expected := given["patch_size"] * side):
            raise UserError(f"data.resolution: {resolution}, but the VAE decodes to {expected} pixels a side")
        return LatentShape(given["encoder_hidden_size"], side)

    def first(*keys: str) -> Any:
        return next(given[key] for key in keys if given.get(key))

    channels = first("vq_embed_dim", "latent_channels", "z_channels")
    levels = len(first("encoder_block_out_channels", "down_block_out_channels", "ch_mult", "block_out_channels"))
    return fitted(channels, given.get("spatial_compression_ratio") or 2 ** (levels - 1), resolution)


def fitted(channels: int, factor: int, resolution: int) -> LatentShape:
    """Return the latents' shape if a position is `factor` pixels wide and high; UserError if the images do not fit."""
    if resolution % factor:
        raise UserError(f"data.resolution: {resolution} is not a multiple of the VAE's factor {factor}")
    return LatentShape(channels, resolution // factor)


def new(settings: TrainedVae, resolution: int) -> "AutoencoderKL":
    """Build an untrained small autoencoder; its factor is 2 ** (len(widths) - 1)."""
    levels = len(settings.widths)
    net: AutoencoderKL = _diffusers("AutoencoderKL")(
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=settings.widths, latent_channels=settings.latent_channels, layers_per_block=1,
        norm_num_groups=settings.norm_groups, sample_size=resolution,
    )  # fmt: skip
    return net


def save(folder: Folder, net: "AutoencoderKL") -> None:
    """Write the autoencoder to storage in diffusers' layout."""
    config = json.dumps({k: v for k, v in net.config.items() if not k.startswith("_")} | {"_class_name": "AutoencoderKL"}, indent=1)
    weights = {name: tensor.contiguous() for name, tensor in net.state_dict().items()}
    Manifest(files={}).put(folder, {CONFIG: config.encode(), WEIGHTS_FILE: safetensors.torch.save(weights)})


def load_stored(folder: Folder) -> Vae:
    """Load the autoencoder that the prepare stage has stored; UserError if there is none."""
    manifest = Manifest.find(folder)
    if manifest is None:
        raise UserError(f"{folder}: no VAE there: the prepare stage has not finished")
    net: AutoencoderKL = _diffusers("AutoencoderKL").from_config(json.loads(manifest.read_file(folder, CONFIG)))
    net.load_state_dict(safetensors.torch.load(manifest.read_file(folder, WEIGHTS_FILE)))
    return DiffusersVae(net.eval().requires_grad_(requires_grad=False))


def load_pretrained(settings: PretrainedVae) -> Vae:
    """Load a published VAE from a local folder or hub id; UserError if it is missing or not of a `SUPPORTED` class."""
    kind, _ = published(settings)
    try:
        # low memory would need accelerate; without `use_safetensors` diffusers falls back to pickled weights
        read = partial(kind.from_pretrained, output_loading_info=True, low_cpu_mem_usage=False, use_safetensors=True)
        net, info = _from_path(settings, read)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"vae.path: the weights at {settings.path!r} do not fit their config: {reason}") from error
    if missing := sorted(info["missing_keys"]):  # diffusers would leave them at random values
        raise UserError(f"vae.path: {settings.path!r} lacks {len(missing)} weights, the first {missing[0]}")
    wrapper = RepresentationVae if kind.__name__ == "AutoencoderRAE" else DiffusersVae
    return wrapper(net.eval().requires_grad_(requires_grad=False))


def published(settings: PretrainedVae) -> tuple[Any, dict[str, Any]]:
    """Return the class and the configuration of a published VAE; UserError if the class or the channels are not supported."""
    config = _from_path(settings, _diffusers("AutoencoderKL").load_config)
    if (name := config.get("_class_name")) not in SUPPORTED:
        raise UserError(f"vae.path: {settings.path!r} is of class {name}, expected one of {', '.join(SUPPORTED)}")
    for key in ("in_channels", "out_channels"):
        if (channels := config.get(key, 3)) != 3:
            raise UserError(f"vae.path: {settings.path!r} has {key} {channels}, expected 3 for images in RGB")
    if config.get("reshape_to_2d") is False:
        raise UserError(f"vae.path: {settings.path!r} has reshape_to_2d false, so its latents are (C, tokens), expected (C, h, w)")
    return _diffusers(name), config


def _hub_away(error: BaseException | None) -> str:
    """Return why the hub failed for now; empty if its answer is final. The messages of diffusers hide the reason."""
    while error := error and (error.__cause__ or error.__context__):
        status = getattr(getattr(error, "response", None), "status_code", 0)
        if type(error).__name__ == "OfflineModeIsEnabled":  # a setting, though it is a ConnectionError
            return ""
        if isinstance(error, ConnectionError | TimeoutError | socket.gaierror) or status == 429 or status >= 500:
            return " ".join(str(error).split())[:200] or type(error).__name__
    return ""


def _from_path(settings: PretrainedVae, read: Callable[..., Any]) -> Any:
    try:
        return read(settings.path, subfolder=settings.subfolder)
    except (OSError, ValueError) as error:
        if why := _hub_away(error):
            raise StorageAway(f"vae.path: the hub does not give {settings.path!r}: {why}") from error
        first = " ".join(str(error).split())[:200]
        pipeline = "" if settings.subfolder else "; for a pipeline, set vae.subfolder: vae"
        raise UserError(f"vae.path: no autoencoder at {settings.path!r} (folder or hub id{pipeline}): {first}") from error
