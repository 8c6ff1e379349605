"""The logs of a job's processes in storage: those of living ones by themselves, the end of a dead one's by its driver.

Ray keeps the output of a process on its node, in files that outlive the process but not the node. So each process writes its own
every few seconds, and the driver reads what a dead one wrote last, such as the stacks of a crash, from its node if that is alive.
"""

import contextlib
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
from ray._private import state as ray_state
from ray.util.state import get_log

from dis_scale.process import context
from dis_scale.storage.folder import Folder, open_folder
from dis_scale.sweep import Sweep
from dis_scale.tracking import attempt_logs
from dis_scale.tracking.attempt_logs import DRIVER, Excerpt, KeptLog, LogName
from pipelines import lines

ANSWER_S = 10.0
"""Time for a worker to write the rest of its log, and for Ray to send a dead one's."""
RESCUED_LINES = 2000
_own: KeptLog | None = None
"""The log of this process."""
_workers: dict[str, tuple[Folder, LogName]] = {}
"""Of a driver: the log of each worker by its actor's id."""


def keep(folder: Folder, name: LogName) -> None:
    """Keep this process's log from now on."""
    global _own
    _own = KeptLog(folder, name, without=lines.PROGRESS)


def keep_driver(sweep: Sweep) -> None:
    """Keep the log of this driver, if it is that of a stage's job."""
    if stage := context.facts.get("stage"):
        # opened again, since the sweep's folder retries for minutes, and no log is worth that wait
        folder = open_folder(sweep.logs(stage, context.facts.get("model")).url)
        attempt_logs.prune(folder)
        keep(folder, LogName(attempt_logs.stamp(), DRIVER))


def keep_workers(workers: Sequence[Any]) -> None:
    """Let each worker keep its log: those of a new attempt by their number in this order, which is the rank in training.

    A worker that replaces a lost one of several gets the next number of the attempt that the others belong to.
    """
    if _own is None:
        return
    known = [_workers[id][1].begun for worker in workers if (id := worker._actor_id.hex()) in _workers]
    if len(known) == len(workers):
        return
    begun = max(known) if known else attempt_logs.stamp()
    first = sum(name.begun == begun for _, name in _workers.values())
    if not known:
        threading.Thread(target=attempt_logs.prune, args=(_own.folder,), daemon=True, name="old logs").start()
    new = [worker for worker in workers if worker._actor_id.hex() not in _workers]
    for number, worker in enumerate(new, first):
        name = LogName(begun, f"{number:04d}")
        _workers[worker._actor_id.hex()] = (_own.folder, name)
        worker.observe.remote(_own.folder, name)


def write() -> None:
    """Write what this process's log has not in storage yet."""
    if _own is not None:
        _own.write()


def close() -> None:
    """Write the rest of this process's log, which ends."""
    if _own is not None:
        _own.close()


def collect(workers: Sequence[Any]) -> None:
    """Let the workers of a failed attempt write the rest of their logs; store the end of the log of each that cannot."""
    with contextlib.suppress(Exception):  # the attempt's own failure is raised, not that of its logs
        _collect([worker for worker in workers if worker._actor_id.hex() in _workers])


def _collect(workers: Sequence[Any]) -> None:
    kept = [worker for worker in workers if ray_state.actors(worker._actor_id.hex()).get("Pid")]
    if not kept:
        return  # `ray.wait` refuses none
    calls = [worker.write_log.remote() for worker in kept]
    answered, _ = ray.wait(calls, num_returns=len(calls), timeout=ANSWER_S)
    dead = [worker for worker, call in zip(kept, calls, strict=True) if call not in answered or not _succeeded(call)]
    with ThreadPoolExecutor(16, "dead logs") as pool:
        list(pool.map(_rescue, [worker._actor_id.hex() for worker in dead]))


def _succeeded(call: Any) -> bool:
    try:
        ray.get(call)
    except ray.exceptions.RayError:
        return False
    return True


def _rescue(actor: str) -> None:
    """Store the last lines of a dead worker's output next to what it has stored itself, if its node still has them."""
    folder, name = _workers[actor]
    outputs = {}
    for suffix in ("out", "err"):
        excerpt = Excerpt()
        with contextlib.suppress(Exception):  # a node that is gone, or a state API that does not answer
            for chunk in get_log(actor_id=actor, suffix=suffix, tail=RESCUED_LINES, timeout=int(ANSWER_S)):
                excerpt.add(chunk.encode())
        outputs[suffix] = excerpt.text()
    facts = context.facts | {"worker": int(name.process), "stored_by": "its driver, after its end"}
    if any(outputs.values()):
        with contextlib.suppress(Exception):
            folder.write(str(name._replace(process=f"{name.process}-end")), attempt_logs.to_bytes(facts, outputs))
