"""`python -m dis_scale.sweep RECIPE`: the public command of a Ray job, the same as `dis-scale sweep RECIPE`."""

import sys

from dis_scale.cli import main

main(["sweep", *sys.argv[1:]])
