"""Lines of a job's log: what is written is read, by its sweep and by people; and a sweep whose terminal gets JSON."""

import io
import json
import logging
import re

import pytest

from dis_scale.process import jsonlog
from dis_scale.process.context import Context
from dis_scale.process.errors import UserError
from dis_scale.process.jsonlog import JsonLines
from pipelines import lines
from pipelines.lines import Log
from pipelines.stage import ToSweep
from tests.support.commands import invoke, replace_sweep

RANK = Context(sweep="tiny", stage="train", model="dit", attempt=3, rank=1)


def written(context: Context = RANK) -> tuple[Log, list[str]]:
    """Return a log and the lines that it writes."""
    output = list[str]()
    return Log(context, output.append), output


def test_what_is_written_is_read() -> None:
    log, output = written()
    log.say("dit: attempt 1")
    log.progress(80, 320, "images")
    log.emit("restart", done=640)
    log.fail("no space left")
    message, progress, event, error = [line for line in map(lines.parse, output) if line]
    assert (message.kind, message.text) == ("message", "dit: attempt 1")
    assert (progress.kind, progress.facts["done"], progress.facts["total"]) == ("progress", 80, 320)
    assert (event.kind, event.facts["event"], event.facts["done"]) == ("event", "restart", 640)
    assert (error.kind, error.text) == ("error", "no space left")


@pytest.mark.parametrize(
    "other",
    [
        "NCCL INFO of somebody else",
        '{"kind": "mes{"kind": "message"}',
        '{"kind": "else"}',
        jsonlog.entry(RANK, "progress", "info", done="x", total=3, unit="images"),
    ],
)
def test_other_lines_are_of_nobody(other: str) -> None:
    assert lines.parse(other) is None


def test_a_line_has_the_context_of_its_process() -> None:
    log, output = written()
    log.say("skipped", level="warning")
    log.emit("skip", images=320)
    log.progress(160, 321, "images")
    message, event, progress = map(json.loads, output)
    known = {"sweep": "tiny", "stage": "train", "model": "dit", "attempt": 3, "rank": 1, "images": None}
    assert {name: message[name] for name in known} == known
    assert (message["level"], message["message"]) == ("warning", "skipped")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", message["time"])
    assert (event["event"], event["images"], event["attempt"]) == ("skip", 320, 3)
    assert progress["kind"] == "progress"
    assert output[2].encode().startswith(lines.PROGRESS), "stored logs leave it out"


def test_progress_is_logged_when_it_changes_and_not_too_often() -> None:
    log, output = written()
    for done in (80, 80, 96, 320, 320):
        log.progress(done, 320, "images")
    assert [json.loads(line)["done"] for line in output] == [80, 320]
    log.repeat_progress()
    assert len(output) == 2
    log.repeat_progress(every_s=0.0)
    assert json.loads(output[2])["done"] == 320, "whoever reads it sees that an idle stage lives"


def test_people_read_words() -> None:
    log, output = written()
    log.say("dit: caf\u00e9 {x}", level="warning")
    log.emit("restart", done=640)
    log.fail("no space left")
    log.say("one\n00:00:00  error: forged\x1b[2J")
    text = lines.readable("".join(f"{line}\n" for line in [*output, "NCCL INFO of somebody else\x1b"]))
    assert re.sub(r"\d\d:\d\d:\d\d", "TIME", text).splitlines() == [
        "TIME  warning: rank 1: dit: caf\u00e9 {x}", "TIME  rank 1: restart done=640", "TIME  error: rank 1: no space left",
        "TIME  rank 1: one", r"  TIME  error: forged\x1b[2J", r"NCCL INFO of somebody else\x1b",
    ]  # fmt: skip


def test_a_context_goes_to_a_jobs_processes_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in RANK.variable().items():
        monkeypatch.setenv(name, value)
    assert Context.from_environment() == RANK


def test_a_warning_of_a_module_keeps_its_level() -> None:
    log, output = written()
    ToSweep(log).emit(logging.LogRecord("dis_scale.tracking", logging.WARNING, "", 0, "MLflow is %s", ("away",), None))
    (shown,) = map(json.loads, output)
    assert (shown["level"], shown["message"]) == ("warning", "MLflow is away")


def test_other_output_becomes_messages_line_by_line() -> None:
    out = io.StringIO()
    file = JsonLines(out, Context())
    for text in ("a ta", "ble\n\n", "of two lines\n"):
        file.write(text)
    assert [json.loads(line)["message"] for line in out.getvalue().splitlines()] == ["a table", "of two lines"]


def test_an_error_of_the_command_is_json_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(jsonlog.VARIABLE, "json")
    replace_sweep(monkeypatch, UserError("an impossible setting"))
    code, output = invoke("sweep")
    assert code == 2
    last = [json.loads(line) for line in output.splitlines()][-1]
    assert (last["message"], last["sweep"]) == ("an impossible setting", "digits")
    monkeypatch.setenv(jsonlog.VARIABLE, "yaml")
    assert invoke("sweep") == (2, "error: DIS_SCALE_LOG=yaml: expected json, or lines (the default)\n")
