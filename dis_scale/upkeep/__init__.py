"""Upkeep of a stored sweep: verify.py reads back what its results rest on, retention.py finds and deletes what none needs."""
