"""Workers on Ray: the base class of all actors, and the resources that they ask for. Read next: watching.py.

These are plain actors in a placement group rather than Ray Train's. The driver forwards stop requests to its workers, which Ray
does not. Each attempt may have another world size. A killed worker is noticed within 60 ms and replaced in seconds; Ray Train's
controller takes ten.
"""

import faulthandler
import math
import queue
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ray

from dis_scale.process.context import Context
from dis_scale.process.errors import Preempted
from dis_scale.process.threads import taken
from dis_scale.storage.folder import Folder
from dis_scale.tracking.attempt_logs import KeptLog, LogName
from pipelines import nodes, ray_private
from pipelines.lines import Log
from pipelines.metrics import Exporter
from pipelines.ray_private import Resources, actor_id
from pipelines.stage import StageJob
from pipelines.waiting import capacity


class Worker:
    """Base class of all actors: work runs in one thread; `stop`, `poll` and `stacks` are served by others."""

    def __init__(self) -> None:
        self.context = Context.from_environment()
        self._stop_by: float | None = None
        self._done = 0
        self._lines = queue.SimpleQueue[str]()
        self._log = Log(self.context, self._lines.put)
        self._kept: KeptLog | None = None

    # Called by the driver.

    def stop(self, left_s: float = math.inf) -> None:
        """Request a stop; the worker has this long to save."""
        self._stop_by = min(time.monotonic() + left_s, self._stop_by or math.inf)

    def poll(self) -> tuple[int, list[str]]:
        """Return the progress, and the lines logged since the last poll."""
        return self._done, list(taken(self._lines))

    def observe(self, folder: Folder, name: LogName) -> None:
        """Keep this process's log in storage, and export its metrics, from now on."""
        self._kept = KeptLog(folder, name, self.context)
        Exporter(self.context).start()

    def write_log(self, begun: None) -> None:  # noqa: ARG002  # Ray calls this once `observe` has returned it
        """Write what the log in storage does not have yet."""
        assert self._kept is not None
        self._kept.write()

    def stacks(self) -> str:
        """Return the stack of each thread."""
        with tempfile.TemporaryFile("w+") as file:
            faulthandler.dump_traceback(file)
            file.seek(0)
            return file.read()

    def log_stacks(self) -> str:
        """Return the stacks, and print them for this worker's log: the driver's log has room for a few workers only."""
        print(f"stacks of this worker:\n{(stacks := self.stacks())}", flush=True)
        return stacks

    # Called by the work.

    def report(self, done: int) -> None:
        """Set the progress."""
        self._done = done

    def log(self, text: str) -> None:
        """Show a message in the sweep."""
        self._log.say(text)

    def emit(self, name: str, **facts: Any) -> None:
        """Log an event."""
        self._log.emit(name, **facts)

    def stop_by(self) -> float | None:
        """Return when it must have stopped, by its monotonic clock; None while no stop is requested."""
        return self._stop_by

    def stop_requested(self) -> bool:
        return self._stop_by is not None

    def raise_if_stopped(self, left: str) -> None:
        """Raise Preempted if a stop was requested; `left` says what a rerun repeats."""
        if self.stop_requested():
            raise Preempted(f"stopped as requested; {left}")


@dataclass(frozen=True)
class Request:
    """What one worker asks of Ray: resources by name, none of amount 0, and further options, such as the node to run on."""

    amounts: Resources
    options: Mapping[str, object] = field(default_factory=dict)

    def named(self) -> Resources:
        """Return the resources that a stage's nodes declare."""
        return {name: amount for name, amount in self.amounts.items() if name not in ("CPU", "GPU", "memory")}

    @property
    def node(self) -> str | None:
        """Id of the one node that it is for, if any."""
        return getattr(self.options.get("scheduling_strategy"), "node_id", None)

    def on(self, **options: object) -> "Request":
        """Return the request with further options."""
        return replace(self, options={**self.options, **options})


def request_for(name: str, device: str, cpus: float, known: Sequence[Resources] | None = None) -> Request:
    """Return one worker's request: a GPU if it computes on one, and the stage's named resource if a node for it declares that.

    `known`: all nodes that the cluster has had (default: asked of Ray). A stage's own nodes may be away, and what others declare
    is for other stages.
    """
    gpus = 1 if device == "cuda" else 0
    known = ray_private.known_nodes() if known is None else known
    declared = any(name in node for node in known if node.get("GPU", 0) >= gpus)
    every = {"CPU": cpus, "GPU": gpus, name: int(declared)}
    return Request({name: amount for name, amount in every.items() if amount})


def elsewhere(job: StageJob, request: Request) -> Request:
    """Return the request on nodes other than those whose devices failed, if these other nodes hold one such worker."""
    living = nodes.living()

    def enough(bad: Collection[str]) -> bool:
        return capacity(request.amounts, [node.resources for node in living if node.id not in bad]) > 0

    bad = nodes.excluded(job, living, enough)
    return request.on(label_selector=nodes.avoiding(bad)) if bad else request


def spawn(job: StageJob, kind: type[Worker], request: Request, *arguments: Any) -> Any:
    """Return a worker as a Ray actor; its work, `poll` and `stop` run in threads of their own."""
    cpus, gpus, memory = (request.amounts.get(name, 0) for name in ("CPU", "GPU", "memory"))
    options = {"num_cpus": cpus, "num_gpus": gpus, "memory": memory, "resources": request.named(), **request.options}
    worker = ray.remote(max_concurrency=4)(kind).options(**options).remote(*arguments)
    job.requests[actor_id(worker)] = request.amounts
    return worker
