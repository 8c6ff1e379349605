"""Autoencoders as exported programs: any channels, factor, scale and shift; what breaks the contract is refused."""

import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from dis_scale import vae
from dis_scale.data.latents import sample_posterior
from dis_scale.data.maintenance import load_decoder
from dis_scale.data.sources import open_source
from dis_scale.process.errors import StorageAway, UserError
from dis_scale.recipe import reading
from dis_scale.storage.programs import hash_of
from dis_scale.vae.exported import Programs, program_paths
from tests.conftest import TINY
from tests.support.autoencoders import encode_digits, exported, require_stored


class Returning(torch.nn.Module):
    """An autoencoder that breaks the contract in one way, or computes in half precision."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        if self.how == "random":
            return x + torch.randn_like(x) * x.std()  # blank images would not show it
        if self.how == "nan":
            return x / (0 * x)
        if self.how == "batch":
            return x / x.std()
        if self.how == "first":
            return x[:1]
        return x[:, 0, 0, 0] if self.how == "(B)" else x.flatten(1) if self.how == "(B, n)" else x.half()

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return z.half()


class Pair(torch.nn.Module):
    """An autoencoder that returns images and latents."""

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def decode(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return z, z


@pytest.mark.parametrize("posterior", [True, False])
def test_exported_programs_give_their_images_back(posterior: bool, tmp_path: Path) -> None:
    """Encode, write shards, read, scale and decode: the pictures are the images."""
    settings = exported(tmp_path / "vae", posterior=posterior, scale=0.5, shift=1.0)
    decoder, reader = encode_digits(tmp_path, settings)
    assert reader.shape == (12, 16)
    encoding = reader.manifest.encoding
    assert (encoding.scale, encoding.shift, encoding.identity) == (0.5, 1.0, decoder.identity)
    require_stored(reader, decoder, settings, posterior=posterior)
    named = load_decoder(None, reader.folder, settings.path)
    assert named is not None
    assert named.identity == decoder.identity
    moments, _ = reader.read(np.arange(8), np.zeros(8, int))
    mean = moments[:, :12].astype(np.float32)
    sample = sample_posterior(moments, np.random.default_rng(0))
    assert np.std(sample - mean) == pytest.approx(np.exp(-2) if posterior else 0, rel=0.05)
    images, source = decoder.decode(torch.from_numpy(reader.scaling.apply(mean))), open_source(reading.load(TINY).data)
    originals = {source.pixels(n, 32).tobytes() for n in range(len(source))}
    assert all(image.tobytes() in originals for image in images)


def test_the_identity_of_exported_programs_covers_their_settings(tmp_path: Path) -> None:
    settings = exported(tmp_path / "vae", posterior=False)
    others = [settings, *(settings.model_copy(update=change) for change in ({"scale": 2.0}, {"shift": 1.0}))]
    first, *changed = (vae.load_exported(each).identity for each in others)
    assert len({first, *changed}) == 3
    (tmp_path / "vae").rename(tmp_path / "moved")
    moved = settings.model_copy(update={"path": str(tmp_path / "moved")})
    assert vae.load_exported(moved).identity == first


def test_other_programs_are_refused(tmp_path: Path) -> None:
    good, path = exported(tmp_path / "vae", posterior=False), str(tmp_path / "other")
    half = exported(tmp_path / "half", posterior=False)
    (tmp_path / "half" / "decode.pt2").unlink()
    refused = {
        f"no file {path}/encode.pt2": good.model_copy(update={"path": path}),
        "no file .*half/decode.pt2": half,
        "has sha256 [0-9a-f]{64}, the recipe expects 0000": good.model_copy(update={"sha256": "0" * 64}),
        r"decode refuses an input of shape \(2, 24, 16, 16\)": exported(tmp_path / "more", posterior=True).model_copy(
            update={"posterior": False}
        ),
        r"encode.pt2 and .*decode.pt2: a program.* if you trust it, add beside its path:\n  sha256: "
        + str(good.sha256): good.model_copy(update={"sha256": None}),
        r"encode refuses an input of shape \(2, 3, 33, 33\): ": good,
    }
    for words, settings in refused.items():
        with pytest.raises(UserError, match=words):
            vae.latent_shape(settings, 33 if "33" in words else 32)
    (tmp_path / "vae" / "encode.pt2").write_bytes(b"nothing")
    digest = hash_of(program_paths(good.path), "vae")
    with pytest.raises(UserError, match=r"vae: encode is not a program of torch.export"):
        vae.load_exported(good.model_copy(update={"sha256": digest}))
    with zipfile.ZipFile(tmp_path / "other", "w") as archive:
        archive.writestr("other", "another archive")
    with pytest.raises(UserError, match=r"here: torch.export of .* does not read encode: "):
        Programs({"encode": (tmp_path / "other").read_bytes()}, "here")


@pytest.mark.parametrize(
    ("net", "words"),
    [
        (Returning("random"), "encode is random: return mean and log-variance, and set vae.posterior: true"),
        (Returning("nan"), "encode returns values of two images of noise that are not finite"),
        (Returning("batch"), "encode of an image depends on the others in its batch: export it in evaluation mode"),
        (Returning("first"), r"encode returns \(1, 3, 32, 32\) and decode .* expected \(2, C, h, h\)"),
        (Returning("(B)"), r"encode returns \(2,\) for two images, expected \(2, C, h, h\)"),
        (Returning("(B, n)"), r"encode returns \(2, 3072\) for two images, expected \(2, C, h, h\)"),
        (Pair(), "decode returns a tuple, expected a tensor"),
    ],
)
def test_programs_that_break_the_contract_are_refused(net: torch.nn.Module, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        vae.latent_shape(exported(tmp_path / "vae", posterior=False, net=net, latent=(3, 32, 32)), 32)


def test_programs_in_half_precision_give_float32(tmp_path: Path) -> None:
    half = vae.load_exported(exported(tmp_path / "vae", posterior=False, net=Returning("half"), latent=(3, 32, 32)))
    assert half.latent(32) == (3, 32)
    assert half.encode(np.zeros((1, 32, 32, 3), np.uint8)).dtype == torch.float32


def test_a_program_computes_where_it_is_moved_to(tmp_path: Path) -> None:
    """Also what it creates itself, such as a log-variance, which an export puts on its own device."""
    moved = vae.load_exported(exported(tmp_path / "vae", posterior=True))
    assert moved.device.type == "cpu"
    moved.net.to("meta")  # a device that every machine has
    assert moved.encode(np.zeros((1, 32, 32, 3), np.uint8)).device.type == "meta"


def test_storage_that_is_away_is_not_a_missing_file(tmp_path: Path, no_pauses: None, inject: Callable[[str], None]) -> None:
    settings = exported(tmp_path / "vae", posterior=False)
    inject("fail at read path=decode.pt2 times=9")
    with pytest.raises(StorageAway, match=r"decode.pt2"):
        vae.load_exported(settings)
