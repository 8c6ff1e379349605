"""Each runbook's drill: the accident, the lines that the page promises, the cure, and weights bit-equal to the undisturbed ones."""

from pathlib import Path

import pytest

from ops.drills import __main__ as drills

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return drills.run_undisturbed(tmp_path_factory.mktemp("drills"))


@pytest.mark.parametrize("name", list(drills.DRILLS))
def test_the_cure_works(tmp_path: Path, undisturbed: Path, name: str) -> None:
    drills.perform(name, undisturbed, tmp_path)
