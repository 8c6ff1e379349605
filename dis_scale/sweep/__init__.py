"""A sweep: its recipe and its folder in storage. Every path below that folder is named here and nowhere else.

Reads and writes nothing but the recipe. Read next: state.py for what exists and what is left to do.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from dis_scale.process.errors import DisScaleError, NoFamily, UserError, nearest
from dis_scale.process.settings import Settings
from dis_scale.recipe import MAIN, Recipe, Storage, reading
from dis_scale.recipe.identity import identity_differences
from dis_scale.storage.folder import Folder, missing, open_folder

RECIPE, EARLIER = "recipe.yaml", "earlier"
"""The stored recipe, and the folder of the models and variants that were removed from it."""
SWEEPS = "sweeps"
"""Folder of all sweeps below a storage root."""
USUAL = f"{Storage.model_fields['root'].default}/{SWEEPS}"
"""Where sweeps are unless a recipe says otherwise."""
GRID = "samples.png"
"""Grid of samples of one evaluation."""
REAL = "real.png"
"""Grid of real images of the sweep's source, in the same layout."""
LEASES = "leases"
STAGES = ("prepare", "precompute", "evaluate")
"""Stages of a sweep, which have a lease and store their progress. A run has its own lease, and its progress in its rows."""
ABLATION = "vary"
"""Folder of an evaluation's ablations, next to its variants."""


def images_name(images_seen: int) -> str:
    """Return an image count as it is written in names: with twelve digits, so that names sort as counts."""
    return f"{images_seen:012d}"


COPIED = 0
"""Attempt number in the name of a resume point that a fork has from its origin: no attempt of the fork's run wrote it."""


class PointName(NamedTuple):
    """Name of a resume point: images seen and the attempt that wrote it, for example `000000001600-0003`."""

    images_seen: int
    attempt: int

    def __str__(self) -> str:
        return f"{images_name(self.images_seen)}-{self.attempt:04d}"

    @classmethod
    def parse(cls, name: str) -> "PointName | None":
        """Return the parts of a folder's name; None for any other name."""
        match = re.fullmatch(r"(\d{12,})-(\d{4,})", name, re.ASCII)
        return cls(int(match[1]), int(match[2])) if match else None


class Sampled(NamedTuple):
    """One checkpoint under one sampling setting: the unit of evaluation."""

    model: str
    images_seen: int
    variant: str = MAIN

    def __str__(self) -> str:
        return f"{self.model} at {self.images_seen:,} images" + (f" ({self.variant})" if self.variant else "")


def sweeps_below(store: Folder) -> list[Folder]:
    """Return the folders of all sweeps below a storage root."""
    return [store / SWEEPS / name for name in store.folders(SWEEPS)]


def store_of(sweep: Folder) -> Folder:
    """Return the storage root of a sweep's folder."""
    return replace(sweep, url=sweep.url.rsplit(f"/{SWEEPS}/", 1)[0])


def _named_parts(recipe: Recipe) -> dict[str, Settings]:
    """Return the parts of a recipe that have names of their own, as they are called in `EARLIER`."""
    named: dict[str, Mapping[str, Settings]] = {"models": recipe.models, "variants": recipe.evaluate.variants}
    return {f"{part}-{name}": each for part, of_part in named.items() for name, each in of_part.items()}


def folder_around(folder: Folder) -> Folder | None:
    """Return the sweep's folder that a folder is, or is in; None if it is in no sweep."""
    start, mark, path = folder.url.rpartition("://")
    parts = path.split("/")
    above = (replace(folder, url=start + mark + "/".join(parts[:depth])) for depth in range(len(parts), 1, -1))
    return next((each for each in above if each.exists(RECIPE)), None)


def _job_name(stage: str, model: str | None) -> str:
    """Return the name of a stage's job in the sweep's folders; training has one job for each model."""
    return f"{stage}-{model}" if model else stage


def command_lease(sweep: Folder) -> Folder:
    """Return the lease of the command that runs the sweep in a folder; it is held before the recipe is stored."""
    return sweep / LEASES / "sweep"


class _Below:
    """A folder below that of a run or of a sweep."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __get__(self, owner: "Run | Sweep", _: object) -> Folder:
        return owner.folder / self._path


@dataclass(frozen=True)
class Run:
    """The training run of one model."""

    folder: Folder
    resume = _Below("resume")
    """Resume points: full state, private to training. The last K are kept, and some spread over the training."""
    published = _Below("published")
    """Averaged weights at the recipe's image counts, never deleted."""
    log = _Below("log")
    """Metric rows."""
    lease = _Below("lease")
    bad_steps = _Below("evidence")
    """Dumps of steps whose gradient was not finite, each named as a resume point."""

    def resume_point(self, name: PointName) -> Folder:
        return self.resume / str(name)

    def published_at(self, images_seen: int) -> Folder:
        return self.published / images_name(images_seen)

    def bad_step(self, name: PointName) -> Folder:
        return self.bad_steps / str(name)


@dataclass(frozen=True)
class Sweep:
    """A recipe and the folder of its sweep."""

    folder: Folder
    recipe: Recipe
    references = _Below("reference")
    """Statistics of the real images, one file per extractor."""
    reference_parts = _Below("reference/parts")
    """Parts of the statistics, until these are complete."""
    floor = _Below("floor")
    """Distances of real images and of their reconstructions, with their blocks."""
    vae = _Below("vae")
    """Autoencoder that the sweep trained, if its recipe trains one."""
    report = _Below("report")
    leases = _Below(LEASES)
    """Leases of the sweep itself and of its stages."""
    all_logs = _Below("logs")
    """Logs of all attempts, in one folder for each stage and model."""
    all_failed_nodes = _Below("failed_nodes")

    @classmethod
    def open(cls, url: str, *, patient: bool = False) -> "Sweep":
        """Return the sweep at a URL or path with the recipe that it stored; UserError if there is none, or a damaged one.

        `patient` retries storage for about a minute, from the first read on.
        """
        folder = open_folder(url).patient if patient else open_folder(url)
        if not folder.exists(RECIPE):
            if around := folder_around(folder):
                raise UserError(f"no sweep at {folder}: expected a folder with {RECIPE}: did you mean {around}?")
            if "/" not in url and open_folder(f"{USUAL}/{url}").exists(RECIPE):
                raise UserError(f"no sweep at {folder}: expected a folder with {RECIPE}: did you mean {USUAL}/{url}?")
            raise UserError(
                f"no sweep at {folder}{missing(folder)}: expected a folder with {RECIPE}, for example "
                f"{USUAL}/digits; a first start writes it when it has listed its images"
            )
        try:
            return cls(folder, reading.parse(folder.read(RECIPE).decode(), f"{folder}/{RECIPE}", stored=True))
        except NoFamily as error:
            raise NoFamily(f"{folder}/{RECIPE}: {error}") from error
        except (UnicodeDecodeError, UserError) as error:
            first, *_ = str(error).splitlines()
            where = "" if isinstance(error, UserError) else f"{folder}/{RECIPE}: "
            raise UserError(
                f"{where}{first}; the stored recipe is damaged or from another version: restore it from a backup; "
                "or delete it and run the sweep with its own recipe file, which stores it again"
            ) from error

    @classmethod
    def below(cls, store: Folder, recipe: Recipe) -> "Sweep":
        """Return the sweep of this recipe below a storage root, whether it exists or not."""
        return cls(store / SWEEPS / recipe.name, recipe)

    def __str__(self) -> str:
        return str(self.folder)

    def save_recipe(self) -> None:
        """Store the recipe. Models and variants that only the previous recipe has are stored in `EARLIER`: their files are kept."""
        if self.folder.exists(RECIPE):
            before, now = _named_parts(Sweep.open(self.folder.url).recipe), _named_parts(self.recipe)
            for name in before.keys() - now.keys():
                self.folder.write(f"{EARLIER}/{name}.yaml", reading.written(before[name].model_dump(mode="json")).encode())
        self.folder.write(RECIPE, reading.dump(self.recipe).encode())

    def differences(self) -> list[str]:
        """Return a line for each setting in which the sweep of this name was begun with another recipe; none before it is stored.

        A removed model or variant may come back only unchanged: the files that are stored under its name count as its own.
        """
        if not self.folder.exists(RECIPE):
            return []
        stored = Sweep.open(self.folder.url, patient=True).recipe
        removed = {name.removesuffix(".yaml") for name in self.folder.list(EARLIER)}
        back = removed & (_named_parts(self.recipe).keys() - _named_parts(stored).keys())
        return identity_differences(stored, self.recipe) + [line for name in sorted(back) for line in self._differences_of(name)]

    def _differences_of(self, name: str) -> list[str]:
        """Return how a model or a variant differs from the one of its name that was removed."""
        part, _, own = name.partition("-")
        text, data = self.folder.read(f"{EARLIER}/{name}.yaml").decode(), self.recipe.model_dump(mode="json")
        (data if part == "models" else data["evaluate"])[part][own] = reading.plain(text)
        try:
            before = reading.parse(reading.written(data), f"{self}/{EARLIER}/{name}.yaml", stored=True)
        except DisScaleError as error:  # such as a family that is not here
            return [f"{part}.{own}: it was removed, and is another now: {error}"]
        return [f"{line} (it was removed before)" for line in identity_differences(before, self.recipe)]

    @property
    def store(self) -> Folder:
        """Storage root that the sweep shares with others: latents and listings are below it."""
        return store_of(self.folder)

    def extractor(self, name: str) -> Folder:
        """Return the folder of a classifier that the sweep trained: an extractor, or the judge."""
        return self.folder / "extractors" / name

    def lease(self, name: str) -> Folder:
        """Return the lease of the sweep itself or of a stage; that of a run is `Run.lease`."""
        return self.leases / name

    def logs(self, stage: str, model: str | None = None) -> Folder:
        """Return the folder of the logs of a stage's attempts; training has one for each model."""
        return self.all_logs / _job_name(stage, model)

    def failed_nodes(self, stage: str, model: str | None = None) -> Folder:
        """Return the folder of a job's count of node failures: jobs that run at the same time would overwrite a common file."""
        return self.all_failed_nodes / _job_name(stage, model)

    def run(self, model: str) -> Run:
        """Return the run of a model; UserError with the nearest name for an unknown one."""
        if model not in self.recipe.models:
            models = self.recipe.models
            raise UserError(f"{self} has no model {model!r}{nearest(model, models)}: it has {', '.join(models)}")
        return Run(self.folder / "runs" / model)

    def all_runs(self) -> list[Run]:
        """Return the runs that have a folder, also those of models that the recipe lost."""
        return [Run(self.folder / "runs" / name) for name in self.folder.folders("runs")]

    def evaluation(self, sampled: Sampled) -> Folder:
        main = self.evaluations(sampled.model) / images_name(sampled.images_seen)
        return main / sampled.variant if sampled.variant else main

    def evaluations(self, model: str) -> Folder:
        """Return the folder of all evaluations of a model, by image count."""
        return self.folder / "evaluation" / model
