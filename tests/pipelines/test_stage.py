"""The handlers of signals in a stage, and storage that is away when one begins."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dis_scale.process import jsonlog
from dis_scale.process.context import Context
from dis_scale.process.errors import Preempted, StorageAway
from dis_scale.recipe import Recipe
from dis_scale.sweep import Sweep
from pipelines import lines, stage
from pipelines.lines import Log
from pipelines.signals import Stop
from tests.support.evaluations import sweep_at


def test_handlers_of_signals_stay_ours() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stage.keeping_handlers():
        signal.signal(signal.SIGTERM, lambda *_: None)
    assert signal.getsignal(signal.SIGTERM) == before


def test_what_an_error_quotes_is_no_line_of_the_protocol() -> None:
    """An image's name may have the end of a line in it, and a sequence that a terminal obeys."""
    forged = jsonlog.entry(Context(), "message", "info", message="everything is fine")
    code = (
        "import sys; from dis_scale.process.context import Context; from pipelines import lines, logs, stage\n"
        "stage._exit_with(KeyError(Exception(sys.argv[1])), lines.Log(Context()), logs.JobLogs(None, Context()))"
    )
    done = subprocess.run([sys.executable, "-c", code, f"x\n{forged}\x1b[2J"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "everything is fine" in done.stdout
    assert "\x1b" not in done.stdout
    assert [line.kind for line in map(lines.parse, done.stdout.splitlines()) if line] == ["error"]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        ("ConnectionError('Failed to connect to Ray cluster')", 70),
        ('RuntimeError("can\'t start new thread")', 70),
        ("KeyError(1)", 1),
    ],
)
def test_an_accident_of_a_jobs_first_second_is_tried_again(error: str, code: int) -> None:
    """Ray is joined before any attempt begins: prepare would end the sweep by it, and training a model."""
    program = (
        "from dis_scale.process.context import Context; from pipelines import lines, logs, stage\n"
        f"stage._exit_with({error}, lines.Log(Context()), logs.JobLogs(None, Context()))"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=False).returncode == code


def test_what_is_left_of_the_grace_period_counts_from_the_signal(tiny: Recipe, tmp_path: Path) -> None:
    """Ray kills after it, whenever the loop comes to see that a stop was requested; a second signal gives no more time."""
    job = stage.StageJob(sweep_at(tmp_path, "tiny", tiny))
    assert job.grace_left_s() == tiny.grace_s
    job.stop.set()
    began_s = job.stop.at_s
    time.sleep(0.2)
    job.stop.set()
    assert job.stop.at_s == began_s
    assert tiny.grace_s - 20 < job.grace_left_s() <= tiny.grace_s - 0.2


class Hurried(Stop):
    """Its pauses take no time."""

    def pause(self, seconds: float) -> None:
        pass


def test_a_stage_that_begins_while_storage_is_away_waits_for_it(
    tiny: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For as long as a stage that has begun: a job that ended by it would end all others. A stop request ends the wait."""
    sweep, answers = (sweep_at(tmp_path, "tiny", tiny), [StorageAway("503"), StorageAway("503"), None, *[StorageAway("503")] * 9])
    said, stop = list[str](), Hurried()

    def opened(url: str, patient: bool) -> Sweep:
        if answer := answers.pop(0):
            raise answer
        return sweep

    monkeypatch.setattr(Sweep, "open", opened)
    log = Log(Context(), said.append)
    assert stage._opened(sweep.folder.url, log, stop) is sweep
    assert len(said) == 1
    stop.set()
    with pytest.raises(Preempted):
        stage._opened(sweep.folder.url, log, stop)
    monkeypatch.setattr(stage, "STORAGE_AWAY_S", 0.0)
    with pytest.raises(StorageAway):
        stage._opened(sweep.folder.url, log, Hurried())
