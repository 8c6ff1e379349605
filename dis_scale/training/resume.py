"""Resume points: complete or absent, readable at any world size; the saver also publishes weights (weights/published.py).

A resume point is one folder per attempt and image count. Each rank clones its own partitions at a step boundary. A thread
writes them as 1-D safetensors segments, then the rank's sidecar; rank 0's thread waits for all sidecars and writes the
manifest. There is no gather and no collective off the training thread. Loading reassembles by range. Nothing is ever unpickled.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Self

import safetensors.torch
import torch
import torch.distributed as dist

from dis_scale.data.latents import Latents
from dis_scale.process.errors import Damaged, StorageAway, StorageError, UserError
from dis_scale.recipe import Branch, Recipe
from dis_scale.storage.folder import Folder
from dis_scale.storage.manifest import Digest
from dis_scale.sweep import PointName, Run, Sweep, state
from dis_scale.sweep.documents import PublishedManifest, ResumePointManifest, RunState, Segments, Tables, file_of
from dis_scale.training.engine import MOMENTS, WEIGHTS, Engine, Segment
from dis_scale.weights.published import average_file

SIDECAR_WAIT_S = 600.0


@dataclass(frozen=True)
class ResumePoint:
    """A complete resume point."""

    folder: Folder
    manifest: ResumePointManifest
    _files: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)

    def require_latents(self, latents: Latents) -> None:
        """Raise UserError if the run was trained on other latents up to this resume point."""
        if (theirs := self.manifest.progress.latents) != latents.identity:
            raise UserError(
                f"{self.folder}: trained on latents {theirs}, {latents.folder} is {latents.identity}, with other images at its "
                "positions: restore those latents, or give the sweep another name (--set name=...)"
            )

    def verify(self) -> None:
        """Read all files, several at once, and keep the weights; StorageError names the first that differs from the manifest."""

        def keep(name: str, data: bytes) -> None:
            if name.startswith(f"{WEIGHTS}-"):
                self._files[name] = safetensors.torch.load(data)

        self.manifest.read_files(self.folder, keep)

    def read(self, kind: str, name: str, start: int, end: int) -> torch.Tensor:
        """Return elements [start, end) of the parameter `name`, in one of `engine.kinds`, whichever ranks wrote them."""
        out, filled = torch.empty(end - start), 0
        for file, table in self.manifest.tables.items():
            if not file.startswith(f"{kind}-") or name not in table:
                continue
            low, high = max(table[name][0], start), min(table[name][1], end)
            if low < high:
                out[low - start : high - start] = self._file(file)[name][low - table[name][0] : high - table[name][0]]
                filled += high - low
        if filled != end - start:
            raise StorageError(f"{self.folder}: holds {filled} of elements {start}..{end} of {kind} {name}")
        return out

    def _file(self, name: str) -> dict[str, torch.Tensor]:
        if name not in self._files:
            kind = name.rpartition("-")[0]
            for other in [each for each in self._files if each.rpartition("-")[0] != kind]:  # kinds are read one after the other
                del self._files[other]
            self._files[name] = safetensors.torch.load(self.manifest.read_file(self.folder, name))
        return self._files[name]


def find_point(run: Run, name: PointName) -> ResumePoint | None:
    """Return the resume point of this name; None if it is incomplete."""
    folder = run.resume_point(name)
    manifest = ResumePointManifest.find(folder)
    return None if manifest is None else ResumePoint(folder, manifest)


def newest_point(run: Run, log: Callable[[str], None], *, start_over: bool = False, begin: int = 0) -> ResumePoint | None:
    """Return the newest complete resume point, None for a run that has saved nothing yet.

    A damaged one is logged, and the one before is used. Raises StorageError if one cannot be read for another reason, such as
    missing rights. Raises UserError if no resume point is usable though the run was further than `begin`, unless `start_over`.
    """
    names, damaged = state.point_names(run), 0
    for name in reversed(names):
        try:
            point = find_point(run, name)
            if point is None:
                continue
            point.verify()
        except Damaged as error:
            log(f"resume point passed over: {error}")
            damaged += 1
            continue
        return point
    # A run completes a resume point where it begins before it saves or publishes anything at a later count.
    was_further = damaged or any(name.images_seen > begin for name in names) or any(state.published_counts(run))
    if was_further and not start_over:
        raise UserError(
            f"{run.resume}: no resume point can be used ({damaged} damaged), and this run has trained before: restore them, or "
            "train it from the beginning with --set train.start_over=true"
        )
    return None


def branch_point(sweep: Sweep, branch: Branch) -> ResumePoint:
    """Return the resume point at which a branch leaves its trunk; StorageError if it is missing or damaged."""
    run = sweep.run(branch.of)
    name = state.point_at(run, branch.at)
    point = name and find_point(run, name)
    if point is None:
        raise StorageError(f"{run.resume}: no resume point at {branch.at} images, from which a branch begins")
    point.verify()
    return point


@dataclass(frozen=True)
class Keep:
    """The rule for which complete resume points of a training are kept."""

    last: int
    """Number of the newest resume points."""
    spaced: int
    """Number of further resume points, spread evenly over the training."""
    images: int
    """Images of the complete training."""
    branches: frozenset[int]
    """Image counts at which other models' trainings begin."""

    @classmethod
    def of_model(cls, recipe: Recipe, model: str) -> Self:
        settings = recipe.train_of(model)
        return cls(settings.keep_resume, settings.keep_spaced, settings.images, frozenset(recipe.branches_at(model)))

    def of(self, complete: Sequence[PointName]) -> set[PointName]:
        """Return the resume points to keep of all complete ones, given oldest first; at one count, the newest attempt's."""
        complete = list({name.images_seen: name for name in complete}.values())
        apart = max(1.0, self.images / (self.spaced + 1))
        spaced = {int(name.images_seen // apart): name for name in reversed(complete) if name.images_seen >= apart}
        branches = {name.images_seen: name for name in complete if name.images_seen in self.branches}
        return {*complete[-self.last :], *spaced.values(), *branches.values()}


@dataclass
class Saver:
    """Writes one run's resume points and published weights next to training, one at a time.

    `require_held` is called before each manifest. It raises Held, which ends saving, if this attempt no longer owns the run.
    """

    run: Run
    attempt: int
    rank: int
    world: int
    require_held: Callable[[], None]
    keep: Keep
    log: Callable[[str], None]
    paused_s: float = 0.0
    """Time for which training waited for resume points and published weights, including one that was still being written."""
    longest_s: float = 0.0
    """Longest of these pauses."""
    took_s: float = 0.0
    """Time from the first byte to the end of the last resume point."""
    _pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "save"))
    _saving: Future[None] | None = None
    _stay: bool = False
    """Whether a failure to delete old resume points was logged."""

    def save(self, engine: Engine, images_seen: int, progress: RunState) -> None:
        """Start a resume point of this step boundary; training waits for the clone and for a save in progress."""
        with self._pausing():
            self.finish()
            clones = {kind: engine.segments(kind) for kind in engine.kinds}
        self._saving = self._pool.submit(self._write, clones, images_seen, progress)

    def publish(self, engine: Engine, images_seen: int, progress: RunState, description: str) -> None:
        """Start publishing the averaged weights, unless this count is published already; collective.

        `description` is stored in the weights' files, so that each file names the model that it holds.
        """
        folder = self.run.published_at(images_seen)
        with self._pausing():
            self.finish()
            missing = [self.rank == 0 and not PublishedManifest.exists(folder)]
            dist.broadcast_object_list(missing)
            if not missing[0]:
                return
            averages = {average_file(name): engine.full_average(name) for name in engine.averages}
        if self.rank == 0:
            weights = {name: each for name, each in averages.items() if each}
            self._saving = self._pool.submit(self._seal, folder, weights, description, images_seen, progress)

    @contextlib.contextmanager
    def _pausing(self) -> Iterator[None]:
        begin_s = time.monotonic()
        try:
            yield
        finally:
            pause_s = time.monotonic() - begin_s
            self.paused_s, self.longest_s = self.paused_s + pause_s, max(self.longest_s, pause_s)

    def finish(self) -> None:
        """Wait for the save in progress; raise its error, if any."""
        if self._saving:
            self._saving.result()

    def raise_failed(self) -> None:
        """Raise the error of the last save, if any."""
        if self._saving and self._saving.done():
            self._saving.result()

    def _seal(
        self, folder: Folder, weights: dict[str, dict[str, torch.Tensor]], description: str, images_seen: int, progress: RunState
    ) -> None:
        # All attempts share a folder of published weights. File names contain the attempt, so an attempt that has lost the run and
        # writes late never overwrites its successor's files. The first manifest counts: evaluation may have read it.
        files = dict[str, Digest]()
        for average, tensors in weights.items():
            data = safetensors.torch.save(tensors, {"dis_scale": description})
            folder.write(name := file_of(average, self.attempt), data)
            files[name] = Digest.of(data)
        self.require_held()
        PublishedManifest(files=files, images=images_seen, attempt=self.attempt, progress=progress).create(folder)

    def _write(self, clones: dict[str, dict[Segment, torch.Tensor]], images_seen: int, progress: RunState) -> None:
        folder = self.run.resume_point(PointName(images_seen, self.attempt))
        files, tables = dict[str, Digest](), Tables()
        begin = time.monotonic()
        for kind, segments in clones.items():
            name = f"{kind}-{self.rank:05d}.safetensors"
            data = safetensors.torch.save({s.name: tensor for s, tensor in segments.items()})
            folder.write(name, data)
            files[name] = Digest.of(data)
            tables[name] = {s.name: (s.start, s.end) for s in segments}
        Segments(files=files, tables=tables).write(folder, _sidecar(self.rank))
        if self.rank == 0:
            self._write_manifest(folder, images_seen, progress)
            try:
                self._prune(images_seen)
            except (StorageError, StorageAway) as error:  # costs only space; the next save deletes the rest
                if not self._stay:
                    self.log(f"warning: resume points that are not needed stay: {error}")
                self._stay = True
        self.took_s = time.monotonic() - begin

    def _write_manifest(self, folder: Folder, images_seen: int, progress: RunState) -> None:
        sidecars = [await_sidecar(folder, rank) for rank in range(self.world)]
        files = {name: digest for s in sidecars for name, digest in s.files.items()}
        tables = {name: table for s in sidecars for name, table in s.tables.items()}
        self.require_held()
        manifest = ResumePointManifest(
            files=files, images=images_seen, attempt=self.attempt, world=self.world, tables=tables, progress=progress
        )
        manifest.write(folder)

    def _prune(self, images_seen: int) -> None:
        """Delete the resume points up to `images_seen` that are incomplete or not to be kept.

        Later resume points stay, since a faster rank may already be writing one. Those of later attempts stay, since this attempt
        may have lost the run while it wrote. Manifests are deleted first, so a partly deleted resume point is never loaded.
        """
        self.require_held()
        names = state.point_names(self.run)
        passed = [name for name in names if name.images_seen <= images_seen and name.attempt <= self.attempt]
        complete = list(state.complete_points(self.run, passed))
        kept = self.keep.of(complete)
        for name in complete:
            if name not in kept:
                self.run.resume_point(name).delete(ResumePointManifest.NAME)
        for name in set(passed) - kept:
            self.run.resume_point(name).delete()


def fresh(model: torch.nn.Module) -> Callable[[str, str, int, int], torch.Tensor]:
    """Return the counterpart of `ResumePoint.read` for a new run: the model's initial weights, zero moments."""
    flat = {name: p.detach().float().clone().flatten() for name, p in model.named_parameters()}
    return lambda kind, name, start, end: torch.zeros(end - start) if kind in MOMENTS else flat[name][start:end]


def _sidecar(rank: int) -> str:
    return f"rank-{rank:05d}.json"


def await_sidecar(folder: Folder, rank: int, wait_s: float = SIDECAR_WAIT_S) -> Segments:
    """Return a rank's sidecar once it is written; StorageAway after `wait_s`, if that rank's storage is slow or away."""
    deadline = time.monotonic() + wait_s
    while time.monotonic() < deadline:
        if sidecar := Segments.find(folder, _sidecar(rank)):
            return sidecar
        time.sleep(0.05)
    raise StorageAway(f"{folder}/{_sidecar(rank)}: not written within {wait_s:.0f} s; this resume point stays incomplete")
