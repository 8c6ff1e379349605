"""Object storage on disk and in Ceph: atomic writes, one winner of many creators, errors that name object and cause."""

import errno
import itertools
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from botocore.retries import standard
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractFileSystem

from dis_scale.process.context import Context
from dis_scale.process.errors import Damaged, StorageAway, StorageError, UserError
from dis_scale.storage.document import Document
from dis_scale.storage.folder import locate, open_folder
from ops.drills import object_store
from tests.conftest import TINY
from tests.support.commands import invoke
from tests.support.faulty_gateway import Gateway
from tests.support.flaky_store import FlakyFileSystem


def test_objects_are_written_read_listed_and_deleted(store_url: str) -> None:
    root = open_folder(store_url) / "root"
    root.write("a/b/c", b"one")
    root.write("a/d", b"two")
    root.write("a/d", b"three")
    assert (root.read("a/b/c"), root.read("a/d")) == (b"one", b"three")
    assert (root.list(), root.list("a"), (root / "a").list(), root.list("none")) == (["a"], ["b", "d"], ["b", "d"], [])
    assert root.exists("a/d")
    assert not root.exists("a/e")
    root.delete("a")
    root.delete("a")
    assert root.list() == []


def test_the_markers_of_folders_that_consoles_make_are_no_files(bucket: str) -> None:
    root = open_folder(bucket)
    fs, name = fsspec.url_to_fs(bucket)
    for marker in ("a/", "a/b/"):
        fs.call_s3("put_object", Bucket=name, Key=marker, Body=b"")
    root.write("a/c", b"one")
    assert (root.list("a"), list((root / "a").files()), root.folders("a"), list(root.walk())) == (["b", "c"], ["c"], ["b"], ["a/c"])


def test_a_file_in_the_root_is_found_there_and_a_bucket_is_no_file() -> None:
    assert [str(part) for part in locate("/weights.pt")] == ["/", "weights.pt"]
    with pytest.raises(UserError, match="s3://bucket: expected a file in it, got the name of a bucket or a server"):
        locate("s3://bucket")


@pytest.mark.parametrize("name", ["run[12]", "run?", "run*"])
def test_a_deletion_takes_no_name_for_a_pattern(name: str, bucket: str) -> None:
    for root in (open_folder(f"{bucket}/{name}"), other := open_folder(f"{bucket}/run1")):
        root.write("a/b", b"one")
        root.write("a/c[d]", b"two")
    for path in ("a/b", "a/c[d]", "none"):
        open_folder(f"{bucket}/{name}").delete(path)
    assert (open_folder(f"{bucket}/{name}").list("a"), other.list("a")) == ([], ["b", "c[d]"])
    open_folder(f"{bucket}/{name}").delete()
    assert other.tree() == {"a/b": 3, "a/c[d]": 3}


class LooksFirst(MemoryFileSystem):  # type: ignore[misc]
    """As fsspec's clients of SFTP, SMB and HDFS: `create` is fsspec's own, which looks first."""

    protocol = "looks-first"
    pipe_file = AbstractFileSystem.pipe_file

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(MemoryFileSystem._strip_protocol(path.replace("looks-first://", "memory://")))


def test_a_store_where_two_may_create_one_object_is_refused() -> None:
    fsspec.register_implementation("looks-first", LooksFirst, clobber=True)
    with pytest.raises(UserError, match="storage looks-first://root cannot create an object only if absent"):
        open_folder("looks-first://root").require_usable()


def test_a_missing_object_is_a_file_not_found(store_url: str) -> None:
    with pytest.raises(FileNotFoundError):
        open_folder(store_url).read("nothing")


def test_no_more_is_read_than_was_asked_for(store_url: str) -> None:
    root = open_folder(store_url)
    for size in (0, 1, 99, 100, 101, 5000):
        root.write("a/b", data := os.urandom(size))
        assert root.read_up_to("a/b", 100) == data[:101]
    with pytest.raises(FileNotFoundError):
        root.read_up_to("a/none", 100)


class Text(Document):
    NAME: ClassVar[str] = "text.json"
    text: str


def test_a_huge_document_is_not_read(tmp_path: Path) -> None:
    """A file of a tebibyte without content: reading it would need as much memory."""
    with (tmp_path / Text.NAME).open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(Damaged, match=r"text.json: damaged: over 268,435,456 bytes, which no document of a sweep has"):
        Text.read(open_folder(tmp_path))


def test_one_of_many_creators_wins(store_url: str) -> None:
    root = open_folder(store_url)
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda i: root.create("lease", str(i).encode()), range(8)))
    assert sum(won) == 1
    assert root.read("lease") == str(won.index(True)).encode()


def test_a_usable_store_leaves_no_trace_of_the_probe(store_url: str) -> None:
    root = open_folder(store_url) / "new"
    root.require_usable()
    assert root.list() == []


def test_a_probe_whose_first_answer_is_lost_is_no_refusal(bucket: str, gateway: Gateway, no_pauses: None) -> None:
    """The retry finds what the first request has written."""
    gateway.concerns = lambda request: request.method == "PUT"
    gateway.faults = ["lost"]
    open_folder(bucket).require_usable()
    assert not gateway.faults


def test_a_file_system_without_hard_links_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("os.link", link)
    with pytest.raises(UserError, match=f"storage {tmp_path} cannot be used: {tmp_path}.* has no hard links"):
        open_folder(tmp_path).require_usable()


def test_a_written_file_and_its_name_are_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = list[str]()
    monkeypatch.setattr("os.fsync", lambda descriptor: synced.append(str(Path(f"/proc/self/fd/{descriptor}").readlink())))
    root = open_folder(tmp_path)
    root.write("a", b"")
    root.create("b", b"")
    files, folders = synced[::2], synced[1::2]
    assert [Path(file).name[0] for file in files] == ["a", "b"]
    assert folders == [str(tmp_path)] * 2
    synced.clear()
    root.write("new/folder/c", b"")
    assert {str(tmp_path), str(tmp_path / "new"), str(tmp_path / "new/folder")} < set(synced)


def test_a_folder_that_cannot_be_created_is_a_user_error() -> None:
    with pytest.raises(UserError, match="storage /proc/none cannot be used: there is no such bucket or folder"):
        open_folder("/proc/none").require_usable()


def test_an_unknown_protocol_is_named() -> None:
    with pytest.raises(UserError, match="Protocol not known: nowhere"):
        open_folder("nowhere://x").require_usable()


def test_a_wrong_key_is_named_and_not_retried(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(UserError, match=f"storage {bucket} cannot be used: .*permission denied: check the key"):
        open_folder(bucket).require_usable()
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize("host", ["127.0.0.1:9", "no-such-host.invalid:9"], ids=["refused", "no name"])
def test_a_server_that_does_not_answer_is_away_and_a_missing_key_is_a_mistake(
    host: str, monkeypatch: pytest.MonkeyPatch, no_pauses: None, tmp_path: Path
) -> None:
    import s3fs

    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}", "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"), "AWS_EC2_METADATA_DISABLED": "true",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    root = open_folder("s3://bucket/root")
    with pytest.raises(StorageAway, match="Could not connect to the endpoint URL"):
        root.require_usable()
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(UserError, match=r"cannot be used: .*no credentials: set AWS_ACCESS_KEY_ID"):
        root.require_usable()
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_rotated_key_is_read_again_and_an_expired_one_is_named(
    bucket: str, ceph: object_store.ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The key is in a file, as a mounted secret is. The old one is taken away before the new one is written."""
    import s3fs

    keys = tmp_path / "credentials"

    def write(key: str) -> None:
        keys.write_text(f"[default]\naws_access_key_id={key}\naws_secret_access_key={object_store.SECRET}\n")

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(keys))
    s3fs.S3FileSystem.clear_instance_cache()
    ceph.add_key("rotatedkey")
    write("rotatedkey")
    root = open_folder(bucket) / "rotated"
    root.write("a", b"one")
    ceph.remove_key("rotatedkey")
    with pytest.raises(StorageAway, match=r"cannot write .*: refused, but allowed \d+ s ago: the key has expired"):
        root.write("a", b"two")
    write(object_store.KEY)
    root.write("a", b"three")
    assert root.read("a") == b"three"
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_job_whose_key_does_not_come_in_time_tries_again(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The service that hands out keys to pods may be away while an attempt begins; the sweep's start had one."""
    import s3fs

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    s3fs.S3FileSystem.clear_instance_cache()
    root = open_folder(bucket) / "late"
    with pytest.raises(StorageError, match="no credentials"):
        root.list()
    for name, value in Context("s", "train").variable().items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StorageAway, match=r"refused, but allowed at the sweep's start: .* no credentials"):
        root.list()
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_missing_bucket_is_named(ceph: object) -> None:
    with pytest.raises(UserError, match="there is no such bucket or folder"):
        open_folder("s3://no-such-bucket-here/x").require_usable()


def test_a_full_disk_is_reported_and_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        StorageError, match=f"cannot write {tmp_path}/x: no space left on the device: free some, then run the same command again"
    ):
        open_folder(tmp_path).write("x", b"data")
    assert list(tmp_path.iterdir()) == []


def test_temporary_failures_are_retried(tmp_path: Path, no_pauses: None, inject: Callable[[str], None]) -> None:
    root = open_folder(tmp_path)
    root.write("x", b"data")
    inject("fail at read path=x times=4")
    assert root.read("x") == b"data"
    inject("fail at read path=x times=1000")
    with pytest.raises(StorageAway, match=f"cannot read {tmp_path}/x: ConnectionError: fault: storage is away"):
        root.read("x")


@pytest.mark.parametrize("code", ["ThrottlingException", "Throttling", "SlowDown"])
def test_a_store_that_throttles_is_asked_again(bucket: str, gateway: Gateway, code: str) -> None:
    """Some gateways throttle with status 400."""
    root = open_folder(bucket)
    root.write("x", b"data")
    gateway.concerns = lambda request: request.method == "GET"  # a response to HEAD has no code
    gateway.faults = [(400, code)] * 3
    assert (root.read("x"), gateway.faults) == (b"data", [])
    gateway.faults = [(400, code)] * 100
    with pytest.raises(StorageAway, match="injected fault"):
        root.read("x")
    gateway.faults = [(400, "InvalidRequest")] * 2
    with pytest.raises(StorageError, match="injected fault") as raised:
        root.read("x")
    assert (type(raised.value), len(gateway.faults)) == (StorageError, 1)


def test_all_codes_that_botocore_repeats_are_known() -> None:
    from dis_scale.storage.retries import _BUSY

    throttled = standard.ThrottledRetryableChecker._THROTTLED_ERROR_CODES
    assert set(throttled + standard.TransientRetryableChecker._TRANSIENT_ERROR_CODES) <= _BUSY


class ServiceRequestError(Exception):
    """As Azure's client raises it where the server is away; its module decides."""

    __module__ = "azure.core.exceptions"


class HttpError(Exception):
    """As Google's client raises it."""

    __module__ = "gcsfs.retry"

    def __init__(self, code: int) -> None:
        super().__init__(f"status {code}")
        self.code = code


@pytest.mark.parametrize(
    ("error", "away"),
    [
        *[(ServiceRequestError(), True), (HttpError(503), True), (HttpError(400), False)],
        *[
            (OSError(number, os.strerror(number)), True) for number in (116, 11, 16, 121, 107, 113, 101, -3)
        ],  # ESTALE, EAGAIN, EBUSY, EREMOTEIO
        (OSError(errno.EROFS, "read-only"), False),
    ],
    ids=str,
)
def test_another_clients_errors_are_told_apart(
    error: Exception, away: bool, tmp_path: Path, no_pauses: None, flaky_store: type[FlakyFileSystem]
) -> None:
    """Without these packages: their clients name a server that is away in ways of their own. So do network file systems."""
    flaky_store.faults = [error] * 100
    with pytest.raises(StorageAway if away else StorageError):
        open_folder(f"flaky://{tmp_path}").read("x.tar")


def test_an_error_of_a_disk_is_no_absence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_pauses: None) -> None:
    """A resume point whose manifest could not be looked at once would be taken for an incomplete one, and deleted."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/manifest.json").write_bytes(b"{}")
    errors, stat = [OSError(errno.ESTALE, "Stale file handle")], os.stat

    def failing(path: Any, **more: Any) -> os.stat_result:
        if str(path).startswith(f"{tmp_path}/runs") and errors:
            raise errors.pop()
        return stat(path, **more)

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", failing)
        assert open_folder(tmp_path).exists("runs/manifest.json")
        errors[:] = [OSError(errno.EACCES, "Permission denied")]
        with pytest.raises(StorageError, match=r"cannot look up .*/runs/manifest\.json"):
            open_folder(tmp_path).exists("runs/manifest.json")
    assert not open_folder(tmp_path).exists("runs/manifest.json/x")
    (tmp_path / "gone").symlink_to("/nowhere/unmounted")
    (tmp_path / "itself").symlink_to(tmp_path / "itself")
    assert not any(map(open_folder(tmp_path).exists, ("none", "gone", "itself", "x" * 300)))


def test_a_folder_that_cannot_be_listed_is_not_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`verify` would report nothing wrong, and `gc` would not see what uses what."""
    for name in ("vae/weights", "runs/a/b"):
        open_folder(tmp_path).write(name, b"1")
    scandir = os.scandir

    def failing(path: Any) -> Any:
        if str(path).endswith("runs/a"):
            raise OSError(errno.EACCES, "Permission denied")
        return scandir(path)

    assert open_folder(tmp_path).tree() == {"vae/weights": 1, "runs/a/b": 1}
    monkeypatch.setattr(os, "scandir", failing)
    for behind_links in (False, True):
        with pytest.raises(StorageError, match=r"cannot list .*/runs/a"):
            open_folder(tmp_path).tree(behind_links=behind_links)


def test_a_deletion_that_a_store_refuses_for_one_object_is_raised(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """S3 answers 200 with the errors of single objects; a bucket whose key may not delete would fill for weeks."""
    at = open_folder(bucket)
    for name in ("point/a", "point/b[1]", "point/c/d", "points"):
        at.write(name, b"1")
    fs, _ = fsspec.url_to_fs(bucket)
    call = type(fs).call_s3
    codes = ["SlowDown", "AccessDenied"]

    def refusing(fs: Any, method: str, **more: Any) -> Any:
        answer = call(fs, method, **more)
        if method == "delete_objects" and codes:
            answer["Errors"] = [{"Key": "point/a", "Code": codes.pop(0), "Message": "no"}]
        return answer

    monkeypatch.setattr(type(fs), "call_s3", refusing)
    with pytest.raises(StorageError, match=r"cannot delete .*/point: permission denied"):
        at.delete("point")
    assert codes == [], "the first is asked again"
    at.delete("point")
    assert at.list() == ["points"]
    codes[:] = ["AccessDenied"]
    at.delete("point")
    at.delete("none")
    assert codes.pop() == "AccessDenied", "what is not there takes no right to delete"
    at.delete("points")
    assert at.list() == []


def test_what_killed_writers_left_is_found_after_a_day(tmp_path: Path) -> None:
    """Others may still write; a preempted encoder leaves up to a whole shard."""
    old, new = (tmp_path / f"{name}.part-{uuid.uuid4().hex}" for name in ("old", "new"))
    for file in (old, new, tmp_path / "done"):
        file.write_bytes(b"half")
    for file in (old, tmp_path / "done"):
        os.utime(file, (time.time() - 90_000,) * 2)
    assert open_folder(tmp_path).abandoned() == [old.name]


def test_an_incomplete_file_is_not_listed(tmp_path: Path) -> None:
    (tmp_path / f"x.part-{uuid.uuid4().hex}").write_bytes(b"half")
    assert open_folder(tmp_path).list() == []


def test_files_are_walked_in_the_order_of_their_paths(store_url: str) -> None:
    """Names like those of our own incomplete files are a user's here. Folders too are listed by their names only."""
    folder, names = (
        open_folder(store_url) / "many",
        ["b.png", "a.png", "c/d.png", "c-1.png", "Z.png", "e\u00e9.png", "x.part-0.png"],
    )
    for name in names:
        folder.write(f"class/{name}", b"x")
    assert list(folder.walk("class")) == sorted(names)
    assert (folder.folders(), folder.folders("class"), list(folder.walk("none"))) == (["class"], ["c"], [])


def test_links_to_files_and_folders_are_followed_and_broken_ones_are_files(tmp_path: Path) -> None:
    folder = open_folder(tmp_path)
    folder.write("elsewhere/1.png", b"x")
    folder.write("set/class/2.png", b"x")
    (tmp_path / "set/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set/class/1.png").symlink_to(tmp_path / "elsewhere/1.png")
    (tmp_path / "set/class/gone.png").symlink_to(tmp_path / "elsewhere/gone.png")
    (tmp_path / "set/class/above").symlink_to(tmp_path / "set")
    (tmp_path / "set/class/self").symlink_to(tmp_path / "set/class/self")
    assert list((folder / "set").walk()) == [
        "class/1.png",
        "class/2.png",
        "class/above",
        "class/gone.png",
        "class/self",
        "linked/1.png",
    ]
    assert (folder / "set").folders() == ["class", "linked"]


def test_a_bucket_that_is_missing_is_no_empty_folder(bucket: str) -> None:
    """A mistyped one was a traceback, whose code schedulers try again."""
    root = open_folder("s3://no-such-bucket-here/root")
    for ask in (root.list, root.folders, lambda: list(root.walk()), root.tree):
        with pytest.raises(StorageError, match="there is no such bucket"):
            ask()
    code, output = invoke("sweep", str(TINY), "--set", f"storage.root={root}")
    assert (code, "storage cannot be used: " in output, "there is no such bucket" in output) == (2, True, True), output


def test_a_large_folder_is_listed_page_by_page(bucket: str, gateway: Gateway) -> None:
    """A page that failed is requested again."""
    names = [f"{i:04d}.png" for i in range(1001)]
    store = open_folder(bucket)
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda name: store.write(f"class/{name}", b"x"), names))
    gateway.seen.clear()
    gateway.faults = [503]
    listed = store.walk("class")
    assert next(listed) == "0000.png"
    assert len(gateway.seen) == 2, "the page that failed and the first"
    assert list(listed) == names[1:]
    assert len(gateway.seen) == 3
    store.write("class/empty/", b"")
    gateway.seen.clear()
    gateway.faults = [503]
    assert (store / "class").tree() == dict.fromkeys(names, 1), "without a folder's marker"
    assert len(gateway.seen) == 3


def test_a_large_object_is_read_by_ranges_and_a_failed_range_is_retried(bucket: str, gateway: Gateway) -> None:
    root, data = open_folder(bucket), os.urandom(40 * 2**20)
    root.write("x.tar", data)
    gateway.concerns = lambda request: request.range is not None
    gateway.faults = [503]
    assert root.read("x.tar") == data
    ranges = {request.range for request in gateway.seen if request.range}
    ends = [0, 16 * 2**20, 32 * 2**20, len(data)]
    assert ranges == {f"bytes={first}-{end - 1}" for first, end in itertools.pairwise(ends)}


class AwayFileSystem(MemoryFileSystem):  # type: ignore[misc]
    """A store that does not answer."""

    protocol = "away"

    def info(self, path: str, **_: Any) -> Any:
        raise ConnectionError(path)


def test_a_store_that_does_not_answer_has_not_lost_an_object(no_pauses: None) -> None:
    """fsspec's own `exists` says that it has."""
    fsspec.register_implementation("away", AwayFileSystem, clobber=True)
    with pytest.raises(StorageAway):
        open_folder("away://store").exists("manifest.json")
    assert not open_folder("memory://nothing").exists("manifest.json")


class FreshFileSystem(MemoryFileSystem):  # type: ignore[misc]
    """An object store whose clients remember nothing."""

    protocol = "fresh"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]


class StaleFileSystem(FreshFileSystem):
    """An object store whose clients remember listings, whatever they are told."""

    protocol = "stale"

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._listed: dict[str, Any] = {}

    def ls(self, path: str, detail: bool = True, **options: Any) -> Any:
        return self._listed.setdefault(f"{path} {detail}", super().ls(path, detail, **options))


def test_a_store_that_lists_what_was_there_before_is_refused() -> None:
    fsspec.register_implementation("stale", StaleFileSystem, clobber=True)
    fsspec.register_implementation("fresh", FreshFileSystem, clobber=True)
    open_folder("fresh://bucket/root").require_usable()
    with pytest.raises(UserError, match="lists 1 after another client has written 1 and 2: runs would not see each other"):
        open_folder("stale://bucket/root").require_usable()


def test_a_store_in_the_memory_of_one_process_is_refused() -> None:
    with pytest.raises(UserError, match=r"storage memory://root is in the memory of one process, and no other sees it"):
        open_folder("memory://root").require_usable()


def test_hugging_faces_client_sends_no_telemetry() -> None:
    """It reads the variable when it is imported, so in a process of its own."""
    program = (
        "from dis_scale.storage import folder; folder._client('hf://datasets/a/b'); from huggingface_hub import constants; "
        "assert constants.HF_HUB_DISABLE_TELEMETRY"
    )
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_DISABLE_TELEMETRY"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)


def test_a_stores_time_is_its_own(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Status compares heartbeats with it: a laptop whose clock is a minute ahead would call each live sweep stopped."""
    now_s = time.time()
    monkeypatch.setattr(time, "time", lambda: now_s + 61)
    assert open_folder(bucket).time_s() == pytest.approx(now_s, abs=20)
    assert open_folder(tmp_path).time_s() == pytest.approx(now_s, abs=20), "a file server's"
    assert list(tmp_path.iterdir()) == []
    assert open_folder(tmp_path / "none").time_s() == now_s + 61, "nothing can be written there"
    assert not (tmp_path / "none").exists()
    fsspec.register_implementation("ahead", StoreAhead, clobber=True)
    assert open_folder("ahead://bucket/sweep").time_s() == StoreAhead.at_s
    assert open_folder("ahead://bucket").list("sweep") == []


class StoreAhead(MemoryFileSystem):  # type: ignore[misc]
    """A store with a clock of its own."""

    protocol = "ahead"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    at_s = 2e9

    def modified(self, path: str) -> datetime:
        assert self.exists(path)
        return datetime.fromtimestamp(self.at_s, UTC)


class OneFact(MemoryFileSystem):  # type: ignore[misc]
    """A store that tells of an object its size and one more fact."""

    protocol = "onefact"
    fact: ClassVar[dict[str, object]] = {}

    def info(self, path: str, **_: object) -> dict[str, object]:
        return {"name": path, "size": 3} | self.fact


@pytest.mark.parametrize(
    "key",
    [
        "ETag", "etag", "Last-Modified", "Content-MD5", "md5Hash", "generation", "updated", "last_modified", "blob_id", "xet_hash",
        "sha", "mtime", "modificationTime", "modify",
    ],
)  # fmt: skip
def test_a_version_is_taken_under_the_name_that_each_client_gives_it(key: str) -> None:
    fsspec.register_implementation("onefact", OneFact, clobber=True)
    versions = []
    for value in ("one", "two"):
        OneFact.fact = {key: value}
        versions.append(open_folder("onefact://bucket").version("x"))
    assert versions == ["3 bytes, one", "3 bytes, two"]
    OneFact.fact = {"etag": "of the metadata too", "mtime": 1, key: "of the content"}
    if key in ("md5Hash", "generation"):  # Google's
        assert open_folder("onefact://bucket").version("x") == "3 bytes, of the content"
