"""The stop request of another process: ask Ray to stop a sweep's jobs. Needs no PyTorch."""

import os

from dis_scale.sweep import Sweep
from pipelines import jobs, last_ray


def stop_sweep(sweep: Sweep, address: str | None) -> list[str]:
    """Stop the sweep's jobs wherever they run; return their ids. UserError if no Ray is known or none answers."""
    if address is None and not os.environ.get("RAY_ADDRESS"):
        address = last_ray.address_of(sweep)
    return jobs.stop_all(sweep, address)
