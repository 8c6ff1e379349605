"""Perform each runbook's accident and its cure on this machine: `make drills`, or `python -m ops.drills NAME ...`.

A drill runs a small sweep (drill.yaml) into the accident and runs the runbook's commands. It checks what the runbook promises:
log lines, exit codes, and published weights that are bit-equal to those of an undisturbed sweep. It prints the commands and the
lines that an operator would look for. A drill has the name of its page in ops/runbooks/.
"""

import sys
import tempfile
from pathlib import Path

from ops.drills import machines, stored
from ops.drills.drill import Missing, page_of, perform, run_undisturbed

DRILLS = {
    page_of(drill): drill
    for drill in (
        machines.preempted_sweep, stored.damaged_resume_point, stored.storage_down, machines.loss_not_finite,
        machines.stuck_job, stored.disk_full, machines.another_cluster, stored.roll_back, machines.bad_gpu_or_node,
        machines.nccl_or_network, machines.pods_pending, machines.out_of_memory, stored.mlflow_database_lost,
        stored.cost_out_of_hand, stored.upgrade_in_mid_sweep,
    )
}  # fmt: skip
"""All drills, by the name of their page."""


def main(names: list[str], scratch: Path) -> None:
    """Perform the drills of these names, or all."""
    if unknown := set(names) - DRILLS.keys():
        sys.exit(f"no drill {', '.join(unknown)}: there are {', '.join(DRILLS)}")
    undisturbed = run_undisturbed(scratch)
    for name in names or DRILLS:
        try:
            perform(DRILLS[name], undisturbed, scratch / name)
        except Missing as missing:
            print(f"  left out: this machine lacks {missing}", flush=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="dis-scale-drills-") as scratch:
        main(sys.argv[1:], Path(scratch))
