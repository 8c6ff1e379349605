"""The nodes that the cluster files describe: their resources, `ray start` and environment, as KubeRay and Ray's launcher make them.

KubeRay's rules are version 1.7's, those of `generateRayStartCommand` (ray-operator/controllers/ray/common/pod.go).
"""

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

CLUSTER = Path(__file__).parents[2] / "cluster"
JOBS = ("rayjob.yaml", "raycluster-4x8.yaml")
LAUNCHER = "ray-cluster.yaml"
LAUNCHER_CPUS = 32
"""Ray counts the CPUs of a machine itself."""
SHELL = ("bash", "-c", 'eval "exec $*"', "bash")
"""Starts a command as KubeRay does: `bash -c` replaces the variables in the options of `ray start`."""
UNITS = {"": 1, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}


@dataclass(frozen=True)
class Node:
    """One of the nodes: its group, options of `ray start` without places, and the environment that the file sets.

    Options may name its variables, which KubeRay's shell replaces.
    """

    group: str
    options: dict[str, str]
    environment: dict[str, str]

    @property
    def resources(self) -> dict[str, float]:
        """The node's resources as Ray lists them."""
        known = {"CPU": "num-cpus", "GPU": "num-gpus", "memory": "memory"}
        numbers = {name: float(self.options.get(option, 0)) for name, option in known.items()}
        return {name: number for name, number in (numbers | self.custom).items() if number}

    @property
    def custom(self) -> dict[str, float]:
        resources: dict[str, float] = json.loads(self.options.get("resources", "{}"))
        return resources


def documents(name: str) -> list[Any]:
    return list(yaml.safe_load_all((CLUSTER / name).read_text()))


def rayjob(name: str) -> dict[str, Any]:
    """Return the RayJob's specification; of a RayCluster and a Job that submits to it, the same fields."""
    specs: dict[str, dict[str, Any]] = {document["kind"]: document["spec"] for document in documents(name)}
    if "RayJob" in specs:
        return specs["RayJob"]
    (container,) = specs["Job"]["template"]["spec"]["containers"]
    return specs["Job"] | {"entrypoint": container["command"][-1], "rayClusterSpec": specs["RayCluster"]}


def groups(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Return head and worker groups, the head as a group of one."""
    cluster = job["rayClusterSpec"]
    return [{"groupName": "head", "replicas": 1} | cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def nodes(name: str) -> list[Node]:
    """Return every node of a cluster file, the head first."""
    if name == LAUNCHER:
        return _launched()
    job = rayjob(name)
    token = {"RAY_AUTH_MODE": "token"} if job["rayClusterSpec"]["authOptions"] == {"mode": "token"} else {}
    every = [group for group in groups(job) for _ in range(group["replicas"])]
    return [_pod(group, token, f"machine-{number}") for number, group in enumerate(every)]


def _pod(group: dict[str, Any], cluster: dict[str, str], machine: str) -> Node:
    container = group["template"]["spec"]["containers"][0]
    limits = container["resources"]["limits"]
    options = {
        "num-cpus": str(int(limits["cpu"])), "memory": str(quantity(limits["memory"])),
        "num-gpus": str(limits.get("nvidia.com/gpu", 0)),
    }  # fmt: skip
    given = {key: shlex.split(value)[0] for key, value in group["rayStartParams"].items()}  # as a shell takes them
    environment = {each["name"]: _value(each, machine) for each in container.get("env", [])}
    return Node(group["groupName"], options | given, cluster | environment)


def _value(variable: dict[str, Any], machine: str) -> str:
    """Return a variable's value; of the downward API that of a pod on this machine."""
    if "value" in variable:
        return str(variable["value"])
    assert variable["valueFrom"] == {"fieldRef": {"fieldPath": "spec.nodeName"}}, variable
    return machine


def _launched() -> list[Node]:
    (config,) = documents(LAUNCHER)
    environment = dict(
        option.removeprefix("--env=").split("=") for option in config["docker"]["run_options"] if option.startswith("--env=")
    )
    head, worker = (
        Node(group, {"num-cpus": str(LAUNCHER_CPUS)} | _options(config[f"{group}_start_ray_commands"]), environment)
        for group in ("head", "worker")
    )
    return [head, *[worker] * len(config["provider"]["worker_ips"])]


def _options(commands: list[str]) -> dict[str, str]:
    """Return the options of `ray start`, without addresses and files."""
    (start,) = [shlex.split(command) for command in commands if command.startswith("ray start ")]
    given = dict(option.removeprefix("--").split("=", 1) for option in start[2:] if "=" in option)
    return {key: value for key, value in given.items() if key in ("resources", "num-gpus", "num-cpus")}


def quantity(text: str) -> int:
    """Return a quantity of Kubernetes in bytes."""
    match = re.fullmatch(r"(\d+)([KMG]i|)", text)
    assert match, text
    return int(match[1]) * UNITS[match[2]]
