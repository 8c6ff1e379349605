"""Unconditional models: a complete sweep of pictures without labels, and samples from what it published."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dis_scale.storage.folder import open_folder
from dis_scale.sweep import GRID, Sampled, Sweep, state
from dis_scale.sweep.documents import LatentsManifest
from dis_scale.weights.published import load_published
from tests.support import programs, stages, sweeps
from tests.support.commands import invoke
from tests.support.labelled_images import png

IMAGES, HELD_OUT = 60, 8
MODEL = "models={dis: {kind: dis, width: 16, depth: 2, patch: 8}}"


class Means(nn.Module):
    """Mean colours of the quarters of a picture: 12 features."""

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        return x_BCHW.float().reshape(x_BCHW.shape[0], 3, 2, 8, 2, 8).mean(dim=(3, 5)).flatten(1)


@pytest.fixture
def settings(tmp_path: Path) -> tuple[str, ...]:
    pictures = open_folder(tmp_path / "pictures")
    for i in range(IMAGES):
        pictures.write(f"{i:02d}.png", png(i))
    extractor = programs.export(tmp_path / "means.pt2", Means(), size=16)
    sha256 = hashlib.sha256(extractor.read_bytes()).hexdigest()
    return (
        f"data.source={{kind: folder, url: {pictures.url}}}", "data.resolution=16", "data.num_classes=none",
        f"data.held_out_images={HELD_OUT}", "vae={kind: none}", "precompute.shard_images=20", MODEL,
        "train.publish_images=[0, 16, 32]",
        f"evaluate.extractor={{kind: exported, name: means, path: {extractor}, sha256: {sha256}}}",
        "evaluate.guidance=1", "evaluate.variants={auto: {guidance: {by: dis, images: 16, scale: 2}}, fast: {steps: 2}}",
    )  # fmt: skip


def by_hand(sweep: Sweep, tmp_path: Path, _: tuple[str, ...]) -> None:
    stages.complete(sweep, tmp_path)


def by_the_command(sweep: Sweep, _: Path, settings: tuple[str, ...]) -> None:
    no_server = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    done = sweeps.run(sweep.store.url, *settings, "tracking.uri=http://127.0.0.1:9", **no_server)
    assert done.returncode == 0, done.stdout + done.stderr
    asked = done.stdout.count("MLflow cannot be reached at http://127.0.0.1:9, results are in storage only")
    assert asked == 2, "again before the trainings: it may have come meanwhile"
    assert f"{IMAGES} images without labels" in done.stdout


@pytest.mark.parametrize("make", [by_hand, pytest.param(by_the_command, marks=pytest.mark.slow)])
def test_pictures_without_labels_pass_all_stages(
    make: Callable[[Sweep, Path, tuple[str, ...]], None], tmp_path: Path, settings: tuple[str, ...]
) -> None:
    root = str(tmp_path / "store")
    sweep = sweeps.sweep_at(root, *settings)
    make(sweep, tmp_path, settings)
    assert not [name for name in load_published(sweep.run("dis"), 32) if name.startswith("label")]
    values = state.evaluated(sweep, "dis")[32].values
    assert values["fd_means_80"] > 0
    assert values["held_out_loss"] > 0
    assert "class_accuracy" not in values
    folder = sweep.evaluation(Sampled("dis", 32)).local
    assert folder is not None
    assert Image.open(folder / GRID).size == (10 * 64, 8 * 64), "80 samples in rows of ten"
    assert {"gflops_fid.png", "index.html"} <= set(sweep.report.list())

    published = str(sweep.run("dis").published_at(32).local)
    out = str(tmp_path / "grid.png")
    code, output = invoke("sample", published, "--count", "3", "--out", out)
    assert (code, Image.open(out).size) == (0, (3 * 64, 64)), output
    npz = str(tmp_path / "samples.npz")
    code, output = invoke("sample", published, "--count", "3", "--npz", npz)
    assert (code, np.load(npz)["arr_0"].shape) == (0, (3, 16, 16, 3)), output
    for arguments, words in (
        (["--guidance", "1.5"], "--guidance: got 1.5, expected 1: data.num_classes is none: guidance needs labels"),
        (["--classes", "1"], "--classes: the model has no classes: omit it"),
    ):
        code, output = invoke("sample", published, "--out", out, *arguments)
        assert (code, words in output) == (2, True), output
    guided = state.evaluated(sweep, "dis", "auto")[32].values
    assert guided["fd_means_80"] != values["fd_means_80"], "guided by its own earlier weights, without labels"
    code, output = invoke("ablate", "guidance", str(sweep), "dis", "--scales", "1,2")
    assert (code, "guidance: got 2, expected 1: data.num_classes is none" in output) == (2, True), output
    code, output = invoke("data", "show", str(sweep), "--out", out)
    assert "labels   none\n" in output
    latents = open_folder(tmp_path / "store" / "latents" / _only(root))
    assert LatentsManifest.require(latents).made_from.num_classes is None


def _only(root: str) -> str:
    (name,) = (open_folder(root) / "latents").list()
    return name
