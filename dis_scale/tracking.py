"""Metric rows in storage, and their projection into MLflow. The door to MLflow.

Rows in storage are the truth. MLflow gets each row once, with the row's own first time, and can be filled again from the folder;
when it is away nothing stops. Learnt the hard way: three processes that open a fresh SQLite file kill each other, so the sweep
alone creates experiment and runs and keeps their ids; a row logged again with a new time doubles, a changed parameter raises.
"""

import json
import logging
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from dis_scale.storage.folder import Folder

FILE = "tracking.json"
log = logging.getLogger(__name__)


class Row(NamedTuple):
    """A metric's value after `images` images seen, and when it was first known (Unix seconds)."""

    name: str
    value: float
    images: int
    time: float


@dataclass
class Log:
    """One attempt's rows on their way into `folder`, a file a flush."""

    folder: Folder
    attempt: int
    _rows: list[Row] = field(default_factory=list)
    _files: int = 0

    def add(self, images: int, values: dict[str, float]) -> None:
        now = time.time()
        self._rows += [Row(name, float(value), images, now) for name, value in values.items()]

    def flush(self) -> None:
        if self._rows:
            lines = "".join(json.dumps(row._asdict()) + "\n" for row in self._rows)
            self.folder.write(f"{self.attempt:04d}-{self._files:06d}.jsonl", lines.encode())
            self._rows, self._files = [], self._files + 1


@dataclass
class Rows:
    """The rows of a run as they come, each (name, images) once: the first attempt that logged it wins."""

    folder: Folder
    _seen_files: set[str] = field(default_factory=set)
    _seen_rows: set[tuple[str, int]] = field(default_factory=set)

    def new(self) -> list[Row]:
        """What came since the last call."""
        fresh = []
        for name in self.folder.list():
            if name.endswith(".jsonl") and name not in self._seen_files:
                self._seen_files.add(name)
                fresh += [Row(**json.loads(line)) for line in self.folder.read(name).splitlines()]
        return [row for row in fresh if self._first(row)]

    def _first(self, row: Row) -> bool:
        key = (row.name, row.images)
        known = key in self._seen_rows
        self._seen_rows.add(key)
        return not known


ATTEMPT = "attempt"
"""The row that begins an attempt: its number, at the images that it goes on from."""
GOODPUT = "goodput"
"""The row that ends one: `goodput` up to there."""


def goodput(folder: Folder) -> dict[int, float]:
    """By images seen: the share of the time since the first attempt began that went into steps which no later one repeated.

    Waiting for machines, start-up, and steps lost with a worker all count as lost.
    """
    rows = sorted(_all_rows(folder), key=lambda row: row.time)
    begins = [row for row in rows if row.name == ATTEMPT]
    shares, good_s = dict[int, float](), 0.0
    for begin, after in zip(begins, [*begins, None][1:], strict=True):
        own = [row for row in rows if row.time >= begin.time and (after is None or row.time < after.time)]
        kept = [row for row in own if after is None or row.images <= after.images]
        shares |= {r.images: (good_s + r.time - begin.time) / max(r.time - begins[0].time, 1e-9) for r in kept}
        good_s += max((row.time for row in kept), default=begin.time) - begin.time
    return shares


def _all_rows(folder: Folder) -> Iterator[Row]:
    for name in folder.list():
        if name.endswith(".jsonl"):
            yield from (Row(**json.loads(line)) for line in folder.read(name).splitlines())


def default_uri(root: Folder) -> str:
    """An SQLite file beside the sweeps, or below the home folder where they live in an object store."""
    folder = root.local or Path.home() / "dis-scale"
    return f"sqlite:///{folder / 'mlflow.db'}"


def client(uri: str) -> Any:
    # An unreachable server is to cost seconds: rows wait in storage and are sent by the next one that reaches it.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    import mlflow
    import mlflow.store.db.utils

    for name in ("mlflow", "mlflow.store.db.utils", "alembic"):  # each speaks at INFO of tables that it makes
        logging.getLogger(name).setLevel(logging.WARNING)
    return mlflow.MlflowClient(tracking_uri=uri)


def begin(sweep: Folder, uri: str, parameters: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Creates the experiment, the sweep's run and a run a model with its parameters, where they are not there; returns the ids.

    Called by the sweep alone. Raises whatever MLflow raises; the sweep then goes on without it.
    """
    found = sweep.read_json(FILE) if sweep.exists(FILE) else {}
    if found.get("uri") != uri or not _run_exists(uri, found["sweep"]):
        found = {"uri": uri, "experiment": _experiment(uri, sweep), "models": {}}
        found["sweep"] = _create_run(found, sweep.name, {"dis_scale.sweep": sweep.url}, {})
        sweep.write_json(FILE, found)
    for model in parameters.keys() - found["models"].keys():
        found["models"][model] = _create_run(found, model, {"mlflow.parentRunId": found["sweep"]}, parameters[model])
        sweep.write_json(FILE, found)
    return found


def _create_run(found: dict[str, Any], name: str, tags: dict[str, str], parameters: dict[str, Any]) -> str:
    mlflow = client(found["uri"])
    run: str = mlflow.create_run(found["experiment"], run_name=name, tags=tags).info.run_id
    for key, value in parameters.items():
        mlflow.log_param(run, key, value)
    return run


def _run_exists(uri: str, run: str) -> bool:
    """Whether MLflow still knows the run: its database may be another one than when the sweep began."""
    from mlflow.exceptions import MlflowException

    try:
        client(uri).get_run(run)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise
    return True


def _experiment(uri: str, sweep: Folder) -> str:
    """The experiment of this sweep's name; its files lie beside an SQLite file, a server has a place of its own."""
    mlflow, name = client(uri), f"dis-scale {sweep.name}"
    if existing := mlflow.get_experiment_by_name(name):
        return existing.experiment_id
    place = None
    if uri.startswith("sqlite:///"):
        database = Path(uri.removeprefix("sqlite:///"))
        database.parent.mkdir(parents=True, exist_ok=True)
        place = (database.parent / "mlflow-artifacts" / sweep.name).as_uri()
    return mlflow.create_experiment(name, artifact_location=place)


@dataclass
class Projection:
    """Sends one run's rows and files to MLflow, each row once; when MLflow is away, says so once and tries again later."""

    sweep: Folder
    model: str | None
    _sent: set[tuple[str, int]] = field(default_factory=set)
    _asked: set[str] = field(default_factory=set)
    _waiting: list[Row] = field(default_factory=list)
    away: bool = False

    def send(self, rows: Iterable[Row]) -> None:
        self._waiting += rows
        if self._waiting and self._try(lambda mlflow, run: self._send(mlflow, run, self._waiting)):
            self._waiting = []

    def send_file(self, path: Path, folder: str) -> None:
        self._try(lambda mlflow, run: mlflow.log_artifact(run, str(path), folder))

    def finish(self, status: str) -> None:
        """Ends the run as FINISHED or FAILED."""
        self._try(lambda mlflow, run: mlflow.set_terminated(run, status))

    def _try(self, action: Any) -> bool:
        try:
            ids = self.sweep.read_json(FILE)
            action(client(ids["uri"]), ids["models"][self.model] if self.model else ids["sweep"])
        except Exception as error:  # whatever MLflow raises: results are in storage, and it is only their mirror
            if not self.away:
                log.warning("MLflow cannot be reached, rows wait in storage: %s", " ".join(str(error).split())[:200])
            self.away = True
            return False
        self.away = False
        return True

    def _send(self, mlflow: Any, run: str, rows: list[Row]) -> None:
        from mlflow.entities import Metric

        for name in {row.name for row in rows} - self._asked:
            self._sent |= {(name, m.step) for m in mlflow.get_metric_history(run, name)}
            self._asked.add(name)
        fresh = [row for row in rows if (row.name, row.images) not in self._sent]
        for i in range(0, len(fresh), 1000):
            part = fresh[i : i + 1000]
            mlflow.log_batch(run, metrics=[Metric(r.name, r.value, int(r.time * 1000), r.images) for r in part])
            self._sent |= {(row.name, row.images) for row in part}
