"""One writer at a time: a dead holder frees the lease, a live one keeps it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dis_scale.errors import Held
from dis_scale.storage import lease
from dis_scale.storage.folder import open_folder


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
