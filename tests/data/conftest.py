"""Sources as if they were larger than a test's."""

import pytest

from dis_scale.data import tars


@pytest.fixture
def large_tars(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tar is one of so many members that they are not kept: it is indexed as it is read."""
    monkeypatch.setattr(tars, "LARGE_BYTES", 0)
