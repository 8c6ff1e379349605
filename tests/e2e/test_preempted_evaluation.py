"""An evaluation whose workers are taken away twenty times ends, and its samples are those of one that nobody disturbed."""

from pathlib import Path

import pytest

from dis_scale.process import faults
from dis_scale.sweep import Sampled, Sweep
from tests.support import clusters, stages, sweeps
from tests.support.clusters import RayNodes

pytestmark = pytest.mark.faults
SETTINGS = (
    f"models={stages.ONE_MODEL}", "evaluate.variants={}", "train.publish_images=[0, 160]", "train.restarts=3",
    "evaluate.samples=1200", "evaluate.block_images=40", "evaluate.workers=2",
)  # fmt: skip
KILLS = 20


def test_twenty_preemptions_within_one_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = sweeps.sweep_at(tmp_path / "store", *SETTINGS)
    stages.prepare_and_precompute(sweep, tmp_path / "none")
    plan = tmp_path / "faults"
    plan.write_text("".join(f"kill at write path=000000000160/block-{n:05d}\n" for n in range(3, 3 + KILLS)))
    monkeypatch.setenv(faults.VARIABLE, str(plan))
    nodes = RayNodes(cpus=2)
    try:
        for stage in (("train", "dit"), ("evaluate",)):
            job = clusters.submit(nodes.cluster(), sweep, *stage)
            assert clusters.wait_for_end(job) == "SUCCEEDED", job.reason()
    finally:
        nodes.stop()
    assert len(list(plan.with_name("faults.spent").iterdir())) == KILLS, "all of them have happened"
    undisturbed = samples(sweep)
    sweep.evaluations("dit").delete()
    plan.write_text("")
    code, output = stages.run("evaluate", sweep, plan)
    assert code == 0, output
    assert samples(sweep) == undisturbed


def samples(sweep: Sweep) -> dict[str, bytes]:
    folder = sweep.evaluation(Sampled("dit", 160))
    return {name: folder.read(name) for name in folder.list() if name.startswith("block-")}
