"""A real S3 server for drills and tests: Ceph's object gateway with one monitor and one OSD, in memory or on disk, on loopback.

    apt-get install --no-install-recommends radosgw ceph-mon ceph-osd

A start sometimes hangs on a busy machine; `start` and `resume` then try again.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Callable
from pathlib import Path

from dis_scale.process.machine import free_ports

KEY, SECRET = "testkey", "testsecret"
PROGRAMS = ("ceph-mon", "ceph-osd", "radosgw", "radosgw-admin", "monmaptool", "ceph")
CONFIG = """
[global]
fsid = {fsid}
mon host = v1:127.0.0.1:{monitor_port}
mon initial members = a
public addr = 127.0.0.1
auth cluster required = none
auth service required = none
auth client required = none
run dir = {folder}
admin socket = {folder}/$name.asok
log file = {folder}/$name.log
pid file = {folder}/$name.daemon
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pgp num = 4
osd pool default pg autoscale mode = off
mon allow pool size one = true
osd crush chooseleaf type = 0
ms bind ipv6 = false
paxos propose interval = 0.05
paxos min wait = 0.01
[mon.a]
mon data = {folder}/mon
mon data avail crit = 1
mon data avail warn = 2
mon max pg per osd = 1000
[osd.0]
osd data = {folder}/osd
osd objectstore = {kind}
osd memory target = 939524096
memstore device bytes = 4294967296
bluestore block size = 4294967296
osd class load list = *
osd class default list = *
osd class update on start = false
osd crush update on start = false
[client.rgw.a]
rgw frontends = beast endpoint=127.0.0.1:{port} tcp_nodelay=1
rgw data = {folder}/rgw
rgw enable usage log = false
rgw thread pool size = 32
"""


def missing() -> list[str]:
    """Return the programs that are not installed."""
    return [program for program in PROGRAMS if shutil.which(program) is None]


class ObjectStore:
    """A running gateway; `environment` is for its clients. On disk it starts in 7 s instead of 2, and survives `kill`."""

    def __init__(self, *, on_disk: bool = False) -> None:
        self.kind = "bluestore" if on_disk else "memstore"
        self.folder = Path(tempfile.mkdtemp(prefix="ceph-", dir="/tmp"))
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.port, self.patience = 0, 1

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def start(self) -> "ObjectStore":
        self._until_it_serves(self._start)
        return self

    def add_key(self, key: str) -> None:
        """Give the user one more key, with the same secret."""
        self._run("radosgw-admin", "key", "create", "--uid=test", f"--access-key={key}", f"--secret={SECRET}")

    def remove_key(self, key: str) -> None:
        self._run("radosgw-admin", "key", "rm", "--uid=test", f"--access-key={key}")

    def kill(self) -> None:
        """End all daemons at once, as a power cut does."""
        self._halt()

    def until_missed(self, tries: int) -> None:
        """Wait until programs have tried this often to reach the gateway, which is away."""
        with socket.create_server(("127.0.0.1", self.port)) as server:
            server.settimeout(120)
            for _ in range(tries):
                server.accept()[0].close()

    def resume(self) -> None:
        """Start again, at the same port with the same objects."""
        self._until_it_serves(self._start_again)

    def stop(self) -> None:
        self._halt()
        shutil.rmtree(self.folder, ignore_errors=True)

    def ended(self) -> str:
        """Return how a daemon ended that should run, with the end of its log; nothing if all run."""
        ends = [(name, code) for name, x in self._daemons.items() if (code := x.poll()) is not None]
        return "; ".join(
            f"{name} ended with {code}: {(self.folder / f'{name}.out').read_text(errors='replace')[-2000:]}" for name, code in ends
        )

    def _until_it_serves(self, begin: Callable[[], None], tries: int = 4) -> None:
        for self.patience in (2**n for n in range(tries)):  # a machine may be busy, or a port taken
            with contextlib.suppress(subprocess.SubprocessError, TimeoutError):
                return begin()
            self._halt()
        raise RuntimeError(f"Ceph's gateway would not start in {tries} tries; logs in {self.folder}")

    def _start_again(self) -> None:
        self._monitor()
        self._serve()

    def _start(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        for name in ("mon", "osd", "rgw"):
            (self.folder / name).mkdir(parents=True)
        self.port, monitor_port = free_ports(2)
        fsid, osd = str(uuid.uuid4()), str(uuid.uuid4())
        config = CONFIG.format(kind=self.kind, fsid=fsid, monitor_port=monitor_port, port=self.port, folder=self.folder)
        (self.folder / "ceph.conf").write_text(config)
        monmap = str(self.folder / "monmap")
        self._run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", f"[v1:127.0.0.1:{monitor_port}]", monmap)
        self._run("ceph-mon", "-i", "a", "--mkfs", "--monmap", monmap)
        self._monitor()
        self._run("ceph", "osd", "new", osd, "0")
        self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
        self._run("ceph", "osd", "crush", "add", "osd.0", "1.0", "root=default", "host=h")
        self._serve("user", "create", "--uid=test", "--display-name=test", f"--access-key={KEY}", f"--secret={SECRET}")

    def _monitor(self) -> None:
        self._daemon("ceph-mon", "-i", "a", "-f", "--setuser", "root")
        self._wait(lambda: self._answers("ceph", "mon", "stat"))

    def _serve(self, *administration: str) -> None:
        """Start the store and the gateway; run a `radosgw-admin` command between the two, if given."""
        self._daemon("ceph-osd", "-i", "0", "-f")
        self._wait(lambda: b" 1 up" in self._run("ceph", "osd", "stat"))
        if administration:
            self._run("radosgw-admin", *administration)
        self._daemon("radosgw", "-n", "client.rgw.a", "-f")
        self._wait(lambda: urllib.request.urlopen(f"http://127.0.0.1:{self.port}/", timeout=2 * self.patience).status == 200)

    def _command(self, program: str, *arguments: str) -> list[str]:
        configured = [] if program == "monmaptool" else ["-c", str(self.folder / "ceph.conf")]
        return [program, *configured, *arguments]

    def _run(self, program: str, *arguments: str) -> bytes:
        command = self._command(program, *arguments)
        return subprocess.run(command, check=True, capture_output=True, timeout=20 * self.patience).stdout

    def _answers(self, program: str, *arguments: str) -> bool:
        return subprocess.run(self._command(program, *arguments), capture_output=True, timeout=5 * self.patience).returncode == 0

    def _daemon(self, program: str, *arguments: str) -> None:
        with (self.folder / f"{program}.out").open("ab") as out:
            command = self._command(program, *arguments)
            self._daemons[program] = subprocess.Popen(command, stdout=out, stderr=out, stdin=subprocess.DEVNULL)

    def _wait(self, true: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 15 * self.patience
        while time.monotonic() < deadline and not self.ended():
            with contextlib.suppress(OSError, subprocess.SubprocessError):
                if true():
                    return
            time.sleep(0.1)
        raise TimeoutError(self.ended() or "not ready in time")

    def _halt(self) -> None:
        for daemon in reversed(self._daemons.values()):
            daemon.kill()
            daemon.wait()
        self._daemons = {}


def make_bucket(store: ObjectStore, name: str) -> str:
    """Create a bucket; return its URL."""
    import s3fs

    os.environ.update(store.environment)
    files = s3fs.S3FileSystem()
    deadline = time.monotonic() + 60
    while True:  # it answers before it can store anything
        try:
            if not files.exists(name):
                files.mkdir(name)
            files.pipe_file(f"{name}/ready", b"")
            files.rm_file(f"{name}/ready")
            return f"s3://{name}"
        except OSError:
            if time.monotonic() > deadline:
                raise
            files.invalidate_cache()
            time.sleep(0.5)
