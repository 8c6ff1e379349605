"""Autoencoders of any class, channels, factor, scale and shift; and latents that are pixels."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import AutoencoderKL

from dis_scale import diffusion, vae
from dis_scale.data import shards
from dis_scale.data.encode import encode_images
from dis_scale.data.latents import Latents, micro_batch, open_latents, sample_posterior
from dis_scale.data.maintenance import decode_examples, describe, load_decoder
from dis_scale.data.making import LatentSet
from dis_scale.data.sources import open_source
from dis_scale.evaluation import held_out
from dis_scale.evaluation.sampling import open_sampler
from dis_scale.process import faults
from dis_scale.process.errors import DisScaleError, StorageAway, UserError
from dis_scale.recipe import LatentShape, PretrainedVae, Sampling, TorchScriptVae, TrainedVae, reading
from dis_scale.storage.folder import Folder, open_folder
from dis_scale.storage.programs import hash_of
from dis_scale.sweep import Sampled, Sweep, state
from dis_scale.sweep.documents import LatentsManifest
from dis_scale.vae import to_pixels, to_unit
from dis_scale.vae.scaling import Scaling
from dis_scale.vae.script import ScriptVae
from dis_scale.weights.opening import open_for_sampling, sample_pictures
from pipelines.evaluators import Evaluator
from pipelines.precompute import Encoder
from pipelines.prepare import Preparer
from tests.conftest import TINY
from tests.support import ranks
from tests.support.documents import put_latents
from tests.support.stage_jobs import deal_of

KINDS = {
    "SD, f8": {"latent_channels": 4, "scaling_factor": 0.18215, "levels": 4},
    "SD3, f8": {
        "latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609, "levels": 4,
        "use_quant_conv": False, "use_post_quant_conv": False,
    },
    "f16": {"latent_channels": 8, "scaling_factor": 0.9, "levels": 5},
}  # fmt: skip


DOWN, UP = ("DownEncoderBlock2D",) * 3, ("UpDecoderBlock2D",) * 3
FLUX = {
    "down_block_types": DOWN, "up_block_types": UP, "block_out_channels": (8, 8, 8), "norm_num_groups": 8,
    "layers_per_block": 1, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False,
}  # fmt: skip
CLASSES = {
    "AutoencoderKL": FLUX | {"scaling_factor": 0.3611, "shift_factor": 0.1159},
    "AsymmetricAutoencoderKL": {
        "down_block_types": DOWN, "down_block_out_channels": (8, 8, 8), "up_block_types": UP, "norm_num_groups": 8,
        "up_block_out_channels": (16, 16, 16), "scaling_factor": 0.6,
    },
    "AutoencoderKLFlux2": FLUX | {"latent_channels": 32},
    "AutoencoderKLHunyuanImage": {
        "in_channels": 3, "out_channels": 3, "latent_channels": 8, "block_out_channels": (32, 32, 64), "layers_per_block": 1,
        "spatial_compression_ratio": 4, "sample_size": 32, "scaling_factor": 0.7,
    },
    "AutoencoderKLKVAE": {"channels": 32, "ch_mult": (1, 1, 1), "num_enc_blocks": 1, "num_dec_blocks": 1, "z_channels": 8},
    "AutoencoderDC": {
        "latent_channels": 8, "attention_head_dim": 8, "scaling_factor": 0.41407, "encoder_layers_per_block": (1, 1, 1),
        "decoder_layers_per_block": (1, 1, 1), "encoder_block_out_channels": (8, 8, 16),
        "decoder_block_out_channels": (8, 8, 16), "encoder_qkv_multiscales": ((), (), ()),
        "decoder_qkv_multiscales": ((), (), ()), "encoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
    },
    "AutoencoderTiny": {
        "encoder_block_out_channels": (8, 8, 8), "decoder_block_out_channels": (8, 8, 8), "num_encoder_blocks": (1, 1, 1),
        "num_decoder_blocks": (1, 1, 1), "scaling_factor": 0.8, "shift_factor": 0.1,
    },
    "VQModel": {
        "down_block_types": DOWN, "block_out_channels": (8, 8, 8), "up_block_types": UP, "norm_num_groups": 8,
        "latent_channels": 4, "vq_embed_dim": 5, "num_vq_embeddings": 16, "scaling_factor": 0.9,
    },
}  # fmt: skip
"""Small configurations of all supported classes, of factor 4."""
SCALINGS = {
    "AutoencoderKL": (0.1159, 0.3611), "AsymmetricAutoencoderKL": (0.0, 0.6), "AutoencoderKLFlux2": (0.0, 1.0),
    "AutoencoderKLHunyuanImage": (0.0, 0.7), "AutoencoderKLKVAE": (0.0, 1.0), "AutoencoderDC": (0.0, 0.41407),
    "AutoencoderTiny": (0.1, 0.8), "VQModel": (0.0, 0.9),
}  # fmt: skip
"""Shift and scale in these configurations; 0 and 1 for the two classes whose configuration has none."""
DETERMINISTIC = {"AutoencoderDC", "AutoencoderTiny", "VQModel"}


def saved_class(where: Path, name: str) -> PretrainedVae:
    """Save an untrained autoencoder of a class of diffusers."""
    torch.manual_seed(0)
    getattr(diffusers, name)(**CLASSES[name]).save_pretrained(where)
    return PretrainedVae(kind="pretrained", path=str(where))


class Folded(torch.nn.Module):
    """An autoencoder without loss: a pixel's 2 x 2 neighbours become 12 channels, three times as large and moved by 1."""

    def __init__(self, posterior: bool) -> None:
        super().__init__()
        self.posterior = posterior
        self.factor = torch.nn.Parameter(torch.tensor(3.0))

    @torch.jit.export
    def encode(self, x: torch.Tensor) -> torch.Tensor:
        z = torch.nn.functional.pixel_unshuffle(x, 2) * self.factor + 1
        return torch.cat([z, torch.full_like(z, -4.0)], 1) if self.posterior else z

    @torch.jit.export
    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pixel_shuffle((z - 1) / self.factor, 2)


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


def scripted(where: Path, posterior: bool, net: torch.nn.Module | None = None, **settings: object) -> TorchScriptVae:
    """Save an autoencoder as a TorchScript file."""
    torch.jit.script(net or Folded(posterior)).save(str(where))
    digest = hash_of(str(where), "vae")
    return TorchScriptVae(kind="torchscript", path=str(where), posterior=posterior, sha256=digest, **settings)  # type: ignore[arg-type]


def saved(where: Path, levels: int, **config: object) -> PretrainedVae:
    """Save an untrained autoencoder in diffusers' layout, with a config like published ones."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    net = AutoencoderKL(block_out_channels=(8,) * levels, layers_per_block=1, norm_num_groups=8, **blocks, **config)
    net.save_pretrained(where)
    return PretrainedVae(kind="pretrained", path=str(where))


def encode_digits(sweep: Sweep, latents: Folder) -> None:
    encoder, source = Encoder(sweep, "cpu"), open_source(sweep.recipe.data)
    encoding = encoder.encoding()

    def encode(left: list[int]) -> None:
        encoder.encode(latents, encoding, deal_of(left))

    def refuse(_: list[int]) -> None:
        raise AssertionError("digits are listed in the mixed order")

    LatentSet(sweep.recipe, latents, source, encoding, encode, refuse).make()


def require_stored(latents: Folder, sweep: Sweep, *, posterior: bool) -> None:
    """Fail unless the shards have a log-variance exactly if there is a posterior, and all say so."""
    made, decoder = LatentsManifest.require(latents), vae.load(sweep)
    (channels, size), entry = made.encoding.latent, made.shards[0]
    stored = shards.unpack(latents.read(entry.name), "").moments
    assert stored.shape[1:] == (2, channels * (1 + posterior), size, size)
    assert made.encoding.posterior == decoder.posterior == vae.has_posterior(sweep.recipe.vae) == posterior
    assert abs(entry.size_bytes / entry.count - shards.sample_bytes(LatentShape(channels, size), posterior)) < 20
    assert ("without variance" in describe(latents)[2]) == (not posterior)
    assert len(made.mean) == channels
    assert decode_examples(latents, decoder).shape[1:] == (32, 32, 3)


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
    decoded = encoder.decode((mean - encoder.shift) * encoder.scale)
    plain = to_pixels(encoder.net.decode(mean).sample)
    assert np.abs(decoded.astype(int) - plain.astype(int)).max() <= 1  # one more rounding


FEW = ("AutoencoderKL", "AsymmetricAutoencoderKL", "AutoencoderDC")
"""Run by `make test`, with and without a posterior; the others by `make faults`."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FEW else [pytest.mark.faults]) for name in CLASSES]
)
def test_every_class_gives_its_latents_back(name: str, tmp_path: Path) -> None:
    """Encode, write shards, read, scale and decode: the picture is the network's own decoding of the stored mean."""
    settings = saved_class(tmp_path / "vae", name)
    recipe = reading.load(TINY, [f"vae={{kind: pretrained, path: {settings.path}}}", "precompute.shard_images=900"])
    sweep, at = Sweep(open_folder(tmp_path) / "sweep", recipe), open_folder(tmp_path) / "latents"
    encode_digits(sweep, at)
    decoder, reader = vae.load(sweep), Latents(at, seed=0)
    assert vae.latent_shape(recipe.vae, 32) == reader.shape == decoder.latent(32)
    assert reader.shape.size == 8
    assert reader.scaling == decoder.scaling == Scaling(*SCALINGS[name])
    require_stored(at, sweep, posterior=name not in DETERMINISTIC)
    moments, _ = reader.read(np.arange(8), np.zeros(8, int))
    mean = torch.from_numpy(moments[:, : reader.shape.channels]).float()
    sample = sample_posterior(moments, np.random.default_rng(0))
    assert (name in DETERMINISTIC) == np.array_equal(sample, mean)
    plain = to_pixels(decoder.net.decode(mean).sample)
    decoded = decoder.decode(torch.from_numpy(reader.scaled(mean.numpy())))
    assert plain.shape == (8, 32, 32, 3)
    assert np.abs(decoded.astype(int) - plain.astype(int)).max() <= 1  # one more rounding


@pytest.mark.parametrize("name", CLASSES)
def test_moments_are_those_of_the_class(name: str, tmp_path: Path) -> None:
    encoder = vae.load_pretrained(saved_class(tmp_path, name))
    pixels = np.random.default_rng(0).integers(0, 255, (2, 32, 32, 3), dtype=np.uint8)
    with torch.no_grad():
        encoded = encoder.net.encode(to_unit(pixels), return_dict=False)[0]
    mean = encoded if name in DETERMINISTIC else encoded.mean
    expected = mean if name in DETERMINISTIC else torch.cat([mean, encoded.logvar], 1)
    assert torch.equal(encoder.encode(pixels), expected)


@pytest.mark.parametrize("posterior", [True, False])
def test_a_torchscript_file_gives_its_images_back(posterior: bool, tmp_path: Path) -> None:
    """Encode, write shards, read, scale and decode: the pictures are the images."""
    settings = scripted(tmp_path / "vae.pt", posterior, scale=0.5, shift=1.0)
    recipe = reading.load(TINY, [f"vae={settings.model_dump_json()}", "precompute.shard_images=900"])
    assert recipe.vae == settings
    sweep, at = Sweep(open_folder(tmp_path) / "sweep", recipe), open_folder(tmp_path) / "latents"
    encode_digits(sweep, at)
    decoder, reader, source = vae.load(sweep), Latents(at, seed=0), open_source(recipe.data)
    assert vae.latent_shape(recipe.vae, 32) == reader.shape == (12, 16)
    encoding = reader.manifest.encoding
    assert (encoding.scale, encoding.shift, encoding.identity) == (0.5, 1.0, decoder.identity)
    require_stored(at, sweep, posterior=posterior)
    named = load_decoder(None, at, settings.path)
    assert named is not None
    assert named.identity == decoder.identity
    moments, _ = reader.read(np.arange(8), np.zeros(8, int))
    mean = moments[:, :12].astype(np.float32)
    sample = sample_posterior(moments, np.random.default_rng(0))
    assert np.std(sample - mean) == pytest.approx(np.exp(-2) if posterior else 0, rel=0.05)
    images = decoder.decode(torch.from_numpy(reader.scaled(mean)))
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
    assert half._decode(torch.zeros(1, 3, 8, 8)).dtype == torch.float32


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
    assert elsewhere._decode(torch.zeros(1, 12, 4, 4)).device.type == "meta"


def test_storage_that_is_away_is_not_a_missing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = scripted(tmp_path / "vae.pt", False)
    with pytest.raises(UserError, match=f"no file {tmp_path}"):
        vae.load_script(settings.model_copy(update={"path": str(tmp_path)}))
    (tmp_path / "plan").write_text("fail at read path=vae.pt times=9")
    monkeypatch.setattr(faults, "_plan", faults.load(tmp_path / "plan"))
    monkeypatch.setattr("dis_scale.storage.folder._FIRST_PAUSE_S", 0.0)
    with pytest.raises(StorageAway, match=r"vae.pt"):
        vae.load_script(settings)


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


def test_groups_of_a_trained_autoencoder_divide_its_widths() -> None:
    assert vae.new(TrainedVae(kind="trained", widths=(4, 8), norm_groups=1), 16).config.norm_num_groups == 1
    with pytest.raises(ValueError, match="widths: 12 is not a multiple of norm_groups 8: choose groups that divide it"):
        TrainedVae(kind="trained", widths=(8, 12))


def test_identity_and_bytes_of_earlier_latents_are_kept() -> None:
    """Frozen: otherwise existing sets of latents would be refused, or made again."""
    net = vae.new(TrainedVae(kind="trained", widths=(8, 8), latent_channels=3), 16)
    with torch.no_grad():
        for weight in net.state_dict().values():
            weight.copy_((torch.arange(weight.numel()) % 17 - 8).reshape(weight.shape) / 64)
    assert vae.DiffusersVae(net).identity == "c99671eb7a3c1d4812b2c881d4053295e2e94d09346397d5011e8d539bdb259d"
    pixels = vae.PixelVae()
    assert pixels.identity == "e0b5b11904328dce9d6f5fa42252696d6b4c3192b3b39eeac0049941b228a014"
    image = np.arange(3 * 256, dtype=np.uint8).reshape(1, 16, 16, 3)
    shard = shards.pack([shards.Sample(0, "a", 1, encode_images(pixels, image, 2)[0])])
    assert hashlib.sha256(shard).hexdigest() == "c509c413a8ac804dd8c18e1bfe46d33ae4731146125e30a003592e054dd16aaa"


def test_scale_and_shift_are_in_the_manifest_and_applied_in_training(tmp_path: Path) -> None:
    settings = saved(tmp_path / "vae", **KINDS["SD3, f8"])  # type: ignore[arg-type]
    recipe = reading.load(TINY, [f"vae={{kind: pretrained, path: {settings.path}}}", "precompute.shard_images=900"])
    encode_digits(Sweep(open_folder(tmp_path) / "sweep", recipe), open_folder(tmp_path) / "latents")
    latents = Latents(open_folder(tmp_path) / "latents", seed=0)
    encoding = latents.manifest.encoding
    assert (encoding.scale, encoding.shift, encoding.latent) == (1.5305, 0.0609, (16, 4))
    options = {"batch": 8, "lanes": 1, "seed": 0, "flip": False, "label_dropout": 0.0}
    batch = micro_batch(latents, 0, 0, **options)  # type: ignore[arg-type]
    mean, log_variance = np.split(latents.read(np.arange(8), np.zeros(8, int))[0].astype(np.float32), 2, axis=1)
    undone = batch.x_BCHW.numpy() / 1.5305 + 0.0609
    assert (np.abs(undone - mean) < 6 * np.exp(0.5 * log_variance)).all()


def test_scale_and_shift_by_channel_are_those_of_diffusers_pipelines(tmp_path: Path) -> None:
    """Decoding is `z latents_std / scaling_factor + latents_mean`, as in StableDiffusionXLPipeline."""
    mean, std = [0.1, -0.2, 0.3, 0.4], [2.0, 3.0, 4.0, 5.0]
    settings = saved(tmp_path / "vae", 3, latents_mean=mean, latents_std=std, scaling_factor=0.5)
    recipe = reading.load(TINY, [f"vae={{kind: pretrained, path: {settings.path}}}", "precompute.shard_images=900"])
    sweep, at = Sweep(open_folder(tmp_path) / "sweep", recipe), open_folder(tmp_path) / "latents"
    encode_digits(sweep, at)
    decoder, reader = vae.load(sweep), Latents(at, seed=0)
    moments, _ = reader.read(np.arange(8), np.zeros(8, int))
    scaled = reader.scaled(moments[:, :4].astype(np.float32))
    mean_C11, std_C11 = (np.array(each, np.float32)[:, None, None] for each in (mean, std))
    np.testing.assert_allclose(scaled * std_C11 / 0.5 + mean_C11, moments[:, :4], atol=1e-5)
    plain = to_pixels(decoder.net.decode(torch.from_numpy(moments[:, :4]).float()).sample)
    assert np.abs(decoder.decode(torch.from_numpy(scaled)).astype(int) - plain.astype(int)).max() <= 1
    lines = describe(at)
    assert any("shift 0.1 -0.2 0.3 0.4" in line for line in lines)
    assert any("scale 0.25 0.167 0.125 0.1 makes" in line for line in lines)


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


def test_without_a_vae_every_pixel_value_is_restored() -> None:
    recipe = reading.load(TINY, ["vae={kind: none}", "data.resolution=40"])
    assert vae.latent_shape(recipe.vae, 40) == LatentShape(3, 40)
    pixels = vae.load(Sweep(Folder("unused"), recipe))
    image = np.arange(3 * 256, dtype=np.uint8).reshape(1, 16, 16, 3)
    moments = pixels.encode(image).half().float()
    deviation = np.exp(np.float32(0.5) * moments[:, 3:].numpy())
    assert (deviation == 0).all()
    np.testing.assert_array_equal(pixels.decode(moments[:, :3]), image)


def test_all_stages_in_pixel_space(tmp_path: Path) -> None:
    """Precompute, training, evaluation and `dis-scale sample` without Ray; prepare trains no autoencoder."""
    recipe = reading.load(
        TINY, ["vae={kind: none}", "data.resolution=16", "train.workers=1", "evaluate.block_images=20"]
    )
    sweep = ranks.sweep_of(tmp_path, recipe)
    latents = sweep.folder / "latents/pixels"
    sweep.save_recipe()
    Preparer().prepare(sweep, "cpu")
    assert not sweep.folder.exists("vae")
    encode_digits(sweep, latents)
    state.use_latents(sweep, latents, vae.load(sweep).identity)
    (tmp_path / "latents").symlink_to(latents.url)  # training without Ray reads this path
    reader = Latents(latents, seed=0)
    assert reader.shape == (3, 16)
    options = {"batch": 4, "lanes": 1, "seed": 0, "flip": False, "label_dropout": 0.0}
    batch = micro_batch(reader, 0, 0, **options)  # type: ignore[arg-type]
    np.testing.assert_array_equal(batch.x_BCHW.numpy(), reader.read(np.arange(4), np.zeros(4, int))[0][:, :3])

    ranks.run(recipe, "dis", tmp_path, attempt=1)
    sampler = open_sampler(sweep, vae.load(sweep), torch.device("cpu"))
    block = sampler.sample(sampler.model("dis", 320, recipe.evaluate), recipe.evaluate, 0)
    assert block.pictures.shape[1:] == (16, 16, 3)
    assert len(block.right) == 20
    opened = open_for_sampling(tmp_path / "sweep/runs/dis/published/000000000320", None)
    (pictures,) = sample_pictures(opened, [3, 3], sampling=Sampling(sampler="ddim", steps=2), batch=2)
    assert pictures.shape == (2, 16, 16, 3)


def test_all_stages_normalised_by_channel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training and the held-out loss see normalised latents, and evaluation and `dis-scale sample` decode them to the images."""
    monkeypatch.setattr("os.nice", lambda _: 0)  # an evaluator's process gives way; this one has further tests to run
    settings = scripted(tmp_path / "vae.pt", posterior=False, scale=0.25)
    stages = [
        "data.normalise=channels",
        "train.workers=1",
        "train.publish_images=[0, 16]",
        "precompute.shard_images=900",
    ]
    recipe = reading.load(TINY, [f"vae={settings.model_dump_json()}", *stages])
    sweep = ranks.sweep_of(tmp_path, recipe)
    latents = sweep.folder / "latents/folded"
    sweep.save_recipe()
    Preparer().prepare(sweep, "cpu")
    encode_digits(sweep, latents)
    state.use_latents(sweep, latents, vae.load(sweep).identity)
    (tmp_path / "latents").symlink_to(latents.url)  # training without Ray reads this path
    reader, _ = open_latents(latents, recipe, 1, print)
    options = {"batch": 1700, "lanes": 1, "seed": 0, "flip": False, "label_dropout": 0.0}
    x_BCHW = micro_batch(reader, 0, 0, **options).x_BCHW  # type: ignore[arg-type]
    assert x_BCHW.mean((0, 2, 3)).tolist() == pytest.approx([0] * 12, abs=0.01)
    assert x_BCHW.std((0, 2, 3)).tolist() == pytest.approx([1] * 12, abs=0.01)

    ranks.run(recipe, "dis", tmp_path, attempt=1)
    evaluator, source = Evaluator(sweep, "cpu"), open_source(recipe.data)
    published = tmp_path / "sweep/runs/dis/published/000000000016"
    originals = {source.pixels(n, 32).tobytes() for n in range(len(source))}
    copied = shutil.copytree(published, tmp_path / "copied")
    decoders = [evaluator.sampler.vae, open_for_sampling(published, None).decoder]
    alone = open_for_sampling(copied, settings.path)
    assert alone.notes == []
    for decoder in (*decoders, alone.decoder):
        assert all(image.tobytes() in originals for image in decoder.decode(x_BCHW[:8]))
    assert not any(image.tobytes() in originals for image in vae.load(sweep).decode(x_BCHW[:8]))

    by_channel = Latents(latents, 0, recipe.data.held_out_images, normalise="channels")
    model = evaluator.sampler.model("dis", 16, recipe.evaluate)
    expected = held_out.losses(model, diffusion.build(recipe.diffusion), by_channel, recipe.seed, 20)
    assert evaluator.held_out(Sampled("dis", 16)) == expected

    latents.delete()
    assert open_for_sampling(published, None).decoder.scaling == alone.decoder.scaling
    scripted(tmp_path / "vae.pt", posterior=False, net=Folded(False).half())
    with pytest.raises(UserError, match=r"vae.pt has sha256 .*, the recipe expects"):
        open_for_sampling(published, None)
    (note,) = open_for_sampling(copied, settings.path).notes
    assert f"{settings.path} did not encode the model's latents: its identity is" in note


def test_a_constant_channel_is_not_normalised(tmp_path: Path) -> None:
    """The deviation of a constant channel is 0 or, by rounding, nearly."""
    mean, std = (0.0, 1.0, 0.1), (1.0, 0.0, 1.4e-17)
    latents = put_latents(open_folder(tmp_path), mean=mean, std=std, posterior_variance=(0.0, 0.0, 0.0))
    assert Scaling.of(latents, "vae") == Scaling(0.0, 1.0)
    with pytest.raises(UserError, match=r"channels \[1, 2\] of the latents are constant: set it to vae"):
        Scaling.of(latents, "channels")
    noisy = latents.changed(posterior_variance=(0.0, 4.0, 1.0))
    assert Scaling.of(noisy, "channels").scale == [1.0, 0.5, 1.0]


def test_latents_that_decode_to_non_finite_values_are_refused(tmp_path: Path) -> None:
    decoder = vae.load_pretrained(saved(tmp_path / "vae", 4))
    latents = torch.zeros(3, 4, 4, 4)
    latents[1] = float("nan")
    with pytest.raises(DisScaleError, match="the VAE decoded 1 of 3 latents to values that are not finite"):
        decoder.decode(latents)
