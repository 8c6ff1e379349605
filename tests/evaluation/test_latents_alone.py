"""A sweep whose source is latents of another program, and whose reference is ADM's file: no image is ever there."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from dis_scale.evaluation import inception
from dis_scale.evaluation.inception import Inception
from dis_scale.recipe import reading
from dis_scale.storage.folder import open_folder
from dis_scale.sweep import Sweep, state
from tests.conftest import TINY
from tests.support import seeded_inception
from tests.support.autoencoders import exported
from tests.support.commands import invoke
from tests.support.metrics import fit
from tests.support.seeded_inception import as_tensor, blobs
from tests.support.stages import ONE_MODEL, evaluate_here, make_latents, preparer, train


@pytest.fixture
def small() -> Iterator[None]:
    with seeded_inception.of_small_images():
        yield


def test_latents_give_a_curve_by_adms_statistics(
    small: None, same_priority: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By Inception with seeded weights and small images."""
    path, expected = seeded_inception.write(tmp_path)
    monkeypatch.setattr(inception, "read_weights", partial(inception.read_weights, expected=expected))
    statistics = fit(Inception(seeded_inception.state()).eval()(as_tensor(blobs(100, 3)))[0].detach().numpy())
    np.savez(tmp_path / "adm.npz", mu=statistics.mean, sigma=statistics.covariance)

    vae = exported(tmp_path / "vae", posterior=True, scale=0.3, shift=-0.2).model_dump_json(exclude_none=True)
    settings = [f"vae={vae}", f"models={ONE_MODEL}", "train.publish_images=[32]", "train.workers=1"]
    images = Sweep.below(open_folder(tmp_path / "theirs"), reading.load(TINY, settings))
    images.save_recipe()
    code, output = invoke("data", "export", make_latents(images).url, "--layout", "edm2", "--out", f"{tmp_path}/given")
    assert code == 0, output
    evaluation = [
        f"reference={tmp_path}/adm.npz", "samples=2100", "metrics=[distance]", "floor=false", "variants={}",
        f"extractor={{kind: inception, weights: {path}}}", "block_images=700", "batch_images=100",
    ]  # fmt: skip
    source = f"data.source={{kind: latents, layout: edm2, url: {tmp_path}/given}}"
    sweep = Sweep.below(
        open_folder(tmp_path / "ours"), reading.load(TINY, [*settings, source, *map("evaluate.{}".format, evaluation)])
    )
    sweep.save_recipe()
    preparer(sweep).prepare(sweep, "cpu")
    make_latents(sweep)
    train(sweep, "dit", tmp_path)
    evaluate_here(sweep)
    (metrics,) = state.evaluated(sweep, "dit").values()
    assert metrics.values["fid_2100"] > 0
    code, output = invoke("report", str(sweep))
    assert (code, "fid_2100" in output) == (0, True), output
