"""Autoencoders from a TorchScript file: `encode` and `decode` are exported methods, so no code of theirs is needed here."""

import hashlib
import io
import json
from dataclasses import dataclass
from functools import cached_property

import torch

from dis_scale.errors import StorageError, UserError
from dis_scale.recipe import LatentShape, TorchScriptVae
from dis_scale.storage.folder import locate
from dis_scale.vae.interface import Vae


@dataclass(frozen=True)
class ScriptVae(Vae):
    """A TorchScript module in evaluation mode, and the settings that the file does not tell."""

    settings: TorchScriptVae
    sha256: str

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
        key = [self.sha256, self.settings.posterior, self.scale, self.shift]
        return hashlib.sha256(json.dumps(key).encode()).hexdigest()

    @torch.no_grad()
    def latent(self, resolution: int) -> LatentShape:
        """Return the latents' shape of a blank image; UserError if the methods do not fit it or each other."""
        blank, path = torch.zeros(1, 3, resolution, resolution, device=self.device), self.settings.path
        halves = 2 if self.settings.posterior else 1
        try:
            encoded = self._run("encode", blank)
            decoded = self._run("decode", encoded.chunk(halves, dim=1)[0])
        except (RuntimeError, AttributeError) as error:
            reason = str(error).strip().splitlines()[-1]
            raise UserError(f"{path}: an image of {resolution} pixels is not encoded and decoded: {reason}") from error
        _, channels, *sides = encoded.shape
        if decoded.shape != blank.shape or channels % halves or sides != sides[:1] * 2:
            raise UserError(
                f"{path}: encode returns {tuple(encoded.shape)} and decode {tuple(decoded.shape)} for an image of "
                f"{resolution} pixels, expected (1, {'2C' if halves == 2 else 'C'}, h, h) and {tuple(blank.shape)}"
            )
        return LatentShape(channels // halves, sides[0])

    def _encode(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        return self._run("encode", images_BCHW.to(self.device))

    def _decode(self, latents_BCHW: torch.Tensor) -> torch.Tensor:
        return self._run("decode", latents_BCHW)

    def _run(self, method: str, x_BCHW: torch.Tensor) -> torch.Tensor:
        # an optimised graph replaces the first one after some calls, and its last digits may differ
        with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
            result: torch.Tensor = getattr(self.net, method)(x_BCHW)
        return result


def load_script(settings: TorchScriptVae) -> Vae:
    """Load a TorchScript file; UserError if it is missing, has another hash, or lacks one of the methods."""
    parent, name = locate(settings.path)
    try:
        data = parent.read(name)
    except (FileNotFoundError, IsADirectoryError, StorageError) as error:
        raise UserError(f"vae.path: no file {settings.path}") from error
    if settings.sha256 not in (None, digest := hashlib.sha256(data).hexdigest()):
        raise UserError(f"vae.path: {settings.path} has sha256 {digest}, the recipe expects {settings.sha256}")
    try:
        net = torch.jit.load(io.BytesIO(data), map_location="cpu").eval()
    except RuntimeError as error:
        raise UserError(f"vae.path: {settings.path} is not a TorchScript file: {str(error).splitlines()[0]}") from error
    if missing := [method for method in ("encode", "decode") if not hasattr(net, method)]:
        raise UserError(
            f"vae.path: {settings.path} has no method {' and no method '.join(missing)}: export both with "
            "@torch.jit.export before torch.jit.script"
        )
    return ScriptVae(net, settings, digest)
