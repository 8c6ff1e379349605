"""Train, one Ray job per model: a placement group of DeepSpeed workers, restarted from the newest resume point after a failure.

The job's driver holds the run's lease, forwards stop requests, copies rows to MLflow, and ends last.
"""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import ray
from ray._private import state as ray_state
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from dis_scale.process import context
from dis_scale.process.errors import OutOfMemory, StorageError
from dis_scale.recipe import Recipe
from dis_scale.storage import lease
from dis_scale.sweep import Sweep, state
from dis_scale.sweep.documents import TrackingIds
from dis_scale.tracking.mlflow import RunCopy
from dis_scale.tracking.rows import RowReader
from dis_scale.training.lanes import largest_share
from pipelines import devices, environment, lines, metrics, nodes, packages, stage
from pipelines.devices import choose_device
from pipelines.restarts import with_restarts
from pipelines.waiting import Wait, capacity
from pipelines.worker import DeviceFailure, Worker, WorkerFailure, amounts, describe, resources, spawn, watch

CAPACITY_WAIT_S = 5.0
"""Longest wait for resources that the previous attempt has not freed yet."""
COPY_EVERY_S, LAST_COPY_S = 5.0, 60.0
"""Interval of copies to MLflow; time for one in progress when training ends, whose rows would otherwise be missing there."""

FITS = "needs less memory: smaller train.micro_images, train.checkpointing=block, larger train.zero_stage, more train.workers"


class Place(NamedTuple):
    """Where a worker runs, a port that was free there, and the network interfaces that it uses, in words."""

    ip: str
    node: str
    gpus: list[str]
    port: int
    interfaces: str


class Trainer(Worker):
    """One rank."""

    def place(self, device: str, codes: dict[str, str]) -> Place:
        """Return this worker's place, whose network interface it will use; rank 0 will listen at its port.

        NoFamily if its node lacks one of the families' packages or files.
        """
        packages.require(codes)
        context, ip = ray.get_runtime_context(), ray.util.get_node_ip_address()
        interfaces = environment.prepare_group(ip, device)
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        return Place(ip, context.get_node_id(), context.get_accelerator_ids()["GPU"], port, interfaces)

    def stacks(self) -> str:
        """Return the stack of each thread, and the collectives that have not ended."""
        try:
            return super().stacks() + devices.flight_record()
        except Exception as error:  # a record in another format must not cost the stacks
            return f"{super().stacks()}no record of collectives: {error!r}\n"

    def report(self, done: int) -> None:
        super().report(done)
        context.facts["images"] = done

    def check(self, rank_environment: dict[str, Any], device: str) -> None:
        """Join the process group and check this worker's device and connections; BrokenDevice if one fails."""
        os.environ.update({key: str(value) for key, value in rank_environment.items()})
        from dis_scale.training import engine

        devices.check_device(where := devices.torch_device(device))
        engine.connect(where)
        devices.check_group(where)

    def train(
        self,
        sweep: Sweep,
        model: str,
        held_lease: lease.Lease,
        device: str,
        requested_at: float,
        silent_s: float | None,
    ) -> int:
        """Train as one rank after `check`; return the images seen. `requested_at` and `silent_s` are as in `loop.Start`."""
        import torch

        from dis_scale.training.loop import Attempt, Start, train_model

        context.facts |= {"attempt": held_lease.number, "rank": int(os.environ["RANK"])}

        if device == "cpu":
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["WORLD_SIZE"])))
        attempt = Attempt(
            sweep=sweep, model=model, latents=state.require_latents(sweep.folder), number=held_lease.number,
            device=devices.torch_device(device),
            start=Start(requested_at, silent_s), held=held_lease.held, stop_requested=self.stop_requested,
            report=self.report, log=self.log, emit=self.emit,
        )  # fmt: skip
        return train_model(attempt)


def train_one(sweep: Sweep, arguments: list[str]) -> None:
    """Train one model to its last published count; `train.restarts` limits failures in a row without a new resume point."""
    (model,) = arguments
    stage.connect()
    metrics.gauge("training_begun_timestamp_seconds", time.time())
    device, why = choose_device(sweep.recipe)
    lines.say(f"{model}: device {device} ({why})")
    state.require_device(sweep, device, why)
    run, images = sweep.run(model), sweep.recipe.train_of(model).images

    def attempts(failure: WorkerFailure | None) -> int:
        images_seen = _attempt(sweep, model, device, failure)
        while images_seen < images and not stage.stop_requested():
            images_seen = _attempt(sweep, model, device, None)  # it stopped to grow, or to leave a node
        return images_seen

    copy = RunCopy(sweep, model)
    gauges = partial(_show_run, sweep, model)
    with _copying(copy, RowReader(run.log)), metrics.refreshing(gauges):
        try:
            images_seen = with_restarts(sweep.recipe, model, attempts, lambda: state.resumable_images(run))
        except OutOfMemory as error:
            raise OutOfMemory(f"{error}; {FITS}") from error
    if images_seen < images:
        stage.raise_if_stopped()
    copy.finish("FINISHED")


def _show_run(sweep: Sweep, model: str) -> None:
    metrics.show_run(sweep, model, len(nodes.failed(sweep)))


def _attempt(sweep: Sweep, model: str, device: str, failure: WorkerFailure | None) -> int:
    """Run one attempt at a fixed world size, under a lease of its own; return the images seen, fewer if it stopped to move."""
    requested_at, silent_s = (failure.at, failure.silent_s) if failure else (time.time(), None)
    settings, request = sweep.recipe.train_of(model), resources("train", device, 1)
    bundle = amounts(request)
    avoided = nodes.excluded(sweep, lambda ids: largest_fitting(settings.world_sizes, _possible(bundle, ids)) > 0)
    world, group = _place(sweep.recipe, bundle, avoided)
    try:
        workers, places = _ranks(request, group, world, device, packages.brought(sweep.recipe))
        _log_places(model, places)
        variables = {"WORLD_SIZE": world, "MASTER_ADDR": places[0].ip, "MASTER_PORT": places[0].port, "LOCAL_RANK": 0}
        checks = [worker.check.remote(variables | {"RANK": rank}, device) for rank, worker in enumerate(workers)]
        watch(workers, checks, lambda _: None, settings.hang_after_s)
        with lease.hold(sweep.run(model).lease) as held:
            state.record_device(sweep.run(model), device)
            results = [worker.train.remote(sweep, model, held, device, requested_at, silent_s) for worker in workers]
            used, grow_at_s = {place.node for place in places}, time.monotonic() + settings.grow_after_s

            def moves() -> bool:
                return _node_drains(model, used) or (
                    time.monotonic() > grow_at_s and _can_grow(sweep, model, bundle, world, avoided)
                )

            def report(done: list[int]) -> None:
                context.facts["images"] = max(done)
                lines.progress(max(done), settings.images, "images")

            # After the last step there is only storage to wait for, which has a patience of its own.
            return min(watch(workers, results, report, settings.hang_after_s, moves, last=settings.images))
    except DeviceFailure as broken:
        try:
            nodes.record_failure(sweep, model, places[broken.worker].node, str(broken))
        except StorageError as error:
            lines.say(f"{model}: the failure of a node's device is not stored: {error}")
        raise
    finally:
        remove_placement_group(group)


def _ranks(
    request: dict[str, Any], group: Any, world: int, device: str, codes: dict[str, str]
) -> tuple[list[Any], list[Place]]:
    """Start a worker in each bundle; return workers and places by rank."""
    bundles = [PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=i) for i in range(world)]
    workers = [spawn(Trainer, request | {"scheduling_strategy": bundle}) for bundle in bundles]
    places = watch(workers, [worker.place.remote(device, codes) for worker in workers], lambda _: None, keep_logs=False)
    order = rank_order(places)
    return [workers[n] for n in order], [places[n] for n in order]


def rank_order(places: Sequence[Place]) -> list[int]:
    """Return the workers' numbers by rank: in the order of nodes, then of GPUs.

    A placement group's bundles have no order. Ranks that have one get the same neighbours on the same nodes in each attempt.
    """
    return sorted(range(len(places)), key=lambda n: places[n][:3])


def _log_places(model: str, places: Sequence[Place]) -> None:
    """Log the ranks of each node."""
    names = {place.node: nodes.name_of(place.node) for place in places}
    lines.emit("placed", model=model, nodes=[names[place.node] for place in places])
    for node, name in names.items():
        ranks = [rank for rank, place in enumerate(places) if place.node == node]
        lines.say(f"{model}: ranks {ranks[0]} to {ranks[-1]} on node {name}: {places[ranks[0]].interfaces}")


def _place(recipe: Recipe, bundle: dict[str, float], avoided: Collection[str]) -> tuple[int, Any]:
    """Return (world size, its placement group); the size is chosen again if its capacity is lost before it is placed."""
    while True:
        world = _world_size(recipe, bundle, avoided)
        labels = [nodes.avoiding(avoided)] * world if avoided else None
        group = placement_group([bundle] * world, strategy="PACK", bundle_label_selector=labels)
        try:
            if _placed(group, world, bundle, lambda: largest_fitting(recipe.train.world_sizes, _free(bundle, avoided))):
                return world, group
        except BaseException:
            remove_placement_group(group)
            raise
        remove_placement_group(group)


def _placed(group: Any, world: int, bundle: dict[str, float], fitting: Callable[[], int]) -> bool:
    """Wait for capacity, and log it; False if only fewer workers fit now, as after the loss of a node."""
    ready = group.ready()
    with Wait() as wait:
        while not ray.wait([ready], timeout=1)[0]:
            if 0 < fitting() < world:
                return False
            wait.log(world, bundle, together=world)
    return True


def _world_size(recipe: Recipe, bundle: dict[str, float], avoided: Collection[str]) -> int:
    """The largest of the recipe's world sizes that fits, otherwise its smallest, which then waits.

    Resources of the attempt before come free a moment later: waits for them.
    """
    sizes, deadline = recipe.train.world_sizes, time.monotonic() + CAPACITY_WAIT_S
    while True:
        possible = largest_fitting(sizes, _possible(bundle, avoided))
        free = largest_fitting(sizes, _free(bundle, avoided))
        if free == possible or time.monotonic() > deadline or stage.stop_requested():
            return free or sizes[-1]
        stage.pause(0.2)


def largest_fitting(sizes: Sequence[int], workers: int) -> int:
    """Return the largest of the falling `sizes` that is at most `workers`; 0 if none is."""
    return next((size for size in sizes if size <= workers), 0)


def _free(bundle: dict[str, float], avoided: Collection[str]) -> int:
    """How many more workers fit now on other nodes than the `avoided` ones."""
    return capacity(bundle, _nodes_that_stay(ray_state.available_resources_per_node(), avoided))


def _possible(bundle: dict[str, float], avoided: Collection[str]) -> int:
    """How many workers fit on other nodes than the `avoided` ones once all their resources are free."""
    return capacity(bundle, _nodes_that_stay(ray_state.total_resources_per_node(), avoided))


def _nodes_that_stay(by_node: dict[str, dict[str, float]], avoided: Collection[str]) -> list[dict[str, float]]:
    """Resources of the nodes that are not avoided or being drained: Ray still counts those that are, and places nothing there."""
    left_out = _draining() | set(avoided)
    return [resources for node, resources in by_node.items() if node not in left_out]


def _draining() -> set[str]:
    """Nodes that will be taken away: `ray drain-node`, KubeRay, an autoscaler and a spot notice all end here."""
    return set(ray_state.state.get_draining_nodes())


def _node_drains(model: str, nodes: set[str]) -> bool:
    """Whether one of the attempt's nodes is being drained, logged if so; until it goes, its workers can still save."""
    drains = bool(nodes & _draining())
    if drains:
        lines.emit("drain", model=model)
        lines.say(
            f"{model}: a node of its workers is being drained: they stop at a resume point and continue elsewhere"
        )
    return drains


def _can_grow(sweep: Sweep, model: str, bundle: dict[str, float], world: int, avoided: Collection[str]) -> bool:
    """Whether a larger world size fits now, counting the running workers' own resources, and is faster; logged if so."""
    settings = sweep.recipe.train
    if world == settings.most_workers:
        return False
    larger = largest_fitting(settings.world_sizes, world + _free(bundle, avoided))
    grows = larger > world and largest_share(settings.lanes, larger) < largest_share(settings.lanes, world)
    if grows:
        lines.emit("grow", model=model, workers=world, to=larger)
        lines.say(f"{model}: capacity for {larger} workers: {world} stop at a resume point and continue as {larger}")
    return grows


@contextlib.contextmanager
def _copying(copy: RunCopy, rows: RowReader) -> Iterator[None]:
    """Copy rows to metrics and to MLflow from a thread of its own: an MLflow that hangs does not delay training.

    Storage has the rows, and a copy that fails is tried again. After the end it is logged: it never fails the model.
    """
    over, began_at, settings = threading.Event(), time.time(), copy.sweep.recipe.train_of(str(copy.model))

    def send() -> None:
        for batch in rows.batches():
            metrics.show_rows(rows.newest.values(), settings, began_at)
            copy.send(batch)
        # A sweep without a run in MLflow misses none.
        metrics.gauge("mlflow_away", float(copy.away and TrackingIds.exists(copy.sweep.folder)))

    def run() -> None:
        while not over.wait(COPY_EVERY_S):
            with contextlib.suppress(Exception):
                send()

    thread = threading.Thread(target=run, daemon=True, name="mlflow")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(LAST_COPY_S)
        try:
            if thread.is_alive():
                raise TimeoutError(f"no answer for {LAST_COPY_S:g} s")
            send()
        except Exception as error:
            lines.say(
                f"{copy.model}: its last rows are in storage and not in MLflow: {describe(error)}; "
                f"to copy them: dis-scale mlflow sync {copy.sweep}",
                level="warning",
            )
