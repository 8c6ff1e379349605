"""The Python API on a sweep of one published and evaluated model."""

import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

import dis_scale
from dis_scale import report as reports
from dis_scale.process.errors import Damaged, UserError
from dis_scale.recipe import reading
from dis_scale.sweep import Sampled
from dis_scale.tracking.rows import RowWriter
from tests.support.evaluations import put
from tests.support.published import published_sweep


@pytest.fixture
def sweep(tmp_path: Path) -> dis_scale.Sweep:
    """In pixels, with the weights of `dis` at 320 images and their evaluation."""
    stored = published_sweep(str(tmp_path))
    put(stored, Sampled("dis", 320), 4.5)
    put(stored, Sampled("dis", 320, "wide"), 6.0)
    return dis_scale.Sweep.open(stored.folder.url)


def test_importing_the_package_imports_nothing_heavy() -> None:
    script = "import sys, dis_scale; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert {"torch", "pandas", "matplotlib", "pydantic", "numpy"} & set(done.stdout.split()) == set()


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert set(dis_scale.__all__) <= set(dir(dis_scale))
    with pytest.raises(AttributeError, match="module 'dis_scale' has no attribute 'Sweeps'"):
        _ = dis_scale.Sweeps


def test_the_results_are_the_points_of_the_report(sweep: dis_scale.Sweep) -> None:
    results = sweep.results().set_index("variant")
    report = reports.collect(sweep.stored, reports.plan_of(sweep.stored))
    assert results[report.metric].to_dict() == {"": 4.5, "wide": 6.0}
    assert results.loc[""].gmacs_forward == report.points[0].gmacs
    assert results.loc[""].images == 320
    assert results["goodput"].isna().all(), "no log has it"


def test_the_figure_has_the_measured_distance(sweep: dis_scale.Sweep) -> None:
    assert any(np.array_equal(line.get_ydata(), [4.5]) for line in sweep.figure().axes[0].lines)


def test_a_model_has_its_published_weights(sweep: dis_scale.Sweep) -> None:
    assert (sweep.models, sweep.images("dis"), sweep.images("dit")) == (["dis", "dit"], [320], [])
    model = sweep.load("dis")
    assert (model.training, model.shape, model.num_classes) == (False, (3, 32), 10)
    (file,) = (sweep.stored.run("dis").published_at(320).local or Path()).glob("*.safetensors")
    stored = safetensors.torch.load_file(file)
    for loaded in (model.state_dict(), sweep.load("dis", 320).state_dict()):
        assert loaded.keys() == stored.keys()
        assert all(torch.equal(loaded[name], weight) for name, weight in stored.items())


def test_the_curves_have_a_column_for_each_metric(sweep: dis_scale.Sweep) -> None:
    rows = RowWriter(sweep.stored.run("dis").log, attempt=1)
    rows.add(32, {"loss": 0.5})
    rows.add(64, {"loss": 0.25, "held_out_loss": 0.375})
    rows.close()
    curves = sweep.curves("dis")
    assert curves["loss"].to_dict() == {32: 0.5, 64: 0.25}
    assert curves["held_out_loss"].dropna().to_dict() == {64: 0.375}
    assert sweep.curves("dit").empty


def test_the_state_and_the_page_of_a_notebook(sweep: dis_scale.Sweep) -> None:
    assert [run.model for run in sweep.state().runs] == ["dis", "dit"]
    assert sweep.class_names == ()
    assert "<td>4.5</td>" in sweep._repr_html_()


def test_pixels_come_back_from_latents(sweep: dis_scale.Sweep) -> None:
    pixels = np.random.default_rng(0).integers(256, size=(2, 32, 32, 3), dtype=np.uint8)
    latents = sweep.encode(pixels)
    assert (latents.shape, latents.dtype) == ((2, 3, 32, 32), torch.float32)
    assert np.array_equal(sweep.decode(latents), pixels)
    assert np.array_equal(sweep.decode(latents.double()), pixels)
    floats = r"float64 of shape \(2, 32, 32, 3\)"
    for wrong, got in ((pixels / 255, floats), (pixels[:0], "uint8 of"), (pixels[:, 1:], "uint8 of"), ([1], "list")):
        with pytest.raises(UserError, match=rf"got {got}.*, expected an array of uint8 images \(B, 32, 32, 3\)"):
            sweep.encode(wrong)  # type: ignore[arg-type]
    for unfit in (latents[:, 1:], latents[..., 1:], latents.numpy()):
        with pytest.raises(UserError, match=r"expected a tensor of latents \(B, 3, 32, 32\)"):
            sweep.decode(unfit)  # type: ignore[arg-type]


def test_weights_outside_their_sweep_sample_in_one_line(sweep: dis_scale.Sweep, tmp_path: Path) -> None:
    stored = sweep.stored.run("dis").published_at(320).url
    copied = shutil.copytree(stored, tmp_path / "copied")
    (own,) = sweep.sample("dis", classes=[3], steps=1)
    (there,) = dis_scale.open_weights(stored).sample(classes=[3], steps=1)
    assert np.array_equal(np.asarray(there), np.asarray(own))
    with pytest.warns(UserWarning, match="assumed  gaussian process"):
        weights = dis_scale.open_weights(copied, "none")
    (outside,) = weights.sample(classes=np.array([3]), steps=1)  # type: ignore[arg-type]
    wrong: list[dict[str, Any]] = [
        {"classes": []}, {"count": 0}, {"batch": 0}, {"classes": [11]}, {"classes": 3}, {"classes": [1.7]}, {"steps": 2.5},
        {"steps": "2"}, {"guidance": math.nan}, {"guidance": -1}, {"device": "gpu"},
    ]  # fmt: skip
    for settings in wrong:
        with pytest.raises(UserError, match=r"expected|classes|device 'gpu'"):
            weights.sample(**settings)
    assert outside.size == (32, 32)


def test_a_recipe_has_its_price() -> None:
    planned = dis_scale.plan("digits", ["train.publish_images=[640]"], images=1797)
    assert planned.loc["dis-m"].images == 640
    assert planned.loc["dis-m"].epochs == pytest.approx(640 / 1797)
    recipe = reading.load("digits")
    assert dis_scale.plan(recipe).equals(dis_scale.plan("digits"))
    for overrides, of in (("train.images=1", "digits"), (["train.images=1"], recipe)):
        with pytest.raises(UserError, match=r"overrides: got .*, expected a list"):
            dis_scale.plan(of, overrides)


def test_damaged_weights_are_refused(sweep: dis_scale.Sweep) -> None:
    file = sweep.stored.run("dis").published_at(320).local / "weights-0001.safetensors"  # type: ignore[operator]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(Damaged, match=r"weights-0001\.safetensors"):
        sweep.load("dis")


def test_images_are_of_all_classes_or_of_the_named_ones(sweep: dis_scale.Sweep) -> None:
    every = [np.asarray(image) for image in sweep.sample("dis", steps=1)]
    assert [image.shape for image in every] == [(32, 32, 3)] * 10
    named = [np.asarray(image) for image in sweep.sample("dis", 320, classes=[0, 1], count=4, steps=1, batch=3)]
    assert len(named) == 4
    assert np.abs(named[1].astype(int) - every[1]).max() <= 1, "the same number, label and seed"
    assert not np.array_equal(named[2], every[2]), "another label"
    assert [np.asarray(image).tolist() for image in sweep.sample("dis", 320, classes="0,1", steps=1)] == [
        image.tolist() for image in named[:2]
    ]


@pytest.mark.parametrize(
    ("model", "images", "words"),
    [
        ("dis", 160, "dis of .* has published no weights at 160 images: it has 320"),
        ("dit", None, "dit of .* has published nothing yet"),
        ("dos", None, "no model 'dos'"),
    ],
)
def test_weights_that_are_not_published_are_named(sweep: dis_scale.Sweep, model: str, images: int | None, words: str) -> None:
    with pytest.raises(UserError, match=words):
        sweep.load(model, images)
    with pytest.raises(UserError, match=words):
        sweep.sample(model, images)


def test_a_sweep_without_evaluations_has_no_points(tmp_path: Path) -> None:
    empty = dis_scale.Sweep.open(published_sweep(str(tmp_path)).folder.url)
    with pytest.raises(UserError, match="nothing to report yet"):
        empty.results()
    assert empty.state().doing in empty._repr_html_()
    with pytest.raises(UserError, match=r"no sweep at .*none"):
        dis_scale.Sweep.open(f"{tmp_path}/none")
