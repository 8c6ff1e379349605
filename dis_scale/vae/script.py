"""Autoencoders from a TorchScript file: `encode` and `decode` are exported methods, so no code of theirs is needed here."""

import hashlib
import io
import json
from dataclasses import dataclass
from functools import cached_property

import torch

from dis_scale.process.errors import UserError
from dis_scale.recipe import LatentShape, TorchScriptVae
from dis_scale.storage.programs import read_program
from dis_scale.vae.interface import Vae


@dataclass(frozen=True)
class ScriptVae(Vae):
    """A TorchScript module in evaluation mode, and the settings that the file does not tell."""

    settings: TorchScriptVae

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
        """sha256 over that of the file and the settings that the latents depend on."""
        key = [self.settings.sha256, self.settings.posterior, self.scale, self.shift]
        return hashlib.sha256(json.dumps(key).encode()).hexdigest()

    @torch.no_grad()
    def latent(self, resolution: int) -> LatentShape:
        """Return the latents' shape of blank images.

        UserError if encode samples, or if the methods do not fit the images or each other.
        """
        blanks, path = torch.zeros(2, 3, resolution, resolution), self.settings.path
        halves, expected = (2, "(2, 2C, h, h)") if self.settings.posterior else (1, "(2, C, h, h)")
        try:
            encoded = self._encode(blanks)
            if not torch.equal(encoded, self._encode(blanks)):
                raise UserError(f"{path}: encode is random: return mean and log-variance, and set vae.posterior: true")
            if encoded.ndim != 4:
                raise UserError(f"{path}: encode returns {tuple(encoded.shape)} for two images, expected {expected}")
            decoded = self._decode(encoded.chunk(halves, dim=1)[0])
        except (RuntimeError, torch.jit.Error) as error:
            reason = str(error).strip().splitlines()[-1]
            raise UserError(f"{path}: an image of {resolution} pixels is not encoded and decoded: {reason}") from error
        images, channels, height, width = encoded.shape
        if (images, channels % halves, height) != (2, 0, width) or decoded.shape != blanks.shape:
            raise UserError(
                f"{path}: encode returns {tuple(encoded.shape)} and decode {tuple(decoded.shape)} for two images of "
                f"{resolution} pixels, expected {expected} and {tuple(blanks.shape)}"
            )
        return LatentShape(channels // halves, height)

    def _encode(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        return self._run("encode", images_BCHW)

    def _decode(self, latents_BCHW: torch.Tensor) -> torch.Tensor:
        return self._run("decode", latents_BCHW)

    def _run(self, method: str, x_BCHW: torch.Tensor) -> torch.Tensor:
        # a frozen file cannot be moved, and stays on the CPU
        x_BCHW = x_BCHW.to(self.device)
        # an optimised graph replaces the first one after some calls, and its last digits may differ
        with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
            result = getattr(self.net, method)(x_BCHW)
        if not isinstance(result, torch.Tensor):
            raise UserError(f"{self.settings.path}: {method} returns a {type(result).__name__}, expected a tensor")
        return result.float()


def load_script(settings: TorchScriptVae) -> Vae:
    """Load a TorchScript file; UserError if it is missing, has another hash than the recipe, or lacks a method."""
    data = read_program(settings.path, settings.sha256, "vae.path")
    try:
        net = torch.jit.load(io.BytesIO(data), map_location="cpu").eval()
    except RuntimeError as error:
        raise UserError(f"vae.path: {settings.path} is not a TorchScript file: {str(error).splitlines()[0]}") from error
    if missing := [method for method in ("encode", "decode") if not hasattr(net, method)]:
        raise UserError(
            f"vae.path: {settings.path} has no method {' and no method '.join(missing)}: export both with "
            "@torch.jit.export before torch.jit.script"
        )
    return ScriptVae(net, settings)
