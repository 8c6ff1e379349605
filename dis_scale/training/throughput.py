"""Training throughput: images, tokens and FLOPs per second, MFU, memory.

MFU is model FLOPs over peak FLOPs (Chowdhery et al. 2022, arXiv 2204.02311, appendix B). Model FLOPs are those of one forward
and one backward pass, even if checkpointing computes parts twice. Read next: models/cost.py for the count.
"""

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from dis_scale.models.cost import Cost
from dis_scale.process.machine import processor
from dis_scale.tracking.goodput import MEMORY

DATASHEET_TFLOPS = {"A100": (312.0, 19.5), "H100 80GB HBM3": (989.0, 67.0), "H200": (989.0, 67.0)}
"""Peak TFLOP/s of dense products in bf16 and in fp32 without TF32, by a part of the GPU's name (NVIDIA's datasheets)."""
MATRIX_SIDES = {"cpu": 1024, "cuda": 8192}
"""Side of the square matrices whose product is timed if the device is not in DATASHEET_TFLOPS."""


@dataclass
class ThroughputMeter:
    """Measures the throughput of all `world` workers, as one of them sees it."""

    cost: Cost
    micro_images: int
    world: int
    device: torch.device
    peak_flops: float
    peak_source: str
    log: Callable[[str], None] | None
    """Called once, with the first rates in words."""
    clock: Callable[[], float] = time.monotonic
    _since: tuple[float, int] | None = None

    def begin(self, images_seen: int) -> None:
        """Start timing here, after the first step, which compiles and allocates."""
        self._since = self.clock(), images_seen

    def rates(self, images_seen: int) -> dict[str, float]:
        """Return the rates since the last call and this worker's peak memory; empty if there was no step."""
        if self._since is None or images_seen == self._since[1]:
            return {}
        now = self.clock()
        rate = (images_seen - self._since[1]) / (now - self._since[0])
        self._since = now, images_seen
        rates = {
            "images_per_s": rate,
            "tokens_per_s": rate * self.cost.tokens,
            "mfu": rate * self.cost.training_flops(self.micro_images) / (self.world * self.peak_flops),
            MEMORY: peak_memory_bytes(self.device) / 2**30,
        }
        if self.log:
            self.log(self._describe(rates))
            self.log = None
        return rates

    def _describe(self, rates: dict[str, float]) -> str:
        return (
            f"speed    {rates['images_per_s']:,.1f} images/s, {rates['tokens_per_s']:,.0f} tokens/s, MFU {rates['mfu']:.1%} of "
            f"{self.world} x {self.peak_flops / 1e12:.3g} TFLOP/s ({self.peak_source}), {rates[MEMORY]:.2f} GiB per worker"
        )


def peak_flops(device: torch.device, precision: str, machine: str) -> tuple[float, str]:
    """Return a worker's peak FLOP/s and its source: the datasheet of its `machine`, or the fastest of some products timed here."""
    if peaks := datasheet_tflops(machine):
        return 1e12 * peaks[precision != "bf16"], f"datasheet, {precision}"
    side = MATRIX_SIDES[device.type]
    return 2.0 * side**3 / _product_s(device, precision, side), f"the fastest product of {side} x {side}, {precision}"


def datasheet_tflops(machine: str) -> tuple[float, float] | None:
    """Return a GPU's peaks in `DATASHEET_TFLOPS`; None for another GPU, a slice (MIG) or a variant of less power (NVL)."""
    whole = "MIG" not in machine and "NVL" not in machine
    return next((peaks for known, peaks in DATASHEET_TFLOPS.items() if whole and known in machine), None)


def _product_s(device: torch.device, precision: str, side: int) -> float:
    """Return the shortest of five timings of a product, in seconds."""
    a = torch.ones(side, side, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    times = []
    for _ in range(5):
        synchronize(device)
        began = time.perf_counter()
        a @ a
        synchronize(device)
        times.append(time.perf_counter() - began)
    return min(times)


def machine_name(device: torch.device) -> str:
    """Return the name of the GPU, or of the processor that computes."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor()} (CPU)"


def synchronize(device: torch.device) -> None:
    """Wait for all queued work of a GPU; a CPU queues none."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def gpu_bytes(device: torch.device) -> int | None:
    """Return the memory of a GPU; None for a CPU."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def peak_memory_bytes(device: torch.device) -> int:
    """Return this process's peak memory: of the GPU, otherwise of the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
