"""How fast training is, and what share of the hardware that is: images, tokens and true FLOPs a second, memory.

MFU is model FLOPs over peak FLOPs (Chowdhery et al. 2022, arXiv 2204.02311, appendix B): what forward and backward need, whatever
checkpointing computes twice. Read next: models/cost.py for the count.
"""

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from dis_scale.models.cost import Cost
from dis_scale.recipe import Train

DATASHEET_TFLOPS = {"A100": (312.0, 19.5), "H100 80GB HBM3": (989.0, 67.0), "H200": (989.0, 67.0)}
"""Dense products in bf16 and in fp32 without TF32, by what a GPU's name contains (NVIDIA's datasheets)."""
SIDES = {"cpu": 1024, "cuda": 8192}
"""Of the square matrices whose product measures what is in no datasheet here."""


@dataclass
class Pace:
    """How fast all `world` workers train, as one of them sees it."""

    cost: Cost
    micro_images: int
    world: int
    device: torch.device
    peak_flops: float
    peak_source: str
    say: Callable[[str], None]
    """Told the first rates."""
    _since: tuple[float, int] | None = None
    _said: bool = False

    def begin(self, images: int) -> None:
        """From here on: what came before, as a first step that compiles and allocates, says nothing of the others."""
        self._since = time.monotonic(), images

    def rows(self, images: int) -> dict[str, float]:
        """Rates since the last look, and the most memory that this worker has held; nothing where there was no step yet."""
        if self._since is None or images == self._since[1]:
            return {}
        now = time.monotonic()
        rate = (images - self._since[1]) / (now - self._since[0])
        self._since = now, images
        found = {
            "images_per_s": rate,
            "tokens_per_s": rate * self.cost.tokens,
            "mfu": rate * self.cost.training_flops(self.micro_images) / (self.world * self.peak_flops),
            "memory_gib": peak_memory_bytes(self.device) / 2**30,
        }
        if not self._said:
            self._said = True
            self.say(self._words(found))
        return found

    def _words(self, found: dict[str, float]) -> str:
        return (
            f"speed    {found['images_per_s']:,.1f} images/s, {found['tokens_per_s']:,.0f} tokens/s, MFU {found['mfu']:.1%} of "
            f"{self.world} x {self.peak_flops / 1e12:.3g} TFLOP/s ({self.peak_source}), {found['memory_gib']:.2f} GiB a worker"
        )


def open_pace(cost: Cost, settings: Train, world: int, device: torch.device, say: Callable[[str], None]) -> Pace:
    """The pace of a model of this cost; `say` is told its first rates."""
    return Pace(cost, settings.micro_images, world, device, *peak_flops(device, settings.precision), say)


def peak_flops(device: torch.device, precision: str) -> tuple[float, str]:
    """FLOPs a second that a worker's hardware can do, and where that is from: a datasheet, or a product timed here."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for known, (bf16, fp32) in DATASHEET_TFLOPS.items():
            if known in name:
                return 1e12 * (bf16 if precision == "bf16" else fp32), f"datasheet, {precision}"
    side = SIDES[device.type]
    return 2.0 * side**3 / _product_s(device, precision, side), f"the best product of {side} x {side}, {precision}"


def _product_s(device: torch.device, precision: str, side: int) -> float:
    """The least of some times, in seconds."""
    a = torch.ones(side, side, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    times = []
    for _ in range(5):
        synchronize(device)
        began = time.perf_counter()
        a @ a
        synchronize(device)
        times.append(time.perf_counter() - began)
    return min(times)


def synchronize(device: torch.device) -> None:
    """Waits for what the device was given; a CPU has done it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory_bytes(device: torch.device) -> int:
    """The most that this process has held: of the GPU's memory, or of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
