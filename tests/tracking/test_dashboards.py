"""TensorBoard's and Weights & Biases' copies hold each row of storage once after any interruption, by their own packages."""

import json
import shutil
import struct
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dis_scale.process.errors import Preempted, StorageAway, UserError
from dis_scale.recipe import reading
from dis_scale.storage.folder import Folder, open_folder
from dis_scale.sweep import Sampled, Sweep, state
from dis_scale.sweep.documents import FloorMetrics
from dis_scale.tracking import dashboards
from dis_scale.tracking.dashboards import Copied, Copy, copying, folder_of
from dis_scale.tracking.rows import RowWriter
from tests.conftest import TINY
from tests.support.documents import put_metrics, put_published
from tests.support.store_requests import failing
from tests.support.waiting import wait_until


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    made = Sweep.below(open_folder(tmp_path), reading.load(TINY, ["tracking.also=[tensorboard]"]))
    made.save_recipe()
    return made


def train(sweep: Sweep, images: int) -> None:
    rows = RowWriter(sweep.run("dis").log, images)
    rows.add(images, {"loss": 1 / images})
    rows.settle()


def evaluate(sweep: Sweep, images: int, **more: float) -> None:
    put_published(sweep.run("dis").published_at(images), b"", images=images)
    put_metrics(sweep.evaluation(Sampled("dis", images)), {"fd_digits_80": 4.0} | more, time=7.25)


def store(sweep: Sweep) -> Folder:
    return open_folder(sweep.folder.url.partition("/sweeps/")[0])


def in_tensorboard(folder: Path) -> Counter[tuple[str, int, float, float]]:
    """Name, step, value and time of each event."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    events = [event for file in sorted(folder.glob("events*")) for event in EventFileLoader(str(file)).Load()]
    return Counter(
        (value.tag, event.step, round(value.tensor.float_val[0], 6), event.wall_time)
        for event in events for value in event.summary.value
    )  # fmt: skip


def update(copy: Copy) -> None:
    copy.open()
    copy.update()
    copy.ends.close()


def test_each_row_is_written_once(sweep: Sweep) -> None:
    folder, said = folder_of("tensorboard", store(sweep), sweep.folder.name), list[str]()
    FloorMetrics(images=60, values={"real": {"fd_digits_80": 1.0}}).write(sweep.floor)
    train(sweep, 80)
    with copying(sweep, store(sweep), said.append):
        train(sweep, 160)
    evaluate(sweep, 80)  # later than more training
    for _ in range(2):
        with copying(sweep, store(sweep), said.append):
            pass
    written = in_tensorboard(folder / "dis")
    assert {each[:3] for each in written} >= {
        ("loss", 80, 0.0125), ("loss", 160, 0.00625), ("fd_digits_80", 80, 4.0)
    }  # fmt: skip
    assert ("fd_digits_80", 80, 4.0, 7.25) in written
    assert [value for name, _, value, *_ in written if name.startswith("fd_")] == [4.0]
    assert set(written.values()) == {1}
    assert set(said) == {f"tracking tensorboard, in {folder}"}

    shutil.rmtree(folder)
    update(Copy("tensorboard", folder, sweep))
    assert in_tensorboard(folder / "dis") == written


def test_a_metric_that_is_added_later_is_copied(sweep: Sweep) -> None:
    folder = folder_of("tensorboard", store(sweep), sweep.folder.name)
    for more in ({}, {"kid_digits_80": 0.5}):
        evaluate(sweep, 80, **more)
        with copying(sweep, store(sweep), print):
            pass
    written = in_tensorboard(folder / "dis")
    assert written["kid_digits_80", 80, 0.5, 7.25] == written["fd_digits_80", 80, 4.0, 7.25] == 1


def test_a_variant_that_is_removed_sets_no_copy_aside(sweep: Sweep) -> None:
    folder = folder_of("tensorboard", store(sweep), sweep.folder.name)
    train(sweep, 80)
    put_metrics(sweep.evaluation(Sampled("dis", 80, "wide")), {"fd_digits_80": 5.0}, time=7.25)
    put_published(sweep.run("dis").published_at(80), b"", images=80)
    evaluate(sweep, 80)
    update(Copy("tensorboard", folder, sweep))
    less = sweep.recipe.model_copy(update={"evaluate": sweep.recipe.evaluate.model_copy(update={"variants": {}})})
    update(Copy("tensorboard", folder, replace(sweep, recipe=less)))
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert set(in_tensorboard(folder / "dis").values()) == {1}


def test_a_copy_whose_progress_is_damaged_is_set_aside(sweep: Sweep) -> None:
    folder = folder_of("tensorboard", store(sweep), sweep.folder.name)
    evaluate(sweep, 80)
    for _ in range(2):
        update(Copy("tensorboard", folder, sweep))
        assert in_tensorboard(folder / "dis")["fd_digits_80", 80, 4.0, 7.25] == 1
        (folder / Copied.NAME).write_text('{"id": "a1", "evaluations": ["dis at 80 images"]}')
    assert len(list(folder.parent.glob(f"{folder.name}.*"))) == 1


def test_storage_that_is_away_at_the_start_loses_no_progress(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of("tensorboard", store(sweep), sweep.folder.name)
    evaluate(sweep, 80)
    update(Copy("tensorboard", folder, sweep))
    away_once(monkeypatch)
    with copying(sweep, store(sweep), print):
        pass
    assert set(in_tensorboard(folder / "dis").values()) == {1}


def test_the_copy_of_a_deleted_sweep_is_set_aside(sweep: Sweep) -> None:
    """Another one of its name was never copied: all of its rows were taken to be there."""
    folder = folder_of("tensorboard", store(sweep), sweep.folder.name)
    for loss_at in (80, 40):
        train(sweep, loss_at)
        evaluate(sweep, 80)
        update(Copy("tensorboard", folder, sweep))
        sweep.folder.delete()
        sweep.save_recipe()
        update(Copy("tensorboard", folder, sweep))
    aside = sorted(folder.parent.glob(f"{folder.name}.*"))
    assert sorted({each[1] for old in aside for each in in_tensorboard(old / "dis") if each[0] == "loss"}) == [40, 80]
    assert not in_tensorboard(folder / "dis")


def test_a_copy_that_fails_misses_nothing_after_the_next_start(sweep: Sweep, tmp_path: Path) -> None:
    folder, said = folder_of("tensorboard", store(sweep), sweep.folder.name), list[str]()
    train(sweep, 80)
    with failing(PermissionError("read only"), "write", Copied.NAME), copying(sweep, store(sweep), said.append):
        pass
    assert not in_tensorboard(folder / "dis")
    assert "tracking tensorboard gets no more rows until the next start: StorageError" in said[-1]
    with copying(sweep, store(sweep), said.append):
        pass
    assert ("loss", 80) in {each[:2] for each in in_tensorboard(folder / "dis")}


def away_once(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let storage be away when it is first asked for evaluations; return the models that it is asked for from now on."""
    evaluated, asked = state.evaluated_counts, list[str]()

    def answer(of: Sweep, model: str, *more: Any) -> list[int]:
        asked.append(model)
        if len(asked) == 1:
            raise StorageAway("storage is away")
        return evaluated(of, model, *more)

    monkeypatch.setattr(state, "evaluated_counts", answer)
    return asked


def test_storage_that_is_away_for_a_while_ends_no_copy(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = away_once(monkeypatch)
    train(sweep, 80)
    evaluate(sweep, 80)
    folder, said = folder_of("tensorboard", store(sweep), sweep.folder.name), list[str]()
    with copying(sweep, store(sweep), said.append):
        wait_until(lambda: bool(asked))
    assert said == [f"tracking tensorboard, in {folder}"]
    assert ("fd_digits_80", 80, 4.0) in {each[:3] for each in in_tensorboard(folder / "dis")}


def test_a_stop_loses_no_row(sweep: Sweep) -> None:
    folder = folder_of("tensorboard", store(sweep), sweep.folder.name)
    with pytest.raises(Preempted), copying(sweep, store(sweep), print):
        wait_until((folder / "dis").exists)
        train(sweep, 80)
        raise Preempted("stopped")
    assert ("loss", 80) in {each[:2] for each in in_tensorboard(folder / "dis")}


def test_a_dashboard_that_hangs_does_not_delay_a_stop(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has to save, to mark its page and to tell Prometheus, within a minute."""
    answers = threading.Event()
    monkeypatch.setattr(dashboards, "ENDS_S", 0.1)
    monkeypatch.setattr(dashboards, "_tensorboard", lambda *_: lambda _: answers.wait(60))
    train(sweep, 80)
    began_s = time.monotonic()
    with pytest.raises(Preempted), copying(sweep, store(sweep), print):
        raise Preempted("stopped")
    answers.set()
    assert time.monotonic() - began_s < 30


def test_a_login_that_is_refused_later_ends_no_sweep(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that is asked for only when storage, which was away at the start, answers."""

    def refuse(*_: object) -> None:
        raise UserError("no login")

    evaluate(sweep, 80)
    folder, said = folder_of("tensorboard", store(sweep), sweep.folder.name), list[str]()
    update(Copy("tensorboard", folder, sweep))
    away_once(monkeypatch)
    monkeypatch.setattr(dashboards, "_tensorboard", refuse)
    with copying(sweep, store(sweep), said.append):
        pass
    assert "gets no more rows until the next start: UserError: no login" in said[-1]


def test_a_package_that_is_missing_is_named_before_anything_is_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        UserError,
        match=r"wandb is not installed: pip install 'dis-scale\[wandb\]', or in the repository pip install -e '\.\[wandb\]'",
    ):
        dashboards.require_installed(["tensorboard", "wandb"])


def in_wandb(folder: Path) -> list[dict[str, Any]]:
    """The history of all runs that were written offline: records in LevelDB's log format, each within one block of these few."""
    from wandb.proto import wandb_internal_pb2

    history = []
    for file in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        data, at = file.read_bytes(), 7
        while at + 7 < len(data):
            _, size, kind = struct.unpack_from("<IHB", data, at)
            assert kind == 1, "a record in one piece"
            if at + 7 + size > len(data):
                break  # it is being written
            record = wandb_internal_pb2.Record.FromString(data[at + 7 : at + 7 + size])
            if items := record.history.item:
                history.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items})
            at += 7 + size
    return history


def test_weights_and_biases_has_the_same_rows_by_images(sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    train(sweep, 160)
    update(Copy("wandb", tmp_path / "copy", sweep))
    evaluate(sweep, 80)
    update(Copy("wandb", tmp_path / "copy", sweep))
    # Its own process may write a moment longer.
    wait_until(lambda: any("fd_digits_80" in each for each in in_wandb(tmp_path / "copy")))
    history = in_wandb(tmp_path / "copy")
    assert [(each["images"], each["loss"]) for each in history if "loss" in each] == [(160, 1 / 160)]
    assert [(each["images"], each["fd_digits_80"]) for each in history if "fd_digits_80" in each] == [(80, 4.0)]
    ids = {file.stem for file in tmp_path.glob("copy/wandb/*/run-*-dis.wandb")}
    assert len(ids) == 1, "a run goes on under its own id"
