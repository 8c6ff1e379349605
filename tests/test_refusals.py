"""Impossible commands are refused in one line, before Ray is started."""

from pathlib import Path

import pytest

from dis_scale.recipe import Recipe
from dis_scale.storage.folder import open_folder
from dis_scale.sweep import Sampled, Sweep
from tests.support.commands import invoke
from tests.support.documents import put_published


@pytest.fixture
def sweep(tmp_path: Path, tiny: Recipe) -> Path:
    """A sweep with one published checkpoint, whose evaluation has begun; no test opens either."""
    made = Sweep.below(open_folder(tmp_path), tiny)
    made.save_recipe()
    put_published(made.run("dis").published_at(160), b"", images=160)
    made.evaluation(Sampled("dis", 160)).write("block-00000.npz", b"")
    return tmp_path / "sweeps/tiny"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["ablate", "guidance", "{}", "dos"], "has no model 'dos' (did you mean 'dis'?): it has dis, dit"),
        (["ablate", "guidance", "{}", "dit"], "has published nothing yet"),
        (["ablate", "guidance", "{}", "dis", "--at", "320"], "has published no weights at 320 images: it has 160"),
        (["ablate", "guidance", "{}", "dis", "--scales", "1,-2"], "guidance -2: expected 0 or more"),
        (["ablate", "guidance", "{}", "dis", "--scales", "1,inf"], "guidance inf: expected 0 or more"),
        (["ablate", "guidance", "{}", "dis", "--scales", "one"], "--scales 'one': expected numbers with commas"),
        (["ablate", "ema", "{}", "dis", "--widths", "0.5"], "expected a relative width from 0.005 to 0.28"),
        (["ablate", "ema", "{}", "dis", "--widths", "0.02"], "from the 2 averages published so far it can be rebuilt to within"),
        (["ablate", "ema", "{}/none", "dis"], "/none: expected a folder with recipe.yaml"),
        (["stop", "{}"], "no Ray is known here: to name it, add --address http://HOST:8265 or set RAY_ADDRESS"),
        (["stop", "{}", "--address", "http://127.0.0.1:9"], "no Ray answers at http://127.0.0.1:9"),
        (["fork", "{}/none", "dis", "--at", "0", "--as", "new"], "/none: expected a folder with recipe.yaml"),
        (["report", "{}/none"], "/none: expected a folder with recipe.yaml"),
        (
            ["report", "{}", "--published"],
            "tiny has fd_digits_80, 32 pixels and 10 classes, reference of its own images, no point at 102,400,000 images",
        ),
        (["compare", "{}", "{}", "--page", "{}/none/both.html"], "both.html: there is no folder"),
        (["compare", "{}", "{}"], "tiny have no model at one image count in common"),
    ],
)
def test_an_impossible_command_is_refused_in_one_line(
    sweep: Path, arguments: list[str], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    code, output = invoke(*(word.format(sweep) for word in arguments))
    assert code == 2
    assert line in output


def test_without_tracked_averages_no_width_can_be_rebuilt(sweep: Path, tiny: Recipe) -> None:
    bare = tiny.model_copy(update={"train": tiny.train.model_copy(update={"power_ema": None})})
    bare = bare.model_copy(update={"evaluate": bare.evaluate.model_copy(update={"variants": {}})})
    Sweep(open_folder(sweep), bare).save_recipe()
    code, output = invoke("ablate", "ema", str(sweep), "dis")
    assert (code, "tracked no power-function averages" in output) == (2, True)
