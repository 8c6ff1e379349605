"""Write tests/support/schemas.json: what the cluster files need of KubeRay's and Kubernetes' schemas, without descriptions.

    python -m tests.support.trim_schemas KUBERAY/helm-chart/kuberay-operator/crds/ray.io_rayjobs.yaml 1.7.0 \\
        kubernetes_validate/kubernetes-json-schema/v1.34.0-local-strict/_definitions.json 1.34.0

KubeRay's (Apache-2.0) is a custom resource definition, whose pod templates are Kubernetes'. Kubernetes' (Apache-2.0) are those
that the PyPI package kubernetes-validate distributes. Unknown fields are refused, as by `kubectl apply --validate=strict`.
"""

import json
import sys
from pathlib import Path
from typing import Any

import yaml

FILE = Path(__file__).with_name("schemas.json")
POD = "io.k8s.api.core.v1.PodTemplateSpec"
KINDS = {
    "ConfigMap": "io.k8s.api.core.v1.ConfigMap", "CronJob": "io.k8s.api.batch.v1.CronJob",
    "Deployment": "io.k8s.api.apps.v1.Deployment", "Job": "io.k8s.api.batch.v1.Job",
    "NetworkPolicy": "io.k8s.api.networking.v1.NetworkPolicy",
    "Service": "io.k8s.api.core.v1.Service", "StatefulSet": "io.k8s.api.apps.v1.StatefulSet",
}  # fmt: skip
TEMPLATES = ("template", "submitterPodTemplate")
"""KubeRay's fields that are pod templates."""
WORDS = {
    "description", "format", "default", "x-kubernetes-map-type", "x-kubernetes-list-type", "x-kubernetes-list-map-keys",
    "x-kubernetes-validations",
}  # fmt: skip


def main(kuberay: str, kuberay_version: str, kubernetes: str, kubernetes_version: str) -> None:
    crd = yaml.safe_load(Path(kuberay).read_text())
    (version,) = [each for each in crd["spec"]["versions"] if each["name"] == "v1"]
    everything = json.loads(Path(kubernetes).read_text())["$defs"]
    job = closed(trimmed(version["schema"]["openAPIV3Schema"]))
    cluster = {"$ref": "#/definitions/RayJob/properties/spec/properties/rayClusterSpec"}  # the same type in KubeRay
    definitions = {"RayJob": job, "RayCluster": job | {"properties": job["properties"] | {"spec": cluster}}}
    wanted = [POD, *KINDS.values()]
    while wanted:
        if (name := wanted.pop()) not in definitions:
            definitions[name] = trimmed(everything[name])
            wanted += referred(definitions[name])
    comment = f"trim_schemas.py: KubeRay {kuberay_version}, Kubernetes {kubernetes_version}; both Apache-2.0"
    kinds = KINDS | {kind: kind for kind in ("RayJob", "RayCluster")}
    FILE.write_text(json.dumps({"$comment": comment, "kinds": kinds, "definitions": definitions}, separators=(",", ":")) + "\n")


def trimmed(schema: Any) -> Any:
    """Return a schema without words for people, whose references and KubeRay's pod templates are within the file."""
    if isinstance(schema, list):
        return [trimmed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if isinstance(schema.get("$ref"), str):
        return {"$ref": "#/definitions/" + schema["$ref"].rsplit("/", 1)[1]}
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["string", "integer"]}
    kept = {key: trimmed(value) for key, value in schema.items() if key not in WORDS}
    if "properties" in schema:
        kept["properties"] = {
            name: {"$ref": f"#/definitions/{POD}"} if name in TEMPLATES and "properties" in each else trimmed(each)
            for name, each in schema["properties"].items()
        }
    return kept


def closed(schema: Any) -> Any:
    """Return KubeRay's schema with unknown fields refused."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: closed(value) for key, value in schema.items()}
    known = schema.get("type") == "object" and "properties" in schema and "additionalProperties" not in schema
    return schema | ({"additionalProperties": False} if known else {})


def referred(schema: Any) -> list[str]:
    """Return the names of all definitions that a schema refers to."""
    if isinstance(schema, dict):
        own = [schema["$ref"].rsplit("/", 1)[1]] if isinstance(schema.get("$ref"), str) else []
        return own + [name for value in schema.values() for name in referred(value)]
    return [name for each in schema for name in referred(each)] if isinstance(schema, list) else []


if __name__ == "__main__":
    main(*sys.argv[1:])
