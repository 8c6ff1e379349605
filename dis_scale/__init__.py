"""dis-scale: scaling sweeps of diffusion models with a state-space backbone, from labelled images to the Gflops-FID curve.

Read next: recipe/ (settings), sweep/ (paths and state), training/loop.py, and pipelines/sweep.py (the driver).
"""

__version__ = "0.1.0"
