"""Autoencoders of diffusers, of any class, channels, factor, scale and shift."""

import json
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import safetensors.torch
import torch

from dis_scale import vae
from dis_scale.data.latents import sample_posterior
from dis_scale.process.errors import DisScaleError, StorageAway, UserError
from dis_scale.recipe import PretrainedVae
from dis_scale.vae import to_pixels, to_unit
from dis_scale.vae.scaling import Scaling
from tests.support.autoencoders import (
    CLASSES,
    DETERMINISTIC,
    FLUX,
    KINDS,
    SCALINGS,
    encode_digits,
    require_stored,
    saved,
    saved_class,
)


@pytest.mark.parametrize("kind", KINDS)
def test_any_channels_factor_scale_and_shift(kind: str, tmp_path: Path) -> None:
    config = KINDS[kind]
    settings = saved(tmp_path / "vae", **config)  # type: ignore[arg-type]
    shape = vae.latent_shape(settings, 64)
    assert shape == (config["latent_channels"], 64 // 2 ** (config["levels"] - 1))
    encoder = vae.load_pretrained(settings)
    assert encoder.latent(64) == shape
    assert (encoder.scale, encoder.shift) == (config["scaling_factor"], config.get("shift_factor", 0.0))
    image = np.random.default_rng(0).integers(0, 255, (2, 64, 64, 3), dtype=np.uint8)
    moments = encoder.encode(image)
    assert moments.shape == (2, 2 * shape.channels, shape.size, shape.size)
    mean = moments[:, : shape.channels]
    assert isinstance(encoder.shift, float)
    assert isinstance(encoder.scale, float)
    decoded = encoder.decode((mean - encoder.shift) * encoder.scale)
    plain = to_pixels(encoder.net.decode(mean).sample)
    assert np.abs(decoded.astype(int) - plain.astype(int)).max() <= 1  # one more rounding


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    """A pickle may run a program."""
    settings = saved(tmp_path / "vae", **KINDS[next(iter(KINDS))])  # type: ignore[arg-type]
    (weights,) = (tmp_path / "vae").glob("*.safetensors")
    weights.unlink()
    torch.save({}, weights.with_suffix(".bin"))
    with pytest.raises(UserError, match=r"vae.path: no autoencoder at .*safetensors"):
        vae.load_pretrained(settings)


FEW = ("AutoencoderKL", "AsymmetricAutoencoderKL", "AutoencoderDC")
"""Run by `make test`, with and without a posterior; the others by `make slow`."""


def to_class(name: str, images: torch.Tensor) -> torch.Tensor:
    """Return images in [-1, 1] in the range that a class of diffusers takes."""
    return (images + 1) / 2 if name == "AutoencoderRAE" else images


def from_class(name: str, images: torch.Tensor) -> torch.Tensor:
    return 2 * images - 1 if name == "AutoencoderRAE" else images


def test_a_representation_autoencoder_has_images_of_one_size(tmp_path: Path) -> None:
    settings = saved_class(tmp_path, "AutoencoderRAE")
    assert vae.latent_shape(settings, 32) == (64, 8)
    with pytest.raises(UserError, match=r"data.resolution: 64, but the VAE decodes to 32 pixels a side"):
        vae.latent_shape(settings, 64)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in FEW else [pytest.mark.slow]) for name in CLASSES])
def test_every_class_gives_its_latents_back(name: str, tmp_path: Path) -> None:
    """Encode, write shards, read, scale and decode: the picture is the network's own decoding of the stored mean."""
    settings = saved_class(tmp_path / "vae", name)
    decoder, reader = encode_digits(tmp_path, settings)
    assert reader.shape == decoder.latent(32)
    assert reader.shape.size == 8
    assert reader.scaling == decoder.scaling == Scaling(*SCALINGS[name])
    require_stored(reader, decoder, settings, posterior=name not in DETERMINISTIC)
    moments, _ = reader.read(np.arange(8), np.zeros(8, int))
    mean = torch.from_numpy(moments[:, : reader.shape.channels]).float()
    sample = sample_posterior(moments, np.random.default_rng(0))
    assert (name in DETERMINISTIC) == np.array_equal(sample, mean)
    plain = to_pixels(from_class(name, decoder.net.decode(mean).sample))
    decoded = decoder.decode(torch.from_numpy(reader.scaling.apply(mean.numpy())))
    assert plain.shape == (8, 32, 32, 3)
    assert np.abs(decoded.astype(int) - plain.astype(int)).max() <= 1  # one more rounding


@pytest.mark.parametrize("name", CLASSES)
def test_moments_are_those_of_the_class(name: str, tmp_path: Path) -> None:
    encoder = vae.load_pretrained(saved_class(tmp_path, name))
    pixels = np.random.default_rng(0).integers(0, 255, (2, 32, 32, 3), dtype=np.uint8)
    with torch.no_grad():
        encoded = encoder.net.encode(to_class(name, to_unit(pixels)), return_dict=False)[0]
    mean = encoded if name in DETERMINISTIC else encoded.mean
    expected = mean if name in DETERMINISTIC else torch.cat([mean, encoded.logvar], 1)
    assert torch.equal(encoder.encode(pixels), expected)


def test_another_class_is_refused_by_name(tmp_path: Path) -> None:
    settings = saved_class(tmp_path, "AutoencoderTiny")
    file = Path(settings.path) / vae.CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | {"_class_name": "AutoencoderKLWan"}))
    for read in (vae.load_pretrained, lambda settings: vae.latent_shape(settings, 32)):
        with pytest.raises(UserError, match=r"is of class AutoencoderKLWan, expected one of AutoencoderKL, .*VQModel"):
            read(settings)


def test_the_identity_covers_the_class() -> None:
    """Two classes with the same settings and weights are two autoencoders."""
    config = FLUX | {"layers_per_block": 3}  # the default of neither
    nets = [getattr(diffusers, name)(**config) for name in ("AutoencoderKL", "AutoencoderKLFlux2")]
    del nets[1].bn
    nets[1].load_state_dict(nets[0].state_dict())
    assert len({vae.DiffusersVae(net).identity for net in nets}) == 2


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    settings = saved(tmp_path, 3)
    file, key = tmp_path / "diffusion_pytorch_model.safetensors", "decoder.conv_in.weight"
    weights = safetensors.torch.load_file(file)
    safetensors.torch.save_file({name: each for name, each in weights.items() if name != key}, file)
    with pytest.raises(UserError, match=f"lacks 1 weights, the first {key}"):
        vae.load_pretrained(settings)
    safetensors.torch.save_file(weights | {key: torch.zeros(2, 2)}, file)
    with pytest.raises(UserError, match=f"do not fit their config: .*size mismatch for {key}"):
        vae.load_pretrained(settings)


def test_loading_prints_nothing(tmp_path: Path) -> None:
    settings = saved(tmp_path, 3)
    code = f"from dis_scale import vae; vae.from_path({settings.path!r}, {{}})"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.parametrize("channels", [{"in_channels": 1}, {"out_channels": 4}])
def test_an_autoencoder_of_other_images_is_refused(channels: dict[str, int], tmp_path: Path) -> None:
    ((key, value),) = channels.items()
    with pytest.raises(UserError, match=f"has {key} {value}, expected 3 for images in RGB"):
        vae.latent_shape(saved(tmp_path, 3, **channels), 32)


def test_latents_that_are_no_images_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderRAE", "reshape_to_2d": false}')
    with pytest.raises(UserError, match=r"has reshape_to_2d false, so its latents are \(C, tokens\), expected \(C, h, w\)"):
        vae.latent_shape(PretrainedVae(kind="pretrained", path=str(tmp_path)), 32)


class OfflineModeIsEnabled(ConnectionError):
    """As the hub's client raises it."""


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (OSError(), 429, StorageAway), (OSError(), 503, StorageAway), (OSError(), 404, UserError),
        (ConnectionRefusedError(), 0, StorageAway), (socket.gaierror(), 0, StorageAway),
        (OfflineModeIsEnabled(), 0, UserError),
    ],
)  # fmt: skip
def test_a_hub_that_is_away_is_no_missing_autoencoder(
    error: OSError, status: int, kind: type[DisScaleError], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Diffusers says of each that the file is missing; 64 workers that ask at once are answered with 429."""

    def load_config(*_: object, **__: object) -> None:
        error.response = SimpleNamespace(status_code=status)  # type: ignore[attr-defined]
        raise OSError("it does not appear to have a file named config.json") from error

    monkeypatch.setattr(diffusers.AutoencoderKL, "load_config", load_config)
    with pytest.raises(kind):
        vae.latent_shape(PretrainedVae(kind="pretrained", path="stabilityai/sd-vae-ft-mse"), 32)


def test_a_pipelines_folder_needs_its_subfolder(tmp_path: Path) -> None:
    saved(tmp_path / "vae", 3)
    settings = PretrainedVae(kind="pretrained", path=str(tmp_path))
    with pytest.raises(UserError, match=r"no autoencoder at .*for a pipeline, set vae.subfolder: vae"):
        vae.latent_shape(settings, 32)
    assert vae.latent_shape(settings.model_copy(update={"subfolder": "vae"}), 32) == (4, 8)


def test_a_default_that_diffusers_adds_does_not_change_the_identity(tmp_path: Path) -> None:
    settings = saved(tmp_path, **KINDS["f16"])  # type: ignore[arg-type]
    encoder = vae.load_pretrained(settings)
    file = Path(settings.path) / vae.CONFIG
    config = json.loads(file.read_text())
    assert config.pop("use_post_quant_conv") is True  # diffusers' default
    file.write_text(json.dumps(config))
    assert vae.load_pretrained(settings).identity == encoder.identity
    file.write_text(json.dumps(config | {"scaling_factor": 0.5}))
    assert vae.load_pretrained(settings).identity != encoder.identity


def test_an_image_that_does_not_fit_the_factor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.resolution: 40 is not a multiple of the VAE's factor 16"):
        vae.latent_shape(saved(tmp_path, **KINDS["f16"]), 40)  # type: ignore[arg-type]


def test_latents_that_decode_to_non_finite_values_are_refused(tmp_path: Path) -> None:
    decoder = vae.load_pretrained(saved(tmp_path / "vae", 4))
    latents = torch.zeros(3, 4, 4, 4)
    latents[1] = float("nan")
    with pytest.raises(DisScaleError, match="the VAE decoded 1 of 3 latents to values that are not finite"):
        decoder.decode(latents)
