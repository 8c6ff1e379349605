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
    """The places of one model's workers on a cluster, chosen for one attempt after the other."""

    job: StageJob
    model: str
    device: str
    request: Request = field(default_factory=lambda: Request({}))
    """Request of one worker, as the cluster's nodes were when the current attempt began."""
    wrong: set[str] = field(default_factory=set)
    """Ids of the nodes on which a kernel was wrong while all ranks ran there: another node shows whether the kernel is to blame."""
    living: Callable[[], list[Node]] = nodes.living

    @property
    def bundle(self) -> Resources:
        """Resources of one worker."""
        return self.request.amounts

    def choose(self) -> tuple[int, Any, set[str]]:
        """Return (world size, its placement group, ids of avoided nodes). They are chosen again if they are `outdated` before the
        group is placed."""
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
        """Return the ids of the suspected nodes that the attempt does without: none unless the other nodes have places now."""
        suspects = {node.id for node in living if node.name in self.job.left_out}
        if not suspects or not self.fits_without(without := {*avoided, *suspects}):
            return set()
        self._world_size(without)  # waits for places that the previous attempt has not freed yet
        return suspects if largest_fitting(self.job.recipe.train.world_sizes, self._free(without)) else set()

    def _note_left_out(self, names: set[str]) -> None:
        """Log the nodes that are left out, and note their names in the job."""
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
        """Return whether only fewer workers fit now, as after the loss of a node, or the living nodes have changed while some are
        avoided: an avoided one may be needed.

        Also true if no world size fits, but one would with the avoided nodes that are only `left_out`.
        """
        fitting = partial(largest_fitting, self.job.recipe.train.world_sizes)
        free = fitting(self._free(avoided))
        if left_out and not free and fitting(self._free({*avoided}.difference(left_out))):
            return True
        fewer = 0 < free < world
        return fewer or (bool(avoided) and {node.id for node in self.living()} != {node.id for node in living})

    def _world_size(self, avoided: Collection[str]) -> int:
        """Return the largest of the recipe's world sizes that fits, otherwise its smallest, which then waits.

        The resources of the previous attempt become free a moment after its end: this waits for them.
        """
        sizes, deadline_s = self.job.recipe.train.world_sizes, time.monotonic() + CAPACITY_WAIT_S
        while True:
            possible = largest_fitting(sizes, self._possible(avoided))
            free = largest_fitting(sizes, self._free(avoided))
            if free == possible or time.monotonic() > deadline_s or self.job.stop_requested():
                return free or sizes[-1]
            self.job.pause(0.2)

    def fits_without(self, avoided: Collection[str]) -> bool:
        """Return whether one of the world sizes fits on other nodes than the `avoided` ones."""
        return largest_fitting(self.job.recipe.train.world_sizes, self._possible(avoided)) > 0

    def _free(self, avoided: Collection[str]) -> int:
        """Return how many more workers fit now on other nodes than the `avoided` ones."""
        return capacity(self.bundle, _nodes_that_stay(ray_private.available_by_node(), avoided))

    def _possible(self, avoided: Collection[str]) -> int:
        """Return how many workers fit on other nodes than the `avoided` ones once all their resources are free."""
        totals = {node.id: node.resources for node in self.living()}
        return capacity(self.bundle, _nodes_that_stay(totals, avoided))

    def drained_in_s(self, used: set[str], logged: set[str]) -> float | None:
        """Return the seconds until the first draining node of the attempt goes, None if none drains; log each new one."""
        left_s = {node: left_s for node, left_s in ray_private.draining_nodes().items() if node in used}
        if left_s.keys() - logged:
            logged.update(left_s)
            self.job.emit("drain", model=self.model)
            self.job.say(
                f"{self.model}: a node of its workers is being drained: they stop at a resume point and continue elsewhere"
            )
        return min(left_s.values(), default=None)

    def can_grow(self, world: int, avoided: Collection[str]) -> bool:
        """Return whether a larger world size fits now, with the running workers' resources, and is faster; log if so."""
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

    A placement group's bundles have no order. With this order ranks have the same neighbours on the same nodes in each attempt.
    """
    return sorted(range(len(places)), key=lambda n: places[n][:3])


def placed(job: StageJob, group: Any, world: int, bundle: Resources, outdated: Callable[[], bool]) -> bool:
    """Wait for the group's capacity, and log the wait; return False once the choice is `outdated`."""
    with Wait(job.gauge) as wait:
        while not group.wait(1):
            if outdated():
                return False
            wait.log(job, world, bundle, together=world)
    return True


def largest_fitting(sizes: Sequence[int], workers: int) -> int:
    """Return the largest of `sizes`, which fall, that is at most `workers`; 0 if none is."""
    return next((size for size in sizes if size <= workers), 0)


def _nodes_that_stay(by_node: dict[str, Resources], avoided: Collection[str]) -> list[Resources]:
    """Return the resources of the nodes that are neither avoided nor drained: Ray counts drained nodes, but does not use them."""
    left_out = ray_private.draining_nodes().keys() | set(avoided)
    return [resources for node, resources in by_node.items() if node not in left_out]
