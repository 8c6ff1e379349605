"""The training loop: one screen, explicit state, images seen as the clock.

*When* things are due stands here; *how* each is done stands in engine.py (the sharded step), checkpoint.py (what is kept),
data/latents.py (what step s sees) and diffusion/ (the loss). Runs on every rank of a process group. Read next: pipelines/train.py.
"""

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist

from dis_scale import checkpoint, diffusion, ema, engine, models, seeds
from dis_scale.checkpoint import Saver, Stored
from dis_scale.data.latents import Latents, Micro, micro_batch, open_latents, prefetch
from dis_scale.diffusion.process import Process
from dis_scale.engine import Engine
from dis_scale.errors import DisScaleError
from dis_scale.models import Backbone
from dis_scale.models.export import describe
from dis_scale.recipe import Recipe, Train
from dis_scale.scan import choose
from dis_scale.storage import Folder
from dis_scale.tracking import ATTEMPT, Log

ROWS_EVERY_STEPS = 10
FLUSH_EVERY_S = 10.0
BAD_STEPS = 20
"""Steps skipped in a row, their gradients not being finite, after which a run stops."""


@dataclass(frozen=True)
class Run:
    """One model's training in one attempt: what it is, where it lives, and how it is told to stop."""

    recipe: Recipe
    model: str
    sweep: Folder
    latents: Folder
    attempt: int
    device: torch.device
    held: Callable[[], bool]
    """Whether this attempt still owns the run."""
    wish: Callable[[], bool]
    """Whether somebody has asked to stop."""
    report: Callable[[int], None]
    """Told the images seen, now and then."""
    say: Callable[[str], None]

    @property
    def folder(self) -> Folder:
        return self.sweep / "runs" / self.model


def train(run: Run) -> int:
    """Trains from the newest whole resume point to the last published count, or to a step agreed on when asked to stop.

    Returns the images seen. Bit-equal to an undisturbed run at the same world size, stage, device kind, threads and versions.
    """
    settings, rank, world = run.recipe.train, dist.get_rank(), dist.get_world_size()
    latents, how = open_latents(run.latents, run.recipe, world, run.say)
    process = diffusion.build(run.recipe.diffusion)
    state, model, images = _start(run, latents)
    saver = Saver(run.folder, run.attempt, rank, world, run.held, settings.keep_resume)
    log, agreement = Log(run.folder / "log", run.attempt), Agreement(run.device)
    description = json.dumps(describe(model))
    lanes = range(rank * settings.lanes // world, (rank + 1) * settings.lanes // world)
    began, flushed, saved, paused_s, bad = (time.monotonic(), images), time.monotonic(), images, 0.0, 0

    def facts() -> dict[str, Any]:
        log.flush()  # a resume point never stands without the rows before it
        return {"adam_step": _adam_step(state), "model": run.model}

    if rank == 0:
        run.say(f"{run.model}: {how}")
        log.add(images, {ATTEMPT: run.attempt})
    if images == 0 and 0 in settings.publish_images:
        saver.publish(state, 0, facts(), description)
    with closing(prefetch(_micro_batches(run, latents, model.drop_rates, images, lanes))) as micro_batches:
        while images < settings.images and not agreement.stop(run.wish()):
            losses = []
            for draw in islice(micro_batches, len(lanes)):
                micro, t_B, drop = _to_device(draw, run.device)
                loss = _loss(state.deepspeed, process, micro, t_B, drop)
                state.micro_step(loss)
                losses.append(loss.detach())
            images += settings.batch_images
            state.update_averages(ema.decays(settings, images // settings.batch_images))
            state.set_learning_rate(learning_rate(settings, images))
            bad = bad + 1 if state.skipped else 0
            if bad == BAD_STEPS:
                raise DisScaleError(
                    f"{run.model}: the gradient was not finite in {bad} steps in a row, up to {images} images"
                )
            if images // settings.batch_images % ROWS_EVERY_STEPS == 0:
                values = _row(state, losses, settings, began, images)
                if rank == 0:
                    log.add(images, values)
                    run.report(images)
            if images in settings.publish_images:
                saver.publish(state, images, facts(), description)
            if images % settings.resume_every_images < settings.batch_images:
                paused_s, saved = paused_s + saver.save(state, images, facts()), images
            if time.monotonic() > flushed + FLUSH_EVERY_S:
                log.flush()
                flushed = time.monotonic()
    if images != saved:
        saver.save(state, images, facts())
    saver.finish()
    log.flush()
    run.report(images)
    if rank == 0:
        run.say(f"{run.model}: {images} images; training stood still {paused_s:.2f} s for resume points")
    return images


def learning_rate(settings: Train, images: int) -> float:
    """The learning rate of the step that begins after `images` images: warm-up, plateau, decay to zero."""
    warm = min(1.0, (images + settings.batch_images) / settings.warmup_images) if settings.warmup_images else 1.0
    first = settings.decay_from * settings.images
    done = min(1.0, max(0.0, (images - first) / (settings.images - first))) if settings.images else 0.0
    match settings.decay:
        case "none":
            left = 1.0
        case "linear":
            left = 1 - done
        case "cosine":
            left = 0.5 * (1 + math.cos(math.pi * done))
    return settings.learning_rate * warm * left


class Agreement:
    """One rank wishes, all obey at the same step: a reduction started at one step is read at the next, so that nobody waits."""

    def __init__(self, device: torch.device) -> None:
        self._wish, self._work = torch.zeros(1, device=device), None

    def stop(self, wish: bool) -> bool:
        """Whether any rank wished to stop one call ago; called once a step on every rank."""
        if self._work is not None:
            self._work.wait()
        agreed = bool(self._wish.item())
        self._wish.fill_(float(wish))
        self._work = dist.all_reduce(self._wish, dist.ReduceOp.MAX, async_op=True)
        return agreed


def _start(run: Run, latents: Latents) -> tuple[Engine, Backbone, int]:
    """The sharded model in the state of the newest whole resume point, or in its first."""
    settings = run.recipe.train
    model = models.build(
        run.recipe.models[run.model], latents.shape, run.recipe.data.num_classes, scan=settings.scan,
        checkpointing=settings.checkpointing, seed=seeds.seed("init", run.recipe.seed) % 2**63,
    )  # fmt: skip
    stored = _agreed_resume_point(run)
    images, adam_step = (stored.images, stored.adam_step) if stored else (0, 0)
    read = stored.read if stored else checkpoint.fresh(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(read(engine.WEIGHTS, name, 0, p.numel()).view_as(p))
    state = engine.start(model.to(run.device), settings, run.device, read, adam_step)
    state.set_learning_rate(learning_rate(settings, images))
    if dist.get_rank() == 0:
        where = f"from {stored.folder.name}" if stored else "from the beginning"
        scan = f", scan {choose(settings.scan, run.device)}" if run.recipe.models[run.model].kind == "dis" else ""
        run.say(f"{run.model}: attempt {run.attempt}, {dist.get_world_size()} workers, {where}{scan}")
    return state, model, images


def _agreed_resume_point(run: Run) -> Stored | None:
    """Rank 0 looks and checks, all take what it found."""
    found: list[Stored | None] = [checkpoint.newest(run.folder, run.say) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found)
    return found[0]


Draw = tuple[Micro, torch.Tensor, torch.Tensor | None]


def _micro_batches(run: Run, latents: Latents, rates: tuple[float, ...], images: int, lanes: range) -> Iterator[Draw]:
    """This rank's micro-batches from `images` on, in order, with their times and drop-path masks."""
    recipe, settings = run.recipe, run.recipe.train
    process = diffusion.build(recipe.diffusion)
    for step in range(images // settings.batch_images, settings.images // settings.batch_images):
        for lane in lanes:
            micro = micro_batch(
                latents, step, lane, batch=settings.batch_images, lanes=settings.lanes, seed=recipe.seed,
                mirror=recipe.data.mirror, label_dropout=settings.label_dropout,
            )  # fmt: skip
            n = len(micro.y_B)
            t_B = process.draw_times(seeds.generator("time", recipe.seed, step, lane), n)
            yield _pinned((micro, t_B, _drop_masks(rates, n, recipe.seed, step, lane)), run.device)


def _drop_masks(rates: tuple[float, ...], n: int, *where: int) -> torch.Tensor | None:
    """Drop path's multipliers (branches, n): 0, or 1 / (1 - rate); None where nothing is dropped."""
    if not any(rates):
        return None
    keep = 1 - torch.tensor(rates, dtype=torch.float32)[:, None]
    return (
        torch.from_numpy(seeds.generator("drop path", *where).random((len(rates), n), dtype="float32")) < keep
    ) / keep


def _pinned(draw: Draw, device: torch.device) -> Draw:
    """In memory that a GPU copies from while it computes; as it is where there is none."""
    if device.type != "cuda":
        return draw
    micro, t_B, drop = draw
    return Micro(*(x.pin_memory() for x in micro)), t_B.pin_memory(), None if drop is None else drop.pin_memory()


def _to_device(draw: Draw, device: torch.device) -> Draw:
    micro, t_B, drop = draw

    def move(x: torch.Tensor) -> torch.Tensor:
        return x.to(device, non_blocking=True)

    return Micro(*map(move, micro)), move(t_B), None if drop is None else move(drop)


def _loss(sharded: Any, process: Process, micro: Micro, t_B: torch.Tensor, drop: Any) -> torch.Tensor:
    """Mean loss of a micro-batch through DeepSpeed's module."""

    def model_fn(x_BCHW: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        return sharded(x_BCHW, t_B, micro.y_B, drop).float()

    return process.losses(model_fn, micro.x_BCHW, t_B, micro.noise_BCHW).total.mean()


def _adam_step(state: Engine) -> int:
    return int(state.optimizer.state[state.flats[0]]["step"])


def _row(
    state: Engine, losses: list[torch.Tensor], settings: Train, began: tuple[float, int], images: int
) -> dict[str, float]:
    """The step's metrics, its loss meaned over all lanes of all ranks; collective."""
    total = torch.stack(losses).sum()
    dist.all_reduce(total)
    return {
        "loss": total.item() / settings.lanes,
        "gradient_norm": state.gradient_norm,
        "learning_rate": state.optimizer.param_groups[0]["lr"],
        "images_per_s": (images - began[1]) / (time.monotonic() - began[0]),
        "skipped": float(state.skipped),
    }
