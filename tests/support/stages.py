"""A stage's program in one process, without Ray: driver and worker in one, started as a Ray job starts it."""

import hashlib
import json
import multiprocessing
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dis_scale.data.sources import Source, open_source
from dis_scale.data.staging import MixedOrder
from dis_scale.evaluation import reference
from dis_scale.evaluation.run import Evaluation, Spent, stored_blocks
from dis_scale.evaluation.sampling import labels_of
from dis_scale.process import faults
from dis_scale.recipe import Evaluate
from dis_scale.storage.folder import Folder
from dis_scale.storage.lease import Lease
from dis_scale.sweep import Sampled, Sweep, state
from dis_scale.sweep.documents import Encoding
from pipelines import evaluate, precompute, stage
from pipelines.evaluators import Evaluator
from pipelines.failures import WorkerFailure
from pipelines.precompute import Encoder
from pipelines.prepare import Preparer
from pipelines.restarts import with_restarts
from pipelines.stage import StageJob
from tests.support import ranks
from tests.support.commands import invoke
from tests.support.stage_jobs import deal_of, printing_job

multiprocessing.set_forkserver_preload([*ranks.PRELOAD, __name__])
UNLIKE = (".part-", "/leases/")
"""In the names of files that are not results: incomplete ones, and leases."""


ONE_MODEL = "{dit: {kind: dit, width: 16, depth: 1, heads: 2, patch: 4}}"


def run(name: str, sweep: Sweep, plan: Path) -> tuple[int, str]:
    """Run the stage in a process of its own that meets the plan's faults; return its exit code and its output."""
    output = plan.with_name("output")
    arguments = (name, sweep.folder.url, plan, output)
    ranks.start_server()
    process = multiprocessing.get_context("forkserver").Process(target=_enter, args=arguments)
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode, output.read_text()


def prepare_and_precompute(sweep: Sweep, plan: Path) -> None:
    """Store the recipe and make all that comes before training, without Ray."""
    sweep.save_recipe()
    plan.write_text("")
    for name in ("prepare", "precompute"):
        code, output = run(name, sweep, plan)
        assert code == 0, output


def train(sweep: Sweep, model: str, scratch: Path) -> None:
    """Train a model of a sweep that has latents, in ranks without Ray."""
    (scratch / "sweep").symlink_to(sweep.folder.url)  # `ranks` trains these two
    (scratch / "latents").symlink_to(state.require_latents(sweep.folder).url)
    ranks.run(sweep.recipe, model, scratch, attempt=1)


def complete(sweep: Sweep, scratch: Path) -> None:
    """Make everything of a sweep without Ray, up to its report."""
    prepare_and_precompute(sweep, scratch / "faults")
    for model in sweep.recipe.models:
        (scratch / model).mkdir()
        train(sweep, model, scratch / model)
    code, output = run("evaluate", sweep, scratch / "faults")
    assert code == 0, output
    code, output = invoke("report", str(sweep))
    assert code == 0, output


def _enter(name: str, url: str, plan: Path, output: Path) -> None:
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    faults.use(plan)
    stage.run_program({"prepare": _prepare, "precompute": _precompute, "evaluate": _evaluate}[name], url)


def preparer(sweep: Sweep) -> Preparer:
    """Return a worker of a prepare stage whose lease nobody else takes."""
    return Preparer(Lease(sweep.lease("prepare"), 0))


def _prepare(job: StageJob) -> None:
    def attempt(_: WorkerFailure | None) -> None:
        sweep, worker = job.sweep, _obeying(job, preparer(job.sweep))
        worker.prepare(sweep, "cpu")
        if not state.prepared(sweep):
            left = state.reference_parts_missing(sweep, len(open_source(sweep.recipe.data)))
            worker.make_parts(sweep, "cpu", deal_of(left))
            worker.merge_parts(sweep, "cpu")

    with_restarts(job, "prepare", attempt, lambda: len(job.sweep.reference_parts.list()))


@dataclass
class OneEncoder:
    """An encoder in this process, in the place of those on Ray; a new one after each failure."""

    job: StageJob

    def encoding(self) -> Encoding:
        return Encoder(self.job.sweep, "cpu").encoding()

    def check(self) -> str:
        return Encoder(self.job.sweep, "cpu").check()

    def encode(self, latents: Folder, encoding: Encoding, _: Source, left: list[int]) -> None:
        _obeying(self.job, Encoder(self.job.sweep, "cpu")).encode(latents, encoding, deal_of(left))

    def mix(self, latents: Folder, encoding: Encoding, source: Source, left: list[int]) -> None:
        mixer = MixedOrder.of(len(source), self.job.recipe.precompute, encoding)
        _obeying(self.job, Encoder(self.job.sweep, "cpu")).mix(latents, mixer, deal_of(left))


def _precompute(job: StageJob) -> None:
    precompute.find_or_make_latents(job, OneEncoder(job))


def make_latents(sweep: Sweep, encoder: type[OneEncoder] = OneEncoder) -> Folder:
    """Make the sweep's latents in this process as its precompute stage does; return their folder."""
    job = printing_job(sweep)
    precompute.find_or_make_latents(job, encoder(job))
    return state.require_latents(sweep.folder)


def evaluate_here(sweep: Sweep) -> None:
    """Evaluate in this process as the sweep's stage does."""
    _evaluate(printing_job(sweep))


@dataclass
class OneEvaluator:
    """An evaluator in this process, in the place of those on Ray."""

    worker: Evaluator

    def sample(self, sampled: Sampled, settings: Evaluate, blocks: list[int]) -> list[Spent]:
        return [self.worker.sample(sampled, settings, deal_of(blocks))]

    def floor(self, blocks: list[int]) -> None:
        self.worker.floor(deal_of(blocks))

    def held_out(self, sampled: Sampled) -> dict[str, float]:
        return self.worker.held_out(sampled)


def _evaluate(job: StageJob) -> None:
    def attempt(_: WorkerFailure | None) -> None:
        sweep, evaluator = job.sweep, OneEvaluator(_obeying(job, Evaluator(job.sweep, "cpu")))
        references, labels = reference.load_all(sweep), labels_of(sweep)
        samplings = sweep.recipe.evaluate.samplings
        evaluation = Evaluation(sweep, evaluator, references, samplings, labels, job.say, job.raise_if_stopped)
        evaluate.evaluate_all(job, evaluation, set())

    with_restarts(job, "evaluate", attempt, lambda: stored_blocks(job.sweep))


def _obeying(job: StageJob, worker: Any) -> Any:
    """The worker, which obeys the stop requests to this process as if its driver had forwarded them."""
    worker.stop_requested = job.stop_requested
    return worker


def made(root: Path) -> dict[str, Any]:
    """Return everything below a root: each file's hash, the values of metrics."""
    files = {str(p.relative_to(root)): p for p in root.rglob("*") if p.is_file() and not any(u in str(p) for u in UNLIKE)}
    return {name: _content(path) for name, path in files.items()}


def _content(path: Path) -> Any:
    if path.name == "metrics.json":
        return json.loads(path.read_text())["values"]
    return hashlib.sha256(path.read_bytes()).hexdigest()


def finished(root: Path) -> dict[str, int]:
    """Return when everything that is final was written: shards with a sidecar, folders with a manifest, blocks, metrics."""
    return {name: (root / name).stat().st_mtime_ns for name in made(root) if _sealed(root / name)}


def _sealed(path: Path) -> bool:
    if path.suffix == ".tar":
        return path.with_suffix(".json").exists()
    return path.suffix == ".npz" or path.name == "metrics.json" or (path.parent / "manifest.json").exists()
