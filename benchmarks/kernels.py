"""Correctness of a GPU's kernels, with the time of a worker's self-test: `python -m benchmarks.kernels [--device cpu --quick]`.

Each backend of the device is compared with the reference loop in float64, outputs and all gradients: at odd sizes and at DiS-L/2's
at 256 pixels with 32 images. Triton's lanes of a channel depend on the number of images, so its rows cover each number that occurs;
two more have longer sequences, as in training at 512 pixels with patches of 2 and 1.
The first time includes compilation, the second, of a backend's first case, is that of a later start.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping

import torch

from benchmarks.bringup import Options, options
from dis_scale.process.errors import DisScaleError
from dis_scale.scan import choose
from dis_scale.scan.selftest import TOLERANCE, Case, errors, filling_of

BACKENDS = {"cpu": ("native", "chunked"), "cuda": ("triton", "chunked", "mamba")}
ODD, L2 = Case(35, 40, 16), Case(258, 2048, 16, 32)
LONG = Case(1026, 2048, 16, 8), Case(4098, 2048, 16, 2)
QUICK = Case(5, 6, 16), ODD
"""Positions of DiffuSSM at 256 and 512 pixels, with patches of 1."""


def lanes_of(device: torch.device, case: Case) -> set[tuple[str, int]]:
    fill = filling_of(device, case)
    return {("forward", fill.forward), ("backward", fill.backward)}


def each_number_of_lanes(device: torch.device, case: Case) -> Iterator[Case]:
    """Yield cases of at most as many images that together select each number of lanes of a channel, in both passes."""
    cases = {one: lanes_of(device, one) for n in range(case.images, 0, -1) if (one := case._replace(images=n))}
    left = set[tuple[str, int]]().union(*cases.values())
    while left:
        best = max(cases, key=lambda one: len(left & cases[one]))  # of several the one with the most images
        left -= cases[best]
        yield best


def comparisons(backend: str, chosen: Options) -> Iterator[tuple[Case, torch.dtype]]:
    """Yield what is compared of a backend. The longest sequences come in training's type alone: they compile for long."""
    if chosen.quick:
        cases = list(QUICK)
    elif backend == "triton":
        cases = [ODD, *each_number_of_lanes(chosen.device, L2)]
    else:
        cases = [ODD, L2]
    yield from ((case, dtype) for case in cases for dtype in TOLERANCE)
    if backend == "triton" and not chosen.quick:
        yield from ((case, torch.bfloat16) for case in LONG)


def compare(name: str, find: Callable[[], Mapping[str, tuple[float, float]]], *, again: bool, **facts: object) -> bool:
    """Print a row of worst errors, each with the largest allowed; return whether all are right. `again`: a later start, too."""
    for time_ in ("first_s", "again_s")[: 1 + again]:
        began = time.perf_counter()
        found = find()
        facts[time_] = time.perf_counter() - began
    worst = max(found, key=lambda what: float("inf") if found[what][0] != found[what][0] else found[what][0])
    right = all(error <= allowed for error, allowed in found.values())
    facts |= {"error": found[worst][0], "of": worst, "allowed": found[worst][1]}
    print(json.dumps({"name": name, "right": right} | facts), flush=True)
    return right


def compare_scan(backend: str, device: torch.device, case: Case, dtype: torch.dtype, *, again: bool) -> bool:
    def find() -> dict[str, tuple[float, float]]:
        return {what: (error, TOLERANCE[dtype]) for what, error in errors(backend, device, dtype, case).items()}

    fill = {"filling": filling_of(device, case)._asdict()} if backend == "triton" else {}
    return compare(f"{backend}, {dtype}, {case}", find, again=again, **fill)


def main(chosen: Options) -> bool:
    device, right = chosen.device, True
    for backend in BACKENDS[device.type]:
        try:
            print(json.dumps({"scan": str(choose(backend, device))}))
        except DisScaleError as error:
            print(json.dumps({"name": backend, "not measured": str(error)}))
            continue
        for number, (case, dtype) in enumerate(comparisons(backend, chosen)):
            right &= compare_scan(backend, device, case, dtype, again=number == 0)
    return right


if __name__ == "__main__":
    sys.exit(not main(options(__doc__)))
