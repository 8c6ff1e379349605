"""Start-up of each stage: `python -m benchmarks.startup [rounds]`. Seconds from submission to the first useful work.

Runs the tests' tiny sweep stage by stage on a Ray of its own. Reported per stage: when its driver says its first line, and when its
first worker begins to work (the first optimizer step, the first image, the first sample). Needs one to two minutes per round.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from dis_scale.recipe import reading
from dis_scale.storage.folder import open_folder
from dis_scale.sweep import Sweep
from pipelines import lines
from pipelines.cluster import Cluster, open_cluster
from tests.conftest import TINY
from tests.support import clusters

STAGES = (("prepare",), ("precompute",), ("train", "dit"), ("evaluate",))


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    times: dict[str, list[tuple[float, float]]] = {stage: [] for stage, *_ in STAGES}
    for _ in range(rounds):
        for stage, driver_s, work_s in measure_round():
            times[stage].append((driver_s, work_s))
            print(f"{stage}: driver after {driver_s:.1f} s, work after {work_s:.1f} s", flush=True)
    print("median of", rounds)
    for stage, pairs in times.items():
        driver_s, work_s = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(f"{stage:11} driver {driver_s:5.1f} s   work {work_s:5.1f} s   goal 6.0 s")


def measure_round() -> Iterator[tuple[str, float, float]]:
    """Yield (stage, seconds to the driver, seconds to the first useful work) of a new sweep."""
    with tempfile.TemporaryDirectory() as scratch:
        recipe = reading.load(
            TINY, [f"storage.root={scratch}", "models={dit: {kind: dit, width: 16, depth: 1, heads: 2, patch: 4}}"]
        )
        sweep = Sweep.below(open_folder(Path(scratch)), recipe)
        sweep.save_recipe()
        with open_cluster(recipe) as cluster:
            for stage in STAGES:
                yield stage[0], *measure_stage(cluster, sweep, *stage)


def measure_stage(cluster: Cluster, sweep: Sweep, *stage: str) -> tuple[float, float]:
    """Run a stage to its end; return the seconds from its submission to its driver and to its first work."""
    submitted = time.time()
    job = clusters.submit(cluster, sweep, *stage)
    while not job.ended():
        time.sleep(0.2)
    assert job.status == "SUCCEEDED", job.reason()
    said = list(filter(None, map(lines.parse, cluster.client.get_job_logs(job.id).splitlines())))
    work = next(line for line in said if line.kind == "event" and line.facts["event"] == "work")
    began_s, worked_s = (datetime.fromisoformat(line.facts["time"]).timestamp() for line in (said[0], work))
    return began_s - submitted, worked_s - submitted


if __name__ == "__main__":
    main()
