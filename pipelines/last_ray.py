"""Which Ray a command uses, and where a sweep last ran: the sweep of a cluster does not continue on a laptop by accident.

A damaged file counts as missing: the sweep may then continue anywhere.
"""

import os
import socket

from dis_scale.process.errors import UserError
from dis_scale.sweep import Sweep
from dis_scale.sweep.documents import LastRay
from pipelines.cluster import Cluster, ray_address


def cancel_hint(last: LastRay) -> str:
    """Return what to type to take a job out of the queue of that kind of cluster; empty if it has none."""
    if last.kuberay:
        return f"kubectl delete rayjob NAME (kubectl get rayjob lists the names; the last cluster was {last.kuberay})"
    return f"scancel JOB (squeue lists the jobs; the last was {last.slurm})" if last.slurm else ""


def continue_hint(last: LastRay, sweep: Sweep) -> str:
    """Return what to type to continue the sweep on a cluster of that kind."""
    if last.kuberay:
        return (
            "kubectl delete rayjob NAME, then kubectl apply -f its file (kubectl get rayjob lists the names; the last cluster "
            f"was {last.kuberay})"
        )
    if last.slurm:
        return f"sbatch cluster/slurm.sh resume {sweep} (the last job was {last.slurm})"
    return f"ray job submit --address http://{last.host}:8265 --working-dir . -- python -m dis_scale resume {sweep}"


def words() -> str:
    """Return a description of the Ray that this process uses."""
    address = ray_address()
    return f"the cluster at RAY_ADDRESS={address}" if address else "one of its own on this machine (no RAY_ADDRESS)"


def record(sweep: Sweep, cluster: Cluster) -> None:
    """Store that the sweep runs on this cluster."""
    kuberay, slurm = map(os.environ.get, ("RAY_CLUSTER_NAME", "SLURM_JOB_ID"))
    last = LastRay(address=cluster.address, host=socket.gethostname(), gpus=cluster.gpus, kuberay=kuberay, slurm=slurm)
    last.write(sweep.folder)


def refuse_local_after_cluster(sweep: Sweep) -> None:
    """Raise UserError if the sweep last ran on a cluster, and would continue on a Ray of this machine alone."""
    last = LastRay.find_intact(sweep.folder)
    if last is None or last.address or ray_address():
        return
    raise UserError(
        f"{sweep} last ran on a Ray cluster with {last.gpus} GPUs (its driver was on {last.host}), and RAY_ADDRESS is not set: "
        f"nothing was started here. To continue there: {continue_hint(last, sweep)}. "
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
