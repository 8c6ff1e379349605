"""Fixtures that many tests share: a tiny recipe of real parts, and a real object store where the machine has one."""

import contextlib
import ctypes
import fcntl
import os
import signal
import sys
import tempfile
import uuid
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from dis_scale.process import faults
from dis_scale.recipe import Recipe, reading
from dis_scale.storage import lease
from ops.drills import object_store
from tests.support import faulty_gateway, wheels
from tests.support.clock_store import ClockFileSystem
from tests.support.faulty_gateway import Gateway
from tests.support.flaky_store import FlakyFileSystem

# Processes that tests start import what others have compiled: without bytecode, PyTorch, DeepSpeed and Ray take five seconds more
# of CPU in each.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# Tests may run in a job of Slurm; a sweep would take it for its own.
os.environ.pop("SLURM_JOB_ID", None)

# As for jobs: threads of OpenMP that spin while they wait make everything many times slower on a machine that others use, too.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# A shell lets what it starts with `&` ignore Ctrl-C, and so would the programs whose end by it is tested.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # as after nohup
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# The default, 200 ms for an example, fails where other processes use the machine.
settings.register_profile("shared machine", deadline=None)
settings.load_profile("shared machine")

TINY = Path(__file__).parent / "support/tiny.yaml"
Scanning = Callable[[str, Callable[[str], Any]], Any]
ANOTHER_STORE = os.environ.get("TEST_STORE_URL", "")
"""A store beside the disk and Ceph in which to run the tests of storage, for example `az://container` in Azurite."""


def pytest_report_header() -> str:
    """The first lines say which tests will be skipped, and why."""
    missing = object_store.missing()
    if missing:
        return (
            f"object storage: SKIPPED, this machine lacks {', '.join(missing)} "
            "(apt-get install --no-install-recommends radosgw ceph-mon ceph-osd)"
        )
    return "object storage: tested against Ceph's gateway"


LONGEST = (
    "faults/test_drills.py", "e2e/test_again_is_safe.py", "faults/test_sweeps.py", "e2e/test_slurm.py", "e2e/test_two_sweeps.py",
    "e2e/test_cluster.py", "e2e/test_cut_link.py", "e2e/test_bad_node.py", "faults/test_stages.py",
    "vae/test_small.py", "scan/test_scan_triton.py", "e2e/test_brought_family.py", "e2e/test_cluster_files.py",
)  # fmt: skip
"""Files of minutes in `make faults` or `make slow`, each of which one process runs: begun last, it would let the others wait."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run what takes longest first, then other complete sweeps and kernels, and short tests at the end."""

    def place(item: pytest.Item) -> int:
        folder = item.path.parent.name
        if (file := f"{folder}/{item.path.name}") in LONGEST:
            return LONGEST.index(file)
        return len(LONGEST) + (folder not in ("e2e", "faults", "vae", "scan"))

    items.sort(key=place)


@pytest.fixture(scope="module", autouse=True)
def give_memory_back() -> Iterator[None]:
    """glibc keeps what was freed: three processes of tests grow to 16 GiB, of which 4 are in use, and a machine stalls."""
    yield
    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture
def tiny() -> Recipe:
    """The smallest sweep: one DiS and one DiT of a few thousand parameters, a few steps each."""
    return reading.load(TINY)


@pytest.fixture(scope="session")
def ceph() -> Iterator[object_store.ObjectStore]:
    if object_store.missing():
        pytest.skip("Ceph's gateway is not installed")
    before = dict(os.environ)
    store = object_store.ObjectStore().start()
    os.environ.update(store.environment)
    yield store
    store.stop()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def bucket(ceph: object_store.ObjectStore) -> str:
    """A fresh bucket's URL. A gateway that ended is started again, and the end of its log is among the warnings."""
    if ended := ceph.ended():
        warnings.warn(f"Ceph is started again: {ended}", stacklevel=1)
        ceph.stop()
        os.environ.update(ceph.start().environment)
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()  # those of the port before
    return object_store.make_bucket(ceph, f"bucket-{uuid.uuid4().hex[:12]}")


@pytest.fixture
def whole_machine() -> Iterator[None]:
    """Run alone of all tests that ask for this, in any worker: names of networks and limits of memory are the machine's."""
    with (Path(tempfile.gettempdir()) / "dis-scale-whole-machine.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Storage retries at once."""
    monkeypatch.setattr("dis_scale.storage.retries._FIRST_PAUSE_S", 0.0)


@pytest.fixture
def fast_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Holders of leases show in each 20 ms that they live."""
    monkeypatch.setattr(lease, "BEAT_S", 0.02)


@pytest.fixture
def short_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Holders of leases without a sign of life are dead after half a second."""
    monkeypatch.setattr(lease, "STILL_S", 0.5)


@pytest.fixture
def same_priority(monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluator's process gives way to others; this one has further tests to run."""
    monkeypatch.setattr("os.nice", lambda _: 0)


@pytest.fixture
def scanning(monkeypatch: pytest.MonkeyPatch) -> Callable[[Scanning], None]:
    """Replace how a disk lists its folders: by a function of a folder's path and of the real listing."""
    real = os.scandir
    return lambda by: monkeypatch.setattr(os, "scandir", lambda path: by(str(path), real))


@pytest.fixture
def clock_store() -> Iterator[type[ClockFileSystem]]:
    """Storage at `clock://`, whose clock a test sets."""
    yield ClockFileSystem
    ClockFileSystem.store.clear()
    ClockFileSystem.ahead_s = 0.0


@pytest.fixture
def flaky_store() -> Iterator[type[FlakyFileSystem]]:
    """Storage at `flaky://`, in which a test sets faults and latency."""
    yield FlakyFileSystem
    FlakyFileSystem.faults, FlakyFileSystem.latency_s = [], 0.0


@pytest.fixture
def inject(tmp_path: Path) -> Iterator[Callable[[str], None]]:
    """Inject the faults of a plan into this process."""

    def use(plan: str) -> None:
        (tmp_path / "faults").write_text(plan)
        faults.use(tmp_path / "faults")

    yield use
    faults.use(None)


@pytest.fixture
def gateway(ceph: object_store.ObjectStore, no_pauses: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gateway]:
    """All requests of this test to the object store go through it."""
    import s3fs

    with faulty_gateway.before(ceph.port) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        s3fs.S3FileSystem.clear_instance_cache()
        yield server
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(params=["disk", "s3", *([ANOTHER_STORE] if ANOTHER_STORE else [])])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A place on disk and one in the object store: what holds for one holds for the other."""
    if request.param == "s3":
        return str(request.getfixturevalue("bucket"))
    return str(tmp_path) if request.param == "disk" else f"{ANOTHER_STORE}/{uuid.uuid4().hex[:12]}"


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wheels.build(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The python of an environment with the wheel, outside of this repository."""
    return wheels.install(wheel, tmp_path_factory.mktemp("installed"))
