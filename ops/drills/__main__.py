"""Perform each runbook's accident and its cure on this machine: `make drills`, or `python -m ops.drills NAME ...`.

A drill runs a small sweep (drill.yaml) into the accident and runs the runbook's commands. It checks what the runbook promises:
log lines, exit codes, and published weights that are bit-equal to those of an undisturbed sweep. It prints the commands and the
lines that an operator would look for. A drill has the name of its page in ops/runbooks/.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from dis_scale.recipe import reading
from dis_scale.storage import manifest
from dis_scale.storage.folder import open_folder
from dis_scale.sweep import RECIPE as STORED_RECIPE
from dis_scale.sweep import Run, Sweep, state
from dis_scale.training import checkpoint

RECIPE = Path(__file__).with_name("drill.yaml")
MODEL = "dit"
DONE, FAILED, MISTAKE, HELD, STOPPED = 0, 1, 2, 69, 75
TIMEOUT_S = 300
MADE_BY_TRAINING = ("runs", "evaluation", "report", "tracking.json", "recipe.yaml")
"""Files and folders of a sweep that a drill does not copy from the undisturbed one."""


def sweep_below(store: Path) -> Sweep:
    return Sweep.below(open_folder(store), reading.load(RECIPE))


@dataclass
class Drill:
    """One drill: its storage, and the output of its last command."""

    root: Path
    undisturbed: Sweep
    output: str = ""
    _logs: dict[int, Path] = field(default_factory=dict)

    @property
    def sweep(self) -> Sweep:
        return sweep_below(self.root / "store")

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
        begun = (
            ["resume", str(self.sweep)] if resumes else ["sweep", str(RECIPE), f"--set=storage.root={self.root}/store"]
        )
        plan = self.root / f"faults-{len(self._logs)}"
        plan.write_text(faults)
        overrides = [word for setting in settings for word in ("--set", setting)]
        return self._start(*begun, *overrides, DIS_SCALE_FAULTS=str(plan))

    def dis_scale(self, *words: str) -> None:
        """Run a `dis-scale` command and require exit code 0."""
        self.wait(self._start(*words), DONE)

    def wait(self, process: subprocess.Popen[bytes], ends: int) -> None:
        code = process.wait(TIMEOUT_S)
        self.output = self._logs[process.pid].read_text()
        require(code == ends, f"exit code {code}, expected {ends}:\n{self.output}")

    def expect(self, pattern: str) -> None:
        """Require a line that matches this regular expression, and print it."""
        lines = [line.strip() for line in self.output.splitlines() if re.search(pattern, line)]
        require(bool(lines), f"no line matches {pattern!r}:\n{self.output}")
        print(f"    {lines[0]}", flush=True)

    def until_saved(self, process: subprocess.Popen[bytes], points: int) -> None:
        """Wait until training has left this many complete resume points, including the one at 0 images."""
        deadline = time.monotonic() + TIMEOUT_S
        while len(list(state.complete_points(self.run, state.point_names(self.run)))) < points:
            require(process.poll() is None, "the sweep ended too early")
            require(time.monotonic() < deadline, "nothing was saved")
            time.sleep(0.05)

    def _start(self, *words: str, **environment: str) -> subprocess.Popen[bytes]:
        print(
            f"  $ dis-scale {shlex.join(words)}".replace(str(self.root), "ROOT").replace(str(RECIPE), RECIPE.name),
            flush=True,
        )
        log = self.root / f"output-{len(self._logs)}"
        variables = os.environ | {"COLUMNS": "250"} | environment
        with log.open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", "dis_scale", *words], stdout=out, stderr=out, env=variables
            )
        self._logs[process.pid] = log
        return process

    def require_same_weights(self, model: str = MODEL) -> None:
        """Require that all published weights are bit-equal to the undisturbed sweep's."""
        ours = published_hashes(Sweep.open(self.sweep.folder.url).run(model))  # as stored: a fork adds its model
        theirs = published_hashes(self.undisturbed.run(MODEL))
        require(ours == theirs, f"published weights differ from the undisturbed sweep's: {ours} and {theirs}")
        print(f"    published at {', '.join(ours)} images: bit-equal to the undisturbed sweep's", flush=True)


def published_hashes(run: Run) -> dict[str, str]:
    """Return the hash of the published weights by image count."""
    hashes = {}
    for images in state.published_counts(run):
        contents = manifest.require(run.published_at(images))
        weights = checkpoint.stored_file(checkpoint.WEIGHTS_FILE, contents)
        assert weights is not None
        hashes[str(images)] = contents["files"][weights]["sha256"]
    return hashes


def require(true: bool, words: str) -> None:
    if not true:
        sys.exit(f"drill failed: {words}")


def preempted_sweep(drill: Drill) -> None:
    sweep = drill.start()
    drill.until_saved(sweep, 3)
    sweep.terminate()
    drill.wait(sweep, STOPPED)
    drill.expect("stopped as requested; to continue: dis-scale resume")
    drill.resume()


def damaged_resume_point(drill: Drill) -> None:
    sweep = drill.start()
    drill.until_saved(sweep, 4)
    sweep.terminate()
    drill.wait(sweep, STOPPED)
    newest = state.point_names(drill.run)[-1]
    folder, name = drill.run.resume_point(newest), "weights-00001.safetensors"
    folder.write(name, flipped(folder.read(name)))
    drill.resume()
    drill.expect(f"resume point passed over: .*{newest}/{name}: damaged: its sha256 differs")


def storage_down(drill: Drill) -> None:
    drill.run_sweep(faults="fail at create path=.probe times=5", ends=MISTAKE)
    drill.expect("storage .* cannot be used")
    drill.run_sweep("train.restarts=0", faults="fail at write path=published/000000000160 times=9", ends=FAILED)
    drill.expect("cannot write .*: ConnectionError")
    drill.resume(faults="gone at write path=runs/ seconds=20")


def loss_not_finite(drill: Drill) -> None:
    drill.run_sweep("train.skips_in_a_row=3", faults="nan at loss rank=1 images=480 times=6", ends=FAILED)
    drill.expect("the gradient was not finite in 3 steps in a row")
    dump = re.search(r"losses and weights are in (\S+/\d{12}-\d{4})", drill.output)
    assert dump is not None
    print(f"    {dump[1].replace(str(drill.root), 'ROOT')}: {', '.join(open_folder(dump[1]).list())}")
    drill.resume()


def stuck_job(drill: Drill) -> None:
    drill.run_sweep("train.hang_after_s=30", faults="hang at step rank=1 images=480")
    drill.expect("no step ended for 3. s: hanging")
    drill.expect("failure noticed .* first new step")


def disk_full(drill: Drill) -> None:
    drill.run_sweep(faults="full at write path=resume/000000000480", ends=FAILED)
    drill.expect("no space left on the device: free some, then run the same command again")
    drill.resume()


def another_cluster(drill: Drill) -> None:
    """Each command starts its own Ray, so there are two clusters. Training on the first one hangs until it is stopped."""
    first = drill.start("grace_s=5", faults="hang at step rank=0 images=480")
    drill.until_saved(first, 2)
    drill.run_sweep(ends=HELD)
    drill.expect(f"held by process {first.pid} on .*, which is alive: one writer at a time")
    drill.dis_scale("stop", str(drill.sweep))
    drill.wait(first, STOPPED)
    drill.resume()


def roll_back(drill: Drill) -> None:
    ours, theirs = local(drill.sweep), local(drill.undisturbed)
    shutil.copytree(theirs / "runs", ours / "runs")
    shutil.copy(theirs / STORED_RECIPE, ours)
    drill.dis_scale("fork", str(drill.sweep), MODEL, "--at", "2880", "--as", "dit-again")
    drill.expect("forked .*: continues from 2880 images")
    drill.resume()
    drill.expect("dit-again: attempt 1, 2 workers, from 000000002880-0000")
    drill.require_same_weights("dit-again")


DRILLS: dict[str, Callable[[Drill], None]] = {
    drill.__name__.replace("_", "-"): drill
    for drill in (
        preempted_sweep, damaged_resume_point, storage_down, loss_not_finite, stuck_job, disk_full, another_cluster,
        roll_back,
    )
}  # fmt: skip


def flipped(data: bytes) -> bytes:
    """Return the same bytes with one bit of the last one flipped."""
    return data[:-1] + bytes([data[-1] ^ 1])


def local(sweep: Sweep) -> Path:
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


def perform(name: str, undisturbed: Path, root: Path) -> None:
    """Perform one drill, on a copy of the undisturbed sweep as it was before training."""
    began = time.monotonic()
    print(f"{name}: ops/runbooks/{name}.md", flush=True)
    shutil.copytree(undisturbed, root / "store", ignore=shutil.ignore_patterns(*MADE_BY_TRAINING, "mlflow.db*"))
    drill = Drill(root, sweep_below(undisturbed))
    DRILLS[name](drill)
    drill.require_same_weights()
    print(f"  cured, {time.monotonic() - began:.0f} s", flush=True)


def main(names: list[str], scratch: Path) -> None:
    """Perform the drills of these names, or all."""
    if unknown := set(names) - DRILLS.keys():
        sys.exit(f"no drill {', '.join(unknown)}: there are {', '.join(DRILLS)}")
    undisturbed = run_undisturbed(scratch)
    for name in names or DRILLS:
        perform(name, undisturbed, scratch / name)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="dis-scale-drills-") as scratch:
        main(sys.argv[1:], Path(scratch))
