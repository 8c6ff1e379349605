"""Tests of the Triton kernels under Triton's interpreter. It must be enabled before Triton is imported, so in a new process.

test_scan_triton.py runs `TRITON_INTERPRET=1 python -m pytest tests/support/interpreted/scan.py` and the others: `make test` those
that alone cross a border of the kernels, `make slow` the rest.
"""
