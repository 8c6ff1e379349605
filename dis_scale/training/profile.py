"""A few training steps on this machine, of which nothing is kept: how fast they are, and where their time goes.

One process takes one worker's share of each step, through all that training does: reader, DeepSpeed, averages. Read next: train.py.
"""

import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from dis_scale import diffusion
from dis_scale.data import shards
from dis_scale.data.latents import open_latents, prefetch
from dis_scale.errors import UserError, nearest
from dis_scale.models.cost import price_model
from dis_scale.recipe import Recipe
from dis_scale.storage.folder import Folder, open_folder
from dis_scale.training import engine
from dis_scale.training.loop import Run, micro_batches, start, step
from dis_scale.training.throughput import open_pace, synchronize

WARM_STEPS = 2
"""Steps before any is counted: the first compiles and allocates."""
TOP = 12
"""Operators of the profile's table."""


def one_share(recipe: Recipe) -> Recipe:
    """The recipe of one worker's part of each step."""
    train, workers = recipe.train, recipe.train.most_workers
    part = {"batch_images": train.batch_images // workers, "lanes": train.lanes // workers, "workers": 1}
    return recipe.model_copy(update={"train": train.model_copy(update=part)})


def trial(
    sweep: Folder, recipe: Recipe, model: str, steps: int, trace: Path | None, say: Callable[[str], None]
) -> dict[str, float]:
    """Takes `steps` counted steps, and one more into a Chrome trace where that is asked for; the rates of the counted ones.

    UserError for a model that the sweep has not, or a sweep without latents.
    """
    if model not in recipe.models:
        raise UserError(
            f"no model {model!r} in {sweep}{nearest(model, recipe.models)}; it has {', '.join(recipe.models)}"
        )
    recipe, latents = one_share(recipe), shards.latents_of(sweep)
    device = torch.device("cuda" if recipe.device != "cpu" and torch.cuda.is_available() else "cpu")
    settings = recipe.train
    say(f"{model}: one worker's share of a step, {settings.lanes} x {settings.micro_images} images, on {device}")
    with tempfile.TemporaryDirectory() as scratch, _alone(device):
        run = Run(
            recipe, model, open_folder(scratch), latents, 0, device,
            held=lambda: True, wish=lambda: False, report=lambda _: None, say=say, wanted=time.time(),
        )  # fmt: skip
        reader, _ = open_latents(latents, recipe, 1, say)
        state, backbone, images = start(run, reader)
        process = diffusion.build(recipe.diffusion)
        pace = open_pace(
            price_model(recipe.models[model], reader.shape, recipe.data.num_classes), settings, 1, device, say
        )
        with closing(prefetch(micro_batches(run, reader, backbone.drop_rates, 0, range(settings.lanes)))) as batches:

            def take() -> None:
                nonlocal images
                step(state, process, settings, list(islice(batches, settings.lanes)), images)
                images += settings.batch_images

            for _ in range(WARM_STEPS):
                take()
            synchronize(device)
            pace.begin(images)
            for _ in range(steps):
                take()
            synchronize(device)
            found = pace.rows(images)
            if trace:
                say(_profiled(take, device, trace))
    return found


def _profiled(take: Callable[[], None], device: torch.device, trace: Path) -> str:
    """One step's trace in Chrome's format, and its most costly operators as a table."""
    cuda = [ProfilerActivity.CUDA] if device.type == "cuda" else []
    with profile(activities=[ProfilerActivity.CPU, *cuda], record_shapes=True, acc_events=True) as seen:
        take()
        synchronize(device)
    seen.export_chrome_trace(str(trace))
    key = "self_device_time_total" if cuda else "self_cpu_time_total"
    return seen.key_averages().table(sort_by=key, row_limit=TOP, max_name_column_width=40)


@contextmanager
def _alone(device: torch.device) -> Iterator[None]:
    """A process group of this process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in place.items()})
    engine.connect(device)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
