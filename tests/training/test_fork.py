"""A fork goes on from where it was taken, to the bit; the run that it came from stays as it is."""

import pytest

from dis_scale.errors import UserError
from dis_scale.recipe import reading
from dis_scale.storage.folder import Folder, open_folder
from dis_scale.training import checkpoint
from dis_scale.training.fork import fork
from tests.conftest import TINY
from tests.support import ranks


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """A sweep whose dit has been trained to its end, all its resume points kept."""
    root, recipe = tmp_path_factory.mktemp("origin"), reading.load(TINY, ["train.keep_resume=9"])
    ranks.run(recipe, "dit", root, attempt=1)
    made = open_folder(root) / "sweep"
    made.write(reading.FILE, reading.dump(recipe).encode())
    return made


def test_a_fork_trains_on_to_the_bit(sweep: Folder) -> None:
    for _ in range(2):  # given again, it does what is left
        made = fork(sweep, "dit", 240, "again")
    recipe = reading.parse(sweep.read(reading.FILE).decode(), "stored")
    assert list(recipe.models.items()) == [*list(recipe.models.items())[:2], ("again", recipe.models["dit"])]
    assert checkpoint.published(made) == [0, 160]
    assert made.read_json("origin.json")["resume_point"] == "000000000240-0001"
    assert checkpoint.newest_images(made) == 240
    assert sweep.local
    ranks.run(recipe, "again", sweep.local.parent, attempt=1)
    ends = [checkpoint.newest(sweep / "runs" / name, print) for name in ("dit", "again")]
    assert ends[0] is not None
    assert ends[1] is not None
    assert ends[0].manifest["files"] == ends[1].manifest["files"]
    assert ends[1].manifest["model"] == "again"


@pytest.mark.parametrize(
    ("model", "images", "new", "words"),
    [
        ("dip", 80, "x", r"no model 'dip' in this sweep \(did you mean 'dit'\?\): it has dis, dit"),
        ("dit", 96, "x", r"--at 96: dit has no resume point there; it has 0, 80, 160, 240, 320"),
        ("dit", 80, "dis", r"--as dis: this sweep has a run of that name: give another"),
        ("dit", 80, "X!", r"models.X!"),
    ],
)
def test_what_cannot_be_forked_is_said_and_nothing_is_written(
    sweep: Folder, model: str, images: int, new: str, words: str
) -> None:
    before = sweep.list("runs")
    with pytest.raises(UserError, match=words):
        fork(sweep, model, images, new)
    assert sweep.list("runs") == before
