"""The doctor: each part of a machine that is fit, and each fault with its cure. What takes seconds is replaced."""

import json
import subprocess
import sys
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from dis_scale import cli, scan
from dis_scale.process.errors import DisScaleError, UserError
from dis_scale.recipe import Recipe, reading
from dis_scale.scan import selftest
from dis_scale.storage.folder import Folder, open_folder
from dis_scale.upkeep import doctor
from dis_scale.upkeep.doctor import Check, Finding, Here, Needs, Result
from tests.conftest import TINY
from tests.support.commands import invoke

DIGITS = TINY.parents[2] / "configs" / "digits.yaml"


def declared(gpus: int = 0, fault: str = "", **others: Any) -> Here:
    """Return this machine with other GPUs, and what else is given, than it has."""
    return Here(gpus=lambda: (gpus, fault), gpu_bytes=lambda: 80 * 2**30, **others)


QUICK: dict[str, Check] = {name: lambda _, name=name: Result(name) for name in ("ray", "deepspeed")}  # type: ignore[misc]
"""In place of the checks that start processes."""
NO_GPU = declared()


def examined(recipe: Recipe, store: Folder, here: Here = NO_GPU, **replaced: Check) -> dict[str, Finding]:
    needs = Needs(recipe, store, here)
    return {part: doctor.tried(part, check, needs) for part, check in (doctor.checks() | QUICK | replaced).items()}


def tried(check: Any, recipe: Recipe, store: Folder, here: Here = NO_GPU) -> Finding:
    return doctor.tried("part", check, Needs(recipe, store, here))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> dict[str, Check]:
    """The checks of the command; a test may replace more."""
    checks = doctor.checks() | {"deepspeed": QUICK["deepspeed"]}
    monkeypatch.setattr(doctor, "checks", lambda: checks)
    monkeypatch.setattr("pipelines.cluster.try_cluster", lambda _: "a Ray")
    return checks


@pytest.fixture
def store(tmp_path: Path) -> Folder:
    return open_folder(tmp_path / "store")


def test_the_scans_are_all_of_them() -> None:
    assert tuple(doctor.SCANS) == scan.BACKENDS


def test_a_fit_machine(tiny: Recipe, store: Folder) -> None:
    found = examined(tiny, store)
    assert {each.part: each.words for each in found.values() if each.state == "bad"} == {}
    needless = {part for part, each in found.items() if each.state == "not needed"}
    assert needless == {"gpu", "scan triton", "scan mamba", "extractors", "vae"}
    assert found["scan native"].words == "usable on cpu, equal to the definition; the recipe uses it"
    assert found["storage"].words.startswith(f"{store}: creates only if absent, lists what others write; writes ")
    assert store.list() == [], "the probes are deleted, and no database is made"


@pytest.mark.usefixtures("quick")
def test_the_command_prints_lines_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, output = invoke("doctor", str(tmp_path), "--recipe", str(TINY))
    assert code == 0
    assert "not needed gpu            no NVIDIA GPU; the device is cpu (auto: 0 GPUs for 2 workers)\n" in output
    with pytest.raises(SystemExit):
        cli.main(["doctor", str(tmp_path), "--json"])
    findings = json.loads(capsys.readouterr().out)
    assert [each["part"] for each in findings] == [line[11:25].strip() for line in output.splitlines()]


def test_a_bad_part_ends_with_exit_code_1(quick: dict[str, Check], tmp_path: Path) -> None:
    def fail(_: Needs) -> Result:
        raise ImportError("No module named 'deepspeed'")

    quick["deepspeed"] = fail
    code, output = invoke("doctor", str(tmp_path), "--recipe", str(TINY))
    assert code == 1
    assert "bad        deepspeed      ImportError: No module named 'deepspeed'; install it again: make venv\n" in output
    assert "error: 1 of 15 parts are bad: deepspeed\n" in output


def test_other_versions_are_named(tiny: Recipe, store: Folder) -> None:
    here = declared(version=lambda name: {"torch": "0.1"}.get(name) or metadata.version(name))
    assert "torch 0.1 instead of " in tried(doctor.packages, tiny, store, here).words


@pytest.mark.parametrize(
    ("settings", "gpus", "words"),
    [
        ([], (0, "2 NVIDIA GPUs cannot be used: this PyTorch needs the NVIDIA driver R580"), "2 NVIDIA GPUs cannot be used"),
        (["device=cuda"], (0, ""), "no NVIDIA GPU, and the recipe names device cuda: set device to auto"),
    ],
)  # fmt: skip
def test_gpus_that_cannot_be_used(settings: list[str], gpus: tuple[int, str], words: str, store: Folder) -> None:
    scans = dict.fromkeys((f"scan {name}" for name in doctor.SCANS), QUICK["ray"])
    gpu = examined(reading.load(DIGITS, settings), store, declared(*gpus), **scans)["gpu"]
    assert (gpu.state, words in gpu.words) == ("bad", True)


def test_a_scan_that_cannot_be_built_is_bad_if_the_recipe_needs_it(tiny: Recipe, store: Folder) -> None:
    missing = DisScaleError("the native scan cannot be built: install a C++ compiler (g++ 11 or newer)")
    here = declared(scan_problem=lambda *_: missing)
    assert tried(partial(doctor.scan, "native"), tiny, store, here) == Finding("part", "bad", str(missing))
    without = tiny.model_copy(update={"models": {"dit": tiny.models["dit"]}})
    assert tried(partial(doctor.scan, "native"), without, store, here).state == "not needed"


def test_on_a_gpu_triton_is_needed(tiny: Recipe, store: Folder) -> None:
    missing = UserError("the triton scan needs a C compiler for its launcher: install gcc, or set CC")
    here = declared(2, scan_problem=lambda *_: missing)
    assert tried(partial(doctor.scan, "triton"), tiny, store, here) == Finding("part", "bad", str(missing))
    assert tried(partial(doctor.scan, "mamba"), tiny, store, here).state == "not needed"


SSM = "models.ssm={kind: diffussm, width: 16, depth: 1, patch: 4}"


def test_on_a_gpu_the_kernels_of_training_and_sampling_are_verified(monkeypatch: pytest.MonkeyPatch, store: Folder) -> None:
    """Each model that Triton's kernels compute, in its precision, at the images of its forward passes."""
    compared = []
    here = declared(2, scan_problem=lambda *_: None)
    monkeypatch.setattr(
        "dis_scale.models.verify_kernels",
        lambda net, _, images, training: compared.append((net.settings.kind, net.precision, images, training)),
    )
    check = partial(doctor.scan, "triton")
    found = tried(check, reading.load(TINY, ["train.precision=bf16", SSM]), store, here)
    assert found.words == "equal to the definition on cuda at the sizes of the recipe's models: dis"
    assert compared == [("dis", "bf16", {8}, True), ("dis", "fp32", {40}, False), ("dis", "fp32", {20}, False)]


def test_without_a_gpu_one_line_says_what_is_not_verified(store: Folder) -> None:
    check = partial(doctor.scan, "triton")
    auto = tried(check, reading.load(TINY, [SSM]), store)
    assert (auto.state, auto.words) == ("not needed", "for NVIDIA GPUs, and none is here: not verified")
    named = tried(check, reading.load(TINY, ["train.scan=triton", SSM]), store)
    assert (named.state, "the triton scan needs a GPU, and PyTorch finds none" in named.words) == ("bad", True)


def test_a_cpus_scan_is_compared_in_the_recipes_precision(monkeypatch: pytest.MonkeyPatch, store: Folder) -> None:
    compared = []
    monkeypatch.setattr(selftest, "verify", lambda name, _, dtype: compared.append((name, dtype)))
    for name in ("native", "chunked"):
        tried(partial(doctor.scan, name), reading.load(TINY, ["train.precision=bf16"]), store)
    assert compared == [("native", torch.bfloat16), ("chunked", torch.float32)]


@pytest.mark.parametrize(
    ("check", "settings", "words"),
    [
        (doctor.extractors, ["evaluate.extractor={kind: inception, weights: none.pth}", "evaluate.samples=3000"],
         "evaluate.extractor.weights (measure: --weights): cannot read none.pth; get https://"),
        (doctor.vae, ["vae={kind: pretrained, path: /none}"], "vae.path: no autoencoder at '/none'"),
        (doctor.vae, ["vae={kind: exported, path: /none, posterior: true}"], "no file /none/encode.pt2"),
        (doctor.mlflow, ["tracking.uri=http://127.0.0.1:1"], "http://127.0.0.1:1 does not answer: start it"),
    ],
)  # fmt: skip
def test_what_the_recipe_names_must_be_there(
    check: Any, settings: list[str], words: str, store: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    settings = [setting.replace("/none", f"{tmp_path}/none") for setting in settings]
    found = tried(check, reading.load(TINY, settings), store)
    assert (found.state, words.replace("/none", f"{tmp_path}/none") in found.words) == ("bad", True), found.words


def test_unusable_storage_is_bad(tiny: Recipe) -> None:
    found = tried(doctor.storage, tiny, open_folder("/proc/none"))
    assert (found.state, found.words.startswith("storage /proc/none cannot be used: ")) == ("bad", True)


def test_without_pytorch_the_others_are_still_examined(tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from dis_scale.upkeep import doctor\n"
        "from dis_scale.recipe import reading\n"
        "from dis_scale.storage.folder import open_folder\n"
        f"needs = doctor.Needs(reading.load({str(TINY)!r}), open_folder({str(tmp_path)!r}))\n"
        "for part, check in doctor.checks().items():\n"
        "    each = doctor.tried(part, check, needs)\n"
        "    print(each.part, each.state, each.words, sep='|')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=TINY.parents[2], capture_output=True, text=True)
    states = dict(line.split("|")[:2] for line in done.stdout.splitlines())
    assert (states["torch"], states["storage"], states["python"]) == ("bad", "good", "good"), done
    assert "install it again: make venv" in done.stdout


def test_secrets_are_not_printed(tiny: Recipe, store: Folder) -> None:
    def check(_: Needs) -> Result:
        raise ValueError("http://user:password1234@host failed")

    assert "password1234" not in tried(check, tiny, store).words
