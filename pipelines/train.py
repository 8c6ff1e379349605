"""Train, a Ray job a model: a placement group of DeepSpeed workers, restarted from the last resume point when one is lost.

The driver holds the run's lease, hands on the wish to stop, projects rows into MLflow, and leaves last.
"""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import ray
from ray._private import state
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from dis_scale.errors import StorageError
from dis_scale.recipe import Recipe
from dis_scale.storage import lease
from dis_scale.storage.folder import Folder
from dis_scale.tracking import Projection, Rows
from dis_scale.training.checkpoint import newest_images
from pipelines import stage

ROOM_WAIT_S = 5.0
PROJECT_EVERY_S, PROJECT_LAST_S = 5.0, 60.0
"""Between two looks for new rows; and for a look that is under way when training ends, whose rows would else be lost to MLflow."""


class Trainer(stage.Worker):
    """One rank."""

    def address(self) -> tuple[str, int]:
        """Where rank 0 will listen."""
        with socket.socket() as free:
            free.bind(("", 0))
            return ray.util.get_node_ip_address(), free.getsockname()[1]

    def train(
        self,
        place: dict[str, Any],
        sweep: Folder,
        recipe: Recipe,
        model: str,
        held_lease: lease.Lease,
        device: str,
        wanted: tuple[float, float | None],
    ) -> int:
        os.environ.update({key: str(value) for key, value in place.items()})
        import torch

        from dis_scale.data import shards
        from dis_scale.training import engine
        from dis_scale.training.loop import Run, train

        if device == "cpu":
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // place["WORLD_SIZE"]))
        where = torch.device(device, 0) if device == "cuda" else torch.device("cpu")
        engine.connect(where)
        return train(
            Run(
                recipe, model, sweep, shards.latents_of(sweep), held_lease.number, where, held_lease.held, self._wish.is_set,
                lambda images: setattr(self, "_done", images), lambda line: self._said.append(line),
                *wanted,
            )
        )  # fmt: skip


def train_model(sweep: Folder, recipe: Recipe, arguments: list[str]) -> None:
    """Trains one model to its last published count; a lost worker costs an attempt, of which the recipe allows some."""
    (model,) = arguments
    stage.connect()
    device, why = stage.choose_device(recipe)
    stage.say(f"{model}: device {device} ({why})")
    run = sweep / "runs" / model
    projection, rows = Projection(sweep, model), Rows(run / "log")

    def attempts(lost: stage.Lost | None) -> int:
        images = _attempt(sweep, recipe, model, device, lost)
        while images < recipe.train.images and not stage.wish.is_set():
            images = _attempt(sweep, recipe, model, device, None)  # it stopped to grow, or to leave a node
        return images

    with _mirroring(projection, rows):
        images = stage.with_restarts(recipe, model, attempts, lambda: newest_images(run))
    if images < recipe.train.images:
        stage.leave_if_asked()
    projection.finish("FINISHED")


def _attempt(sweep: Folder, recipe: Recipe, model: str, device: str, lost: stage.Lost | None) -> int:
    """One attempt at a fixed world size, under a lease of its own; returns the images seen, fewer where it stopped to move."""
    began = time.time()
    bundle = stage.resources("train", device, 1)
    custom = bundle.get("resources", {}) | {"CPU": 1} | ({"GPU": 1} if device == "cuda" else {})
    world, group = _place(recipe, custom)
    try:
        options = [PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=i) for i in range(world)]
        workers = [stage.spawn(Trainer, bundle | {"scheduling_strategy": option}) for option in options]
        host, port = ray.get(workers[0].address.remote())
        place = {"WORLD_SIZE": world, "MASTER_ADDR": host, "MASTER_PORT": port, "LOCAL_RANK": 0}
        wanted = (lost.at, lost.silent_s) if lost else (began, None)
        with lease.hold(sweep / "runs" / model / "lease") as held:
            results = [
                worker.train.remote(place | {"RANK": rank}, sweep, recipe, model, held, device, wanted)
                for rank, worker in enumerate(workers)
            ]
            nodes = set(placement_group_table(group)["bundles_to_node_id"].values())
            total, due = recipe.train.images, time.monotonic() + recipe.train.grow_after_s

            def moves() -> bool:
                return _node_goes(model, nodes) or (time.monotonic() > due and _more_fit(recipe, custom, world))

            def report(done: list[int]) -> None:
                stage.progress(max(done), total, "images")

            return min(stage.watch(workers, results, report, recipe.train.hang_after_s, moves))
    finally:
        remove_placement_group(group)


def _place(recipe: Recipe, bundle: dict[str, float]) -> tuple[int, Any]:
    """(world size, its placement group), the size chosen anew where what it was to have is gone before it had it."""
    while True:
        world = _world_size(recipe, bundle)
        group = placement_group([bundle] * world, strategy="PACK")
        try:
            if _placed(group, world, lambda: _largest(recipe.train.world_sizes, _free(bundle))):
                return world, group
        except BaseException:
            remove_placement_group(group)
            raise
        remove_placement_group(group)


def _placed(group: Any, world: int, to_be_had: Callable[[], int]) -> bool:
    """Waits for room and says what it waits for; False where there is room for fewer now, as after the loss of a node."""
    ready, said = group.ready(), False
    while not ray.wait([ready], timeout=1)[0]:
        stage.leave_if_asked()
        if 0 < to_be_had() < world:
            return False
        if not said:
            stage.say(f"waiting for room for {world} workers: the cluster has {ray.available_resources()} free")
            said = True
    return True


def _world_size(recipe: Recipe, bundle: dict[str, float]) -> int:
    """The largest of the recipe's world sizes for which there is room, else its smallest, which then waits.

    What an attempt before has left comes free a moment later: waits for it where the cluster has it.
    """
    sizes, deadline = recipe.train.world_sizes, time.monotonic() + ROOM_WAIT_S
    while True:
        to_be_had = _largest(sizes, _room(bundle, stage.nodes_that_stay(state.total_resources_per_node())))
        free = _largest(sizes, _free(bundle))
        if free == to_be_had or time.monotonic() > deadline or stage.wish.is_set():
            return free or sizes[-1]
        stage.pause(0.2)


def _largest(sizes: Sequence[int], room: int) -> int:
    """The largest of the falling `sizes` for which there is room; 0 where there is for none."""
    return next((size for size in sizes if size <= room), 0)


def _room(bundle: dict[str, float], nodes: Iterable[dict[str, float]]) -> int:
    """How many workers of these resources the nodes hold; one worker's lie on one node."""
    return sum(min(int(node.get(name, 0) // amount) for name, amount in bundle.items()) for node in nodes)


def _free(bundle: dict[str, float]) -> int:
    """How many more workers fit now on nodes that stay."""
    return _room(bundle, stage.nodes_that_stay(state.available_resources_per_node()))


def _node_goes(model: str, nodes: set[str]) -> bool:
    """Whether one of the attempt's nodes is being drained: while it stands, its workers can still save."""
    going = bool(nodes & stage.draining())
    if going:
        stage.say(f"{model}: a node of its workers is being drained: they stop at a resume point, to go on elsewhere")
    return going


def _more_fit(recipe: Recipe, bundle: dict[str, float], world: int) -> bool:
    """Whether a larger world size has room now, the running workers' own included."""
    if world == recipe.train.world_sizes[0]:
        return False
    larger = _largest(recipe.train.world_sizes, world + _free(bundle))
    if larger > world:
        stage.say(f"there is room for {larger} workers: {world} stop at a resume point, to go on as {larger}")
    return larger > world


@contextlib.contextmanager
def _mirroring(projection: Projection, rows: Rows) -> Iterator[None]:
    """Sends rows to MLflow from a thread of its own while training runs: a mirror that hangs holds nothing up."""
    over = threading.Event()

    def mirror() -> None:
        while not over.wait(PROJECT_EVERY_S):
            with contextlib.suppress(StorageError):
                projection.send(rows.new())

    thread = threading.Thread(target=mirror, daemon=True, name="mirror")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(PROJECT_LAST_S)
    if not thread.is_alive():
        projection.send(rows.new())
