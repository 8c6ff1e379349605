"""Faults in complete sweeps on Ray: the command succeeds, alone or after reruns, with the undisturbed sweep's results."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from dis_scale.storage.folder import open_folder
from dis_scale.tracking.rows import Row, RowReader
from tests.support import fault_plans, stages, sweeps

pytestmark = pytest.mark.timeout(1800)  # up to four sweeps, on a busy machine
SETTINGS = (f"models={stages.ONE_MODEL}", "train.hang_after_s=30")


def run(root: Path, plan: str) -> tuple[list[int], str]:
    """Run the command until it succeeds, at most 4 times; return its exit codes and its output."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "faults").write_text(plan)
    codes, output = list[int](), ""
    while 0 not in codes and len(codes) < 4:
        done = sweeps.run(str(root / "store"), *SETTINGS, DIS_SCALE_FAULTS=str(root / "faults"))
        codes, output = [*codes, done.returncode], output + done.stdout + done.stderr
    return codes, output


def made(root: Path) -> dict[str, Any]:
    """Return everything that is made once, by name: hashes of files, values of metrics, rows of the run."""
    store = root / "store"
    patterns = ("latents/*/*.tar", "*/*/vae/*.safetensors", "*/*/extractors/**/*.safetensors")
    files = {p for pattern in patterns for p in store.glob(pattern)} | set(store.glob("*/*/evaluation/*/*/samples.png"))
    results: dict[str, Any] = {str(p.relative_to(store)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    for path in store.glob("*/*/runs/*/published/*"):
        results[str(path.relative_to(store))] = fault_plans.published_hashes(open_folder(path))
    for path in store.glob("*/*/evaluation/**/metrics.json"):
        results[str(path.relative_to(store))] = json.loads(path.read_text())["values"]
    return results | {"rows": sorted((r.name, r.images, r.value) for r in rows(root) if r.name not in fault_plans.TIMED)}


def rows(root: Path) -> list[Row]:
    return RowReader(open_folder(root / "store/sweeps/tiny/runs/dit/log")).new()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("undisturbed")
    codes, output = run(root, "")
    assert codes == [0], output
    results = made(root)
    assert len(results) > 12
    return results


WORKERS_DIE = """
kill at written path=vae/
kill at written path=000001.tar
kill at step rank=1 images=64
hang at step rank=0 images=208
kill at written path=block-00001.npz
"""
DRIVERS_DIE = """
kill at poll path=precompute
kill at poll path=train images=16
wait at step rank=0 images=112 until=1.0
kill at poll path=evaluate images=60
wait at write path=evaluation/*/block-00001.npz until=3.0
"""
RESOURCES_FAIL = """
kill at written path=resume/000000000160-0001/exp_avg-00000 rank=0
memory at step images=208
gone at write path=published/000000000320 seconds=20
"""
COMMANDS_END = """
stop at poll path=train
full at write path=resume/000000000240
"""
FAULTS = {
    "a worker of every stage dies, a rank hangs": (WORKERS_DIE, [0]),
    "the driver of every stage dies": (DRIVERS_DIE, [0]),
    "killed in a save, a GPU's memory too small, storage gone while publishing": (RESOURCES_FAIL, [0]),
    "a stop request, then a full disk": (COMMANDS_END, [75, 1, 0]),
}
"""Several faults a sweep, one after the other: most of its time is the start of its processes. tests/faults/test_stages.py and
test_training.py have each fault alone, without Ray."""


@pytest.mark.faults
@pytest.mark.parametrize(("plan", "codes"), FAULTS.values(), ids=FAULTS)
def test_the_sweep_ends_as_undisturbed(tmp_path: Path, undisturbed: dict[str, Any], plan: str, codes: list[int]) -> None:
    ended, output = run(tmp_path, plan)
    assert fault_plans.left(tmp_path) == [], output
    assert ended == codes, output
    assert made(tmp_path) == undisturbed
    if "hang" in plan:
        (restart,) = [row for row in rows(tmp_path) if row.name == "noticed_s" and row.value >= 30]
        assert 0 < restart.images < 320
