"""MLflow as cluster/mlflow.yaml starts it: PostgreSQL, a login, artifacts in the bucket, a backup that can be restored.

apt-get install --no-install-recommends postgresql
"""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
import s3fs

from ops.drills.object_store import ObjectStore
from pipelines.cluster import free_ports
from tests.support import pods, sweeps

pytestmark = pytest.mark.faults
PROGRAMS = next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)), None)
LOGIN = {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": "a long enough password"}
PASSWORD = "another password"


@pytest.fixture
def database() -> Iterator[int]:
    """The port of a PostgreSQL with the user and database that the file names."""
    if PROGRAMS is None:
        pytest.skip("PostgreSQL is not installed")
    folder, (port,) = Path(tempfile.mkdtemp(prefix="postgres-", dir="/tmp")), free_ports(1)
    user = {"user": "postgres"} if os.getuid() == 0 else {}  # it refuses to run as root
    if user:
        shutil.chown(folder, "postgres")
    (folder / "password").write_text(PASSWORD)
    (folder / "password").chmod(0o644)

    def run(program: str, *arguments: str) -> None:
        subprocess.run([PROGRAMS / program, *arguments], check=True, capture_output=True, cwd=folder, **user)  # type: ignore[call-overload]

    run("initdb", f"--pgdata={folder}/data", "--username=mlflow", f"--pwfile={folder}/password", "--auth=scram-sha-256")
    server = subprocess.Popen(
        [PROGRAMS / "postgres", "-D", f"{folder}/data", "-p", str(port), "-k", str(folder), "-h", "127.0.0.1"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=folder, **user,
    )  # type: ignore[call-overload]  # fmt: skip
    deadline = time.monotonic() + 60
    while subprocess.run([PROGRAMS / "pg_isready", "-h", "127.0.0.1", "-p", str(port)], capture_output=True).returncode:
        assert time.monotonic() < deadline
        time.sleep(0.3)
    _client("createdb", port, "mlflow")
    yield port
    server.terminate()
    server.wait()
    shutil.rmtree(folder)


def _client(program: str, port: int, *arguments: str) -> None:
    assert PROGRAMS
    environment = os.environ | {"PGPASSWORD": PASSWORD}
    command = [PROGRAMS / program, "--host=127.0.0.1", f"--port={port}", "--username=mlflow", *arguments]
    subprocess.run(command, check=True, env=environment, capture_output=True)


@pytest.fixture
def server(database: int, ceph: ObjectStore, bucket: str, tmp_path: Path) -> Iterator[str]:
    """The Deployment's command with its environment; only addresses, the bucket and the configuration's folder are others."""
    parts = {(each["kind"], each["metadata"]["name"]): each for each in pods.documents("mlflow.yaml")}
    (container,) = parts["Deployment", "mlflow"]["spec"]["template"]["spec"]["containers"]
    (port,) = free_ports(1)
    replaced = {
        "mlflow@mlflow-database/": f"mlflow@127.0.0.1:{database}/", "s3://bucket": bucket, "--host=0.0.0.0": "--host=127.0.0.1",
        "5000": str(port), "localhost": "127.0.0.1", "/etc/mlflow": str(tmp_path),
    }  # fmt: skip

    def here(text: str) -> str:
        for written, ours in replaced.items():
            text = text.replace(written, ours)
        return text

    (tmp_path / "basic_auth.ini").write_text(here(parts["ConfigMap", "mlflow"]["data"]["basic_auth.ini"]))
    secrets = {"database-password": PASSWORD, "flask-key": "a key", **LOGIN}

    def value(variable: dict[str, Any]) -> str:
        return here(variable["value"]) if "value" in variable else secrets[variable["valueFrom"]["secretKeyRef"]["key"]]

    environment = {each["name"]: value(each) for each in container["env"]} | ceph.environment
    command = [sys.executable, "-m", *map(here, container["command"])]
    with (tmp_path / "mlflow.log").open("wb") as log:
        process = subprocess.Popen(
            command, env=os.environ | environment, stdout=log, stderr=log, start_new_session=True
        )
    uri, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 180
    while _status(f"{uri}/health") != 200:
        assert process.poll() is None, (tmp_path / "mlflow.log").read_text()
        assert time.monotonic() < deadline, (tmp_path / "mlflow.log").read_text()
        time.sleep(0.5)
    yield uri
    sweeps.kill_all(process)


def _status(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def test_it_asks_for_a_login_and_keeps_artifacts_in_the_bucket(
    server: str, database: int, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _status(f"{server}/api/2.0/mlflow/experiments/search?max_results=1") == 401
    for name, word in LOGIN.items():
        monkeypatch.setenv(name, word)
    client = mlflow.MlflowClient(server)
    run = client.create_run(client.create_experiment("sweep")).info.run_id
    client.log_metric(run, "loss", 0.5)
    client.log_text(run, "some words", "words.txt")
    assert [file.path for file in client.list_artifacts(run)] == ["words.txt"]
    stored = s3fs.S3FileSystem(skip_instance_cache=True).find(f"{bucket}/mlflow".removeprefix("s3://"))
    assert any(path.endswith("words.txt") for path in stored)

    parts = {(each["kind"], each["metadata"]["name"]): each for each in pods.documents("mlflow.yaml")}
    pod = parts["CronJob", "mlflow-backup"]["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    dump, upload = pod["initContainers"][0]["command"], pod["containers"][0]["command"]
    at = [f"--file={tmp_path}/mlflow.dump" if word.startswith("--file=") else word for word in dump[1:]]
    _client("pg_dump", database, *[word for word in at if not word.startswith(("--host", "--username"))])
    program = upload[2].replace('"/backup/', f'"{tmp_path}/').replace('"bucket/', f'"{bucket.removeprefix("s3://")}/')
    subprocess.run([sys.executable, *upload[1:2], program], check=True)
    (kept,) = s3fs.S3FileSystem(skip_instance_cache=True).find(f"{bucket}/backup".removeprefix("s3://"))
    s3fs.S3FileSystem().get(kept, str(tmp_path / "again.dump"))
    client.delete_run(run)
    _client("createdb", database, "restored")
    _client("pg_restore", database, "--clean", "--if-exists", "--dbname=restored", str(tmp_path / "again.dump"))
    assert PROGRAMS
    asked = [
        PROGRAMS / "psql",
        f"--port={database}",
        *shlex.split("--host=127.0.0.1 --username=mlflow --tuples-only restored"),
    ]
    found = subprocess.run(
        [*asked, "--command=select lifecycle_stage from runs"],
        env=os.environ | {"PGPASSWORD": PASSWORD},
        capture_output=True,
    )
    assert found.stdout.split() == [b"active"]
