"""What holds for all autoencoders: the bytes of earlier latents, and latents that are pixels."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from dis_scale import vae
from dis_scale.data import shards
from dis_scale.recipe import LatentShape, TrainedVae, reading
from dis_scale.storage.folder import Folder
from dis_scale.sweep import Sweep
from tests.conftest import TINY


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
    shard = shards.pack([shards.Sample(0, "a", 1, pixels.begin(image)()[0])])
    assert hashlib.sha256(shard).hexdigest() == "c509c413a8ac804dd8c18e1bfe46d33ae4731146125e30a003592e054dd16aaa"


def test_without_a_vae_every_pixel_value_is_restored() -> None:
    recipe = reading.load(TINY, ["vae={kind: none}", "data.resolution=40"])
    assert vae.latent_shape(recipe.vae, 40) == LatentShape(3, 40)
    pixels = vae.load(Sweep(Folder("unused"), recipe))
    image = np.arange(3 * 256, dtype=np.uint8).reshape(1, 16, 16, 3)
    moments = pixels.encode(image).half().float()
    deviation = np.exp(np.float32(0.5) * moments[:, 3:].numpy())
    assert (deviation == 0).all()
    np.testing.assert_array_equal(pixels.decode(moments[:, :3]), image)


def test_diffusers_finds_scipy(tmp_path: Path) -> None:
    """Where scikit-learn and peft are installed, importing diffusers imports them, and they scipy."""
    (tmp_path / "diffusers.py").write_text("import scipy.sparse\n\nAutoencoderKL = scipy.sparse.csr_array\n")
    code = "from dis_scale.vae import autoencoders; print(autoencoders._diffusers('AutoencoderKL').__name__)"
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    found = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert found.stdout.strip() == "csr_array", found.stderr
