"""Context of a process that its logs and metrics carry. It is made where a process begins and handed on."""

import json
import os
from dataclasses import asdict, dataclass
from typing import Any

VARIABLE = "DIS_SCALE_JOB"


@dataclass
class Context:
    """Sweep, stage, model, attempt, rank and images seen; None if unknown. Images seen grow while the process runs."""

    sweep: str | None = None
    stage: str | None = None
    model: str | None = None
    attempt: int | None = None
    rank: int | None = None
    images: int | None = None
    folder: str | None = None
    """Name and hash of the sweep's folder, which tell sweeps of one name apart."""

    @classmethod
    def from_environment(cls) -> "Context":
        """Return what a stage's job hands to its processes; empty in any other process."""
        return cls(**json.loads(os.environ.get(VARIABLE, "{}")))

    def variable(self) -> dict[str, str]:
        """Return the variable of the environment that hands this context to a job's processes."""
        return {VARIABLE: json.dumps(self.known())}

    def known(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}
