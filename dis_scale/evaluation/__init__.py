"""Published weights to a distance: sample.py draws, features.py looks, metrics.py measures. Nothing here knows about training."""
