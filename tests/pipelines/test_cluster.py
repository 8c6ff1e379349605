"""The storage root of a sweep that runs on a cluster."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import requests

from dis_scale.process.errors import StorageAway, UserError
from dis_scale.recipe import reading
from dis_scale.storage.folder import open_folder
from dis_scale.sweep import Sweep
from pipelines import cluster
from pipelines.nodes import LostNode
from pipelines.silence import RayEnded, Silence
from tests.conftest import TINY


def root(
    monkeypatch: pytest.MonkeyPatch, given: str, in_job: bool, one_node: bool = True, probe: Callable[[str], None] = pytest.fail
) -> str:
    """Return the root that a sweep uses for the given one, on a cluster or on this machine."""
    environment = {
        "RAY_ADDRESS": "127.0.0.1:1" if in_job or not one_node else None,
        "RAY_JOB_CONFIG_JSON_ENV_VAR": "{}" if in_job else None,
    }
    for name, value in environment.items():
        monkeypatch.delenv(name, raising=False)
        if value:
            monkeypatch.setenv(name, value)
    return cluster.require_root(reading.load(TINY, [f"storage.root={given}"]), lambda: one_node, probe)


def test_models_begin_only_while_nodes_live_that_declare_training_once_one_did() -> None:
    """The GPUs that are left are for evaluation. A cluster that declares nothing is for all."""
    recipe, left, training = reading.load(TINY, ["train.workers=4"]), {"GPU": 24.0, "evaluate": 8.0}, {"train": 8.0}
    assert cluster.models_at_once(recipe, left, [left]) == 6
    assert cluster.models_at_once(recipe, left | training, [left, training]) == 2
    assert cluster.models_at_once(recipe, left, [left, training]) == 0


def test_missing_gpus_are_refused_before_a_ray_starts() -> None:
    recipe = reading.load(TINY, ["device=cuda", "train.workers=2"])
    cluster.require_gpus(recipe, 2, "")
    words = "device: cuda for 2 workers, but this machine has 1 GPU; 1 too old: --set device=auto takes what is there"
    with pytest.raises(UserError, match=words):
        cluster.require_gpus(recipe, 1, "1 too old")


def test_the_folder_that_a_killed_command_left_is_removed_at_the_next_start() -> None:
    program = "from pipelines.cluster import _own_folder\nwith _own_folder() as own: print(own, flush=True); input()"
    processes = [
        subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    killed, living = (Path(process.stdout.readline().strip()) for process in processes if process.stdout)
    processes[0].kill()
    processes[0].wait()
    assert killed.is_dir(), "nobody was left to remove it"
    with cluster._own_folder() as own:
        assert (killed.exists(), living.exists(), own.exists()) == (False, True, True)
    assert not own.exists()
    processes[1].communicate("", timeout=30)
    assert not living.exists()


@pytest.mark.parametrize(("user", "stays"), [(os.getuid(), False), (os.getuid() + 1, True)], ids=["ours", "another's"])
def test_only_a_users_own_folders_are_removed(user: int, stays: bool) -> None:
    left = Path(tempfile.mkdtemp(prefix=cluster._FOLDER, dir="/tmp"))
    os.mkfifo(pipe := left.with_name(f"{left.name}-pipe"))
    program = f"import os; os.getuid = lambda: {user}\nfrom pipelines.cluster import _own_folder\nwith _own_folder(): pass"
    try:
        subprocess.run([sys.executable, "-c", program], check=True, timeout=60)  # a pipe holds up no start
        assert left.exists() == stays
    finally:
        shutil.rmtree(left, ignore_errors=True)
        pipe.unlink()


def test_an_empty_address_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "")
    recipe = reading.load(TINY, ["storage.root=outputs"])
    assert cluster.require_root(recipe, lambda: pytest.fail("no cluster is asked")) == "outputs"


@pytest.mark.parametrize("in_job", [True, False])
def test_a_root_of_one_node_is_refused_on_several(monkeypatch: pytest.MonkeyPatch, in_job: bool) -> None:
    with pytest.raises(UserError, match=r"storage.root: 'outputs' is a folder of one node, and this cluster has several: .*s3://"):
        root(monkeypatch, "outputs", in_job=in_job, one_node=False)


def test_a_complete_path_on_several_nodes_is_probed_on_each(monkeypatch: pytest.MonkeyPatch) -> None:
    probed: list[str] = []
    assert root(monkeypatch, "/shared/disk", True, False, probed.append) == "/shared/disk"
    assert probed == ["/shared/disk"]


@pytest.mark.parametrize(
    ("stored", "in_job", "error"), [(False, True, UserError), (True, False, UserError), (True, True, LostNode)]
)
def test_a_mount_that_breaks_under_a_stored_sweep_ends_no_job_for_good(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stored: bool, in_job: bool, error: type[Exception]
) -> None:
    """One node's, on which the next job need not run. At a first start it is a mistake."""

    def probe(url: str) -> None:
        raise UserError(f"storage.root: {url} cannot be used on node-7: Permission denied")

    if stored:
        Sweep.below(open_folder(tmp_path), reading.load(TINY)).save_recipe()
    with pytest.raises(error, match="cannot be used on node-7") as raised:
        root(monkeypatch, str(tmp_path), in_job, False, probe)
    assert (getattr(raised.value, "exit_code", 0) == StorageAway.exit_code) == (stored and in_job)


def test_in_a_job_on_one_node_a_relative_root_is_below_the_home(monkeypatch: pytest.MonkeyPatch) -> None:
    assert root(monkeypatch, "outputs", in_job=True) == str(Path.home() / "dis-scale/outputs")


@pytest.mark.parametrize(("given", "in_job"), [("outputs", False), ("s3://bucket/prefix", True), ("/shared/disk", True)])
def test_any_other_root_is_used_as_it_is(monkeypatch: pytest.MonkeyPatch, given: str, in_job: bool) -> None:
    assert root(monkeypatch, given, in_job) == given


def test_a_dashboard_that_needs_long_for_its_first_answer_is_asked_again() -> None:
    """On a loaded machine requests give up before it."""
    lost = iter([requests.ReadTimeout("10 s"), requests.ConnectionError("refused"), ConnectionError("refused")])

    def ask() -> None:
        if error := next(lost, None):
            raise error

    with subprocess.Popen(["sleep", "60"]) as head:
        assert cluster.answers(head, ask, lambda: None)
        assert not cluster.answers(head, lambda: 1 / 0, lambda: None, time_s=0)
        head.kill()
    assert not cluster.answers(head, lambda: 1 / 0, lambda: None)


def test_a_ray_of_our_own_that_has_ended_is_not_waited_for(tmp_path: Path) -> None:
    """Its dashboard was asked again for 15 minutes."""
    with subprocess.Popen(["sleep", "60"]) as head:
        cluster._require_alive(head, tmp_path)
        head.kill()
    (tmp_path / "start.log").write_text("Some Ray subprocesses exited unexpectedly:\n  raylet\n")
    silence = Silence(pytest.fail, require_alive=partial(cluster._require_alive, head, tmp_path))
    with pytest.raises(RayEnded, match="has ended: Some Ray subprocesses exited unexpectedly: raylet"):
        silence.ask(Path("/nowhere").read_text)
