"""Profile of a few training steps on this machine: rates, memory, and where the time goes. Nothing is saved.

One process takes one worker's share of each step through everything that training does: reader, DeepSpeed, averages.
Read next: loop.py.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from dis_scale.data.latents import prefetch
from dis_scale.process.errors import UserError
from dis_scale.process.machine import free_ports
from dis_scale.recipe import ModelTrain, Recipe
from dis_scale.storage.folder import open_folder
from dis_scale.sweep import Sweep
from dis_scale.sweep.state import require_latents
from dis_scale.training import engine
from dis_scale.training.attempt import Attempt, Start, open_training
from dis_scale.training.inputs import step_inputs
from dis_scale.training.lanes import largest_share
from dis_scale.training.loop import train_step
from dis_scale.training.throughput import synchronize

WARM_STEPS = 2
"""Steps before timing starts: the first one compiles and allocates."""
TOP = 12
"""Operators in the profile's table."""


def one_share(recipe: Recipe, model: str) -> Recipe:
    """Return the recipe of one worker's share of each step of this model."""
    train = recipe.train_of(model)
    lanes = largest_share(train.lanes, train.most_workers)
    part = {"batch_images": lanes * train.lane_images, "lanes": lanes, "workers": 1}
    own = {"train": ModelTrain(), "branch": None, "start": None}
    alone = {model: recipe.models[model].model_copy(update=own)}
    return recipe.model_copy(update={"train": train.model_copy(update=part), "models": alone})


def profile_training(sweep: Sweep, model: str, steps: int, trace: Path | None, log: Callable[[str], None]) -> dict[str, float]:
    """Return the rates of `steps` timed steps; with `trace`, one more step goes into a Chrome trace.

    Raises UserError for an unknown model, a sweep without latents, or more steps than the training has.
    """
    sweep.run(model)
    recipe, latents = one_share(sweep.recipe, model), require_latents(sweep.folder)
    device = torch.device("cuda" if recipe.device != "cpu" and torch.cuda.is_available() else "cpu")
    settings = recipe.train
    longest = settings.images // settings.batch_images - WARM_STEPS - (trace is not None)
    if steps > longest:
        raise UserError(
            f"profile: {steps} steps, and the training of {model} has {longest} beside the first {WARM_STEPS}: time fewer"
        )
    log(f"{model}: one worker's share of a step, {settings.lanes} lanes of {settings.lane_images} images, on {device}")
    with tempfile.TemporaryDirectory() as scratch, process_group(device):
        attempt = Attempt(
            Sweep(open_folder(scratch), recipe), model, latents, 0, device, Start(time.time()),
            require_held=lambda: None, stop_by=lambda: None, report=lambda _: None, log=log,
            emit=lambda *_, **__: None,
        )  # fmt: skip
        (reader, process, passes, meter), (state, backbone, images_seen, *_) = open_training(attempt, log)
        inputs = step_inputs(recipe, recipe.seed_of(model), device, reader, backbone.drop_rates, 0, passes)
        with closing(prefetch(inputs)) as batches:

            def take_step() -> None:
                nonlocal images_seen
                train_step(state, process, settings, list(islice(batches, len(passes))), images_seen)
                images_seen += settings.batch_images

            for _ in range(WARM_STEPS):
                take_step()
            synchronize(device)
            meter.begin(images_seen)
            for _ in range(steps):
                take_step()
            synchronize(device)
            rates = meter.rates(images_seen)
            if trace:
                log(_profiled(take_step, device, trace))
    return rates


def _profiled(take_step: Callable[[], None], device: torch.device, trace: Path) -> str:
    """Write one step's trace in Chrome's format; return its most costly operators as a table."""
    cuda = [ProfilerActivity.CUDA] if device.type == "cuda" else []
    with profile(activities=[ProfilerActivity.CPU, *cuda], record_shapes=True, acc_events=True) as profiler:
        take_step()
        synchronize(device)
    profiler.export_chrome_trace(str(trace))
    key = "self_device_time_total" if cuda else "self_cpu_time_total"
    return str(profiler.key_averages().table(sort_by=key, row_limit=TOP, max_name_column_width=40))


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join a process group of this process only, and leave it at the end."""
    (port,) = free_ports(1)
    place = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    before = dict(os.environ)
    try:
        os.environ.update({key: str(value) for key, value in place.items()})
        engine.connect(device)
        try:
            yield
        finally:
            torch.distributed.destroy_process_group()
    finally:  # processes started later, such as Ray's, are no part of the group
        for name in place:
            os.environ.pop(name, None)
        os.environ.update({name: before[name] for name in place if name in before})
