"""Autoencoders from a TorchScript file: any channels, factor, scale and shift; what breaks the contract is refused."""

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
from dis_scale.recipe import TorchScriptVae, reading
from dis_scale.storage.programs import hash_of
from dis_scale.vae.script import ScriptVae
from tests.conftest import TINY
from tests.support.autoencoders import Folded, encode_digits, require_stored, scripted


class Returning(torch.nn.Module):
    """An autoencoder that breaks the contract in one way, or computes in half precision."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    @torch.jit.export
    def encode(self, x: torch.Tensor) -> torch.Tensor:
        if self.how == "random":
            return x + torch.randn_like(x)
        if self.how == "raise":
            raise ValueError("no such size")
        if self.how == "first":
            return x[:1]
        return x[:, 0, 0, 0] if self.how == "(B)" else x.flatten(1) if self.how == "(B, n)" else x.half()

    @torch.jit.export
    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return z.half()


class Pair(torch.nn.Module):
    """An autoencoder that returns images and latents."""

    @torch.jit.export
    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return x

    @torch.jit.export
    def decode(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return z, z


class Encoding(torch.nn.Module):
    """A module without `decode`."""

    @torch.jit.export
    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.parametrize("posterior", [True, False])
def test_a_torchscript_file_gives_its_images_back(posterior: bool, tmp_path: Path) -> None:
    """Encode, write shards, read, scale and decode: the pictures are the images."""
    settings = scripted(tmp_path / "vae.pt", posterior, scale=0.5, shift=1.0)
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
    images, source = decoder.decode(torch.from_numpy(reader.scaled(mean))), open_source(reading.load(TINY).data)
    originals = {source.pixels(n, 32).tobytes() for n in range(len(source))}
    assert all(image.tobytes() in originals for image in images)


def test_the_identity_of_a_torchscript_file_covers_its_settings(tmp_path: Path) -> None:
    settings = scripted(tmp_path / "vae.pt", False)
    others = [settings, *(settings.model_copy(update=change) for change in ({"scale": 2.0}, {"shift": 1.0}))]
    assert len({vae.load_script(each).identity for each in others}) == 3
    (tmp_path / "moved.pt").write_bytes((tmp_path / "vae.pt").read_bytes())
    moved = settings.model_copy(update={"path": str(tmp_path / "moved.pt")})
    assert vae.load_script(moved).identity == vae.load_script(settings).identity


def test_other_torchscript_files_are_refused(tmp_path: Path) -> None:
    good, path = scripted(tmp_path / "vae.pt", False), str(tmp_path / "other")
    refused = {
        f"no file {path}": good.model_copy(update={"path": path}),
        "has sha256 [0-9a-f]{64}, the recipe expects 0000": good.model_copy(update={"sha256": "0" * 64}),
        "has no method decode: export both": scripted(tmp_path / "half.pt", False, Encoding()),
        "has no method encode and no method decode": scripted(tmp_path / "none.pt", False, torch.nn.Identity()),
        r"encode returns \(2, 24, 16, 16\).*expected \(2, C, h, h\)": scripted(tmp_path / "more.pt", True).model_copy(
            update={"posterior": False}
        ),
        r"vae.pt is a program.* if you trust the file, add beside its path:\n  sha256: "
        + str(good.sha256): good.model_copy(update={"sha256": None}),
        "an image of 33 pixels is not encoded and decoded": good,
    }
    for words, settings in refused.items():
        with pytest.raises(UserError, match=words):
            vae.latent_shape(settings, 33 if "33" in words else 32)
    (tmp_path / "bytes.pt").write_bytes(b"nothing")
    with pytest.raises(UserError, match="is not a TorchScript file"):
        vae.load_script(
            good.model_copy(update={"path": (path := str(tmp_path / "bytes.pt")), "sha256": hash_of(path, "vae")})
        )


@pytest.mark.parametrize(
    ("net", "words"),
    [
        (Returning("random"), "encode is random: return mean and log-variance, and set vae.posterior: true"),
        (Returning("raise"), "an image of 32 pixels is not encoded and decoded: .*no such size"),
        (Returning("first"), r"encode returns \(1, 3, 32, 32\) and decode .* expected \(2, C, h, h\)"),
        (Returning("(B)"), r"encode returns \(2,\) for two images, expected \(2, C, h, h\)"),
        (Returning("(B, n)"), r"encode returns \(2, 3072\) for two images, expected \(2, C, h, h\)"),
        (Pair(), "decode returns a tuple, expected a tensor"),
    ],
)
def test_torchscript_files_that_break_the_contract_are_refused(
    net: torch.nn.Module, words: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words):
        vae.latent_shape(scripted(tmp_path / "vae.pt", False, net), 32)


def test_a_torchscript_file_in_half_precision_gives_float32(tmp_path: Path) -> None:
    half = vae.load_script(scripted(tmp_path / "vae.pt", False, Returning("half")))
    assert half.latent(32) == (3, 32)
    assert half.encode(np.zeros((1, 8, 8, 3), np.uint8)).dtype == torch.float32


def test_a_torchscript_file_gets_tensors_on_its_own_device(tmp_path: Path) -> None:
    """A frozen file has no parameters to be moved: it stays on the CPU, and latents from a GPU are moved to it."""
    frozen = torch.jit.freeze(torch.jit.script(Folded(False).eval()), preserved_attrs=["encode", "decode"])
    frozen.save(str(tmp_path / "frozen.pt"))
    decoder = vae.load_script(
        TorchScriptVae(
            kind="torchscript", path=(path := str(tmp_path / "frozen.pt")), sha256=hash_of(path, "vae"), posterior=False
        )
    )
    assert decoder.device.type == "cpu"
    assert decoder.latent(32) == (12, 16)
    settings = TorchScriptVae(kind="torchscript", path="unused", posterior=False)
    elsewhere = ScriptVae(Folded(False).to("meta"), settings)  # a device that every machine has
    assert elsewhere.encode(np.zeros((1, 8, 8, 3), np.uint8)).device.type == "meta"


def test_storage_that_is_away_is_not_a_missing_file(
    tmp_path: Path, no_pauses: None, inject: Callable[[str], None]
) -> None:
    settings = scripted(tmp_path / "vae.pt", False)
    with pytest.raises(UserError, match=f"no file {tmp_path}"):
        vae.load_script(settings.model_copy(update={"path": str(tmp_path)}))
    inject("fail at read path=vae.pt times=9")
    with pytest.raises(StorageAway, match=r"vae.pt"):
        vae.load_script(settings)
