"""Export: a file that describes its model, and a folder that diffusers samples from."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from dis_scale.diffusion import build as build_process
from dis_scale.diffusion.generate import generate
from dis_scale.models import build
from dis_scale.models.diffussm.settings import DiffuSsm
from dis_scale.models.dis.settings import Dis
from dis_scale.models.dit.settings import Dit
from dis_scale.models.public import to_official
from dis_scale.models.settings import FamilySettings
from dis_scale.process.errors import UserError
from dis_scale.recipe import ExportedVae, Flow, Gaussian, LatentShape, Sampling
from dis_scale.recipe.evaluate import Sampler
from dis_scale.vae import DiffusersVae, PixelVae
from dis_scale.vae.exported import ProgramVae
from dis_scale.vae.interface import Vae
from dis_scale.vae.scaling import Scaling
from dis_scale.weights.export import describe, load, open_checkpoint, save, save_pipeline

DIS = Dis(kind="dis", width=32, depth=2, patch=2)
SETTINGS = [DIS, Dit(kind="dit", width=32, depth=1, heads=2, patch=2), DiffuSsm(kind="diffussm", width=16, depth=1, state_size=4)]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: s.kind)
def test_save_and_load_return_the_same_model(settings: FamilySettings, tmp_path: Path) -> None:
    model = build(settings, LatentShape(4, 8), 10, seed=3)
    save(model, tmp_path / "model.safetensors")
    again = load(tmp_path / "model.safetensors")
    assert (again.settings, again.shape, again.num_classes) == (settings, LatentShape(4, 8), 10)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("settings", SETTINGS[:2], ids=lambda s: s.kind)
def test_a_checkpoint_is_recognised_by_its_keys(settings: FamilySettings, tmp_path: Path) -> None:
    model = build(settings, LatentShape(4, 8), 10, seed=3)
    save(model, tmp_path / "model.safetensors")
    torch.save(to_official(model), tmp_path / "model.pt")
    for name in ("model.safetensors", "model.pt"):
        again = open_checkpoint(tmp_path / name, heads=2)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize(
    ("weights", "description", "words"),
    [
        ({"label.weight": torch.zeros(3, 16)}, None, "weights do not fit their description: label.weight"),
        ({}, "{", "cannot read weights from"),
        ({}, "[]", "does not describe its model"),
    ],
    ids=["another shape", "damaged description", "no description"],
)
def test_a_damaged_file_of_ours_is_refused(tmp_path: Path, weights: dict[str, Tensor], description: str | None, words: str) -> None:
    model = build(Dit(kind="dit", width=16, depth=1, heads=2, patch=4), LatentShape(4, 8), 10)
    metadata = {"dis_scale": json.dumps(describe(model)) if description is None else description}
    safetensors.torch.save_file(model.state_dict() | weights, tmp_path / "x.safetensors", metadata)
    with pytest.raises(UserError, match=words):
        load(tmp_path / "x.safetensors")


def test_other_files_are_refused(tmp_path: Path) -> None:
    safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="does not describe its model"):
        load(tmp_path / "other.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match="cannot read weights from"):
        load(tmp_path / "broken.safetensors")
    model = build(DIS, LatentShape(4, 8), 10)
    with torch.no_grad():
        model.get_parameter("final.bias")[0] = float("nan")
    with pytest.raises(UserError, match=r"weight final.bias is not finite"):
        save(model, tmp_path / "nan.safetensors")


def small_vae() -> DiffusersVae:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    net = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2, block_out_channels=[8, 8],
        latent_channels=4, norm_num_groups=4, layers_per_block=1, sample_size=16, scaling_factor=0.5,
    ).eval()  # fmt: skip
    return DiffusersVae(net)


def tiny_vae_by_channel() -> DiffusersVae:
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    net = AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).eval()  # fmt: skip
    return DiffusersVae(net, normalised=Scaling([0.1, 0.2, 0.3, 0.4], [0.5, 1.0, 2.0, 4.0]))


def pixels_by_channel() -> PixelVae:
    return PixelVae(normalised=Scaling([0.1] * 3, [0.5] * 3))


@pytest.mark.parametrize(
    ("settings", "diffusion", "make_vae"),
    [
        (SETTINGS[0], Gaussian(kind="gaussian"), small_vae),
        (SETTINGS[1], Flow(kind="flow"), small_vae),
        (SETTINGS[1], Flow(kind="flow"), tiny_vae_by_channel),
        (SETTINGS[2], Gaussian(kind="gaussian"), None),
        (SETTINGS[1], Flow(kind="flow"), pixels_by_channel),
    ],
    ids=["dis", "dit-flow", "tiny-by-channel", "diffussm-pixels", "dit-pixels-by-channel"],
)
def test_diffusers_samples_from_the_folder(
    settings: FamilySettings, diffusion: Gaussian | Flow, make_vae: Callable[[], Vae] | None, tmp_path: Path, own_modules: None
) -> None:
    from diffusers import DiffusionPipeline

    vae: Any = make_vae and make_vae()
    pixels = make_vae in (None, pixels_by_channel)
    shape = LatentShape(3 if pixels else 4, 8)
    model = build(settings, shape, 10, seed=3)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    save_pipeline(tmp_path / "export", model, diffusion, vae)
    folder = str(tmp_path / "export")
    pipeline = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
    images = pipeline([1, 7], guidance_scale=1.5, num_inference_steps=3, output_type="pt", seed=5).images
    side = 8 if pixels else 16
    assert images.shape == (2, 3, side, side)
    sampler: Sampler = "ddpm" if diffusion.kind == "gaussian" else "heun"
    with torch.no_grad():
        expected = generate(
            model, build_process(diffusion, model.shape), [1, 7], [0, 1], Sampling(sampler=sampler, steps=3, guidance=1.5), seed=5
        )
        if make_vae is small_vae:
            expected = vae.net.decode(expected / 0.5).sample
        elif make_vae is pixels_by_channel:
            expected = expected * 2 + 0.1
        elif vae:
            mean, std = (torch.tensor(x)[:, None, None] for x in ([0.1, 0.2, 0.3, 0.4], [2.0, 1.0, 0.5, 0.25]))
            expected = vae.net.decode(expected * std + mean).sample
    assert torch.allclose(images, (expected / 2 + 0.5).clamp(0, 1), atol=1e-5)


def test_a_exported_autoencoder_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    settings = ExportedVae(kind="exported", path="unused", posterior=False)
    model = build(DIS, LatentShape(4, 8), 10)
    with pytest.raises(UserError, match=r"diffusers' pipelines take one of its autoencoders"):
        save_pipeline(tmp_path / "export", model, Flow(kind="flow"), ProgramVae(torch.nn.Identity(), settings))
    assert not (tmp_path / "export").exists()
