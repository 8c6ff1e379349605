"""What S3 needs beside fsspec: its listings by pages, deletion whose errors are read, and a client without retries of its own."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any

RANGE_BYTES = 16 * 2**20
"""Longer objects are read by ranges of this size, several at once: one connection is slower than a network card."""
RANGES_AT_ONCE = 10
READ_TIMEOUT_S = 60
_CONNECTIONS = 64
"""Connections of a process; botocore's default of 10 would let threads wait for each other."""
Page = Mapping[str, Any]
"""Answer to a listing: up to 1,000 names."""


def options() -> dict[str, Any]:
    """Return the options of s3fs; botocore does not retry below our retries."""
    timeouts = {"connect_timeout": 10, "read_timeout": READ_TIMEOUT_S}
    retries = {"mode": "standard", "total_max_attempts": 1}
    return {
        "default_block_size": RANGE_BYTES,
        "config_kwargs": {"retries": retries, "max_pool_connections": _CONNECTIONS, **timeouts},
    }


def without_retries(fs: Any) -> None:
    """Let a client try once: our retries are around it, and five times five tries of a minute would take most of an hour."""
    if fs.retries > 1:
        from botocore import handlers

        # An answer to `Expect: 100-continue` is awaited without any limit: a write to a store that hangs would never end.
        fs.s3.meta.events.unregister("before-call.s3", handlers.add_expect_header)
        fs.retries = 1


def page(fs: Any, full: str, **how: str | int) -> Any:
    """Return a page of the listing of a folder."""
    bucket, key, _ = fs.split_path(full)
    return fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=f"{key}/" if key else "", **how)


def pages(ask: Callable[[Callable[[Any, str], Page]], Page], **how: str) -> Iterator[Page]:
    """Yield the pages of a folder's listing, in UTF-8 order; `ask` calls `page` with the folder, with retries."""
    more = dict[str, str]()
    while True:
        one = ask(partial(page, **how, **more))
        yield one
        if not one.get("IsTruncated"):
            return
        more = {"ContinuationToken": one["NextContinuationToken"]}


def keys(page: Page) -> list[str]:
    """Return the keys of a page."""
    return [each["Key"] for each in page.get("Contents", ())]


def sizes(page: Page) -> Iterator[tuple[str, int]]:
    """Yield the objects of a page, named from its folder on, with their sizes in bytes; without folders' markers."""
    found = ((each["Key"].removeprefix(page["Prefix"]), each["Size"]) for each in page.get("Contents", ()))
    yield from ((name, size) for name, size in found if name and not name.endswith("/"))


def children(pages: Iterator[Page]) -> Iterator[tuple[str, bool]]:
    """Yield the keys directly below a folder, of pages with the delimiter "/", and whether each is a folder's."""
    for one in pages:
        yield from ((each["Prefix"].removesuffix("/"), True) for each in one.get("CommonPrefixes", ()))
        yield from ((key, False) for key in keys(one) if not key.endswith("/"))  # a folder's marker


def time_s(fs: Any, full: str) -> float:
    """Return the Unix time by the server's clock, to a second."""
    headers = page(fs, full, MaxKeys=1)["ResponseMetadata"]["HTTPHeaders"]
    return parsedate_to_datetime(headers["date"]).timestamp()


def own_key(fs: Any, full: str) -> list[str]:
    """Return the key of an object, if it exists, without the keys below the folder of the same name."""
    bucket, key, _ = fs.split_path(full)
    first = keys(fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=key, MaxKeys=1))  # in their order it comes first
    return [key] if key in first else []


def delete(fs: Any, full: str, keys: Sequence[str]) -> None:
    """Delete up to 1,000 objects of a bucket. s3fs would drop the errors that an answer has for single ones."""
    objects = [{"Key": key} for key in keys]
    answer = fs.call_s3("delete_objects", Bucket=fs.split_path(full)[0], Delete={"Objects": objects, "Quiet": True})
    for error in answer.get("Errors", ()):
        if error.get("Code") == "NoSuchKey":
            continue
        from botocore.exceptions import ClientError
        from s3fs.errors import translate_boto_error

        status = 403 if error.get("Code") == "AccessDenied" else 503
        cause = ClientError({"Error": error, "ResponseMetadata": {"HTTPStatusCode": status}}, "DeleteObjects")
        raise translate_boto_error(cause) from cause
