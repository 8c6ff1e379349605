"""Metric rows in storage, goodput computed from them, and their copy in MLflow."""
