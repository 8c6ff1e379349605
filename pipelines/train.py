"""Train, one Ray job per model: a placement group of DeepSpeed workers, restarted from the newest resume point after a failure.

The job's driver holds the run's lease, forwards stop requests, copies rows to MLflow, and ends last.
"""

import contextlib
import math
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
from ray.util.placement_group import placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from dis_scale.process.errors import DisScaleError, OutOfMemory, WrongKernel
from dis_scale.process.machine import free_ports
from dis_scale.process.threads import repeating
from dis_scale.recipe import Train
from dis_scale.storage import lease
from dis_scale.sweep import Sweep, state
from dis_scale.sweep.documents import TrackingIds
from dis_scale.tracking.mlflow import RunCopy
from dis_scale.tracking.rows import RowReader
from dis_scale.training import devices
from dis_scale.training.lanes import largest_share
from pipelines import environment, metrics, nodes, packages
from pipelines.failures import WorkerFailure, describe
from pipelines.nodes import choose_device
from pipelines.ranks import Place, RankPlaces, rank_order
from pipelines.restarts import with_restarts
from pipelines.stage import StageJob
from pipelines.watching import FIRST, Watch, watch
from pipelines.worker import Worker, spawn

LOGS_WITHIN_S = 600.0
"""Time after a hang in which the watch, also of a busy driver, has logged the stacks of all workers."""

FITS = "needs less memory: smaller train.micro_images, train.checkpointing=block, larger train.zero_stage, more train.workers"


class Trainer(Worker):
    """One rank."""

    def place(self, device: str, codes: dict[str, str]) -> Place:
        """Return this worker's place, whose network interface it will use; rank 0 will listen at its port.

        NoFamily if its node lacks one of the families' packages or files.
        """
        packages.require(codes)
        context, ip = ray.get_runtime_context(), ray.util.get_node_ip_address()
        interfaces = environment.prepare_group(ip, device)
        (port,) = free_ports(1, host="")
        return Place(ip, context.get_node_id(), context.get_accelerator_ids()["GPU"], port, interfaces)

    def stacks(self) -> str:
        """Return the stack of each thread, and the collectives that have not ended."""
        try:
            return super().stacks() + devices.flight_record()
        except Exception as error:  # a record in another format must not cost the stacks
            return f"{super().stacks()}no record of collectives: {error!r}\n"

    def report(self, done: int) -> None:
        super().report(done)
        self.context.images = done

    def check(self, rank_environment: Mapping[str, object], device: str, waits_s: float, shared: float) -> None:
        """Check this worker's device, join the process group and check the connections; BrokenDevice if the device fails.

        The progress is 1 after the device's check. A worker whose device hangs stays at 0, and the others wait for it.
        """
        os.environ.update({key: str(value) for key, value in rank_environment.items()})
        from dis_scale.training import engine

        devices.check_on_node(where := devices.torch_device(device))
        super().report(1)
        engine.connect(where, waits_s)
        with devices.blaming_others(where, shared):
            devices.check_group(where)

    def train(
        self,
        sweep: Sweep,
        model: str,
        held_lease: lease.Lease,
        device: str,
        start: tuple[float, float | None],
        shared: float,
        *,
        short: int,
    ) -> int:
        """Train as one rank after `check`; return the images seen. `start`, `shared` and `short` are as in `attempt.Attempt`."""
        import torch

        from dis_scale.training.attempt import Attempt, Start
        from dis_scale.training.loop import train_model

        self.report(0)  # from here on progress counts images
        self.context.attempt, self.context.rank = held_lease.number, int(os.environ["RANK"])
        if device == "cpu":
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["WORLD_SIZE"])))
        attempt = Attempt(
            sweep=sweep, model=model, latents=state.require_latents(sweep.folder), number=held_lease.number,
            device=devices.torch_device(device),
            start=Start(*start), require_held=held_lease.require_held, stop_by=self.stop_by,
            report=self.report, log=self.log, emit=self.emit, shared=shared, short=short,
        )  # fmt: skip
        with devices.blaming_others(attempt.device, shared):
            return train_model(attempt)


def train_one(job: StageJob) -> None:
    """Train one model to its last published count; `train.restarts` limits failures in a row without a new resume point."""
    (model,) = job.arguments
    job.connect()
    job.gauge("training_begun_timestamp_seconds", time.time())
    sweep, (device, why) = job.sweep, choose_device(job.recipe)
    job.say(f"{model}: device {device} ({why})")
    state.require_device(sweep, device, why)
    training = TrainingRun(job, model, RankPlaces(job, model, device))
    copy, refresh = RunCopy(sweep, model), partial(metrics.show_run, job.sweep, model, job.gauge)
    with RowCopies(job, copy).running(), repeating(refresh, metrics.REFRESH_EVERY_S, "gauges"):
        try:
            stored = partial(state.resumable_images, sweep.run(model))
            images_seen = with_restarts(job, model, training.attempts, stored)
        except OutOfMemory as error:
            raise OutOfMemory(f"{error}; {FITS}", error.done, error.silent_s) from error
    if images_seen < training.settings.images:
        job.raise_if_stopped()
    copy.finish("FINISHED")


@dataclass(frozen=True)
class Ranks:
    """The workers of an attempt and where they run, by rank."""

    workers: list[Any]
    places: list[Place]


@dataclass
class TrainingRun:
    """The training of one model on this cluster, one attempt after the other."""

    job: StageJob
    model: str
    places: RankPlaces
    short: tuple[int, int] = (0, 0)
    """Largest number of workers with which a GPU's memory was too small for the planned forward passes, and how often it was."""

    @property
    def settings(self) -> Train:
        return self.job.recipe.train_of(self.model)

    @property
    def device(self) -> str:
        return self.places.device

    def attempts(self, failure: WorkerFailure | None) -> int:
        """Run attempts that follow each other without a failure, to grow or to leave a node; return the images seen."""
        images_seen = self._attempt(failure)
        while images_seen < self.settings.images and not self.job.stop_requested():
            images_seen = self._attempt(None)
        return images_seen

    def _attempt(self, failure: WorkerFailure | None) -> int:
        """Run one attempt at a fixed world size; return the images seen, fewer if it stopped to move."""
        start = (failure.at, failure.silent_s) if failure else (time.time(), None)
        lanes, sizes = self.settings.lanes, self.settings.world_sizes
        as_fast = [size for size in sizes if largest_share(lanes, size) == largest_share(lanes, sizes[0])]
        self.job.gauge("training_workers_most", min(as_fast))
        self.job.gauge("training_workers", 0)
        world, group, avoided = self.places.choose()
        self.job.gauge("training_workers", world)
        ranks = None
        try:
            ranks = self._start(group, world)
            self._check(ranks)
            return self._train(ranks, avoided, start)
        except WrongKernel as error:
            if not ranks or len({place.node for place in ranks.places}) > 1:
                raise
            self.places.wrong.add(ranks.places[0].node)
            if not self.places.fits_without({*avoided, *self.places.wrong}):
                raise
            nodes.record_failure_of(self.job, ranks.places[0].node, describe(error))
            raise WorkerFailure(f"{describe(error)}; tried on another node, whose devices may do better") from error
        except OutOfMemory as error:  # the computed memory leaves out fragmentation: smaller passes may fit
            times, share = self._short(world), largest_share(self.settings.lanes, world)
            if times >= (2 if share > 1 else 1):  # passes have one lane by now
                raise
            self.short = max(world, self.short[0]), times + 1
            words = f"{error}; from now on states of scans are not kept, or passes are smaller, and graphs are off"
            raise WorkerFailure(words, error.done, error.silent_s) from error
        except WorkerFailure as failure:
            if ranks and failure.worker is not None:
                names = {node.id: node.name for node in self.places.living()}
                failure.node = names.get(ranks.places[failure.worker].node, "")
            raise
        finally:
            self.places.free(group)

    def _short(self, world: int) -> int:
        """Return how often memory was too small with this many workers or more, which have fewer lanes each."""
        most, times = self.short
        return times if world <= most else 0

    def _start(self, group: Any, world: int) -> Ranks:
        """Start a worker in each bundle, and log where the ranks are."""
        bundles = [PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=i) for i in range(world)]
        workers = [spawn(self.job, Trainer, self.places.request.on(scheduling_strategy=bundle)) for bundle in bundles]
        codes = packages.brought(self.job.recipe)
        calls = [worker.place.remote(self.device, codes) for worker in workers]
        nodes_of_bundles = placement_group_table(group)["bundles_to_node_id"]
        held = [nodes_of_bundles[bundle] for bundle in range(world)]
        names = {node.id: node.name for node in self.places.living() if node.id in held}
        self.job.placed = frozenset(names.values())
        try:
            places = watch(self.job, workers, calls, policy=Watch(keep_logs=False, held=held))
        except WorkerFailure as failure:
            self._blame_start(failure, held, names)
            raise
        order = rank_order(places)
        ranks = Ranks([workers[n] for n in order], [places[n] for n in order])
        self._log_places(ranks.places)
        return ranks

    def _blame_start(self, failure: WorkerFailure, held: Sequence[str], names: Mapping[str, str]) -> None:
        """Count a process that did not start against its node, if it lives and the others suffice: attempts would reuse it."""
        if failure.cause != "lost" or failure.worker is None:
            return
        node = held[failure.worker]
        if node in {each.id for each in self.places.living()} and self.places.fits_without({node}):
            self.job.failed_ids.add(node)
            nodes.record_failure(self.job, names.get(node, node), describe(failure))

    def _check(self, ranks: Ranks) -> None:
        """Join the process group, and check all devices and connections."""
        first, shared = ranks.places[0], self.places.shared()
        variables = {
            "WORLD_SIZE": len(ranks.workers), "MASTER_ADDR": first.ip, "MASTER_PORT": first.port, "LOCAL_RANK": 0,
            "GROUP_WORLD_SIZE": len({place.node for place in ranks.places}),
        }  # fmt: skip
        checks = [
            worker.check.remote(variables | {"RANK": rank}, self.device, group_waits_s(self.settings), shared)
            for rank, worker in enumerate(ranks.workers)
        ]
        try:
            watch(self.job, ranks.workers, checks, policy=Watch(hang_after_s=self.settings.hang_after_s, blame_behind=True))
        except WorkerFailure as failure:
            if failure.silent_s < self.settings.hang_after_s:  # no hang: connections that fail now may work again later
                failure.done = 0
            raise

    def _train(self, ranks: Ranks, avoided: Collection[str], start: tuple[float, float | None]) -> int:
        """Train under the run's lease; return the images seen."""
        sweep, grow_at_s = self.job.sweep, time.monotonic() + self.settings.grow_after_s
        used = {place.node for place in ranks.places}
        with lease.hold(sweep.run(self.model).lease) as held:
            state.record_device(sweep.run(self.model), self.device)
            arguments = (sweep, self.model, held, self.device, start, self.places.shared())
            short = self._short(len(ranks.workers))
            results = [worker.train.remote(*arguments, short=short) for worker in ranks.workers]
            drained, grows = set[str](), False

            def left_s() -> float | None:
                """Return the seconds to save before the attempt moves; None while it stays."""
                nonlocal grows
                if (drained_s := self.places.drained_in_s(used, drained)) is not None:
                    return drained_s
                stays = grows or drained or self.job.stop_requested() or time.monotonic() < grow_at_s
                grows = grows or (not stays and self.places.can_grow(len(ranks.workers), avoided))
                return math.inf if grows or drained else None

            policy = Watch(self.settings.hang_after_s, self.settings.images, left_s)
            return min(watch(self.job, ranks.workers, results, self._report, policy))

    def _report(self, done: list[int]) -> None:
        self.job.context.images = max(done)
        self.job.progress(max(done), self.settings.images, "images")

    def _log_places(self, places: Sequence[Place]) -> None:
        """Log the ranks of each node."""
        names = {place.node: nodes.name_of(place.node) for place in places}
        self.job.placed = frozenset(names.values())
        self.job.emit("placed", model=self.model, nodes=[names[place.node] for place in places])
        for node, name in names.items():
            ranks = [rank for rank, place in enumerate(places) if place.node == node]
            interfaces = places[ranks[0]].interfaces
            self.job.say(f"{self.model}: ranks {ranks[0]} to {ranks[-1]} on node {name}: {interfaces}")


def group_waits_s(settings: Train) -> float:
    """Return the time limit of a collective: longer than the watch needs to find a hang and to log the stacks."""
    return FIRST * settings.hang_after_s + LOGS_WITHIN_S


@dataclass(frozen=True)
class RowCopies:
    """Copies of a run's rows to metrics and to MLflow from a thread of its own: an MLflow that hangs does not delay training.

    Storage has the rows, so a copy that fails is tried again. After the end of training a failure is logged, and fails no model.
    """

    job: StageJob
    copy: RunCopy
    every_s: float = 5.0
    last_s: float = 60.0
    """Time for a copy in progress when training ends, whose rows would otherwise be missing in MLflow."""

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        send = partial(self._send, RowReader(self.job.sweep.run(str(self.copy.model)).log), time.time())
        try:
            with repeating(send, self.every_s, "mlflow") as thread:
                yield
        finally:
            thread.join(self.last_s)
            self._send_last(thread, send)

    def _send(self, rows: RowReader, began_at: float) -> None:
        settings = self.job.recipe.train_of(str(self.copy.model))
        sent = True
        for batch in rows.batches():
            metrics.show_rows(rows.newest.values(), settings, began_at, self.job.gauge)
            sent = self.copy.send(batch, ask=sent)  # a hanging MLflow is asked once: the first turn has a file of each attempt
        if sent:
            self.copy.send(())
        self.job.gauge("mlflow_away", float(self._misses_rows))

    @property
    def _misses_rows(self) -> bool:
        """Whether MLflow lacks rows that it should have: the sweep has a run there, or its recipe asks for one."""
        return self.copy.away and (bool(self.job.recipe.tracking.uri) or TrackingIds.exists(self.job.sweep.folder))

    def _send_last(self, thread: threading.Thread, send: Callable[[], None]) -> None:
        try:
            if thread.is_alive():
                raise TimeoutError(f"no answer for {self.last_s:g} s")
            send()
            if self._misses_rows:
                raise DisScaleError("MLflow is away")
        except Exception as error:
            self.job.say(
                f"{self.copy.model}: its last rows are in storage and not in MLflow: {describe(error)}; "
                f"to copy them: dis-scale mlflow sync {self.job.sweep}",
                level="warning",
            )
