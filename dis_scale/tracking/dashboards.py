"""Copies of a sweep's rows for TensorBoard or Weights & Biases, beside MLflow's: written by the sweep's command, from storage.

A copy is a folder on the command's machine. One file in it records the progress, so that each row is written once; if the folder is
lost, all rows are written again. The copy of a deleted sweep is renamed when another sweep of its name begins.
"""

import secrets
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from typing import Any, Literal

from pydantic import Field

from dis_scale.process.errors import Damaged, StorageAway, UserError
from dis_scale.process.threads import repeating
from dis_scale.storage.document import Document
from dis_scale.storage.folder import Folder, open_folder
from dis_scale.sweep import Sampled, Sweep, state
from dis_scale.tracking.mlflow_copy import rows_of_evaluation
from dis_scale.tracking.rows import Row, RowReader

Dashboard = Literal["tensorboard", "wandb"]
Send = Callable[[list[Row]], None]
EVERY_S = 60.0
WAIT_S = 60.0
"""Most seconds of waiting for Weights & Biases, at the start and at the end of each model's run."""
ENDS_S = 10.0
"""Most seconds for the last rows at a stop, which has other work to finish."""


def require_installed(dashboards: Iterable[Dashboard]) -> None:
    """UserError with the command that installs what is missing."""
    for name in dashboards:
        if find_spec(name) is None:
            raise UserError(
                f"tracking.also: {name} is not installed: pip install 'dis-scale[{name}]', or in the repository "
                f"pip install -e '.[{name}]' -c constraints.txt"
            )


@contextmanager
def copying(sweep: Sweep, root: Folder, say: Callable[[str], None]) -> Iterator[None]:
    """Write the copies of `tracking.also` during the block, and the last rows when it ends, also by a stop. A copy that fails does
    not stop the others. UserError at the start if Weights & Biases has no login."""
    with ExitStack() as ends:
        for name in sweep.recipe.tracking.also:
            ends.enter_context(_copying(Copy(name, folder_of(name, root, sweep.folder.name), sweep), say))
        yield


@contextmanager
def _copying(copy: "Copy", say: Callable[[str], None]) -> Iterator[None]:
    failed = False

    def attempt(action: Callable[[], object], at: Literal["start", "meanwhile", "end"] = "meanwhile") -> None:
        nonlocal failed
        try:
            if not failed:
                action()
        except StorageAway as error:
            if at == "end":
                say(f"tracking {copy.name} lacks the last rows until the next start: {error}")
        except Exception as error:  # whatever they raise: results are in storage, this is only their copy
            if at == "start" and isinstance(error, UserError):
                raise
            failed = True
            say(f"tracking {copy.name} gets no more rows until the next start: {type(error).__name__}: {error}")

    say(f"tracking {copy.name}, in {copy.folder}")
    attempt(copy.open, "start")
    try:
        with repeating(partial(attempt, copy.update), EVERY_S, copy.name, ENDS_S) as thread:
            yield
    except BaseException as error:
        if not isinstance(error, StorageAway) and not thread.is_alive():
            last = Thread(target=attempt, args=(copy.update,), daemon=True)
            last.start()
            last.join(ENDS_S)
        raise
    thread.join()
    attempt(partial(copy.update, again=True), "end")
    with suppress(Exception):
        copy.ends.close()


def folder_of(name: Dashboard, root: Folder, sweep: str) -> Path:
    """Return the local folder of a copy: next to the sweeps; below the home folder if they are in an object store."""
    return (root.local or Path.home() / "dis-scale") / name / sweep


class Copied(Document):
    """How far a copy has come."""

    NAME = "copied.json"
    id: str = Field(default_factory=lambda: secrets.token_hex(4))
    images: dict[str, dict[str, int]] = Field(default_factory=dict)
    """Images seen of the last copied row of training, by model and name of the row."""
    evaluations: dict[str, dict[str, list[str]]] = Field(default_factory=dict)
    """Names of the copied values, by model and evaluation. Metrics may be added to an evaluation later."""


@dataclass
class Copy:
    """One dashboard's copy of a sweep, a run for each model. A row is written twice only if the command is killed meanwhile."""

    name: Dashboard
    folder: Path
    sweep: Sweep
    _copied: Copied = field(default_factory=Copied)
    _readers: dict[str, RowReader] = field(default_factory=dict)
    _sends: dict[str, Send] = field(default_factory=dict)
    ends: ExitStack = field(default_factory=ExitStack)
    """To be closed last: this writes the remaining rows."""

    def open(self) -> None:
        """Open the existing copy, or begin a new one. UserError if Weights & Biases has no login."""
        earlier = Copied.find_intact(open_folder(self.folder))
        if earlier and not self._lost(earlier):
            self._copied = earlier
        elif (self.folder / Copied.NAME).exists():
            self.folder.rename(self.folder.with_name(f"{self.folder.name}.{(earlier or Copied()).id}"))
        self.folder.mkdir(parents=True, exist_ok=True)
        self._copied.write(open_folder(self.folder))
        for model in self.sweep.recipe.models:
            self._sends[model] = (
                _tensorboard(self.folder / model, self.ends)
                if self.name == "tensorboard"
                else _wandb(self.folder, self.sweep.folder.name, model, f"{self._copied.id}-{model}", self.ends)
            )
            self._readers[model] = RowReader(self.sweep.run(model).log, self._copied.images.setdefault(model, {}))

    def _lost(self, earlier: Copied) -> bool:
        """Return whether storage has none of the copied rows: the sweep was deleted, and this is another one of its name."""
        values = earlier.evaluations
        copied = [model for model in self.sweep.recipe.models if earlier.images.get(model) or values.get(model)]
        return bool(copied) and not any(
            self.sweep.run(model).log.list() or values.get(model, {}).keys() & set(map(str, state.measured(self.sweep, model)))
            for model in copied
        )

    def update(self, *, again: bool = False) -> None:
        """Copy the rows and evaluations that the copy lacks; with `again`, also values added to copied evaluations."""
        if not self._sends:  # storage was away
            self.open()
        for model, send in self._sends.items():
            for rows in self._readers[model].batches():
                send(rows)
            copied = self._copied.evaluations.setdefault(model, {})
            for sampled in state.measured(self.sweep, model) if again else self._new(model, copied):
                with suppress(Damaged):  # `verify` and the report name it
                    known, values = copied.get(str(sampled), []), rows_of_evaluation(self.sweep, sampled)
                    send([row for row in values if row.name not in known])
                    copied[str(sampled)] = sorted(row.name for row in values)
        self._copied.write(open_folder(self.folder))

    def _new(self, model: str, copied: Container[str]) -> Iterator[Sampled]:
        """Yield the model's evaluations that are not copied, without ablations: each pass would query thousands of them."""
        for variant in self.sweep.recipe.evaluate.samplings:
            for images in state.evaluated_counts(self.sweep, model, variant, lambda sampled: str(sampled) in copied):
                yield Sampled(model, images, variant)


def _tensorboard(folder: Path, ends: ExitStack) -> Send:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    writer = EventFileWriter(str(folder))
    ends.callback(writer.close)

    def send(rows: list[Row]) -> None:
        for row in rows:
            value = Summary.Value(tag=row.name, simple_value=row.value)
            writer.add_event(Event(wall_time=row.time, step=row.images, summary=Summary(value=[value])))
        writer.flush()

    return send


def _wandb(folder: Path, sweep: str, model: str, run_id: str, ends: ExitStack) -> Send:
    """Open a run of Weights & Biases. Its axis is `images`: W&B's own step must rise, and evaluations come after later rows."""
    import wandb

    try:
        run: Any = wandb.init(
            project="dis-scale", group=sweep, name=model, id=run_id, resume="allow", dir=folder, reinit="create_new",
            settings=wandb.Settings(console="off", silent=True, init_timeout=WAIT_S, finish_timeout=WAIT_S),
        )  # fmt: skip
    except wandb.errors.UsageError as error:
        raise UserError(
            f"tracking.also: wandb: {' '.join(str(error).split())}; "
            f"or set WANDB_MODE=offline, and run wandb sync {folder}/wandb/* later"
        ) from error
    ends.callback(run.finish)
    run.define_metric("images")
    run.define_metric("*", step_metric="images")

    def send(rows: list[Row]) -> None:
        for row in rows:
            run.log({row.name: row.value, "images": row.images, "time": row.time})

    return send
