"""One attempt at a model's training: its inputs, and the parts that it opens before its first step.

Runs on every rank of a process group. Read next: loop.py, which takes the steps.
"""

import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist

from dis_scale import diffusion, models
from dis_scale.data.latents import Latents, open_latents
from dis_scale.diffusion import Process
from dis_scale.models import families, transfer
from dis_scale.models.cost import price_model
from dis_scale.models.tokens import Backbone
from dis_scale.process import seeds
from dis_scale.process.errors import BrokenDevice, counted
from dis_scale.recipe import Recipe
from dis_scale.scan import FALLBACK, Choice, choose
from dis_scale.storage.folder import Folder
from dis_scale.sweep import COPIED, PointName, Run, Sweep
from dis_scale.sweep.documents import RunState
from dis_scale.tracking.goodput import as_branch
from dis_scale.training import engine, resume
from dis_scale.training.devices import check_on_all_ranks
from dis_scale.training.engine import Engine
from dis_scale.training.graphs import graph_blocks
from dis_scale.training.joined import Weights
from dis_scale.training.lanes import ForwardPass, forward_passes, image_counts, image_counts_of_all, largest_share
from dis_scale.training.memory import plan_passes
from dis_scale.training.resume import ResumePoint
from dis_scale.training.schedule import learning_rate
from dis_scale.training.throughput import ThroughputMeter, gpu_bytes, machine_name, peak_flops
from dis_scale.weights import warm_start


@dataclass(frozen=True)
class Start:
    """The time at which an attempt was requested (Unix seconds): at the start, or when the failure before it was noticed."""

    requested_at: float
    silent_s: float | None = None
    """Seconds from the last step of the failed attempt to the moment when the failure was noticed; None if none failed."""


@dataclass(frozen=True)
class Attempt:
    """One model's training in one attempt, and its connections to the driver."""

    sweep: Sweep
    model: str
    latents: Folder
    number: int
    device: torch.device
    start: Start
    require_held: Callable[[], None]
    """Raises Held if this attempt no longer owns the run."""
    stop_by: Callable[[], float | None]
    """Returns the time on this process's monotonic clock by which it must have saved and stopped. Infinity if the stop moves the
    run to more workers; None while no stop is requested."""
    report: Callable[[int], None]
    """Called on every rank after every step, with the images seen."""
    log: Callable[[str], None]
    emit: Callable[..., None]
    """Called with the name and the facts of an event."""
    shared: float = 0.0
    """Fraction of each GPU's memory that evaluators may take."""
    short: int = 0
    """Number of times that a GPU's memory was too small: first for the planned forward passes, then for smaller ones."""

    @property
    def recipe(self) -> Recipe:
        """The sweep's recipe with this model's training settings."""
        return self.sweep.recipe.for_model(self.model)

    @property
    def run(self) -> Run:
        return self.sweep.run(self.model)


class Started(NamedTuple):
    """The model and its engine at the beginning of an attempt."""

    state: Engine
    model: Backbone
    images_seen: int
    resumed: bool
    """Whether training continues from a resume point of this model. If not, it starts from the beginning or as a branch."""
    earlier: RunState | None
    """Run state at the resume point. For a branch, derived from its trunk's (`as_branch`); None at the beginning."""


class Opened(NamedTuple):
    """The parts of training that every step needs."""

    latents: Latents
    process: Process
    passes: list[ForwardPass]
    """This rank's forward passes of each step."""
    meter: ThroughputMeter


def open_training(attempt: Attempt, log_rates: Callable[[str], None] | None) -> tuple[Opened, Started]:
    """Open the latents, the model at its newest resume point, and the meter. Collective.

    `log_rates` is called with lines on speed, on one rank.
    """
    recipe = attempt.recipe
    settings, rank, world = recipe.train, dist.get_rank(), dist.get_world_size()
    on_this_node = _workers_on_this_node(world)
    latents, how = open_latents(attempt.latents, recipe, on_this_node, attempt.log, recipe.seed_of(attempt.model))
    price = price_model(recipe.models[attempt.model], latents.shape, recipe.data.num_classes)
    memory: list[int | None] = [None] * world
    dist.all_gather_object(memory, gpu_bytes(attempt.device))
    smallest = min(memory, key=lambda size: size or 0)  # all ranks run equally many passes, and refuse together
    plan = plan_passes(attempt.model, price, settings, world, smallest, attempt.shared)
    count, keeps = plan.smaller(largest_share(settings.lanes, world), attempt.short) if attempt.short else plan
    passes = forward_passes(settings.lanes, rank, world, count)
    images = image_counts(passes, settings.lane_images)
    started = start(attempt, latents, len(passes), keeps=keeps)
    if rank == 0:
        for line in how:
            attempt.log(f"{attempt.model}: {line}")
        kept = ", which keep the states of their scans" if keeps else ""
        attempt.log(
            f"{attempt.model}: {counted(count, 'forward pass')} of up to {counted(max(images), 'image')} a worker and step{kept}"
        )
    peak = peak_flops(attempt.device, settings.precision, machine_name(attempt.device))
    meter = ThroughputMeter(price, max(images), world, attempt.device, *peak, log_rates)
    process = diffusion.build(recipe.diffusion, latents.shape)
    return Opened(latents, process, passes, meter), started


def _workers_on_this_node(world: int) -> int:
    """The number of workers that share this node's memory; collective."""
    hosts: list[str] = [""] * world
    dist.all_gather_object(hosts, socket.gethostname())
    return hosts.count(socket.gethostname())


def start(attempt: Attempt, latents: Latents, passes: int, *, keeps: bool) -> Started:
    """Build the model and its engine, at the newest resume point or new. Collective.

    A step has `passes` forward passes on each rank; scans keep their states if `keeps`.
    """
    settings, recipe = attempt.recipe.train, attempt.recipe
    model = _built(attempt, latents, keeps=keeps)
    point = _agreed_resume_point(attempt)
    if point:
        point.require_latents(latents)
    elif recipe.models[attempt.model].start:
        warm_start.load_into(model, attempt.sweep, attempt.model, attempt.log)
    read = point.read if point else resume.fresh(model)
    if point and dist.get_rank() == 0:  # the engine sends rank 0's weights to the others
        _load_weights(model, read)
    # Every rank verifies the passes of all ranks: a kernel that fails on some ranks only would be blamed on their devices.
    every = image_counts_of_all(settings.lanes, dist.get_world_size(), passes, settings.lane_images)
    scan = _verified_scan(attempt, model, every)
    images_seen, adam_step = (point.manifest.images, point.manifest.progress.adam_step) if point else (0, 0)
    state = engine.start(model.to(attempt.device), settings, attempt.device, read, adam_step, passes)
    state.set_learning_rate(learning_rate(settings, images_seen))
    blocks = _graphed(attempt, model, state.weights, every, passes) if settings.graphs else ""
    if dist.get_rank() == 0:
        _say_start(attempt, model, point, scan, blocks)
    before = point.manifest.progress if point else None
    resumed = before is not None and before.model == attempt.model  # not that of a branch's trunk
    others = not resumed or (point and point.folder.name == str(PointName(images_seen, COPIED)))  # a trunk's, or a fork's origin's
    earlier = as_branch(before, attempt.start.requested_at) if before and others else before
    return Started(state, model, images_seen, resumed, earlier)


def _built(attempt: Attempt, latents: Latents, *, keeps: bool) -> Backbone:
    """Return the model on the CPU, with weights initialised from its seed."""
    settings, recipe = attempt.recipe.train, attempt.recipe
    model = models.build(
        recipe.models[attempt.model], latents.shape, recipe.data.num_classes, scan=settings.scan,
        checkpointing=settings.checkpointing, precision=settings.precision,
        seed=seeds.seed("init", recipe.seed_of(attempt.model)) % 2**63,
    )  # fmt: skip
    model.keeps_states = keeps
    if settings.base_width:
        transfer.scale_initial(model, settings.base_width)
    if settings.compile:
        model.compile_blocks()
    return model


def _verified_scan(attempt: Attempt, model: Backbone, images: set[int]) -> str:
    """Verify the model's kernels on all ranks, for passes with these `images`; return the scan in words, "" if it has none."""
    settings, words = attempt.recipe.train, ""
    if settings.scan in families.find(attempt.recipe.models[attempt.model].kind).scans:
        check_on_all_ranks(lambda: choose(settings.scan, attempt.device))
        require_one_scan(chosen := choose(settings.scan, attempt.device))
        words = f", scan {chosen}"
    check_on_all_ranks(lambda: models.verify_kernels(model, attempt.device, images, training=True))
    return words


def _say_start(attempt: Attempt, model: Backbone, point: ResumePoint | None, scan: str, blocks: str) -> None:
    world, base_width, place = dist.get_world_size(), attempt.recipe.train.base_width, "the beginning"
    if point:
        trained = point.manifest.progress.model
        place = point.folder.name if trained == attempt.model else f"{trained}'s {point.folder.name}"
    attempt.emit("start", attempt=attempt.number, workers=world, images=point.manifest.images if point else 0)
    attempt.log(f"{attempt.model}: attempt {attempt.number}, {counted(world, 'worker')}, from {place}{scan}")
    if blocks:
        attempt.log(f"{attempt.model}: {blocks}")
    if base_width:
        attempt.log(f"{attempt.model}: {transfer.words(model.settings, base_width)}")


def require_one_scan(chosen: Choice) -> None:
    """Raise BrokenDevice on a rank whose scan falls back to PyTorch's operations while other ranks' scans do not; collective.

    All ranks would wait for the slow one for the whole training, and its sums would differ.
    """
    every: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(every, chosen.name, group=dist.new_group(backend="gloo"))
    if chosen.name == FALLBACK and (others := {*every} - {FALLBACK}):
        raise BrokenDevice(f"this worker's scan would be {chosen}, that of others is {', '.join(sorted(others))}")


@torch.no_grad()
def _load_weights(model: Backbone, read: engine.Read) -> None:
    for name, p in model.named_parameters():
        p.copy_(read(engine.WEIGHTS, name, 0, p.numel()).view_as(p))


def _graphed(attempt: Attempt, model: Backbone, weights: Weights, images: set[int], passes: int) -> str:
    """Run the model's blocks as CUDA graphs if possible; return the outcome in words. Collective.

    `images` are the image counts of all ranks' passes, so that all ranks decide alike. If only some ranks captured graphs, a
    failure would be blamed on their devices.
    """
    if attempt.device.type != "cuda":
        return "train.graphs changes nothing on a CPU"
    if attempt.short:
        return "no CUDA graphs: memory lacked"
    if len(images) > 1:
        return "no CUDA graphs: forward passes differ in images"
    lines, adds_up = list[str](), passes > 1 and attempt.recipe.train.zero_stage == 1
    check_on_all_ranks(lambda: lines.append(graph_blocks(model, weights, min(images), adds_up=adds_up)))
    return lines[0]


def _agreed_resume_point(attempt: Attempt) -> ResumePoint | None:
    """Return the newest resume point, for a new branch its trunk's. Rank 0 finds and verifies it; all ranks use it."""
    point, branch = None, attempt.recipe.models[attempt.model].branch
    if dist.get_rank() == 0:
        begin, start_over = branch.at if branch else 0, attempt.recipe.train.start_over
        point = resume.newest_point(attempt.run, attempt.log, start_over=start_over, begin=begin)
        if point is None and branch:
            point = resume.branch_point(attempt.sweep, branch)
    others: list[ResumePoint | None] = [point and ResumePoint(point.folder, point.manifest)]  # without the files read
    dist.broadcast_object_list(others, group=dist.new_group(backend="gloo"))  # the others sleep while rank 0 reads
    return point or others[0]
