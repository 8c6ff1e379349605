"""The command's words and exit codes; what starts a Ray is in tests/e2e."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from dis_scale import sweep as sweeps
from dis_scale.cli import app
from dis_scale.errors import DisScaleError, Preempted
from tests.conftest import TINY


def invoke(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, list(arguments))
    return done.exit_code, done.output


def test_without_a_recipe_the_embedded_one_is_taken_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    monkeypatch.setattr(sweeps, "run", lambda recipe, _: taken.append(recipe.name))
    code, output = invoke("sweep")
    assert (code, taken) == (0, ["digits"])
    assert "recipe   digits.yaml (none was given: the embedded example)" in output


@pytest.mark.parametrize(("error", "code"), [(DisScaleError("a stage failed"), 1), (Preempted("stopped as asked"), 75)])
def test_each_kind_of_end_has_its_exit_code(monkeypatch: pytest.MonkeyPatch, error: DisScaleError, code: int) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(sweeps, "run", fail)
    assert invoke("sweep", str(TINY)) == (code, f"error: {error}\n")
    debugged = CliRunner().invoke(app, ["sweep", str(TINY), "--debug"])
    assert debugged.exception is error


def test_a_plan_names_models_and_price_and_starts_nothing(tmp_path: Path) -> None:
    code, output = invoke("plan", str(TINY), "--set", f"storage.root={tmp_path}")
    assert code == 0
    assert "22,304" in output
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_does_not_fit_the_latents_is_refused() -> None:
    code, output = invoke("plan", str(TINY), "--set", "models.dis.patch=3")
    assert code == 2
    assert "size 8 is not divisible by patch 3" in output


def test_storage_that_cannot_be_used_is_the_users_to_mend() -> None:
    code, output = invoke("sweep", str(TINY), "--set", "storage.root=/proc/none")
    assert code == 2
    assert "storage /proc/none cannot be used: there is no such bucket or folder" in output
