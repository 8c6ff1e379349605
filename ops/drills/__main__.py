"""Each runbook's accident and its cure, performed on this machine: `make drills`, or `python -m ops.drills NAME ...`.

A drill runs a small sweep (drill.yaml) into the accident, gives the runbook's commands, and requires what the runbook promises: the
words, the exit codes, and that what is published at the end is bit-equal to the undisturbed sweep's. It shows the commands and the
lines that a person would look for. A name is that of its page in ops/runbooks/.
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

from dis_scale.storage import manifest
from dis_scale.storage.folder import Folder, open_folder
from dis_scale.training import checkpoint

RECIPE = Path(__file__).with_name("drill.yaml")
DONE, FAILED, MISTAKE, HELD, STOPPED = 0, 1, 2, 69, 75
TIMEOUT_S = 300
MADE_BY_TRAINING = ("runs", "evaluation", "report", "tracking.json", "recipe.yaml")


@dataclass
class Drill:
    """One drill's storage, and what its last command said."""

    root: Path
    calm: Path
    said: str = ""
    _logs: dict[int, Path] = field(default_factory=dict)

    @property
    def sweep(self) -> Folder:
        return open_folder(self.root / "store/sweeps/drill")

    def give(self, *settings: str, faults: str = "", ends: int = DONE) -> None:
        """The sweep's command to its end, which has this exit code."""
        self.wait(self.start(*settings, faults=faults), ends)

    def start(self, *settings: str, faults: str = "", recipe: str = str(RECIPE)) -> subprocess.Popen[bytes]:
        overrides = [word for setting in (f"storage.root={self.root}/store", *settings) for word in ("--set", setting)]
        plan = self.root / f"faults-{len(self._logs)}"
        plan.write_text(faults)
        return self._run("dis_scale.sweep", recipe, *overrides, DIS_SCALE_FAULTS=str(plan))

    def dis_scale(self, *words: str) -> None:
        """A `dis-scale` command that ends well."""
        self.wait(self._run("dis_scale.cli", *words), DONE)

    def wait(self, process: subprocess.Popen[bytes], ends: int) -> None:
        code = process.wait(TIMEOUT_S)
        self.said = self._logs[process.pid].read_text()
        require(code == ends, f"exit code {code}, expected {ends}:\n{self.said}")

    def see(self, words: str) -> None:
        """Requires and shows the line with these words (a regular expression)."""
        lines = [line.strip() for line in self.said.splitlines() if re.search(words, line)]
        require(bool(lines), f"nobody said {words!r}:\n{self.said}")
        print(f"    {lines[0]}", flush=True)

    def until_saved(self, process: subprocess.Popen[bytes], points: int) -> None:
        """Waits until training has left so many whole resume points, that at 0 images included."""
        run, deadline = self.sweep / "runs/dit", time.monotonic() + TIMEOUT_S
        while len(list(checkpoint.whole_points(run, (run / "resume").list()))) < points:
            require(process.poll() is None, "the sweep ended too early")
            require(time.monotonic() < deadline, "nothing was saved")
            time.sleep(0.05)

    def _run(self, module: str, *words: str, **environment: str) -> subprocess.Popen[bytes]:
        shown = "dis-scale" if module == "dis_scale.cli" else f"python -m {module}"
        print(
            f"  $ {shown} {shlex.join(words)}".replace(str(self.root), "ROOT").replace(str(RECIPE), RECIPE.name),
            flush=True,
        )
        log = self.root / f"said-{len(self._logs)}"
        variables = os.environ | {"COLUMNS": "250"} | environment
        with log.open("wb") as out:
            process = subprocess.Popen([sys.executable, "-m", module, *words], stdout=out, stderr=out, env=variables)
        self._logs[process.pid] = log
        return process

    def same(self, model: str = "dit") -> None:
        """Requires that all that is published is bit-equal to the undisturbed sweep's."""
        ours, calm = published(self.sweep, model), published(open_folder(self.calm) / "sweeps/drill", "dit")
        require(ours == calm, f"published weights differ from the undisturbed sweep's: {ours} and {calm}")
        print(f"    published at {', '.join(ours)} images: bit-equal to the undisturbed sweep's", flush=True)


def published(sweep: Folder, model: str) -> dict[str, str]:
    """By images: the hash of the weights."""
    run, found = sweep / "runs" / model, dict[str, str]()
    for images in checkpoint.published(run):
        seal = manifest.find(run / "published" / checkpoint.images_name(images))
        assert seal is not None
        found[str(images)] = seal["files"][checkpoint.WEIGHTS_FILE]["sha256"]
    return found


def require(true: bool, words: str) -> None:
    if not true:
        sys.exit(f"drill failed: {words}")


def preempted_sweep(drill: Drill) -> None:
    sweep = drill.start()
    drill.until_saved(sweep, 3)
    sweep.terminate()
    drill.wait(sweep, STOPPED)
    drill.see("stopped as asked; give the same command again to go on")
    drill.give()


def damaged_resume_point(drill: Drill) -> None:
    sweep = drill.start()
    drill.until_saved(sweep, 4)
    sweep.terminate()
    drill.wait(sweep, STOPPED)
    newest = (drill.sweep / "runs/dit/resume").list()[-1]
    file = drill.root / f"store/sweeps/drill/runs/dit/resume/{newest}/weights-00001.safetensors"
    file.write_bytes(flipped(file.read_bytes()))
    drill.give()
    drill.see(f"resume point passed over: .*{newest}/weights-00001.safetensors: damaged: its sha256 differs")


def storage_down(drill: Drill) -> None:
    drill.give(faults="fail at create path=.probe times=5", ends=MISTAKE)
    drill.see("storage .* cannot be used")
    drill.give("train.restarts=0", faults="fail at write path=published/000000000160 times=9", ends=FAILED)
    drill.see("cannot write .*: ConnectionError")
    drill.give(faults="gone at write path=runs/ seconds=20")


def loss_not_finite(drill: Drill) -> None:
    drill.give("train.skips_in_a_row=3", faults="nan at loss rank=1 images=480 times=6", ends=FAILED)
    drill.see("the gradient was not finite in 3 steps in a row")
    (kept,) = (drill.sweep / "runs/dit/evidence").list()
    print(f"    runs/dit/evidence/{kept}: {', '.join((drill.sweep / 'runs/dit/evidence').list(kept))}")
    drill.give()


def stuck_job(drill: Drill) -> None:
    drill.give("train.hang_after_s=30", faults="hang at step rank=1 images=480")
    drill.see("no step ended for 3. s: hanging")
    drill.see("loss noticed .* first new step")


def disk_full(drill: Drill) -> None:
    drill.give(faults="full at write path=resume/000000000480", ends=FAILED)
    drill.see("no space left on the device: free some, then give the same command again")
    drill.give()


def another_cluster(drill: Drill) -> None:
    """Each command starts a Ray of its own: two clusters. The first one's training stands still until it is stopped."""
    first = drill.start("grace_s=5", faults="hang at step rank=0 images=480")
    drill.until_saved(first, 2)
    drill.give(ends=HELD)
    drill.see(f"held by process {first.pid} on .*, which is alive: one writer at a time")
    drill.dis_scale("stop", str(drill.sweep))
    drill.wait(first, STOPPED)
    drill.give()


def roll_back(drill: Drill) -> None:
    shutil.copytree(drill.calm / "sweeps/drill/runs", drill.root / "store/sweeps/drill/runs")
    shutil.copy(drill.calm / "sweeps/drill/recipe.yaml", drill.root / "store/sweeps/drill")
    drill.dis_scale("fork", str(drill.sweep), "dit", "--at", "2880", "--as", "dit-again")
    drill.see("forked .*: goes on from 2880 images")
    drill.wait(drill.start(recipe=f"{drill.sweep}/recipe.yaml"), DONE)
    drill.see("dit-again: attempt 1, 2 workers, from 000000002880-0000")
    drill.same("dit-again")


DRILLS: dict[str, Callable[[Drill], None]] = {
    drill.__name__.replace("_", "-"): drill
    for drill in (
        preempted_sweep, damaged_resume_point, storage_down, loss_not_finite, stuck_job, disk_full, another_cluster,
        roll_back,
    )
}  # fmt: skip


def flipped(data: bytes) -> bytes:
    """The same bytes but for one bit of the last."""
    return data[:-1] + bytes([data[-1] ^ 1])


def undisturbed(scratch: Path) -> Path:
    """The storage of a sweep that nothing happens to."""
    print("an undisturbed sweep, to compare with", flush=True)
    (scratch / "calm").mkdir()
    Drill(scratch / "calm", scratch / "calm/store").give()
    return scratch / "calm/store"


def perform(name: str, calm: Path, root: Path) -> None:
    """One drill, on a copy of the undisturbed sweep as it was before training."""
    began = time.monotonic()
    print(f"{name}: ops/runbooks/{name}.md", flush=True)
    shutil.copytree(calm, root / "store", ignore=shutil.ignore_patterns(*MADE_BY_TRAINING, "mlflow.db*"))
    drill = Drill(root, calm)
    DRILLS[name](drill)
    drill.same()
    print(f"  cured, {time.monotonic() - began:.0f} s", flush=True)


def main(names: list[str], scratch: Path) -> None:
    """The drills of these names, or all."""
    if unknown := set(names) - DRILLS.keys():
        sys.exit(f"no drill {', '.join(unknown)}: there are {', '.join(DRILLS)}")
    calm = undisturbed(scratch)
    for name in names or DRILLS:
        perform(name, calm, scratch / name)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="dis-scale-drills-") as made:
        main(sys.argv[1:], Path(made))
