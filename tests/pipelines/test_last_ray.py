"""Which Ray a command uses, and where a sweep may continue."""

import io
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from dis_scale.process.errors import UserError
from dis_scale.recipe import PretrainedVae, reading
from dis_scale.storage import lease
from dis_scale.storage.folder import Folder, open_folder
from dis_scale.storage.lease import Holding
from dis_scale.sweep import Sweep, command_lease
from dis_scale.sweep.documents import LastRay
from pipelines import last_ray
from pipelines import sweep as pipeline
from pipelines.cluster import Cluster
from pipelines.stop import stop_sweep
from tests.conftest import TINY

ON_A_CLUSTER = LastRay(host="old-head", gpus=16)
ON_THIS_MACHINE = LastRay(address="http://127.0.0.1:1", host=socket.gethostname())


def stored(root: Path, last: LastRay | None = None) -> Sweep:
    recipe = reading.load(TINY, ["train.restarts=7", f"storage.root={root}"])
    sweep = Sweep.below(open_folder(root), recipe)
    sweep.save_recipe()
    if last:
        last.write(sweep.folder)
    return sweep


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_CLUSTER_NAME", raising=False)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)


def test_the_ray_is_named_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=io.StringIO(), width=200, record=True)
    sweep = stored(tmp_path, ON_A_CLUSTER)
    with pytest.raises(UserError):
        pipeline.run_sweep(pipeline.resumed_recipe(sweep, []), console)
    assert console.export_text().startswith("ray      one of its own on this machine (no RAY_ADDRESS)\nsweep ")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert last_ray.words() == "the cluster at RAY_ADDRESS=10.0.0.1:6379"


HOLD = """
import os, signal, sys, time
from dis_scale.storage import lease
from dis_scale.storage.folder import open_folder
if os.fork():
    os._exit(0)  # as a job whose command was killed: nobody of this test waits for it
with lease.hold(open_folder(sys.argv[1])):
    signal.signal(signal.SIGTERM, signal.SIG_IGN if sys.argv[2] == "deaf" else lambda *_: sys.exit(75))
    while True:
        time.sleep(0.05)
"""


def leave(folder: Folder, how: str) -> Holding:
    """Let a process that no command owns hold a lease."""
    subprocess.run([sys.executable, "-c", HOLD, folder.url, how], check=True)
    deadline = time.monotonic() + 60
    while not (holding := lease.last_holding(folder)) or not holding.alive:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return holding


def test_jobs_that_a_killed_command_left_are_ended_before_the_next_continues(tmp_path: Path) -> None:
    """By a request to stop, and by force if they do not hear it; those of a cluster are left alone."""
    sweep = stored(tmp_path, ON_A_CLUSTER)
    sweep = replace(sweep, recipe=sweep.recipe.model_copy(update={"grace_s": 1.0}))
    evaluate, train = leave(sweep.lease("evaluate"), "listening"), leave(sweep.run("dis").lease, "deaf")
    said = list[str]()
    last_ray.end_left_jobs(sweep, said.append, lambda: None)
    assert (said, evaluate.alive, train.alive) == ([], True, True)
    ON_THIS_MACHINE.changed(at=time.time()).write(sweep.folder)  # they are of a cluster that has refused a command of this machine
    last_ray.end_left_jobs(sweep, said.append, lambda: None)
    assert (said, evaluate.alive, train.alive) == ([], True, True)
    ON_THIS_MACHINE.write(sweep.folder)
    last_ray.end_left_jobs(sweep, said.append, lambda: None)
    assert [line.partition(", process")[0] for line in said] == [
        "left     evaluate of a command that was killed",
        "left     train dis of a command that was killed",
    ]
    assert (evaluate.gone, train.gone) == (True, True)
    with lease.hold(sweep.lease("evaluate")), lease.hold(sweep.run("dis").lease) as next_one:
        assert next_one.number == 2
    last_ray.end_left_jobs(sweep, said.append, lambda: None)
    assert len(said) == 2, "nothing is left"


def test_the_sweep_of_a_cluster_does_not_start_here_and_says_what_to_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = stored(tmp_path, ON_A_CLUSTER)
    monkeypatch.setenv("RAY_ADDRESS", "")  # as good as none
    before = sweep.folder.list()
    there = sweep.recipe.model_copy(update={"vae": PretrainedVae(kind="pretrained", path="/models/of-the-cluster")})
    for recipe in (pipeline.resumed_recipe(sweep, []), sweep.recipe, there):
        with pytest.raises(UserError, match=r"16 GPUs .*old-head.*: nothing was started here") as raised:
            pipeline.run_sweep(recipe, quiet())
        submit = "ray job submit --address http://old-head:8265 --working-dir . -- python -m dis_scale resume"
        assert f"{submit} {sweep}" in str(raised.value)
    assert sweep.folder.list() == before, "no lease was taken, and nothing stored"


def test_a_sweep_of_kuberay_is_sent_to_its_rayjob(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"kubectl delete rayjob NAME \(or job NAME\), then kubectl apply -f its file \(.*was imagenet256-x7k"
    ):
        last_ray.refuse_local_after_cluster(stored(tmp_path, ON_A_CLUSTER.changed(kuberay="imagenet256-x7k")))


@pytest.mark.parametrize(
    ("kind", "typed"),
    [
        ({"kuberay": "imagenet256-x7k"}, "apply -f its file with --set train.hang_after_s=300 --set 'models={a: 1}' at the end"),
        ({"slurm": "4711"}, "resume SWEEP --set train.hang_after_s=300 --set 'models={a: 1}' (the last job was 4711)"),
        ({}, "-- python -m dis_scale resume SWEEP --set train.hang_after_s=300 --set 'models={a: 1}'. To continue on"),
    ],
    ids=["KubeRay", "Slurm", "Ray"],
)  # fmt: skip
def test_overrides_that_are_typed_elsewhere_are_not_lost(tmp_path: Path, kind: dict[str, str], typed: str) -> None:
    sweep = stored(tmp_path, ON_A_CLUSTER.changed(**kind))
    with pytest.raises(UserError) as raised:
        last_ray.refuse_local_after_cluster(sweep, ["train.hang_after_s=300", "models={a: 1}"])
    assert typed.replace("SWEEP", str(sweep)) in str(raised.value)


def test_a_sweep_of_slurm_is_sent_to_sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Slurm job has a Ray of its own, which ended with it, and its nodes' names are of no use."""
    sweep = stored(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    last_ray.record(sweep, joined_cluster())
    with pytest.raises(UserError) as raised:
        last_ray.refuse_local_after_cluster(sweep)
    assert f"sbatch cluster/slurm.sh resume {sweep} (the last job was 4711)" in str(raised.value)


@pytest.mark.parametrize("last", [None, ON_THIS_MACHINE])
def test_any_other_sweep_may_start_here(tmp_path: Path, last: LastRay | None) -> None:
    last_ray.refuse_local_after_cluster(stored(tmp_path, last))


def test_on_a_cluster_any_sweep_may_continue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    for last in (None, ON_A_CLUSTER, ON_THIS_MACHINE):
        last_ray.refuse_local_after_cluster(stored(tmp_path, last))


def test_what_is_recorded_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = stored(tmp_path)
    monkeypatch.setenv("RAY_CLUSTER_NAME", "imagenet256-x7k")
    last_ray.record(sweep, joined_cluster())
    last = LastRay.read(sweep.folder)
    assert last == LastRay(host=socket.gethostname(), gpus=16, kuberay="imagenet256-x7k", at=last.at)
    assert time.time() - last.at < 60
    with pytest.raises(UserError, match=f"it last ran on {socket.gethostname()}.*--address"):
        last_ray.address_of(sweep)


@pytest.mark.parametrize(
    ("kind", "typed"), [("kuberay", "kubectl delete rayjob NAME .*imagenet256-7"), ("slurm", "scancel JOB .*imagenet256-7")]
)
def test_a_stop_names_how_to_take_a_job_out_of_its_queue(tmp_path: Path, kind: str, typed: str) -> None:
    """While the job only waits, no command reads the request in storage."""
    with pytest.raises(UserError, match=f"if it waits in a queue: {typed}"):
        last_ray.address_of(stored(tmp_path, ON_A_CLUSTER.changed(**{kind: "imagenet256-7"})))


def test_nothing_is_to_stop_after_a_sweep_has_ended_on_a_ray_of_its_own(tmp_path: Path) -> None:
    """A stop is always safe; one whose command was killed may have left jobs on a Ray that does not answer."""
    sweep = stored(tmp_path, ON_THIS_MACHINE.changed(address="http://127.0.0.1:1"))
    with pytest.raises(UserError, match=r"no Ray answers at http://127\.0\.0\.1:1"):
        stop_sweep(sweep.folder.url, None)
    with lease.hold(command_lease(sweep.folder)):
        pass
    assert stop_sweep(sweep.folder.url, None) == []


def test_a_damaged_file_is_named_and_counts_as_missing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    damaged = stored(tmp_path)
    damaged.folder.write(LastRay.NAME, b'{"format": 1, "gpus": 16}')
    assert LastRay.find_intact(damaged.folder) is None
    assert "ray.json: damaged: host: Field required; treated as missing" in caplog.text


def test_a_resumed_sweep_has_its_own_settings_and_the_new_ones(tmp_path: Path) -> None:
    """Also after its storage root was renamed, which the stored recipe does not know."""
    begun = stored(tmp_path / "before")
    (tmp_path / "before").rename(tmp_path / "after")
    moved = Sweep.open(str(begun).replace("before", "after"))
    recipe = pipeline.resumed_recipe(moved, ["train.hang_after_s=50"])
    assert (recipe.train.restarts, recipe.train.hang_after_s) == (7, 50)
    assert recipe.storage.root == str(tmp_path / "after")


@pytest.mark.parametrize("setting", ["name=other", "storage.root=/elsewhere", "storage={root: /elsewhere}"])
def test_a_stored_sweep_keeps_its_name_and_its_place(tmp_path: Path, setting: str) -> None:
    """The settings with which it began, which hints repeat, change neither."""
    sweep = stored(tmp_path)
    with pytest.raises(UserError, match=f"{sweep} keeps its name and its place: got .*; dis-scale sweep RECIPE begins another"):
        pipeline.resumed_recipe(sweep, ["train.restarts=7", setting])
    same = pipeline.resumed_recipe(sweep, [f"name={sweep.recipe.name}", f"storage.root={tmp_path}"])
    assert (same.name, same.storage.root) == (sweep.recipe.name, str(tmp_path))


def test_starting_over_is_an_act_of_one_command(tmp_path: Path) -> None:
    first = pipeline.resumed_recipe(stored(tmp_path), ["train.start_over=true"])
    Sweep.below(open_folder(tmp_path), first).save_recipe()
    second = pipeline.resumed_recipe(Sweep.open(f"{tmp_path}/sweeps/tiny"), [])
    assert (first.train.start_over, second.train.start_over) == (True, False)


def test_a_sweep_in_a_folder_of_another_name_is_refused(tmp_path: Path) -> None:
    sweep = stored(tmp_path)
    (tmp_path / "sweeps/tiny").rename(tmp_path / "sweeps/copy")
    with pytest.raises(UserError, match=f"sweeps/copy holds the sweep tiny, which belongs into {sweep}: move it"):
        pipeline.resumed_recipe(Sweep.open(str(tmp_path / "sweeps/copy")), [])


def joined_cluster() -> Cluster:
    return Cluster(None, {}, "a cluster", ours=False, at_once=lambda: 1, gpus=lambda: 16, gpu_fault="", id="c")


def quiet() -> Console:
    return Console(file=io.StringIO())
