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
from pipelines import devices, doctor
from pipelines.doctor import Finding, Needs, Result
from tests.cli.test_cli import invoke
from tests.conftest import TINY

DIGITS = TINY.parents[2] / "configs" / "digits.yaml"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start neither Ray nor a process group, and see no GPU."""
    monkeypatch.setattr(doctor, "_ray", lambda _: Result("a Ray"))
    monkeypatch.setattr(doctor, "_deepspeed", lambda _: Result("a process group"))
    monkeypatch.setattr(devices, "usable_gpus", lambda: (0, ""))


def examined(recipe: Recipe, store: Folder) -> dict[str, Finding]:
    return {each.part: each for each in doctor.examine(recipe, store)}


def tried(check: Any, recipe: Recipe, store: Folder) -> Finding:
    return doctor._tried("part", check, Needs(recipe, store))


@pytest.fixture
def store(tmp_path: Path) -> Folder:
    return open_folder(tmp_path / "store")


def test_the_scans_are_all_of_them() -> None:
    assert tuple(doctor.SCANS) == scan.BACKENDS


def test_a_fit_machine(tiny: Recipe, store: Folder) -> None:
    found = examined(tiny, store)
    assert {each.part: each.words for each in found.values() if each.state == "bad"} == {}
    needless = {part for part, each in found.items() if each.state == "not needed"}
    assert needless == {"gpu", "c compiler", "scan triton", "scan mamba", "extractors", "vae"}
    assert found["scan native"].words == "usable on cpu, equal to the definition; the recipe uses it"
    assert found["storage"].words.startswith(f"{store}: creates only if absent, lists what others write; writes ")
    assert store.list() == [], "the probes are deleted, and no database is made"


def test_the_command_prints_lines_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, output = invoke("doctor", str(tmp_path), "--recipe", str(TINY))
    assert code == 0
    assert "not needed gpu            no NVIDIA GPU; the device is cpu (auto: 0 GPUs for 2 workers)\n" in output
    with pytest.raises(SystemExit):
        cli.main(["doctor", str(tmp_path), "--json"])
    findings = json.loads(capsys.readouterr().out)
    assert [each["part"] for each in findings] == [line[11:25].strip() for line in output.splitlines()]


def test_a_bad_part_ends_with_exit_code_1(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(_: Needs) -> Result:
        raise ImportError("No module named 'deepspeed'")

    monkeypatch.setattr(doctor, "_deepspeed", fail)
    code, output = invoke("doctor", str(tmp_path), "--recipe", str(TINY))
    assert code == 1
    assert "bad        deepspeed      ImportError: No module named 'deepspeed'; install it again: make venv\n" in output
    assert "error: 1 of 17 parts are bad: deepspeed\n" in output


def test_other_versions_are_named(monkeypatch: pytest.MonkeyPatch, tiny: Recipe, store: Folder) -> None:
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.1" if name == "torch" else real(name))
    monkeypatch.setattr(doctor.platform, "python_version", lambda: "3.13.1")
    assert "torch 0.1 instead of " in tried(doctor._packages, tiny, store).words
    python = tried(doctor._python, tiny, store)
    assert (python.state, python.words.partition(":")[0]) == ("bad", "3.13.1, expected <3.13")


@pytest.mark.parametrize(
    ("settings", "gpus", "words"),
    [
        ([], (0, "2 NVIDIA GPUs cannot be used: this PyTorch needs the NVIDIA driver R580"), "2 NVIDIA GPUs cannot be used"),
        (["device=cuda"], (0, ""), "no NVIDIA GPU, and the recipe names device cuda: set device to auto"),
    ],
)  # fmt: skip
def test_gpus_that_cannot_be_used(
    monkeypatch: pytest.MonkeyPatch, settings: list[str], gpus: tuple[int, str], words: str, store: Folder
) -> None:
    monkeypatch.setattr(devices, "usable_gpus", lambda: gpus)
    recipe = reading.load(DIGITS, settings)
    monkeypatch.setattr(doctor, "_scan", lambda name, _: Result(name))
    gpu = examined(recipe, store)["gpu"]
    assert (gpu.state, words in gpu.words) == ("bad", True)


def test_a_scan_that_cannot_be_built_is_bad_if_the_recipe_needs_it(
    monkeypatch: pytest.MonkeyPatch, tiny: Recipe, store: Folder
) -> None:
    missing = DisScaleError("the native scan cannot be built: install a C++ compiler (g++ 11 or newer) and ninja")
    monkeypatch.setattr(scan, "problem", lambda *_: missing)
    monkeypatch.setattr(doctor.shutil, "which", lambda _: None)
    for check in (doctor._cpp, partial(doctor._scan, "native")):
        assert tried(check, tiny, store) == Finding("part", "bad", str(missing))
    without = tiny.model_copy(update={"models": {"dit": tiny.models["dit"]}})
    assert [tried(check, without, store).state for check in (doctor._cpp, partial(doctor._scan, "native"))] == [
        "not needed"
    ] * 2


def test_on_a_gpu_triton_and_its_compiler_are_needed(
    monkeypatch: pytest.MonkeyPatch, tiny: Recipe, store: Folder
) -> None:
    monkeypatch.setattr(devices, "usable_gpus", lambda: (2, ""))
    missing = UserError("the triton scan needs a C compiler for its launcher: install gcc, or set CC")
    monkeypatch.setattr(scan, "problem", lambda *_: missing)
    for check in (doctor._c, partial(doctor._scan, "triton")):
        assert tried(check, tiny, store) == Finding("part", "bad", str(missing))
    assert tried(partial(doctor._scan, "mamba"), tiny, store).state == "not needed"


SSM = "models.ssm={kind: diffussm, width: 16, depth: 1, patch: 4}"


def test_on_a_gpu_the_kernels_of_training_and_sampling_are_verified(
    monkeypatch: pytest.MonkeyPatch, store: Folder
) -> None:
    """Each model that Triton's kernels compute, in its precision, at the images of its forward passes."""
    compared = []
    monkeypatch.setattr(devices, "usable_gpus", lambda: (2, ""))
    monkeypatch.setattr(devices, "smallest_gpu_bytes", lambda: 80 * 2**30)
    monkeypatch.setattr(scan, "problem", lambda *_: None)
    monkeypatch.setattr(
        "dis_scale.models.verify_kernels",
        lambda net, _, images, training: compared.append((net.settings.kind, net.precision, images, training)),
    )
    check = partial(doctor._scan, "triton")
    found = tried(check, reading.load(TINY, ["train.precision=bf16", SSM]), store)
    assert found.words == "equal to the definition on cuda at the sizes of the recipe's models: dis"
    assert compared == [("dis", "bf16", {8}, True), ("dis", "fp32", {40}, False), ("dis", "fp32", {20}, False)]
    compared.clear()
    by_name = tried(check, reading.load(TINY, ["train.scan=triton", SSM]), store)
    assert (by_name.state, by_name.words.rpartition(": ")[2]) == ("good", "dis, ssm")
    assert [kind for kind, *_ in compared] == ["dis"] * 3 + ["diffussm"] * 3


def test_without_a_gpu_one_line_says_what_is_not_verified(store: Folder) -> None:
    check = partial(doctor._scan, "triton")
    auto = tried(check, reading.load(TINY, [SSM]), store)
    assert (auto.state, auto.words) == ("not needed", "for NVIDIA GPUs, and none is here: not verified")
    recipe = reading.load(TINY, ["train.scan=triton", SSM])
    alone = recipe.model_copy(update={"models": {"ssm": recipe.models["ssm"]}})
    named = tried(check, alone, store)
    assert (named.state, "the triton scan needs a GPU, and PyTorch finds none" in named.words) == ("bad", True)


def test_a_cpus_scan_is_compared_in_the_recipes_precision(monkeypatch: pytest.MonkeyPatch, store: Folder) -> None:
    compared = []
    monkeypatch.setattr(selftest, "verify", lambda name, _, dtype: compared.append((name, dtype)))
    for name in ("native", "chunked"):
        tried(partial(doctor._scan, name), reading.load(TINY, ["train.precision=bf16"]), store)
    assert compared == [("native", torch.bfloat16), ("chunked", torch.float32)]


@pytest.mark.parametrize(
    ("check", "settings", "words"),
    [
        (doctor._extractors, ["evaluate.extractor={kind: inception, weights: none.pth}", "evaluate.samples=3000"],
         "evaluate.extractor.weights: cannot read none.pth; get https://"),
        (doctor._vae, ["vae={kind: pretrained, path: /none}"], "vae.path: no autoencoder at '/none'"),
        (doctor._vae, ["vae={kind: torchscript, path: /none.pt, posterior: true}"], "/none.pt is a program, and the recipe has"),
        (doctor._mlflow, ["tracking.uri=http://127.0.0.1:1"], "http://127.0.0.1:1 does not answer: start it"),
    ],
)  # fmt: skip
def test_what_the_recipe_names_must_be_there(
    check: Any, settings: list[str], words: str, store: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    (tmp_path / "none.pt").write_bytes(b"")
    settings = [setting.replace("/none.pt", f"{tmp_path}/none.pt") for setting in settings]
    found = tried(check, reading.load(TINY, settings), store)
    assert (found.state, words.replace("/none.pt", f"{tmp_path}/none.pt") in found.words) == ("bad", True), found.words


def test_unusable_storage_is_bad(tiny: Recipe) -> None:
    found = tried(doctor._storage, tiny, open_folder("/proc/none"))
    assert (found.state, found.words.startswith("storage /proc/none cannot be used: ")) == ("bad", True)


def test_without_pytorch_the_others_are_still_examined(tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from pipelines import doctor\n"
        "from dis_scale.recipe import reading\n"
        "from dis_scale.storage.folder import open_folder\n"
        "doctor._ray = lambda _: doctor.Result('a Ray')\n"
        f"for each in doctor.examine(reading.load({str(TINY)!r}), open_folder({str(tmp_path)!r})):\n"
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
