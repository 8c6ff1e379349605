"""The notebook in docs/ runs cell by cell on a tiny sweep, and is stored without outputs."""

import ast
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dis_scale.sweep import Sampled
from dis_scale.tracking.rows import RowWriter
from tests.support.evaluations import put
from tests.support.published import published_sweep

NOTEBOOK = json.loads((Path(__file__).parents[1] / "docs/notebook.ipynb").read_text())
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_its_cells_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = published_sweep(str(tmp_path))
    put(sweep, Sampled("dis", 320), 4.5)
    rows = RowWriter(sweep.run("dis").log, attempt=1)
    rows.add(32, {"loss": 0.5})
    rows.close()
    monkeypatch.setenv("SWEEP", sweep.folder.url)
    names: dict[str, Any] = {}
    published, doing, plan, table, best, shown, figure, losses, model, picture, classes, above, four = (
        displayed("".join(cell["source"]), names) for cell in CODE
    )
    assert published == {"dis": [320], "dit": []}
    assert list(doing) == ["dis", "dit"]
    assert {"parameters", "gmacs_forward"} <= set(plan.columns)
    assert table.columns[-1] == sweep.recipe.evaluate.metric
    assert best.values.tolist() == [[320, "dis", 4.5]]
    assert "<table" in shown._repr_html_()
    assert figure.width > 500
    assert losses.width > 500
    assert model.startswith("dis: ")
    assert picture.size == (10 * 32 * 2, 32 * 2)
    assert (classes, four.size) == ((), (4 * 32, 32))
    originals, decoded = np.asarray(above).astype(int).reshape(2, 32, 10 * 32, 3)
    assert np.abs(originals - decoded).max() <= 1, "latents of pixels"


def displayed(source: str, names: dict[str, Any]) -> Any:
    """Run a cell among these names; return the value of its last line, which Jupyter displays."""
    *statements, last = ast.parse(source).body
    assert isinstance(last, ast.Expr)
    exec(compile(ast.Module(statements, []), "notebook", "exec"), names)
    return eval(compile(ast.Expression(last.value), "notebook", "eval"), names)


def test_it_is_stored_without_outputs() -> None:
    assert [cell for cell in CODE if cell["outputs"] or cell["execution_count"] is not None] == []
