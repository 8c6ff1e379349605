"""The training loop: one screen, explicit state, images seen as the clock.

*When* things are due stands here; *how* each is done stands in engine.py (the sharded step), checkpoint.py (what is kept),
data/latents.py (what step s sees) and diffusion/ (the loss). Runs on every rank of a process group. Read next: pipelines/train.py.
"""

import json
import math
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist

from dis_scale import diffusion, faults, models, seeds
from dis_scale.data.latents import Latents, Micro, micro_batch, open_latents, prefetch
from dis_scale.diffusion.process import Process
from dis_scale.errors import DisScaleError
from dis_scale.models import Backbone
from dis_scale.models.cost import price_model
from dis_scale.models.export import describe
from dis_scale.recipe import Recipe, Train
from dis_scale.scan import choose
from dis_scale.storage.folder import Folder
from dis_scale.tracking import ATTEMPT, GOODPUT, Log, goodput
from dis_scale.training import bad_step, checkpoint, ema, engine
from dis_scale.training.checkpoint import Saver, Stored
from dis_scale.training.engine import Engine
from dis_scale.training.throughput import open_pace

ROWS_EVERY_STEPS = 10
FLUSH_EVERY_S = 10.0


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
    """Told the images seen after each step, on every rank."""
    say: Callable[[str], None]
    wanted: float
    """When this attempt was wanted (Unix seconds): at the start, or when the loss of the one before was noticed."""
    noticed_s: float | None = None
    """How long after its last step the loss of the attempt before was noticed; None where none was lost."""

    @property
    def folder(self) -> Folder:
        return self.sweep / "runs" / self.model


def train(run: Run) -> int:
    """Trains from the newest whole resume point to the last published count, or to a step agreed on when asked to stop.

    Returns the images seen. Bit-equal to an undisturbed run at the same world size, stage, device kind, threads and versions.
    """
    settings, rank, world = run.recipe.train, dist.get_rank(), dist.get_world_size()
    latents, how = open_latents(run.latents, run.recipe, _workers_here(world), run.say)
    process = diffusion.build(run.recipe.diffusion)
    price = price_model(run.recipe.models[run.model], latents.shape, run.recipe.data.num_classes)
    state, model, images = start(run, latents)
    saver = Saver(run.folder, run.attempt, rank, world, run.held, settings.keep_resume)
    log, agreement = Log(run.folder / "log", run.attempt), Agreement()
    pace = open_pace(
        price, settings, world, run.device, lambda line: run.say(f"{run.model}: {line}") if rank == 0 else None
    )
    description = json.dumps(describe(model))
    lanes = range(rank * settings.lanes // world, (rank + 1) * settings.lanes // world)
    began, flushed, saved, bad = (time.monotonic(), images), time.monotonic(), images, 0

    def facts() -> dict[str, Any]:
        log.flush()  # a resume point never stands without the rows before it
        return {"adam_step": _adam_step(state), "model": run.model}

    if rank == 0:
        run.say(f"{run.model}: {how}")
        log.add(images, {ATTEMPT: run.attempt})
    if images in settings.publish_images:  # at 0; and where what was published at a resume point's count is gone
        saver.publish(state, images, facts(), description)
    if images == 0:
        saver.save(state, 0, facts())
        _compare_with_grace(run, saver)
    with closing(prefetch(micro_batches(run, latents, model.drop_rates, images, lanes))) as batches:
        while images < settings.images and not agreement.stop(run.wish()):
            faults.at("step", images=images)
            draws = list(islice(batches, len(lanes)))
            losses = step(state, process, settings, draws, images)
            images += settings.batch_images
            run.report(images)
            bad = bad + 1 if state.skipped else 0
            if bad and rank == 0:
                run.say(f"{run.model}: the step to {images} images was skipped: its gradient is not finite")
            if bad == settings.skips_in_a_row:
                kept = bad_step.keep(run.folder, run.attempt, images, draws, losses, state)
                raise DisScaleError(
                    f"{run.model}: the gradient was not finite in {bad} steps in a row, up to {images} images: the last "
                    f"step's batch, losses and weights are in {kept}"
                )
            if images == began[1] + settings.batch_images:
                pace.begin(images)
                if rank == 0:
                    log.add(images, _first_step(run))
            if images // settings.batch_images % ROWS_EVERY_STEPS == 0:
                values = _row(state, losses, settings, images) | pace.rows(images)
                if rank == 0:
                    log.add(images, values | {"paused": saver.paused_s / (time.monotonic() - began[0])})
            if images in settings.publish_images:
                saver.publish(state, images, facts(), description)
            if images % settings.resume_every_images < settings.batch_images:
                saver.save(state, images, facts())
                saved = images
            if time.monotonic() > flushed + FLUSH_EVERY_S:
                log.flush()
                flushed = time.monotonic()
    saver.finish()
    if images != saved and agreement.leaves(saver.took_s, run.recipe.grace_s):
        saver.save(state, images, facts())
        saver.finish()
    log.flush()
    if rank == 0:
        log.add(images, {GOODPUT: goodput(run.folder / "log").get(images, 0.0)})
        log.flush()
        run.say(_closing_words(run, images, began, saver))
    return images


def step(state: Engine, process: Process, settings: Train, draws: list["Draw"], images: int) -> list[torch.Tensor]:
    """One step from `images` on: this rank's micro-batches, the optimizer, the averages; the loss of each micro-batch."""
    losses = []
    for draw in draws:
        micro, t_B, drop = _to_device(draw, state.device)
        loss = _loss(state.deepspeed, process, micro, t_B, drop)
        faults.at("loss", images=images, loss=loss)
        state.micro_step(loss)
        losses.append(loss.detach())
    images += settings.batch_images
    state.update_averages(ema.decays(settings, images // settings.batch_images))
    state.set_learning_rate(learning_rate(settings, images))
    return losses


def _workers_here(world: int) -> int:
    """The workers on this node, which share its memory; collective."""
    hosts: list[str] = [""] * world
    dist.all_gather_object(hosts, socket.gethostname())
    return hosts.count(socket.gethostname())


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
    """One rank wishes, all obey at the same step: a reduction started at one step is read at the next, so that nobody waits.

    Between the hosts, by gloo: read from a GPU, it would wait for all that the GPU was given.
    """

    def __init__(self) -> None:
        self._wish, self._work, self._hosts = torch.zeros(1), None, dist.new_group(backend="gloo")
        self._asked = float("inf")

    def leaves(self, seconds: float, grace_s: float) -> bool:
        """Whether so much of the grace is left on every rank, as it always is where nobody asked to stop; collective."""
        left = torch.tensor([self._asked + grace_s - time.monotonic() - seconds])
        dist.all_reduce(left, dist.ReduceOp.MIN, self._hosts)
        return left.item() > 0

    def stop(self, wish: bool) -> bool:
        """Whether any rank wished to stop one call ago; called once a step on every rank."""
        if wish:
            self._asked = min(self._asked, time.monotonic())
        if self._work is not None:
            self._work.wait()
        agreed = bool(self._wish.item())
        self._wish.fill_(float(wish))
        self._work = dist.all_reduce(self._wish, dist.ReduceOp.MAX, self._hosts, async_op=True)
        return agreed


def start(run: Run, latents: Latents) -> tuple[Engine, Backbone, int]:
    """The sharded model in the state of the newest whole resume point, or in its first."""
    settings = run.recipe.train
    model = models.build(
        run.recipe.models[run.model], latents.shape, run.recipe.data.num_classes, scan=settings.scan,
        checkpointing=settings.checkpointing, seed=seeds.seed("init", run.recipe.seed) % 2**63,
    )  # fmt: skip
    if settings.compile:
        model.compile_blocks()
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


def micro_batches(run: Run, latents: Latents, rates: tuple[float, ...], images: int, lanes: range) -> Iterator[Draw]:
    """This rank's micro-batches from `images` on, in order, with their times and drop-path masks."""
    recipe, settings = run.recipe, run.recipe.train
    process = diffusion.build(recipe.diffusion)
    for step in range(images // settings.batch_images, settings.images // settings.batch_images):
        for lane in lanes:
            micro = micro_batch(
                latents, step, lane, batch=settings.batch_images, lanes=settings.lanes, seed=recipe.seed,
                flip=recipe.data.mirror, label_dropout=settings.label_dropout,
            )  # fmt: skip
            n = len(micro.y_B)
            t_B = process.sample_times(seeds.generator("time", recipe.seed, step, lane), n)
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


def _first_step(run: Run) -> dict[str, float]:
    """The rows of an attempt's first step, which are said, too: how long it took from when the attempt was wanted."""
    seconds = time.time() - run.wanted
    if run.noticed_s is None:
        return {"start_s": seconds}
    run.say(
        f"{run.model}: loss noticed {run.noticed_s:.1f} s after the last step seen, first new step {seconds:.1f} s later"
    )
    return {"restart_s": seconds, "noticed_s": run.noticed_s}


def _compare_with_grace(run: Run, saver: Saver) -> None:
    """Waits for the first resume point and warns where a stop would have no time for one."""
    saver.finish()
    if dist.get_rank() == 0 and saver.took_s > run.recipe.grace_s:
        run.say(
            f"{run.model}: warning: a resume point takes {saver.took_s:.1f} s and grace_s is {run.recipe.grace_s:g} s: "
            f"a stop would lose the steps since the last one; give --set grace_s={math.ceil(2 * saver.took_s)} or more"
        )


def _closing_words(run: Run, images: int, began: tuple[float, int], saver: Saver) -> str:
    spent_s, steps = time.monotonic() - began[0], (images - began[1]) // run.recipe.train.batch_images
    return (
        f"{run.model}: {images} images; training stood still {saver.paused_s:.2f} s for resume points "
        f"({saver.paused_s / spent_s:.2%} of the time), {saver.longest_s * 1000:.0f} ms at most, where a step takes "
        f"{1000 * spent_s / max(steps, 1):.0f} ms"
    )


def _adam_step(state: Engine) -> int:
    return int(state.optimizer.state[state.flats[0]]["step"])


def _row(state: Engine, losses: list[torch.Tensor], settings: Train, images: int) -> dict[str, float]:
    """The step's metrics, its loss meaned over all lanes of all ranks; collective."""
    total = torch.stack(losses).sum()
    dist.all_reduce(total)
    return {
        "loss": total.item() / settings.lanes,
        "gradient_norm": state.gradient_norm,
        "learning_rate": state.optimizer.param_groups[0]["lr"],
        "skipped": float(images // settings.batch_images - _adam_step(state)),
    }
