"""Work in threads: results in order, actions that repeat, queues; and items in groups."""

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def in_order(items: Iterable[T], work: Callable[[T], R], threads: int = 32) -> Iterator[R]:
    """Yield each item's result in the items' order. Up to `2 * threads` items are in work ahead of the one yielded.

    The default suits requests to an object store, of which each takes some ten milliseconds.
    """
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


@contextlib.contextmanager
def repeating(action: Callable[[], object], every_s: float, name: str, ends_s: float = 0.0) -> Iterator[Thread]:
    """Call `action` during the block, at once and then at this interval, in a thread of its own; its errors are ignored.

    The block's end waits `ends_s` for a call that has begun.
    """
    over = Event()

    def run() -> None:
        while not over.is_set():
            with contextlib.suppress(Exception):
                action()
            over.wait(every_s)

    thread = Thread(target=run, daemon=True, name=name)
    thread.start()
    try:
        yield thread
    finally:
        over.set()
        thread.join(ends_s)


def taken(items: SimpleQueue[T]) -> Iterator[T]:
    """Yield what a queue holds; others may take from it at the same time."""
    with contextlib.suppress(Empty):
        while True:
            yield items.get_nowait()


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield lists of `size` items; the last may be shorter. `itertools.batched` of Python 3.12."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def one_ahead(items: Iterable[T]) -> Iterator[T]:
    """Yield each item after the next one has been taken from `items`."""
    iterator = iter(items)
    for item in islice(iterator, 1):
        for following in iterator:
            yield item
            item = following
        yield item
