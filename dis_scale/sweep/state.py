"""State of a sweep, read from its storage: what exists and what is left to do. Other modules do not decide this."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from dis_scale.process.errors import Damaged, UserError, nearest
from dis_scale.process.threads import in_order
from dis_scale.recipe import MAIN, Evaluate, TrainedVae
from dis_scale.recipe.evaluate import JUDGE, Autoguidance
from dis_scale.storage import manifest
from dis_scale.storage.folder import Folder
from dis_scale.storage.manifest import Manifest
from dis_scale.sweep import ABLATION, PointName, Run, Sampled, Sweep, store_of
from dis_scale.sweep.documents import (
    Ended,
    FailedNodes,
    FloorMetrics,
    LatentsManifest,
    LatentsPointer,
    Metrics,
    Origin,
    Skipped,
    StoredClassifier,
    TrainedDevice,
)
from dis_scale.sweep.extractors import part_count, reference_file, reference_part, weights_identity

MOST_NODE_FAILURES, KEPT_NODE_FAILURES = 2, 20
"""Failures of a node's devices in one sweep after which its training and evaluation avoid the node; and most failures that a job
keeps: a job without another node may fail on it for weeks, and all jobs read the failures each minute."""
T = TypeVar("T")


def _existing(items: Sequence[T], exists: Callable[[T], bool]) -> list[T]:
    """Return the items that exist; storage is asked about several at a time."""
    return [item for item, found in zip(items, in_order(items, exists), strict=True) if found]


def _counts(folder: Folder) -> list[int]:
    """Return the image counts that folders below this one are named by, rising."""
    return [int(name) for name in folder.list() if name.isdigit()]


def prepared(sweep: Sweep) -> bool:
    """Return whether the sweep has everything that the prepare stage makes."""
    made = not vae_missing(sweep) and not classifiers_missing(sweep) and not references_missing(sweep)
    return made and not sweep.reference_parts.list()


def vae_missing(sweep: Sweep) -> bool:
    """Return whether the autoencoder is still to be trained; false if the recipe trains none."""
    return isinstance(sweep.recipe.vae, TrainedVae) and Manifest.find(sweep.vae) is None


def classifiers_missing(sweep: Sweep) -> list[tuple[str, str]]:
    """Return (name, kind) of the classifiers still to be trained."""
    return [(name, kind) for name, kind in classifiers(sweep) if StoredClassifier.find(sweep.extractor(name)) is None]


def classifiers(sweep: Sweep) -> list[tuple[str, str]]:
    """Return (name, kind) of the classifiers that the sweep trains; none if no extractor is trained."""
    extractor = sweep.recipe.evaluate.trained
    return [(extractor.name, "extractor"), (JUDGE, "judge")] if extractor else []


def references_missing(sweep: Sweep) -> list[str]:
    """Return the names of the extractors under which the real images' statistics are still to be computed."""
    every = sweep.recipe.evaluate.extractors
    return [e.name for e in every if not sweep.references.exists(reference_file(sweep, e.name, weights_identity(sweep, e)))]


def reference_parts_missing(sweep: Sweep, images: int) -> list[int]:
    """Return the numbers of the parts of the missing statistics that are still to be computed under some extractor."""
    settings, kept = sweep.recipe.evaluate, set(sweep.reference_parts.list())
    names = settings.of_images.intersection(references_missing(sweep))
    missing = [(e.name, weights_identity(sweep, e)) for e in settings.extractors if e.name in names]
    return [n for n in range(part_count(images)) if any(reference_part(sweep, *e, n) not in kept for e in missing)]


def find_latents(sweep: Folder) -> Folder | None:
    """Return the complete latents of a sweep's folder, or None; UserError if another VAE than the sweep's made them.

    Reads no recipe, so that latents can be checked without one.
    """
    pointer = LatentsPointer.find_intact(sweep)
    if pointer is None:
        return None
    latents = store_of(sweep) / pointer.folder
    found = LatentsManifest.find(latents)
    if found is None:
        return None
    require_same_vae(latents, found.encoding.identity, pointer.vae)
    return latents


def require_latents(sweep: Folder) -> Folder:
    """Return the complete latents of a sweep's folder; UserError if there are none."""
    if latents := find_latents(sweep):
        return latents
    if (pointer := LatentsPointer.find_intact(sweep)) and not (of_sweep := store_of(sweep) / pointer.folder).list():
        raise UserError(f"{sweep}: its latents, {of_sweep}, are gone: restore them, or resume it, which encodes its images again")
    raise UserError(f"{sweep}: no complete latents: the precompute stage has not finished")


def use_latents(sweep: Sweep, latents: Folder, vae_identity: str) -> None:
    """Record which latents the sweep uses and their VAE, so that training finds them without loading a VAE."""
    LatentsPointer(folder=f"latents/{latents.name}", vae=vae_identity).write(sweep.folder)


def latents_vae(sweep: Sweep) -> str | None:
    """Return the identity of the VAE that made the sweep's latents, None if there are none yet."""
    pointer = LatentsPointer.find_intact(sweep.folder)
    return pointer.vae if pointer else None


def require_same_vae(where: Folder, latents_vae: str, given_vae: str) -> None:
    """Raise UserError if the latents were made with another VAE than the given one; both VAEs are given by their identities."""
    if latents_vae != given_vae:
        raise UserError(
            f"{where}: latents of another VAE: theirs is {latents_vae[:12]}, this one is {given_vae[:12]}; "
            "use the VAE that made them, or another storage root"
        )


def published_counts(run: Run, known: Collection[int] = ()) -> list[int]:
    """Return the image counts that a run has published completely, rising. Storage is not asked about `known` ones."""
    unknown = [n for n in _counts(run.published) if n not in known]
    found = _existing(unknown, lambda n: run.published_at(n).exists(manifest.NAME))
    return sorted({*known, *found})


def published_at(sweep: Sweep, model: str, images: int | None) -> int:
    """Return `images` (default: the newest published count) if the model is published there; UserError if it is not."""
    counts = published_counts(sweep.run(model))
    if not counts:
        raise UserError(f"{model} of {sweep} has published nothing yet")
    if images is not None and images not in counts:
        raise UserError(f"{model} of {sweep} has published no weights at {images:,} images: it has {', '.join(map(str, counts))}")
    return counts[-1] if images is None else images


def missing_published(sweep: Sweep) -> dict[str, list[int]]:
    """Return by model the image counts that training has passed and whose published weights no longer exist, without copies."""
    missing, copied = {}, copied_to(sweep, origins(sweep))
    for model in sweep.recipe.models:
        run = sweep.run(model)
        published = published_counts(run)
        reached = max([resumable_images(run), *published])
        counts = [n for n in due_counts(sweep, model, copied[model]) if n < reached and n not in published]
        if counts:
            missing[model] = counts
    return missing


def lost_evaluations(sweep: Sweep) -> list[Sampled]:
    """Return the evaluations that cannot be done any more, because their published weights were deleted."""
    return [
        Sampled(model, count)
        for model, counts in missing_published(sweep).items()
        for count in set(counts) - set(evaluated_counts(sweep, model))
    ]


def point_names(run: Run) -> list[PointName]:
    """Return the names of a run's resume points, complete or not, oldest first."""
    return [point for name in run.resume.list() if (point := PointName.parse(name))]


def complete_points(run: Run, names: Iterable[PointName]) -> Iterator[PointName]:
    """Yield the resume points among `names` that have a manifest; storage is asked for them one by one."""
    return (name for name in names if run.resume_point(name).exists(manifest.NAME))


def point_at(run: Run, images_seen: int) -> PointName | None:
    """Return the newest attempt's complete resume point at this image count."""
    names = [name for name in point_names(run) if name.images_seen == images_seen]
    return next(complete_points(run, reversed(names)), None)


def may_begin(sweep: Sweep, model: str) -> bool:
    """Return whether a model can be trained now: a branch needs its trunk's resume point, unless it has saved one of its own."""
    branch, run = sweep.recipe.models[model].branch, sweep.run(model)
    return branch is None or point_at(sweep.run(branch.of), branch.at) is not None or newest_complete(run) is not None


def newest_complete(run: Run) -> PointName | None:
    """Return the newest resume point with a manifest. Its files are not checked."""
    return next(complete_points(run, reversed(point_names(run))), None)


def resumable_images(run: Run) -> int:
    """Return the images seen at the newest resume point with a manifest, 0 if none."""
    point = newest_complete(run)
    return point.images_seen if point else 0


def origins(sweep: Sweep, models: Sequence[str] = ()) -> dict[str, Origin | None]:
    """Return, for each of these models, by default all, the resume point from which it was forked; None for one that is no fork."""
    models = models or list(sweep.recipe.models)
    found = in_order(models, lambda model: Origin.find_intact(sweep.run(model).folder))
    return dict(zip(models, found, strict=True))


def copied_to(sweep: Sweep, found: Mapping[str, Origin | None]) -> dict[str, int]:
    """Return by model the count up to which a fork's published weights equal its origin's, which is evaluated for both.

    `found` are the models' `origins`. The count is -1 for a model that is no fork of a model of the sweep.
    """
    return {model: each.images if each and each.model in sweep.recipe.models else -1 for model, each in found.items()}


def due_counts(sweep: Sweep, model: str, copied: int) -> list[int]:
    """Return the counts that a model publishes after the last one that is `copied_to` it: for copies its origin is evaluated."""
    return [n for n in sweep.recipe.train_of(model).publish_images if n > copied]


def trained(sweep: Sweep, model: str) -> bool:
    """Return whether a model has published its last count."""
    return sweep.run(model).published_at(sweep.recipe.train_of(model).images).exists(manifest.NAME)


def ended(sweep: Sweep, model: str) -> str | None:
    """Return why a model's training ended before its last count; None if it may continue."""
    try:
        ended = Ended.find(sweep.run(model).folder)
    except Damaged:
        return f"{Ended.NAME} is damaged"
    return ended.why if ended else None


def record_device(run: Run, device: str) -> None:
    """Store the kind of device that the run trains on."""
    if last_device(run) != device:
        TrainedDevice(device=device).write(run.folder)


def last_device(run: Run) -> str | None:
    """Return the kind of device that the run last trained on, None if it has not begun."""
    trained = TrainedDevice.find_intact(run.folder)
    return trained.device if trained else None


def require_device(sweep: Sweep, device: str, why: str) -> None:
    """Raise UserError if `device` is the CPU, the recipe does not name it, and one of the sweep's runs last trained on GPUs."""
    if sweep.recipe.device == "auto" and device == "cpu" and "cuda" in map(last_device, map(sweep.run, sweep.recipe.models)):
        raise UserError(
            f"{sweep}: last trained on GPUs, and would continue on the CPU ({why}): "
            "bring the GPUs back, or choose by dis-scale resume: --set device=cuda waits for them, --set device=cpu continues"
        )


def record_node_failure(folder: Folder, node: str, why: str) -> None:
    """Add a device's failure on a node to the file in a job's folder (`Sweep.failed_nodes`), which placement reads."""
    failures = _node_failures(folder)
    FailedNodes(failures=failures | {node: (*failures.get(node, ()), why)[-KEPT_NODE_FAILURES:]}).write(folder)


def node_failures(sweep: Sweep) -> Counter[str]:
    """Return the number of failed devices by node, over all jobs of the sweep."""
    every = [_node_failures(folder) for folder in _failure_folders(sweep)]
    return Counter({node: sum(len(each.get(node, ())) for each in every) for node in set().union(*every)})


def excluded_nodes(sweep: Sweep) -> list[str]:
    """Return the names of the nodes, alive or not, that are avoided because of their failures."""
    return sorted(name for name, failures in node_failures(sweep).items() if failures >= MOST_NODE_FAILURES)


def forgive_node(sweep: Sweep, node: str) -> int:
    """Delete the failures of a node's devices, so that the node is used again; return how many. UserError if it has none."""
    every = node_failures(sweep)
    if node not in every:
        known = f"expected one of: {', '.join(sorted(every))}" if every else "no node has any"
        raise UserError(f"{sweep}: node {node!r} has no failures of its devices{nearest(node, every)}: {known}")
    for folder in _failure_folders(sweep):
        failures = _node_failures(folder)
        if node in failures:
            FailedNodes(failures={name: count for name, count in failures.items() if name != node}).write(folder)
    return every[node]


def _failure_folders(sweep: Sweep) -> list[Folder]:
    return [sweep.all_failed_nodes / job for job in sweep.all_failed_nodes.list()]


def _node_failures(folder: Folder) -> dict[str, tuple[str, ...]]:
    known = FailedNodes.find_intact(folder)
    return known.failures if known else {}


def training_over(sweep: Sweep) -> bool:
    """Return whether each model has published its last count or has ended early: nothing more will be published."""
    return not in_training(sweep)


def in_training(sweep: Sweep) -> list[str]:
    """Return the models that may still publish."""
    return _existing([*sweep.recipe.models], lambda model: not (trained(sweep, model) or ended(sweep, model)))


def ablations(main: Evaluate, setting: str, values: Sequence[float], guide: Sampled | None = None) -> dict[str, Evaluate]:
    """Return the main sampling settings with other values of one setting, by name: `vary/guidance-1.25`.

    With a `guide` the values are the scales of guidance by that model: `vary/guidance-by-dis-s-at-24000-1.25`.
    """
    settings = dict[str, Evaluate]()
    for v in values:
        value = Autoguidance(by=guide.model, images=guide.images_seen, scale=v) if guide else v
        settings[f"{ABLATION}/{ablation_name(setting, guide)}-{v:g}"] = main.model_copy(update={setting: value})
    return settings


def ablation_name(setting: str, guide: Sampled | None) -> str:
    """Return the word for what is varied: `ema-width`, `guidance-by-dis-s-at-24000`."""
    return setting.replace("_", "-") + (f"-by-{guide.model}-at-{guide.images_seen}" if guide else "")


def parse_ablation_name(name: str) -> tuple[str, Sampled | None]:
    """Return the setting that an `ablation_name` is of, and the model that guides, if any."""
    setting, _, by = name.partition("-by-")
    model, _, images = by.rpartition("-at-")
    return setting.replace("-", "_"), Sampled(model, int(images)) if by else None


def evaluated_ablations(sweep: Sweep, model: str, images_seen: int) -> list[Sampled]:
    """Return the evaluated ablations of a checkpoint."""
    names = sweep.evaluation(Sampled(model, images_seen)).list(ABLATION)
    every = [Sampled(model, images_seen, f"{ABLATION}/{name}") for name in names]
    return [sampled for sampled in every if sweep.evaluation(sampled).exists(Metrics.NAME)]


def evaluated_counts(
    sweep: Sweep, model: str, variant: str = MAIN, known: Callable[[Sampled], bool] = lambda _: False
) -> list[int]:
    """Return the image counts at which a model is evaluated, rising; without those that the caller knows."""
    every = [sampled for n in _counts(sweep.evaluations(model)) if not known(sampled := Sampled(model, n, variant))]
    return [found.images_seen for found in _existing(every, lambda sampled: sweep.evaluation(sampled).exists(Metrics.NAME))]


def measured(sweep: Sweep, model: str) -> list[Sampled]:
    """Return all finished evaluations of a model: under each sampling setting of the recipe, and its ablations."""
    variants = sweep.recipe.evaluate.samplings
    every = [Sampled(model, n, variant) for variant in variants for n in evaluated_counts(sweep, model, variant)]
    counts = [each.images_seen for each in every if each.variant == MAIN]
    ablated = in_order(counts, lambda n: evaluated_ablations(sweep, model, n))
    return every + [each for of_one in ablated for each in of_one]


def evaluated(sweep: Sweep, model: str, variant: str = MAIN) -> dict[int, Metrics]:
    """Return a model's evaluations by images seen, without damaged ones."""
    return {n: metrics for n, metrics in _metrics(sweep, model, variant).items() if metrics is not None}


def _metrics(sweep: Sweep, model: str, variant: str) -> dict[int, Metrics | None]:
    """Return a model's evaluations by images seen, None for a damaged one."""
    counts = evaluated_counts(sweep, model, variant)
    folders = [sweep.evaluation(Sampled(model, n, variant)) for n in counts]
    return dict(zip(counts, in_order(folders, Metrics.find_intact), strict=True))


def floor_settled(sweep: Sweep) -> bool:
    """Return whether the floor is measured, is known to be impossible to measure, or is not wanted."""
    return (
        not sweep.recipe.evaluate.measures_floor or bool(FloorMetrics.find_intact(sweep.floor)) or sweep.floor.exists(Skipped.NAME)
    )


def floor_skipped(sweep: Sweep) -> str | None:
    """Return why the floor could not be measured; None if it is measured, or was not tried."""
    skipped = Skipped.find_intact(sweep.floor)
    return skipped.why if skipped else None


@dataclass
class Backlog:
    """The evaluations that are due, for a process that asks repeatedly: storage is asked only about what was not found before."""

    sweep: Sweep
    models: tuple[str, ...] = ()
    """Models whose evaluations count, by default all models of the recipe."""
    _published: set[Sampled] = field(default_factory=set)
    _evaluated: set[Sampled] = field(default_factory=set)
    _guides: set[Sampled] = field(default_factory=set)
    _copied: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.models = self.models or tuple(self.sweep.recipe.models)

    @property
    def published(self) -> list[int]:
        """Image counts of all models that were published when `left` was last called, rising; without copies."""
        return sorted(each.images_seen for each in self._published if each.images_seen > self._copied.get(each.model, -1))

    @property
    def evaluated(self) -> list[int]:
        """Image counts of all models that were evaluated under the main settings by then, rising."""
        return sorted(each.images_seen for each in self._evaluated if each.variant == MAIN)

    def left(self) -> list[Sampled]:
        """Return the remaining evaluations of published checkpoints: main settings before variants, then in the recipe's order."""
        sweep = self.sweep
        for model in self.models:
            known = [each.images_seen for each in self._published if each.model == model]
            self._published |= {Sampled(model, n) for n in published_counts(sweep.run(model), known)}
        self._copied = self._copied or copied_to(sweep, origins(sweep, self.models))
        variants = sweep.recipe.evaluate.samplings
        counts = {model: due_counts(sweep, model, self._copied[model]) for model in self.models}
        wanted = [each for each in self._published if each.images_seen in counts[each.model]]
        ready = [variant for variant, settings in variants.items() if self._guide_is_there(settings.guide)]
        due = {each._replace(variant=variant) for each in wanted for variant in ready}
        open_ = sorted(due - self._evaluated)
        self._evaluated |= set(_existing(open_, lambda sampled: sweep.evaluation(sampled).exists(Metrics.NAME)))
        sign = -1 if sweep.recipe.evaluate.order == "newest_first" else 1
        return sorted(
            due - self._evaluated,
            key=lambda sampled: (sampled.variant != MAIN, sign * sampled.images_seen, self.models.index(sampled.model)),
        )

    def _guide_is_there(self, guide: Autoguidance | None) -> bool:
        """Return whether the guiding checkpoint, if any, is published, or never will be: then sampling fails, with a reason."""
        if guide is None or (at := Sampled(guide.by, guide.images)) in self._published | self._guides:
            return True
        there = self.sweep.run(guide.by).published_at(guide.images).exists(manifest.NAME)
        if there or ended(self.sweep, guide.by) or training_over(self.sweep):
            self._guides.add(at)
        return at in self._guides


def outdated(sweep: Sweep) -> dict[Sampled, str]:
    """Return the evaluations whose kept blocks are to be measured again, each with the reason."""
    found = {}
    for model in sweep.recipe.models:
        for variant, settings in sweep.recipe.evaluate.samplings.items():
            for n, metrics in _metrics(sweep, model, variant).items():
                if why := outdated_by(metrics, settings):
                    found[Sampled(model, n, variant)] = why
    return found


def outdated_by(metrics: Metrics | None, settings: Evaluate) -> str:
    """Return why an evaluation with these metrics (None if damaged) is to be measured again; empty if it is complete."""
    if metrics is None:
        return f"its {Metrics.NAME} is damaged"
    added = sorted(set(settings.metrics) - set(metrics.metrics))
    return f"the recipe has added {', '.join(added)}" if added else ""


def skipped(sweep: Sweep) -> dict[Sampled, str]:
    """Return the evaluations that were skipped, each with the reason."""
    every = [
        Sampled(model, n, variant)
        for model in sweep.recipe.models
        for n in sorted({*_counts(sweep.evaluations(model))} & {*sweep.recipe.train_of(model).publish_images})
        for variant in sweep.recipe.evaluate.samplings
    ]
    return why_skipped(sweep, every)


def why_skipped(sweep: Sweep, every: Sequence[Sampled]) -> dict[Sampled, str]:
    """Return the evaluations among `every` that were skipped, each with the reason."""
    reasons = in_order(every, lambda sampled: Skipped.find_intact(sweep.evaluation(sampled)))
    return {sampled: reason.why for sampled, reason in zip(every, reasons, strict=True) if reason}


def all_evaluated(sweep: Sweep) -> bool:
    """Return whether every model is evaluated at every published count under all sampling settings."""
    copied = copied_to(sweep, origins(sweep))
    return all(
        set(due_counts(sweep, model, copied[model])) <= set(evaluated_counts(sweep, model, variant))
        for model in sweep.recipe.models
        for variant in sweep.recipe.evaluate.samplings
    )
