"""An exported checkpoint: diffusers opens the folder, and its card has the sweep's facts."""

import json
from pathlib import Path

import numpy as np

import dis_scale
from dis_scale.sweep import Sampled
from dis_scale.weights.opening import open_for_sampling
from tests.support.commands import answer, invoke
from tests.support.documents import put_metrics
from tests.support.published import published_sweep


def test_a_published_checkpoint_is_exported_for_diffusers_with_its_card(tmp_path: Path, own_modules: None) -> None:
    from diffusers import DiffusionPipeline

    guided = ("evaluate.guidance_channels=3", "evaluate.guidance_interval=[100, 600]")
    sweep, folder = published_sweep(str(tmp_path), *guided), tmp_path / "export"
    put_metrics(sweep.evaluation(Sampled("dis", 320)), {"fd_digits_80": 12.5})
    code, output = invoke("export", sweep.run("dis").published_at(320).url, str(folder))
    assert (code, "fill in" in output) == (0, True), output
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusers\nlicense: other")
    for words in (
        "# tiny-dis", "12.5", "80 samples, euler, 2 steps, guidance 1.5 on 3 channels between times 100 and 600",
        "320 images seen", '"kind": "digits"',
        "## Licence", "*To fill in.*", "`pip install -c constraints.txt .` in its repository",
    ):  # fmt: skip
        assert words in card
    guidance = json.loads((folder / "backbone/config.json").read_text())["guidance"]
    assert guidance == {"guidance_channels": 3, "guidance_interval": [100.0, 600.0]}, "which each call of the pipeline is given"
    pipeline = DiffusionPipeline.from_pretrained(str(folder), custom_pipeline=str(folder), trust_remote_code=True)
    pictures = pipeline([1, 7], sampler="euler", num_inference_steps=3, guidance_scale=4.0).images
    expected = dis_scale.Sweep.open(sweep.folder.url).sample("dis", classes=[1, 7], steps=3, guidance=4.0)
    pixels = [np.stack([np.asarray(picture) for picture in each]).astype(int) for each in (pictures, expected)]
    assert np.abs(pixels[0] - pixels[1]).max() <= 1, "guided as the sweep's own samples"


def test_an_exported_folder_is_opened_again(tmp_path: Path) -> None:
    """With its process, its autoencoder and the names of its classes."""
    at = str(Path(dis_scale.__file__).parents[1] / "examples/digits")
    assert invoke("export", at, str(tmp_path / "export"))[0] == 0
    exported, own = dis_scale.open_weights(str(tmp_path / "export")), dis_scale.open_weights(at)
    assert (exported.opened.notes, exported.opened.class_names) == ([], own.opened.class_names)
    first, second = (each.sample(classes=[1, 7], steps=2) for each in (exported, own))
    assert [picture.tobytes() for picture in first] == [picture.tobytes() for picture in second]


def test_distances_of_other_averages_are_said_to_be(tmp_path: Path) -> None:
    """A sweep may measure a rebuilt average; its published weights are the exponential one."""
    sweep = published_sweep(str(tmp_path), "train.power_ema=[0.05, 0.1]", "evaluate.ema_width=0.07")
    put_metrics(sweep.evaluation(Sampled("dis", 320)), {"fd_digits_80": 12.5})
    code, output = invoke("export", sweep.run("dis").published_at(320).url, str(tmp_path / "export"))
    assert code == 0, output
    assert "of the average of width 0.07, not of these weights" in (tmp_path / "export/README.md").read_text()
    notes = open_for_sampling(sweep.run("dis").published_at(320).url, None).notes
    assert notes == ["average  its sweep measures the average of width 0.07: this is the exponential one"]


def test_an_export_overwrites_nothing(tmp_path: Path) -> None:
    published = published_sweep(str(tmp_path)).run("dis").published_at(320).url
    (tmp_path / "export").mkdir()
    (tmp_path / "export/mine").write_text("mine")
    code, output = invoke("export", published, str(tmp_path / "export"))
    assert (code, "export exists: delete it, or name another folder" in output) == (2, True), output
    assert answer("export", published, str(tmp_path / "new"), "--json")["checkpoint"] == f"{published}/weights-0001.safetensors"
