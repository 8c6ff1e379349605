"""The Ray that a command uses, and the one that its sweep last used: a cluster's sweep does not continue on a laptop by accident.

A damaged file counts as missing: the sweep may then continue anywhere.
"""

import contextlib
import os
import shlex
import signal
import socket
import time
from collections.abc import Callable, Sequence

from dis_scale.process.errors import UserError, counted
from dis_scale.process.threads import in_order
from dis_scale.storage import lease
from dis_scale.sweep import STAGES, Sweep
from dis_scale.sweep.documents import LastRay
from pipelines.cluster import Cluster, ray_address

ASK_EVERY_S, KILLED_WITHIN_S = 0.2, 10.0


def cancel_hint(last: LastRay) -> str:
    """Return the command that takes a job out of the queue of that kind of cluster; empty if it has no queue."""
    if last.kuberay:
        return f"kubectl delete rayjob NAME (kubectl get rayjob lists the names; the last cluster was {last.kuberay})"
    return f"scancel JOB (squeue lists the jobs; the last was {last.slurm})" if last.slurm else ""


def continue_hint(last: LastRay, sweep: Sweep, overrides: Sequence[str] = ()) -> str:
    """Return the command that continues the sweep on a cluster of that kind, with these overrides."""
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
    LastRay(
        address=cluster.address, host=socket.gethostname(), gpus=cluster.gpus(), kuberay=kuberay, slurm=slurm, at=time.time()
    ).write(sweep.folder)


def end_left_jobs(sweep: Sweep, say: Callable[[str], None], raise_if_stopped: Callable[[], None]) -> None:
    """End the jobs that a killed command of this machine left: they hold leases until they notice that their Ray is gone.

    Each is requested to stop, and is killed after the recipe's grace period. Only for a command that holds the sweep's lease. Jobs
    that are older than the killed command's Ray are not ended: a cluster's, on its head's machine, which refused that command.
    """
    last = LastRay.find_intact(sweep.folder)
    if last is None or not last.address or last.host != socket.gethostname():
        return  # a cluster's jobs are joined, or refuse this command
    leases = {name: sweep.lease(name) for name in STAGES}
    leases |= {f"train {model}": sweep.run(model).lease for model in sweep.recipe.models}
    last_holdings = in_order(leases.values(), lease.last_holding)
    holdings = {name: holding for name, holding in zip(leases, last_holdings, strict=True) if holding}
    left = {
        name: holding
        for name, holding in holdings.items()
        if holding.end is None and holding.alive and (holding.holder.at or 0.0) >= last.at
    }
    for name, holding in left.items():
        say(f"left     {name} of a command that was killed, process {holding.holder}: stopped before this one continues")
    for number, wait_s in ((signal.SIGTERM, sweep.recipe.grace_s), (signal.SIGKILL, KILLED_WITHIN_S)):
        alive, deadline = [each for each in left.values() if each.alive], time.monotonic() + wait_s
        for holding in alive:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(holding.holder.pid, number)
        while any(holding.alive for holding in alive) and time.monotonic() < deadline:
            raise_if_stopped()
            time.sleep(ASK_EVERY_S)


def refuse_local_after_cluster(sweep: Sweep, overrides: Sequence[str] = ()) -> None:
    """Raise UserError if the sweep last ran on a cluster, and would continue on a local Ray of this machine.

    The error names the command to type on the cluster, with the overrides of this command.
    """
    last = LastRay.find_intact(sweep.folder)
    if last is None or last.address or ray_address():
        return
    raise UserError(
        f"{sweep} last ran on a Ray cluster with {counted(last.gpus, 'GPU')} (its driver was on {last.host}), and RAY_ADDRESS "
        f"is not set: nothing was started here. To continue there: {continue_hint(last, sweep, overrides)}. "
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
    raise UserError(f"{sweep}: no Ray is known here{where}: to name it, add --address http://HOST:8265 or set RAY_ADDRESS{queued}")
