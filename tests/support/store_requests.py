"""Requests to storage as a test sees them: counted, failed, or met by another process's work."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from dis_scale.process import faults

Call = Callable[[str, str], Any]


@contextmanager
def before_each(call: Call) -> Iterator[None]:
    """Call a function with the verb and the path before each request of the block; storage fails by what it raises."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(faults, "at", lambda verb, path="", **_: call(verb, path))
        yield


@contextmanager
def noted() -> Iterator[list[tuple[str, str]]]:
    """Return the list to which each request of the block adds its verb and path."""
    requests = list[tuple[str, str]]()
    with before_each(lambda verb, path: requests.append((verb, path))):
        yield requests


@contextmanager
def failing(error: Exception, verb: str = "", path: str = "", times: int = 10**9) -> Iterator[list[str]]:
    """Let requests of the block fail by an error, at most `times`; return the list of the paths of those that failed.

    They are all, or those with this verb and this end of the path.
    """
    failed = list[str]()

    def fail(request: str, of: str) -> None:
        if request.startswith(verb) and of.endswith(path) and len(failed) < times:
            failed.append(of)
            raise error

    with before_each(fail):
        yield failed
