"""Images in, latents out: sources.py names labelled images, shards.py keeps their posteriors, latents.py deals them to training."""
