"""Families that a package or a file brings: found by kind, bound to a version or a hash, and refused with the reason."""

import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dis_scale.models import build, construct, families
from dis_scale.models.cost import price_model
from dis_scale.planning.plan import price_sweep
from dis_scale.process.errors import NoFamily, UserError
from dis_scale.process.settings import LatentShape
from dis_scale.recipe import Recipe, reading
from dis_scale.recipe.identity import identity_differences
from dis_scale.recipe.models import from_sizes
from dis_scale.recipe.schema import json_schema
from dis_scale.weights import export
from tests.conftest import TINY
from tests.support import fault_plans, ranks
from tests.support.wheels import GATED_CONV

FILE = "kind: 'gated_conv.py:FAMILY'"
PACKAGE = "kind: gated_conv"
SHAPE = LatentShape(4, 8)


@pytest.fixture(autouse=True)
def _own_lookup() -> Iterator[None]:
    yield
    families.known.cache_clear()


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The example's file in an empty working folder."""
    monkeypatch.chdir(tmp_path)
    copy = tmp_path / "gated_conv.py"
    copy.write_text((GATED_CONV / "gated_conv.py").read_text())
    return copy


@pytest.fixture
def package(file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The example as an installed package; returns the folder of its metadata."""
    facts = file.with_name("gated_conv-0.1.0.dist-info")
    facts.mkdir()
    (facts / "entry_points.txt").write_text("[dis_scale.families]\ngated_conv = gated_conv:FAMILY\n")
    set_version(facts, "0.1.0")
    monkeypatch.syspath_prepend(str(file.parent))
    families.known.cache_clear()
    return facts


def set_version(facts: Path, version: str) -> None:
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: gated-conv\nVersion: {version}\n")
    families.known.cache_clear()


def read(kind: str, *more: str) -> Recipe:
    return reading.load(TINY, [f"models.own={{{kind}, width: 16, depth: 2, patch: 4}}", *more])


@pytest.mark.parametrize("kind", [FILE, PACKAGE])
def test_a_brought_family_is_priced_built_and_stored_like_ours(package: Path, tmp_path: Path, kind: str) -> None:
    recipe = read(kind)
    own = recipe.models["own"]
    assert reading.parse(reading.dump(recipe), "stored", stored=True) == pickle.loads(pickle.dumps(recipe)) == recipe
    model, cost = build(own, SHAPE, 10), price_model(own, SHAPE, 10)
    assert cost.parameters == sum(weight.numel() for weight in model.parameters())
    macs = {part.name: part.macs for part in cost.parts}
    assert (macs["taps"], macs["up"]) == (2 * 4 * 16 * 9, 2 * 4 * 16 * 32)
    export.save(model, tmp_path / "own.safetensors")
    x_BCHW, t_B, y_B = torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([1, 10])
    assert torch.equal(export.load(tmp_path / "own.safetensors")(x_BCHW, t_B, y_B), model(x_BCHW, t_B, y_B))


def test_a_family_may_have_lists(file: Path) -> None:
    file.write_text(file.read_text().replace("    reach: Count = 4\n", "    reach: Count = 4\n    marks: list[str] = []\n"))
    recipe = read(f"{FILE}, marks: [a, b]", "models.again={kind: 'gated_conv.py:FAMILY', width: 16, depth: 2, patch: 4, seed: 7}")
    assert list(price_sweep(recipe, SHAPE).costs) == list(recipe.models)
    assert recipe.seed_groups()["again"] == "again", "without marks"


def test_a_package_is_in_the_schema_with_its_presets(package: Path) -> None:
    parts = json_schema()["$defs"]
    assert parts["GatedConvSettings"]["properties"]["reach"]["description"].startswith("Tokens on each side")
    assert "code" not in parts["GatedConvSettings"]["required"]
    assert "GatedConv-S/2" in parts["Preset"]["properties"]["preset"]["enum"]
    assert families.preset("GatedConv-S/2")["kind"] == "gated_conv"


@pytest.mark.parametrize(
    ("models", "words"),
    [
        ("own={kind: gated_con, width: 16}", "models.own.kind: got 'gated_con', .* (did you mean 'gated_conv'?)"),
        ("own={kind: gated_conv, widht: 16, depth: 1, patch: 4}", "models.own.widht: unknown key (did you mean 'width'?)"),
        ("own={kind: 'gated.py:FAMILY'}", "models of kind gated.py:FAMILY: cannot read gated.py in /"),
        ("own={kind: '/gated_conv.py:FAMILY'}", "expected a path below the working folder"),
        ("own={kind: '../gated_conv.py:FAMILY'}", "expected a path below the working folder"),
        ("own={kind: 'gated_conv.py:FAMLY'}", "cannot be loaded: AttributeError"),
        ("own={kind: 'gated_conv.py:nn'}", "cannot be loaded: TypeError: .* is a module, expected"),
        ("own={kind: other, code: other 1.0}", "models of kind other need other 1.0, which is not installed"),
    ],
)
def test_a_mistake_names_the_kind(package: Path, models: str, words: str) -> None:
    pattern = words.replace("(", r"\(").replace(")", r"\)").replace("?", r"\?")
    with pytest.raises(UserError, match=pattern):
        reading.load(TINY, [f"models.{models}"])


def test_another_version_is_another_identity_and_makes_no_network(package: Path) -> None:
    stored = reading.dump(read(PACKAGE))
    set_version(package, "0.2.0")
    begun = reading.parse(stored, "stored", stored=True)
    difference = "models.own.code: stored gated-conv 0.1.0, given gated-conv 0.2.0"
    assert identity_differences(begun, read(PACKAGE)) == [difference]
    with pytest.raises(NoFamily, match=r"gated_conv need gated-conv 0.1.0, and this machine has gated-conv 0.2.0"):
        construct(begun.models["own"], SHAPE, 10)


def test_a_stored_recipe_runs_no_other_file(file: Path) -> None:
    """Whoever may write to storage must not run programs."""
    recipe = read(FILE)
    stored, code = reading.dump(recipe), recipe.models["own"].needed_code
    file.write_text(f"{file.read_text()}\nraise SystemExit('run')\n")
    with pytest.raises(NoFamily, match=f"need {code}, and this machine has sha256:"):
        reading.parse(stored, "stored", stored=True)
    with pytest.raises(NoFamily, match="names a file without its hash"):
        reading.parse(stored.replace(f"    code: {code}\n", ""), "stored", stored=True)
    with pytest.raises(NoFamily, match="names a file without its hash"):
        from_sizes({name: value for name, value in recipe.models["own"].sizes.items() if name != "code"})
    file.unlink()
    with pytest.raises(NoFamily, match=r"cannot read gated_conv\.py"):
        reading.parse(stored, "stored", stored=True)


def test_a_package_that_cannot_be_loaded_is_named(package: Path) -> None:
    (package / "entry_points.txt").write_text("[dis_scale.families]\ndis = gated_conv:FAMILY\n")
    families.known.cache_clear()
    with pytest.raises(UserError, match=r"gated-conv 0.1.0 brings models of kind 'gated_conv' as 'dis': expected one name"):
        read("kind: dis")
    (package / "entry_points.txt").write_text("[dis_scale.families]\nmissing = no_module:FAMILY\n")
    families.known.cache_clear()
    with pytest.raises(UserError, match=r"gated-conv 0.1.0 brings models of kind missing, which cannot be loaded: No module"):
        read("kind: dis")


def test_two_packages_with_one_kind_are_refused(package: Path) -> None:
    (package / "entry_points.txt").write_text("[dis_scale.families]" + "\ngated_conv = gated_conv:FAMILY" * 2)
    families.known.cache_clear()
    with pytest.raises(UserError, match=r"brings kind 'gated_conv', as gated-conv 0.1.0 does: uninstall one"):
        read("kind: gated_conv")


def test_a_file_is_trained_and_resumed_exactly(file: Path) -> None:
    """By ranks of ZeRO stage 3 in bfloat16, with recomputed blocks."""
    how = ["train.zero_stage=3", "train.precision=bf16", "train.checkpointing=block", "train.publish_images=[0, 160]"]
    own = f"models={{{fault_plans.MODEL}: {{{FILE}, width: 16, depth: 2, patch: 4}}}}"
    recipe, undisturbed, stopped = reading.load(TINY, [own, *how]), file.parent / "undisturbed", file.parent / "stopped"
    ranks.run(recipe, fault_plans.MODEL, undisturbed, attempt=1)
    ranks.run(recipe, fault_plans.MODEL, stopped, attempt=1, stop_at=48)
    ranks.run(recipe, fault_plans.MODEL, stopped, attempt=2)
    assert fault_plans.made(stopped, recipe) == fault_plans.made(undisturbed, recipe)
