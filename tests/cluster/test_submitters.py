"""The commands that submit a sweep follow it to its end, by a stand-in of Ray's command."""

import os
import re
import shlex
import subprocess
import time
from itertools import groupby
from pathlib import Path

import pytest

from tests.support import pods
from tests.support.stand_ins import stand_in

RUNS = "Status for job 'j': RUNNING"


@pytest.mark.parametrize(
    ("states", "code", "asked"),
    [
        (["", "", RUNS, "Job 'j' succeeded"], 0, ["submit sweep-u-1", "logs sweep-u-1"]),
        (["Job 'j' failed", "", "", "Job 'j' failed"], 1, ["submit sweep-u-2", "logs sweep-u-2"]),
        ([RUNS, RUNS, RUNS, "Job 'j' was stopped"], 0, ["logs sweep-u-1"]),
        (["Job 'j' was stopped", "Job 'j' was stopped", "Job 'j' was stopped"], 0, ["logs sweep-u-1"]),
        ([RUNS, RUNS, RUNS, ""], 1, ["logs sweep-u-1"]),
    ],
    ids=["succeeds", "fails again", "a second pod", "a second pod after a stop", "the head is lost"],
)
def test_the_job_beside_a_cluster_follows_its_sweep_and_begins_a_failed_one_again(
    tmp_path: Path, states: list[str], code: int, asked: list[str]
) -> None:
    """Its pod may be replaced ten times: each sweep that joined the first would stay in the head's memory."""
    job = {document["kind"]: document["spec"] for document in pods.documents(pods.JOBS[1])}["Job"]
    (container,) = job["template"]["spec"]["containers"]
    assert job["template"]["spec"]["restartPolicy"] == "OnFailure"
    done, calls = submitted(tmp_path, container["command"], states, JOB_UID="u")
    assert done == code
    assert [f"{call[1]} {''.join(re.findall('sweep-u-[0-9]', ' '.join(call[:5])))}" for call in calls] == asked
    for call in calls:
        if call[1] == "submit":
            assert call[call.index("--") + 1 :] == shlex.split(container["command"][-1])


def submitted(
    tmp_path: Path, command: list[str], states: list[str], logs: str = "", **environment: str
) -> tuple[int, list[list[str]]]:
    """Run a submitter with a `ray` that answers so when asked for a job's state; return its exit code and its other calls.

    Its calls for the log are returned once, however often it asks again; `logs` is what these do.
    """
    (answers := tmp_path / "answers").write_text("".join(f"{state}\n" for state in states))
    answer = f'line=$(head -1 {answers}); sed -i 1d {answers}; [ -n "$line" ] && echo "$line"'
    written = f"printf '%s|' \"$@\" >> {tmp_path}/asked; echo >> {tmp_path}/asked"
    logged = f'case "$2" in submit) {written};; logs) {written}; {logs or ":"};; status) {answer};; esac'
    stand_in(tmp_path, "ray", logged)
    stand_in(tmp_path, "sleep")
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(command, env=os.environ | environment | path, timeout=60, check=False)
    asked = groupby((tmp_path / "asked").read_text().splitlines())
    return done.returncode, [call.split("|")[:-1] for call, _ in asked]


@pytest.mark.parametrize(
    ("known", "states", "code", "asked"),
    [
        (False, [RUNS, "Job 'j' succeeded"], 0, ["submit", "logs"]),
        (False, ["Job 'j' failed"], 0, ["submit", "logs"]),
        (True, [RUNS, RUNS, "Job 'j' was stopped"], 0, ["logs"]),
        (False, [RUNS], 1, ["submit", "logs"]),
    ],
    ids=["succeeds", "fails", "a second pod", "the head is lost"],
)
def test_the_submitter_follows_the_job_to_its_end(
    tmp_path: Path, known: bool, states: list[str], code: int, asked: list[str]
) -> None:
    """KubeRay counts a job as failed 30 s after a complete submitter; one whose head is lost is to be submitted by another pod."""
    rayjob = pods.rayjob("rayjob.yaml")
    (container,) = rayjob["submitterPodTemplate"]["spec"]["containers"]
    *command, entrypoint = container["command"]
    assert entrypoint == rayjob["entrypoint"]
    entrypoint += " --set 'train.publish_images=[0, 160]'"
    done, calls = submitted(
        tmp_path, [*command, entrypoint], ["known" if known else "", *states],
        RAY_DASHBOARD_ADDRESS="head:8265", RAY_JOB_SUBMISSION_ID="j",
    )  # fmt: skip
    assert done == code
    assert [call[1] for call in calls] == asked
    if not known:
        assert calls[0][calls[0].index("--") + 1 :] == shlex.split(entrypoint)


@pytest.mark.parametrize("name", pods.JOBS)
def test_a_submitter_notices_a_head_that_vanished_while_its_log_is_silent(tmp_path: Path, name: str) -> None:
    """The log's connection to it stays open for ever, and nothing would submit the command to the next head."""
    every = {document["kind"]: document["spec"] for document in pods.documents(name)}
    template = every["RayJob"]["submitterPodTemplate"] if "RayJob" in every else every["Job"]["template"]
    (container,) = template["spec"]["containers"]
    stand_in(tmp_path, "timeout", 'shift; [ "$1" = tail ] || "$@"')
    began_s = time.monotonic()
    known = {"RAY_DASHBOARD_ADDRESS": "head:8265", "RAY_JOB_SUBMISSION_ID": "j", "JOB_UID": "u"}
    done, _ = submitted(tmp_path, container["command"], [RUNS, RUNS, RUNS, ""], logs="exec /bin/sleep 30", **known)
    assert done == 1
    assert time.monotonic() - began_s < 20


def test_a_submitter_without_a_token_says_so(tmp_path: Path) -> None:
    """Its pod's log is where the runbook looks, and its exit is what KubeRay counts."""
    (container,) = pods.rayjob("rayjob.yaml")["submitterPodTemplate"]["spec"]["containers"]
    stand_in(tmp_path, "ray", "echo token refused >&2; exit 1")
    stand_in(tmp_path, "sleep")
    job = {"RAY_DASHBOARD_ADDRESS": "h", "RAY_JOB_SUBMISSION_ID": "j", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = [word.replace("$SECONDS -gt 900", "$SECONDS -gt 1") for word in container["command"]]
    assert command != container["command"]
    done = subprocess.run(command, env=os.environ | job, timeout=60, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[0] == "token refused"


def test_the_submitted_job_finds_the_head_and_its_token() -> None:
    """By the names that KubeRay gives them: those of the cluster."""
    parts = {document["kind"]: document for document in pods.documents(pods.JOBS[1])}
    cluster, pod_ = parts["RayCluster"]["metadata"]["name"], parts["Job"]["spec"]["template"]["spec"]
    (container,) = pod_["containers"]
    assert f"RAY_API_SERVER_ADDRESS=http://{cluster}-head-svc:8265\n" in container["command"][2]
    token = {"secretKeyRef": {"name": cluster, "key": "auth_token"}}
    assert {"name": "RAY_AUTH_TOKEN", "valueFrom": token} in container["env"]
