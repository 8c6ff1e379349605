"""What prepare says of its progress, and of a GPU that does not work: tests/e2e has what it makes."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from dis_scale.process.context import Context
from dis_scale.process.errors import BrokenDevice
from dis_scale.recipe import Recipe, reading
from dis_scale.storage.folder import open_folder
from dis_scale.sweep import Sweep
from pipelines.lines import Log
from pipelines.prepare import progress_by_part
from tests.conftest import TINY
from tests.support.stage_jobs import deal_of, job_of
from tests.support.stages import preparer


def test_progress_is_that_of_what_is_made_now(tmp_path: Path) -> None:
    """One sum of steps of different cost would tell a wrong time left; what was skipped over is shown as done.

    The first line is there before the worker's place: without one a sweep that waits for nodes looks as if it hung. That of
    4 steps is left out: it comes less than a second later.
    """
    lines, job = list[str](), job_of(reading.load(TINY, ["vae.steps=10", "evaluate.extractor.steps=5"]), tmp_path)
    job.log = Log(Context(), lines.append)
    report = progress_by_part(job)
    for done in (4, 13, 20):
        report([done])
    shown = [(line["done"], line["total"], line["unit"]) for line in map(json.loads, lines)]
    assert shown == [
        (0, 10, "steps of the autoencoder"),
        (10, 10, "steps of the autoencoder"),
        (5, 5, "steps of the extractor"),
        (5, 5, "steps of the judge"),
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_does_not_work_counts_against_its_node(tiny: Recipe, tmp_path: Path) -> None:
    """As for encoders: an error without a node ended the sweep, and another GPU was never tried."""
    worker = preparer(sweep := Sweep.below(open_folder(tmp_path), tiny))
    for work in (partial(worker.prepare, sweep, "cuda"), partial(worker.make_parts, sweep, "cuda", deal_of([0]))):
        with pytest.raises(BrokenDevice):
            work()
