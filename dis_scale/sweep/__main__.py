"""`python -m dis_scale.sweep RECIPE`: the public command of a Ray job, the same as `python -m dis_scale sweep RECIPE`."""

import runpy
import sys

sys.argv[1:1] = ["sweep"]
runpy.run_module("dis_scale", run_name="__main__")
