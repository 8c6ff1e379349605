"""Training of one model on a fleet of GPUs, by arithmetic: memory, network, time, money, loss to preemption.

Only the memory of activations and states is compared with measurements: `benchmarks/memory.py`, benchmarks/results/gpu.md. Read
next: memory.py, plan.py.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from dis_scale.models.cost import Cost
from dis_scale.process.settings import InferencePrecision
from dis_scale.recipe import Train
from dis_scale.training.engine import kinds
from dis_scale.training.lanes import image_counts_of_all, largest_share
from dis_scale.training.memory import USABLE, most_images, plan_passes, worker_bytes

DAY_S = 86_400.0
MOST_GPUS = 1024
NODE_GPUS = 8
ASSUMED_MFU = 0.15
"""Share of a GPU's peak that training reaches. DiS-L/2 reached 0.163 on an H100 and 0.187 on an H200, whose kernels' instructions
allow 0.31 in a step."""
HOST_S, GRAPHS_HOST_S, STEP_S = 3.6e-3, 1.6e-3, 0.025
"""Python's time for a block's forward and backward pass, the same with graphs, and for DeepSpeed's optimizer. The optimizer and the
GPU wait for each other.

Measured for DiS on the host of an H200 at ZeRO 1, nothing recomputed (benchmarks/results/kernels.md#host-time); a fast core takes a
third. The time with graphs follows from S/2's 66 ms a step, which may include a wait for the reader's thread. Each weight was one
parameter; joined weights take less, which was not measured on a GPU. Other models and settings are assumed to take the same times.
So the times are lower bounds at ZeRO 3, with recomputed blocks, and for state-space duality (7.7 ms a block without graphs).
"""
OPTIMIZER_BYTES, MEMORY_GB_S = 100, 2000.0
"""Bytes per parameter that the copies, the norm, Adam and an average move, and 10^9 bytes/s of the slowest memory in GPUS."""


class Gpu(NamedTuple):
    """A GPU's memory, as PyTorch reports it; from NVIDIA's datasheets, peak TFLOP/s of dense products and 10^9 bytes/s it sends.

    `node_gb_s` is NVLink's within a node of eight, `network_gb_s` that of its own network card in a DGX.
    """

    memory_gib: float
    bf16: float
    tf32: float
    fp32: float
    node_gb_s: float
    network_gb_s: float


GPUS = {
    "a100-40": Gpu(39.4, 312.0, 156.0, 19.5, 300.0, 25.0),
    "a100": Gpu(79.1, 312.0, 156.0, 19.5, 300.0, 25.0),
    "h100": Gpu(79.1, 989.0, 494.5, 67.0, 450.0, 50.0),
    "h200": Gpu(139.8, 989.0, 494.5, 67.0, 450.0, 50.0),
}


@dataclass(frozen=True)
class Fleet:
    """GPUs and the assumptions about them."""

    gpu: str
    """One of GPUS."""
    count: int
    price: float | None = None
    """Price of one GPU for an hour."""
    preemptions_per_day: float = 0.0
    """Preemptions of the fleet; each stops a training that uses the complete fleet."""
    mfu: float = ASSUMED_MFU
    """Share of the peak that training and sampling reach."""
    host_gb_s: float = 5.0
    """10^9 bytes per second from a GPU to its host, while training pauses."""
    storage_gb_s: float = 0.25
    """10^9 bytes per second that a worker writes to storage."""
    restart_s: float = 120.0
    """Seconds from a preemption to the first new step, with capacity available."""

    @property
    def gpu_bytes(self) -> int:
        return int(GPUS[self.gpu].memory_gib * 2**30)

    def flops(self, precision: InferencePrecision) -> float:
        """Return the operations per second of one GPU."""
        return 1e12 * self.mfu * float(getattr(GPUS[self.gpu], precision))

    def sending_s(self, sent_bytes: float, world: int) -> float:
        """Return the seconds that each of `world` GPUs takes to send this many bytes.

        Rings between nodes use the network cards of all GPUs of a node: an eighth of a GPU's bytes leave through its own.
        """
        gpu = GPUS[self.gpu]
        network_gb_s = min(gpu.node_gb_s, NODE_GPUS * gpu.network_gb_s)
        return sent_bytes / (1e9 * (gpu.node_gb_s if world <= NODE_GPUS else network_gb_s))


@dataclass(frozen=True)
class Forecast:
    """A model's training on a fleet. Times and prices are infinite if preemptions leave nothing."""

    gpus: int
    """Number of workers: at most one per lane."""
    fits: bool
    """Whether one lane's images fit, as the recipe is set."""
    micro_images: int
    """Most images that fit in a forward pass; 0 if none do."""
    memory_bytes: dict[str, int]
    """Memory of a worker, by ZeRO stage and checkpointing."""
    wire_bytes: float
    """Bytes that a GPU sends in a step."""
    steps_per_s: float
    days: float
    """Days without preemption."""
    loss: float
    """Share of the time that is lost to preemption."""
    expected_days: float
    """Days with that loss."""
    training_gpu_hours: float
    resume_bytes: int
    resume_every_s: float
    """Infinite without preemption."""
    resume_every_images: int | None
    evaluation_gpu_hours: float = 0.0
    stored_bytes: int = 0
    """Bytes of its resume points and published averages."""
    price: float | None = None
    """Price of all GPU hours; None if the price of a GPU is not known."""

    @property
    def gpu_hours(self) -> float:
        return self.training_gpu_hours + self.evaluation_gpu_hours


def forecast(cost: Cost, settings: Train, own_images: int, fleet: Fleet) -> Forecast:
    """Return the training of `own_images` with these settings on a fleet.

    Products, messages and launches overlap, so the slowest of them sets the time of a step: the lanes of the slowest worker, the
    network, or Python. The optimizer's time is added.
    """
    world = min(fleet.count, settings.lanes)
    share = largest_share(settings.lanes, world)
    share_images = share * settings.lane_images
    micro = min(share_images, most_images(cost, settings, world, USABLE * fleet.gpu_bytes))
    fits = micro >= min(settings.micro_images or settings.lane_images, share_images)
    passes = plan_passes("", cost, settings, world, fleet.gpu_bytes).passes if fits else share
    at_once = -(-share // passes) * settings.lane_images
    wire = wire_bytes(cost, settings, world, passes)
    compute_s = share_images * cost.training_flops(at_once) / fleet.flops(settings.precision)
    host_s = passes * len(cost.kept.blocks) * host_of_block_s(settings, world, passes)
    optimizer_s = STEP_S + cost.parameters / world * OPTIMIZER_BYTES / (1e9 * MEMORY_GB_S)
    step_s = max(compute_s, fleet.sending_s(wire, world), host_s) + optimizer_s
    resume_bytes = 4 * cost.parameters * len(kinds(settings))
    every_s, loss = preemption(
        fleet.preemptions_per_day * world / fleet.count,
        pause_s=resume_bytes / world / (1e9 * fleet.host_gb_s),
        write_s=resume_bytes / world / (1e9 * fleet.storage_gb_s),
        restart_s=fleet.restart_s,
    )
    days = own_images / settings.batch_images * step_s / DAY_S
    expected_days = days / (1 - loss) if loss < 1 else math.inf
    every_images = max(1, round(every_s / step_s)) * settings.batch_images if every_s < math.inf else None
    return Forecast(
        gpus=world, fits=fits, micro_images=micro,
        memory_bytes=memory_grid(cost, settings, world), wire_bytes=wire, steps_per_s=1 / step_s, days=days, loss=loss,
        expected_days=expected_days, training_gpu_hours=24 * world * expected_days, resume_bytes=resume_bytes,
        resume_every_s=every_s, resume_every_images=every_images,
    )  # fmt: skip


def host_of_block_s(settings: Train, world: int, passes: int) -> float:
    """Return Python's time for a block's pass; training uses graphs only if all workers' passes have equally many images."""
    alike = len(image_counts_of_all(settings.lanes, world, passes, settings.lane_images)) == 1
    return GRAPHS_HOST_S if settings.graphs and alike else HOST_S


def wire_bytes(cost: Cost, settings: Train, world: int, passes: int) -> float:
    """Return the bytes that a rank sends in a step of `passes` forward passes, by ring algorithms, all in float32.

    DeepSpeed 0.19: stages 1 and 2 all-reduce gradients (twice their bytes) and gather the new weights; stage 1 reduces once a
    step, stage 2 after each pass. Stage 3 gathers weights for each forward and backward pass, and reduces gradients to their
    owners; recomputed blocks add up to a tenth. A rank sends (N - 1) / N of the bytes in each.
    """
    rounds = {1: 2 + 1, 2: 2 * passes + 1, 3: 3 * passes}[settings.zero_stage]
    return 4 * cost.parameters * rounds * (world - 1) / world


def preemption(per_day: float, pause_s: float, write_s: float, restart_s: float) -> tuple[float, float]:
    """Return Daly's interval between resume points, seconds of training, and the share of the time that is expected to be lost.

    The interval is that of Daly (2006, equation 37), a refinement of Young's sqrt(2 delta M) (1974): M is the mean time between
    preemptions, delta the pause for a resume point. It is at least the time to write one, which overlaps training; work since
    the last complete one is repeated.
    """
    if not per_day:
        return math.inf, 0.0
    mean_s = DAY_S / per_day
    ratio = math.sqrt(pause_s / (2 * mean_s))
    daly_s = math.sqrt(2 * pause_s * mean_s) * (1 + ratio / 3 + ratio**2 / 9) - pause_s if ratio < 1 else mean_s
    every_s = max(daly_s, write_s, 1.0)
    repeated_s = every_s / 2 + write_s + restart_s
    return every_s, min(1.0, pause_s / (every_s + pause_s) + repeated_s / mean_s)


def memory_grid(cost: Cost, settings: Train, world: int) -> dict[str, int]:
    """Return a worker's bytes with one lane, or `micro_images`, in a forward pass, by ZeRO stage and checkpointing; no graphs."""
    images = pass_images(settings, world)
    return {
        f"ZeRO {stage}, {mode}": worker_bytes(
            cost, settings.model_copy(update={"zero_stage": stage, "checkpointing": mode, "graphs": False}), world, images
        )
        for stage in (1, 2, 3)
        for mode in ("none", "selective", "block")
    }


def pass_images(settings: Train, world: int) -> int:
    """Return the images in a forward pass: one lane, or `micro_images` of a worker's share at most."""
    share = largest_share(settings.lanes, world) * settings.lane_images
    return min(settings.micro_images or settings.lane_images, share)
