"""Ray's job API: submit a stage or join its running job, read its lines, stop it.

A running job's log is followed through a websocket, so each line is sent once. After days a log has a hundred megabytes, and Ray's
`get_job_logs` sends all of it. It is called once, for the end of the log: the websocket ends two seconds after the job.

Pitfalls: a job's driver has 3 s between SIGTERM and SIGKILL unless RAY_JOB_STOP_WAIT_TIME_S is in its environment; an id stays
taken after its job has ended; a child job without a runtime environment runs in the cluster's own folder, on other code.
"""

import asyncio
import contextlib
import hashlib
import os
import queue
import shlex
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import ray
from ray.exceptions import AuthenticationError, RayError
from ray.job_submission import JobDetails, JobStatus

from dis_scale.process.context import Context
from dis_scale.process.errors import UNFORESEEN, DisScaleError, Held, Preempted, StorageAway, UserError
from dis_scale.process.threads import taken
from dis_scale.sweep import Sweep
from pipelines import lines
from pipelines.cluster import Cluster, client_of, own_job, ray_address
from pipelines.environment import EXPANDABLE_SEGMENTS, KEEP_FREED_MEMORY, PASSIVE
from pipelines.silence import SILENT_S, Silence, Unanswered

ENDED = {JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED}
FINAL = "DIS_SCALE_FAILED_IS_FINAL"
"""Environment variable. If set, an error that another cluster would only repeat ends the sweep's job as stopped, not as failed."""
RAY_ACCIDENTS = {
    *(f"JOB_SUPERVISOR_ACTOR_{what}" for what in ("DIED", "START_TIMEOUT", "START_FAILURE", "UNSCHEDULABLE", "UNKNOWN_FAILURE")),
    "JOB_ENTRYPOINT_COMMAND_START_ERROR", "RUNTIME_ENV_SETUP_FAILURE",
}  # fmt: skip
"""Ray's names for the accidents of the actor that starts a job's process and watches it, and of a node that cannot start it."""
STOP_WAIT_S = 30.0
STOP_ASKED_S = 20.0
"""Time for which Ray is asked to stop the jobs of a command that has no time to wait for their end."""
ASK_AGAIN_S = 0.3
LAST_LINES_S = 15.0
"""Time for which an ended job's last lines, with the reason of its end, are asked for. Only once: a stop waits meanwhile."""


@dataclass
class Job:
    """A stage's job; `ours` is false if another command submitted it and this one only reads its log."""

    cluster: Cluster
    id: str
    ours: bool
    silence: Silence = field(default_factory=Silence)
    reconnect_every_s: float = 2.0
    log_silent_s: float = 2 * lines.IDLE_EVERY_S
    """Time without a new line after which the log is asked for again: a connection to a node that is gone stays open for ever."""
    _info: JobDetails | None = None
    """Ray's last answer about the job."""
    _returned: int = 0
    """Characters of the log whose lines were returned."""
    _received: int = 0
    """Characters of the log that followers received."""
    _chunks: queue.SimpleQueue[str] = field(default_factory=queue.SimpleQueue)
    _partial: str = ""
    _follower: threading.Thread | None = None
    _followed_s: float = 0.0
    _rest_over: bool = False
    """Whether the rest of an ended job's log was read, or is lost."""
    _heard: int = 0
    _in_vain: int = 0
    """Number of followers in a row that received nothing new."""
    _tail: list[str] = field(default_factory=list)

    @property
    def status(self) -> JobStatus:
        """Last known status."""
        return JobStatus.PENDING if self._info is None else JobStatus(self._info.status)

    def ended(self) -> bool:
        """Return whether the job has ended, by Ray's last answer; Unanswered if Ray has not answered for too long."""
        if self.status not in ENDED:
            self._info = self.silence.ask(lambda: self.cluster.client.get_job_info(self.id)) or self._info
        return self.status in ENDED

    def lines(self) -> list[str]:
        """Return the complete lines that the job has printed since the last call; all remaining ones once `ended` was true."""
        text = self._rest() if self.status in ENDED else self._partial + self._new()
        end = text.rfind("\n") + 1
        new, self._partial = text[:end].splitlines(), text[end:]
        self._returned += end
        self._tail = (self._tail + new)[-30:]
        return new

    def _rest(self) -> str:
        until_s = self.silence.now_s() + LAST_LINES_S
        while not self._rest_over:
            try:
                rest = self.cluster.client.get_job_logs(self.id)[self._returned :]
            except (OSError, RuntimeError):  # an answer was lost, or its agent has gone
                if self.silence.now_s() > until_s:
                    self._rest_over = True
                    return self._partial + "".join(taken(self._chunks))  # which may have the reason of its end
                time.sleep(self.silence.pause_s)
            else:
                self._rest_over = True
                return rest
        return ""

    def _new(self) -> str:
        """Return the text that followers have received; start one if none is alive, for example since the job's agent was not up.

        Each follower gets the log from its beginning, so the pauses grow after several followers that received nothing new.
        """
        now_s = time.monotonic()
        if not (self._follower and self._follower.is_alive()) and now_s >= self._followed_s:
            self._in_vain = self._in_vain + 1 if self._heard == self._received else 0
            self._heard = self._received
            self._followed_s = now_s + self.reconnect_every_s * 2 ** min(max(0, self._in_vain - 5), 5)
            self._follower = threading.Thread(target=self._follow, daemon=True, name=f"log of {self.id}")
            self._follower.start()
        return "".join(taken(self._chunks))

    def _follow(self) -> None:
        with contextlib.suppress(RuntimeError, OSError, aiohttp.ClientError):
            asyncio.run(self._receive())

    async def _receive(self) -> None:
        """Receive the log from its beginning, and keep the part that no earlier follower received."""
        position, now_s = 0, asyncio.get_running_loop().time
        async with asyncio.timeout(self.log_silent_s) as silence:
            async for chunk in self.cluster.client.tail_job_logs(self.id):
                silence.reschedule(now_s() + self.log_silent_s)
                new = chunk[max(0, self._received - position) :]
                position += len(chunk)
                if new:
                    self._received += len(new)
                    self._chunks.put(new)

    def reason(self) -> str:
        """Return why a job ended: its own error line, otherwise Ray's message."""
        self.lines()
        errors = [line.text for line in map(lines.parse, self._tail) if line and line.kind == "error"]
        return errors[-1] if errors else ((self._info and self._info.message) or "no message").strip()

    @property
    def killed(self) -> bool:
        """Whether it failed without an error line: its process was killed, or Ray could not start or watch it.

        Also if it ended by an error that is no DisScaleError and may pass (stage.py), such as that of a Ray that was busy at its
        start; or by a signal that Ray did not send: a stop request goes through Ray, which then reports the job as stopped.
        """
        code, lost = self._info and self._info.driver_exit_code, self._info and self._info.error_type in RAY_ACCIDENTS
        if code == UNFORESEEN or (code == Preempted.exit_code and self.status == JobStatus.FAILED):
            return True
        if self.status != JobStatus.FAILED or any(line and line.kind == "error" for line in map(lines.parse, self._tail)):
            return False
        return bool(lost) or (code is not None and not 0 <= code < 128)

    def error(self, words: str) -> DisScaleError:
        """Return the error of a job that ended: a mistake, a stop, a refusal and storage that is away keep their exit codes."""
        code = self._info and self._info.driver_exit_code
        every = (UserError, Preempted, Held, StorageAway)
        kinds: dict[int | None, type[DisScaleError]] = {kind.exit_code: kind for kind in every}
        stopped = self.status == JobStatus.STOPPED  # by `dis-scale stop` or `ray job stop`, in time or not
        return Preempted(words) if stopped else kinds.get(code, DisScaleError)(words)

    def stop(self) -> bool:
        """Ask Ray to stop the job; return whether it does."""
        return stops(self.cluster.client, self.id)


def stops(client: Any, job: str) -> bool:
    """Ask Ray to stop a job; return whether Ray stops it or it has ended. False if it is about to begin, or if no answer comes."""
    with contextlib.suppress(RuntimeError, OSError):
        return client.stop_job(job) is not False or JobStatus(client.get_job_info(job).status) in ENDED
    return False


def submit(cluster: Cluster, sweep: Sweep, stage: str, *arguments: str) -> Job:
    """Submit the stage's next attempt, or join the one that runs. OSError, RuntimeError or Unanswered if no answer comes.

    If several processes submit an id, Ray admits one of them and the others join its job. An id is never used again.
    """
    prefix = "-".join([prefix_of(sweep), stage, *arguments])
    attempts = {
        int(job.submission_id.rsplit("-", 1)[1]): job
        for job in cluster.client.list_jobs()
        if job.submission_id and job.submission_id.rpartition("-")[0] == prefix
    }
    last = max(attempts, default=0)
    if last and attempts[last].status not in ENDED:
        name = f"{prefix}-{last}"
        return Job(cluster, name, ours=name in cluster.unanswered)
    command = [sys.executable, "-m", "pipelines", stage, sweep.folder.url, *arguments]
    context = Context(sweep.folder.name, stage, arguments[0] if arguments else None, folder=prefix_of(sweep))
    return submit_new(cluster, f"{prefix}-{last + 1}", command, _environment(cluster, sweep) | context.variable())


def _environment(cluster: Cluster, sweep: Sweep) -> dict[str, str]:
    """Return the variables that a job's processes read when they start."""
    job = {"RAY_JOB_STOP_WAIT_TIME_S": str(int(sweep.recipe.grace_s)), "PYTHONUNBUFFERED": "1"}
    return KEEP_FREED_MEMORY | EXPANDABLE_SEGMENTS | PASSIVE | cluster.runtime_env.get("env_vars", {}) | job


def submit_new(cluster: Cluster, name: str, command: list[str], environment: dict[str, str]) -> Job:
    """Submit a job; `ours` is false if another process submitted it first. Unanswered if no answer comes: ask again."""
    try:
        cluster.client.submit_job(
            entrypoint=shlex.join(command), submission_id=name, runtime_env=cluster.runtime_env | {"env_vars": environment}
        )
        return Job(cluster, name, ours=True)
    except (RuntimeError, ValueError, OSError) as error:
        if f"{name} already exists" in str(error):
            return Job(cluster, name, ours=name in cluster.unanswered)
        why = f"Ray did not take the job {name}: {' '.join(str(error).split())[:300]}"
        if "No available agent" in str(error):  # of a Ray that has just started, or whose machine is busy
            raise Unanswered(why) from error
        # a connection's error (of the library requests) or a gateway's: Ray may have accepted the job
        if isinstance(error, OSError) or "status code 5" in str(error):
            cluster.unanswered.add(name)
            raise Unanswered(why) from error
        raise DisScaleError(why) from error


def prefix_of(sweep: Sweep) -> str:
    """Return the prefix of the ids of a sweep's jobs. A local folder counts by its real path, so that any path to it finds them."""
    local = sweep.folder.local
    where = str(local.resolve()) if local else sweep.folder.url
    return f"{where.rpartition('/')[2]}-{hashlib.sha256(where.encode()).hexdigest()[:8]}"


def end_own_job(
    exit_code: int, connect: Callable[[None], Any] = client_of, wait_s: float = STOP_WAIT_S, silent_s: float = SILENT_S
) -> int:
    """Let a sweep's Ray job that ends with this exit code count as stopped, if a failure would only be repeated.

    Returns the exit code for this process: 0 after a stop request, since a dashboard that does not answer stops no job.

    KubeRay starts a new cluster for a job that FAILED, up to backoffLimit times, but none for one that was STOPPED. A stop request
    is never a failure. If `FINAL` is set, neither is a user's mistake or a finished failure. The others are repeated: storage
    that is away may be back by the next attempt; a lease may be free, since the scheduler may take a living head for lost; and an
    unforeseen error may be an accident of this machine.
    """
    own, stopped = own_job(), exit_code == Preempted.exit_code
    final = FINAL in os.environ and exit_code not in (StorageAway.exit_code, Held.exit_code, UNFORESEEN)
    if own is None or not (stopped or final):
        return exit_code
    ray.shutdown()  # sends the last metrics: a job that Ray stops has no time for this
    # Nothing else waits. A process that Ray stops has a minute.
    with contextlib.suppress(Unanswered):
        Silence(lambda _: None, silent_s, ASK_AGAIN_S).insist(lambda: connect(None).stop_job(own) or True, lambda: None)
        time.sleep(wait_s)  # Ray ends this process; if it ended by itself, its job would have failed
    return 0 if stopped else exit_code


def stop_jobs(jobs: list[Job], wait_s: float, asked_s: float = STOP_ASKED_S) -> list[Job]:
    """Ask Ray to stop the running jobs, wait up to `wait_s` for their end, and return the jobs that Ray does not stop.

    Ray is asked for each job until it answers, or until `asked_s` and `wait_s` are over. It is asked for all jobs at the same time:
    a dashboard that does not answer takes ten seconds for each question.
    """
    began_s = time.monotonic()
    unasked = running = [job for job in jobs if job.status not in ENDED]
    with ThreadPoolExecutor(max(1, len(running))) as pool, contextlib.suppress(Unanswered):

        def still_unasked(jobs: list[Job]) -> list[Job]:
            return [job for job, answered in zip(jobs, pool.map(lambda job: job.stop(), jobs), strict=True) if not answered]

        unasked = still_unasked(running)
        while (unasked and time.monotonic() < began_s + asked_s) or (
            time.monotonic() < began_s + wait_s and not all(job.ended() for job in running)
        ):
            time.sleep(ASK_AGAIN_S)
            unasked = still_unasked(unasked)
    return unasked


class NoRay(UserError):
    """No Ray is at an address."""


def stop_all(sweep: Sweep, address: str | None, connect: Callable[[str | None], Any] = client_of) -> list[str]:
    """Ask Ray to stop every running job of the sweep, whoever submitted it; return their ids. Unanswered if an answer is lost.

    NoRay if no Ray answers at the address.
    """
    try:
        client = connect(address)
        running = [job.submission_id for job in client.list_jobs() if job.status not in ENDED and job.submission_id]
    except AuthenticationError as error:
        raise UserError(
            f"the Ray at {address or ray_address()} refuses this process: if another user started it, only they can stop it; "
            "for a cluster, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
        ) from error
    except (OSError, RuntimeError, ValueError, RayError) as error:
        where = address or ray_address() or "this machine"
        raise NoRay(f"no Ray answers at {where}: has the sweep ended already? (--address names another)") from error
    ours = [job for job in running if job.startswith(f"{prefix_of(sweep)}-")]
    if unasked := [job for job in ours if not stops(client, job)]:
        raise Unanswered(f"Ray did not answer when it was asked to stop {', '.join(unasked)}: run the command again")
    return ours
