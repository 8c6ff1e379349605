"""Autoencoders: images to latents and back. `load` opens the sweep's, `for_samples` makes it decode the sweep's samples.

Read next: interface.py; autoencoders.py, the door to diffusers; exported.py.
"""

from dataclasses import replace
from pathlib import Path
from typing import TypeGuard

from dis_scale.process.settings import require_no_credentials
from dis_scale.recipe import ExportedVae, LatentShape, NoVae, PretrainedVae, TrainedVae, VaeSettings
from dis_scale.storage.folder import Folder, open_folder
from dis_scale.storage.manifest import Manifest
from dis_scale.storage.programs import hash_of
from dis_scale.sweep import Sweep, state
from dis_scale.sweep.documents import EncodedBy, LatentsManifest
from dis_scale.vae.autoencoders import (
    CONFIG,
    DETERMINISTIC,
    DiffusersVae,
    fitted,
    import_without_others,
    load_pretrained,
    load_stored,
    new,
    published,
    save,
    shape_of,
)
from dis_scale.vae.exported import load_exported, program_paths
from dis_scale.vae.interface import PixelVae, Vae, to_pixels, to_unit
from dis_scale.vae.scaling import Scaling

__all__ = [
    "CONFIG", "DiffusersVae", "PixelVae", "Vae", "decoder_of", "for_samples", "from_path", "has_posterior", "import_without_others",
    "latent_shape", "load", "load_exported", "load_in_stage", "load_pretrained", "new", "planned_shape", "save", "to_pixels",
    "to_unit",
]  # fmt: skip

HUB = {"stabilityai/sd-vae-ft-ema": (4, 8), "stabilityai/sd-vae-ft-mse": (4, 8)}
"""Latent channels, and pixels of a position's width and height, of Stable Diffusion's autoencoders on the hub."""


def latent_shape(settings: VaeSettings, resolution: int) -> LatentShape:
    """Return the latents' shape from the VAE's settings or configuration, or by a trial of exported programs.

    UserError if the images do not fit.
    """
    if isinstance(settings, NoVae):
        return LatentShape(3, resolution)
    if isinstance(settings, TrainedVae):
        return fitted(settings.latent_channels, 2 ** (len(settings.widths) - 1), resolution)
    if isinstance(settings, ExportedVae):
        return load_exported(settings).latent(resolution)
    return shape_of(*published(settings), resolution)


def planned_shape(settings: VaeSettings, resolution: int) -> LatentShape:
    """Return the latents' shape as `latent_shape` does; for an autoencoder in `HUB`, without a request to the hub."""
    return fitted(*HUB[settings.path], resolution) if _on_hub(settings) else latent_shape(settings, resolution)


def _on_hub(settings: VaeSettings) -> TypeGuard[PretrainedVae]:
    return isinstance(settings, PretrainedVae) and settings.path in HUB and not Path(settings.path).exists()


def has_posterior(settings: VaeSettings) -> bool:
    """Return whether the VAE's moments have a log-variance, from its settings or configuration."""
    if _on_hub(settings):
        return True
    if isinstance(settings, ExportedVae):
        return settings.posterior
    return not isinstance(settings, PretrainedVae) or published(settings)[0].__name__ not in DETERMINISTIC


def load_in_stage(sweep: Sweep) -> Vae:
    """Load the sweep's VAE in a process of a stage, which uses diffusers for nothing else."""
    if isinstance(sweep.recipe.vae, TrainedVae):
        import_without_others()
    return load(sweep)


def load(sweep: Sweep) -> Vae:
    """Load the sweep's VAE: the prepare stage's, a published one, exported programs, or `PixelVae`."""
    settings = sweep.recipe.vae
    if isinstance(settings, NoVae):
        return PixelVae()
    if isinstance(settings, PretrainedVae):
        return load_pretrained(settings)
    if isinstance(settings, ExportedVae):
        return load_exported(settings)
    return load_stored(sweep.vae)


def has_programs(folder: Folder) -> bool:
    """Whether a folder holds an autoencoder's programs."""
    return folder.exists("encode.pt2")


def from_path(path: str, encoder: EncodedBy | None = None) -> Vae:
    """Load the VAE that a command's option names: `none` for pixels, a sweep's `vae/`, a folder or hub id.

    `encoder` has the facts of the latents that exported programs lack: posterior, shift and scale.
    """
    if path == "none":
        return PixelVae()
    require_no_credentials(path, "--vae")
    folder = open_folder(path)
    there = "://" in path or Path(path).is_dir()
    if there and Manifest.exists(folder):
        return load_stored(folder)
    if not (there and has_programs(folder)):
        return load_pretrained(PretrainedVae(kind="pretrained", path=path))
    known = encoder.model_dump(include={"posterior", "shift", "scale"}) if encoder else {}
    own = {"posterior": True, "sha256": hash_of(program_paths(path), "--vae")}
    own |= {name: value for name, value in known.items() if isinstance(value, bool | float)}
    found = load_exported(ExportedVae.model_validate({"kind": "exported", "path": path} | own))
    # Latents of another program may have been stored without the variance that the VAE has.
    other = replace(found, settings=found.settings.model_copy(update={"posterior": not found.posterior}))
    return other if encoder and encoder.identity == other.identity else found


def decoder_of(path: str | None, sweep: Sweep | None, encoder: EncodedBy | None) -> Vae | None:
    """Load the decoder of latents: the VAE at `path`, else the sweep's, else `PixelVae` if these are pixels, else None."""
    if path is not None:
        return from_path(path, encoder)
    if sweep is not None:
        return load(sweep)
    return PixelVae() if encoder and encoder.identity == PixelVae().identity else None


def for_samples(sweep: Sweep, decoder: Vae) -> Vae:
    """Return the decoder of the sweep's samples, scaled by `data.normalise`. Scaling by channel needs the sweep's latents."""
    if sweep.recipe.data.normalise == "vae":
        return decoder
    latents = LatentsManifest.require(state.require_latents(sweep.folder))
    return replace(decoder, normalised=Scaling.of(latents, sweep.recipe.data.normalise))
