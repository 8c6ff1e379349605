"""An encoder that is lost costs its shard: the others continue, the next attempt makes it, and the set has the same bytes."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from dis_scale import faults, vae
from dis_scale.data import shards
from dis_scale.storage.folder import open_folder
from dis_scale.sweep import Sweep
from pipelines import jobs
from tests.support import clusters, stages, sweeps
from tests.support.clusters import RayNodes
from tests.support.labelled_images import png, tar

SMALL = (
    "vae={kind: none}", "data.resolution=16", "data.num_classes=20", "precompute.shard_images=8",
    "precompute.encode_images=8", "precompute.workers=2",
)  # fmt: skip


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The fault plan of all processes on Ray."""
    path = tmp_path / "faults"
    path.write_text("kill at written path=staged/000004.bin\nkill at written path=000003.tar\n")
    monkeypatch.setenv(faults.VARIABLE, str(path))
    return path


@pytest.fixture
def nodes(plan: Path) -> Iterator[RayNodes]:
    made = RayNodes(cpus=2)
    yield made
    made.stop()


def sweep_of(root: Path, images: Path) -> Sweep:
    source = f"data.source={{kind: tar, url: {images}, label: tar}}"
    sweep = sweeps.sweep_at(root, source, *SMALL)
    sweep.save_recipe()
    return sweep


def latents_of(sweep: Sweep) -> dict[str, bytes]:
    folder = shards.latents_folder(sweep, vae.PixelVae().identity)
    return {name: folder.read(name) for name in folder.list()}


def test_a_lost_encoder_and_a_lost_mixer_cost_what_they_had_begun(nodes: RayNodes, plan: Path, tmp_path: Path) -> None:
    for n in range(20):
        open_folder(tmp_path / "images").write(f"{n:02d}.tar", tar({f"{i}.png": png(i) for i in range(8)}))
    sweep = sweep_of(tmp_path / "lost", tmp_path / "images")
    job = jobs.submit(nodes.cluster(), sweep, "precompute")
    assert clusters.wait_for_end(job) == "SUCCEEDED", job.reason()
    assert len(list(plan.with_name("faults.spent").iterdir())) == 2, "both faults have happened"
    log = "\n".join(job.lines())
    assert log.count("restart from the stored state") == 2
    assert log.index("1 others continue") < log.index("restart from the stored state")

    calm = sweep_of(tmp_path / "calm", tmp_path / "images")
    none = tmp_path / "none"
    none.write_text("")
    code, output = stages.run("precompute", calm, none)
    assert code == 0, output
    assert latents_of(sweep) == latents_of(calm)
