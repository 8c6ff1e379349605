"""A large sweep, as commands read it: `python -m benchmarks.large_sweep [checkpoints]`. Requests, and the time at 30 ms for each.

One root with 100 sweeps. One of them has 1,000 published and evaluated checkpoints of two models (500 each), and resume
points of 64 workers.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from unittest.mock import patch

from benchmarks.weeks import REQUEST_S, requests
from dis_scale.planning.plan import price_sweep
from dis_scale.recipe import LatentShape, reading
from dis_scale.report import points
from dis_scale.storage import lease, manifest
from dis_scale.storage.document import FORMAT
from dis_scale.storage.folder import open_folder
from dis_scale.sweep import PointName, Sampled, Sweep, state
from dis_scale.tracking.rows import RowWriter
from dis_scale.upkeep import retention, status
from pipelines.evaluate import stored_blocks
from tests.support.documents import put_published

SWEEPS, WORKERS = 100, 64
RECIPE = "tests/support/tiny.yaml"


def make(root: str, checkpoints: int) -> Sweep:
    """Make the large sweep, and the others beside it; return it."""
    counts = list(range(0, 160 * checkpoints // 2, 160))
    settings = [f"storage.root={root}", f"train.publish_images={counts}", "evaluate.variants={}"]
    recipe = reading.load(RECIPE, settings)
    for number in range(SWEEPS - 1):
        other = Sweep.below(open_folder(root), recipe.model_copy(update={"name": f"other-{number}"}))
        other.save_recipe()
        state.use_latents(other, other.store / "latents/some", "v")
    sweep = Sweep.below(open_folder(root), recipe)
    sweep.save_recipe()
    manifest.put(sweep.store / "latents/some", {}, vae="v", latent=[4, 8], count=1, shards=[])
    state.use_latents(sweep, sweep.store / "latents/some", "v")
    facts = {"format": FORMAT, "metrics": list(recipe.evaluate.metrics), "time": 0.0, "samples": 1000}
    values = {
        recipe.evaluate.metric: 1.0,
        f"{recipe.evaluate.metric}_error": 0.1,
        f"{recipe.evaluate.metric}_floor": 0.1,
    }
    for model in recipe.models:
        run = sweep.run(model)
        with lease.hold(run.lease):
            writer = RowWriter(run.log, 1)
            writer.add(160, {"loss": 1.0, "images_per_s": 10.0})
            writer.settle()
        shards = {f"weights-{rank:05d}.safetensors": b"" for rank in range(WORKERS)}
        manifest.put(run.resume_point(PointName(counts[-1], 1)), shards, images=counts[-1], at=time.time())
        for count in counts:
            put_published(run.published_at(count), images=count)
            folder = sweep.evaluation(Sampled(model, count))
            folder.write_json(METRICS, facts | {"model": model, "images": count, "values": values})
    return sweep


def main(checkpoints: int = 1000) -> None:
    with tempfile.TemporaryDirectory() as root:
        with patch.object(os, "fsync", lambda _: None):
            sweep = make(root, checkpoints)
        backlog = state.Backlog(sweep, tuple(sweep.recipe.models))
        plan = price_sweep(sweep.recipe, LatentShape(4, 8))
        work: dict[str, Callable[[], object]] = {
            "start (what is left)": lambda: (
                state.all_evaluated(sweep), state.outdated(sweep), state.missing_published(sweep), state.skipped(sweep),
            ),
            "status": lambda: status.collect(sweep, time.time()),
            "report": lambda: points.collect(sweep, plan),
            "first poll of the evaluation": backlog.left,
            "each later poll": lambda: (state.training_over(sweep), backlog.left()),
            "progress after a failure": lambda: stored_blocks(sweep),
            "gc of the sweep": lambda: retention.find_unneeded(sweep),
        }  # fmt: skip
        for name, run in work.items():
            began_s = time.perf_counter()
            with requests(REQUEST_S, ("look up", "read", "list")) as counts:
                run()
            row = {"command": name, "requests": counts.total(), "seconds": round(time.perf_counter() - began_s, 1)}
            print(json.dumps(row | {"checkpoints": checkpoints, "request_s": REQUEST_S}), flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
