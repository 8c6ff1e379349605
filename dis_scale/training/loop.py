"""The training loop: explicit state, images seen as the clock.

The loop decides *when* things are due. *How* they are done is in attempt.py (what is opened before the first step), engine.py (the
sharded step), resume.py (what is saved), data/latents.py (the inputs of step s) and diffusion/ (the loss). Runs on every rank of a
process group. Called by pipelines/train.py; read next: attempt.py, engine.py, resume.py.
"""

import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist

from dis_scale.data.latents import Micro, prefetch
from dis_scale.diffusion import Process
from dis_scale.process import faults
from dis_scale.process.errors import DisScaleError
from dis_scale.recipe import Train
from dis_scale.sweep import PointName
from dis_scale.sweep.documents import RunCost, RunState
from dis_scale.tracking.goodput import ATTEMPT, GOODPUT, Goodput
from dis_scale.tracking.rows import EVERY_STEPS, RowWriter
from dis_scale.training.attempt import Attempt, Opened, Started, open_training
from dis_scale.training.bad_step import dump_step
from dis_scale.training.engine import Engine
from dis_scale.training.inputs import StepInput, step_inputs, to_device
from dis_scale.training.resume import Keep, Saver
from dis_scale.training.schedule import learning_rate
from dis_scale.training.stop import StopAgreement
from dis_scale.training.throughput import machine_name, peak_memory_bytes
from dis_scale.weights import ema
from dis_scale.weights.export import SamplingFacts, describe


def train_model(attempt: Attempt) -> int:
    """Train from the newest complete resume point to the last published count, or to an agreed step if a stop is requested.

    Returns the images seen. The weights are bit-equal to those of an uninterrupted run with the same world size, ZeRO stage,
    images in a forward pass, choice to keep scan states or not, kind of device, number of threads and package versions.
    """
    training = begin(attempt)
    opened, started, records, settings = training.opened, training.started, training.records, attempt.recipe.train
    state, images_seen, bad_steps = started.state, started.images_seen, 0
    agreement, branches = StopAgreement(attempt.stop_by), attempt.recipe.branches_at(attempt.model)
    with closing(prefetch(training.inputs())) as batches:
        while images_seen < settings.images and not agreement.stop():
            # Take one step.
            faults.at("step", images=images_seen)
            inputs = list(islice(batches, len(opened.passes)))
            losses = train_step(state, opened.process, settings, inputs, images_seen)
            images_seen += settings.batch_images
            attempt.report(images_seen)

            # Stop if gradients stay not finite.
            training.skipped += bool(state.skipped)
            bad_steps = bad_steps + 1 if state.skipped else 0
            if bad_steps:
                _handle_bad_step(attempt, state, inputs, losses, images_seen, bad_steps)

            # Collect metric rows: all ranks reduce, rank 0 writes.
            row = dict[str, float]()
            if images_seen == started.images_seen + settings.batch_images:
                opened.meter.begin(images_seen)
                row |= _first_step(attempt)
            if images_seen // settings.batch_images % EVERY_STEPS == 0:
                row |= _step_row(state, inputs, losses) | opened.meter.rates(images_seen)
                row |= {"skipped": float(training.skipped), "paused": training.saver.paused_s / training.own_s}
            records.add(images_seen, row)

            # Save and publish. A resume point never exists without the metric rows before it. Where branches begin, a resume
            # point is saved before the count is published: a trunk is trained once its last count is, and branches need the point.
            publish_due = images_seen in settings.publish_images
            save_due = images_seen % settings.resume_every_images < settings.batch_images or images_seen in branches
            training.saver.raise_failed()
            records.flush_if_due()
            if publish_due or save_due:
                records.settle()
            if save_due:
                training.save(images_seen)
            if publish_due:
                training.publish(images_seen)
    end(training, images_seen, agreement)
    return images_seen


@dataclass
class Training:
    """One attempt's training: the parts that its steps use, and its records."""

    attempt: Attempt
    opened: Opened
    started: Started
    saver: Saver
    records: RowWriter
    goodput: Goodput
    began_s: float
    saved_images: int
    """Images seen at the last resume point, or at the start."""
    skipped: int = 0
    """Skipped steps of the run, over all attempts."""

    def inputs(self) -> Iterator[StepInput]:
        """Yield the inputs of each forward pass from here on."""
        attempt, opened, started = self.attempt, self.opened, self.started
        seed = attempt.recipe.seed_of(attempt.model)
        at = started.model.drop_rates, started.images_seen, opened.passes
        return step_inputs(attempt.recipe, seed, attempt.device, opened.latents, *at)

    def save(self, images_seen: int) -> None:
        """Start a resume point."""
        self.saver.save(self.started.state, images_seen, self._progress())
        self.saved_images = images_seen

    def publish(self, images_seen: int) -> None:
        """Start publishing the averaged weights; collective."""
        opened, started = self.opened, self.started
        description = json.dumps(describe(started.model, SamplingFacts.of(self.attempt.recipe, opened.latents.manifest)))
        self.saver.publish(started.state, images_seen, self._progress(), description)

    @property
    def own_s(self) -> float:
        """Time since the attempt was ready for its first step."""
        return time.monotonic() - self.began_s

    def _progress(self) -> RunState:
        own_s, attempt, started = self.own_s, self.attempt, self.started
        earlier = started.earlier.cost if started.earlier else RunCost()
        cost = RunCost(
            trained_on=tuple(sorted({*earlier.trained_on, machine_name(attempt.device)})),
            memory_gib=max(earlier.memory_gib or 0.0, peak_memory_bytes(attempt.device) / 2**30),
            goodput=self.goodput.share(own_s),
            worker_hours=self.goodput.worker_hours(own_s),
        )
        return RunState(
            model=attempt.model, latents=self.opened.latents.identity, adam_step=_adam_step(started.state), at=time.time(),
            cost=cost, spent=self.goodput.spent(own_s), skipped=self.skipped,
        )  # fmt: skip


def begin(attempt: Attempt) -> Training:
    """Open what a step needs and record the start; collective."""
    rank, world = dist.get_rank(), dist.get_world_size()
    log_rates = (lambda line: attempt.log(f"{attempt.model}: {line}")) if rank == 0 else None
    opened, started = open_training(attempt, log_rates)
    keep = Keep.of_model(attempt.recipe, attempt.model)
    saver = Saver(attempt.run, attempt.number, rank, world, attempt.require_held, keep, attempt.log)
    spent, skipped = (started.earlier.spent, started.earlier.skipped) if started.earlier else (None, 0)
    goodput = Goodput.begin(spent, attempt.start.requested_at, time.time(), world)
    records = RowWriter(attempt.run.log, attempt.number, writes=rank == 0)
    training = Training(attempt, opened, started, saver, records, goodput, time.monotonic(), started.images_seen, skipped)
    records.add(started.images_seen, {ATTEMPT: attempt.number})
    records.flush()
    if started.images_seen in attempt.recipe.train.publish_images:  # at 0 images, or because the weights were deleted
        training.publish(started.images_seen)
    if not started.resumed:
        training.save(started.images_seen)
        _compare_with_grace(attempt, saver)
    attempt.emit("work")
    return training


def end(training: Training, images_seen: int, agreement: StopAgreement) -> None:
    """Save a resume point of the last step, if it has none and there is time, and end the log."""
    attempt, saver, records = training.attempt, training.saver, training.records
    saver.finish()
    if images_seen != training.saved_images and agreement.time_left(saver.took_s):
        records.settle()
        training.save(images_seen)
        saver.finish()
    if dist.get_rank() == 0:
        steps = (images_seen - training.started.images_seen) // attempt.recipe.train.batch_images
        records.add(images_seen, {GOODPUT: training.goodput.share(training.own_s)})
        records.close()
        attempt.emit("end", attempt=attempt.number, images=images_seen)
        attempt.log(_summary(attempt, images_seen, steps, training.own_s, saver))


def train_step(
    state: Engine, process: Process, settings: Train, inputs: Sequence[StepInput], images_seen: int
) -> list[torch.Tensor]:
    """Take the step that begins at `images_seen`: this rank's forward passes, optimizer, averages; set the next learning rate.

    Returns the mean loss of each forward pass.
    """
    losses = []
    for host_input in inputs:
        micro, t_B, drop, weight = to_device(host_input, state.device)
        loss = _loss(state.deepspeed, process, micro, t_B, drop)
        faults.at("loss", images=images_seen, loss=loss)
        state.micro_step(loss * weight)
        losses.append(loss.detach())
    images_seen += settings.batch_images
    state.update_averages(ema.decays(settings, images_seen // settings.batch_images))
    state.set_learning_rate(learning_rate(settings, images_seen))
    return losses


def _handle_bad_step(
    attempt: Attempt, state: Engine, inputs: list[StepInput], losses: list[torch.Tensor], images_seen: int, in_a_row: int
) -> None:
    """Log a step whose gradient was not finite; after too many in a row, dump the last one and raise DisScaleError."""
    if dist.get_rank() == 0:
        attempt.log(f"{attempt.model}: step to {images_seen:,} images skipped: its gradient is not finite")
    if in_a_row == attempt.recipe.train.skips_in_a_row:
        dump = dump_step(attempt.run, PointName(images_seen, attempt.number), inputs, losses, state)
        raise DisScaleError(
            f"{attempt.model}: the gradient was not finite in {in_a_row} steps in a row, up to {images_seen:,} images: "
            f"the last step's batch, losses and weights are in {dump}"
        )


def _loss(sharded: Any, process: Process, micro: Micro, t_B: torch.Tensor, drop: Any) -> torch.Tensor:
    """Return the mean loss of a micro-batch through DeepSpeed's module."""

    def model_fn(x_BCHW: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        out_BCHW: torch.Tensor = sharded(x_BCHW, t_B, micro.y_B, drop)
        return out_BCHW.float()

    return process.losses(model_fn, micro.x_BCHW, t_B, micro.noise_BCHW).total.mean()


def _first_step(attempt: Attempt) -> dict[str, float]:
    """Return the start-up time, or the restart and detection time, as metrics; log a restart."""
    seconds = time.time() - attempt.start.requested_at
    if attempt.start.silent_s is None:
        return {"start_s": seconds}
    if dist.get_rank() == 0:
        attempt.emit("first_step", noticed_s=attempt.start.silent_s, restart_s=seconds)
        attempt.log(
            f"{attempt.model}: failure noticed {attempt.start.silent_s:.1f} s after the last step seen, "
            f"first new step {seconds:.1f} s later"
        )
    return {"restart_s": seconds, "noticed_s": attempt.start.silent_s}


def _compare_with_grace(attempt: Attempt, saver: Saver) -> None:
    """Wait for the first resume point; warn if the grace period is too short for one."""
    saver.finish()
    if saver.rank == 0 and saver.took_s > attempt.recipe.grace_s:
        attempt.log(
            f"{attempt.model}: warning: a resume point takes {saver.took_s:.1f} s and grace_s is {attempt.recipe.grace_s:g} s: "
            f"a stop would lose the steps since the last one; rerun with --set grace_s={math.ceil(2 * saver.took_s)} or more"
        )


def _summary(attempt: Attempt, images_seen: int, steps: int, spent_s: float, saver: Saver) -> str:
    return (
        f"{attempt.model}: {images_seen:,} images; training paused {saver.paused_s:.2f} s for resume points "
        f"({saver.paused_s / spent_s:.2%} of the time), {saver.longest_s * 1000:.0f} ms at most; "
        f"{1000 * spent_s / max(steps, 1):.0f} ms per step, all pauses included"
    )


def _adam_step(state: Engine) -> int:
    return int(state.optimizer.state[state.flats[0]]["step"])


def _step_row(state: Engine, inputs: Sequence[StepInput], losses: list[torch.Tensor]) -> dict[str, float]:
    """Return metrics of the last step: the loss over all lanes of all ranks; `learning_rate` is the next step's. Collective."""
    total = torch.stack([loss * of.weight for loss, of in zip(losses, inputs, strict=True)]).sum()
    dist.all_reduce(total)
    return {
        "loss": total.item() / (len(losses) * dist.get_world_size()),
        "gradient_norm": state.gradient_norm,
        "learning_rate": state.learning_rate,
    }
