"""Each runbook's drill: the accident, the lines that the page promises, the cure, and weights bit-equal to the undisturbed ones."""

from pathlib import Path

import pytest

from ops.drills.__main__ import DRILLS
from ops.drills.drill import Missing, perform, run_undisturbed

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1200), pytest.mark.usefixtures("whole_machine")]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_undisturbed(tmp_path_factory.mktemp("drills"))


@pytest.mark.parametrize("name", list(DRILLS))
def test_the_cure_works(tmp_path: Path, undisturbed: Path, name: str) -> None:
    try:
        perform(DRILLS[name], undisturbed, tmp_path)
    except Missing as missing:
        pytest.skip(f"this machine lacks {missing}")
