"""The logs of a job's processes in storage: a living process writes its log, the driver writes the end of a dead process's log.

Ray keeps the output of a process on its node, in files that outlive the process but not the node. So each process writes its log to
storage every few seconds. The last lines of a dead process, such as the stacks of a crash, are read by the driver from the node, if
that is alive.
"""

import contextlib
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
from ray.util.state import get_log

from dis_scale.process.context import Context
from dis_scale.storage.folder import Folder, open_folder
from dis_scale.sweep import Sweep
from dis_scale.tracking import attempt_logs
from dis_scale.tracking.attempt_logs import DRIVER, KeptLog, LogName
from pipelines import lines
from pipelines.failures import failure_of
from pipelines.ray_private import actor_id, has_process

ANSWER_S = 10.0
"""Time for a worker to write the rest of its log, and for Ray to send a dead one's."""
RESCUED_LINES = 2000


class JobLogs:
    """Logs of a stage's job in `folder`: this driver's log and its workers' logs. Without a folder no log is kept."""

    def __init__(self, folder: Folder | None, context: Context) -> None:
        self._folder, self._context = folder, context
        self._names: dict[str, LogName] = {}
        """The log of each worker by its actor's id."""
        self._begun: dict[str, ray.ObjectRef[None]] = {}
        """The call by which each worker begins its log: calls of one worker run in several threads, in any order."""
        self._own: KeptLog | None = None

    @classmethod
    def of(cls, sweep: Sweep, context: Context) -> "JobLogs":
        """Return the logs of a stage's job, and keep this driver's from now on."""
        if context.stage is None:
            return cls(None, context)
        # opened again, since the sweep's folder retries for minutes, and no log is worth that wait
        folder = open_folder(sweep.logs(context.stage, context.model).url)
        logs = cls(folder, context)
        attempt_logs.prune(folder)
        logs._own = KeptLog(folder, LogName(attempt_logs.stamp(), DRIVER), context, without=lines.PROGRESS)
        return logs

    def keep_workers(self, workers: Sequence[Any]) -> None:
        """Let each worker keep its log. The workers of a new attempt are numbered in this order, which is the rank in training.

        A worker that replaces a lost one gets the next number of the attempt to which the other workers belong.
        """
        new = [worker for worker in workers if actor_id(worker) not in self._names]
        if self._folder is None or not new:
            return
        known = [name.begun for worker in workers if (name := self._names.get(actor_id(worker)))]
        begun = max(known) if known else attempt_logs.stamp()
        first = sum(name.begun == begun for name in self._names.values())
        if not known:
            threading.Thread(target=attempt_logs.prune, args=(self._folder,), daemon=True, name="old logs").start()
        for number, worker in enumerate(new, first):
            self._names[actor_id(worker)] = name = LogName(begun, f"{number:04d}")
            self._begun[actor_id(worker)] = worker.observe.remote(self._folder, name)

    def collect(self, workers: Sequence[Any]) -> None:
        """Let the workers of a failed attempt write the rest of their logs; store the end of the log of each that cannot."""
        with contextlib.suppress(Exception):  # the attempt's own failure is raised, not that of its logs
            known = [worker for worker in workers if actor_id(worker) in self._names and has_process(worker)]
            if not known:
                return  # `ray.wait` refuses an empty list
            calls = [worker.write_log.remote(self._begun[actor_id(worker)]) for worker in known]
            answered, _ = ray.wait(calls, num_returns=len(calls), timeout=ANSWER_S)
            pairs = zip(known, calls, strict=True)
            dead = [actor_id(worker) for worker, call in pairs if call not in answered or failure_of(call)]
            with ThreadPoolExecutor(16, "dead logs") as pool:
                list(pool.map(self._rescue, dead))

    def close(self) -> None:
        """Write the rest of this driver's log, which ends."""
        if self._own is not None:
            self._own.close()

    def _rescue(self, actor: str) -> None:
        """Store the last lines of a dead worker's output next to what it has stored itself, if its node still has them."""
        assert self._folder is not None
        name = self._names[actor]
        outputs = {suffix: _last_lines(actor, suffix) for suffix in ("out", "err")}
        facts = self._context.known() | {"worker": int(name.process), "stored_by": "its driver, after its end"}
        if any(outputs.values()):
            with contextlib.suppress(Exception):
                end = name._replace(process=f"{name.process}-end")
                self._folder.write(str(end), attempt_logs.to_bytes(facts, outputs))


def _last_lines(actor: str, suffix: str) -> str:
    """Return the end of an actor's output; empty if its node is gone, or if Ray's state API does not answer."""
    text = ""
    with contextlib.suppress(Exception):
        for chunk in get_log(actor_id=actor, suffix=suffix, tail=RESCUED_LINES, timeout=int(ANSWER_S)):
            text += chunk
    return attempt_logs.last_lines(text.encode()).decode(errors="replace")
