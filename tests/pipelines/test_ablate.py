"""An ablation runs where its sweep would."""

import io
from contextlib import nullcontext
from pathlib import Path

import pytest
from rich.console import Console

from dis_scale.process.errors import UserError
from dis_scale.recipe import Recipe
from dis_scale.storage.folder import open_folder
from dis_scale.sweep import Sweep, state
from pipelines import ablate
from tests.support.documents import put_published
from tests.support.drivers import cluster


def test_a_sweep_of_gpus_is_not_sampled_on_the_cpu(tiny: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a laptop, where it would take months."""
    sweep = Sweep.below(open_folder(tmp_path), tiny)
    put_published(sweep.run("dis").published_at(160), images=160)
    state.record_device(sweep.run("dis"), "cuda")
    monkeypatch.setattr(ablate, "open_cluster", lambda *_: nullcontext(cluster("here")))
    with pytest.raises(UserError, match="last trained on GPUs, and would continue on the CPU"):
        ablate.run_ablation(sweep, "dis", 160, "guidance", [2.0], Console(file=io.StringIO()))
