"""`dis-scale sample`: equal pictures at any batch size, and one line for each mistake."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dis_scale import models, vae
from dis_scale.evaluation.pictures import open_for_sampling, sample_pictures
from dis_scale.models.export import save
from dis_scale.recipe import LatentShape, Recipe, TrainedVae
from tests.test_cli import invoke


@pytest.fixture
def files(tmp_path: Path, tiny: Recipe) -> tuple[Path, Path]:
    """An exported model and an autoencoder's folder."""
    model = models.build(tiny.models["dis"], LatentShape(4, 8), 10)
    save(model, tmp_path / "model.safetensors")
    vae.new(TrainedVae(kind="trained", widths=(8, 8, 8)), 32).save_pretrained(tmp_path / "vae")
    return tmp_path / "model.safetensors", tmp_path / "vae"


def test_pixels_agree_at_any_batch_split(files: tuple[Path, Path]) -> None:
    opened = open_for_sampling(files[0], str(files[1]))
    options = {"sampler": "ddpm", "steps": 5, "guidance": 1.5, "seed": 3}
    at_once = sample_pictures(opened, [1, 7], 6, batch=6, **options)  # type: ignore[arg-type]
    split = sample_pictures(opened, [1, 7], 6, batch=4, **options)  # type: ignore[arg-type]
    assert at_once.shape == (6, 32, 32, 3)
    assert np.abs(at_once.astype(int) - split.astype(int)).max() <= 1  # float32 sums of another batch size
    other = sample_pictures(opened, [1, 7], 6, batch=6, **(options | {"seed": 4}))  # type: ignore[arg-type]
    assert not np.array_equal(at_once, other)


def test_the_command_writes_a_grid(files: tuple[Path, Path], tmp_path: Path) -> None:
    command = ["sample", "--checkpoint", str(files[0]), "--vae", str(files[1]), "--classes", "1,7", "--steps", "2"]
    code, output = invoke(*command, "--out", str(tmp_path / "grid.png"))
    assert code == 0, output
    assert Image.open(tmp_path / "grid.png").size == (2 * 64, 64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--classes", "1,x"], "--classes '1,x': expected labels with commas between them"),
        (["--classes", "11"], "label 11 is out of range: expected 0 to 9"),
        (["--classes", "1", "--sampler", "euler"], "euler"),
        (["--classes", "1", "--checkpoint", "none.pt"], "no checkpoint at none.pt"),
        (["--classes", "1", "--vae", "/nowhere"], "vae.path: no autoencoder at '/nowhere'"),
    ],
)
def test_mistakes_are_one_line(files: tuple[Path, Path], tmp_path: Path, arguments: list[str], message: str) -> None:
    base = ["sample", "--checkpoint", str(files[0]), "--vae", str(files[1]), "--out", str(tmp_path / "none.png")]
    code, output = invoke(*base, *arguments)
    assert code == 2
    assert message in output
    assert not (tmp_path / "none.png").exists()


def test_weights_outside_a_sweep_need_a_vae(files: tuple[Path, Path]) -> None:
    code, output = invoke("sample", "--checkpoint", str(files[0]), "--classes", "1")
    assert (code, "is not in a sweep, so name the VAE of its latents" in output) == (2, True)
