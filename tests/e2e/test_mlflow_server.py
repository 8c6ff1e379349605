"""MLflow as cluster/mlflow.yaml starts it: PostgreSQL, a login, artifacts in the bucket, a backup that can be restored."""

import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import pytest
import requests
import s3fs
from mlflow.exceptions import MlflowException
from mlflow.server.auth.client import AuthServiceClient

from dis_scale.recipe import Recipe
from dis_scale.storage.folder import open_folder
from dis_scale.sweep import Sweep
from dis_scale.tracking import mlflow as tracking
from dis_scale.tracking.rows import Row
from ops.drills.object_store import ObjectStore
from tests.support import mlflow_servers as servers
from tests.support import pods

pytestmark = pytest.mark.slow


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
    log_in(servers.ADMIN, monkeypatch)
    client = mlflow.MlflowClient(server)
    run = client.create_run(client.create_experiment("sweep")).info.run_id
    client.log_metric(run, "loss", 0.5)
    client.log_text(run, "some words", "words.txt")
    assert [file.path for file in client.list_artifacts(run)] == ["words.txt"]
    stored = s3fs.S3FileSystem(skip_instance_cache=True).find(f"{bucket}/artifacts".removeprefix("s3://"))
    assert any(path.endswith("words.txt") for path in stored)

    parts = {(each["kind"], each["metadata"]["name"]): each for each in pods.documents("mlflow.yaml")}
    pod = parts["CronJob", "mlflow-backup"]["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    dump, upload = pod["initContainers"][0]["command"], pod["containers"][0]["command"]
    at = [f"--file={tmp_path}/mlflow.dump" if word.startswith("--file=") else word for word in dump[1:]]
    servers.ask_database("pg_dump", database, *[word for word in at if not word.startswith(("--host", "--username"))])
    program = upload[2].replace('"/backup/', f'"{tmp_path}/').replace('"mlflow-bucket/', f'"{bucket.removeprefix("s3://")}/')
    subprocess.run([sys.executable, *upload[1:2], program], check=True)
    (kept,) = s3fs.S3FileSystem(skip_instance_cache=True).find(f"{bucket}/backup".removeprefix("s3://"))
    s3fs.S3FileSystem().get(kept, str(tmp_path / "again.dump"))
    client.delete_run(run)
    servers.ask_database("createdb", database, "restored")
    servers.ask_database("pg_restore", database, "--clean", "--if-exists", "--dbname=restored", str(tmp_path / "again.dump"))
    assert servers.PROGRAMS
    asked = [
        str(servers.PROGRAMS / "psql"),
        f"--port={database}",
        *shlex.split("--host=127.0.0.1 --username=mlflow --tuples-only restored"),
    ]
    found = subprocess.run(
        [*asked, "--command=select lifecycle_stage from runs"],
        env=os.environ | {"PGPASSWORD": servers.PASSWORD},
        capture_output=True,
    )
    assert found.stdout.split() == [b"active"]


def test_a_sweep_has_rights_on_its_own_experiment_only(
    server: str, tiny: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As its user makes its runs; not on those of others, nor on users. The Job that makes the user also rotates its password."""
    log_in(servers.ADMIN, monkeypatch)
    others = mlflow.MlflowClient(server).create_experiment("of others")
    servers.make_user(server)
    log_in(servers.LOGIN, monkeypatch)
    sweep = Sweep.below(open_folder(tmp_path), tiny)
    ids = tracking.create_runs(sweep, server, {"dit": {"batch_images": 16}})
    copy = tracking.RunCopy(sweep, "dit")
    copy.send([Row("loss", 0.5, 160, 1.0)])
    (tmp_path / "grid.png").write_bytes(b"a picture")
    copy.send_file(tmp_path / "grid.png", "samples")
    copy.finish("FINISHED")
    assert not copy.away
    client = mlflow.MlflowClient(server)
    assert client.get_run(ids.models["dit"]).data.metrics == {"loss": 0.5}
    assert [file.path for file in client.list_artifacts(ids.models["dit"], "samples")] == ["samples/grid.png"]
    assert [found.name for found in client.search_experiments()] == ["dis-scale tiny"]
    refusals: list[Callable[[], object]] = [
        lambda: client.get_experiment(others),
        lambda: client.create_run(others),
        lambda: AuthServiceClient(server).create_user("another", "a long enough password"),
    ]
    for refused in refusals:
        with pytest.raises(MlflowException, match=r"(?i)permission denied"):
            refused()
    another = {"MLFLOW_TRACKING_USERNAME": "another", "MLFLOW_TRACKING_PASSWORD": "yet another password"}
    log_in(servers.ADMIN, monkeypatch)
    servers.make_user(server, another)
    log_in(another, monkeypatch)
    of_another = mlflow.MlflowClient(server)
    assert of_another.search_experiments() == []
    of_the_first: list[Callable[[], object]] = [
        lambda: of_another.log_metric(ids.models["dit"], "loss", 0.0),
        lambda: of_another.log_artifact(ids.models["dit"], str(tmp_path / "grid.png")),
        lambda: of_another.list_artifacts(ids.models["dit"]),
    ]
    for refused in of_the_first:
        with pytest.raises((MlflowException, requests.HTTPError), match=r"(?i)permission denied"):
            refused()
    log_in(servers.LOGIN, monkeypatch)
    changed = servers.LOGIN | {"MLFLOW_TRACKING_PASSWORD": "a rotated password"}
    servers.make_user(server, changed)
    copy.send([Row("loss", 0.4, 320, 2.0)])
    assert copy.away, "the old password is of no use"
    assert "MLflow refuses this user, rows wait in storage: " in caplog.text
    log_in(changed, monkeypatch)
    copy.send([])
    assert client.get_run(ids.models["dit"]).data.metrics == {"loss": 0.4}
    log_in(servers.ADMIN, monkeypatch)
    AuthServiceClient(server).update_user_password("admin", "a new password", servers.ADMIN["MLFLOW_TRACKING_PASSWORD"])
    with pytest.raises(MlflowException, match="401"):
        mlflow.MlflowClient(server).search_experiments()


def log_in(login: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, word in login.items():
        monkeypatch.setenv(name, word)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "120")  # asked again on a busy machine, a server has what it is to create
