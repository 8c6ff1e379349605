"""Storage with injected faults whose reads are counted, across processes: a local folder under fsspec as `flaky://<path>`."""

import os
import threading
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import fsspec
from botocore.exceptions import ClientError
from fsspec.implementations.local import LocalFileSystem
from s3fs.errors import translate_boto_error

LOG = "reads.log"
"""File next to the objects with one line per successful read of a shard."""

_ONE_AT_A_TIME = threading.Lock()


class FlakyFileSystem(LocalFileSystem):  # type: ignore[misc]
    """The first reads of shards raise `faults`, one each; later reads succeed after `latency_s`."""

    protocol = "flaky"
    faults: ClassVar[list[Exception]] = []
    latency_s: ClassVar[float] = 0.0

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return super()._strip_protocol(str(path).removeprefix("flaky://"))

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> Any:
        if not path.endswith(".tar"):
            return super().cat_file(path, start, end, **options)
        with _ONE_AT_A_TIME:
            fault = self.faults.pop(0) if self.faults else None
        if fault:
            raise fault
        threading.Event().wait(self.latency_s)
        data = super().cat_file(path, start, end, **options)
        descriptor = os.open(Path(path).parent / LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, f"{Path(path).name} {len(data)}\n".encode())
        os.close(descriptor)
        return data


fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)


def busy(status: int = 503) -> Exception:
    """Return the exception that s3fs raises for this status of the server."""
    error = {"Code": "SlowDown", "Message": "Please reduce your request rate."}
    response = {"Error": error, "ResponseMetadata": {"HTTPStatusCode": status}}
    cause = ClientError(response, "GetObject")
    raised: Exception = translate_boto_error(cause)
    raised.__cause__ = cause
    return raised


def reads(at: Path) -> Counter[str]:
    """Return how often each shard was read."""
    return Counter(line.split()[0] for line in (at / LOG).read_text().splitlines())


def bytes_read(at: Path) -> int:
    return sum(int(line.split()[1]) for line in (at / LOG).read_text().splitlines())
