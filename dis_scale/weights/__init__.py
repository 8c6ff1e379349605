"""Weights: published ones and their averages, opening for sampling, export, import, public layouts, warm start, model card."""
