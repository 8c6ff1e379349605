"""A sweep with published weights, without training."""

import json

import safetensors.torch

from dis_scale import models
from dis_scale.recipe import LatentShape, reading
from dis_scale.storage.folder import open_folder
from dis_scale.sweep import Sweep
from dis_scale.weights.export import describe
from tests.conftest import TINY
from tests.support.documents import put_published


def published_sweep(root: str, *more: str) -> Sweep:
    """A sweep in pixels below `root` with one published model, as training publishes it."""
    settings = ["vae={kind: none}", "diffusion={kind: flow}", "evaluate.sampler=euler", "evaluate.steps=2", *more]
    recipe = reading.load(TINY, settings)
    sweep = Sweep.below(open_folder(root), recipe)
    sweep.save_recipe()
    publish(sweep, 320)
    return sweep


def publish(sweep: Sweep, images: int, seed: int = 1) -> str:
    """Publish random weights of the model at this count, others than a new model has; return the folder's URL."""
    model = models.build(sweep.recipe.models["dis"], LatentShape(3, 32), 10, seed=seed)
    weights = safetensors.torch.save(model.state_dict(), {"dis_scale": json.dumps(describe(model))})
    folder = sweep.run("dis").published_at(images)
    put_published(folder, weights, images=images)
    return folder.url
