"""cluster/slurm.sh queues its job again where that helps, by stand-ins of Slurm's and Ray's commands."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dis_scale.recipe import reading
from tests.support.stand_ins import stand_in
from tests.support.waiting import wait_until

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize(
    ("code", "restarts", "signal", "queued"),
    [
        (0, 0, "", False), (1, 0, "", False), (2, 0, "", False), (74, 0, "", True), (74, 999, "", True), (74, 1000, "", False),
        (69, 99, "", True), (69, 100, "", False), (70, 19, "", True), (70, 20, "", False),
        (75, 0, "", False), (75, 0, "TERM", True), (75, 5000, "TERM", True), (74, 0, "TERM", True), (75, 0, "INT", False),
        (74, 0, "INT", False), (137, 99, "", True), (137, 100, "", False), (137, 100, "TERM", True), (1, 0, "TERM", False),
    ],
)  # fmt: skip
def test_slurm_queues_again_what_may_continue(tmp_path: Path, code: int, restarts: int, signal: str, queued: bool) -> None:
    """A time limit or a preemption (TERM), storage that is away, a killed process; not an error, and not after a request to stop
    (INT), which is no failure for Slurm.
    """
    ends_of_slurm(tmp_path).write_text(f"{code}\n" * restarts)
    assert slurm_queues_again(tmp_path, code, restarts, signal) is queued


def test_nodes_of_slurm_that_never_join_end_the_job(tmp_path: Path) -> None:
    """Another environment on a node would keep all of them for a week, ten minutes at a time."""
    ends_of_slurm(tmp_path).write_text("join\n74\n" * 18)
    assert [run_slurm(tmp_path, 0, 0, python="exit 74").returncode for _ in range(2)] == [74, 1]
    assert not ends_of_slurm(tmp_path).exists()
    assert (tmp_path / "asked").read_text() == "requeue 7\n"


@pytest.mark.parametrize(("before", "begins"), [(1, False), (2, True)])
def test_a_node_of_slurm_that_does_not_join_is_done_without(tmp_path: Path, before: int, begins: bool) -> None:
    """One of four whose disk is full would let a sweep of 8 to 32 workers wait for nine days."""
    (tmp_path / "ray.py").write_text("init = lambda **_: None\nnodes = lambda: [{'Alive': True}] * 3\n")
    clock = "import itertools, time; time.monotonic = itertools.count(0, 400).__next__; time.sleep = lambda _: None"
    (tmp_path / "sitecustomize.py").write_text(clock)
    ends_of_slurm(tmp_path).write_text("join\n" * before)
    sweep = "trap : TERM; kill -TERM $PPID; sleep 1; exit 75"
    python = f'[ "$1" = -c ] || {{ {sweep}; }}; exec env SLURM_NNODES=4 PYTHONPATH={tmp_path} {sys.executable} "$@"'
    done = run_slurm(tmp_path, 0, 0, python=python)
    assert "only 3 of 4 nodes joined Ray" in done.stderr
    assert (done.returncode, "the sweep begins with these" in done.stderr) == ((0, True) if begins else (74, False))
    assert ends_of_slurm(tmp_path).read_text() == ("join\njoin\n" if begins else "join\njoin\n74\n"), "also in the next run"


def test_slurms_limits_are_of_runs_since_a_stop(tmp_path: Path) -> None:
    """Time limits and preemptions of three weeks are no crashes, and neither is one of last week. A full home ends nothing."""
    assert slurm_queues_again(tmp_path, 70, 500)
    assert ends_of_slurm(tmp_path).read_text() == "70\n"
    (tmp_path / "asked").unlink()
    assert slurm_queues_again(tmp_path, 75, 500, "TERM")
    assert not ends_of_slurm(tmp_path).exists()
    (tmp_path / "asked").unlink()
    ends_of_slurm(tmp_path).mkdir()  # to which nothing can be written, as on a full disk
    assert slurm_queues_again(tmp_path, 70, 500)


@pytest.mark.parametrize(("wait_s", "least_s", "most_s"), [(240, 30, 30), (20, 10, 20)], ids=["all of it", "what is left"])
def test_prometheus_has_time_for_the_end_before_a_time_limit(tmp_path: Path, wait_s: int, least_s: int, most_s: int) -> None:
    """Otherwise each of twenty such ends in three weeks pages as a sweep that is gone, if the next run queues for 15 minutes."""
    assert run_slurm(tmp_path, 75, 0, "TERM", lost=0, wait_s=wait_s).returncode == 0
    *_, before_requeue, after = (tmp_path / "slept").read_text().split()
    assert after == "60"
    assert least_s <= int(before_requeue) <= most_s


def test_a_request_to_stop_a_job_of_slurm_outlasts_its_time_limit(tmp_path: Path) -> None:
    """Its TERM comes while the sweep still saves."""
    signals = "kill -INT $PPID; until [ -e $HOME/terms ]; do /bin/sleep 0.05; done; kill -TERM $PPID; /bin/sleep 0.5"
    sweep = f'[ "$1" = -c ] && exit 0; trap "echo >> $HOME/terms" TERM; {signals}; exit 75'
    assert run_slurm(tmp_path, 75, 0, python=sweep).returncode == 0
    assert not (tmp_path / "asked").exists()
    assert (tmp_path / "terms").read_text() == "\n", "a second one would end it before it has saved"


def test_slurm_queues_an_error_again_if_rays_head_has_died(tmp_path: Path) -> None:
    """Ray ends processes that lose it, with code 1."""
    assert slurm_queues_again(tmp_path, 1, 0, ray="exit 1")


def test_slurm_says_if_it_cannot_queue_a_job_again(tmp_path: Path) -> None:
    """A job that ends as completed would page nobody."""
    done = run_slurm(tmp_path, 75, 0, signal="TERM", lost=100)
    assert (done.returncode, "not queued again: scontrol requeue failed" in done.stderr) == (1, True)


def test_slurm_queues_a_job_again_whose_sweep_does_not_end_in_time(tmp_path: Path) -> None:
    """Such as one that asks a storage which hangs: Slurm would kill the script with it, and nothing would follow."""
    sweep = '[ "$1" = -c ] && exit 0; trap "" TERM; kill -TERM $PPID; exec /bin/sleep 50'
    began_s = time.monotonic()
    done = run_slurm(tmp_path, 75, 0, python=sweep)
    assert (done.returncode, (tmp_path / "asked").read_text()) == (137, "requeue 7\n")
    assert time.monotonic() - began_s < 30
    found = re.search(r"STOP_WAIT_S:-(\d+)", (ROOT / "cluster/slurm.sh").read_text())
    assert found
    assert reading.load(ROOT / "configs/imagenet256.yaml").grace_s + 60 < int(found[1]) < 300


def test_a_node_of_slurm_whose_raylet_has_ended_joins_again(tmp_path: Path) -> None:
    """Ray takes a node for lost whose network is silent for 30 s, and its raylet ends; its GPUs would wait for the time limit."""
    run_slurm(
        tmp_path, 0, 0, ray=f'[ "$1" = start ] && echo >> {tmp_path}/started; exit 0', srun='SLURM_NODEID=1 exec timeout 3 "$@"'
    )
    wait_until(lambda: len((tmp_path / "started").read_text()) > 2)


def ends_of_slurm(tmp_path: Path) -> Path:
    """The file of the ends of the job's runs."""
    (tmp_path / ".dis-scale").mkdir(exist_ok=True)
    return tmp_path / ".dis-scale/ends-7"


def slurm_queues_again(tmp_path: Path, code: int, restarts: int, signal: str = "", ray: str = "") -> bool:
    """Run the script with a sweep that ends so; return whether the job is queued again."""
    done = run_slurm(tmp_path, code, restarts, signal, ray)
    assert done.returncode == (0 if code == 75 else code)
    assert (tmp_path / "token").read_text() == "600 65\n"
    assert not (tmp_path / ".dis-scale/ray-7.token").exists()
    asked = tmp_path / "asked"
    assert not asked.exists() or asked.read_text() == "requeue 7\n"
    return asked.exists()


def run_slurm(
    tmp_path: Path,
    code: int,
    restarts: int,
    signal: str = "",
    ray: str = "",
    lost: int = 2,
    python: str = "",
    srun: str = "",
    wait_s: int = 5,
) -> subprocess.CompletedProcess[str]:
    """Run the script with a sweep that ends so. Slurm's controller restarts: the first `lost` requests to it are lost."""
    look = 'stat -c "%a %s" "$HOME/.dis-scale/ray-7.token" > "$HOME/token"'
    sweep = f'[ "$1" = -c ] && exit 0; {look}; {f"trap : TERM; kill -{signal} $PPID; sleep 1;" if signal else ""} exit {code}'
    programs = {
        "python": python or sweep,
        "scontrol": f'echo >> {tmp_path}/lost; [ $(wc -l < {tmp_path}/lost) -gt {lost} ] && echo "$@" >> {tmp_path}/asked',
        "sleep": f'echo "$1" >> {tmp_path}/slept; exec /bin/sleep 0.02',
        "srun": srun,
        "ray": ray,
    }
    for name, body in programs.items():
        stand_in(tmp_path, name, body)
    slurm = {
        "SLURM_JOB_ID": "7",
        "SLURM_NNODES": "1",
        "SLURM_RESTART_COUNT": str(restarts),
        "RAY_IP": "127.0.0.1",
        "STOP_WAIT_S": str(wait_s),
    }
    slurm |= {"HOME": str(tmp_path)}
    script = ["env", "--default-signal=INT", "bash", str(ROOT / "cluster/slurm.sh"), "recipe.yaml"]
    environment = os.environ | slurm | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    return subprocess.run(script, env=environment, timeout=60, stderr=subprocess.PIPE, text=True, check=False)
