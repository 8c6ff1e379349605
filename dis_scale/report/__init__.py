"""What came of a sweep, read from storage and always made anew: table, CSV, figures and one page.

collect.py gathers the points, fits.py says how distance goes with cost, figures.py draws, page.py puts all on one page,
compare.py holds two sweeps against each other.
"""

from dis_scale.report.collect import Point, Report, collect
from dis_scale.report.files import CSV, PAGE, write
from dis_scale.report.tables import table

__all__ = ["CSV", "PAGE", "Point", "Report", "collect", "table", "write"]
