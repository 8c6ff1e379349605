#!/bin/sh
# Bring up a GPU, by seven commands of under nine minutes each; all write into benchmarks/results/NAME.json as they measure.
# `settings` and `throughput`, run again at the same commit, measure the rows that they had no time for.
#     sh benchmarks/gpu.sh h200 scan_gpu      the speed of scan and convolution, and the tests of all kernels
#     sh benchmarks/gpu.sh h200 kernels       each kernel against the reference
#     sh benchmarks/gpu.sh h200 settings      training by graphs, checkpointing, compilation, micro-batch and scan
#     sh benchmarks/gpu.sh h200 trace         the time of each kernel in a step of DiS-L/2, and the gaps between them
#     sh benchmarks/gpu.sh h200 step          a step by checkpointing, and against DiT's and DiS2's
#     sh benchmarks/gpu.sh h200 smoke         small models: training, resuming, ZeRO stages, sampling, memory
#     sh benchmarks/gpu.sh h200 throughput    the published sizes: images per second, MFU and memory; sampling, encoding
# They need neither Ray nor a network. What is missing is named, and the rest runs. With another interpreter:
#     PYTHON=.venv/bin/python sh benchmarks/gpu.sh h200 scan_gpu
usage="usage: sh benchmarks/gpu.sh NAME scan_gpu|kernels|settings|trace|step|smoke|throughput, for example h200 scan_gpu"
name=${1:?$usage}
part=${2:?$usage}
python=${PYTHON:-python}
cd "$(dirname "$0")/.." || exit 1
case $part in
scan_gpu) limit=260 ;;
kernels | settings | trace | step | smoke | throughput) limit=530 ;;
*)
    echo "error: no part $part; $usage" >&2
    exit 2
    ;;
esac
"$python" -c 'import torch, sys; sys.exit(0 if torch.cuda.is_available() else "error: no GPU here that PyTorch sees")' || exit 1
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}" # as a job's workers have it
failed=0
timeout $limit "$python" -m benchmarks.record "$name" "$part" || failed=1
if [ "$part" = scan_gpu ]; then
    if "$python" -c 'import pytest, pydantic' 2>/dev/null; then
        # Most of the time is compilation: eight tests at once. They need no fixture of the other tests.
        workers=$("$python" -c 'import xdist' 2>/dev/null && echo "-n 8")
        # shellcheck disable=SC2086
        timeout 270 "$python" -m pytest --noconftest -q $workers tests/*/test_*_gpu.py || failed=1
    else
        echo "the tests test_*_gpu.py: not run, they need pytest and pydantic"
    fi
fi
exit $failed
