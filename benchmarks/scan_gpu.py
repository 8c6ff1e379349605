"""Speed of the two-way scan on a GPU, compared with mamba-ssm's scan twice with flips: `python -m benchmarks.scan_gpu [rounds]`.

bf16, B32 L258 E2048 N16 (DiS-L/2 at 256 pixels); forward and backward with softplus and gate, without the convolution. The share
of bandwidth counts the bytes that must move, each input, output and gradient once, relative to the bandwidth of a copy.
"""

import json
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks import bringup
from benchmarks.rows import Job, Row, measure, report
from dis_scale.process.errors import DisScaleError
from dis_scale.scan import Direction, choose, two_way_scan

B, L, E, N = 32, 258, 2048, 16
LENGTHS = {1026: 8, 66: 125, 4098: 2}
"""Sequence length: number of sequences; about as many tokens each as B L."""
COUNTED_S = 692e-6
"""The least time of the two-way scan at these sizes on an H200, by its instructions: the total of benchmarks/instructions.py."""
REPEATS = 20
"""Calls between two readings of the clock, which wait for the GPU."""
DEVICE, DTYPE = "cuda", torch.bfloat16


def direction(batch: int, length: int) -> Direction:
    """Inputs as early in training: A = -1..-N, delta around 0.05."""
    rows = [torch.randn(batch, length, width, device=DEVICE, dtype=DTYPE) for width in (E, E, N, N)]
    A_EN = -torch.arange(1.0, N + 1, device=DEVICE).repeat(E, 1)
    ends = torch.ones(E, device=DEVICE), torch.full((E,), -3.0, device=DEVICE)
    return Direction(*(x.requires_grad_() for x in (rows[0], rows[1], A_EN, rows[2], rows[3], *ends)))


def repeated(job: Job) -> Job:
    def run() -> None:
        for _ in range(REPEATS):
            job()
        torch.cuda.synchronize()

    return run


def operands(batch: int, length: int) -> tuple[Direction, Direction, Tensor, Tensor]:
    """As in the mixer, z is half of a product: kernels are compiled for the distance between rows."""
    z = torch.randn(batch, length, 2 * E, device=DEVICE, dtype=DTYPE)[..., E:]
    dy = torch.randn(batch, length, E, device=DEVICE, dtype=DTYPE)
    return direction(batch, length), direction(batch, length), z.requires_grad_(), dy


def scan(backend: str, batch: int, length: int) -> Job:
    """A job: forward and backward of the gated two-way scan."""
    front, back, z, dy = operands(batch, length)
    return repeated(lambda: torch.autograd.grad(two_way_scan(front, back, z, backend=backend), [*front, *back, z], dy))


def sampling(batch: int, length: int) -> Job:
    """A job: forward alone."""
    front, back, z, _ = operands(batch, length)
    return torch.no_grad()(repeated(lambda: two_way_scan(front, back, z, backend="triton")))


def moved_bytes() -> int:
    """Bytes that must move: inputs read in both passes, y written, dy read, every gradient written."""
    front, back, z, dy = operands(B, L)
    inputs = sum(x.nbytes for x in (*front, *back, z))
    return 3 * inputs + 2 * dy.nbytes


def copy(size: int) -> Job:
    """A job: a copy that reads and writes `size` bytes in total."""
    source = torch.empty(size // 2, dtype=torch.uint8, device=DEVICE)
    into = torch.empty_like(source)
    return repeated(lambda: into.copy_(source))


def main(rounds: int) -> None:
    torch.manual_seed(0)
    print(json.dumps({"gpu": torch.cuda.get_device_name(), "scan": str(choose("auto", DEVICE)), "B L E N": [B, L, E, N]}))
    moved = moved_bytes()
    jobs = {"two-way": scan("triton", B, L), "copy": copy(moved)}
    rows = [Row("two-way, share of a copy's bandwidth", "two-way", "copy", 0.5, at_least=True)]
    try:
        choose("mamba", DEVICE)
        jobs["mamba-ssm twice"] = scan("mamba", B, L)
        rows.insert(0, Row("two-way, against mamba-ssm twice with flips", "two-way", "mamba-ssm twice", 1.5, at_least=True))
    except DisScaleError as error:
        print(json.dumps({"name": "mamba-ssm twice", "not measured": str(error)}))
    times = print_rows(jobs, rows, rounds)
    states, least_s = 2 * B * L * E * N, min(times["two-way"]) / REPEATS  # both directions
    counted = {"fs": 1e15 * least_s / states, "counted_fs": 1e15 * COUNTED_S / states, "ratio": least_s / COUNTED_S}
    print(json.dumps({"name": "two-way, per state and step, against its count on an H200", **counted}))
    print(json.dumps({"name": "bandwidth of a copy", "tb_per_s": moved * REPEATS / min(times["copy"]) / 1e12}), flush=True)
    jobs_of_a_size: dict[str, Callable[[int, int], Job]] = {"forward": sampling, "forward and backward": partial(scan, "triton")}
    for length, batch in LENGTHS.items():
        for name, job in jobs_of_a_size.items():
            work = float(batch * length), float(B * L)
            row = Row(f"{name}, time a token, {length} against {L}", "long", "peer", 1.3, at_least=False, work=work)
            print_rows({"long": job(batch, length), "peer": job(B, L)}, [row], rounds)


def print_rows(jobs: dict[str, Job], rows: list[Row], rounds: int) -> dict[str, list[float]]:
    """Measure the jobs and print the rows at once: compiling the next ones may take longer than the time that is left."""
    times = measure(jobs, rounds)
    report(rows, {name: [t / REPEATS for t in seconds] for name, seconds in times.items()})
    sys.stdout.flush()
    return times


if __name__ == "__main__":
    main(bringup.rounds(__doc__, 5))
