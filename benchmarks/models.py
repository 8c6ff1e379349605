"""Training speed of a DiS on a CPU, compared with peers in the same run: `python -m benchmarks.models [rounds]`.

Forward and backward of DiS-S/2 at 32x32 latents, four images, float32. The public loop is timed in one of
DiS-S/2's 25 equal blocks, since the complete model would take minutes. The row includes all operations of the block. step.py
compares DiS with DiT.
"""

import json
import sys
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.rows import Job, Row, measure, on_threads, report
from benchmarks.scan import public_loop
from dis_scale import scan
from dis_scale.models import build
from dis_scale.models.dis.network import DiSBlock
from dis_scale.models.dis.settings import Dis
from dis_scale.models.families import preset
from dis_scale.recipe import LatentShape
from dis_scale.scan import Direction, choose, reference
from dis_scale.scan.backend import from_one_way

SHAPE, CLASSES, IMAGES = LatentShape(4, 32), 1000, 4
DIS = Dis(**preset("DiS-S/2"))


def loop(direction: Direction, reverse: bool) -> Tensor:
    """The public loop; the reversed direction is flipped as in the public code."""
    if not reverse:
        return public_loop(direction)
    u, delta, A, B, C, D, bias = direction
    return public_loop(Direction(u.flip(1), delta.flip(1), A, B.flip(1), C.flip(1), D, bias)).flip(1)


def step() -> Job:
    """A job: forward and backward of the model."""
    model = build(DIS, SHAPE, CLASSES)
    x, t, y = torch.randn(IMAGES, 4, 32, 32), torch.rand(IMAGES) * 1000, torch.randint(0, CLASSES, (IMAGES,))
    weights = list(model.parameters())
    return lambda: torch.autograd.grad(model(x, t, y).square().mean(), weights)


def block(backend: str) -> Job:
    """A job: forward and backward of one DiS block, including the residual stream."""
    torch.manual_seed(0)
    one = DiSBlock(DIS, backend, skip=False)
    h, r = (torch.randn(IMAGES, 258, DIS.width, requires_grad=True) for _ in range(2))
    wanted = [h, r, *one.parameters()]

    def job() -> Any:
        h_after, r_after = one(h, r, torch.empty(0), None, None)
        return torch.autograd.grad(h_after.sum() + r_after.sum(), wanted)

    return job


def on_the_public_loop(job: Job) -> Job:
    """The job with the reference replaced by the public loop."""

    def run() -> None:
        with mock.patch.object(reference, "backend", from_one_way(loop, reference.causal_conv_silu)):
            scan._backend.cache_clear()
            job()
        scan._backend.cache_clear()

    return run


def main(rounds: int = 5) -> None:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    print(json.dumps({"scan": str(choose("auto", "cpu")), "threads": threads, "images": IMAGES}))
    dis = step()
    jobs = {
        "DiS-S/2": dis,
        "DiS-S/2, one thread": on_threads(1, dis),
        "block": block("auto"),
        "block, reference": block("reference"),
        "block, public loop": on_the_public_loop(block("reference")),
    }
    rows = [
        Row("DiS-S/2, a block, against the public loop", "block", "block, public loop", 50, at_least=True),
        Row("DiS-S/2, a block, against our reference", "block", "block, reference", None, at_least=True),
    ]
    if threads > 1:
        rows.append(Row(f"DiS-S/2, {threads} threads, against one", "DiS-S/2", "DiS-S/2, one thread", 1.6, at_least=True))
    report(rows, measure(jobs, rounds))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
