"""Goodput: the share of a run's time that went into steps that counted."""

from dis_scale.storage.folder import Folder
from dis_scale.tracking.rows import read_rows, row_files

ATTEMPT = "attempt"
"""Name of the row that begins an attempt: its number, at the images that it starts from."""
GOODPUT = "goodput"
"""Name of the row that ends an attempt: the run's goodput up to there."""


def goodput_by_images(folder: Folder) -> dict[int, float]:
    """Return, by images seen, the share of the time since the first attempt began that went into lasting steps.

    A step is lasting if no later attempt repeated it. Waiting for machines, start-up and repeated steps count as lost:

        attempt 1   |start|steps|steps that were lost|      attempt 2   |wait, start|steps|
        good                ^^^^^                                                   ^^^^^
    """
    rows = sorted((row for name in row_files(folder) for row in read_rows(folder, name)), key=lambda row: row.time)
    begins = [row for row in rows if row.name == ATTEMPT]
    shares, good_s = dict[int, float](), 0.0
    for begin, after in zip(begins, [*begins, None][1:], strict=True):
        own = [row for row in rows if row.time >= begin.time and (after is None or row.time < after.time)]
        kept = [row for row in own if after is None or row.images <= after.images]
        shares |= {r.images: (good_s + r.time - begin.time) / max(r.time - begins[0].time, 1e-9) for r in kept}
        good_s += max((row.time for row in kept), default=begin.time) - begin.time
    return shares
