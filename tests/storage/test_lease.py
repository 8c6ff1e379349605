"""One writer at a time: a dead holder frees the lease, a live one keeps it, and a lost answer locks nobody out."""

import json
import os
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray

from dis_scale.process import faults
from dis_scale.process.errors import DisScaleError, Held, Preempted, StorageAway
from dis_scale.storage import lease
from dis_scale.storage.folder import open_folder
from tests.support.faulty_gateway import Gateway, Request


def test_attempts_are_numbered_and_only_the_last_holds_the_lease(store_url: str) -> None:
    folder = open_folder(store_url) / "lease"
    with lease.hold(folder) as first:
        assert first.held()
    with lease.hold(folder) as second:
        assert (first.number, second.number) == (1, 2)
        assert second.held()
        assert not first.held()


def test_a_live_holder_is_named(tmp_path: Path) -> None:
    script = (
        "import sys; from dis_scale.storage import lease; from dis_scale.storage.folder import open_folder\n"
        "with lease.hold(open_folder(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with (
            pytest.raises(Held, match=f"held by process {holder.pid} on .*, which is alive"),
            lease.hold(open_folder(tmp_path)),
        ):
            pass
        holder.kill()
    with lease.hold(open_folder(tmp_path)) as ours:
        assert ours.number == 2


@pytest.mark.parametrize("damage", [b"", b"{", b"null", b'{"host": "elsewhere"}'])
@pytest.mark.parametrize("beating", [True, False])
def test_a_holder_whose_file_is_damaged_is_known_by_its_heartbeat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: bytes, beating: bool
) -> None:
    folder, beats = open_folder(tmp_path), iter(range(100))
    folder.write("0001", damage)
    monkeypatch.setattr(lease, "STILL_S", 0.2)
    monkeypatch.setattr(lease, "_heartbeat", lambda *_: str(next(beats) if beating else 0).encode())
    monkeypatch.setattr(lease.time, "sleep", lambda _: None)
    if beating:
        with (
            pytest.raises(Held, match=r"held by process \? on \? \(its file is damaged\), which is alive"),
            lease.hold(folder),
        ):
            pass
    else:
        with lease.hold(folder) as ours:
            assert ours.number == 2


@pytest.mark.parametrize("beating", [True, False])
def test_a_holder_on_another_machine_is_alive_while_its_heartbeat_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beating: bool
) -> None:
    folder = open_folder(tmp_path)
    folder.create("0001", json.dumps({"host": "elsewhere", "boot": "x", "pid": os.getpid(), "started": 0.0}).encode())
    monkeypatch.setattr(lease, "STILL_S", 0.2)
    beats = iter(range(100))
    monkeypatch.setattr(lease, "_heartbeat", lambda *_: str(next(beats) if beating else 0).encode())
    monkeypatch.setattr(lease.time, "sleep", lambda _: None)
    if beating:
        with pytest.raises(Held, match="held by process"), lease.hold(folder):
            pass
    else:
        with lease.hold(folder) as ours:
            assert ours.number == 2


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.faults)])
def test_a_lost_answer_locks_nobody_out_of_its_own_lease(
    bucket: str, gateway: Gateway, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """At random, the server creates without an answer, or answers that another request is in progress."""
    faults = random.Random(0)

    def fault_for(request: Request) -> int | str | None:
        creates = request.method == "PUT" and not request.path.endswith(".end")
        return faults.choice(["lost", 409, None, None, None, None]) if creates else None

    monkeypatch.setattr(gateway, "fault_for", fault_for)
    store = open_folder(bucket).patient  # six faults in a row are rare

    def take(number: int) -> int:
        with lease.hold(store / f"{number:04d}") as held:
            return held.number

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(take, range(count))) == {1}


def test_a_lease_that_another_took_first_is_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = open_folder(tmp_path)
    monkeypatch.setattr(lease, "last_holding", lambda _: None)
    lease.Holder(host="elsewhere", pid=7, nonce="theirs").write(folder, "0001")
    with pytest.raises(Held, match="process 7 on elsewhere took the lease first"), lease.hold(folder):
        pass


def test_the_reason_of_its_end_is_one_line_without_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an error of Ray it is what the worker raised."""
    monkeypatch.setenv("STORE_PASSWORD", "hunter2hunter2")
    error = ray.exceptions.RayTaskError("train", "a long\ntraceback", DisScaleError("no such table: hunter2hunter2"))
    with pytest.raises(ray.exceptions.RayTaskError), lease.hold(open_folder(tmp_path)):
        raise error
    holding = lease.last_holding(open_folder(tmp_path))
    assert holding
    assert holding.end
    assert holding.end.why == "DisScaleError: no such table: ***"


@pytest.mark.parametrize("damage", [b"", b"{", b"null", b"{}", b'{"at": "x"}'])
@pytest.mark.parametrize("name", ["0001", "0001.end", "0001.beat"])
def test_a_damaged_file_hides_no_holder(tmp_path: Path, name: str, damage: bytes) -> None:
    folder = open_folder(tmp_path)
    lease.Holder(host="elsewhere", boot="x", pid=7, started=0.0, at=time.time()).write(folder, "0001")
    folder.write(name, damage)
    holding = lease.last_holding(folder)
    assert holding
    assert (holding.end is not None) == (name == "0001.end")
    assert (lease.request_stop(folder) is None) == (name == "0001.end")


def test_a_stop_request_reaches_a_holder_whose_clock_differs(tmp_path: Path) -> None:
    folder = open_folder(tmp_path)
    lease.Holder(host="elsewhere", boot="x", pid=7, started=0.0, at=time.time() - 600).write(folder, "0001")
    assert lease.request_stop(folder)
    assert folder.exists("0001.stop")


def test_storage_that_is_away_at_the_end_does_not_replace_the_error_on_its_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(verb: str, path: str = "", **_: Any) -> None:
        if path.endswith(".end"):
            raise ConnectionError("no answer")

    monkeypatch.setattr("dis_scale.storage.folder._FIRST_PAUSE_S", 0.0)
    monkeypatch.setattr(faults, "at", away)
    with pytest.raises(Preempted, match="saved"), lease.hold(open_folder(tmp_path / "preempted")):
        raise Preempted("saved")
    with (
        pytest.raises(StorageAway, match=r"0001.end: ConnectionError: no answer"),
        lease.hold(open_folder(tmp_path / "finished")),
    ):
        pass


def test_a_stop_request_is_for_one_live_holder(tmp_path: Path) -> None:
    folder = open_folder(tmp_path)
    assert lease.request_stop(folder) is None
    with lease.hold(folder) as ours:
        assert not ours.stop_requested()
        asked = lease.request_stop(folder)
        assert (asked and asked.holder.pid, ours.stop_requested()) == (os.getpid(), True)
    assert lease.request_stop(folder) is None, "it has ended"
    with lease.hold(folder) as next_one:
        assert not next_one.stop_requested()


def test_a_damaged_lease_is_free_once_its_heartbeat_has_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = open_folder(tmp_path)
    folder.write("0001", b"{")
    monkeypatch.setattr(lease, "STILL_S", 0.0)
    with lease.hold(folder) as ours:
        assert ours.number == 2


def test_a_container_of_the_same_host_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process ids are its own: only the heartbeat shows whether its process is alive."""
    folder = open_folder(tmp_path)
    lease.Holder.here().changed(processes="pid:[1]", pid=2**22 + 1).write(folder, "0001")
    beats = iter(range(100))
    monkeypatch.setattr(lease, "_heartbeat", lambda *_: str(next(beats)).encode())
    monkeypatch.setattr(lease.time, "sleep", lambda _: None)
    with pytest.raises(Held, match="held by process"), lease.hold(folder):
        pass
