"""Images in, latents out: sources.py names labelled images, shards.py stores posteriors, latents.py reads them for training."""
