"""MLflow as cluster/mlflow.yaml starts it: PostgreSQL, a login, artifacts in the bucket, a backup that can be restored."""

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
import s3fs

from ops.drills.object_store import ObjectStore
from tests.support import mlflow_servers as servers
from tests.support import pods

pytestmark = pytest.mark.faults


@pytest.fixture
def database() -> Iterator[int]:
    if servers.PROGRAMS is None:
        pytest.skip("PostgreSQL is not installed")
    with servers.postgresql() as port:
        yield port


@pytest.fixture
def server(database: int, ceph: ObjectStore, bucket: str, tmp_path: Path) -> Iterator[str]:
    with servers.deployed(database, ceph, bucket, tmp_path) as url:
        yield url


def test_it_asks_for_a_login_and_keeps_artifacts_in_the_bucket(
    server: str, database: int, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert servers.status_of(f"{server}/api/2.0/mlflow/experiments/search?max_results=1") == 401
    for name, word in servers.LOGIN.items():
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
    servers.ask_database("pg_dump", database, *[word for word in at if not word.startswith(("--host", "--username"))])
    program = upload[2].replace('"/backup/', f'"{tmp_path}/').replace('"bucket/', f'"{bucket.removeprefix("s3://")}/')
    subprocess.run([sys.executable, *upload[1:2], program], check=True)
    (kept,) = s3fs.S3FileSystem(skip_instance_cache=True).find(f"{bucket}/backup".removeprefix("s3://"))
    s3fs.S3FileSystem().get(kept, str(tmp_path / "again.dump"))
    client.delete_run(run)
    servers.ask_database("createdb", database, "restored")
    servers.ask_database(
        "pg_restore", database, "--clean", "--if-exists", "--dbname=restored", str(tmp_path / "again.dump")
    )
    assert servers.PROGRAMS
    asked = [
        servers.PROGRAMS / "psql",
        f"--port={database}",
        *shlex.split("--host=127.0.0.1 --username=mlflow --tuples-only restored"),
    ]
    found = subprocess.run(
        [*asked, "--command=select lifecycle_stage from runs"],
        env=os.environ | {"PGPASSWORD": servers.PASSWORD},
        capture_output=True,
    )
    assert found.stdout.split() == [b"active"]
