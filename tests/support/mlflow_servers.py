"""The MLflow server of cluster/mlflow.yaml, with PostgreSQL and the bucket.

apt-get install --no-install-recommends postgresql
"""

import contextlib
import os
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

from dis_scale.process.machine import free_ports
from ops.drills.object_store import ObjectStore
from tests.support import pods, sweeps

PROGRAMS = next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)), None)
ADMIN = {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": "the admin's password"}
LOGIN = {"MLFLOW_TRACKING_USERNAME": "imagenet256", "MLFLOW_TRACKING_PASSWORD": "a long enough password"}
PASSWORD = "another password"
SECRETS = {
    "database-password": PASSWORD, "flask-key": "a key", "admin-password": ADMIN["MLFLOW_TRACKING_PASSWORD"], **LOGIN
}  # fmt: skip


@contextlib.contextmanager
def postgresql() -> Iterator[int]:
    """Run a PostgreSQL with the user and database that the file names; give its port."""
    assert PROGRAMS
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
    ask_database("createdb", port, "mlflow")
    try:
        yield port
    finally:
        server.terminate()
        server.wait()
        shutil.rmtree(folder)


def ask_database(program: str, port: int, *arguments: str) -> None:
    """Run a client of PostgreSQL as the user of the file."""
    assert PROGRAMS
    environment = os.environ | {"PGPASSWORD": PASSWORD}
    command = [str(PROGRAMS / program), "--host=127.0.0.1", f"--port={port}", "--username=mlflow", *arguments]
    subprocess.run(command, check=True, env=environment, capture_output=True)


@contextlib.contextmanager
def deployed(database: int, ceph: ObjectStore, bucket: str, folder: Path) -> Iterator[str]:
    """Run the Deployment's command with its environment; only addresses, the bucket and the configuration's folder are others."""
    parts = {(each["kind"], each["metadata"]["name"]): each for each in pods.documents("mlflow.yaml")}
    (container,) = parts["Deployment", "mlflow"]["spec"]["template"]["spec"]["containers"]
    (port,) = free_ports(1)
    replaced = {
        "mlflow@mlflow-database/": f"mlflow@127.0.0.1:{database}/", "s3://mlflow-bucket": bucket,
        "--host=0.0.0.0": "--host=127.0.0.1", "5000": str(port), "localhost": "127.0.0.1", "/etc/mlflow": str(folder),
    }  # fmt: skip

    def here(text: str) -> str:
        for written, ours in replaced.items():
            text = text.replace(written, ours)
        return text

    (folder / "basic_auth.ini").write_text(here(parts["ConfigMap", "mlflow"]["data"]["basic_auth.ini"]))
    environment = {name: here(value) for name, value in environment_of(container, SECRETS).items()} | ceph.environment
    command = [sys.executable, "-m", *map(here, container["command"])]
    log = folder / "mlflow.log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=os.environ | environment, stdout=out, stderr=out, start_new_session=True)
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 180
    while status_of(f"{url}/health") != 200:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.5)
    try:
        yield url
    finally:
        sweeps.kill_all(process)


def environment_of(container: dict[str, Any], secrets: dict[str, str]) -> dict[str, str]:
    """Return the variables of a container, those of secrets by their keys."""
    given = {each["name"]: each for each in container["env"]}
    return {
        name: each["value"] if "value" in each else secrets[each["valueFrom"]["secretKeyRef"]["key"]]
        for name, each in given.items()
    }


def make_user(url: str, login: dict[str, str] = LOGIN) -> None:
    """Run the Job that creates a sweep's user, or gives it another password."""
    (job,) = pods.documents("mlflow-user.yaml")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    program = container["command"][2].replace("http://mlflow:5000", url)
    environment = environment_of(container, SECRETS | login)
    subprocess.run([sys.executable, "-c", program], check=True, env=os.environ | environment)


def status_of(url: str) -> int:
    """Return the status with which a URL answers, 0 without an answer."""
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0
