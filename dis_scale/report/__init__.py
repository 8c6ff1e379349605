"""The report of a sweep, always rebuilt from storage: table, CSV, figures and two pages.

points.py collects the points, fits.py fits distance to cost, and isoflop.py the best size to compute. figures.py plots them by
drawing.py, page.py makes the HTML pages, samples.py their samples, files.py writes all, and serving.py shows it. compare.py
compares two sweeps.
"""

from dis_scale.report.files import CSV, PAGE, compare_page, write
from dis_scale.report.points import Point, Report, collect, plan_of
from dis_scale.report.tables import table, to_json

__all__ = ["CSV", "PAGE", "Point", "Report", "collect", "compare_page", "plan_of", "table", "to_json", "write"]
