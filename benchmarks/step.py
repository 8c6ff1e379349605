"""What a large model's step costs by what is recomputed, and against DiT: `python -m benchmarks.step [rounds]`.

One JSON line a row, then a table. Forward and backward of DiS-L/2 and DiT-L/2 at 256 pixels: on a GPU 32 images in bf16, on a CPU 2
in fp32. All jobs are timed in turn, round after round, and the least time of each counts. Memory is what forward and backward add
to the model and its gradients: on a GPU its allocator's peak, on a CPU the resident set of a process that does nothing else.
"""

import ctypes
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.scan import resident_bytes, verdict
from benchmarks.timing import least_times
from dis_scale import models
from dis_scale.models.cost import cost
from dis_scale.pace import peak_flops, synchronize
from dis_scale.recipe import Dis, Dit, LatentShape, preset
from dis_scale.scan import choose

SHAPE, CLASSES = LatentShape(4, 32), 1000
SETTINGS = {"DiS": Dis(**preset("DiS-L/2")), "DiT": Dit(**preset("DiT-L/2"))}
KINDS = ("none", "block", "every_2", "selective")
GOALS = {"block": (1.38, 1 / 3), "selective": (1.15, None)}
"""Of time and of memory, both over those of `none`."""
PER_GMAC, MFU = {"cpu": 0.8, "cuda": 0.7}, {"cpu": None, "cuda": 0.4}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BATCH, DTYPE, PRECISION = (32, torch.bfloat16, "bf16") if DEVICE.type == "cuda" else (2, torch.float32, "fp32")
Job = Callable[[], None]


def step(name: str, checkpointing: str) -> Job:
    """Forward and backward of the model, whose gradients are there already."""
    model = models.build(SETTINGS[name], SHAPE, CLASSES, checkpointing=checkpointing).to(DEVICE, DTYPE)
    inputs = (
        torch.randn(BATCH, *SHAPE[:1], SHAPE.size, SHAPE.size, device=DEVICE), torch.rand(BATCH, device=DEVICE),
        torch.zeros(BATCH, dtype=torch.int64, device=DEVICE),
    )  # fmt: skip
    for p in model.parameters():
        p.grad = torch.zeros_like(p)

    def job() -> None:
        model(*inputs).square().mean().backward()
        synchronize(DEVICE)

    return job


def added_bytes(checkpointing: str) -> int:
    """What forward and backward add at their peak."""
    if DEVICE.type == "cpu":
        command = [sys.executable, "-m", "benchmarks.step", "memory", checkpointing]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    job = step("DiS", checkpointing)
    job()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    job()
    return torch.cuda.max_memory_allocated() - before


def added_resident_bytes(checkpointing: str) -> int:
    """The same on a CPU, of this process; Linux only."""
    job = step("DiS", checkpointing)
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = resident_bytes("VmRSS")
    job()
    return resident_bytes("VmHWM") - before


def gmacs_per_s(name: str, seconds: float) -> float:
    """True multiply-adds of a step, in 10^9 a second."""
    return BATCH * cost(SETTINGS[name], SHAPE, CLASSES).gmacs_training / seconds


def main(rounds: int = 3) -> None:
    torch.manual_seed(0)
    peak, source = peak_flops(DEVICE, PRECISION)
    about = {
        "device": str(DEVICE),
        "scan": str(choose("auto", DEVICE)),
        "batch": BATCH,
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(about | {"precision": PRECISION, "peak_tflops": peak / 1e12, "peak": source}))
    memory = {kind: added_bytes(kind) for kind in KINDS}
    seconds = least_times({"DiT": step("DiT", "none")} | {kind: step("DiS", kind) for kind in KINDS}, rounds)
    table = []
    for kind in KINDS[1:]:
        goals = GOALS.get(kind, (None, None))
        table.append((f"checkpointing {kind}: time over none", seconds[kind] / seconds["none"], goals[0], False))
        table.append((f"checkpointing {kind}: memory over none", memory[kind] / memory["none"], goals[1], False))
    ours, theirs = gmacs_per_s("DiS", seconds["none"]), gmacs_per_s("DiT", seconds["DiT"])
    table.append(("DiS, GMAC/s over DiT's", ours / theirs, PER_GMAC[DEVICE.type], True))
    table.append(("DiS, share of peak (MFU)", 2e9 * ours / peak, MFU[DEVICE.type], True))
    table.append(("DiT, share of peak (MFU)", 2e9 * theirs / peak, None, True))
    print(
        json.dumps(
            {"ms": {k: 1e3 * s for k, s in seconds.items()}, "added_gib": {k: m / 2**30 for k, m in memory.items()}}
        )
    )
    for name, ratio, goal, _ in table:
        print(json.dumps({"name": name, "ratio": ratio, "goal": goal}))
    print(f"\n{'':44} {'ratio':>8}  goal")
    for name, ratio, goal, at_least in table:
        print(f"{name:44} {ratio:8.3f}  {verdict(ratio, goal, at_least)}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["memory"]:
        print(added_resident_bytes(sys.argv[2]))
    else:
        main(*map(int, sys.argv[1:]))
