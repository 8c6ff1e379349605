"""The driver: from labelled images to the curve of Gflops against distance, stage by stage. `python -m dis_scale.sweep RECIPE`.

A rerun continues from storage and repeats only the steps since the newest resume point. Each stage is a Ray job. The state of the
sweep is read only from storage. Read next: dis_scale/sweep/state.py, train.py, dis_scale/training/loop.py.
"""

import contextlib
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console

from dis_scale import report, vae
from dis_scale.data.order import require_some_to_train
from dis_scale.data.sources import open_source, require_source
from dis_scale.evaluation.features import require_weights
from dis_scale.evaluation.sampling import real_grid
from dis_scale.planning import isoflop
from dis_scale.planning.plan import Plan, price_reading, price_sweep, table
from dis_scale.process import jsonlog
from dis_scale.process.context import Context
from dis_scale.process.errors import DisScaleError, Held, Preempted, StorageAway, StorageError, StorageFull, UserError, counted
from dis_scale.process.progress import Board, listing_words, some
from dis_scale.process.redaction import redact
from dis_scale.process.threads import repeating
from dis_scale.recipe import Recipe, reading
from dis_scale.storage import lease
from dis_scale.storage.folder import Folder, open_folder
from dis_scale.storage.retries import forget_clients, refused
from dis_scale.sweep import REAL, RECIPE, Sampled, Sweep, command_lease, state
from dis_scale.sweep.documents import TrackingIds
from dis_scale.tracking import dashboards, mlflow, mlflow_copy
from dis_scale.training.schedule import require_no_rise
from dis_scale.weights import warm_start
from pipelines import last_ray, nodes, page
from pipelines.cluster import Cluster, in_job, open_cluster, ray_address, require_root
from pipelines.driver import (
    MOST_FOLLOWED,
    Drained,
    Driver,
    Failures,
    go_on,
    how_to_continue,
    may_follow,
    pause_before_next,
    run_stage,
    stopping_jobs,
    train_and_evaluate,
)
from pipelines.jobs import prefix_of
from pipelines.metrics import EXPORT_EVERY_S, Exporter
from pipelines.needs import await_nodes, holds, name_needs, require_device, require_fits
from pipelines.signals import Stop, obeying_signals
from pipelines.silence import NotStarted, RayEnded, Unanswered

REFUSED_S, ASK_REFUSED_EVERY_S = 600.0, 10.0
"""Time for which a job that begins asks again a storage that refuses its key, and the interval."""
ENDED = "sweep_ended_timestamp_seconds"
DELETED = "its published weights were deleted, and only training makes them: restore them, or remove the count from the recipe"


def run_sweep(recipe: Recipe, console: Console, *, here: bool = False, overrides: Sequence[str] = ()) -> None:
    """Run the remaining work of a sweep and write its report; DisScaleError if a stage or a model failed.

    `here` allows a local Ray for a sweep that last ran on a cluster. Without it an error names the command to type on the cluster,
    with the `overrides`, which the recipe already has.
    """
    console.print(f"ray      {last_ray.words()}", highlight=False, soft_wrap=True)
    store = open_folder(require_root(recipe)).patient
    storage = recipe.storage.model_copy(update={"root": store.url})
    sweep = Sweep.below(store, recipe.model_copy(update={"storage": storage}))
    console.print(f"sweep    {sweep}", highlight=False, soft_wrap=True)
    if store.local and store.local.exists() and not store.local.is_dir():
        raise UserError(f"storage.root {store}: it is a file, and a sweep is a folder below it: name another one")
    await_storage(sweep.folder, console)
    with Board(console).working("plan"):
        try:
            shape = vae.latent_shape(recipe.vae, recipe.data.resolution)
        except UserError:  # its autoencoder may be in a folder of the cluster
            if not here:
                last_ray.refuse_local_after_cluster(sweep, overrides)
            raise
        sweep = replace(sweep, recipe=isoflop.written_out(sweep.recipe, shape))
        _require_same_identity(sweep)
        plan = price_sweep(sweep.recipe, shape)
    console.print(table(plan))
    failures = Failures()
    with Board(console) as board:
        _name_deleted_weights(sweep, board)
        measured = state.all_evaluated(sweep) and not state.outdated(sweep) and state.floor_settled(sweep)
        if done := measured and sweep.report.exists(report.CSV):
            board.say("nothing to do: every model is trained and evaluated at every published count")
            with dashboards.copying(sweep, store, board.say):
                pass
        else:
            if not here:
                last_ray.refuse_local_after_cluster(sweep, overrides)
            driver = Driver(sweep, board, as_json=jsonlog.wanted())
            failures = run_stages(driver, plan, store)
            sweep = driver.sweep  # that of the running sweep, if this command joined one
        with board.working("report"):
            points = report.collect(sweep, plan)
            if not done:
                _write_report(sweep, points, failures)
            elif Sweep.open(sweep.folder.url, patient=True).recipe != sweep.recipe:  # such as a removed model or another curve
                with lease.hold(command_lease(sweep.folder)):
                    sweep.save_recipe()
                    _write_report(sweep, points, failures)
    _print_results(sweep, points, console)
    if words := failures.words():
        raise DisScaleError(f"{words}; {how_to_continue(sweep)}")


def await_storage(sweep: Folder, console: Console) -> None:
    """If storage is away, wait for about a minute, since a person may be at the terminal; StorageAway after that."""

    def ask() -> None:
        try:
            try:
                open_folder(sweep.url).list()  # to ask for an object would not show that its bucket is missing
            except StorageAway as error:
                console.print(f"waiting  storage does not answer, retried for about a minute: {error}")
                sweep.patient.list()
        except StorageError as error:
            raise UserError(f"storage cannot be used: {error}") from error

    _ask_storage(ask, sweep, console.print)


def _ask_storage(ask: Callable[[], None], folder: Folder, say: Callable[[str], None]) -> None:
    """Ask an object store. In a job, repeat this for `REFUSED_S` if it refuses the key, then UserError. Preempted if stopped.

    A job may continue a sweep of weeks, and the service that hands out its key may be away for moments. If a person is at the
    terminal, the error is raised at once.
    """
    if folder.local or not in_job() or sys.stdin.isatty():
        return ask()
    until_s, waits, stop = time.monotonic() + REFUSED_S, False, Stop()
    with obeying_signals(stop):
        while not stop.is_set():
            try:
                ask()
            except UserError as error:
                if not refused(error) or time.monotonic() >= until_s:
                    raise
                if not waits:
                    say(f"waiting  storage refuses the key, asked again for {REFUSED_S / 60:.0f} minutes: {error}")
                waits = True
                stop.pause(ASK_REFUSED_EVERY_S)
                forget_clients(folder.url)
            except StorageAway:
                if not stop.is_set():
                    raise
            else:
                if not stop.is_set():
                    return None
    raise Preempted("stopped as requested, before the sweep began")


def run_stages(driver: Driver, plan: Plan, store: Folder) -> Failures:
    """Run all remaining stages, on the Ray that this process runs in or on a local Ray, and on another one if that ends."""
    sweep = driver.sweep
    _ask_storage(store.require_usable, store, driver.board.say)
    if not ray_address():  # before a local Ray is started, which takes half a minute
        with naming_stop(sweep):
            lease.require_free_here(command_lease(sweep.folder))
    require_source(sweep.recipe.data, store)
    for extractor in sweep.recipe.evaluate.extractors:
        require_weights(extractor)
    dashboards.require_installed(sweep.recipe.tracking.also)
    require_starts(sweep, plan)
    with obeying_signals(driver.stop_requested), page.showing_a_stop(driver, plan):
        return on_rays(driver, lambda: _on_one_ray(driver, plan, store))


def on_rays(driver: Driver, once: Callable[[], Failures]) -> Failures:
    """Run the stages on a Ray, and on another one if that ends. If the first local Ray does not start, raise NotStarted."""
    while True:
        try:
            return once()
        except (RayEnded, NotStarted) as error:
            if isinstance(error, NotStarted) and not driver.followed_s["ray"]:
                raise
            if not may_follow(driver, "ray"):
                raise Unanswered(f"{error}; as {MOST_FOLLOWED} others within a day") from error
            driver.board.say(f"ray      {error}; another one is started, and the sweep continues")
            driver.jobs.clear()
            pause_before_next(driver, "ray")


def _on_one_ray(driver: Driver, plan: Plan, store: Folder) -> Failures:
    sweep, board = driver.sweep, driver.board
    with contextlib.ExitStack() as opened:
        with board.working("asking Ray" if ray_address() else "starting Ray"):
            cluster = opened.enter_context(open_cluster(sweep.recipe, board.say, partial(go_on, driver)))
        return _on_this_ray(driver, plan, store, cluster)


def _on_this_ray(driver: Driver, plan: Plan, store: Folder, cluster: Cluster) -> Failures:
    sweep, board = driver.sweep, driver.board
    with (
        page.showing_a_stop(driver, plan),  # while Ray still shows the gauges of this process
        one_at_a_time(driver, cluster),
        seen_alive(driver, exporting(driver, cluster)),
    ):
        board.say(f"cluster  {cluster.description}")
        list_images(driver, plan, store)
        driver.sweep = sweep = store_recipe(driver)
        track = partial(begin_tracking, driver, plan, sweep.recipe.tracking.uri or mlflow.default_uri(store))
        with contextlib.ExitStack() as ends:
            if driver.first:
                ends.enter_context(page.writing_page(driver, plan))
                with board.working("jobs of an earlier command end"):
                    last_ray.end_left_jobs(sweep, board.say, partial(go_on, driver))
            tracked = track()
            last_ray.record(sweep, cluster)
            require_device(driver, cluster)
            if holds(driver, cluster, "train"):  # the GPUs of other stages may be smaller
                require_fits(plan, cluster)
            if driver.first:
                ends.enter_context(dashboards.copying(sweep, store, board.say))
            ends.enter_context(stopping_jobs(driver, joined=driver.first))  # also jobs that a killed command left
            if not state.prepared(sweep):
                name_needs(driver, cluster)
                run_stage(driver, cluster, "prepare")
            await_nodes(driver, cluster)
            require_fits(plan, cluster)  # again, on the nodes that came
            if state.find_latents(sweep.folder) is None:
                run_stage(driver, cluster, "precompute")
            if not tracked:
                track()  # again, before the first rows: MLflow may be reachable by now
            failures = train_and_evaluate(driver, cluster)
        skipped = state.skipped(sweep) | dict.fromkeys(state.lost_evaluations(sweep), DELETED)
        failures = replace(failures, skipped={f"evaluation of {sampled}": why for sampled, why in skipped.items()})
        if not failures.words():
            driver.gauge(ENDED, time.time())
    return failures


def require_starts(sweep: Sweep, plan: Plan) -> None:
    """Raise UserError if a new training cannot begin by its recipe: its weights are missing or do not fit, or its rate jumps up."""
    models = sweep.recipe.models
    later = [name for name, model in models.items() if model.start or model.branch]
    new = [name for name in later if state.newest_complete(sweep.run(name)) is None]
    warm_start.require_fits(sweep.recipe, [name for name in new if models[name].start], plan.shape)
    for name in new:
        if branch := models[name].branch:
            require_no_rise(sweep.recipe, name, branch)


def list_images(driver: Driver, plan: Plan, store: Folder) -> None:
    """List the source's images, or open their listing, and log it; Preempted if a stop is requested meanwhile."""
    recipe, show = driver.sweep.recipe, listing_words(driver.board.say)

    def report(images: int) -> None:
        go_on(driver)
        show(images)

    try:
        source = open_source(recipe.data, store, report)
    except (StorageError, StorageAway, UserError) as error:
        if isinstance(error, StorageFull) or state.find_latents(driver.sweep.folder) is None:
            raise
        return driver.board.say(f"source   it cannot be listed; its latents are complete, and training continues: {error}")
    names = source.label_names
    classes = "without labels" if recipe.data.num_classes is None else f"in {counted(len(names), 'class')} ({some(names)})"
    driver.board.say(f"source   {counted(len(source), 'image')} {classes}, as listed in {source.listing.where}")
    if source.left_out:
        driver.board.say(f"left out {source.left_out}")
    require_some_to_train(recipe.data.held_out_images, len(source))
    driver.board.say(f"data     {price_reading(recipe, plan.shape, len(source))}")
    if not (recipe.data.given or driver.sweep.folder.exists(REAL)):  # precompute decodes latents
        try:
            driver.sweep.folder.write(REAL, real_grid(source, recipe.data.resolution))
        except (StorageError, StorageAway) as error:
            driver.board.say(f"source   its images are not shown in the report: {error}")


def _name_deleted_weights(sweep: Sweep, board: Board) -> None:
    """Log the published weights that were deleted, also of a finished sweep: forks, ablations and added metrics need them."""
    for model, counts in state.missing_published(sweep).items():
        for count in counts:
            board.say(f"missing  {Sampled(model, count)}: {DELETED}")


@contextlib.contextmanager
def one_at_a_time(driver: Driver, cluster: Cluster) -> Iterator[None]:
    """Hold the sweep's lease. A second command joins the first one's jobs on the same Ray; on another Ray it is refused at once."""
    with contextlib.ExitStack() as stack:
        driver.first = True
        try:
            with naming_stop(driver.sweep):
                held = stack.enter_context(lease.hold(command_lease(driver.sweep.folder), cluster.id))
            obey = partial(_obey_request, held, driver, cluster)
            stack.enter_context(repeating(obey, driver.requests_polled_every_s, "stop requests"))
        except Held as error:
            driver.first = False
            if error.cluster != cluster.id:
                raise
            driver.board.say(f"joined   process {error.process}, which runs this sweep on the same Ray")
        yield


@contextlib.contextmanager
def naming_stop(sweep: Sweep) -> Iterator[None]:
    """Add to a Held the commands that show and stop the other process."""
    try:
        yield
    except Held as error:
        words = f"{error}; to see it: dis-scale status {sweep}; to stop it: dis-scale stop {sweep}"
        raise Held(words, error.cluster, error.process) from error


def exporting(driver: Driver, cluster: Cluster) -> Callable[[], bool]:
    """Export the driver's gauges and return a function that checks whether its node is being drained; on a local Ray do neither."""
    if cluster.ours:
        return lambda: False
    exporter = Exporter(Context(sweep=driver.sweep.recipe.name, folder=prefix_of(driver.sweep)))
    exporter.start()
    driver.gauge = exporter.gauge
    return nodes.own_node_drains


@contextlib.contextmanager
def seen_alive(driver: Driver, drains: Callable[[], bool]) -> Iterator[None]:
    """Export when this command's loop last turned, and at the end whether a stop request ended it. Request a stop if `drains()`."""

    def look() -> None:
        driver.gauge("sweep_alive_timestamp_seconds", driver.turned_at)
        if drains() and not driver.stop_requested.is_set():
            driver.drained = True
            driver.board.say("drained  the node of this command is being drained: its jobs save, and it ends")
            driver.stop_requested.set()

    try:
        with repeating(look, EXPORT_EVERY_S, "alive"):
            yield
    except (Drained, Preempted) as error:
        stopped = isinstance(error, Preempted) or not driver.drained
        if stopped:
            driver.gauge(ENDED, time.time())
        if isinstance(error, Drained) and stopped:
            go_on(driver)  # a stop was requested while the jobs saved
        raise


def _obey_request(held: lease.Lease, driver: Driver, cluster: Cluster) -> None:
    """Request the driver to stop if another process has requested it through storage (`dis-scale stop`), or has taken over."""
    if held.stop_requested() and (driver.drained or not driver.stop_requested.is_set()):
        last = None if held.held() else lease.last_holding(held.folder)
        if last and last.holder.pid == os.getpid() and last.holder.is_here:
            return  # this process itself, on another Ray since: storage answered late
        driver.drained = False  # a drained command would continue elsewhere
        if last:
            driver.taken_over = last.holder.cluster == cluster.id  # it has joined these jobs
            driver.board.say("taken    another process has taken over this sweep: this one stops")
        driver.stop_requested.set()


def resumed_recipe(sweep: Sweep, overrides: list[str]) -> Recipe:
    """Return the recipe of a stored sweep with more overrides.

    `train.start_over` holds for one command: only its value in `overrides` counts. UserError if the sweep was moved, or would be.
    """
    where, settings = f"{sweep}/{RECIPE}", ["train.start_over=false", *overrides]
    own = reading.parse(reading.dump(sweep.recipe), where, settings)
    stays = own.storage.root == sweep.recipe.storage.root or open_folder(own.storage.root) == sweep.store
    if own.name != sweep.recipe.name or not stays:
        raise UserError(
            f"{sweep} keeps its name and its place: got {own.name} in {own.storage.root}; dis-scale sweep RECIPE begins another one"
        )
    recipe = own.model_copy(update={"storage": own.storage.model_copy(update={"root": sweep.store.url})})
    if (expected := Sweep.below(sweep.store, recipe)) != replace(sweep, recipe=recipe):
        raise UserError(f"{sweep} holds the sweep {recipe.name}, which belongs into {expected}: move it there")
    return recipe


def store_recipe(driver: Driver) -> Sweep:
    """Store the recipe, which may have grown. A command that joined a running sweep uses its recipe; UserError for other models."""
    if driver.first:
        driver.sweep.save_recipe()
        return driver.sweep
    running = Sweep.open(driver.sweep.folder.url, patient=True)
    if running.recipe.models != driver.sweep.recipe.models:
        raise UserError(f"{running} is running with other models: stop it (dis-scale stop), then run this command again")
    if running.recipe != driver.sweep.recipe:
        driver.board.say("recipe   that of the running sweep counts; to change settings, stop it and run this command again")
    return running


def begin_tracking(driver: Driver, plan: Plan, uri: str) -> bool:
    """Create the sweep's runs in MLflow; return whether that is done. If MLflow cannot be reached, log that and return false: it
    only holds a copy.

    A command that joined another one leaves this to it. Otherwise both would create the runs, and also an SQLite file that was
    deleted beside running jobs.
    """
    if not driver.first:
        return True
    try:
        with driver.board.working("MLflow is asked"):
            tracking = mlflow.create_runs(driver.sweep, uri, plan.parameters())
        driver.board.say(f"tracking {uri}")
        for line in mlflow_lines(tracking):
            driver.board.say(f"mlflow   {line}")
        return True
    except DisScaleError:
        raise
    except Exception as error:
        why = redact(" ".join(str(error).split()))[:200]
        driver.board.say(f"tracking MLflow {mlflow.fault(error)} at {uri}, results are in storage only: {why}")
        return False


def _write_report(sweep: Sweep, points: report.Report, failures: Failures) -> None:
    """Write the report; copy it and the end of each failed run to MLflow."""
    report.write(sweep, points)
    taken = mlflow_copy.copy_report(sweep, "FAILED" if failures.models or failures.evaluation is not None else "FINISHED")
    for model in failures.models if taken else ():  # otherwise each model would wait for an MLflow that hangs
        mlflow.RunCopy(sweep, model).finish("FAILED")


def _print_results(sweep: Sweep, points: report.Report, console: Console) -> None:
    console.print(report.table(points))
    console.print(f"figure   {sweep.report}/gflops_fid.png", highlight=False, soft_wrap=True)
    console.print(f"page     {sweep.report}/{report.PAGE}", highlight=False, soft_wrap=True)
    if tracking := TrackingIds.find_intact(sweep.folder):
        for line in mlflow_lines(tracking):
            console.print(f"mlflow   {line}", highlight=False, soft_wrap=True)


def mlflow_lines(tracking: TrackingIds) -> list[str]:
    """Return the address of the sweep's charts; for an SQLite file, first the command that serves it at this address."""
    by_name = "orderByKey=tags.%60mlflow.runName%60&orderByAsc=true"  # in any other order the models are folded, without charts
    charts = f"#/experiments/{tracking.experiment}/runs?{by_name}&compareRunsMode=CHART"
    if tracking.uri.startswith("http"):
        return [f"{tracking.uri.rstrip('/')}/{charts}"]
    command = shlex.join([str(Path(sys.executable).with_name("mlflow")), "ui", "--backend-store-uri", tracking.uri])
    return [command, f"http://127.0.0.1:5000/{charts}"]


def _require_same_identity(sweep: Sweep) -> None:
    """Raise UserError with the differences if the sweep of this name was begun with another recipe."""
    try:
        differences = sweep.differences()
    except (StorageAway, UserError):
        raise
    except DisScaleError as error:
        raise UserError(f"storage cannot be used: {error}") from error
    if differences:
        shown = "\n".join(f"  {line}" for line in differences[:10])
        raise UserError(f"{sweep} was begun with another recipe; give this one another name, or the stored values:\n{shown}")
