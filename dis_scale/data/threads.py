"""Work that runs ahead in threads and comes out in order."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def in_order(items: Iterable[T], work: Callable[[T], R], threads: int) -> Iterator[R]:
    """Each item's result in the items' order; `threads` threads work on up to two items each beyond the one taken."""
    waiting: deque[Future[R]] = deque()
    pool = ThreadPoolExecutor(threads, "ahead")
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
