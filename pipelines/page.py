"""The page of a sweep that runs, and of one that a stop or an error has ended."""

import contextlib
import time
from collections.abc import Iterator

from dis_scale import report
from dis_scale.planning.plan import Plan
from dis_scale.process.errors import DisScaleError, StorageAway
from dis_scale.process.threads import repeating
from dis_scale.sweep import RECIPE
from pipelines.driver import Driver
from pipelines.silence import RayEnded

PAGE_EVERY_S, PAGE_SHARE, PAGE_AT_LEAST_EVERY_S, PAGE_ENDS_S = 30.0, 0.03, 3600.0, 10.0
"""Least interval at which the page of a running sweep is written, largest share of the time that this takes, longest interval, and
time to finish a page at a stop."""


@contextlib.contextmanager
def writing_page(driver: Driver, plan: Plan) -> Iterator[None]:
    """Write the page of the running sweep during the block, at once and then at intervals.

    This takes at most `PAGE_SHARE` of the time, but is done at least each hour: an older page says that the sweep may have stopped.
    """
    due_s = 0.0

    def write() -> None:
        nonlocal due_s
        if (began_s := time.monotonic()) >= due_s:
            write_page(driver, plan)
            due_s = time.monotonic() + min((time.monotonic() - began_s) / PAGE_SHARE, PAGE_AT_LEAST_EVERY_S)

    driver.sweep.report.delete(report.CSV)  # only a report of all results leaves this file
    driver.board.say(f"page     {driver.sweep.report}/{report.PAGE}")
    with repeating(write, PAGE_EVERY_S, "page", PAGE_ENDS_S) as thread:
        yield
    thread.join()  # it may still be writing, and the report is written next


@contextlib.contextmanager
def showing_a_stop(driver: Driver, plan: Plan) -> Iterator[None]:
    """If the block ends by an error, write the page of the stopped sweep, unless an inner block has written it."""
    try:
        yield
    except DisScaleError as error:
        with contextlib.suppress(DisScaleError):  # storage may be away, and the error's code decides what follows
            shown = driver.stop_shown or not driver.first  # by the command that was joined
            if not (shown or isinstance(error, StorageAway | RayEnded)) and driver.sweep.folder.exists(RECIPE):
                driver.stop_shown = True
                write_page(driver, plan)
        raise


def write_page(driver: Driver, plan: Plan) -> None:
    """Write the page as that of a running sweep; an error is logged and ignored."""
    try:
        report.write(driver.sweep, report.collect(driver.sweep, plan), running=True)
    except Exception as error:  # the sweep continues without its page
        driver.board.say(f"page     not written: {error}")
