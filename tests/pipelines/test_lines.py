"""Lines of a job's log: what is written is read, in both forms; and a sweep whose log is JSON."""

import io
import json
import logging
import re

import pytest

from dis_scale.process import context, jsonlog
from dis_scale.process.errors import UserError
from dis_scale.process.jsonlog import JsonLines
from pipelines import lines, stage
from tests.cli.test_cli import fail_with, invoke


@pytest.mark.parametrize("form", ["lines", "json"])
def test_what_is_written_is_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    monkeypatch.setenv(jsonlog.VARIABLE, form)
    monkeypatch.setattr(lines, "_last_progress", (-1, -1, 0.0))
    lines.say("dit: attempt 1")
    lines.progress(80, 320, "images")
    lines.emit("restart", done=640)
    lines.fail("no space left")
    print("NCCL INFO of somebody else")
    message, progress, event, error, other = map(lines.parse, capsys.readouterr().out.splitlines())
    assert message == ("message", "dit: attempt 1", {})
    assert progress == ("progress", "", {"done": 80, "total": 320, "unit": "images"})
    assert event
    assert (event.facts["event"], event.facts["done"]) == ("restart", 640)
    assert error == ("error", "no space left", {})
    assert other is None


def test_a_json_line_has_the_facts_of_its_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(jsonlog.VARIABLE, "json")
    monkeypatch.setattr(lines, "_last_progress", (-1, -1, 0.0))
    monkeypatch.setattr(context, "facts", {"sweep": "tiny", "stage": "train", "model": "dit", "attempt": 3, "rank": 1})
    lines.say("skipped", level="warning")
    lines.emit("skip", images=320)
    lines.progress(160, 321, "images")
    message, event, progress = map(json.loads, output := capsys.readouterr().out.splitlines())
    known = {"sweep": "tiny", "stage": "train", "model": "dit", "attempt": 3, "rank": 1, "images": None}
    assert {name: message[name] for name in known} == known
    assert (message["level"], message["message"]) == ("warning", "skipped")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", message["time"])
    assert (event["event"], event["images"], event["attempt"]) == ("skip", 320, 3)
    assert progress["kind"] == "progress"
    assert output[2].encode().startswith(lines.PROGRESS), "stored logs leave it out"


def test_a_warning_of_a_module_keeps_its_level(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(jsonlog.VARIABLE, "json")
    record = logging.LogRecord("dis_scale.tracking", logging.WARNING, "", 0, "MLflow is %s", ("away",), None)
    shown = json.loads(stage._Messages().format(record))
    assert (shown["level"], shown["message"]) == ("warning", "MLflow is away")


def test_other_output_becomes_messages_line_by_line() -> None:
    out = io.StringIO()
    file = JsonLines(out)
    for text in ("a ta", "ble\n\n", "of two lines\n"):
        file.write(text)
    assert [json.loads(line)["message"] for line in out.getvalue().splitlines()] == ["a table", "of two lines"]


def test_an_error_of_the_command_is_json_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(jsonlog.VARIABLE, "json")
    fail_with(monkeypatch, UserError("an impossible setting"))
    code, output = invoke("sweep")
    assert code == 2
    assert [json.loads(line)["message"] for line in output.splitlines()][-1] == "an impossible setting"
    monkeypatch.setenv(jsonlog.VARIABLE, "yaml")
    assert invoke("sweep") == (2, "error: DIS_SCALE_LOG=yaml: expected json, or lines (the default)\n")
