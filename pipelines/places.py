"""What each stage's workers ask Ray for, and where evaluators run: which GPUs training leaves to them (docs/evaluation.md)."""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from dis_scale.recipe import Recipe, TrainedExtractor
from dis_scale.sweep import Sweep, state
from pipelines import nodes, ray_private
from pipelines.cluster import models_at_once
from pipelines.nodes import Node
from pipelines.ray_private import Resources
from pipelines.waiting import capacity
from pipelines.worker import Request, request_for

ALL_GPUS_VISIBLE = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
"""Keeps Ray from hiding the node's GPUs from a worker that reserves none."""

PREPARE_CPUS = 2


@dataclass(frozen=True)
class Places:
    """The places that these nodes have for the workers of a recipe."""

    recipe: Recipe
    nodes: Sequence[Node]
    avoided: Collection[str] = ()
    """Ids of the nodes where no evaluator is to run."""
    known: Sequence[Resources] = ()
    """Resources of all nodes that the cluster has had: a request waits for what these declared."""

    @classmethod
    def now(cls, recipe: Recipe) -> "Places":
        """Return the places on the nodes that are alive now."""
        return cls(recipe, nodes.living(), known=ray_private.known_nodes())

    def request(self, name: str, device: str, cpus: float) -> Request:
        """Return the request of a stage's worker on these nodes."""
        return request_for(name, device, cpus, self.known or self._resources)

    def prepare(self, device: str) -> tuple[str, Request]:
        """Return the device of prepare's first worker and its request.

        The small networks train on the CPU; only another extractor's features of the real images are worth a GPU.
        """
        extractors = self.recipe.evaluate.extractors
        where = "cpu" if all(isinstance(extractor, TrainedExtractor) for extractor in extractors) else device
        able = [node for node in self._resources if node.get("GPU", 0) >= (where == "cuda")]
        cpus = min(PREPARE_CPUS, max([1, *(int(node.get("CPU", 0)) for node in able)]))  # a cluster's head may declare none
        return where, self.request("prepare", where, cpus)

    def needs(self, device: str) -> dict[str, tuple[int, Resources]]:
        """Return for each stage the least number of workers that run at the same time, and the resources of each."""
        return {
            "prepare": (1, self.prepare(device)[1].amounts),
            "precompute": (1, self.request("precompute", device, 1).amounts),
            "train": (self.recipe.train.world_sizes[-1], self.request("train", device, 1).amounts),
            "evaluate": (1, self.request("evaluate", device, 0).amounts),
        }

    def lacking(self, device: str) -> dict[str, tuple[int, Resources]]:
        """Return the needs that the nodes cannot hold even when they are idle."""
        return {
            stage: (count, request)
            for stage, (count, request) in self.needs(device).items()
            if request and capacity(request, self._resources) < count  # an evaluator on the CPU may ask for nothing
        }

    def spare_gpus(self, models: int) -> int:
        """Return how many evaluators get a GPU that training never uses, if as many of `models` train at once as the nodes hold.

        Training never uses the GPUs of nodes where no training worker fits, nor those that the largest world size leaves elsewhere.
        """
        training = [node.resources for node in self._left if self._trains(node)]
        totals: Resources = dict(sum((Counter(node.resources) for node in self._left), Counter[str]()))
        at_once = min(models, models_at_once(self.recipe, totals))
        used = min(at_once * self.recipe.train.most_workers, capacity(self._training_bundle, training))
        left = int(sum(node["GPU"] for node in training)) - used
        return self.evaluators_on(self._apart) + max(0, min(left, self.evaluators_on(training)))

    def evaluators_on(self, places: Sequence[Resources]) -> int:
        """Return how many evaluators with a GPU of their own nodes of these resources hold."""
        return capacity(self.request("evaluate", "cuda", 0).amounts, places)

    def without(self, avoided: Collection[str]) -> "Places":
        """Return the places for evaluators that avoid some of these nodes, by their ids."""
        return replace(self, avoided=avoided)

    def avoiding_failed(self, sweep: Sweep, device: str) -> "Places":
        """Return the places for evaluators that avoid the nodes whose devices failed; all, if the others hold no evaluator."""
        without = self.without(nodes.failed(sweep, self.nodes).keys())
        return without if without.evaluates(device) else self

    def evaluates(self, device: str) -> bool:
        """Return whether an evaluator fits on one of the nodes that are not avoided."""
        left = [node.resources for node in self._left]
        gpus = device == "cuda" and self.recipe.evaluate.gpu_share is not None and any(node.get("GPU") for node in left)
        return gpus or capacity(self.request("evaluate", device, 0).amounts or {"CPU": 1.0}, left) > 0

    def most_evaluators(self) -> int:
        """Return how many evaluators with a GPU of their own the nodes hold when they are idle."""
        return self.evaluators_on([node.resources for node in self._left])

    def evaluators(self, device: str, gpus: int) -> list[tuple[int | None, Request]]:
        """Return (number of the GPU that it shares on its node, or None; request) for each evaluator.

        On GPUs, `gpus` evaluators get a GPU of their own, as many of them as possible on nodes where training never runs: elsewhere
        they could keep a GPU for which training waits. With `evaluate.gpu_share` the others share training's GPUs, one on each,
        unless some evaluators there have a GPU of their own: only Ray knows which GPU.
        """
        settings, request = self.recipe.evaluate, self.request("evaluate", device, 0)
        if self.avoided:
            request = request.on(label_selector=nodes.avoiding(self.avoided))
        own = settings.workers if device == "cpu" else min(settings.workers, gpus)
        training = [node.id for node in self.nodes if self._trains(node)]
        apart = min(own, self.evaluators_on(self._apart)) if device == "cuda" and training else 0
        every: list[tuple[int | None, Request]] = [(None, request)] * own
        if apart:
            every[:apart] = [(None, request.on(label_selector=nodes.avoiding([*training, *self.avoided])))] * apart
        if own > apart or own == settings.workers or settings.gpu_share is None:
            return every
        return every + self._sharing(settings.workers - own)

    @property
    def shared(self) -> float:
        """Fraction of a GPU's memory that evaluators may take beside training."""
        return self.recipe.evaluate.shared(self.spare_gpus(len(self.recipe.models)))

    def _sharing(self, count: int) -> list[tuple[int, Request]]:
        """Return up to `count` evaluators that share training's GPUs, one on each: two in turns would be no faster.

        The last device of each node comes first, since training's first rank has most to do.
        """
        trains = [node for node in self._left if self._trains(node)]
        devices = [(-index, node.id) for node in trains for index in range(int(node.resources["GPU"]))]
        return [
            # it reserves nothing and sees all GPUs of its node
            (-index, Request({}).on(scheduling_strategy=nodes.only(node), runtime_env={"env_vars": ALL_GPUS_VISIBLE}))
            for index, node in sorted(devices)[:count]
        ]

    @property
    def _left(self) -> list[Node]:
        """The nodes that are not avoided."""
        return [node for node in self.nodes if node.id not in self.avoided]

    @property
    def _resources(self) -> list[Resources]:
        return [node.resources for node in self.nodes]

    @property
    def _training_bundle(self) -> Resources:
        """Resources of a training worker with a GPU."""
        return self.request("train", "cuda", 1).amounts

    def _trains(self, node: Node) -> bool:
        """Return whether a training worker with a GPU fits on a node."""
        return capacity(self._training_bundle, [node.resources]) > 0

    @property
    def _apart(self) -> list[Resources]:
        """Resources of the nodes where training never runs."""
        return [node.resources for node in self._left if not self._trains(node)]


def own_gpus(sweep: Sweep, places: Places) -> int:
    """Return how many evaluators may hold a GPU now: GPUs that the models in training never use; all GPUs once no model trains."""
    places, left = places.avoiding_failed(sweep, "cuda"), len(state.in_training(sweep))
    free = places.spare_gpus(left) if left else places.most_evaluators()
    return min(sweep.recipe.evaluate.workers, free)
