"""All stages with latents that are pixels, and with latents normalised by channel."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from dis_scale import diffusion, vae
from dis_scale.data.latents import Latents, micro_batch, open_latents
from dis_scale.data.sources import open_source
from dis_scale.evaluation import held_out
from dis_scale.evaluation.sampling import open_sampler
from dis_scale.process.errors import Held, UserError
from dis_scale.recipe import Sampling, reading
from dis_scale.storage import lease
from dis_scale.storage.folder import open_folder
from dis_scale.sweep import Sampled, Sweep, state
from dis_scale.sweep.documents import LatentsManifest, LatentsPointer
from dis_scale.weights.opening import open_for_sampling, sample_pictures
from pipelines import precompute
from pipelines.evaluators import Evaluator
from tests.conftest import TINY
from tests.support import ranks
from tests.support.autoencoders import Folded, exported
from tests.support.stage_jobs import printing_job
from tests.support.stages import OneEncoder, make_latents, preparer


def test_all_stages_in_pixel_space(tmp_path: Path) -> None:
    """Precompute, training, evaluation and `dis-scale sample` without Ray; prepare trains no autoencoder."""
    recipe = reading.load(TINY, ["vae={kind: none}", "data.resolution=16", "train.workers=1", "evaluate.block_images=20"])
    sweep = ranks.sweep_of(tmp_path, recipe)
    sweep.save_recipe()
    preparer(sweep).prepare(sweep, "cpu")
    assert not sweep.folder.exists("vae")
    latents = make_latents(sweep)
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


def test_a_stage_that_lost_its_lease_writes_no_network(tmp_path: Path) -> None:
    """Both would train an autoencoder; the latents of the one that works are of its own."""
    settings = ["vae.steps=1", "evaluate.extractor.steps=1"]
    sweep = ranks.sweep_of(tmp_path, reading.load(TINY, settings))
    late = preparer(sweep)
    with lease.hold(sweep.lease("prepare")):
        with pytest.raises(Held):
            late.prepare(sweep, "cpu")
        assert state.vae_missing(sweep)
        assert not sweep.folder.exists("extractors")


@pytest.mark.parametrize("complete", [False, True])
def test_a_stage_that_lost_its_lease_names_no_latents(complete: bool, tmp_path: Path) -> None:
    recipe = reading.load(TINY, ["vae={kind: none}", "models={dit: {kind: dit, width: 16, depth: 1, heads: 2, patch: 4}}"])
    sweep, other = (Sweep(open_folder(tmp_path) / name, recipe) for name in "ab")
    latents = make_latents(sweep)
    if not complete:
        latents.delete(LatentsManifest.NAME)
    late = printing_job(other)
    with late.hold("precompute"), lease.hold(late.sweep.lease("precompute")), pytest.raises(Held):
        precompute.find_or_make_latents(late, OneEncoder(late))
    assert LatentsManifest.find(latents) is None or complete
    assert LatentsPointer.find(other.folder) is None


def test_all_stages_normalised_by_channel(tmp_path: Path, same_priority: None) -> None:
    """Training and the held-out loss see normalised latents, and evaluation and `dis-scale sample` decode them to the images."""
    settings = exported(tmp_path / "vae", posterior=False, scale=0.25)
    stages = ["data.normalise=channels", "train.workers=1", "train.publish_images=[0, 16]", "precompute.shard_images=900"]
    recipe = reading.load(TINY, [f"vae={settings.model_dump_json()}", *stages])
    sweep = ranks.sweep_of(tmp_path, recipe)
    sweep.save_recipe()
    preparer(sweep).prepare(sweep, "cpu")
    latents = make_latents(sweep)
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
    expected = held_out.losses(model, diffusion.build(recipe.diffusion, model.shape), by_channel, recipe.seed, 20)
    assert evaluator.held_out(Sampled("dis", 16)) == expected

    latents.delete()
    assert open_for_sampling(published, None).decoder.scaling == alone.decoder.scaling
    exported(tmp_path / "vae", posterior=False, net=Folded(posterior=False).half())
    with pytest.raises(UserError, match=r"decode.pt2 has sha256 .*, the recipe expects"):
        open_for_sampling(published, None)
    (note,) = open_for_sampling(copied, settings.path).notes
    assert f"{settings.path} did not encode the model's latents: its identity is" in note
