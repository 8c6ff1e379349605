"""Training by checkpointing, torch.compile and micro-batch: `python -m benchmarks.variants [--device cpu --quick]`.

The jobs of throughput.py with other settings, DiS-L/2 unless named.
"""

from benchmarks.bringup import Options, options
from benchmarks.throughput import QUICK_JOBS, Job, run_all, training_jobs

VARIED = "DiS-L/2"
JOBS = [Job(VARIED, 32, checkpointing) for checkpointing in ("block", "every_2", "selective")]
JOBS += [Job(VARIED, compile=True), Job("DiT-L/2", compile=True)]
JOBS += [Job(VARIED, images) for images in (8, 64, 128)] + [Job("DiS-S/2", 256), Job("DiS-H/2", 64, "block")]


def main(chosen: Options) -> None:
    run_all(training_jobs(QUICK_JOBS if chosen.quick else JOBS, chosen.device.type))


if __name__ == "__main__":
    main(options(__doc__))
