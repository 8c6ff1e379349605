"""dis-scale: scaling sweeps of diffusion models with a state-space backbone, from labelled images to the Gflops-FID curve.

`dis_scale.Sweep` reads a stored sweep: api.py. Read next: recipe/ (settings), sweep/ (paths and state),
training/loop.py, and pipelines/sweep.py (the driver).
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dis_scale.api import StoredSweep as Sweep

__all__ = ["Sweep", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import the API on its first use: it needs torch and pandas, which take seconds."""
    if name != "Sweep":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dis_scale.api import StoredSweep

    return StoredSweep
