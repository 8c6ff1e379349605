"""One writer at a time: a dead holder frees the lease, a live one keeps it, and a lost answer locks nobody out."""

import contextlib
import itertools
import math
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import ray

from dis_scale.process.errors import DisScaleError, Held, Preempted, StorageAway, UserError
from dis_scale.storage import lease
from dis_scale.storage.folder import Folder, open_folder
from tests.support import store_requests
from tests.support.clock_store import ClockFileSystem
from tests.support.faulty_gateway import Gateway
from tests.support.waiting import wait_until


def test_a_killed_holder_that_nobody_reaps_frees_the_lease_at_once(tmp_path: Path) -> None:
    """As in a container whose first process reaps no other: it is a zombie for ever."""
    code = "import sys; from dis_scale.storage import lease; from dis_scale.storage.folder import open_folder; "
    code += "held = lease.hold(open_folder(sys.argv[1])); held.__enter__(); print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "lease")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(Held), lease.hold(open_folder(tmp_path / "lease")):
            pass
        holder.kill()
        began_s = time.monotonic()
        while "Z" not in Path(f"/proc/{holder.pid}/stat").read_text().rpartition(")")[2]:
            time.sleep(0.01)
        with lease.hold(open_folder(tmp_path / "lease")) as held:
            assert held.number == 2
        assert time.monotonic() - began_s < lease.STILL_S


def test_heartbeats_come_again_as_soon_as_storage_does(tmp_path: Path, fast_beats: None) -> None:
    """After an outage of 25 s a patient folder pauses up to 38 s between two tries: others would take a live holder for dead."""
    folder = open_folder(tmp_path / "lease").patient
    away = ConnectionError("storage is away")
    with store_requests.failing(away, "write", ".beat", times=6) as failed, lease.hold(folder) as held:
        wait_until(lambda: len(failed) == 6)
        wait_until(lambda: folder.exists(f"{held.number:04d}.beat"), 3)


def test_a_holder_of_this_machine_is_refused_at_once(tmp_path: Path) -> None:
    folder = open_folder(tmp_path / "lease")
    lease.require_free_here(folder)
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as other:
        lease.Holder.here().changed(pid=other.pid, started=lease.began(other.pid)).write(folder, "0001")
        with pytest.raises(Held, match="which is alive"):
            lease.require_free_here(folder)
        other.kill()
    lease.require_free_here(folder)


def test_a_process_that_proc_hides_is_asked_by_its_heartbeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another user's, if /proc is mounted with hidepid: it is not listed, and may not be signalled."""
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    lease.Holder.here().changed(pid=ended.pid, started=1.0).write(open_folder(tmp_path), "0001")
    gone = lease.last_holding(open_folder(tmp_path))
    assert gone is not None
    assert gone.gone

    def refuse(pid: int, _: int) -> None:
        raise PermissionError(pid)

    monkeypatch.setattr("os.kill", refuse)
    hidden = lease.last_holding(open_folder(tmp_path))
    assert hidden is not None
    assert (hidden.alive, hidden.gone) == (None, False)


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
        with pytest.raises(Held, match=f"held by process {holder.pid} on .*, which is alive"), lease.hold(open_folder(tmp_path)):
            pass
        holder.kill()
    with lease.hold(open_folder(tmp_path)) as ours:
        assert ours.number == 2


ELSEWHERE = lease.Holder(host="elsewhere", boot="x", pid=7, started=0.0)
CONTAINER = lease.Holder.here().changed(processes="pid:[1]", pid=2**22 + 1)
"""Of this host, with process ids of its own."""


@pytest.mark.parametrize(
    ("holder", "named"),
    [(b"{", r"\? on \? \(its file is damaged\)"), (ELSEWHERE.to_bytes(), "7 on elsewhere"), (CONTAINER.to_bytes(), str(CONTAINER))],
    ids=["damaged file", "another machine", "container of this host"],
)
@pytest.mark.parametrize("beating", [True, False])
def test_a_holder_whose_process_is_not_listed_here_is_alive_while_its_heartbeat_changes(
    tmp_path: Path, short_leases: None, holder: bytes, named: str, beating: bool
) -> None:
    folder = open_folder(tmp_path)
    folder.write("0001", holder)
    if beating:
        with heartbeats(folder), pytest.raises(Held, match=f"held by process {named}, which is alive"), lease.hold(folder):
            pass
    else:
        with lease.hold(folder) as ours:
            assert ours.number == 2


def test_a_command_aside_leaves_the_reason_of_the_end(tmp_path: Path) -> None:
    """Of a sweep that failed, before a fork that succeeded and one that was refused; not before one that failed itself."""
    folder = open_folder(tmp_path)

    def end_by(error: Exception | None, *, aside: bool) -> str:
        with contextlib.suppress(DisScaleError, RuntimeError), lease.hold(folder, aside=aside):
            if error:
                raise error
        (holding,) = lease.last_holdings(folder, 1)
        assert holding.end
        return holding.end.why

    assert end_by(UserError("no such folder"), aside=True) == ""
    assert end_by(RuntimeError("lost"), aside=False) == "RuntimeError: lost"
    assert end_by(None, aside=True) == end_by(UserError("no such model"), aside=True) == "RuntimeError: lost"
    assert end_by(RuntimeError("broken"), aside=True) == "RuntimeError: broken"
    assert end_by(None, aside=False) == ""


def test_a_holder_is_alive_though_storage_answers_the_first_question_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that breaks is tried again after a minute: one reading would be left. And dead only after all of the time."""
    now_s, beats = [0.0], itertools.count()

    def sleep(seconds: float) -> None:
        now_s[0] += seconds

    def slow(_: lease.Holding) -> bytes:
        beat = next(beats)
        now_s[0] += 90.0 if beat == 0 else 0.1
        return str(beat // 8 if now_s[0] < died_s else -1).encode()

    died_s = math.inf
    monkeypatch.setattr(time, "monotonic", lambda: now_s[0])
    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(lease, "_heartbeat", slow)
    elsewhere = lease.Holding(Folder("unused"), 1, lease.Holder(), None, None)
    assert lease._living([elsewhere]) == [True]
    began_s = died_s = now_s[0]
    assert lease._living([elsewhere]) == [False]
    assert now_s[0] - began_s == pytest.approx(lease.STILL_S, abs=2)


@contextlib.contextmanager
def heartbeats(folder: Folder) -> Iterator[None]:
    """Send the first holder's heartbeats for the block."""
    ended = threading.Event()

    def send() -> None:
        for beat in itertools.count():
            folder.write("0001.beat", str(beat).encode())
            if ended.wait(0.05):
                return

    with ThreadPoolExecutor(1) as pool:
        pool.submit(send)
        try:
            yield
        finally:
            ended.set()


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.faults)])
def test_a_lost_answer_locks_nobody_out_of_its_own_lease(bucket: str, gateway: Gateway, count: int) -> None:
    """At random, the server creates without an answer, or answers that another request is in progress."""
    gateway.concerns = lambda request: request.method == "PUT" and not request.path.endswith(".end")
    gateway.faults = random.Random(0).choices(["lost", 409, None, None, None, None], k=10 * count)
    store = open_folder(bucket).patient  # six faults in a row are rare

    def take(number: int) -> int:
        with lease.hold(store / f"{number:04d}") as held:
            return held.number

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(take, range(count))) == {1}
    assert gateway.faults, "there was a choice for each request"


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


def test_a_holder_whose_clock_is_an_hour_late_works_by_the_stores_clock(
    fast_beats: None, clock_store: type[ClockFileSystem]
) -> None:
    """`status`, on a third machine, compares its heartbeats with the store's time."""
    clock_store.ahead_s = 3600.0
    folder = open_folder("clock://sweep")
    with lease.hold(folder):
        deadline_s = time.monotonic() + 10
        while not folder.exists("0001.beat") and time.monotonic() < deadline_s:
            time.sleep(0.01)
        holding = lease.last_holding(folder)
        assert holding
        assert holding.works(folder.time_s())


def test_a_holder_whose_clock_is_set_while_it_works_is_not_reported_dead(
    fast_beats: None, clock_store: type[ClockFileSystem], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store's clock is another machine's: it is not set."""
    began_s, began_at, set_by = time.monotonic(), time.time(), [0.0]
    monkeypatch.setattr(time, "time", lambda: began_at + time.monotonic() - began_s + set_by[0])
    folder = open_folder("clock://sweep")
    with lease.hold(folder):
        wait_until(lambda: folder.exists("0001.beat"))
        for set_by[0] in (-7200.0, 7200.0):
            until = int(folder.read("0001.beat").split()[0]) + 2
            wait_until(lambda: int(folder.read("0001.beat").split()[0]) >= until)  # noqa: B023
            holding = lease.last_holding(folder)
            assert holding
            assert holding.beat == pytest.approx(folder.time_s(), abs=5)


def test_storage_that_is_away_at_the_end_does_not_replace_the_error_on_its_way(
    tmp_path: Path, no_pauses: None, inject: Callable[[str], None]
) -> None:
    inject("fail at write path=.end times=1000")
    with pytest.raises(Preempted, match="saved"), lease.hold(open_folder(tmp_path / "preempted")):
        raise Preempted("saved")
    with (
        pytest.raises(StorageAway, match=r"0001.end: ConnectionError: fault: storage is away"),
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


def test_a_holder_sees_its_successor_where_it_looks_for_stop_requests(tmp_path: Path) -> None:
    """So the driver of a sweep whose heartbeats did not reach storage stops its jobs."""
    folder = open_folder(tmp_path)
    with lease.hold(folder) as held:
        assert not held.stop_requested()
        lease.Holder(host="another").create(folder, f"{held.number + 1:04d}")
        assert (held.stop_requested(), held.held()) == (True, False)
