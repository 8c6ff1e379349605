"""What a large model's step costs by what is recomputed, and against DiT: `python -m benchmarks.step [rounds]`.

Forward and backward of DiS-L/2 and DiT-L/2 at 256 pixels: 32 images in bf16 on a GPU, one in fp32 on a CPU. Memory is what the two
add to the model and its gradients: the allocator's peak on a GPU, the resident set of a process for each kind on a CPU.
"""

import ctypes
import json
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.rows import Job, Row, least_times, report
from benchmarks.scan import resident_bytes
from dis_scale import models
from dis_scale.models import Backbone
from dis_scale.models.cost import cost
from dis_scale.pace import peak_flops, synchronize
from dis_scale.recipe import Dis, Dit, LatentShape, preset
from dis_scale.scan import choose

SHAPE, CLASSES = LatentShape(4, 32), 1000
DIS, DIT = Dis(**preset("DiS-L/2")), Dit(**preset("DiT-L/2"))
KINDS = ("none", "block", "every_2", "selective")
TIME, MEMORY = {"block": 1.38, "selective": 1.15}, {"block": 1 / 3}
"""Goals, over `none`."""
PER_GMAC, MFU = {"cpu": 0.8, "cuda": 0.7}, {"cpu": None, "cuda": 0.4}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BATCH, DTYPE, PRECISION = (32, torch.bfloat16, "bf16") if DEVICE.type == "cuda" else (1, torch.float32, "fp32")


def model(settings: Dis | Dit) -> Backbone:
    """With gradients, which a step adds to."""
    made = models.build(settings, SHAPE, CLASSES).to(DEVICE, DTYPE)
    for p in made.parameters():
        p.grad = torch.zeros_like(p)
    return made


def step(model: Backbone, checkpointing: str) -> Job:
    """Forward and backward."""
    x = torch.randn(BATCH, *SHAPE[:1], SHAPE.size, SHAPE.size, device=DEVICE)
    t, y = torch.rand(BATCH, device=DEVICE), torch.zeros(BATCH, dtype=torch.int64, device=DEVICE)

    def job() -> None:
        model.checkpointing = checkpointing  # type: ignore[assignment]
        model(x, t, y).square().mean().backward()
        synchronize(DEVICE)

    return job


def added_bytes(dis: Backbone, checkpointing: str) -> int:
    """What a step adds at its peak."""
    if DEVICE.type == "cpu":
        command = [sys.executable, "-m", "benchmarks.step", "memory", checkpointing]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    job = step(dis, checkpointing)
    job()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    job()
    return torch.cuda.max_memory_allocated() - before


def added_resident_bytes(checkpointing: str) -> int:
    """The same on a CPU, of this process; Linux only."""
    job = step(model(DIS), checkpointing)
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = resident_bytes("VmRSS")
    job()
    return resident_bytes("VmHWM") - before


def main(rounds: int = 2) -> None:
    torch.manual_seed(0)
    peak, source = peak_flops(DEVICE, PRECISION)
    print(json.dumps({
        "device": str(DEVICE), "scan": str(choose("auto", DEVICE)), "images": BATCH, "precision": PRECISION,
        "threads": torch.get_num_threads(), "peak_tflops": peak / 1e12, "peak": source,
    }))  # fmt: skip
    dis = model(DIS)
    added = {kind: added_bytes(dis, kind) for kind in KINDS}
    print(json.dumps({"added_gib": {kind: size / 2**30 for kind, size in added.items()}}))
    seconds = least_times({kind: step(dis, kind) for kind in KINDS} | {"DiT": step(model(DIT), "none")}, rounds)
    work = [BATCH * cost(settings, SHAPE, CLASSES).gmacs_training for settings in (DIS, DIT)]
    rows = [Row(f"checkpointing {kind}, time", kind, "none", TIME.get(kind), False) for kind in KINDS[1:]]
    rows += [
        Row("DiS-L/2's GMAC/s, against DiT-L/2's", "none", "DiT", PER_GMAC[DEVICE.type], True, (work[0], work[1])),
        Row("DiS-L/2, share of peak (MFU)", "none", "peak", MFU[DEVICE.type], True),
        Row("DiT-L/2, share of peak", "DiT", "DiT at peak", None, True),
    ]
    at_peak = {"peak": 2e9 * work[0] / peak, "DiT at peak": 2e9 * work[1] / peak}
    memory = [(f"checkpointing {kind}, memory", added[kind] / added["none"], MEMORY.get(kind)) for kind in KINDS[1:]]
    report(rows, {name: [s] for name, s in (seconds | at_peak).items()}, memory)


if __name__ == "__main__":
    if sys.argv[1:2] == ["memory"]:
        print(added_resident_bytes(sys.argv[2]))
    else:
        main(*map(int, sys.argv[1:]))
