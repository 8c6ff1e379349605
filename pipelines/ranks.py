"""Where the ranks of an attempt run: how many workers fit, on which nodes, and when other places would be better.

Read next: train.py.
"""

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from ray.util.placement_group import placement_group, remove_placement_group

from dis_scale.training.lanes import largest_share
from pipelines import nodes, ray_private
from pipelines.nodes import Node
from pipelines.places import Places
from pipelines.ray_private import Resources
from pipelines.stage import StageJob
from pipelines.waiting import Wait, capacity
from pipelines.worker import Request, request_for

CAPACITY_WAIT_S = 5.0
"""Longest wait for resources that the previous attempt has not freed yet."""


class Place(NamedTuple):
    """Where a worker runs, a port that was free there, and the network interfaces that it uses, in words."""

    ip: str
    node: str
    gpus: list[str]
    port: int
    interfaces: str


@dataclass
class RankPlaces:
    """The places that a cluster has for the workers of one model, an attempt after the other."""

    job: StageJob
    model: str
    device: str
    request: Request = field(default_factory=lambda: Request({}))
    """That of one worker on the nodes that the current attempt began with."""
    wrong: set[str] = field(default_factory=set)
    """Ids of the nodes on which a kernel was wrong for a rank that was alone: another node says whether it is the kernel."""
    living: Callable[[], list[Node]] = nodes.living

    @property
    def bundle(self) -> Resources:
        """Resources of one worker."""
        return self.request.amounts

    def choose(self) -> tuple[int, Any, set[str]]:
        """Return (world size, its placement group, ids of avoided nodes), chosen again as long as they are `outdated` before it is
        placed."""
        self.request = request_for("train", self.device, 1)
        while True:
            living = self.living()
            excluded = nodes.excluded(self.job, living, lambda bad: self.fits_without({*bad, *self.wrong}))
            avoided = {*excluded, *self.wrong}
            left_out = self.left_out(avoided, living)
            without = avoided | left_out
            world = self._world_size(without)
            labels = [nodes.avoiding(without)] * world if without else None
            group = placement_group([self.bundle] * world, strategy="PACK", bundle_label_selector=labels)
            try:
                if placed(self.job, group, world, self.bundle, partial(self.outdated, world, without, living, left_out)):
                    self._note_left_out({node.name for node in living if node.id in left_out})
                    return world, group, without
            except BaseException:
                self.free(group)
                raise
            self.free(group)

    def left_out(self, avoided: Collection[str], living: Sequence[Node]) -> set[str]:
        """Return the ids of the nodes that the attempt does without: none unless the others have places now."""
        suspects = {node.id for node in living if node.name in self.job.left_out}
        if not suspects or not self.fits_without(without := {*avoided, *suspects}):
            return set()
        self._world_size(without)  # which waits for places that the attempt before has not freed yet
        return suspects if largest_fitting(self.job.recipe.train.world_sizes, self._free(without)) else set()

    def _note_left_out(self, names: set[str]) -> None:
        """Log the nodes that are left out, and keep which."""
        self.job.left_out = frozenset(names)
        if names:
            where = ", ".join(sorted(names))
            self.job.say(f"{self.model}: node {where} is left out: attempts with it failed")

    def free(self, group: Any) -> None:
        """Give back the places of an attempt."""
        remove_placement_group(group)

    def shared(self) -> float:
        """Return the fraction of a GPU's memory that evaluators may take beside training."""
        if self.device == "cpu":
            return 0.0
        return Places.now(self.job.recipe).avoiding_failed(self.job.sweep, self.device).shared

    def outdated(self, world: int, avoided: Collection[str], living: Sequence[Node], left_out: Collection[str] = ()) -> bool:
        """Whether only fewer workers fit now, as after the loss of a node, or other nodes live: an avoided one may be needed.

        Also if none fit, while those of the avoided nodes that are only `left_out` have places.
        """
        fitting = partial(largest_fitting, self.job.recipe.train.world_sizes)
        free = fitting(self._free(avoided))
        if left_out and not free and fitting(self._free({*avoided}.difference(left_out))):
            return True
        fewer = 0 < free < world
        return fewer or (bool(avoided) and {node.id for node in self.living()} != {node.id for node in living})

    def _world_size(self, avoided: Collection[str]) -> int:
        """The largest of the recipe's world sizes that fits, otherwise its smallest, which then waits.

        Resources of the attempt before come free a moment later: waits for them.
        """
        sizes, deadline_s = self.job.recipe.train.world_sizes, time.monotonic() + CAPACITY_WAIT_S
        while True:
            possible = largest_fitting(sizes, self._possible(avoided))
            free = largest_fitting(sizes, self._free(avoided))
            if free == possible or time.monotonic() > deadline_s or self.job.stop_requested():
                return free or sizes[-1]
            self.job.pause(0.2)

    def fits_without(self, avoided: Collection[str]) -> bool:
        """Whether one of the world sizes fits on other nodes."""
        return largest_fitting(self.job.recipe.train.world_sizes, self._possible(avoided)) > 0

    def _free(self, avoided: Collection[str]) -> int:
        """Return how many more workers fit now on other nodes than the `avoided` ones."""
        return capacity(self.bundle, _nodes_that_stay(ray_private.available_by_node(), avoided))

    def _possible(self, avoided: Collection[str]) -> int:
        """Return how many workers fit on other nodes than the `avoided` ones once all their resources are free."""
        totals = {node.id: node.resources for node in self.living()}
        return capacity(self.bundle, _nodes_that_stay(totals, avoided))

    def drained_in_s(self, used: set[str], logged: set[str]) -> float | None:
        """Return the time until the first of the attempt's nodes goes that are being drained; log each once. None if none is."""
        left_s = {node: left_s for node, left_s in ray_private.draining_nodes().items() if node in used}
        if left_s.keys() - logged:
            logged.update(left_s)
            self.job.emit("drain", model=self.model)
            self.job.say(
                f"{self.model}: a node of its workers is being drained: they stop at a resume point and continue elsewhere"
            )
        return min(left_s.values(), default=None)

    def can_grow(self, world: int, avoided: Collection[str]) -> bool:
        """Whether a larger world size fits now, counting the running workers' own resources, and is faster; logged if so."""
        settings = self.job.recipe.train
        if world == settings.most_workers:
            return False
        larger = largest_fitting(settings.world_sizes, world + self._free(avoided))
        grows = larger > world and largest_share(settings.lanes, larger) < largest_share(settings.lanes, world)
        if grows:
            self.job.emit("grow", model=self.model, workers=world, to=larger)
            self.job.say(f"{self.model}: capacity for {larger} workers: {world} stop at a resume point and continue as {larger}")
        return grows


def rank_order(places: Sequence[Place]) -> list[int]:
    """Return the workers' numbers by rank: in the order of nodes, then of GPUs.

    A placement group's bundles have no order. Ranks that have one get the same neighbours on the same nodes in each attempt.
    """
    return sorted(range(len(places)), key=lambda n: places[n][:3])


def placed(job: StageJob, group: Any, world: int, bundle: Resources, outdated: Callable[[], bool]) -> bool:
    """Wait for capacity, and log it; False once what is waited for is outdated."""
    with Wait(job.gauge) as wait:
        while not group.wait(1):
            if outdated():
                return False
            wait.log(job, world, bundle, together=world)
    return True


def largest_fitting(sizes: Sequence[int], workers: int) -> int:
    """Return the largest of the falling `sizes` that is at most `workers`; 0 if none is."""
    return next((size for size in sizes if size <= workers), 0)


def _nodes_that_stay(by_node: dict[str, Resources], avoided: Collection[str]) -> list[Resources]:
    """Resources of the nodes that are not avoided or being drained: Ray still counts those that are, and places nothing there."""
    left_out = ray_private.draining_nodes().keys() | set(avoided)
    return [resources for node, resources in by_node.items() if node not in left_out]
