"""Objects that s3fs reads by several ranges at once, as long as the shards and resume points of real sets, in front of faults."""

import contextlib
import hashlib
import random
import re
import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from dis_scale.data import maintenance
from dis_scale.data.latents import Latents
from dis_scale.process.errors import Damaged, StorageAway
from dis_scale.storage import retries, s3
from dis_scale.storage.folder import open_folder
from dis_scale.storage.manifest import Digest, read_verified
from dis_scale.sweep import PointName, Run
from dis_scale.training.resume import newest_point
from tests.support import small_latents
from tests.support.documents import put_resume_point
from tests.support.faulty_gateway import Fault, Gateway

LONG_BYTES = 40 * 10**6
FAULTS: list[list[Fault]] = [
    [500, 503],
    [(400, "SlowDown")],
    ["cut"],
    ["cut"] * 4,
    ["closed", "closed"],
    ["hangs"],
    [429] * 8,
    ["lost", 409],
]
LONGER_BYTES = 110 * 10**6
"""From 100 MiB on s3fs writes in several parts, of 50 MiB."""


@pytest.fixture(scope="module")
def data() -> bytes:
    return random.Random(0).randbytes(LONG_BYTES)


@pytest.fixture
def short_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "READ_TIMEOUT_S", 2)


@pytest.mark.parametrize("faults", FAULTS, ids=str)
def test_faults_of_a_long_object_are_retried(
    faults: list[Fault], data: bytes, bucket: str, gateway: Gateway, short_reads: None
) -> None:
    """A range that ends early is no answer of the store, whatever number the client gives it."""
    at = open_folder(bucket).patient
    at.write("long", data)
    gateway.concerns = lambda request: request.method == "GET" and request.path.endswith("long")
    gateway.faults = list(faults)
    assert hashlib.sha256(at.read("long")).digest() == hashlib.sha256(data).digest()
    assert not gateway.faults


@pytest.mark.parametrize("faults", [faults for faults in FAULTS if "cut" not in faults], ids=str)
def test_faults_while_a_long_object_is_written_are_retried(
    faults: list[Fault], data: bytes, bucket: str, gateway: Gateway, short_reads: None
) -> None:
    at = open_folder(bucket).patient
    gateway.concerns = lambda request: request.method == "PUT" and request.path.endswith("long")
    gateway.faults = list(faults)
    at.write("long", data)
    assert not gateway.faults
    assert hashlib.sha256(at.read("long")).digest() == hashlib.sha256(data).digest()


@pytest.mark.parametrize("request_of", ["uploads", "partNumber=2", "uploadId"])
@pytest.mark.parametrize("fault", [503, "closed", "lost"])
def test_a_fault_of_an_object_that_is_written_in_parts_leaves_no_hole(
    request_of: str, fault: Fault, data: bytes, bucket: str, gateway: Gateway
) -> None:
    """At the beginning, in the second part, and at any request of the upload: the end is the last one."""
    longer = (data * 3)[:LONGER_BYTES]
    at = open_folder(bucket).patient
    gateway.concerns = lambda request: "long?" in request.path and request_of in request.path and request.method != "GET"
    gateway.faults = [None, None, None, fault] if request_of == "uploadId" else [fault]
    at.write("long", longer)
    assert not gateway.faults
    assert hashlib.sha256(at.read("long")).digest() == hashlib.sha256(longer).digest()


def test_a_long_object_that_is_always_cut_is_away_and_not_damaged(data: bytes, bucket: str, gateway: Gateway) -> None:
    at = open_folder(bucket)
    at.write("long", data)
    gateway.concerns = lambda request: request.method == "GET"
    gateway.faults = ["cut"] * 100
    with pytest.raises(StorageAway, match="cannot read"):
        at.read("long")


def test_shards_and_resume_points_of_real_length_are_read_and_verified_through_faults(
    data: bytes, bucket: str, gateway: Gateway
) -> None:
    """As training reads them and `dis-scale data verify` does: nothing is called damaged."""
    at = open_folder(bucket)
    latents = small_latents.make(at / "latents", [10_000])
    assert latents.sizes()["000000.tar"] > 2**24, "s3fs reads it by several ranges"
    run = Run(at / "run")
    put_resume_point(run.resume_point(PointName(10, 1)), {"rank-00000.safetensors": data}, images=10)

    def through_faults(suffix: str) -> None:
        gateway.concerns = lambda request: request.method == "GET" and request.path.endswith(suffix)
        gateway.faults = ["cut"] * 3

    through_faults(".tar")
    moments, labels = small_latents.read(Latents(latents, 0), 0, 16)
    assert (len(moments), sorted(set(labels.tolist()) - set(range(small_latents.CLASSES)))) == (16, [])
    assert not gateway.faults
    through_faults(".tar")
    assert maintenance.verify(latents, fast=False, report=lambda *_: None) == {}
    assert not gateway.faults
    through_faults(".safetensors")
    said = list[str]()
    point = newest_point(run, said.append)
    assert (point is not None and point.manifest.images, said, gateway.faults) == (10, [], [])


def test_one_range_that_fails_is_read_again_alone(data: bytes, bucket: str, gateway: Gateway) -> None:
    """Of 448 ranges of 7 GB one in 200 that is answered "slow down" would fail nearly all tries to read all of it."""
    at, short = open_folder(bucket), data[:-1]
    at.write("weights", short)
    gateway.concerns = lambda request: request.method == "GET" and request.path.endswith("weights")
    gateway.faults, gateway.seen[:] = [503, (400, "SlowDown")], []
    assert read_verified(at, "weights", Digest.of(short)) == short
    assert [request.method for request in gateway.seen if request.path.endswith("weights")] == ["GET"] * (3 + 2)
    for other in (data, data[:1000], b""):
        at.write("weights", other)
        with pytest.raises(Damaged, match=f"damaged: {len(other)} bytes, its manifest says {LONG_BYTES - 1}"):
            read_verified(at, "weights", Digest.of(short))


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch, short_reads: None, no_pauses: None) -> Iterator[list[socket.socket]]:
    """A store that accepts connections and never answers, not even to `Expect: 100-continue`; the connections that came."""
    import s3fs

    came, server = list[socket.socket](), socket.create_server(("127.0.0.1", 0))

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                came.append(server.accept()[0])

    threading.Thread(target=accept, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    s3fs.S3FileSystem.clear_instance_cache()
    yield came
    s3fs.S3FileSystem.clear_instance_cache()
    server.close()
    for connection in came:
        connection.close()


@pytest.mark.parametrize("verb", ["read", "write", "create"])
def test_a_store_that_never_answers_is_away_in_time(
    verb: str, silent: list[socket.socket], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One connection a try: a lease's heartbeat must not end by one that froze. The wait is named."""
    monkeypatch.setattr(retries, "SLOW_S", 0.5)
    at = open_folder("s3://bucket/folder")
    calls: dict[str, Callable[[], object]] = {
        "read": lambda: at.read("x"),
        "write": lambda: at.write("x", b"1"),
        "create": lambda: at.create("x", b"1"),
    }
    with pytest.raises(StorageAway, match=rf"cannot {verb}"):
        calls[verb]()
    assert len(silent) == at.tries
    assert len(caplog.messages) == at.tries - 1
    assert re.match(rf"cannot {verb} .*; after \d+ s, try 1 of {at.tries}$", caplog.messages[0])
