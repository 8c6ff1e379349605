"""The door to MLflow: create runs, send rows and files, each once.

MLflow holds a copy of what is in storage and can be refilled from it. If it is away, nothing stops.

Pitfalls: three processes that open a fresh SQLite file kill each other, so only the sweep creates the experiment and the runs and
keeps their ids; a row logged again with a new time is doubled; a changed parameter raises.
"""

import logging
import os
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from dis_scale.process.errors import UserError
from dis_scale.process.imports import hidden
from dis_scale.process.redaction import has_credentials, redact
from dis_scale.storage.folder import Folder
from dis_scale.sweep import Sweep
from dis_scale.sweep.documents import TrackingIds
from dis_scale.tracking.rows import Row

log = logging.getLogger(__name__)
SQLITE = "sqlite:///"
"""Beginning of the URI of a local database."""
LIFE, PARENT = "dis_scale.life", "mlflow.parentRunId"
"""Tag of a sweep's own run, and tag of its models' runs, which has the id of the sweep's run."""
COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf")
"""Colours of the models' curves, in the recipe's order (matplotlib's tab10): MLflow's own, by a run's id, may be alike."""


def default_uri(root: Folder) -> str:
    """Return an SQLite file next to the sweeps; below the home folder if they are in an object store."""
    folder = root.local or Path.home() / "dis-scale"
    return f"{SQLITE}{folder / 'mlflow.db'}"


def open_client(uri: str) -> Any:
    """Return a client that gives up on an unreachable server within seconds: rows wait in storage for the next one."""
    return _mlflow().MlflowClient(tracking_uri=uri)


def _mlflow() -> Any:
    """Import MLflow, after setting the environment variables that it reads."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    with hidden("pandas"):  # its import takes a second, for tables of runs that are not used
        import mlflow
        import mlflow.store.db.utils

    for name in ("mlflow", "mlflow.store.db.utils", "alembic"):  # they log at INFO each table that they create
        logging.getLogger(name).setLevel(logging.WARNING)
    return mlflow


def require_usable(uri: str) -> str:
    """Return the state of an MLflow in words; raise whatever MLflow raises. A missing SQLite file is not created."""
    if uri.startswith(SQLITE) and not Path(uri.removeprefix(SQLITE)).exists():
        return f"{_mlflow().__version__}, {uri} is made by the first sweep"
    experiments = open_client(uri).search_experiments(max_results=1000)
    return f"{uri} answers: {len(experiments)} experiments"


def fault(error: Exception) -> str:
    """Return an error of MLflow in words: it refuses this user, such as for another user's sweep of this name, or it is away."""
    code = getattr(error, "error_code", getattr(getattr(error, "response", None), "status_code", None))  # for a file: HTTP's
    return "refuses this user" if code in ("PERMISSION_DENIED", "UNAUTHENTICATED", 401, 403) else "cannot be reached"


def create_runs(sweep: Sweep, uri: str, parameters: dict[str, dict[str, object]]) -> TrackingIds:
    """Create what is missing: the experiment, the sweep's run, and one run per model with its parameters; return the ids.

    The sweep's existing runs are found by their tags; a run that was deleted in MLflow is created again. Called by the sweep only.
    Raises whatever MLflow raises; the sweep then continues without it. UserError for a URI with credentials, since it is stored.
    """
    if uri.startswith(SQLITE):
        uri = f"{SQLITE}{Path(uri.removeprefix(SQLITE)).absolute()}"  # other processes have other working folders
    if has_credentials(uri):
        raise UserError(
            "a URI with credentials is not stored: leave them out, and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
    name, before = sweep.folder.name, TrackingIds.find_intact(sweep.folder)
    experiment = _experiment(uri, name, _experiment_of(uri, before.sweep) if before else None)
    life = (before and before.life) or uuid.uuid4().hex
    own = next(iter(_runs(uri, experiment, LIFE, life)), None)
    own = own or _create_run(uri, experiment, name, {"dis_scale.sweep": sweep.folder.url, LIFE: life}, {})
    named = _runs(uri, experiment, PARENT, own)
    models = {name: run for run, name in named.items()}
    models |= {model: run for model, run in before.models.items() if run in named} if before else {}  # maybe renamed there
    ids = TrackingIds(uri=uri, experiment=experiment, sweep=own, models=models, life=life)
    if ids != before:
        ids.write(sweep.folder)
    for place, model in reversed(list(enumerate(parameters))):  # MLflow lists the newest run first
        if model not in ids.models:
            tags = {PARENT: ids.sweep, "mlflow.runColor": COLOURS[place % len(COLOURS)]}
            run = _create_run(uri, ids.experiment, model, tags, parameters[model])
            ids = ids.changed(models=ids.models | {model: run})
            ids.write(sweep.folder)
    return ids


def _runs(uri: str, experiment: str, tag: str, value: str) -> dict[str, str]:
    """Return the ids and names of the runs with this tag that are not deleted, the oldest last."""
    quote = '"' if "'" in value else "'"
    found = open_client(uri).search_runs([experiment], f"tags.`{tag}` = {quote}{value}{quote}", order_by=["start_time DESC"])
    return {str(run.info.run_id): str(run.info.run_name) for run in found}


def _create_run(uri: str, experiment: str, name: str, tags: dict[str, str], parameters: dict[str, object]) -> str:
    client = open_client(uri)
    from mlflow.entities import Param

    run: str = client.create_run(experiment, run_name=name, tags=tags).info.run_id
    client.log_batch(run, params=[Param(key, str(value)) for key, value in parameters.items()])
    return run


def _existing(uri: str) -> str:
    """Return a URI that opens an SQLite file and never creates it, even if it is deleted later; FileNotFoundError if it is gone.

    Processes that create a file at the same time damage it. SQLite's mode `rw` creates none (https://sqlite.org/uri.html). The URI
    names the driver, so MLflow does not take the rest for a path and create its folders. It would try a missing file for 102 s.
    """
    if not uri.startswith(SQLITE):
        return uri
    file = Path(uri.removeprefix(SQLITE))
    if not file.exists():
        raise FileNotFoundError(f"{uri} is gone: dis-scale mlflow sync makes it again, once the sweep has ended")
    return f"sqlite+pysqlite:///file:{quote(str(file.absolute()))}?mode=rw&uri=true"


def _experiment_of(uri: str, run: str) -> str | None:
    """Return the id of a run's experiment, which may have another name by now; None if MLflow does not know the run."""
    client = open_client(uri)
    from mlflow.exceptions import MlflowException

    try:
        return str(client.get_run(run).info.experiment_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def _experiment(uri: str, sweep_name: str, known: str | None = None) -> str:
    """Return the id of this sweep's experiment: the `known` one, or the one of its name.

    Creates it if missing, and restores it if deleted. With SQLite its files are stored next to the database.
    """
    from mlflow.exceptions import MlflowException

    client, name = open_client(uri), f"dis-scale {sweep_name}"
    if existing := client.get_experiment(known) if known else client.get_experiment_by_name(name):
        if existing.lifecycle_stage == "deleted":
            client.restore_experiment(existing.experiment_id)
        return str(existing.experiment_id)
    location = None
    if uri.startswith(SQLITE):
        database = Path(uri.removeprefix(SQLITE))
        database.parent.mkdir(parents=True, exist_ok=True)
        location = (database.parent / "mlflow-artifacts" / sweep_name).as_uri()
    try:
        return str(client.create_experiment(name, artifact_location=location))
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS" or not (made := client.get_experiment_by_name(name)):
            raise
        return str(made.experiment_id)  # created by a first request, which MLflow's client repeats if its answer is late


@dataclass
class RunCopy:
    """The copy of one run in MLflow (of the sweep's own if `model` is None): receives each row and file once.

    If MLflow is away, logs that once, keeps the rows, and tries again at the next call.
    """

    sweep: Sweep
    model: str | None
    away: bool = False
    _sent: dict[str, set[int]] = field(default_factory=dict)
    """Image counts at which MLflow has a metric, by its name. Only the counts, since weeks of training write a million rows."""
    _waiting: list[Row] = field(default_factory=list)

    def send(self, rows: Iterable[Row], *, ask: bool = True) -> bool:
        """Send these rows and the waiting ones; return whether no row waits. Without `ask`, rows are only added to the waiting."""
        self._waiting += rows
        if sent := not self._waiting or (ask and self._try(lambda client, run: self._send(client, run, self._waiting))):
            self._waiting = []
        return sent

    def images_of(self, metric: str) -> set[int]:
        """Return the image counts at which MLflow has a metric, by one request; none if it is away."""
        known = set[int]()
        self._try(lambda client, run: known.update(m.step for m in client.get_metric_history(run, metric)))
        return known

    def send_file(self, path: Path, folder: str) -> bool:
        """Send a file; return whether MLflow took it."""
        return self._try(lambda client, run: client.log_artifact(run, str(path), folder))

    def finish(self, status: str) -> bool:
        """End the run as FINISHED or FAILED; return whether MLflow knows it."""
        return self._try(lambda client, run: client.set_terminated(run, status))

    def _try(self, action: Any) -> bool:
        try:
            ids = TrackingIds.find(self.sweep.folder)
            run = ids and (ids.models.get(self.model) if self.model else ids.sweep)
            if not (ids and run):  # MLflow was away when the sweep began or the model was added; logged then
                self.away, self._waiting = True, []  # `dis-scale mlflow sync` takes them from storage
                return False
            action(open_client(_existing(ids.uri)), run)
        except Exception as error:  # whatever MLflow raises: results are in storage, this is only their copy
            if not self.away:
                log.warning("MLflow %s, rows wait in storage: %s", fault(error), redact(" ".join(str(error).split()))[:200])
            self.away = True
            return False
        self.away = False
        return True

    def _send(self, client: Any, run: str, rows: list[Row]) -> None:
        from mlflow.entities import Metric

        for name in {row.name for row in rows} - self._sent.keys():
            self._sent[name] = {m.step for m in client.get_metric_history(run, name)}
        fresh = [row for row in rows if row.images not in self._sent[row.name]]
        for i in range(0, len(fresh), 1000):
            part = fresh[i : i + 1000]
            client.log_batch(run, metrics=[Metric(r.name, r.value, int(r.time * 1000), r.images) for r in part])
            for row in part:
                self._sent[row.name].add(row.images)
