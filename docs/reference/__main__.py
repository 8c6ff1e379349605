"""Writes the generated pages into docs/."""

from pathlib import Path

from docs.reference import GENERATED

for name, make in GENERATED.items():
    Path("docs", name).write_text(make())
