"""Threads and allocator: `python -m benchmarks.threads [rounds]`. Milliseconds of a training step of the demo's autoencoder.

Each setting runs in a process of its own, since OpenMP and glibc read their variables at its start: alone on the machine, and
next to a process that keeps one core busy. pipelines/jobs.py chooses by these figures.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from pipelines.environment import KEEP_FREED_MEMORY, PASSIVE, SPINNING

SETTINGS = {
    "passive waiting, glibc's defaults": PASSIVE,
    "passive waiting, freed memory kept": PASSIVE | KEEP_FREED_MEMORY,
    "active waiting, glibc's defaults": {},
    "active waiting, freed memory kept": KEEP_FREED_MEMORY,
    "bounded spinning, freed memory kept": SPINNING | KEEP_FREED_MEMORY,
}
STEPS = 12
READ_BY_PROCESSES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS", *KEEP_FREED_MEMORY)
STEP = """
import json, sys, time
import numpy as np, resource, torch
from dis_scale import vae
from dis_scale.recipe import TrainedVae
from dis_scale.vae import to_unit

torch.set_num_threads(2)
net = vae.new(TrainedVae(kind="trained"), 32)
images = to_unit(np.random.default_rng(0).integers(0, 255, (64, 32, 32, 3), dtype=np.uint8))
optimizer = torch.optim.AdamW(net.parameters(), fused=True)
times, faults = [], []
for _ in range(int(sys.argv[1])):
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    net(images).sample.square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    times.append(time.perf_counter() - began)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(json.dumps([1000 * min(times[2:]), sorted(times[2:])[len(times) // 2 - 1] * 1000, sorted(faults)[len(faults) // 2]]))
"""


def measure(setting: dict[str, str]) -> tuple[float, float, int]:
    """Return (fastest, median) milliseconds of a step and its median page faults."""
    inherited = {key: value for key, value in os.environ.items() if key not in READ_BY_PROCESSES}
    command = [sys.executable, "-c", STEP, str(STEPS)]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, env=inherited | setting, check=True, capture_output=True, text=True)
    fastest, median, faults = json.loads(done.stdout)
    return fastest, median, faults


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    for busy in (False, True):
        print("next to a busy process" if busy else "alone", flush=True)
        neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
        try:
            time.sleep(1)
            for name, setting in SETTINGS.items():
                results = [measure(setting) for _ in range(rounds)]
                fastest, medians = min(r[0] for r in results), statistics.median(r[1] for r in results)
                faults = statistics.median(r[2] for r in results)
                print(
                    f"  {name:38} fastest {fastest:5.0f} ms   median {medians:5.0f} ms   {faults:6.0f} page faults",
                    flush=True,
                )
        finally:
            if neighbour:
                neighbour.kill()


if __name__ == "__main__":
    main()
