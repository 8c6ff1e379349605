"""A study of compute budgets that is not yet written out."""

from dis_scale.recipe import Recipe, reading
from tests.conftest import TINY

STUDY = ("isoflop={flops: [1e10, 2e10], share: 0.25, least_steps: 10}",)


def study(*overrides: str) -> Recipe:
    """Return the tiny recipe as a study that is not yet written out."""
    text = "".join(line for line in TINY.read_text().splitlines(keepends=True) if "publish_images" not in line)
    return reading.parse(text, "here", [*STUDY, *overrides])
