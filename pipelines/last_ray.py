"""Which Ray a command uses, and where a sweep last ran: the sweep of a cluster does not continue on a laptop by accident.

A damaged file counts as missing: the sweep may then continue anywhere.
"""

import os
import shlex
import socket
from collections.abc import Sequence

from dis_scale.process.errors import UserError
from dis_scale.sweep import Sweep
from dis_scale.sweep.documents import LastRay
from pipelines.cluster import Cluster, ray_address


def cancel_hint(last: LastRay) -> str:
    """Return what to type to take a job out of the queue of that kind of cluster; empty if it has none."""
    if last.kuberay:
        return f"kubectl delete rayjob NAME (kubectl get rayjob lists the names; the last cluster was {last.kuberay})"
    return f"scancel JOB (squeue lists the jobs; the last was {last.slurm})" if last.slurm else ""


def continue_hint(last: LastRay, sweep: Sweep, overrides: Sequence[str] = ()) -> str:
    """Return what to type to continue the sweep on a cluster of that kind, with these overrides."""
    words = "".join(f" --set {shlex.quote(override)}" for override in overrides)
    if last.kuberay:
        added = f" with{words} at the end of the sweep's command" if overrides else ""
        return (
            f"kubectl delete rayjob NAME (or job NAME), then kubectl apply -f its file{added} (kubectl get rayjob,job lists the "
            f"names; the last cluster was {last.kuberay})"
        )
    if last.slurm:
        return f"sbatch cluster/slurm.sh resume {sweep}{words} (the last job was {last.slurm})"
    submit = f"ray job submit --address http://{last.host}:8265 --working-dir ."
    return f"{submit} -- python -m dis_scale resume {sweep}{words}"


def words() -> str:
    """Return a description of the Ray that this process uses."""
    address = ray_address()
    return f"the cluster at RAY_ADDRESS={address}" if address else "one of its own on this machine (no RAY_ADDRESS)"


def record(sweep: Sweep, cluster: Cluster) -> None:
    """Store that the sweep runs on this cluster."""
    kuberay, slurm = map(os.environ.get, ("RAY_CLUSTER_NAME", "SLURM_JOB_ID"))
    last = LastRay(address=cluster.address, host=socket.gethostname(), gpus=cluster.gpus, kuberay=kuberay, slurm=slurm)
    last.write(sweep.folder)


def refuse_local_after_cluster(sweep: Sweep, overrides: Sequence[str] = ()) -> None:
    """Raise UserError if the sweep last ran on a cluster, and would continue on a Ray of this machine alone.

    It says what to type there, with the overrides that were given here.
    """
    last = LastRay.find_intact(sweep.folder)
    if last is None or last.address or ray_address():
        return
    raise UserError(
        f"{sweep} last ran on a Ray cluster with {last.gpus} GPUs (its driver was on {last.host}), and RAY_ADDRESS is not set: "
        f"nothing was started here. To continue there: {continue_hint(last, sweep, overrides)}. "
        "To continue on this machine anyway, add --here"
    )


def address_of(sweep: Sweep) -> str:
    """Return the dashboard of the Ray that the sweep last ran on, if a command on this machine started it; UserError otherwise.

    That Ray may have ended since.
    """
    last = LastRay.find_intact(sweep.folder)
    if last and last.address and last.host == socket.gethostname():
        return last.address
    where = f" (it last ran on {last.host})" if last else ""
    hint = cancel_hint(last) if last else ""
    queued = f"; if it waits in a queue: {hint}" if hint else ""
    raise UserError(
        f"{sweep}: no Ray is known here{where}: to name it, add --address http://HOST:8265 or set RAY_ADDRESS{queued}"
    )
