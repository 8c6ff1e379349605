"""Facts of this process that its logs and metrics carry: sweep, stage, model, attempt, rank, images seen.

A stage's job hands the first three to all its processes through the environment; the others are set as they become known.
"""

import json
import os
from typing import Any

VARIABLE = "DIS_SCALE_JOB"
facts: dict[str, Any] = json.loads(os.environ.get(VARIABLE, "{}"))


def variable(sweep: str, stage: str, model: str | None) -> dict[str, str]:
    """Return the environment of a stage's job."""
    known = {"sweep": sweep, "stage": stage} | ({"model": model} if model else {})
    return {VARIABLE: json.dumps(known)}
