"""What all drills share: a sweep that is ready to train, its commands, the lines that they log, and the final comparison."""

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import s3fs

from dis_scale.recipe import reading
from dis_scale.storage.folder import Folder, open_folder
from dis_scale.sweep import Run, Sweep, state
from dis_scale.sweep.documents import WEIGHTS_FILE, PublishedManifest
from dis_scale.tracking import attempt_logs
from ops.drills import object_store
from ops.drills.nodes import ENVIRONMENT, RayNodes

RECIPE = Path(__file__).with_name("drill.yaml")
MODEL = "dit"
DONE, FAILED, MISTAKE, HELD, AWAY, STOPPED = 0, 1, 2, 69, 74, 75
TIMEOUT_S = 600
MADE_BY_TRAINING = ("runs", "evaluation", "report", "logs", "tracking.json", "recipe.yaml", "ray.json", "mlflow.db*")
"""Files and folders of a sweep that a drill does not copy from the undisturbed one."""

GO_ON = "go-on"
"""File by which a drill lets a training continue."""


def held(images: int) -> str:
    """Return the fault by which training waits at this count until `Drill.go_on`."""
    return f"wait at step rank=0 images={images} until={GO_ON}\n"


def slowed(images: int, until: str = "") -> str:
    """Return the fault by which each step from this count on takes 1 s, so that a stop request or an accident finds one."""
    return f"wait at step rank=0 images={images} seconds=1 times=200 {until and f'until={until}'}\n"


class Missing(Exception):
    """A program or a right that this machine lacks for a drill."""


def sweep_below(store: str | Path) -> Sweep:
    """The sweep of the drill's recipe in a store."""
    return Sweep.below(open_folder(store), reading.load(RECIPE))


@dataclass
class Drill:
    """One drill: its storage, and the output of its last command."""

    root: Path
    undisturbed: Sweep
    store: str = ""
    """Storage root; by default a folder below `root`."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables of all its commands."""
    within: list[str] = field(default_factory=list)
    """Command through which all its commands are started."""
    output: str = ""
    ends: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    """Clusters, servers and mounts that end with the drill."""
    _logs: dict[int, Path] = field(default_factory=dict)
    _plan: Path | None = None
    """The newest plan of faults."""

    def __post_init__(self) -> None:
        self.store = self.store or str(self.root / "store")

    @property
    def sweep(self) -> Sweep:
        return sweep_below(self.store)

    @property
    def run(self) -> Run:
        return self.sweep.run(MODEL)

    def run_sweep(self, *settings: str, faults: str = "", ends: int = DONE) -> None:
        """Run the sweep's command to its end and require this exit code."""
        self.wait(self.start(*settings, faults=faults), ends)

    def resume(self, *settings: str, faults: str = "", ends: int = DONE) -> None:
        """Run `dis-scale resume` as the runbooks say."""
        self.wait(self.start(*settings, faults=faults, resumes=True), ends)

    def start(self, *settings: str, faults: str = "", resumes: bool = False) -> subprocess.Popen[bytes]:
        begun = ["resume", str(self.sweep)] if resumes else ["sweep", str(RECIPE), f"--set=storage.root={self.store}"]
        tracking = [] if open_folder(self.store).local else [f"tracking.uri=sqlite:///{self.root}/mlflow.db"]
        overrides = [word for setting in (*tracking, *settings) for word in ("--set", setting)]
        return self._start(*begun, *overrides, **({"DIS_SCALE_FAULTS": self.plan(faults)} if faults else {}))

    def plan(self, faults: str) -> str:
        """Write a plan of faults and return its path: for DIS_SCALE_FAULTS of a command, or of a cluster's nodes."""
        self._plan = self.root / f"faults-{len(self._logs)}"
        self._plan.write_text(faults)
        return str(self._plan)

    def go_on(self) -> None:
        """End the wait of `held`."""
        assert self._plan is not None
        (self._plan.with_name(f"{self._plan.name}.spent") / GO_ON).touch()

    def dis_scale(self, *words: str, ends: int = DONE) -> None:
        """Run a `dis-scale` command and require its exit code."""
        self.wait(self._start(*words), ends)

    def wait(self, process: subprocess.Popen[bytes], ends: int) -> None:
        try:
            code = process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            code = -9
        self.output = self._logs[process.pid].read_text()
        require(code == ends, f"exit code {code}, expected {ends}:\n{self.output}")

    def expect(self, pattern: str) -> None:
        """Require a line that matches this regular expression, and print it."""
        lines = [line.strip() for line in self.output.splitlines() if re.search(pattern, line)]
        require(bool(lines), f"no line matches {pattern!r}:\n{self.output}")
        print(f"    {lines[0]}", flush=True)

    def until(self, process: subprocess.Popen[bytes], true: Callable[[], bool], what: str) -> None:
        """Wait until this is true, while a command runs."""
        deadline = time.monotonic() + TIMEOUT_S
        while not true():
            require(process.poll() is None, f"the command ended too early:\n{self._logs[process.pid].read_text()}")
            require(time.monotonic() < deadline, f"{what}:\n{self._logs[process.pid].read_text()}")
            time.sleep(0.1)

    def until_held(self, process: subprocess.Popen[bytes], fault: int = 0) -> None:
        """Wait until training waits by this fault of the plan, of `held` or `slowed`."""
        assert self._plan is not None
        met = self._plan.with_name(f"{self._plan.name}.spent") / f"{fault}.0"
        self.until(process, met.exists, "training has not come so far")

    def until_saved(self, process: subprocess.Popen[bytes], images: int) -> None:
        """Wait until training has left a complete resume point of this many images or more."""

        def saved() -> bool:
            newer = [name for name in state.point_names(self.run) if name.images_seen >= images]
            return any(state.complete_points(self.run, newer))

        self.until(process, saved, "nothing was saved")

    def until_logged(self, process: subprocess.Popen[bytes], pattern: str) -> None:
        """Wait until a running command has logged a line that matches this."""
        log = self._logs[process.pid]
        self.until(process, lambda: re.search(pattern, log.read_text()) is not None, f"no line matches {pattern!r}")

    def pid_of_rank(self, process: subprocess.Popen[bytes], rank: int) -> int:
        """Return the process id of a rank of the newest attempt, once its log is stored, whose first line has it."""
        folder = self.sweep.logs("train", MODEL)

        def of_rank() -> list[attempt_logs.LogName]:
            return [name for name in attempt_logs.listed(folder) if name.process == f"{rank:04d}"]

        self.until(process, lambda: bool(of_rank()), f"rank {rank} has stored no log")
        newest = max(of_rank(), key=lambda name: name.begun)
        return int(json.loads(folder.read(str(newest)).splitlines()[0])["pid"])

    def _start(self, *words: str, **environment: str) -> subprocess.Popen[bytes]:
        print(f"  $ dis-scale {shlex.join(words)}".replace(str(self.root), "ROOT").replace(str(RECIPE), RECIPE.name), flush=True)
        log = self.root / f"output-{len(self._logs)}"
        variables = os.environ | {"COLUMNS": "250"} | self.environment | environment
        with log.open("wb") as out:
            command = [*self.within, sys.executable, "-m", "dis_scale", *words]
            process = subprocess.Popen(command, stdout=out, stderr=out, env=variables)
        self.ends.callback(process.kill)  # of a drill that fails while it runs
        self._logs[process.pid] = log
        return process

    def cluster(self, cpus: int, **head: Any) -> RayNodes:
        """Start a Ray cluster with this head; from now on all commands use it."""
        nodes = RayNodes(cpus, **head)
        self.ends.callback(nodes.stop)
        self.use(nodes)
        return nodes

    def use(self, nodes: RayNodes) -> None:
        """Give all further commands this Ray cluster."""
        self.environment |= ENVIRONMENT | {"RAY_ADDRESS": nodes.address}

    def object_store(self) -> object_store.ObjectStore:
        """Move what is stored to a bucket of a real S3 server that runs until the drill ends."""
        if missing := object_store.missing():
            raise Missing(f"{', '.join(missing)} (apt-get install --no-install-recommends radosgw ceph-mon ceph-osd)")
        before, server = dict(os.environ), object_store.ObjectStore(on_disk=True).start()
        self.ends.callback(s3fs.S3FileSystem.clear_instance_cache)  # whose clients know no other server
        self.ends.callback(server.stop)
        self.ends.callback(os.environ.update, before)
        self.ends.callback(os.environ.clear)
        s3fs.S3FileSystem.clear_instance_cache()  # of the server of an earlier drill, by the same arguments
        bucket = object_store.make_bucket(server, f"drill-{os.getpid()}")
        copy_tree(Path(self.store), open_folder(bucket))
        self.store = bucket
        return server

    def require_same_weights(self, model: str = MODEL) -> None:
        """Require that all published weights are bit-equal to the undisturbed sweep's."""
        ours = published_hashes(Sweep.open(self.sweep.folder.url).run(model))  # as stored: a fork adds its model
        theirs = published_hashes(self.undisturbed.run(MODEL))
        require(ours == theirs, f"published weights differ from the undisturbed sweep's: {ours} and {theirs}")
        print(f"    published at {', '.join(ours)} images: bit-equal to the undisturbed sweep's", flush=True)


def copy_tree(tree: Path, folder: Folder) -> None:
    """Copy a folder's files to storage."""
    for path in sorted(each for each in tree.rglob("*") if each.is_file()):
        folder.write(str(path.relative_to(tree)), path.read_bytes())


def published_hashes(run: Run) -> dict[str, str]:
    """Return the hash of the published weights by image count."""
    hashes = {}
    for images in state.published_counts(run):
        contents = PublishedManifest.require(run.published_at(images))
        weights = contents.stored_file(WEIGHTS_FILE)
        assert weights is not None
        hashes[str(images)] = contents.files[weights].sha256
    return hashes


def require(true: bool, words: str) -> None:  # noqa: FBT001  # read as an assertion
    """End the drill as failed unless this holds."""
    if not true:
        sys.exit(f"drill failed: {words}")


def local(sweep: Sweep) -> Path:
    """The sweep's folder on this machine's disk."""
    folder = sweep.folder.local
    assert folder is not None
    return folder


def run_undisturbed(scratch: Path) -> Path:
    """Run a sweep without any fault; return its storage root."""
    print("an undisturbed sweep, to compare with", flush=True)
    root = scratch / "undisturbed"
    root.mkdir()
    Drill(root, sweep_below(root / "store")).run_sweep()
    return root / "store"


def perform(drill: Callable[[Drill], None], undisturbed: Path, root: Path) -> None:
    """Perform one drill, on a copy of the undisturbed sweep as it was before training."""
    began, name = time.monotonic(), page_of(drill)
    print(f"{name}: ops/runbooks/{name}.md", flush=True)
    shutil.copytree(undisturbed, root / "store", ignore=shutil.ignore_patterns(*MADE_BY_TRAINING))
    performed = Drill(root, sweep_below(undisturbed))
    with performed.ends:
        drill(performed)
        performed.require_same_weights()
    print(f"  cured, {time.monotonic() - began:.0f} s", flush=True)


def page_of(drill: Callable[[Drill], None]) -> str:
    """Return the name of a drill's page in ops/runbooks/."""
    return drill.__name__.replace("_", "-")
