"""The Ray that a command starts on this machine: who has its token may submit jobs, nobody else, and the token is in one file."""

import contextlib
import os
import stat
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from dis_scale.process.errors import Preempted, UserError
from dis_scale.recipe import Recipe, reading
from dis_scale.storage.folder import open_folder
from dis_scale.sweep import Sweep
from pipelines import jobs
from pipelines.cluster import Cluster, client_of, open_cluster
from tests.conftest import TINY

NOT_OURS = "f" * 64


@pytest.fixture(scope="module")
def ours() -> Iterator[Cluster]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("RAY_AUTH_TOKEN", NOT_OURS)  # a user's own, for a cluster
        patch.setenv("PYTHONDONTWRITEBYTECODE", "1")
        with open_cluster(reading.load(TINY)) as cluster:
            yield cluster


def test_what_its_processes_import_is_compiled_once(ours: Cluster) -> None:
    """Images of containers often ask for no bytecode: then each process compiles PyTorch."""
    every = psutil.process_iter(["name", "cmdline"])
    (server,) = [p for p in every if p.info["name"] == "gcs_server" and ours.id in " ".join(p.info["cmdline"] or [])]
    assert "PYTHONDONTWRITEBYTECODE" not in server.environ()  # as in what the raylet starts, which forks
    assert "PYTHONDONTWRITEBYTECODE" in os.environ


def test_a_stop_while_it_starts_is_not_kept_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A start takes up to half a minute."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    others, started = set(psutil.Process().children()), set[psutil.Process]()

    def stop() -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            for head in set(psutil.Process().children()) - others:
                started.update([head, *head.children(recursive=True)])
            if any(process.name() == "gcs_server" for process in started):
                raise Preempted("stopped as requested")

    with pytest.raises(Preempted), open_cluster(reading.load(TINY), go_on=stop):
        pytest.fail("it started")
    assert not psutil.wait_procs(started, timeout=30)[1]


def test_an_address_that_is_given_is_asked_whatever_the_environment_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise `dis-scale stop --address` asks another Ray, which has nothing to stop; and a token goes there."""
    for variable in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.setenv(variable, "http://127.0.0.1:2")
    with pytest.raises(ConnectionError, match=r"127\.0\.0\.1:1\b"):
        client_of("http://127.0.0.1:1")


def token_file(cluster: Cluster) -> Path:
    (path,) = Path("/tmp", cluster.id).glob("token-*")
    return path


def answer(url: str, token: str | None, body: bytes | None = None) -> int:
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=30) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.parametrize(("token", "status"), [(None, 401), (NOT_OURS, 403)])
def test_without_the_token_no_job_is_taken(ours: Cluster, token: str | None, status: int) -> None:
    submitted = f"{ours.address}/api/jobs/"
    assert answer(submitted, token) == status
    assert answer(submitted, token, b'{"entrypoint": "id"}') == status
    assert client_of(ours.address).list_jobs() == []


def test_the_client_of_another_process_of_this_user_has_the_token(
    ours: Cluster, tiny: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert answer(f"{ours.address}/api/jobs/", token_file(ours).read_text()) == 200
    program = f"from pipelines.cluster import client_of; print(client_of({ours.address!r}).list_jobs())"
    listed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert listed.stdout.strip() == "[]"
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setattr(os, "getuid", lambda: 12_345)
    with pytest.raises(UserError, match=f"the Ray at {ours.address} refuses this process: if another user started it"):
        jobs.stop_all(Sweep.below(open_folder(tmp_path), tiny), ours.address)


@pytest.mark.parametrize(("token", "answers"), [(NOT_OURS, False), (None, True)])
def test_the_port_of_its_nodes_needs_it_too(ours: Cluster, token: str | None, answers: bool) -> None:
    """Tasks are submitted there, without the dashboard."""
    every = (p.info for p in psutil.process_iter(["name", "cmdline"]))  # without a command line for one that has just ended
    (words,) = [p["cmdline"] for p in every if p["name"] == "gcs_server" and ours.id in " ".join(p["cmdline"] or [])]
    (port,) = [word.partition("=")[2] for word in words if word.startswith("--gcs_server_port=")]
    given = {"RAY_AUTH_TOKEN": token or token_file(ours).read_text(), "RAY_AUTH_MODE": "token"}
    done = subprocess.run(
        [sys.executable, "-c", KEYS, f"127.0.0.1:{port}"], env=os.environ | given, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode == 0) == answers, done.stderr
    assert answers or "nvalid" in done.stderr


KEYS = """
import sys
from ray._raylet import GcsClient
print(GcsClient(address=sys.argv[1]).internal_kv_keys(b"", None, timeout=20))
"""


def test_the_token_is_in_one_file_of_this_user(ours: Cluster) -> None:
    token = token_file(ours).read_bytes()
    assert len(token) == 64
    assert stat.S_IMODE(token_file(ours).stat().st_mode) == 0o600
    assert stat.S_IMODE(token_file(ours).parent.stat().st_mode) == 0o700
    files = [path for path in token_file(ours).parent.rglob("*") if path.is_file() and token in path.read_bytes()]
    assert files == [token_file(ours)]
    assert [path for path in Path("/proc").glob("[0-9]*/cmdline") if token in read(path)] == []


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""  # the process has ended
