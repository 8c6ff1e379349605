"""Prepare, a Ray job: the small autoencoder if the recipe trains one, the classifiers, and the real images' statistics.

Each exists when its manifest does, so a rerun makes only what is missing. The statistics of many images are computed in parts by
as many workers as precompute has: they also read all images, on the same nodes. Kept parts are not computed again.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray

from dis_scale.data.sources import Source, load_subset, open_source
from dis_scale.process.errors import counted
from dis_scale.recipe import TrainedVae
from dis_scale.storage.lease import Lease
from dis_scale.sweep import Sweep, state
from dis_scale.sweep.extractors import part_count, part_positions
from dis_scale.training import devices
from pipelines.failures import WorkerFailure
from pipelines.nodes import choose_device
from pipelines.places import PREPARE_CPUS, Places
from pipelines.restarts import with_restarts
from pipelines.sharing import SHARED, Deal, share
from pipelines.stage import StageJob
from pipelines.watching import Report, watch
from pipelines.worker import Request, Worker, elsewhere, request_for, spawn


class Preparer(Worker):
    """Makes what is missing, one thing after the other; progress counts optimizer steps and reference images."""

    def __init__(self, held: Lease) -> None:
        super().__init__()
        self._held = held

    def prepare(self, sweep: Sweep, device: str) -> None:
        """Make the networks, and the statistics unless they have several parts."""
        self._images: Any = None
        with self._begun(device, PREPARE_CPUS):
            if state.vae_missing(sweep):
                self.log(self._vae(sweep))
            for name, kind in state.classifiers_missing(sweep):
                self.log(self._classifier(sweep, name, kind))
            if not _has_parts(sweep, _source(sweep)):
                self.log(self._reference(sweep, device))

    def make_parts(self, sweep: Sweep, device: str, deal: Deal) -> None:
        """Compute the parts that `deal` names, except those that exist; progress counts images."""
        from dis_scale.evaluation import parts

        with self._begun(device, 1):
            source, of_images = _source(sweep), sweep.recipe.evaluate.of_images
            extractors = [e for e in self._extractors(sweep, device) if e.name in of_images]
            missing = state.reference_parts_missing(sweep, len(source))
            for number in iter(deal, None):
                if number in missing:
                    parts.make(sweep, source, extractors, number, self._progress())

    def merge_parts(self, sweep: Sweep, device: str) -> None:
        """Merge the parts, and compute damaged ones again."""
        with self._begun(device, 1):
            self.log(self._reference(sweep, device))

    @contextmanager
    def _begun(self, device: str, threads: int) -> Iterator[None]:
        """Run the block on a checked device with this many CPU threads; BrokenDevice if another node's device may do better."""
        import torch  # here and below in the worker only: the driver does not need it

        from dis_scale.data.encode import compute_exactly

        compute_exactly()
        torch.set_num_threads(threads)
        devices.check_on_node(where := devices.torch_device(device))
        with devices.blaming_others(where):
            self.emit("work")
            yield

    def _extractors(self, sweep: Sweep, device: str) -> Any:
        """Load the extractors whose statistics are missing."""
        from dis_scale.evaluation.features import load_extractors

        missing = state.references_missing(sweep)
        return [e for e in load_extractors(sweep, devices.torch_device(device)) if e.name in missing]

    def _vae(self, sweep: Sweep) -> str:
        from dis_scale import vae
        from dis_scale.vae import small

        assert isinstance(sweep.recipe.vae, TrainedVae)
        vae.import_without_others()
        pixels, _ = self._pixels(sweep)
        net = small.train_vae(sweep.recipe.vae, pixels, sweep.recipe.seed, self._progress())
        self._held.require_held()
        vae.save(sweep.vae, net)
        error = max(small.reconstruction_error(net, pixels), 1e-12)  # of pixels in [-1, 1]
        return f"autoencoder: its reconstructions have a PSNR of {10 * math.log10(4 / error):.1f} dB (dis-scale data show)"

    def _classifier(self, sweep: Sweep, name: str, kind: str) -> str:
        from dis_scale.evaluation.classifiers import train_classifier
        from dis_scale.evaluation.features import store_classifier

        pixels, labels = self._pixels(sweep)
        recipe, steps = sweep.recipe, _classifier_steps(sweep)
        assert recipe.data.num_classes is not None, "the recipe refuses a trained extractor without classes"
        net, accuracy = train_classifier(kind, pixels, labels, recipe.data.num_classes, steps, recipe.seed, self._progress())
        self._held.require_held()
        store_classifier(sweep, name, net, accuracy)
        return f"{kind}: {accuracy:.1%} on held-out images"

    def _reference(self, sweep: Sweep, device: str) -> str:
        from dis_scale.evaluation import reference

        recipe = sweep.recipe
        extractors = self._extractors(sweep, device)
        reference.prepare(sweep, _source(sweep), extractors, self._progress(), self.log, self._held.require_held)
        counts = [each.pooled.count for each in reference.load_all(sweep).values()]
        return f"reference: {recipe.evaluate.reference or f'{max(counts, default=0):,} images'}"

    def _pixels(self, sweep: Sweep) -> Any:
        if self._images is None:
            self._images = load_subset(_source(sweep), sweep.recipe.data)
        return self._images

    def _progress(self) -> Callable[[int], None]:
        before = self._done

        def report(steps: int) -> None:
            self.report(before + steps)
            self.raise_if_stopped("a rerun repeats what was not finished")

        return report


def prepare_sweep(job: StageJob) -> None:
    """Train and compute what the sweep does not have yet."""
    job.connect()
    sweep = job.sweep
    device, request = Places.now(sweep.recipe).prepare(choose_device(sweep.recipe)[0])

    def attempt(_: WorkerFailure | None) -> None:
        if state.vae_missing(sweep) or state.classifiers_missing(sweep) or not _has_parts(sweep, _source(sweep)):
            _prepare_with_one(job, device, request, held)
        if not state.prepared(sweep):
            _compute_in_parts(job, device, held)

    with job.hold("prepare") as held:
        with_restarts(job, "prepare", attempt, lambda: len(sweep.reference_parts.list()))


def _prepare_with_one(job: StageJob, device: str, request: Request, held: Lease) -> None:
    worker = spawn(job, Preparer, elsewhere(job, request), held)
    result = worker.prepare.remote(job.sweep, device)
    try:
        watch(job, [worker], [result], progress_by_part(job), SHARED)
    except WorkerFailure:
        ray.kill(worker)  # otherwise the exception's traceback would keep it, and its resources, for which the next one waits
        raise


def _compute_in_parts(job: StageJob, device: str, held: Lease) -> None:
    """Compute the missing parts with as many workers as precompute has; one of them merges all parts."""
    sweep = job.sweep
    images = len(_source(sweep))
    left = state.reference_parts_missing(sweep, images)
    before = images - sum(len(part_positions(n, images)) for n in left)
    request = elsewhere(job, request_for("precompute", device, 1))
    count = max(1, min(sweep.recipe.precompute.workers, len(left)))
    workers = [spawn(job, Preparer, request, held) for _ in range(count)]
    job.say(f"reference: {len(left)} of {counted(part_count(images), 'part')} left, {counted(count, 'worker')}")
    job.progress(before, images, "images")
    living, _, failure = share(
        job, workers, "make_parts", (sweep, device), left,
        lambda done: job.progress(before + sum(done), images, "images"),
    )  # fmt: skip
    if failure:
        for worker in living:
            ray.kill(worker)  # otherwise the exception's traceback would keep it, and its resources
        raise failure
    watch(job, living[:1], [living[0].merge_parts.remote(sweep, device)])


def _has_parts(sweep: Sweep, source: Source) -> bool:
    """Return whether the statistics are computed from the source's images in several parts."""
    return bool(sweep.recipe.evaluate.of_images) and part_count(len(source)) > 1


def progress_by_part(job: StageJob) -> Report:
    """Return a function that logs the worker's progress in its current piece of work: steps of two pieces take different times."""
    left, before = _what_is_left(job.sweep), 0

    def report(done: list[int]) -> None:
        nonlocal before
        while left:
            unit, count = left[0]
            job.progress(min(done[0] - before, count), count, unit)
            if done[0] - before < count:
                return
            before += count
            del left[0]

    report([0])  # for the status while the worker waits for a node
    return report


def _what_is_left(sweep: Sweep) -> list[tuple[str, int]]:
    """Return (unit, number) of the remaining optimizer steps, and of the images of statistics without parts, in their order."""
    vae, source = sweep.recipe.vae, _source(sweep)
    left = [("steps of the autoencoder", vae.steps)] if isinstance(vae, TrainedVae) and state.vae_missing(sweep) else []
    left += [(f"steps of the {kind}", _classifier_steps(sweep)) for _, kind in state.classifiers_missing(sweep)]
    if sweep.recipe.evaluate.extractors and not _has_parts(sweep, source):
        left.append(("reference images", len(source)))
    return left


def _source(sweep: Sweep) -> Source:
    return open_source(sweep.recipe.data, sweep.store)


def _classifier_steps(sweep: Sweep) -> int:
    trained = sweep.recipe.evaluate.trained
    return trained.steps if trained else 0
