"""Networks that a user provides as programs of `torch.export`, without their code: autoencoders and feature extractors."""

import hashlib
import io
import json
import threading
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import torch
from torch import nn

from dis_scale.process.errors import UserError, lines_of
from dis_scale.recipe import ExportedVae, LatentShape
from dis_scale.storage.programs import read_programs
from dis_scale.vae.interface import Vae

AUTOENCODER = ("encode", "decode")
"""Programs of an autoencoder, in files of its folder that end in `.pt2`."""
_ONE_AT_A_TIME = threading.Lock()
"""Lock for reading programs: torch.export keeps the one that it reads in a variable of its module."""


class Programs(nn.Module):
    """Programs by name, read from files at `where`; UserError for a file that is not a program."""

    def __init__(self, files: Mapping[str, bytes], where: str) -> None:
        super().__init__()
        self._where, self._exported = where, {name: _loaded(data, name, where) for name, data in files.items()}
        self._build()

    def to(self, device: torch.device | str) -> Self:  # type: ignore[override]
        """Move the programs and the constants that they create, which would otherwise stay on the device of the export."""
        from torch.export.passes import move_to_device_pass

        self._exported = {name: move_to_device_pass(each, device) for name, each in self._exported.items()}
        self._build()
        return self

    def _build(self) -> None:
        self._runnable = nn.ModuleDict({name: each.module() for name, each in self._exported.items()})

    @torch.no_grad()
    def run(self, name: str, x: torch.Tensor) -> Any:
        """Return what a program returns for this input; UserError if it refuses its shape."""
        try:
            return self._runnable[name](x)
        except AssertionError as error:  # a guard of the export
            raise UserError(f"{self._where}: {name} refuses an input of shape {tuple(x.shape)}: {error}") from error


def _loaded(data: bytes, name: str, where: str) -> Any:
    if not zipfile.is_zipfile(io.BytesIO(data)):
        raise UserError(f"{where}: {name} is not a program of torch.export")
    try:
        with _ONE_AT_A_TIME, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable")
            return torch.export.load(io.BytesIO(data))
    except Exception as error:  # of many classes, for archives of other kinds and of later versions
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{where}: torch.export of {torch.__version__} does not read {name}: {reason}") from error


@dataclass(frozen=True)
class ProgramVae(Vae):
    """The two programs of an autoencoder, and the settings that the programs lack."""

    settings: ExportedVae

    @property
    def scale(self) -> float:
        return self.settings.scale

    @property
    def shift(self) -> float:
        return self.settings.shift

    @property
    def posterior(self) -> bool:
        return self.settings.posterior

    @cached_property
    def identity(self) -> str:
        """sha256 over the sha256 of the programs and the settings that the latents depend on."""
        key = [self.settings.sha256, self.settings.posterior, self.scale, self.shift]
        return hashlib.sha256(json.dumps(key).encode()).hexdigest()

    def latent(self, resolution: int) -> LatentShape:
        """Return the latents' shape, found by encoding and decoding two images of noise.

        UserError if the encoder samples or depends on the batch, or if the programs do not fit the images or each other.
        """
        noise = torch.rand(2, 3, resolution, resolution, generator=torch.Generator().manual_seed(0)) * 2 - 1
        noise[1] /= 4  # another contrast, which a statistic of the batch would mix with the first one's
        path = self.settings.path
        halves, expected = (2, "(2, 2C, h, h)") if self.settings.posterior else (1, "(2, C, h, h)")
        try:
            encoded, again, alone = self._encode(noise), self._encode(noise), self._encode(noise[:1])
        except RuntimeError as error:  # such as of another precision, or of one size of batch
            raise UserError(
                f"{path}: encode: {lines_of(error)[-1]}; it has to take any number of images: dynamic_shapes of torch.export.export"
            ) from error
        if not encoded.isfinite().all():
            raise UserError(f"{path}: encode returns values of two images of noise that are not finite")
        if not torch.equal(encoded, again):
            raise UserError(f"{path}: encode is random: return mean and log-variance, and set vae.posterior: true")
        if not torch.allclose(encoded[:1], alone, rtol=1e-3, atol=1e-3):
            raise UserError(f"{path}: encode of an image depends on the others in its batch: export it in evaluation mode")
        if encoded.ndim != 4:
            raise UserError(f"{path}: encode returns {tuple(encoded.shape)} for two images, expected {expected}")
        decoded = self._decode(encoded.chunk(halves, dim=1)[0])
        images, channels, height, width = encoded.shape
        if (images, channels % halves, height) != (2, 0, width) or decoded.shape != noise.shape:
            raise UserError(
                f"{path}: encode returns {tuple(encoded.shape)} and decode {tuple(decoded.shape)} for two images of "
                f"{resolution} pixels, expected {expected} and {tuple(noise.shape)}"
            )
        return LatentShape(channels // halves, height)

    def _encode(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        return self._run("encode", images_BCHW)

    def _decode(self, latents_BCHW: torch.Tensor) -> torch.Tensor:
        return self._run("decode", latents_BCHW)

    def _run(self, name: str, x_BCHW: torch.Tensor) -> torch.Tensor:
        result = self.net.run(name, x_BCHW.to(self.device))
        if not isinstance(result, torch.Tensor):
            raise UserError(f"{self.settings.path}: {name} returns a {type(result).__name__}, expected a tensor")
        return result.float()


def load_exported(settings: ExportedVae) -> "ProgramVae":
    """Load the two programs of a folder; UserError if one is missing, or if they have another hash than the recipe."""
    data = read_programs(program_paths(settings.path), settings.sha256, "vae.path")
    return ProgramVae(Programs(dict(zip(AUTOENCODER, data, strict=True)), settings.path), settings)


def program_paths(folder: str) -> list[str]:
    """Return the paths of an autoencoder's programs."""
    return [f"{folder}/{name}.pt2" for name in AUTOENCODER]
