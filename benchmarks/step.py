"""Cost of a step by checkpointing mode, and compared with DiT and DiS2: `python -m benchmarks.step [rounds]`.

Forward and backward at 256 pixels: on a GPU DiS-L/2 and DiT-L/2, 32 images in bf16; on a CPU S/2, four in fp32. Memory is the peak
that a step adds to the model and its gradients, as counted by the allocator.
"""

import itertools
import json
import tempfile
from pathlib import Path

import torch
from torch.profiler import profile

from benchmarks import bringup
from benchmarks.rows import Job, Row, least_times, on_threads, report
from dis_scale import models
from dis_scale.models.cost import price_model
from dis_scale.models.dis.settings import Dis
from dis_scale.models.dit.settings import Dit
from dis_scale.models.families import preset
from dis_scale.models.tokens import Backbone
from dis_scale.recipe import LatentShape, Precision
from dis_scale.scan import choose
from dis_scale.training.throughput import machine_name, peak_flops, synchronize

SHAPE, CLASSES = LatentShape(4, 32), 1000
KINDS = ("none", "block", "every_2", "selective")
TIME, MEMORY = {"block": 1.38, "selective": 1.15}, {"block": 1 / 3}
"""Goals: largest ratio to `none`."""
PER_GMAC, MFU = {"cpu": 0.8, "cuda": 0.7}, {"cpu": None, "cuda": 0.3}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PRECISION: Precision = "bf16" if DEVICE.type == "cuda" else "fp32"
SIZE, BATCH = ("L/2", 32) if DEVICE.type == "cuda" else ("S/2", 4)
DIS, DIS2, DIT = Dis(**preset(f"DiS-{SIZE}")), Dis(**preset(f"DiS2-{SIZE}")), Dit(**preset(f"DiT-{SIZE}"))


def model(settings: Dis | Dit) -> Backbone:
    """A model with gradients, to which a step adds."""
    made = models.build(settings, SHAPE, CLASSES, precision=PRECISION).to(DEVICE)
    for p in made.parameters():
        p.grad = torch.zeros_like(p)
    return made


def step_job(model: Backbone, checkpointing: str) -> Job:
    """A job: forward and backward."""
    x = torch.randn(BATCH, *SHAPE[:1], SHAPE.size, SHAPE.size, device=DEVICE)
    t, y = torch.rand(BATCH, device=DEVICE), torch.zeros(BATCH, dtype=torch.int64, device=DEVICE)

    def job() -> None:
        model.checkpointing = checkpointing
        model(x, t, y).square().mean().backward()
        synchronize(DEVICE)

    return job


def added_bytes(dis: Backbone, checkpointing: str) -> int:
    """Bytes that a step adds at its peak, as counted by PyTorch's allocator."""
    job = step_job(dis, checkpointing)
    job()
    if DEVICE.type == "cpu":
        return peak_of_a_cpu(job)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    job()
    return torch.cuda.max_memory_allocated() - before


def peak_of_a_cpu(job: Job) -> int:
    """Peak memory from the profiler's trace, which has every allocation and release in order of time."""
    with profile(profile_memory=True, acc_events=True) as seen:
        job()
    return peak_bytes(seen)


def peak_bytes(seen: profile) -> int:
    """Largest sum of what was alive at a time."""
    with tempfile.NamedTemporaryFile(suffix=".json") as trace:
        seen.export_chrome_trace(trace.name)
        events = json.loads(Path(trace.name).read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    return int(max(itertools.accumulate(size for _, size in changes)))


def main(rounds: int) -> None:
    torch.manual_seed(0)
    peak, source = peak_flops(DEVICE, PRECISION, machine_name(DEVICE))
    print(json.dumps({
        "device": str(DEVICE), "size": SIZE, "scan": str(choose("auto", DEVICE)), "images": BATCH, "precision": PRECISION,
        "threads": torch.get_num_threads(), "peak_tflops": peak / 1e12, "peak": source,
    }))  # fmt: skip
    dis = model(DIS)
    added = {kind: added_bytes(dis, kind) for kind in KINDS}
    print(json.dumps({"added_gib": {kind: size / 2**30 for kind, size in added.items()}}))
    others = {"DiS2": step_job(model(DIS2), "none"), "DiT": step_job(model(DIT), "none")}
    threads = torch.get_num_threads()
    if DEVICE.type == "cpu" and threads > 1:
        others["one thread"] = on_threads(1, step_job(dis, "none"))
    seconds = least_times({kind: step_job(dis, kind) for kind in KINDS} | others, rounds)
    work = [BATCH * price_model(settings, SHAPE, CLASSES).gmacs_training for settings in (DIS, DIT)]
    rows = [Row(f"checkpointing {kind}, time", kind, "none", TIME.get(kind), at_least=False) for kind in KINDS[1:]]
    rows += [
        Row(
            f"DiS-{SIZE}'s GMAC/s, against DiT-{SIZE}'s",
            "none",
            "DiT",
            PER_GMAC[DEVICE.type],
            at_least=True,
            work=(work[0], work[1]),
        ),
        Row(f"DiS-{SIZE}, share of peak (MFU)", "none", "peak", MFU[DEVICE.type], at_least=True),
        Row(f"DiS2-{SIZE}'s step against DiS-{SIZE}'s", "DiS2", "none", 1.0, at_least=False),
        Row(f"DiT-{SIZE}, share of peak", "DiT", "DiT at peak", None, at_least=True),
    ]
    if "one thread" in others:
        rows.append(Row(f"DiS-{SIZE}, {threads} threads, against one", "none", "one thread", 1.6, at_least=True))
    at_peak = {"peak": 2e9 * work[0] / peak, "DiT at peak": 2e9 * work[1] / peak}
    memory = [(f"checkpointing {kind}, memory", added[kind] / added["none"], MEMORY.get(kind)) for kind in KINDS[1:]]
    report(rows, {name: [s] for name, s in (seconds | at_peak).items()}, memory)


if __name__ == "__main__":
    main(bringup.rounds(__doc__, 10))
