"""Shipped recipes by name; a file of the same name wins."""

from pathlib import Path

import pytest

from dis_scale.process.errors import UserError
from dis_scale.recipe import reading, shipped
from tests.conftest import TINY


def test_a_name_is_a_shipped_recipe_unless_there_is_such_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits-isoflop").mkdir()
    assert {reading.load(name).name for name in ("digits", "digits-isoflop")} == {"digits", "digits-isoflop"}
    (tmp_path / "digits").write_text(TINY.read_text())
    assert reading.load("digits").name == "tiny"


def test_each_shipped_recipe_states_its_purpose_in_a_sentence() -> None:
    assert [name for name in shipped.names() if not 20 < len(shipped.purpose(name)) < 150] == []


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(UserError, match=r"cannot read the recipe digit: No such file.*did you mean 'digits'.*recipe list"):
        reading.load("digit")
    with pytest.raises(UserError, match=r"cannot read the recipe digit.yaml: No such file or directory$"):
        reading.load("digit.yaml")
