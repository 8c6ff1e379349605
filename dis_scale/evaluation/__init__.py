"""Published weights to metrics: sampling.py, features.py, measure.py. Independent of training."""
