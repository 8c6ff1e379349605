"""dis-scale: scaling sweeps of diffusion models with a state-space backbone, from labelled images to the Gflops-FID curve.

`Sweep` reads a stored sweep, `open_weights` samples from weights, `plan` prices a recipe: api.py. Read next: recipe/ (settings),
sweep/ (paths and state), training/loop.py, and pipelines/sweep.py (the driver).
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dis_scale.api import StoredSweep as Sweep
    from dis_scale.api import open_weights, plan

__all__ = ["Sweep", "__version__", "open_weights", "plan"]
__version__ = "0.1.0"


def __dir__() -> list[str]:
    return sorted(globals().keys() | set(__all__))


def __getattr__(name: str) -> Any:
    """Import the API on its first use: it needs torch and pandas, which take seconds."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dis_scale import api

    return getattr(api, {"Sweep": "StoredSweep"}.get(name, name))
