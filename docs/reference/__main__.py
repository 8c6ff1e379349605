"""Writes the generated pages into docs/, or another folder."""

import sys
from pathlib import Path

from docs.reference import GENERATED

for name, make in GENERATED.items():
    Path(*sys.argv[1:] or ["docs"], name).write_text(make())
