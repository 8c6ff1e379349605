"""What a sweep needs of its cluster: a device, nodes for each stage, memory for each model.

Read next: places.py, waiting.py.
"""

import time
from collections.abc import Collection
from functools import partial

from dis_scale.planning.plan import Plan
from dis_scale.process.errors import UserError
from dis_scale.sweep import Sweep, state
from dis_scale.training import devices
from dis_scale.training.memory import lanes_at_once
from pipelines import nodes
from pipelines.cluster import Cluster
from pipelines.driver import Driver, go_on, silence_of
from pipelines.places import Places
from pipelines.ray_private import Resources
from pipelines.waiting import Wait, needs


def require_device(driver: Driver, cluster: Cluster) -> None:
    """Log the device and the reason. UserError if this machine lacks its GPUs, or a run on GPUs would continue on the CPU."""
    sweep, recipe = driver.sweep, driver.sweep.recipe
    device, why = devices.device_of(recipe, cluster.gpus())
    needed_here = recipe.device != "cpu" and (device == "cpu" or cluster.ours)
    fault = f"; {cluster.gpu_fault}" if cluster.gpu_fault and needed_here else ""
    driver.board.say(f"device   {device} ({why}{fault})")
    try:
        recipe.require_scan_on(device)
    except ValueError as error:
        raise UserError(f"device: {device} ({why}): {error}") from None
    state.require_device(sweep, device, why + fault)


def name_needs(driver: Driver, cluster: Cluster) -> None:
    """Log which later stages the nodes cannot hold yet."""

    def say() -> bool:
        due = [] if cluster.ours else [*_due(driver.sweep, cluster), "evaluate"]
        for stage, (count, request) in _lacking(driver, due).items():
            driver.board.say(f"later    {needs(stage, count, request, nodes.alive_nodes())}")
        return True

    silence_of(driver, cluster).insist(say, partial(go_on, driver))


def holds(driver: Driver, cluster: Cluster, stage: str) -> bool:
    """Return whether the nodes that are alive now can hold the workers of a stage."""
    return cluster.ours or silence_of(driver, cluster).insist(lambda: not _lacking(driver, [stage]), partial(go_on, driver))


def await_nodes(driver: Driver, cluster: Cluster) -> None:
    """Wait until the nodes can hold the workers of each stage after prepare: it is better to wait now than after days.

    Until the first node that declares a stage joins, the workers of this stage would take the nodes of other stages.
    """
    due, silence = _due(driver.sweep, cluster), silence_of(driver, cluster)
    with Wait(driver.gauge) as wait:

        def lacks() -> bool:
            if not (lacking := _lacking(driver, due)):
                return False
            workers, request = next(iter(lacking.values()))
            if text := wait.poll(workers, request, together=workers):
                driver.board.say(text)
            return True

        while silence.ask(lacks) is not False:
            go_on(driver)
            time.sleep(driver.poll_every_s)


def _due(sweep: Sweep, cluster: Cluster) -> list[str]:
    """Return the stages whose nodes are waited for here; not prepare, whose job waits by itself."""
    if cluster.ours:  # a local Ray declares what the recipe needs
        return []
    encodes = state.find_latents(sweep.folder) is None
    trains = not all(state.trained(sweep, model) for model in sweep.recipe.models)
    return ["precompute"] * encodes + ["train"] * trains  # evaluation waits by itself, and keeps no GPU of training idle


def _lacking(driver: Driver, due: Collection[str]) -> dict[str, tuple[int, Resources]]:
    if not due:
        return {}
    device, _ = nodes.choose_device(driver.sweep.recipe)
    lacking = Places.now(driver.sweep.recipe).lacking(device)
    return {stage: need for stage, need in lacking.items() if stage in due}


def require_fits(plan: Plan, cluster: Cluster) -> None:
    """Raise UserError if the memory of the cluster's GPUs is too small for a model at one of the world sizes, beside evaluators.

    A cluster that cannot hold the smallest world size yet is not checked.
    """
    recipe, gpus = plan.recipe, cluster.gpus()
    if gpus < recipe.train.world_sizes[-1] or devices.device_of(recipe, gpus)[0] == "cpu":
        return
    if (gpu_bytes := cluster.gpu_bytes()) is None:
        return
    shared = recipe.evaluate.shared(gpus - cluster.at_once() * recipe.train.most_workers)
    for model, cost in plan.costs.items():
        settings = recipe.train_of(model)
        for world in settings.world_sizes:
            lanes_at_once(model, cost, settings, world, gpu_bytes, shared)
