"""Correctness of a GPU's scans, with the time of a worker's self-test: `python -m benchmarks.kernels [--device cpu --quick]`.

Each backend of the device is compared with the reference loop in float64, outputs and all gradients: at odd sizes, and at
those of DiS-L/2 at 256 pixels. The first time includes compilation, the second is that of a later start.
"""

import json
import sys
import time

import torch

from benchmarks.bringup import Options, options
from dis_scale.errors import DisScaleError
from dis_scale.scan import choose
from dis_scale.scan.selftest import TOLERANCE, Case, errors

BACKENDS = {"cpu": ("native", "chunked"), "cuda": ("triton", "chunked", "mamba")}
SIZES = [(35, 40, 16), (258, 2048, 16)]
"""L, E, N."""
QUICK_SIZES = [(5, 6, 16), (35, 40, 16)]


def compare(backend: str, device: torch.device, dtype: torch.dtype, sizes: tuple[int, int, int]) -> bool:
    """Print a row; return whether the backend is right."""
    L, E, N = sizes
    times = []
    for _ in range(2):
        began = time.perf_counter()
        found = errors(backend, device, dtype, Case(L, E, N))
        times.append(time.perf_counter() - began)
    worst = max(found, key=lambda what: float("inf") if found[what] != found[what] else found[what])
    right = all(error <= TOLERANCE[dtype] for error in found.values())
    facts = {"error": found[worst], "of": worst, "allowed": TOLERANCE[dtype], "first_s": times[0], "again_s": times[1]}
    print(json.dumps({"name": f"{backend}, {dtype}, L{L} E{E} N{N}", "right": right} | facts), flush=True)
    return right


def main(chosen: Options) -> bool:
    device, right = chosen.device, True
    for backend in BACKENDS[device.type]:
        try:
            print(json.dumps({"scan": str(choose(backend, device))}))
        except DisScaleError as error:
            print(json.dumps({"name": backend, "not measured": str(error)}))
            continue
        for sizes in QUICK_SIZES if chosen.quick else SIZES:
            for dtype in TOLERANCE:
                right &= compare(backend, device, dtype, sizes)
    return right


if __name__ == "__main__":
    sys.exit(not main(options(__doc__)))
