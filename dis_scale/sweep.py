"""The whole way, stage by stage: labelled images to the curve of Gflops against distance. `python -m dis_scale.sweep RECIPE`.

Again is safe: the same command, given again after any accident, does what is left and nothing twice. Each stage is a Ray job
(pipelines/); what is done is read from storage and nowhere else. Read next: recipe.py, pipelines/train.py, train.py.
"""

import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from rich.console import Console

from dis_scale import mirror, tracking, vae
from dis_scale import plan as plans
from dis_scale import report as reports
from dis_scale.data.shards import find_latents
from dis_scale.data.sources import open_source
from dis_scale.errors import DisScaleError, Held, Preempted, UserError
from dis_scale.evaluation import results
from dis_scale.evaluation.features import require_weights
from dis_scale.plan import Plan
from dis_scale.progress import Board, listing_words
from dis_scale.recipe import Recipe, reading
from dis_scale.recipe.identity import identity_differences
from dis_scale.storage import lease
from dis_scale.storage.folder import Folder, open_folder
from pipelines import jobs
from pipelines.jobs import Cluster, Job
from pipelines.prepare import prepared
from pipelines.stage import PROGRESS, SAY

LOOK_EVERY_S = 0.5
RAY = "ray.json"
"""Where the sweep last ran: a Ray of its own is known by it alone."""


@dataclass
class Sweep:
    """One sweep under way."""

    recipe: Recipe
    folder: Folder
    plan: Plan
    board: Board
    jobs: list[Job] = field(default_factory=list)
    asked_to_stop: bool = False


def open_sweep(url: str) -> tuple[Folder, Plan]:
    """The sweep at a URL or path, and the plan of the recipe that it stored; UserError where there is none."""
    found = open_folder(url)
    if not found.exists(reading.FILE):
        raise UserError(
            f"no sweep at {found}: expected a folder with {reading.FILE}, for example outputs/sweeps/digits"
        )
    recipe = reading.parse(found.read(reading.FILE).decode(), f"{found}/{reading.FILE}")
    return found, plans.plan(recipe, vae.latent_shape(recipe.vae, recipe.data.resolution))


def run(recipe: Recipe, console: Console) -> None:
    """Runs what is left of a sweep and makes its report; DisScaleError where a stage or a model failed."""
    recipe, store = _resolve(recipe)
    sweep_folder = store / "sweeps" / recipe.name
    console.print(f"sweep    {sweep_folder}", highlight=False, soft_wrap=True)
    _require_same_identity(sweep_folder, recipe)
    plan = plans.plan(recipe, vae.latent_shape(recipe.vae, recipe.data.resolution))
    console.print(plans.table(plan))
    failed: dict[str, str] = {}
    with Board(console) as board:
        sweep = Sweep(recipe, sweep_folder, plan, board)
        done = results.finished(sweep_folder, recipe) and not results.outdated(sweep_folder, recipe)
        if done and sweep_folder.exists(f"report/{reports.CSV}"):
            board.say("nothing to do: every model is trained and evaluated at every published count")
        else:
            failed = _work(sweep, store)
            _report(sweep, failed)
            for drawn, why in results.skipped(sweep_folder, recipe).items():
                failed[f"evaluation of {drawn}"] = why
    _closing_words(sweep, console)
    if failed:
        reasons = "; ".join(f"{name} failed: {why}" for name, why in failed.items())
        raise DisScaleError(f"{reasons}; give the same command again to go on")


def _work(sweep: Sweep, store: Folder) -> dict[str, str]:
    """All stages, on the Ray that this process runs on or on one of our own; (what failed, why)."""
    store.require_usable()
    sweep.folder = sweep.folder.patient  # from here on a store that does not answer is away, not mistaken
    source = open_source(sweep.recipe.data, store, listing_words(sweep.board.say))
    sweep.board.say(
        f"source   {len(source):,} images in {len(source.label_names)} classes, as listed in {source.listing.where}"
    )
    for extractor in sweep.recipe.evaluate.extractors:
        require_weights(extractor)
    with obeying_signals(sweep), jobs.cluster(sweep.recipe) as cluster, _one_at_a_time(sweep, cluster):
        sweep.board.say(f"ray      {cluster.described}")
        sweep.folder.write(reading.FILE, reading.dump(sweep.recipe).encode())
        _begin_tracking(sweep, sweep.recipe.tracking.uri or tracking.default_uri(store))
        sweep.folder.write_json(RAY, {"address": cluster.address, "host": socket.gethostname()})
        device, why = jobs.choose_device(sweep.recipe, cluster.gpus)
        sweep.board.say(f"device   {device} ({why})")
        if device == "cuda" and cluster.ours and cluster.gpus < sweep.recipe.train.world_sizes[-1]:
            raise UserError(
                f"device: cuda for {sweep.recipe.train.workers} workers, but this machine has {cluster.gpus} GPUs"
            )
        try:
            if not prepared(sweep.folder, sweep.recipe):
                run_stage(sweep, cluster, "prepare")
            if find_latents(sweep.folder) is None:
                run_stage(sweep, cluster, "precompute")
            return _train_and_evaluate(sweep, cluster)
        except BaseException:
            # A Ray of our own ends with us: wait for its jobs.
            jobs.stop(sweep.jobs, wait_s=sweep.recipe.grace_s + 5 if cluster.ours else 0.0)
            raise


@contextlib.contextmanager
def _one_at_a_time(sweep: Sweep, cluster: Cluster) -> Iterator[None]:
    """A second sweep of one name joins the first one's jobs on the same Ray; on another it is refused before it writes."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lease.hold(sweep.folder / lease.FOLDER / "sweep", cluster.id))
        except Held as error:
            if error.holder.get("cluster") != cluster.id:
                raise
            sweep.board.say(f"joined   process {error.holder['pid']}, which runs this sweep on the same Ray")
        yield


def _begin_tracking(sweep: Sweep, uri: str) -> None:
    """MLflow is a mirror: where it cannot be reached the sweep says so and goes on."""
    try:
        tracking.begin(sweep.folder, uri, sweep.plan.parameters())
        sweep.board.say(f"tracking {uri}")
    except DisScaleError:
        raise
    except Exception as error:
        why = " ".join(str(error).split())[:200]
        sweep.board.say(f"tracking MLflow cannot be reached at {uri}, results are in storage alone: {why}")


def run_stage(sweep: Sweep, cluster: Cluster, name: str, *arguments: str) -> None:
    """Runs one stage to its end; DisScaleError says why it failed."""
    job = _submit(sweep, cluster, name, *arguments)
    while not job.ended():
        _look(sweep, job, name)
        time.sleep(LOOK_EVERY_S)
    _look(sweep, job, name)
    if job.status() != "SUCCEEDED":
        raise job.error(f"{name} failed: {job.why()}")


def _train_and_evaluate(sweep: Sweep, cluster: Cluster) -> dict[str, str]:
    """Models in the recipe's order, as many at once as there is room for, and the evaluation beside them; (what failed, why)."""
    waiting = [m for m in sweep.recipe.models if not results.trained(sweep.folder, sweep.recipe, m)]
    for model in waiting:
        (sweep.folder / "runs" / model).delete(results.ENDED)
    evaluation = _submit(sweep, cluster, "evaluate")
    training: dict[str, Job] = {}
    failed: dict[str, str] = {}
    while waiting or training or not evaluation.ended():
        while waiting and len(training) < cluster.room:
            model = waiting.pop(0)
            training[model] = _submit(sweep, cluster, "train", model)
        time.sleep(LOOK_EVERY_S)
        _look(sweep, evaluation, "evaluate")
        for model, job in list(training.items()):
            over = job.ended()
            _look(sweep, job, f"train {model}")
            if over:
                del training[model]
                if job.status() != "SUCCEEDED":
                    _leave_if_not_ours(job, model)
                    failed[model] = job.why()
                    sweep.board.say(f"train {model} failed: {failed[model]}")
                    (sweep.folder / "runs" / model).write_json(results.ENDED, {"why": failed[model]})
        if "evaluate" not in failed and evaluation.ended() and evaluation.status() != "SUCCEEDED":
            _leave_if_not_ours(evaluation, "evaluate")
            failed["evaluate"] = evaluation.why()
            sweep.board.say(f"evaluate failed: {failed['evaluate']}; training goes on")
    return failed


def _leave_if_not_ours(job: Job, name: str) -> None:
    """Somebody stopped this job from outside, or another sweep does its work: no failure, and nothing to note in storage."""
    if isinstance(error := job.error(f"{name}: {job.why()}"), Held):
        raise error
    if isinstance(error, Preempted):
        raise Preempted(f"{name} was stopped from outside; give the same command again to go on")


def stop(sweep: Folder, address: str | None) -> list[str]:
    """Stops the sweep's jobs wherever they run; their ids. UserError where no Ray is known or none answers."""
    if address is None and "RAY_ADDRESS" not in os.environ:
        known = sweep.read_json(RAY) if sweep.exists(RAY) else {}
        address = known.get("address")
        if address is None or known["host"] != socket.gethostname():
            where = f" (it last ran on {known['host']})" if known else ""
            raise UserError(f"{sweep}: no Ray is known here{where}: --address http://HOST:8265, or set RAY_ADDRESS")
    return jobs.stop_all(sweep, address)


def _submit(sweep: Sweep, cluster: Cluster, stage: str, *arguments: str) -> Job:
    job = jobs.submit(cluster, sweep.recipe, sweep.folder, stage, *arguments)
    sweep.jobs.append(job)
    sweep.board.say(
        f"{' '.join([stage, *arguments])}: Ray job {job.id}{'' if job.ours else ' (running already: joined)'}"
    )
    return job


def _look(sweep: Sweep, job: Job, name: str) -> None:
    """Shows what the job said since the last look; leaves where somebody asked this process to stop."""
    if sweep.asked_to_stop:
        raise Preempted("stopped as asked; give the same command again to go on")
    for line in job.lines():
        if line.startswith(PROGRESS):
            sweep.board.update(name, **json.loads(line.removeprefix(PROGRESS)))
        elif line.startswith(SAY):
            sweep.board.say(f"  {line.removeprefix(SAY)}")


def _report(sweep: Sweep, failed: dict[str, str]) -> None:
    """Makes the report, and mirrors it and the end of each run into MLflow."""
    reports.write(sweep.folder, reports.collect(sweep.folder, sweep.plan))
    mirror.report(sweep.folder, "FAILED" if failed else "FINISHED")
    for model in failed.keys() & sweep.recipe.models.keys():
        tracking.Projection(sweep.folder, model).finish("FAILED")


def _closing_words(sweep: Sweep, console: Console) -> None:
    console.print(reports.table(reports.collect(sweep.folder, sweep.plan)))
    console.print(f"figure   {sweep.folder}/report/gflops_fid.png", highlight=False, soft_wrap=True)
    console.print(f"page     {sweep.folder}/report/{reports.PAGE}", highlight=False, soft_wrap=True)
    if not sweep.folder.exists(tracking.FILE):
        return
    uri = sweep.folder.read_json(tracking.FILE)["uri"]
    command = f"{Path(sys.executable).with_name('mlflow')} ui --backend-store-uri {uri}"
    console.print(f"mlflow   {uri if uri.startswith('http') else command}", highlight=False, soft_wrap=True)


def _resolve(recipe: Recipe) -> tuple[Recipe, Folder]:
    """The recipe with an absolute storage root, and that root."""
    store = open_folder(jobs.require_root(recipe))
    return recipe.model_copy(update={"storage": recipe.storage.model_copy(update={"root": store.url})}), store


def _require_same_identity(sweep: Folder, recipe: Recipe) -> None:
    """UserError with the differences where the sweep of this name was begun as another one."""
    try:
        if not sweep.exists(reading.FILE):
            return
        stored = reading.parse(sweep.read(reading.FILE).decode(), f"{sweep}/{reading.FILE}")
    except UserError as error:
        raise UserError(f"{error}; the stored recipe is from another version: give this sweep another name") from error
    except DisScaleError as error:
        raise UserError(f"storage cannot be used: {error}") from error
    if differences := identity_differences(stored, recipe):
        shown = "\n".join(f"  {line}" for line in differences[:10])
        raise UserError(
            f"{sweep} was begun with another recipe; give this one another name, or the stored values:\n{shown}"
        )


@contextlib.contextmanager
def obeying_signals(sweep: Sweep) -> Iterator[None]:
    """SIGTERM and SIGINT ask the sweep to stop its jobs and leave; a second one is obeyed at once."""

    def ask(number: int, _: FrameType | None) -> None:
        if sweep.asked_to_stop:
            signal.default_int_handler(number, None)
        sweep.asked_to_stop = True

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    from dis_scale.cli import main

    main(["sweep", *sys.argv[1:]])
