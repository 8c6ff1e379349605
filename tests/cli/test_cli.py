"""The command's words and exit codes; what starts Ray is in tests/e2e."""

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

import dis_scale
from dis_scale import cli
from dis_scale.cli import shared
from dis_scale.cli.help import EXAMPLES, EXIT_CODES, INTERRUPTED
from dis_scale.process.errors import DisScaleError, Held, Preempted, StorageAway, UserError
from dis_scale.recipe import reading
from dis_scale.recipe.shipped import EMBEDDED
from dis_scale.storage.folder import open_folder
from dis_scale.sweep import Sweep, state
from pipelines import jobs
from tests.conftest import TINY
from tests.support.commands import answer, invoke, replace_sweep
from tests.support.documents import put_latents


@pytest.mark.parametrize(
    ("words", "error", "expected"),
    [
        (["sweep", "--sett", "x=1"], None, 2),
        (["sweep"], UserError("no"), 2),
        (["sweep"], ZeroDivisionError("ours"), 70),
        (["sweep", "--debug"], Preempted("stopped"), 75),
        (["sweep"], None, None),
        (["status", "--sett"], None, None),
    ],
)
def test_every_error_ends_the_job_of_the_sweep(
    monkeypatch: pytest.MonkeyPatch, words: list[str], error: Exception | None, expected: int | None
) -> None:
    """Otherwise KubeRay would start further clusters for a typing mistake."""

    ended: list[int] = []

    def end_own_job(code: int) -> int:
        ended.append(code)
        return code

    replace_sweep(monkeypatch, error)
    monkeypatch.setattr(jobs, "end_own_job", end_own_job)
    code, _ = invoke(*words)
    assert ended == ([] if expected is None else [expected])
    assert code == (expected or (2 if words[0] == "status" else 0))


def test_without_a_recipe_the_embedded_one_is_used_and_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    recipes = replace_sweep(monkeypatch)
    code, output = invoke("sweep")
    assert (code, [recipe.name for recipe in recipes]) == (0, ["digits"])
    assert "recipe   digits.yaml (the embedded example: no recipe was given)" in output


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DisScaleError("a stage failed"), 1),
        (UserError("an impossible setting"), 2),
        (Held("held by process 1"), 69),
        (StorageAway("cannot read x"), 74),
        (Preempted("stopped as requested"), 75),
    ],
    ids=["failure", "user's mistake", "held elsewhere", "storage away", "stopped"],
)
def test_each_kind_of_error_has_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: DisScaleError, code: int
) -> None:
    replace_sweep(monkeypatch, error)
    line = f"{error}\n" if isinstance(error, Preempted) else f"error: {error}\n"
    assert invoke("sweep", str(TINY)) == (code, line), "a stop that was requested is no error"
    with pytest.raises(SystemExit):
        cli.main(["sweep", str(TINY)])
    assert capsys.readouterr() == ("", line), "an error is printed on stderr"


def test_a_second_signal_says_how_to_continue(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_sweep(monkeypatch, KeyboardInterrupt())
    words = "ended at once; what was saved is kept, and the same command continues"
    assert invoke("sweep", str(TINY)) == (INTERRUPTED, f"{words}\n")
    monkeypatch.setenv("DIS_SCALE_LOG", "json")
    code, output = invoke("sweep", str(TINY))
    assert (code, json.loads(output)["message"]) == (INTERRUPTED, words)


def test_the_version_is_printed() -> None:
    assert invoke("--version") == (0, f"dis-scale {dis_scale.__version__}\n")


@pytest.mark.parametrize("at", [0, 1, 2], ids=["before the command", "after it", "after its arguments"])
def test_debug_shows_the_traceback_and_keeps_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], at: int
) -> None:
    """Schedulers decide by it: a sweep that was asked to stop would begin again."""
    words = ["sweep", str(TINY)]
    replace_sweep(monkeypatch, Preempted("stopped as requested"))
    with pytest.raises(SystemExit) as ended:
        cli.main([*words[:at], "--debug", *words[at:]])
    assert ended.value.code == 75
    assert "Traceback (most recent call last)" in capsys.readouterr().err


@pytest.mark.parametrize("at", [0, 1, 2], ids=["before the command", "after it", "after its arguments"])
def test_debug_changes_nothing_without_an_error(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    recipes = replace_sweep(monkeypatch)
    words = ["sweep", str(TINY)]
    assert invoke(*words[:at], "--debug", *words[at:]) == (0, "")
    assert [recipe.name for recipe in recipes] == ["tiny"]


def test_an_unexpected_error_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_sweep(monkeypatch, ZeroDivisionError("our own mistake"))
    code, output = invoke("sweep", str(TINY))
    assert code == 70
    assert output.startswith("Traceback")
    assert output.endswith("ZeroDivisionError: our own mistake\n")


def test_a_plan_shows_models_and_price_and_starts_nothing(tmp_path: Path) -> None:
    code, output = invoke("plan", str(TINY), "--set", f"storage.root={tmp_path}")
    assert code == 0
    assert "22,304" in output
    assert "data     1,797 images, " in output
    assert list(tmp_path.iterdir()) == []


def test_a_plan_of_a_study_shows_the_images_of_each_budget(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text("".join(line for line in TINY.read_text().splitlines(True) if "publish_images" not in line))
    code, output = invoke("plan", str(path), "--set", "isoflop.flops=[1e10, 2e10]", "--set", "isoflop.least_steps=10")
    assert code == 0
    assert "study of tiny: images, steps and epochs at each budget" in " ".join(output.split())
    assert "complete trainings for each budget: 6" in " ".join(output.split())
    assert " epochs" in output


def test_a_plan_without_the_images_asks_for_their_number(tmp_path: Path) -> None:
    source = ["--set", f"data.source={{kind: folder, url: {tmp_path}/none}}"]
    code, output = invoke("plan", str(TINY), *source)
    assert code == 0
    assert "22,304" in output
    assert "data     unknown: " in output
    code, output = invoke("plan", str(TINY), *source, "--images", "1000")
    assert code == 0
    assert "data     1,000 images, " in output


def test_a_plan_names_a_mistake_in_the_recipe_as_one(tmp_path: Path) -> None:
    """It was priced with the advice to name the number of images, which cures no wrong column."""
    (tmp_path / "labels.csv").write_text("path,kind\na.png,1\n")
    source = f"data.source={{kind: csv, url: {tmp_path}/labels.csv}}"
    code, output = invoke("plan", str(TINY), "--set", source)
    assert (code, "no column 'label'" in " ".join(output.split())) == (2, True), output
    assert "--images" not in output


def test_a_file_in_place_of_the_storage_root_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "outputs").write_text("")
    code, output = invoke("sweep", str(TINY), "--set", f"storage.root={tmp_path}/outputs")
    assert (code, "outputs: it is a file, and a sweep is a folder below it" in " ".join(output.split())) == (2, True), output


@pytest.mark.parametrize(
    ("out", "words"), [(".", "this is a folder: give the name of a file"), ("-", "expected the name of a file")]
)
def test_a_recipe_is_written_to_a_new_file_only(tmp_path: Path, out: str, words: str) -> None:
    code, output = invoke("init", str(tmp_path), "--out", out)
    assert (code, words in " ".join(output.split())) == (2, True), output


def test_a_plan_on_gpus_is_json_with_each_model_and_what_is_assumed() -> None:
    fleet = ["--gpu", "h100", "--count", "64", "--price", "2.5", "--preemptions-per-day", "4", "--images", "1281167"]
    found = answer("plan", "imagenet256", *fleet, "--json")
    largest = found["fleet"]["models"]["dis-h"]
    assert (largest["gpus"], largest["fits"], found["plan"]["models"]["dis-h"]["parameters"]) == (64, True, 906_966_560)
    hours = largest["training_gpu_hours"] + largest["evaluation_gpu_hours"]
    assert largest["price"] == pytest.approx(2.5 * hours)
    assert found["fleet"]["assumed"]["preemptions_per_day"] == 4
    days = {each["gpus"]: each["days"] for each in found["fleet"]["by_gpus"]}
    assert sorted(days) == [1, 8, 64, 256, 1024]
    assert days[1] > days[8] > days[64] >= days[1024]


def test_a_plan_on_gpus_states_what_was_measured(tmp_path: Path) -> None:
    code, output = invoke("plan", str(TINY), "--gpu", "h200", "--images", "1797")
    assert code == 0
    assert all(words in output for words in ("2 x h200; assumed: MFU 15%", "figures  measured:", "Computed: all else"))


def test_a_fleet_that_is_always_preempted_never_ends() -> None:
    fleet = ["--gpu", "h100", "--preemptions-per-day", "1e6", "--price", "2"]
    found = answer("plan", str(TINY), "--images", "100", *fleet, "--json")
    assert {each["days"] for each in found["fleet"]["by_gpus"]} == {None}
    assert "never" in invoke("plan", str(TINY), "--images", "100", *fleet)[1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--gpu", "h10"], "--gpu h10: unknown (did you mean 'h100'?); known: a100-40, a100, h100, h200"),
        (["--count", "8"], "--count needs a GPU: add --gpu h100"),
        (["--gpu", "h100", "--mfu", "30"], "--mfu 30: expected a share, over 0 and at most 1"),
        (["--gpu", "h100", "--count", "2000"], "2000 GPUs: expected 1 to 1,024"),
    ],
)
def test_an_impossible_fleet_is_refused(options: list[str], words: str) -> None:
    code, output = invoke("plan", str(TINY), "--images", "100", *options)
    assert (code, words in output) == (2, True), output


def test_a_plan_asks_no_hub_for_stable_diffusions_autoencoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dis_scale.vae.published", lambda _: pytest.fail("asked the hub"))
    code, output = invoke("plan", "imagenet512", "--images", "1281167")
    assert (code, "latents 4x64x64" in output) == (0, True), output


def test_a_model_that_does_not_fit_the_latents_is_refused() -> None:
    code, output = invoke("plan", str(TINY), "--set", "models.dis.patch=3")
    assert code == 2
    assert "size 8 is not divisible by patch 3" in output


def test_unusable_storage_is_a_mistake_of_the_user() -> None:
    code, output = invoke("sweep", str(TINY), "--set", "storage.root=/proc/none")
    assert code == 2
    assert "storage /proc/none cannot be used: there is no such bucket or folder" in output


@pytest.fixture
def elsewhere(tmp_path: Path) -> Sweep:
    """A sweep without latents whose VAE is on a hub that does not exist."""
    settings = ["vae={kind: pretrained, path: nobody/nothing}", "data.resolution=64", f"storage.root={tmp_path}"]
    sweep = Sweep.below(open_folder(tmp_path), reading.load(TINY, settings))
    sweep.save_recipe()
    return sweep


def test_an_operators_commands_need_no_pytorch(elsewhere: Sweep) -> None:
    commands = [["status", elsewhere.folder.url], ["stop", elsewhere.folder.url]]
    commands += [["fork", elsewhere.folder.url, "dit", "--at", "0", "--as", "x"], ["report", elsewhere.folder.url]]
    commands += [["sample", "nowhere"]]  # a misspelt path is named before seconds of imports
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from dis_scale.cli import main\n"
        f"for command in {commands!r}:\n"
        "    try: main(command)\n"
        "    except SystemExit as end: print(command[0], end.code)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run([sys.executable, "-c", program], cwd=EMBEDDED.parents[1], env=environment, capture_output=True, text=True)
    assert re.findall(r"^(\w+ \d)$", done.stdout, re.MULTILINE) == [
        "status 0", "stop 2", "fork 2", "report 2", "sample 2",
    ], done  # fmt: skip
    assert "no checkpoint at nowhere" in done.stderr
    assert "no Ray is known here" in done.stderr
    assert "dit has no resume point there" in done.stderr


@pytest.mark.parametrize("words", [["report"], ["compare", ""], ["mlflow", "sync"]], ids=["report", "compare", "sync"])
def test_commands_on_a_stored_sweep_ask_no_hub(elsewhere: Sweep, words: list[str], tmp_path: Path) -> None:
    filled = [word or elsewhere.folder.url for word in words]
    uri = ["--uri", f"sqlite:///{tmp_path}/mlflow.db"] if words[0] == "mlflow" else []
    code, output = invoke(*filled, elsewhere.folder.url, *uri)
    assert (code, "nothing to report yet: its latents are not complete" in output) == (2, True), output
    put_latents(elsewhere.store / "latents/made", "identity")
    state.use_latents(elsewhere, elsewhere.store / "latents/made", "identity")
    code, output = invoke(*filled, elsewhere.folder.url, *uri)
    assert (code in (0, 1, 2), "nobody" in output) == (True, False), output


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--attempt", "20261121T183819"], "logs: --attempt and --raw are of one job's logs: name a model, or --stage"),
        (["--raw"], "logs: --attempt and --raw are of one job's logs"),
        (["--stage", "trian"], "'trian' is not one of 'prepare', 'precompute', 'evaluate'"),
    ],
    ids=["attempt", "raw", "stage"],
)
def test_logs_of_no_job_are_refused(elsewhere: Sweep, options: list[str], line: str) -> None:
    code, output = invoke("logs", elsewhere.folder.url, *options)
    assert (code, line in " ".join(output.replace("│", "").split())) == (2, True), output


@pytest.mark.parametrize("name", ["train-dit", "dit", "evaluate"])
def test_logs_of_a_job_are_found_by_the_name_that_is_listed(elsewhere: Sweep, name: str) -> None:
    folder = elsewhere.all_logs / f"train-{name.removeprefix('train-')}" if "dit" in name else elsewhere.all_logs / name
    folder.write("20261121T183819-driver.log", b"words")
    assert invoke("logs", elsewhere.folder.url, name) == (0, f"==> {folder}/20261121T183819-driver.log <==\nwords\n")


def test_a_sweep_is_suggested_by_its_name_alone(elsewhere: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert elsewhere.folder.local
    shutil.copytree(elsewhere.folder.local, tmp_path / "outputs/sweeps/mine")
    monkeypatch.chdir(tmp_path)
    assert "did you mean outputs/sweeps/mine?" in invoke("status", "mine")[1]


def test_a_command_says_from_time_to_time_that_it_works(capsys: pytest.CaptureFixture[str]) -> None:
    with shared.working("report: reading", every_s=0.1):
        time.sleep(0.35)
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["report: reading, 0 s so far"] * 2
    time.sleep(0.2)
    assert capsys.readouterr().err == ""


def test_where_nothing_has_begun_status_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, output = invoke("status")
    assert (code, output) == (0, "no sweeps below outputs yet: dis-scale sweep begins one\n")
    assert invoke("status", "--check")[0] == 2, "a timer may run in another folder"


def test_status_without_an_argument_lists_the_sweeps_below_outputs(
    elsewhere: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here/outputs").symlink_to(Path(elsewhere.store.url.removeprefix("file://")))
    monkeypatch.chdir(tmp_path / "here")
    code, output = invoke("status")
    assert (code, elsewhere.folder.name in output) == (0, True), output


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["status", "sweps/tiny"], "no sweep at {}/sweps/tiny: {}/sweps is missing (did you mean 'sweeps'?): expected"),
        (["report", "sweeps/tiny/report"], "a folder with recipe.yaml: did you mean {}/sweeps/tiny?"),
        (["report", "sweeps/tiny/reprot"], "a folder with recipe.yaml: did you mean {}/sweeps/tiny?"),
        (["sample", "sweeps/tini"], "no checkpoint at sweeps/tini (did you mean 'tiny'?): expected"),
        (["sample", "sweeps/tiny"], "or a public .pt; {}/sweeps/tiny has published nothing yet"),
        (["measure", "recipe", "x"], "there is no recipe (did you mean 'recipes'?)"),
        (["import", "pictures/a.pt", "recipes/own.yaml", "--model", "dis", "--images", "5"], "there is no pictures/a.pt"),
        (["delete", ""], "the path or URL of a folder is empty: is a variable not set?"),
        (["delete", "/"], "no sweep at /: expected a folder with recipe.yaml"),
        (["status", "recipes/own.yaml"], "no sweep at {}/recipes/own.yaml: expected a folder"),
        (["stop", "recipes/own.yaml"], "no sweep at {}/recipes/own.yaml: expected a folder"),
        (["report", "/tmpp/x"], "no sweep at /tmpp/x: /tmpp is missing (did you mean 'tmp'?)"),
        (["report", "foo://bucket/x"], "not known: foo; expected a path, s3://bucket/prefix, or another URL"),
        (["data", "gc", "sweps"], "there is no sweps (did you mean 'sweeps'?)"),
        (["sample", "sweeps/tiny/runs/dit1"], "sweeps/tiny/runs/dit1 (did you mean 'dit'?): expected a published"),
        (["plan", "recpes/own.yaml"], "there is no recpes/own.yaml: {}/recpes is missing (did you mean 'recipes'?)"),
        (["recipe", "show", "recipes/owm.yaml"], "there is no recipes/owm.yaml (did you mean 'own.yaml'?)"),
        (["data", "show", "sweeps/tinny"], "there is no sweeps/tinny (did you mean 'tiny'?)"),
        (["init", "recipe"], "there is no recipe (did you mean 'recipes'?)"),
        (["init", "recipes"], "no images"),
        (["init", "elsewhere/pictures"], "there is no elsewhere/pictures: {}/elsewhere is missing"),
        (["init", "recipes/own.yaml"], "/recipes/own.yaml is a file: give a folder of images (unpack a zip); a tar,"),
    ],
)
def test_a_misspelt_path_is_named_with_the_nearest(
    elsewhere: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], line: str
) -> None:
    elsewhere.report.write("index.html", b"")
    elsewhere.run("dit").log.write("rows", b"")
    open_folder(tmp_path / "recipes").write("own.yaml", b"")
    monkeypatch.chdir(tmp_path)
    code, output = invoke(*words)
    assert (code, line.format(*[tmp_path] * 2) in output) == (2, True), output


def leaves(group: Any, *above: str) -> Iterator[tuple[str, Any]]:
    """Yield each command of a group and of the groups in it, with its words."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from leaves(command, *above, name)
        else:
            yield " ".join([*above, name]), command


def test_each_result_is_available_as_json() -> None:
    """A sweep logs JSON lines instead (DIS_SCALE_LOG), and a schema is JSON."""
    commands = dict(leaves(typer.main.get_command(cli.app)))
    assert len(commands) > 25
    without = {name for name, command in commands.items() if "--json" not in {o for p in command.params for o in p.opts}}
    assert without == {"sweep", "resume", "recipe schema"}


def test_each_command_shows_an_example_in_its_help() -> None:
    """On one line, except for the line breaks of a narrow terminal; `dis-scale --help` has the exit codes."""
    names = dict(leaves(typer.main.get_command(cli.app)))
    shown = {name: " ".join(invoke(*name.split(), "--help")[1].split()) for name in names}
    assert [name for name, text in shown.items() if not text.endswith(f"Example: {EXAMPLES[name]}")] == []
    text = " ".join(invoke("--help")[1].split())
    assert [code for code, words in EXIT_CODES.items() if f"{code}: {words}" not in text] == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_gets_its_completion_script(monkeypatch: pytest.MonkeyPatch, shell: str) -> None:
    monkeypatch.setenv("_DIS_SCALE_COMPLETE", f"source_{shell}")
    code, output = invoke()
    assert (code, "dis-scale" in output, f"complete_{shell}" in output) == (0, True, True)


@pytest.mark.parametrize(
    ("typed", "completed"),
    [("pl", "plan"), ("plan --preempt", "--preemptions-per-day"), ("plan imagenet512_", "imagenet512_diffussm imagenet512_dit")],
)
def test_commands_options_and_shipped_recipes_are_completed(monkeypatch: pytest.MonkeyPatch, typed: str, completed: str) -> None:
    monkeypatch.setenv("_DIS_SCALE_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", f"dis-scale {typed}")
    monkeypatch.setenv("COMP_CWORD", str(len(typed.split())))
    assert invoke()[1].split() == completed.split()


@pytest.mark.parametrize("words", [["--help"], ["plan", "--help"], ["recipe", "list"], ["plan", "--sett"]])
def test_an_output_that_is_no_terminal_has_no_colours(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    assert "\x1b" not in invoke(*words)[1]


def test_no_color_keeps_a_terminal_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    colours = re.compile(r"\x1b\[[0-9;]*3[0-9]")
    shown = []
    for plain in ("", "1"):
        monkeypatch.setenv("NO_COLOR", plain)
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            shared.console().print("failed", style="red")
        shown.append(bool(colours.search(output.getvalue())))
    assert shown == [True, False]


def test_an_output_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    code, output = invoke("sample", str(tmp_path), "--labels", "uniform")
    assert (code, "--labels uniform needs --npz" in output) == (2, True), output
    code, output = invoke("sample", str(tmp_path), "--out", str(tmp_path / "a.png"), "--npz", str(tmp_path / "a.npz"))
    assert (code, "expected one of them" in output) == (2, True), output
    code, output = invoke("sample", str(tmp_path), "--sampler", "huen")
    assert (code, "'heun'" in output) == (2, True), output
    code, output = invoke("sample", str(tmp_path), "--out", str(tmp_path))
    assert (code, "this is a folder: give the name of a file" in output) == (2, True)
    code, output = invoke("init", str(tmp_path), "--out", str(tmp_path / "x.yaml"), "--resolution", "100")
    assert (code, "--resolution 100: expected one of 32, 64" in output) == (2, True)
