"""Logs of attempts in storage: bounded, there after a kill, without secrets, and never a reason to stop."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dis_scale.process.context import Context
from dis_scale.process.errors import StorageError
from dis_scale.process.redaction import redact
from dis_scale.recipe import Recipe
from dis_scale.storage.folder import Folder, open_folder
from dis_scale.sweep import Sweep
from dis_scale.tracking import attempt_logs
from dis_scale.tracking.attempt_logs import HEAD_BYTES, TAIL_BYTES, LogName, excerpt
from pipelines.lines import Log, readable
from tests.support.commands import answer, invoke
from tests.support.waiting import wait_until

WRITES = """
import os, sys, time
from dis_scale.storage.folder import open_folder
from dis_scale.process.context import Context
from dis_scale.tracking import attempt_logs
from pipelines import lines
attempt_logs.WRITE_EVERY_S = 0.1
name, context = attempt_logs.LogName("20261121T183819", "0001"), Context.from_environment()
kept = attempt_logs.KeptLog(open_folder(sys.argv[1]), name, context, lines.PROGRESS)
lines.Log(context).progress(1, 2, "images")
os.write(1, b"NCCL WARN from C\\n")
os.write(2, b"the key is " + os.environ["STORE_SECRET"].encode() + b"\\n")
time.sleep(float(sys.argv[2]))
print("last words", flush=True)
kept.close()
"""


def start(folder: str | Path, seconds: float, tmp_path: Path) -> subprocess.Popen[bytes]:
    with (tmp_path / "worker.out").open("wb") as out, (tmp_path / "worker.err").open("wb") as err:
        return subprocess.Popen(
            [sys.executable, "-c", WRITES, str(folder), str(seconds)], stdout=out, stderr=err,
            env=os.environ | {"STORE_SECRET": "abc/def+1234", "DIS_SCALE_JOB": '{"stage": "train", "model": "dit"}'},
        )  # fmt: skip


def wait_for(folder: Folder, name: str) -> str:
    deadline = time.monotonic() + 60
    while not folder.exists(name):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.5)
    return folder.read(name).decode()


def test_what_a_process_wrote_is_there_after_its_kill(tmp_path: Path, store_url: str) -> None:
    process = start(store_url, 600, tmp_path)
    text = wait_for(open_folder(store_url), "20261121T183819-0001.log")
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert "NCCL WARN from C\n" in text
    assert "--- err ---\nthe key is ***\n" in text
    assert '"stage": "train", "model": "dit"' in text.splitlines()[0]
    assert "progress" not in text
    assert "abc/def" not in text


def test_two_files_of_one_suffix_are_both_kept(tmp_path: Path) -> None:
    """As a user's own redirection names them."""
    with (tmp_path / "out.log").open("wb") as out, (tmp_path / "err.log").open("wb") as err:
        subprocess.run(
            [sys.executable, "-c", WRITES, str(tmp_path / "kept"), "0"], stdout=out, stderr=err, check=True,
            env=os.environ | {"STORE_SECRET": "abc/def+1234"},
        )  # fmt: skip
    text = open_folder(tmp_path / "kept").read("20261121T183819-0001.log").decode()
    assert ("NCCL WARN from C" in text, "the key is ***" in text) == (True, True)


SILENT = """
import sys, time
from dis_scale.storage.folder import open_folder
from dis_scale.process.context import Context
from dis_scale.tracking import attempt_logs
attempt_logs.WRITE_EVERY_S = 0.1
context, folder = Context(), open_folder(sys.argv[1])
attempt_logs.KeptLog(folder, attempt_logs.LogName("20261121T183819", "0001"), context)
while not folder.list():
    time.sleep(0.05)
context.attempt, context.rank = 2, 1
time.sleep(600)
"""


def test_a_log_names_its_rank_although_the_process_is_silent(tmp_path: Path) -> None:
    with (tmp_path / "worker.out").open("wb") as out:
        process = subprocess.Popen([sys.executable, "-c", SILENT, str(tmp_path / "logs")], stdout=out, stderr=out)
    try:
        wait_until(lambda: '"attempt": 2, "rank": 1' in wait_for(open_folder(tmp_path / "logs"), "20261121T183819-0001.log"), 60)
    finally:
        process.kill()


def test_a_process_that_ends_writes_the_rest(tmp_path: Path) -> None:
    assert start(tmp_path / "logs", 0.0, tmp_path).wait(60) == 0
    assert "last words\n" in open_folder(tmp_path / "logs").read("20261121T183819-0001.log").decode()


def test_a_log_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("not a folder")
    assert start(tmp_path / "logs", 0.5, tmp_path).wait(60) == 0
    assert "last words" in (tmp_path / "worker.out").read_text()
    assert (tmp_path / "worker.err").read_text() == "the key is abc/def+1234\n"


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "worker.out"


def test_an_excerpt_has_the_first_and_the_last_lines(output: Path) -> None:
    output.write_text("".join(f"line {number}\n" for number in range(1_000_000)) + "unfinished")
    text = excerpt(output)
    assert text.startswith("line 0\nline 1\n")
    assert text.endswith("line 999999\nunfinished")
    assert "\n... lines are left out here ...\n" in text
    assert len(text) < HEAD_BYTES + TAIL_BYTES + 200
    numbers = [int(line.split()[1]) for line in text.splitlines() if line.startswith("line")]
    assert numbers == sorted(numbers)


@pytest.mark.parametrize("lines", [0, 1, 7000, 20_000], ids="{} lines".format)
def test_an_output_of_up_to_256_kib_is_complete(output: Path, lines: int) -> None:
    output.write_text(written := "".join(f"line {number}\n" for number in range(lines)))
    assert excerpt(output) == written


def test_lines_of_progress_are_left_out_and_leave_others_their_space(output: Path) -> None:
    progress = '{"kind": "progress", "done": 1}\n' * 10
    output.write_text("".join(f"message {number}\n{progress}" for number in range(10_000)))
    assert excerpt(output, (b'{"kind": "progress"',)).count("message") == 10_000


def test_a_line_without_an_end_is_bounded(output: Path) -> None:
    output.write_bytes(b"\r 12 %" * 1_000_000)
    assert len(excerpt(output)) < HEAD_BYTES + TAIL_BYTES + 200


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("tracking postgresql://user:pa55@db:5432/mlflow", "tracking postgresql://***@db:5432/mlflow"),
        ("GET b?X-Amz-Credential=AK%2Fx&X-Amz-Signature=0f HTTP", "GET b?X-Amz-Credential=***&X-Amz-Signature=*** HTTP"),
        ("token hf_0123456789abcdef is wrong", "token *** is wrong"),
        ("mail me@example.org; tokenizers false", "mail me@example.org; tokenizers false"),
        ("no file /run/secrets/token", "no file /run/secrets/token"),
        ("at /srv/user/train", "at /srv/user/train"),
        ("postgresql://user:pa/ss@w:0rd@db:5432/mlflow", "postgresql://***@db:5432/mlflow"),
        ("http://db:5000/mail/me@example.org", "http://db:5000/mail/me@example.org"),
        ("GET http://h/x?a=1&access_token=e30.x&b=2", "GET http://h/x?a=1&access_token=***&b=2"),
        ("mysql://h/db?user=u&password=p/w&ssl=1", "mysql://h/db?user=u&password=***&ssl=1"),
        ("{'Authorization': 'Basic dXNlcjpwYXNz'}", "{'Authorization': 'Basic ***'}"),
        ("authorization: Bearer e30.e30.abc, retry", "authorization: Bearer ***, retry"),
        ("{'x-api-key': 'k3y', 'X-Auth-Token':t0k, 'x-id': 7}", "{'x-api-key': '***', 'X-Auth-Token':***, 'x-id': 7}"),
        ("at s3://b/x?private-key=p/q&passphrase=w&n=1#access_token=e", "at s3://b/x?private-key=***&passphrase=***&n=1#access_token=***"),
        ("AccountName=a;AccountKey=k3y==;EndpointSuffix=e", "AccountName=a;AccountKey=***;EndpointSuffix=e"),
        ("near 'azure;0123'", "near '***'"),
        ("mysql: my-secret-pwd", "mysql: ***"),
        ('{"key": "quo\\"ted/s3cret"} quo%22ted%2Fs3cret', '{"key": "***"} ***'),
    ],
)  # fmt: skip
def test_secrets_are_replaced(monkeypatch: pytest.MonkeyPatch, text: str, shown: str) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789abcdef")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/run/secrets/token")
    monkeypatch.setenv("PWD", "/srv/user")
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", "azure;0123")
    monkeypatch.setenv("MYSQL_PWD", "my-secret-pwd")
    monkeypatch.setenv("STORE_KEY", 'quo"ted/s3cret')
    assert redact(text) == shown
    assert str(StorageError(text)) == shown, "an error is printed, and stored as the reason of a failure"


def test_half_of_a_secret_is_never_kept(monkeypatch: pytest.MonkeyPatch, output: Path) -> None:
    monkeypatch.setenv("HF_TOKEN", secret := "hf_0123456789abcdef")
    for after in range(TAIL_BYTES - 25, TAIL_BYTES + 5):
        before = "x" * (HEAD_BYTES - TAIL_BYTES + after)
        output.write_text(f"first\n{before} {secret} x\n{'y' * 10**6}\n{secret} {'z' * after}\n")
        text = attempt_logs.to_bytes({}, {"out": excerpt(output)}).decode()
        assert "hf_01" not in text
        assert "cdef" not in text


def test_old_attempts_are_deleted_and_the_drivers_log_stays(tmp_path: Path) -> None:
    folder = open_folder(tmp_path)
    folder.write("20261101T000000-driver.log", b"of all of them")
    for minute in range(25):
        for process in ("0000", "0001", "0001-end"):
            folder.write(str(LogName(f"20261121T18{minute:02d}00", process)), b"")
    folder.write("notes.txt", b"somebody's own")
    attempt_logs.prune(folder)
    names = attempt_logs.listed(folder)
    assert names[0] == ("20261101T000000", "driver")
    assert sorted({name.begun for name in names[1:]}) == [f"20261121T18{minute:02d}00" for minute in range(5, 25)]
    assert folder.exists("notes.txt")


def test_a_reader_gets_words_not_the_protocol() -> None:
    lines = list[str]()
    log = Log(Context(rank=1), lines.append)
    log.emit("placed", nodes=["a"])
    log.say("dit: attempt 4")
    facts = {"stage": "train", "model": "dit", "host": "node-7", "pid": 5141, "begun_at": 1795569906.5}
    output = [":job_id:04000000", ":actor_name:Trainer", "12:00\tINFO  of Ray", *lines, "Traceback"]
    text = attempt_logs.to_bytes(facts, {"out": "\n".join(output)}).decode()
    first, ray, message, last = readable(attempt_logs.in_words(text)).splitlines()
    assert first == "stage train, model dit, host node-7, pid 5141, begun at 2026-11-25 01:25:06 UTC"
    assert (ray, message[8:], last) == ("12:00   INFO  of Ray", "  rank 1: dit: attempt 4", "Traceback")
    rescued = attempt_logs.to_bytes({"worker": 1, "stored_by": "its driver"}, {"out": ""}).decode()
    assert attempt_logs.in_words(rescued) == "worker 1, stored by its driver\n"
    assert [attempt_logs.in_words(text) for text in ("", "[1]\n", "no facts\n")] == ["", "[1]\n", "no facts\n"]


def test_the_command_lists_and_prints_an_attempt(tmp_path: Path, tiny: Recipe) -> None:
    sweep = Sweep(open_folder(tmp_path / "tiny"), tiny)
    sweep.save_recipe()
    folder = sweep.logs("train", "dit")
    for name in ("20261121T180000-driver", "20261121T180100-0000", "20261121T180200-0000", "20261121T180200-0001-end"):
        folder.write(f"{name}.log", f"text of {name}\n".encode())
    listed = invoke("logs", str(tmp_path / "tiny"))[1].splitlines()
    assert [line.split()[:2] for line in listed] == [["train-dit", f"20261121T180{minute}00"] for minute in range(3)]
    assert listed[2].split()[-2:] == ["0000", "0001-end"]
    _, printed = invoke("logs", str(tmp_path / "tiny"), "dit")
    assert [line for line in printed.splitlines() if line.startswith("text")] == [
        "text of 20261121T180000-driver", "text of 20261121T180200-0000", "text of 20261121T180200-0001-end",
    ]  # fmt: skip
    _, printed = invoke("logs", str(tmp_path / "tiny"), "dit", "--attempt", "20261121T180100")
    assert "text of 20261121T180100-0000" in printed
    texts = answer("logs", str(tmp_path / "tiny"), "dit", "--json")
    assert texts[f"{folder}/20261121T180200-0000.log"] == "text of 20261121T180200-0000\n"
    assert len(answer("logs", str(tmp_path / "tiny"), "--json")["attempts"]) == 3
    Log(Context(), lambda line: folder.write("20261121T180300-0000.log", f"{line}\n".encode())).say("dit: attempt 4")
    _, printed = invoke("logs", str(tmp_path / "tiny"), "dit")
    assert printed.splitlines()[-2].endswith("  dit: attempt 4"), "people read words"
    _, printed = invoke("logs", str(tmp_path / "tiny"), "dit", "--raw")
    assert json.loads(printed.splitlines()[-2])["message"] == "dit: attempt 4"
    assert (
        '"message": "dit: attempt 4"'
        in answer("logs", str(tmp_path / "tiny"), "dit", "--json")[f"{folder}/20261121T180300-0000.log"]
    )
    code, printed = invoke("logs", str(tmp_path / "tiny"), "--stage", "prepare")
    assert (code, "no logs yet: no attempt has begun" in printed) == (2, True)
