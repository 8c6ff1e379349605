"""The cluster files run as written: a raylet for each node with its resources and environment, and the command of the file.

GPUs are declared, not present: workers on "cuda" compute on the CPU (tests/support/declared_gpus). The recipe is a small one
under the name of the file's, with needs of the same shape. A volume's folder, the bucket and MLflow's address are replaced.
"""

import contextlib
import os
import re
import secrets
import shlex
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from string import Template
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from dis_scale import vae
from dis_scale.process.machine import free_ports
from dis_scale.recipe import TrainedVae
from dis_scale.storage.folder import open_folder
from dis_scale.storage.programs import hash_of
from dis_scale.sweep.documents import LatentsManifest, LatentsPointer, Metrics, TrackingIds
from ops.drills.object_store import ObjectStore
from tests.conftest import TINY
from tests.support import clusters, labelled_images, pods, programs, sweeps
from tests.support.clusters import RayNodes

pytestmark = pytest.mark.slow
RECIPE = "imagenet256"
SWITCH = sweeps.ROOT / "tests/support/declared_gpus"
EXTRACTOR = (
    "evaluate.extractor.weights=/models/weights-inception-2015-12-05-6726825d.pth",
    "evaluate.extractor.path=/models/features.pt2",
)
"""Inception's 2,049 samples at least would take an hour here: an exported network takes its place."""


class Means(nn.Module):
    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        return x_BCHW.float().reshape(x_BCHW.shape[0], 3, 4, 8, 4, 8).mean(dim=(3, 5)).flatten(1)


@pytest.fixture
def mlflow(tmp_path: Path) -> Iterator[str]:
    """The URI of an MLflow server."""
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "mlflow", "server", "--host=127.0.0.1", f"--port={port}", "--workers=1"]
    command += [f"--backend-store-uri=sqlite:///{tmp_path / 'mlflow.db'}"]
    with (tmp_path / "mlflow.log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, cwd=tmp_path, start_new_session=True)
    uri, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 120
    while not _answers(f"{uri}/health"):
        assert time.monotonic() < deadline, (tmp_path / "mlflow.log").read_text()
        time.sleep(0.5)
    yield uri
    sweeps.kill_all(server)


def _answers(url: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as answer:
        return bool(answer.status == 200)
    return False


def commands(name: str) -> tuple[str, str | None]:
    """Return the sweep's command, and the init container's that copies the models, if any."""
    if name == pods.LAUNCHER:
        text = (pods.CLUSTER / name).read_text().replace("\\\n#", "")
        (entry,) = re.findall(r"# +ray job submit .* -- +(.*)", text)
        return f"{entry} --set vae.path=/models/sd-vae-ft-ema --set {EXTRACTOR[0]}", None
    (copy,) = pods.groups(pods.rayjob(name))[0]["template"]["spec"]["initContainers"]
    return pods.rayjob(name)["entrypoint"], shlex.join(copy["command"])


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("name", [pods.JOBS[0], pods.LAUNCHER])
def test_the_files_command_runs_on_the_files_nodes(name: str, ceph: ObjectStore, bucket: str, mlflow: str, tmp_path: Path) -> None:
    entry, copy = commands(name)
    replaced = {EXTRACTOR[0]: EXTRACTOR[1], "/models/": f"{tmp_path}/models/", "s3://bucket": bucket, "http://mlflow:5000": mlflow}
    for written, here in replaced.items():
        entry = entry.replace(written, here)
    _upload(bucket, tmp_path / "bucket")
    if copy is None:
        (tmp_path / "bucket/models").rename(tmp_path / "models")
    else:
        here = copy.replace("/models/'", f"{tmp_path}/models/'").replace(f"bucket{tmp_path}", bucket.removeprefix("s3://"))
        subprocess.run(["bash", "-c", here], check=True, env=os.environ | ceph.environment | _path())
    _small_recipe(tmp_path / "app", f"{bucket}/imagenet/train")
    token = secrets.token_hex(16)
    environment = ceph.environment | {"RAY_AUTH_TOKEN": token, "HF_HUB_OFFLINE": "1", "RAY_prestart_worker_first_driver": "0"}
    environment |= _path() | {"PYTHONPATH": f"{SWITCH}:{sweeps.ROOT}"}
    nodes = _start([_here(node, tmp_path) for node in pods.nodes(name)], tmp_path / "app", environment, token)
    try:
        for path in ("api/jobs/", "api/version"):
            assert not _answers(f"{nodes.url}/{path}"), "without the token"
        assert _answers(f"{nodes.url}/api/gcs_healthz"), "which the head's probe asks"
        client = [clusters.RAY, "job", "submit", "--address", nodes.url, "--", *shlex.split(entry)]
        secret = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
        done = subprocess.run(client, env=os.environ | secret, capture_output=True, text=True, timeout=1200)
        said = done.stdout + done.stderr
        assert done.returncode == 0, said[-8000:]
    finally:
        nodes.stop()
    assert "device   cuda" in said, said[-8000:]
    (root,) = re.findall(r"storage\.root=(\S+)", entry)
    sweep = open_folder(root) / "sweeps" / RECIPE
    assert LatentsPointer.exists(sweep)
    assert Metrics.read(sweep / "evaluation/dit/000000000320").values["fd_means_80"] > 0
    latents = open_folder(root) / "latents"
    assert LatentsManifest.read(latents / latents.list()[0]).encoding.device == "cuda"
    if "tracking.uri" in entry:
        assert TrackingIds.read(sweep).uri == mlflow


def _here(node: pods.Node, root: Path) -> pods.Node:
    """Return the node with its volumes below a folder, its options as a shell would give them."""
    environment = {name: value.replace("/cache/", f"{root}/cache/") for name, value in node.environment.items()}
    options = {name: Template(value).safe_substitute(environment) for name, value in node.options.items()}
    return replace(node, options=options, environment=environment)


def _path() -> dict[str, str]:
    """The image's PATH begins with its Python's folder."""
    return {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def _upload(bucket: str, folder: Path) -> None:
    """Write 60 images of two classes, and the model files."""
    store = open_folder(bucket)
    for number in range(60):
        store.write(f"imagenet/train/{labelled_images.CLASSES[number % 2]}/{number}.png", labelled_images.png(number))
    models = folder / "models"
    vae.new(TrainedVae(kind="trained", widths=(8, 8, 8)), 32).save_pretrained(models / "sd-vae-ft-ema")
    programs.export(models / "features.pt2", Means())
    for file in (each for each in models.rglob("*") if each.is_file()):
        store.write(str(file.relative_to(folder)), file.read_bytes())


def _small_recipe(app: Path, source: str) -> None:
    """Write the tiny recipe with a pretrained VAE and an exported extractor under the name of the file's recipe."""
    recipe: dict[str, Any] = yaml.safe_load(TINY.read_text())
    digest = hash_of([str(app.parent / "models/features.pt2")], "extractor")
    recipe |= {"name": RECIPE, "vae": {"kind": "pretrained", "path": "none yet"}}
    recipe["data"] |= {"source": {"kind": "folder", "url": source}, "num_classes": 2, "held_out_images": 8}
    recipe["models"] = {"dit": recipe["models"]["dit"]}
    recipe["precompute"]["shard_images"] = 30
    recipe["evaluate"] |= {
        "extractor": {"kind": "exported", "name": "means", "path": "none yet", "sha256": digest},
        "variants": {},
        "workers": 2,
    }
    (app / "configs").mkdir(parents=True)
    (app / f"configs/{RECIPE}.yaml").write_text(yaml.safe_dump(recipe))


def _start(described: list[pods.Node], app: Path, environment: dict[str, str], token: str) -> RayNodes:
    """Start a raylet for each node with exactly its options and environment."""

    def options(node: pods.Node) -> list[str]:
        return [
            f"--{name}={value}" for name, value in node.options.items() if name in ("node-name", "num-gpus", "memory", "resources")
        ]

    head, *others = described
    headers = {"Authorization": f"Bearer {token}"}
    cpus = int(head.options["num-cpus"])
    nodes = RayNodes(cpus, options=options(head), folder=app, headers=headers, **environment | head.environment)
    for node in others:
        _await_probe(nodes)  # one after the other: the raylets of one machine would choose the same ports
        nodes.node(int(node.options["num-cpus"]), options=options(node), **environment | node.environment)
    _await_probe(nodes)
    return nodes


def _await_probe(nodes: RayNodes) -> None:
    """Wait until the last node answers KubeRay's probe, which has no token."""
    last = nodes.nodes[-1]
    option = "--dashboard-agent-listen-port="
    assert isinstance(last.args, list)
    (port,) = [word.removeprefix(option) for word in map(str, last.args) if word.startswith(option)]
    deadline = time.monotonic() + 240
    while not _answers(f"http://{nodes.address.partition(':')[0]}:{port}/api/healthz"):
        assert last.poll() is None
        assert time.monotonic() < deadline, port
        time.sleep(0.5)
