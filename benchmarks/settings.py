"""DiS-L/2's and other models' training by its settings: `python -m benchmarks.settings [--device cpu --quick]`.

Checkpointing, torch.compile, micro-batch, 512 pixels, and last mamba-ssm's scan; benchmarks/throughput.py has the published sizes.
"""

from benchmarks.bringup import Options, options
from benchmarks.throughput import QUICK_JOBS, VARIED, run_all, training_jobs


def main(chosen: Options) -> None:
    run_all(training_jobs(QUICK_JOBS if chosen.quick else VARIED, chosen.device.type))


if __name__ == "__main__":
    main(options(__doc__))
