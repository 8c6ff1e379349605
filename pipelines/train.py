"""Train, a Ray job a model: a placement group of DeepSpeed workers, restarted from the last resume point when one is lost.

The driver holds the run's lease, hands on the wish to stop, projects rows into MLflow, and leaves last.
"""

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from dis_scale import lease
from dis_scale.errors import StorageError
from dis_scale.recipe import Recipe
from dis_scale.storage import Folder
from dis_scale.tracking import Projection, Rows
from pipelines import stage

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
        self, place: dict[str, Any], sweep: Folder, recipe: Recipe, model: str, held_lease: lease.Lease, device: str
    ) -> int:
        os.environ.update({key: str(value) for key, value in place.items()})
        import torch

        from dis_scale import engine
        from dis_scale.data import shards
        from dis_scale.train import Run, train

        if device == "cpu":
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // place["WORLD_SIZE"]))
        where = torch.device(device, 0) if device == "cuda" else torch.device("cpu")
        engine.connect(where)
        return train(
            Run(
                recipe, model, sweep, shards.latents_of(sweep), held_lease.number, where, held_lease.held, self._wish.is_set,
                lambda images: setattr(self, "_done", images), lambda line: self._said.append(line),
            )
        )  # fmt: skip


def train_model(sweep: Folder, recipe: Recipe, arguments: list[str]) -> None:
    """Trains one model to its last published count; a lost worker costs an attempt, of which the recipe allows some."""
    (model,) = arguments
    stage.connect()
    device, why = stage.choose_device(recipe)
    stage.say(f"{model}: device {device} ({why})")
    projection, rows = Projection(sweep, model), Rows(sweep / "runs" / model / "log")
    with _mirroring(projection, rows):
        images = stage.with_restarts(recipe, model, lambda: _attempt(sweep, recipe, model, device))
    if images < recipe.train.images:
        stage.leave_if_asked()
    projection.finish("FINISHED")


def _attempt(sweep: Folder, recipe: Recipe, model: str, device: str) -> int:
    """One attempt at a fixed world size, under a lease of its own; returns the images seen."""
    world = recipe.train.workers
    bundle = stage.resources("train", device, 1)
    custom = bundle.get("resources", {}) | {"CPU": 1} | ({"GPU": 1} if device == "cuda" else {})
    group = placement_group([custom] * world, strategy="PACK")
    try:
        _await(group, world)
        options = [PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=i) for i in range(world)]
        workers = [stage.spawn(Trainer, bundle | {"scheduling_strategy": option}) for option in options]
        host, port = ray.get(workers[0].address.remote())
        place = {"WORLD_SIZE": world, "MASTER_ADDR": host, "MASTER_PORT": port, "LOCAL_RANK": 0}
        with lease.hold(sweep / "runs" / model / "lease") as held:
            results = [
                worker.train.remote(place | {"RANK": rank}, sweep, recipe, model, held, device)
                for rank, worker in enumerate(workers)
            ]
            total = recipe.train.images
            return min(stage.watch(workers, results, lambda done: stage.progress(max(done), total, "images")))
    finally:
        remove_placement_group(group)


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


def _await(group: Any, world: int) -> None:
    """Waits for room; says what it waits for."""
    ready, said = group.ready(), False
    while not ray.wait([ready], timeout=1)[0]:
        stage.leave_if_asked()
        if not said:
            stage.say(f"waiting for room for {world} workers: the cluster has {ray.available_resources()} free")
            said = True
