"""Upkeep of a stored sweep: verify.py reads back what its results rest on, retention.py deletes what none needs, removal.py all."""
