"""Stores of fsspec's other clients: which are refused, how their errors and versions are read."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractFileSystem

from dis_scale.process.errors import StorageAway, StorageError, UserError
from dis_scale.storage.folder import open_folder
from tests.support.flaky_store import FlakyFileSystem


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


def test_an_unknown_protocol_is_named() -> None:
    with pytest.raises(UserError, match="Protocol not known: nowhere"):
        open_folder("nowhere://x").require_usable()


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
