#!/bin/sh
# Run everything that needs a GPU, in under ten minutes: the tests of its kernels, then the benchmarks into
# benchmarks/results/NAME.json. Most of the tests' time is compilation, half a minute per size and dtype: eight run at once.
# Needs the dev extra.
#     sh benchmarks/gpu.sh h200            with another interpreter: PYTHON=.venv/bin/python sh benchmarks/gpu.sh h200
set -e
name=${1:?usage: sh benchmarks/gpu.sh NAME, for example h200}
python=${PYTHON:-python}
cd "$(dirname "$0")/.."
"$python" -c 'import torch, sys; sys.exit(0 if torch.cuda.is_available() else "error: no GPU here that PyTorch sees")'
"$python" -m pytest -q -n 8 tests/scan/test_scan_gpu.py
"$python" -m benchmarks.record "$name" scan_gpu step
