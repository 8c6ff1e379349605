"""Recipes as flat lists of settings, and the commands that print them."""

import json
from pathlib import Path

import pytest

from dis_scale import cli
from dis_scale.recipe import Recipe, reading
from dis_scale.recipe.flat import Differing, differences, flatten
from dis_scale.storage.folder import open_folder
from dis_scale.sweep import Sweep
from tests.conftest import TINY
from tests.support.commands import invoke


def settings(recipe: Recipe) -> dict[str, str]:
    return {setting.key: setting.words for setting in flatten(recipe)}


def test_every_setting_is_listed_and_gives_the_recipe_back(tiny: Recipe) -> None:
    flat = flatten(tiny)
    assert len({setting.key for setting in flat}) == len(flat) > 90
    overrides = [f"{key}={words}" for key, words in settings(tiny).items()]
    assert reading.parse("{}", "text", overrides) == tiny


def test_a_variant_whose_name_has_a_dot_can_be_set(tiny: Recipe) -> None:
    text = reading.dump(tiny).replace("  variants:", "  variants:\n    cfg-1.5:\n      steps: 9")
    changed = reading.parse(text, "text", ["evaluate.variants.cfg-1.5.guidance=2"])
    assert changed.evaluate.samplings["cfg-1.5"].scale == 2


def test_defaults_are_marked(tiny: Recipe) -> None:
    given = {setting.key: setting.given for setting in flatten(tiny)}
    assert given["train.learning_rate"]
    assert given["evaluate.variants.wide.guidance"]
    assert not given["train.clip"]
    assert not given["storage.root"]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.decay=linear", Differing("train.decay", "none", "linear")),
        ("data.num_classes=none", Differing("data.num_classes", "10", "none")),
        ("train.publish_images=[16]", Differing("train.publish_images", "[0, 160, 320]", "[16]")),
        ("train.micro_images=8", Differing("train.micro_images", "null", "8")),
        ("data.mirror=true", Differing("data.mirror", "false", "true")),
        ("models.dit.train={clip: 2.0}", Differing("models.dit.train.clip", None, "2.0")),
    ],
)
def test_a_difference_has_values_as_a_recipe_has_them(tiny: Recipe, override: str, expected: Differing) -> None:
    extra = ["evaluate.extractor={kind: inception}", "evaluate.samples=3000", "evaluate.guidance=1.0"]
    before = reading.load(TINY, extra if "num_classes" in override else [])
    assert differences(before, before) == []
    changed = reading.load(TINY, [*(extra if "num_classes" in override else []), override])
    assert expected in differences(before, changed)
    swapped = expected._replace(a=expected.b, b=expected.a)
    assert differences(changed, before) == [swapped] if expected.a else swapped in differences(changed, before)


def test_models_of_two_kinds_differ_in_the_settings_that_one_lacks(tiny: Recipe) -> None:
    other = reading.load(TINY, ["models.dit={kind: dis, width: 16, depth: 2, patch: 4}"])
    found = {each.key: (each.a, each.b) for each in differences(tiny, other)}
    assert found["models.dit.kind"] == ("dit", "dis")
    assert found["models.dit.heads"] == ("2", None)
    assert found["models.dit.state_size"] == (None, "16")


def test_show_has_settings_and_derived_numbers(tmp_path: Path) -> None:
    code, output = invoke("recipe", "show", str(TINY), "--set", "train.workers=1..3")
    assert code == 0
    assert "train.learning_rate: 0.001\n" in output
    assert "train.clip: 1.0  # default\n" in output
    assert "latent   4x8x8\n" in output
    assert "batch    16 = 4 lanes x 4; world sizes 3, 2, 1\n" in output
    assert "source   1,797 images, " in output
    assert "evaluate fd_digits_80; 12 evaluations of 80 samples in 2 blocks\n" in output


def test_show_prints_json_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    cli_main("recipe", "show", str(TINY), "--images", "1020", "--json")
    shown = json.loads(capsys.readouterr().out)
    assert shown["settings"] == reading.load(TINY).model_dump(mode="json")
    dit = shown["derived"]["models"]["dit"]
    assert (dit["tokens"], dit["steps"], dit["epochs"], dit["steps_between_resume_points"]) == (4, 20, 0.32, 5)


def cli_main(*words: str) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(list(words))
    assert end.value.code == 0


def test_show_without_images_or_hub_says_what_is_unknown(tmp_path: Path) -> None:
    source = ["--set", f"data.source={{kind: folder, url: {tmp_path}/none}}"]
    code, output = invoke("recipe", "show", str(TINY), *source)
    assert (code, "source   data.source.url: no images in class folders" in output) == (0, True)
    hub = ["--set", f"vae={{kind: pretrained, path: {tmp_path}}}"]
    code, output = invoke("recipe", "show", str(TINY), *hub)
    assert (code, f"unknown  vae.path: no autoencoder at '{tmp_path}'" in output) == (0, True)


def test_diff_of_a_recipe_and_a_stored_sweep(tmp_path: Path, tiny: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = Sweep.below(open_folder(tmp_path), reading.load(TINY, ["train.clip=2.0"]))
    sweep.save_recipe()
    cli_main("recipe", "diff", str(TINY), sweep.folder.url, "--json")
    assert json.loads(capsys.readouterr().out) == [{"key": "train.clip", "a": "1.0", "b": "2.0"}]
    code, output = invoke("recipe", "diff", str(TINY), str(TINY))
    assert (code, output) == (0, "equal    no setting differs\n")
    assert invoke("recipe", "diff", str(TINY), "none.yaml")[0] == 2
    code, output = invoke("recipe", "diff", str(TINY), "celeba64")
    assert (code, "[distance, sfid" in output) == (0, True), "brackets are text, not styles"


def test_a_folder_does_not_hide_a_shipped_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cifar10").mkdir()
    monkeypatch.chdir(tmp_path)
    assert invoke("recipe", "diff", "cifar10", "cifar10") == (0, "equal    no setting differs\n")
