"""Needs of any process: errors, seeds, threads, progress, injected faults, JSON logs, redaction."""
