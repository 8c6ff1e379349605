"""What each stage's workers ask Ray for, and where evaluators run: which GPUs training leaves to them (docs/evaluation.md)."""

from itertools import cycle, islice
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dis_scale.recipe import Recipe, TrainedExtractor
from dis_scale.sweep import Sweep, state
from pipelines import nodes
from pipelines.cluster import models_at_once
from pipelines.waiting import alive_nodes, capacity
from pipelines.worker import amounts, resources

ALL_GPUS_VISIBLE = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
"""Keeps Ray from hiding the node's GPUs from a worker that reserves none."""

PREPARE_CPUS = 2


def prepare_request(recipe: Recipe, device: str) -> tuple[str, dict[str, Any]]:
    """Return the device of prepare's first worker and its request.

    The small networks train on the CPU; only another extractor's features of the real images are worth a GPU.
    """
    only_trained = all(isinstance(extractor, TrainedExtractor) for extractor in recipe.evaluate.extractors)
    where = "cpu" if only_trained else device
    able = [node for node in alive_nodes() if node.get("GPU", 0) >= (where == "cuda")]
    cpus = min(PREPARE_CPUS, max((int(node.get("CPU", 0)) for node in able), default=1))
    return where, resources("prepare", where, cpus)


def needs(recipe: Recipe, device: str) -> dict[str, tuple[int, dict[str, float]]]:
    """Return for each stage the least number of workers that run at the same time, and what each asks for."""
    return {
        "prepare": (1, amounts(prepare_request(recipe, device)[1])),
        "precompute": (1, amounts(resources("precompute", device, 1))),
        "train": (recipe.train.world_sizes[-1], amounts(resources("train", device, 1))),
        "evaluate": (1, amounts(resources("evaluate", device, 0))),
    }


def lacking(recipe: Recipe, device: str) -> tuple[int, dict[str, float]] | None:
    """Return the first need that the cluster's nodes cannot hold even when they are idle, None if they can hold all."""
    nodes = alive_nodes()
    every = [need for need in needs(recipe, device).values() if need[1]]  # an evaluator on the CPU may ask for nothing
    return next((need for need in every if capacity(need[1], nodes) < need[0]), None)


def own_gpus(sweep: Sweep) -> int:
    """Return how many evaluators may hold a GPU now: all GPUs are free when training is over, before that what it never uses."""
    free = evaluators_on(alive_nodes()) if state.training_over(sweep) else spare_gpus(sweep.recipe)
    return min(sweep.recipe.evaluate.workers, free)


def spare_gpus(recipe: Recipe) -> int:
    """Return how many evaluators get a GPU that training never uses, with as many models at the same time as the cluster holds.

    These are all on nodes where no training worker fits, and on the others what is left by the largest world size.
    """
    training = [node for node in alive_nodes() if _trains(node)]
    at_once = min(len(recipe.models), models_at_once(recipe, ray.cluster_resources()))
    used = min(at_once * recipe.train.most_workers, capacity(_training_bundle(), training))
    left = int(sum(node["GPU"] for node in training)) - used
    return evaluators_on(_apart()) + max(0, min(left, evaluators_on(training)))


def _trains(node: dict[str, float]) -> bool:
    """Whether a training worker with a GPU fits on a node of these resources."""
    return capacity(_training_bundle(), [node]) > 0


def _training_bundle() -> dict[str, float]:
    """What a training worker takes of a GPU node."""
    return {"GPU": 1.0} | resources("train", "cuda", 1).get("resources", {})


def _apart() -> list[dict[str, float]]:
    """Resources of the nodes where training never runs."""
    return [node for node in alive_nodes() if not _trains(node)]


def evaluators_on(places: list[dict[str, float]]) -> int:
    """Return how many evaluators with a GPU of their own nodes of these resources hold."""
    return capacity({"GPU": 1.0} | resources("evaluate", "cuda", 0).get("resources", {}), places)


def requests(recipe: Recipe, device: str, gpus: int) -> list[tuple[int | None, dict[str, Any]]]:
    """Return (number of the GPU that it shares, if any, on its node; request) of each evaluator.

    On GPUs, `gpus` evaluators get one of their own, as many as possible of them on nodes where training never runs: elsewhere they
    could keep a GPU for which training waits. With `evaluate.gpu_share` the others share training's: they are spread over
    nodes and devices by their number, from the last device on, since training's first rank has most to do.
    """
    settings, request = recipe.evaluate, resources("evaluate", device, 0)
    own = settings.workers if device == "cpu" else min(settings.workers, gpus)
    every: list[tuple[int | None, dict[str, Any]]] = [(None, request)] * own
    training = [n["NodeID"] for n in ray.nodes() if n["Alive"] and _trains(n["Resources"])]
    if device == "cuda" and training:
        apart = min(own, evaluators_on(_apart()))
        every[:apart] = [(None, request | {"label_selector": nodes.avoiding(training)})] * apart
    if own == settings.workers or settings.gpu_share is None:
        return every
    counts = {n["NodeID"]: int(n["Resources"].get("GPU", 0)) for n in ray.nodes() if n["Alive"]}
    shared = sorted((-index, node) for node, count in counts.items() for index in range(count))
    for index, node in islice(cycle(shared), settings.workers - own):
        request = {
            "num_cpus": 0,
            "num_gpus": 0,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False),
        }
        every.append((-index, request | {"runtime_env": {"env_vars": ALL_GPUS_VISIBLE}}))
    return every
