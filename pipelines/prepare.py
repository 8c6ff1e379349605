"""Prepare, a Ray job: the small autoencoder where the recipe trains one, the classifiers, and the real images' statistics.

Each exists when its manifest does, so that this job given again does what is left.
"""

from typing import Any

import ray
import torch

from dis_scale import small_nets, vae
from dis_scale.data.encode import compute_exactly
from dis_scale.data.shards import store_of
from dis_scale.data.sources import Source, open_source
from dis_scale.errors import Preempted
from dis_scale.evaluation import reference
from dis_scale.evaluation.features import JUDGE, load_extractors, store_classifier
from dis_scale.progress import ReportDone
from dis_scale.recipe import Recipe, TrainedExtractor, TrainedVae
from dis_scale.storage import lease, manifest
from dis_scale.storage.folder import Folder, lease, manifest
from pipelines import stage

CPUS = 2


class Preparer(stage.Worker):
    """Does what is missing, one thing after another; progress counts optimizer steps and reference images."""

    def prepare(self, sweep: Folder, recipe: Recipe, device: str) -> None:
        compute_exactly()
        torch.set_num_threads(CPUS)
        self._images: Any = None
        if _vae_missing(sweep, recipe):
            self._said.append(self._vae(sweep, recipe))
        for name, kind in _classifiers_missing(sweep, recipe):
            self._said.append(self._classifier(sweep, recipe, name, kind))
        self._said.append(self._reference(sweep, recipe, device))

    def _vae(self, sweep: Folder, recipe: Recipe) -> str:
        assert isinstance(recipe.vae, TrainedVae)
        pixels, _ = self._pixels(sweep, recipe)
        net = small_nets.train_vae(recipe.vae, pixels, recipe.seed, self._report(self._done))
        vae.save(sweep / "vae", net)
        return f"autoencoder: mean squared error {small_nets.reconstruction_error(net, pixels):.2g}"

    def _classifier(self, sweep: Folder, recipe: Recipe, name: str, kind: str) -> str:
        pixels, labels = self._pixels(sweep, recipe)
        steps, classes = _classifier_steps(recipe), recipe.data.num_classes
        net, accuracy = small_nets.train_classifier(
            kind, pixels, labels, classes, steps, recipe.seed, self._report(self._done)
        )
        store_classifier(sweep, name, net, accuracy)
        return f"{kind}: {accuracy:.1%} on images held out"

    def _reference(self, sweep: Folder, recipe: Recipe, device: str) -> str:
        extractors, source = load_extractors(recipe.evaluate, sweep, torch.device(device)), _source(sweep, recipe)
        reference.prepare(sweep, recipe, source, extractors, self._report(self._done))
        floor = reference.load_all(sweep, recipe)[recipe.evaluate.extractor.name].floor
        if floor is None:
            return f"reference: {recipe.evaluate.reference}"
        return f"reference: {recipe.evaluate.metric} between two halves of the real images is {floor:.3g}"

    def _pixels(self, sweep: Folder, recipe: Recipe) -> Any:
        if self._images is None:
            self._images = small_nets.training_images(
                _source(sweep, recipe), recipe.data.resolution, recipe.data.undecodable
            )
        return self._images

    def _report(self, before: int) -> ReportDone:
        def report(steps: int) -> None:
            self._done = before + steps
            if self._wish.is_set():
                raise Preempted("stopped as asked; what was not finished is made again")

        return report


def prepare(sweep: Folder, recipe: Recipe, _: list[str]) -> None:
    """Trains and computes what the sweep does not have yet."""
    stage.connect()
    total = recipe.vae.steps if isinstance(recipe.vae, TrainedVae) and _vae_missing(sweep, recipe) else 0
    total += _classifier_steps(recipe) * len(_classifiers_missing(sweep, recipe)) + len(_source(sweep, recipe))
    # The small networks are trained on the CPU; only a large extractor's features of all real images are worth a GPU.
    only_trained = all(isinstance(extractor, TrainedExtractor) for extractor in recipe.evaluate.extractors)
    device = "cpu" if only_trained else stage.choose_device(recipe)[0]
    cpus = min(CPUS, int(ray.cluster_resources().get("CPU", 1)))

    def attempt(_: stage.Lost | None) -> None:
        worker = stage.spawn(Preparer, stage.resources("prepare", device, cpus))
        result = worker.prepare.remote(sweep, recipe, device)
        stage.watch([worker], [result], lambda done: stage.progress(done[0], total, "steps and images"))

    with lease.hold(sweep / lease.FOLDER / "prepare"):
        stage.with_restarts(recipe, "prepare", attempt, lambda: 0)


def _source(sweep: Folder, recipe: Recipe) -> Source:
    return open_source(recipe.data, store_of(sweep))


def prepared(sweep: Folder, recipe: Recipe) -> bool:
    """Whether the sweep has all that this stage makes."""
    models = not _vae_missing(sweep, recipe) and not _classifiers_missing(sweep, recipe)
    return models and reference.is_stored(sweep, recipe)


def _vae_missing(sweep: Folder, recipe: Recipe) -> bool:
    return isinstance(recipe.vae, TrainedVae) and manifest.find(sweep / "vae") is None


def _classifiers_missing(sweep: Folder, recipe: Recipe) -> list[tuple[str, str]]:
    """(name, kind) of the classifiers still to be trained; none where no extractor is trained."""
    if recipe.evaluate.trained is None:
        return []
    wanted = [(recipe.evaluate.trained.name, "extractor"), (JUDGE, "judge")]
    return [(name, kind) for name, kind in wanted if manifest.find(sweep / "extractors" / name) is None]


def _classifier_steps(recipe: Recipe) -> int:
    return recipe.evaluate.trained.steps if recipe.evaluate.trained else 0
