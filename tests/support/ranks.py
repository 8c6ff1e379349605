"""Training without Ray: ranks as processes over gloo on synthetic latents, with injected faults."""

import contextlib
import hashlib
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from dis_scale.data import shards
from dis_scale.data.shards import Sample
from dis_scale.process.machine import free_ports
from dis_scale.recipe import Recipe
from dis_scale.storage.folder import Folder, open_folder
from dis_scale.sweep import Sweep
from tests.support.documents import made_from

os.environ["DS_ACCELERATOR"] = "cpu"
TIMEOUT_S = 400
WAITS_S = 4200.0
"""Time limit of a collective."""
PRELOAD = ["deepspeed", "torch._dynamo", "dis_scale.training.loop"]
multiprocessing.set_forkserver_preload(PRELOAD)


def start_server() -> None:
    """Start the processes' server, where `tests` is this package: one of the environment's packages installs that name, too."""
    with contextlib.chdir(Path(__file__).parents[2]):
        forkserver.ensure_running()


def on_ranks(world: int, check: Callable[..., None], *arguments: object) -> None:
    """Run a check on each rank of a process group of new processes: DeepSpeed starts once per process."""
    start_server()
    arguments = (world, *free_ports(1), check, *arguments)
    start_processes(_checked, arguments, world, start_method="forkserver")


def _checked(rank: int, world: int, port: int, check: Callable[..., None], *arguments: object) -> None:
    _join(rank, world, port)
    check(*arguments)
    dist.barrier()  # rank 0 holds the store, which another may still need to make its last group


def at_each_stage(check: Callable[[int], None], stages: tuple[int, ...] = (1, 2, 3)) -> None:
    for stage in stages:
        check(stage)


def _join(rank: int, world: int, port: int) -> None:
    """Join the process group as one rank, which computes in one thread on the CPU."""
    place = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in place.items()})
    torch.set_num_threads(1)
    from dis_scale.training import engine

    engine.connect(torch.device("cpu"), WAITS_S)


def make_latents(at: Folder, recipe: Recipe) -> Folder:
    """Make a small complete set of latents for the tiny recipe."""
    rng = np.random.default_rng(0)
    for number in range(3):
        part = [Sample(number * 16 + i, f"{i}", i % 10, rng.standard_normal((2, 8, 8, 8)).astype(np.float16)) for i in range(16)]
        shards.put_shard(at, number, part, [])
    shards.write_manifest(at, range(3), made_from(num_classes=recipe.data.num_classes))
    return at


def sweep_of(root: Path, recipe: Recipe) -> Sweep:
    """Return the sweep that `run` trains below `root`."""
    return Sweep(open_folder(root) / "sweep", recipe)


def run(recipe: Recipe, model: str, root: Path, attempt: int, stop_at: int | None = None, faults: Path | None = None) -> None:
    """Train in `recipe.train.workers` processes. With `stop_at`, the last rank requests a stop from that image count on.

    `faults` is a fault plan; SIGTERM to a rank is a stop request. `inputs` returns the inputs of all steps.
    """
    world = recipe.train.workers
    latents = open_folder(root) / "latents"
    if not latents.exists("manifest.json"):
        make_latents(latents, recipe)
    arguments = (world, *free_ports(1), recipe, model, str(root), attempt, stop_at, faults)
    start_server()
    ranks: Any = start_processes(_rank, arguments, world, join=False, start_method="forkserver")
    # If one rank dies, the others get SIGTERM. To them it is a stop request, so they are killed after a second.
    deadline = time.monotonic() + TIMEOUT_S
    while not ranks.join(timeout=5, grace_period=1):
        assert time.monotonic() < deadline, f"the ranks of {model} have not ended"


def _rank(
    rank: int, world: int, port: int, recipe: Recipe, model: str, root: str, attempt: int, stop_at: int | None,
    plan: Path | None,
) -> None:  # fmt: skip
    from dis_scale.process import faults
    from dis_scale.training.loop import train_model

    faults.use(plan)
    asked = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: asked.set())
    _join(rank, world, port)
    _note_inputs(Path(root) / "inputs", rank)
    steps = iter(range(1, 10**9))

    def stop_by() -> float | None:
        """Called once per step, before it begins."""
        due = stop_at is not None and rank == world - 1 and next(steps) * recipe.train.batch_images > stop_at
        return math.inf if due or asked.is_set() else None

    train_model(replace(attempt_on_a_rank(Path(root), recipe, model, attempt), stop_by=stop_by))


def attempt_on_a_rank(root: Path, recipe: Recipe, model: str, number: int) -> Any:
    """Return an attempt on the latents below `root`, without a lease or a log of its own."""
    from dis_scale.training.attempt import Attempt, Start

    return Attempt(
        sweep_of(root, recipe), model, open_folder(root) / "latents", number, torch.device("cpu"), Start(time.time()),
        require_held=lambda: None, stop_by=lambda: None, report=_nothing, log=print, emit=_nothing,
    )  # fmt: skip


def inputs(root: Path) -> dict[int, list[str]]:
    """Return the inputs of each step by images seen before it: one hash per lane of images, labels, noise, times, masks."""
    lines = [line.split() for file in sorted((root / "inputs").glob("*")) for line in file.read_text().splitlines()]
    steps: dict[int, list[str]] = {}
    for images, digest in sorted(((int(images), digest) for images, digest in lines), key=lambda line: line[0]):
        steps.setdefault(images, []).append(digest)
    return steps


def _note_inputs(folder: Path, rank: int) -> None:
    """Write one line per lane before each step. Lanes are in order within a rank, and so are the ranks."""
    from dis_scale.training import loop

    folder.mkdir(exist_ok=True)
    take_step = loop.train_step

    def noted(state: Any, process: Any, settings: Any, inputs: Any, images_seen: int) -> Any:
        with (folder / f"{rank}").open("a") as file:
            for micro, t_B, drop, weight in inputs:
                by_image = [x for x in (*micro, t_B, drop if drop is None else drop.T) if x is not None]
                for lane in zip(*(x.split(settings.lane_images) for x in by_image), strict=True) if weight else ():
                    digest = hashlib.sha256(b"".join(x.contiguous().numpy().tobytes() for x in lane)).hexdigest()
                    file.write(f"{images_seen} {digest}\n")
        return take_step(state, process, settings, inputs, images_seen)

    loop.train_step = noted


def _nothing(*_: Any, **__: Any) -> None: ...
