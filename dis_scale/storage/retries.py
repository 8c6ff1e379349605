"""Retries of temporary failures of storage, and the causes of the others in words.

A client's errors tell little by their classes: s3fs, gcsfs, adlfs and aiohttp each keep the status of an answer elsewhere.
"""

import errno
import logging
import os
import random
import socket
import time
from collections.abc import Callable
from typing import TypeVar

import fsspec

from dis_scale.process import context, counts
from dis_scale.process.errors import FULL, DisScaleError, StorageAway, StorageError, StorageFull, UserError, printable

T = TypeVar("T")

TRIES = 5
PATIENT_TRIES = 9
"""As `TRIES`, for about a minute: long enough for a server to restart."""
SLOW_S = 30.0
"""Time from which a failed try is logged: with a store that accepts requests and does not answer, tries take minutes."""
_FIRST_PAUSE_S = 0.2
_MISTAKES = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound")
"""Errors of botocore that no retry changes."""
PASSING = (
    errno.EIO, errno.ESTALE, errno.EAGAIN, errno.EBUSY, errno.EREMOTEIO, errno.ENOTCONN, errno.EHOSTUNREACH, errno.ENETUNREACH,
    errno.EHOSTDOWN, errno.ENETDOWN, errno.ENETRESET, errno.ENOLINK, socket.EAI_AGAIN,
)  # fmt: skip
"""Errors of networks and their file systems that pass, such as a file that another client has replaced while it was open."""
_BUSY = {
    "RequestTimeout", "RequestTimeoutException", "PriorRequestNotComplete", "Throttling", "ThrottlingException",
    "ThrottledException", "RequestThrottledException", "TooManyRequestsException", "ProvisionedThroughputExceededException",
    "TransactionInProgressException", "RequestLimitExceeded", "BandwidthLimitExceeded", "LimitExceededException",
    "RequestThrottled", "SlowDown", "EC2ThrottledException", "NoSuchUpload",
}  # fmt: skip
"""Error codes that botocore's standard retries repeat, whatever the status (botocore/retries/standard.py); some come with 400.

`NoSuchUpload` is that of a multipart upload whose last answer was lost: s3fs aborts the ended upload, and hides the cause.
"""
_allowed_at: dict[tuple[str, str], float] = {}
"""Time (monotonic, seconds) when a store, named by protocol and bucket, last allowed an action, named by its verb."""


def with_retries(action: Callable[[], T], what: str, tries: int, store: tuple[str, str] | None = None) -> T:
    """Return the action's result. A refusal by a `store` is temporary if it allowed the same before, in this process or at the
    sweep's start: keys expire and are rotated, and services that hand them out are away for moments."""
    for attempt in range(tries):
        began_s = time.monotonic()
        try:
            done = action()
            if store:
                _allowed_at[store] = time.monotonic()
            return done
        except Exception as error:
            final = isinstance(error, FileNotFoundError | FileExistsError | UserError)
            if final and _s3_code(error) not in {*_BUSY, "NoSuchBucket"}:
                raise
            if http_status(error) == 412:  # the precondition that the object is absent
                raise FileExistsError(what) from error
            expired = _expired_key(error, store)
            words = f"{printable(what)}: {expired}{cause_of(error)}"
            if not (expired or _may_pass(error)):
                kind = StorageFull if getattr(error, "errno", None) in FULL else StorageError
                raise kind(words) from error
            if attempt == tries - 1:
                raise StorageAway(words) from error
            if (took_s := time.monotonic() - began_s) > SLOW_S:
                logging.getLogger(__name__).warning("%s; after %.0f s, try %d of %d", words, took_s, attempt + 1, tries)
        counts.add(counts.STORAGE_RETRIES)
        time.sleep(_FIRST_PAUSE_S * 2**attempt * random.uniform(0.5, 1.5))  # jitter: many workers share one store
        counts.add_seconds(counts.STORAGE_AWAY_S, began_s)
    raise AssertionError("unreachable")


def _may_pass(error: Exception) -> bool:
    """Return whether a retry can help: not for a wrong key, a full disk or a bug."""
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    if type(error).__name__ in _MISTAKES:
        return False
    if _s3_code(error) in _BUSY:
        return True
    status = http_status(error)
    if status is not None:
        return status >= 500 or status in (408, 409, 429)
    known = ("botocore", "aiohttp", "requests", "httpx", "urllib3", "azure.core", "http.client", "ssl")
    return type(error).__module__.startswith(known) or getattr(error, "errno", None) in PASSING


def _expired_key(error: Exception, store: tuple[str, str] | None) -> str:
    """Return words if a store refuses what it allowed before, and forget its clients, so that a new one reads the key; else ''."""
    if store is None or not (store in _allowed_at or context.VARIABLE in os.environ) or not _denied(error):
        return ""
    forget_clients(store[0])
    at_s = _allowed_at.get(store)
    before = "at the sweep's start" if at_s is None else f"{time.monotonic() - at_s:.0f} s ago"
    return f"refused, but allowed {before}: the key has expired, was replaced or lost its rights; "


def refused(error: BaseException | None) -> bool:
    """Return whether an error or one of its causes is that a store refused the key, or that no key was found."""
    while error and not (isinstance(error, Exception) and _denied(error)):
        error = error.__cause__
    return error is not None


def forget_clients(url: str) -> None:
    """Let the next request to a store read its key again."""
    protocol, _ = fsspec.core.split_protocol(url)
    fsspec.get_filesystem_class(protocol or "file").clear_instance_cache()


def _denied(error: Exception) -> bool:
    """Return whether a store refused the key, or no key was found.

    S3 answers a HEAD request whose token has expired with 400 and no code.
    """
    gone = type(error).__name__ in _MISTAKES
    refused = isinstance(error, PermissionError) or http_status(error) in (401, 403)
    return gone or refused or _s3_code(error) == "400"


def _s3_code(error: Exception) -> str | None:
    """Return the error code of S3's response; the status if it has none."""
    response = getattr(error.__cause__, "response", None)  # s3fs raises its own errors from botocore's
    return response.get("Error", {}).get("Code") if isinstance(response, dict) else None


def http_status(error: BaseException) -> int | None:
    """Return the store's HTTP status from an error of botocore, requests, Azure's client, gcsfs or aiohttp; None if none came."""
    for link in (error, error.__cause__):
        response = getattr(link, "response", None)
        if isinstance(response, dict):
            http: int | None = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            return http
        # aiohttp's errors of a body that ends early also have a `code`: 400, which no store has answered.
        own = getattr(link, "code" if type(link).__module__.startswith("gcsfs") else "status", None)
        for status in (getattr(response, "status_code", None), own):
            if isinstance(status, int):
                return status
    return None


def cause_of(error: BaseException) -> str:
    """Return an error of storage in words that name its cure, if it has one."""
    if isinstance(error, DisScaleError):
        return str(error)
    if isinstance(error, FileNotFoundError) or http_status(error) == 404:
        return "there is no such bucket or folder"
    if isinstance(error, OSError) and error.errno in FULL:
        return "no space left on the device: free some, then run the same command again"
    if isinstance(error, PermissionError) or http_status(error) in (401, 403):
        return f"permission denied: check the key and its rights ({' '.join(str(error).split())})"
    if type(error).__name__ == "NoCredentialsError":
        return "no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
