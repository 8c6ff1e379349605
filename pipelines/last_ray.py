"""Which Ray a command uses, and where a sweep last ran: the sweep of a cluster does not continue on a laptop by accident.

A damaged file counts as missing: the sweep may then continue anywhere.
"""

import logging
import os
import socket
from dataclasses import asdict, dataclass, fields

from dis_scale.process.errors import UserError
from dis_scale.sweep import RAY, Sweep
from pipelines.cluster import Cluster, ray_address

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LastRay:
    """The Ray that a sweep last ran on, as it is stored in the sweep's folder."""

    address: str | None
    """URL of the dashboard of a Ray that the command started itself; None for a cluster."""
    host: str
    """Machine of the command's process; on a cluster the node of its Ray job."""
    gpus: int = 0
    """GPUs of the cluster."""
    kuberay: str | None = None
    """Name of the RayCluster, which KubeRay's operator sets in each pod; None elsewhere."""
    slurm: str | None = None
    """ID of the Slurm job; None elsewhere."""

    def cancel_hint(self) -> str:
        """Return what to type to take a job out of the queue of that kind of cluster; empty if it has none."""
        if self.kuberay:
            return (
                f"kubectl delete rayjob NAME (kubectl get rayjob lists the names; the last cluster was {self.kuberay})"
            )
        return f"scancel JOB (squeue lists the jobs; the last was {self.slurm})" if self.slurm else ""

    def continue_hint(self, sweep: Sweep) -> str:
        """Return what to type to continue the sweep on a cluster of that kind."""
        if self.kuberay:
            return (
                "kubectl delete rayjob NAME, then kubectl apply -f its file (kubectl get rayjob lists the names; the last cluster "
                f"was {self.kuberay})"
            )
        if self.slurm:
            return f"sbatch cluster/slurm.sh resume {sweep} (the last job was {self.slurm})"
        return f"ray job submit --address http://{self.host}:8265 --working-dir . -- python -m dis_scale resume {sweep}"


def words() -> str:
    """Return a description of the Ray that this process uses."""
    address = ray_address()
    return f"the cluster at RAY_ADDRESS={address}" if address else "one of its own on this machine (no RAY_ADDRESS)"


def record(sweep: Sweep, cluster: Cluster) -> None:
    """Store that the sweep runs on this cluster."""
    kuberay, slurm = map(os.environ.get, ("RAY_CLUSTER_NAME", "SLURM_JOB_ID"))
    last = LastRay(cluster.address, socket.gethostname(), cluster.gpus, kuberay, slurm)
    sweep.folder.write_json(RAY, asdict(last))


def find(sweep: Sweep) -> LastRay | None:
    """Return where the sweep last ran, None if it never did or its file is damaged; keys of another version are ignored."""
    last = sweep.folder.find_json(RAY, "address", "host")
    if last is None:
        return None
    known = {field.name for field in fields(LastRay)}
    if unknown := sorted(last.keys() - known):
        log.warning("%s/%s: unknown keys, ignored: %s", sweep, RAY, ", ".join(unknown))
    return LastRay(**{key: value for key, value in last.items() if key in known})


def refuse_local_after_cluster(sweep: Sweep) -> None:
    """Raise UserError if the sweep last ran on a cluster, and would continue on a Ray of this machine alone."""
    last = find(sweep)
    if last is None or last.address or ray_address():
        return
    raise UserError(
        f"{sweep} last ran on a Ray cluster with {last.gpus} GPUs (its driver was on {last.host}), and RAY_ADDRESS is not set: "
        f"nothing was started here. To continue there: {last.continue_hint(sweep)}. "
        "To continue on this machine anyway, add --here"
    )


def address_of(sweep: Sweep) -> str:
    """Return the dashboard of the Ray that the sweep last ran on, if a command on this machine started it; UserError otherwise.

    That Ray may have ended since.
    """
    last = find(sweep)
    if last and last.address and last.host == socket.gethostname():
        return last.address
    where = f" (it last ran on {last.host})" if last else ""
    hint = last.cancel_hint() if last else ""
    queued = f"; if it waits in a queue: {hint}" if hint else ""
    raise UserError(
        f"{sweep}: no Ray is known here{where}: to name it, add --address http://HOST:8265 or set RAY_ADDRESS{queued}"
    )
