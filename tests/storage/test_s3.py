"""A bucket in Ceph: keys that change, requests that are repeated, pages of listings, deletions object by object."""

import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest
from botocore.retries import standard

from dis_scale.process.context import Context
from dis_scale.process.errors import StorageAway, StorageError, UserError
from dis_scale.storage.folder import open_folder
from ops.drills import object_store
from tests.conftest import TINY
from tests.support.commands import invoke
from tests.support.faulty_gateway import Gateway


def test_the_markers_of_folders_that_consoles_make_are_no_files(bucket: str) -> None:
    root = open_folder(bucket)
    fs, name = fsspec.url_to_fs(bucket)
    for marker in ("a/", "a/b/"):
        fs.call_s3("put_object", Bucket=name, Key=marker, Body=b"")
    root.write("a/c", b"one")
    assert (root.list("a"), list((root / "a").files()), root.folders("a"), list(root.walk())) == (["b", "c"], ["c"], ["b"], ["a/c"])


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


def test_a_probe_whose_first_answer_is_lost_is_no_refusal(bucket: str, gateway: Gateway, no_pauses: None) -> None:
    """The retry finds what the first request has written."""
    gateway.concerns = lambda request: request.method == "PUT"
    gateway.faults = ["lost"]
    open_folder(bucket).require_usable()
    assert not gateway.faults


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
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):  # not those of whoever runs the tests
        monkeypatch.setenv(name, "/nowhere")
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
