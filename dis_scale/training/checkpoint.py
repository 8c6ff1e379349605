"""Resume points and published weights: whole or absent, at any world size.

A resume point is one folder an attempt and image count. Each rank clones its own partitions at a step boundary and a thread writes
them as 1-D safetensors segments, then the rank's sidecar; rank 0's thread waits for all sidecars and writes the manifest. There is
no gather and no collective off the training thread. Loading reassembles by range. Nothing is ever unpickled.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist

from dis_scale.errors import StorageError
from dis_scale.recipe import Train
from dis_scale.storage import manifest
from dis_scale.storage.folder import Folder
from dis_scale.training import ema
from dis_scale.training.ema import Snapshot
from dis_scale.training.engine import MOMENTS, Engine, Segment

SIDECAR_WAIT_S = 600.0
WEIGHTS_FILE = "weights.safetensors"


def images_name(images: int) -> str:
    """Image counts in names have twelve digits, so that names sort as counts."""
    return f"{images:012d}"


def published(run: Folder) -> list[int]:
    """The image counts that this run has published whole, rising."""
    counts = [int(name) for name in (run / "published").list() if name.isdigit()]
    return [n for n in counts if (run / "published" / images_name(n)).exists(manifest.NAME)]


def load_published(run: Folder, images: int) -> dict[str, torch.Tensor]:
    """The EMA weights by parameter; StorageError names what is missing or damaged."""
    folder = run / "published" / images_name(images)
    found = manifest.find(folder)
    if found is None:
        raise StorageError(f"{folder}: not published (no {manifest.NAME})")
    return safetensors.torch.load(manifest.read(folder, WEIGHTS_FILE, found))


def snapshots(run: Folder, images: int, train: Train) -> list[Snapshot]:
    """The published power-function averages of a run up to `images`, from which any other can be rebuilt."""
    counts = [n for n in published(run) if 0 < n <= images]
    return [Snapshot(n // train.batch_images, width) for n in counts for width in train.power_ema or ()]


def load_average(run: Folder, images: int, train: Train, width: float) -> dict[str, torch.Tensor]:
    """The weights averaged with a power function of relative width `width`, rebuilt from the run's `snapshots`.

    The more counts were published before `images`, the nearer it comes to what training would have tracked: see `ema.misfit`.
    """
    known = snapshots(run, images, train)
    if not known:
        return load_published(run, images)  # nothing was trained: all averages are the initial weights
    shares = ema.coefficients(known, Snapshot(images // train.batch_images, width))
    total: dict[str, torch.Tensor] = {}
    for snapshot, share in zip(known, shares.tolist(), strict=True):
        for name, tensor in _load_snapshot(run, snapshot, train.batch_images).items():
            total[name] = total.get(name, 0) + share * tensor.double()
    return {name: tensor.float() for name, tensor in total.items()}


def _load_snapshot(run: Folder, snapshot: Snapshot, batch_images: int) -> dict[str, torch.Tensor]:
    folder = run / "published" / images_name(snapshot.step * batch_images)
    found, name = manifest.find(folder), average_file(ema.power_name(snapshot.width))
    if found is None or name not in found["files"]:
        raise StorageError(
            f"{folder}: no average {name} there: power-function averages are tracked where train.power_ema says so"
        )
    return safetensors.torch.load(manifest.read(folder, name, found))


def average_file(name: str) -> str:
    """Where an average is published; the exponential one is the weights that everybody loads."""
    return WEIGHTS_FILE if name == ema.EXPONENTIAL else f"{name}.safetensors"


@dataclass(frozen=True)
class Stored:
    """A whole resume point."""

    folder: Folder
    manifest: dict[str, Any]
    _files: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)

    @property
    def images(self) -> int:
        return int(self.manifest["images"])

    @property
    def adam_step(self) -> int:
        return int(self.manifest["adam_step"])

    def verify(self) -> None:
        """Reads all files back against the manifest; StorageError names the first that does not agree."""
        for name in self.manifest["files"]:
            manifest.read(self.folder, name, self.manifest)

    def read(self, kind: str, name: str, start: int, end: int) -> torch.Tensor:
        """Elements [start, end) of one of `engine.kinds` of the parameter `name`, from whichever ranks wrote them."""
        out, found = torch.empty(end - start), 0
        for file, table in self.manifest["tables"].items():
            if not file.startswith(f"{kind}-") or name not in table:
                continue
            low, high = max(table[name][0], start), min(table[name][1], end)
            if low < high:
                out[low - start : high - start] = self._file(file)[name][low - table[name][0] : high - table[name][0]]
                found += high - low
        if found != end - start:
            raise StorageError(f"{self.folder}: holds {found} of elements {start}..{end} of {kind} {name}")
        return out

    def _file(self, name: str) -> dict[str, torch.Tensor]:
        if name not in self._files:
            self._files[name] = safetensors.torch.load(manifest.read(self.folder, name, self.manifest))
        return self._files[name]


def newest(run: Folder, say: Callable[[str], None]) -> Stored | None:
    """The newest whole resume point; a damaged one is named through `say` and the one before is taken."""
    for name in reversed((run / "resume").list()):
        try:
            found = manifest.find(run / "resume" / name)
            if found is None:
                continue
            stored = Stored(run / "resume" / name, found)
            stored.verify()
        except StorageError as error:
            say(f"resume point passed over: {error}")
            continue
        return stored
    return None


def newest_images(run: Folder) -> int:
    """The images of the newest resume point that has a manifest; 0 where there is none. Reads nothing back."""
    whole = whole_points(run, reversed((run / "resume").list()))
    return next((int(name.split("-")[0]) for name in whole), 0)


def whole_points(run: Folder, names: Iterable[str]) -> Iterator[str]:
    """Of resume points by name those that have a manifest, looked up one by one as they are asked for."""
    return (name for name in names if (run / "resume").exists(f"{name}/{manifest.NAME}"))


@dataclass
class Saver:
    """Writes one run's resume points and published weights beside training, at most one at a time.

    `held` is asked before each manifest whether this attempt still owns the run; where it does not, saving stops with an error.
    """

    run: Folder
    attempt: int
    rank: int
    world: int
    held: Callable[[], bool]
    keep: int
    paused_s: float = 0.0
    """How long training has stood still for resume points, a save before that was still in flight included."""
    longest_s: float = 0.0
    """The longest of these pauses."""
    took_s: float = 0.0
    """From the last resume point's first byte to its end."""
    _thread: threading.Thread | None = None
    _error: BaseException | None = None

    def save(self, engine: Engine, images: int, facts: dict[str, Any]) -> None:
        """Starts a resume point of this step boundary; training stands still for the clone, and for a save still in flight."""
        begin = time.monotonic()
        self.finish()
        clones = {kind: engine.segments(kind) for kind in engine.kinds}
        pause_s = time.monotonic() - begin
        self.paused_s, self.longest_s = self.paused_s + pause_s, max(self.longest_s, pause_s)
        self._start(lambda: self._write(clones, images, facts))

    def publish(self, engine: Engine, images: int, facts: dict[str, Any], description: str) -> None:
        """Starts publishing the averaged weights, where this count was not published before; collective.

        `description` goes into the weights' files, which then say by themselves what model they hold.
        """
        folder = self.run / "published" / images_name(images)
        self.finish()
        missing = [self.rank == 0 and not folder.exists(manifest.NAME)]
        dist.broadcast_object_list(missing)
        if not missing[0]:
            return
        averages = {average_file(name): engine.full_average(name) for name in engine.averages}
        if self.rank == 0:
            files = {name: safetensors.torch.save(w, {"dis_scale": description}) for name, w in averages.items() if w}
            self._start(lambda: self._seal(folder, files, images, facts))

    def finish(self) -> None:
        """Waits for the save in flight; raises what went wrong with it."""
        if self._thread:
            self._thread.join()
            self._thread = None
        if self._error:
            raise self._error

    def _start(self, write: Callable[[], None]) -> None:
        def guarded() -> None:
            try:
                write()
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=guarded, name="save")
        self._thread.start()

    def _seal(self, folder: Folder, files: dict[str, bytes], images: int, facts: dict[str, Any]) -> None:
        self._require_held(folder)  # before, too: this folder is not this attempt's alone
        for name, data in files.items():
            folder.write(name, data)
        self._require_held(folder)
        manifest.seal(
            folder, {n: manifest.digest(d) for n, d in files.items()}, images=images, attempt=self.attempt, **facts
        )

    def _write(self, clones: dict[str, dict[Segment, torch.Tensor]], images: int, facts: dict[str, Any]) -> None:
        folder = self.run / "resume" / f"{images_name(images)}-{self.attempt:04d}"
        sidecar: dict[str, Any] = {"files": {}, "tables": {}}
        begin = time.monotonic()
        for kind, segments in clones.items():
            name = f"{kind}-{self.rank:05d}.safetensors"
            data = safetensors.torch.save({s.name: tensor for s, tensor in segments.items()})
            folder.write(name, data)
            sidecar["files"][name] = manifest.digest(data)
            sidecar["tables"][name] = {s.name: [s.start, s.end] for s in segments}
        folder.write_json(_sidecar(self.rank), sidecar)
        if self.rank == 0:
            self._write_manifest(folder, images, facts)
            self._prune(images)
        self.took_s = time.monotonic() - begin

    def _write_manifest(self, folder: Folder, images: int, facts: dict[str, Any]) -> None:
        sidecars = [_await_json(folder, _sidecar(rank)) for rank in range(self.world)]
        files = {name: digest for s in sidecars for name, digest in s["files"].items()}
        tables = {name: table for s in sidecars for name, table in s["tables"].items()}
        self._require_held(folder)
        manifest.seal(folder, files, images=images, attempt=self.attempt, world=self.world, tables=tables, **facts)

    def _require_held(self, folder: Folder) -> None:
        if not self.held():
            raise StorageError(
                f"{folder}: another attempt has taken over this run; this one (attempt {self.attempt}) stops"
            )

    def _prune(self, images: int) -> None:
        """Keeps the last `keep` whole resume points and what a faster rank has begun beyond `images`.

        Removes a manifest first, so that no torn resume point is ever taken.
        """
        resume = self.run / "resume"
        passed = [name for name in resume.list() if int(name.split("-")[0]) <= images]
        whole = list(whole_points(self.run, passed))
        for name in whole[: -self.keep]:
            (resume / name).delete(manifest.NAME)
        for name in set(passed) - set(whole[-self.keep :]):
            (resume / name).delete()


def fresh(model: torch.nn.Module) -> Callable[[str, str, int, int], torch.Tensor]:
    """What `Stored.read` is for a run that begins: the model's own weights, zero moments."""
    flat = {name: p.detach().float().clone().flatten() for name, p in model.named_parameters()}
    return lambda kind, name, start, end: torch.zeros(end - start) if kind in MOMENTS else flat[name][start:end]


def _sidecar(rank: int) -> str:
    return f"rank-{rank:05d}.json"


def _await_json(folder: Folder, name: str) -> Any:
    deadline = time.monotonic() + SIDECAR_WAIT_S
    while time.monotonic() < deadline:
        if folder.exists(name):
            return folder.read_json(name)
        time.sleep(0.05)
    raise StorageError(
        f"{folder}/{name}: not written within {SIDECAR_WAIT_S:.0f} s; this resume point stays incomplete"
    )
