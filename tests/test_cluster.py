"""The cluster's files agree with the code: names of resources, versions, a recipe that loads, paths that exist."""

import ast
import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml

from dis_scale.recipe import Recipe, reading
from pipelines.jobs import FINAL

ROOT = Path(__file__).parent.parent
CLUSTER = ROOT / "cluster"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
IMAGE = f"dis-scale:{PROJECT['version']}"


def documents(name: str) -> list[Any]:
    return list(yaml.safe_load_all((CLUSTER / name).read_text()))


@pytest.fixture(scope="module")
def job() -> dict[str, Any]:
    """The RayJob's specification."""
    (document,) = documents("rayjob.yaml")
    return document["spec"]


@pytest.fixture(scope="module")
def groups(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Head and worker groups, the head as a group of one."""
    cluster = job["rayClusterSpec"]
    return [{"groupName": "head", "replicas": 1} | cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


@pytest.fixture(scope="module")
def recipe(job: dict[str, Any]) -> Recipe:
    """The recipe that the entrypoint names, with its overrides."""
    return recipe_of(job["entrypoint"])


def recipe_of(command: str) -> Recipe:
    program, dash_m, module, path, *options = shlex.split(command)
    assert (program, dash_m, module) == ("python", "-m", "dis_scale.sweep")
    assert options[::2] == ["--set"] * (len(options) // 2)
    return reading.load(ROOT / path, options[1::2])


def test_only_what_a_new_cluster_may_mend_is_tried_again(job: dict[str, Any], groups: list[dict[str, Any]]) -> None:
    """The head's environment is that of the sweep's driver; tests/e2e/test_cluster.py tests what it does with it."""
    (container,) = pod(groups[0])["containers"]
    assert {"name": FINAL, "value": "1"} in container["env"]
    assert job["backoffLimit"] > 0


def pod(group: dict[str, Any]) -> dict[str, Any]:
    return group["template"]["spec"]


def declared(group: dict[str, Any]) -> dict[str, float]:
    """Return the resources that a pod of the group declares; quoted twice, since KubeRay puts them into a shell's command line."""
    (argument,) = shlex.split(group["rayStartParams"]["resources"])
    return json.loads(argument)


def requested() -> set[str]:
    """Return the resources that the stages request: `resources(NAME, ...)` of pipelines/worker.py."""
    calls = [
        node
        for path in (ROOT / "pipelines").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "resources"
    ]
    return {ast.literal_eval(call.args[0]) for call in calls}


@pytest.mark.parametrize("path", sorted(CLUSTER.glob("*.yaml")), ids=lambda p: p.name)
def test_files_are_yaml_and_run_this_version(path: Path) -> None:
    text = path.read_text()
    assert all(documents(path.name))
    assert set(re.findall(r"image: (\S+)", text)) - {"postgres:17"} == {IMAGE}
    assert all(len(line) <= 120 for line in text.splitlines())


def test_the_job_runs_a_recipe_that_keeps_its_state_in_object_storage(job: dict[str, Any], recipe: Recipe) -> None:
    assert recipe.storage.root.startswith("s3://")
    assert "runtimeEnvYAML" not in job
    assert job["ttlSecondsAfterFinished"] > recipe.grace_s


def test_nodes_declare_what_the_stages_request(groups: list[dict[str, Any]]) -> None:
    assert {name for group in groups for name in declared(group)} == requested()


@pytest.mark.parametrize("stage", ["train", "evaluate", "precompute"])
def test_the_cluster_has_capacity_for_the_recipe(groups: list[dict[str, Any]], recipe: Recipe, stage: str) -> None:
    slots = sum(group["replicas"] * declared(group).get(stage, 0) for group in groups)
    assert slots >= getattr(recipe, stage).workers


def test_a_slot_that_computes_has_a_gpu_of_its_own(groups: list[dict[str, Any]]) -> None:
    for group in groups[1:]:
        gpus = int(pod(group)["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
        assert max(declared(group).values()) == gpus
        assert group["replicas"] == group["minReplicas"] == group["maxReplicas"]


def test_every_node_has_the_keys_and_time_to_save(groups: list[dict[str, Any]], recipe: Recipe) -> None:
    for group in groups:
        (container,) = pod(group)["containers"]
        assert container["envFrom"] == [{"secretRef": {"name": "object-storage"}}]
        assert pod(group)["terminationGracePeriodSeconds"] >= recipe.grace_s


def test_versions_are_the_tested_ones(job: dict[str, Any]) -> None:
    assert f"ray[default]=={job['rayClusterSpec']['rayVersion']}" in PROJECT["dependencies"]


def test_the_launchers_file_follows_rays_schema_and_declares_the_same_names() -> None:
    (config,) = documents("ray-cluster.yaml")
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(config, schema)
    commands = " ".join(config["head_start_ray_commands"] + config["worker_start_ray_commands"])
    names = {name for value in re.findall(r"--resources='(.*?)'", commands) for name in json.loads(value)}
    assert names == requested()


def test_the_tracking_server_answers_by_the_name_that_the_job_uses(recipe: Recipe) -> None:
    parts = {(d["kind"], d["metadata"]["name"]): d for d in documents("mlflow.yaml")}
    host, port = str(recipe.tracking.uri).removeprefix("http://").split(":")
    assert parts["Service", host]["spec"]["ports"] == [{"port": int(port)}]
    (container,) = parts["Deployment", host]["spec"]["template"]["spec"]["containers"]
    (allowed,) = [a for a in container["command"] if a.startswith("--allowed-hosts=")]
    assert f"{host}:{port}" in allowed.split("=")[1].split(",")


def test_the_image_copies_existing_paths() -> None:
    copied = re.findall(r"^COPY (.+) \S+$", (CLUSTER / "Dockerfile").read_text(), re.MULTILINE)
    paths = [path for line in copied for path in line.split()]
    let_in = (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines()
    assert paths
    assert [path for path in paths if not (ROOT / path).exists() or f"!{path}" not in let_in] == []
