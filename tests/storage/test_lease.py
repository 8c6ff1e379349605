"""One writer a run: the dead free it at once, the living keep it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dis_scale.errors import Held
from dis_scale.storage import lease
from dis_scale.storage.folder import open_folder


def test_attempts_are_numbered_and_only_the_last_holds(store_url: str) -> None:
    place = open_folder(store_url) / "lease"
    with lease.hold(place) as first:
        assert first.held()
    with lease.hold(place) as second:
        assert (first.number, second.number) == (1, 2)
        assert second.held()
        assert not first.held()


def test_a_living_holder_is_named(tmp_path: Path) -> None:
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
def test_a_holder_elsewhere_is_alive_while_its_beat_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beating: bool
) -> None:
    place = open_folder(tmp_path)
    place.create("0001", json.dumps({"host": "elsewhere", "boot": "x", "pid": os.getpid(), "started": 0.0}).encode())
    monkeypatch.setattr(lease, "STILL_S", 0.2)
    beats = iter(range(100))
    monkeypatch.setattr(lease, "_heartbeat", lambda *_: str(next(beats) if beating else 0).encode())
    monkeypatch.setattr(lease.time, "sleep", lambda _: None)
    if beating:
        with pytest.raises(Held, match="held by process"), lease.hold(place):
            pass
    else:
        with lease.hold(place) as ours:
            assert ours.number == 2
