"""Small autoencoders of every kind, and latents that they encode."""

from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL

from dis_scale import vae
from dis_scale.data import shards
from dis_scale.data.latents import Latents
from dis_scale.data.maintenance import decode_examples, describe
from dis_scale.recipe import ExportedVae, LatentShape, PretrainedVae, reading
from dis_scale.recipe.data import VaeSettings
from dis_scale.storage.folder import open_folder
from dis_scale.storage.programs import hash_of
from dis_scale.sweep import Sweep
from dis_scale.vae import Vae
from dis_scale.vae.exported import program_paths
from tests.conftest import TINY
from tests.support.programs import save_program
from tests.support.stages import make_latents

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
    "AutoencoderRAE": {
        "encoder_hidden_size": 64, "encoder_patch_size": 4, "encoder_num_hidden_layers": 1, "encoder_input_size": 32,
        "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 16, "patch_size": 4, "latents_std": [[[0.5]]] * 64,
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
    "AutoencoderRAE": (0.0, 1.0), "AutoencoderTiny": (0.1, 0.8), "VQModel": (0.0, 0.9),
}  # fmt: skip
"""Shift and scale in these configurations; 0 and 1 for the two classes whose configuration has none."""
DETERMINISTIC = {"AutoencoderDC", "AutoencoderRAE", "AutoencoderTiny", "VQModel"}


def saved_class(where: Path, name: str) -> PretrainedVae:
    """Save an untrained autoencoder of a class of diffusers."""
    torch.manual_seed(0)
    getattr(diffusers, name)(**CLASSES[name]).save_pretrained(where)
    return PretrainedVae(kind="pretrained", path=str(where))


def saved(where: Path, levels: int, **config: object) -> PretrainedVae:
    """Save an untrained autoencoder in diffusers' layout, with a config like published ones."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    net = AutoencoderKL(block_out_channels=(8,) * levels, layers_per_block=1, norm_num_groups=8, **blocks, **config)
    net.save_pretrained(where)
    return PretrainedVae(kind="pretrained", path=str(where))


class Folded(torch.nn.Module):
    """An autoencoder without loss: a pixel's 2 x 2 neighbours become 12 channels, three times as large and moved by 1."""

    def __init__(self, *, posterior: bool) -> None:
        super().__init__()
        self.posterior = posterior
        self.factor = torch.nn.Parameter(torch.tensor(3.0))

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        z = torch.nn.functional.pixel_unshuffle(x, 2) * self.factor + 1
        return torch.cat([z, torch.full_like(z, -4.0)], 1) if self.posterior else z

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pixel_shuffle((z - 1) / self.factor, 2)


class Method(torch.nn.Module):
    """One method of a module, to be exported."""

    def __init__(self, net: torch.nn.Module, name: str) -> None:
        super().__init__()
        self.net, self.name = net, name

    def forward(self, x: torch.Tensor) -> Any:
        return getattr(self.net, self.name)(x)


def exported(
    where: Path,
    *,
    posterior: bool,
    net: torch.nn.Module | None = None,
    side: int = 32,
    latent: tuple[int, ...] = (12, 16, 16),
    **settings: object,
) -> ExportedVae:
    """Save an autoencoder of images of this side as two programs, in a folder."""
    net = net or Folded(posterior=posterior)
    where.mkdir(exist_ok=True)
    for name, shape in (("encode", (3, side, side)), ("decode", latent)):
        save_program(where / f"{name}.pt2", Method(net, name), torch.zeros(2, *shape))
    digest = hash_of(program_paths(str(where)), "vae")
    return ExportedVae(kind="exported", path=str(where), posterior=posterior, sha256=digest, **settings)  # type: ignore[arg-type]


def encode_digits(root: Path, settings: VaeSettings) -> tuple[Vae, Latents]:
    """Encode all digits by the precompute stage of a sweep below `root`; return the autoencoder and the reader."""
    vae_setting = f"vae={settings.model_dump_json(exclude_none=True)}"
    recipe = reading.load(TINY, [vae_setting, "precompute.shard_images=900"])
    sweep = Sweep.below(open_folder(root), recipe)
    assert vae.latent_shape(recipe.vae, 32) == vae.load(sweep).latent(32)
    return vae.load(sweep), Latents(make_latents(sweep), seed=0)


def require_stored(reader: Latents, decoder: Vae, settings: VaeSettings, *, posterior: bool) -> None:
    """Fail unless the shards have a log-variance exactly if there is a posterior, and all say so."""
    made, latents = reader.manifest, reader.folder
    (channels, size), entry = made.encoding.latent, made.shards[0]
    stored = shards.unpack(latents.read(entry.name), "").moments
    assert stored.shape[1:] == (2, channels * (1 + posterior), size, size)
    assert made.encoding.posterior == decoder.posterior == vae.has_posterior(settings) == posterior
    assert abs(entry.size_bytes / entry.count - shards.sample_bytes(LatentShape(channels, size), posterior=posterior)) < 20
    assert ("without variance" in describe(latents)[2]) == (not posterior)
    assert len(made.mean) == channels
    assert decode_examples(latents, decoder).decoded.shape[1:] == (32, 32, 3)
