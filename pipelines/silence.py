"""Ray's dashboard does not answer: it is asked again for a while, which is logged once; then this is a failure that is retried."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from ray.exceptions import RpcError

from dis_scale.process.errors import DisScaleError, StorageAway

T = TypeVar("T")
SILENT_S = 900.0
"""Time after which a dashboard that does not answer ends the sweep, by an error that is tried again."""


class Unanswered(DisScaleError):
    """Ray's dashboard did not answer. A later attempt may succeed, on this cluster or on another."""

    exit_code = StorageAway.exit_code


class RayEnded(Unanswered):
    """The Ray that this command started for itself has ended, or answers no more. Another one can take its place."""


class NotStarted(DisScaleError):
    """A local Ray did not start. If earlier ones did, the next one may."""


@dataclass
class Silence:
    """Time for which Ray's dashboard has not answered: a silence is logged once, and an error is raised after `most_s`."""

    say: Callable[[str], None] = print
    most_s: float = SILENT_S
    pause_s: float = 0.5
    """Pause before `insist` asks again."""
    now_s: Callable[[], float] = time.monotonic
    require_alive: Callable[[], None] = lambda: None
    """Raises `RayEnded` if no answer can come."""
    error: type[Unanswered] = Unanswered
    """Error that is raised after `most_s`."""
    _since_s: float | None = None
    _lost_s: float = 0.0
    """Time of the last question without an answer."""

    def ask(self, call: Callable[[], T]) -> T | None:
        """Return the answer of a call to Ray's client; None if none came. Unanswered if none has come for too long."""
        try:
            answer = call()
        except (RuntimeError, OSError, RpcError, Unanswered) as error:  # a RuntimeError also says that a job is gone
            self._note(" ".join(str(error).split())[:200])
            return None
        if self._since_s is not None:
            self.say(f"Ray's dashboard answers again, after {self.now_s() - self._since_s:.0f} s")
            self._since_s = None
        return answer

    def insist(self, call: Callable[[], T], between: Callable[[], None]) -> T:
        """Repeat a call until it has an answer, and return it; None is no answer. `between` may end the repetition by an error."""
        while (answer := self.ask(call)) is None:
            between()
            time.sleep(self.pause_s)
        return answer

    def _note(self, why: str) -> None:
        self.require_alive()
        lost_s, self._lost_s = self._lost_s, self.now_s()
        if self._since_s is None or self._lost_s - lost_s > SILENT_S:  # another silence: some questions are asked once in days
            self._since_s = self._lost_s
            self.say(f"waiting  Ray's dashboard does not answer; it is asked again for {self.most_s / 60:.0f} minutes: {why}")
        if (silent_s := self._lost_s - self._since_s) > self.most_s:
            raise self.error(f"Ray's dashboard has not answered for {silent_s:.0f} s: {why}")
