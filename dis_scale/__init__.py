"""dis-scale: scaling sweeps of diffusion models with a state-space backbone, from labelled images to the Gflops-FID curve.

Read next: sweep.py (the whole way), recipe.py (what a sweep is), train.py (the loop).
"""

__version__ = "0.1.0"
