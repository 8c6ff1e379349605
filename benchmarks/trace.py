"""Where a GPU's time goes in a step of training: `python -m benchmarks.trace [--device cpu --quick]`.

DiS-L/2 with 128 images a step, through everything but storage. Rows: the untraced rates;
from one more step, traced, the share of time in which the GPU computes, the gaps between its kernels by length, and its kernels by
their time. A trace costs the host time, so gaps in it are longer than in training.
"""

import json
import re
import tempfile
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.bringup import Options, options
from benchmarks.throughput import GOAL, QUICK_JOBS, random_latents, recipe_of
from dis_scale.storage.folder import open_folder
from dis_scale.sweep import Sweep
from dis_scale.training.profile import profile_training

ON_GPU = {"kernel", "gpu_memcpy", "gpu_memset"}
GAPS_US = (2.0, 10.0, 100.0, 1000.0)
"""Upper ends of the groups of gaps; one more group is longer."""
TOP = 30
"""Kernels with a row."""


class Busy(NamedTuple):
    """When the device was busy: a kernel or copy, with its start and end in microseconds."""

    name: str
    start_us: float
    end_us: float


def busy_of(trace: Path) -> list[Busy]:
    """All kernels and copies of a Chrome trace in order of their starts."""
    events = json.loads(trace.read_bytes())["traceEvents"]
    found = [Busy(e["name"], e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") in ON_GPU]
    return sorted(found, key=lambda each: each.start_us)


def gaps_of(busy: list[Busy]) -> list[float]:
    """Microseconds in which no kernel ran, between the first and the last one."""
    gaps, end = [], busy[0].end_us
    for _, after in pairwise(busy):
        gaps.append(max(0.0, after.start_us - end))
        end = max(end, after.end_us)
    return gaps


def summary(busy: list[Busy]) -> list[dict[str, Any]]:
    """Rows: the whole, the gaps by length, the kernels by time."""
    gaps, span_us = gaps_of(busy), max(each.end_us for each in busy) - busy[0].start_us
    rows: list[dict[str, Any]] = [{"name": "GPU", "span_ms": span_us / 1e3, "busy": 1 - sum(gaps) / span_us, "launches": len(busy)}]
    for low, high in pairwise((0.0, *GAPS_US, float("inf"))):
        inside = [gap for gap in gaps if low < gap <= high]
        rows.append({"name": f"gaps of {low:g} to {high:g} us", "count": len(inside), "ms": sum(inside) / 1e3})
    times, counts = defaultdict[str, float](float), defaultdict[str, int](int)
    for name, start_us, end_us in busy:
        times[short(name)] += end_us - start_us
        counts[short(name)] += 1
    for name in sorted(times, key=lambda name: -times[name])[:TOP]:
        rows.append({"name": name, "ms": times[name] / 1e3, "count": counts[name], "share": times[name] / span_us})
    return rows


def short(name: str) -> str:
    """A kernel's name without its C++ arguments and most of its template's."""
    name = re.sub(r"^void |at::native::|\(anonymous namespace\)::|<unnamed>::", "", name)
    return re.sub(r"\s+", " ", name.partition("(")[0])[:110]


def main(chosen: Options) -> None:
    job = QUICK_JOBS[1] if chosen.quick else GOAL
    with tempfile.TemporaryDirectory() as scratch:
        sweep = Sweep.below(open_folder(scratch), recipe_of(job, chosen.device.type))
        random_latents(sweep, job.shape)
        trace = Path(scratch) / "trace.json"
        rates = profile_training(sweep, "model", job.steps, trace, lambda line: print(line, flush=True))
        print(json.dumps({"name": f"train {job.name}"} | rates), flush=True)
        for row in summary(busy_of(trace)) if chosen.device.type == "cuda" else []:
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(options(__doc__))
