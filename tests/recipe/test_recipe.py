"""Errors in a recipe name the key, the given value and the expected one; two recipes of one name are distinguished."""

import re
from pathlib import Path

import pytest
import yaml

from dis_scale.models.families import preset
from dis_scale.planning.plan import price_sweep
from dis_scale.process.errors import UserError
from dis_scale.recipe import LatentShape, Recipe, TarSource, reading
from dis_scale.recipe.identity import identity_differences
from tests.conftest import TINY

CONFIGS = Path(__file__).parents[2] / "configs"
UNCONDITIONAL = ("data.num_classes=none", "evaluate.extractor={kind: exported, name: x, path: x.pt}")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_recipe_is_valid_short_and_names_its_command(path: Path) -> None:
    """Short: at most 58 lines besides the editors' line, and for each model one line and its price."""
    text = path.read_text()
    assert len(text.splitlines()) - 1 - 2 * len(reading.load(path).models) <= 58
    assert f"python -m dis_scale.sweep configs/{path.name}" in text


@pytest.mark.parametrize("path", sorted((CONFIGS / "ablations").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_ablation_has_a_price(path: Path) -> None:
    """One recipe for each table of the papers; its models differ in what the table is about."""
    recipe = reading.load(path)
    assert (recipe.name, f"configs/ablations/{path.name}" in path.read_text()) == (path.stem, True)
    latent = LatentShape(3, 32) if recipe.data.resolution == 32 else LatentShape(4, 32)
    costs = price_sweep(recipe, latent).costs
    assert len(costs) == len(recipe.models) >= 3
    assert len({model.model_dump_json() for model in recipe.models.values()}) == len(costs)


def test_a_stored_recipe_is_read_back_unchanged(tiny: Recipe) -> None:
    assert reading.parse(reading.dump(tiny), "stored") == tiny
    for version in ("1e5", "09", "0129", "1_0", "no", ".5"):
        source = {"kind": "tar", "url": "/x", "files": version}
        odd = tiny.model_copy(update={"data": tiny.data.model_copy(update={"source": TarSource.model_validate(source)})})
        stored = yaml.load(reading.dump(odd), reading._Loader)
        assert stored["data"]["source"]["files"] == version


@pytest.mark.parametrize("odd", ["010", "1_", "1:30", "0x10"])
def test_numbers_are_as_people_write_them(odd: str) -> None:
    """In YAML 1.1, 010 is eight and 1:30 is ninety."""
    recipe = reading.load(TINY, ["seed=1_000", "train.publish_images=[0, 1.6e2]", "train.learning_rate=1e-3"])
    assert (recipe.seed, recipe.train.publish_images, recipe.train.learning_rate) == (1000, (0, 160), 0.001)
    with pytest.raises(UserError, match=f"seed: got '{odd}', expected: a valid integer"):
        reading.load(TINY, [f"seed={odd}"])


def test_a_recipe_that_was_stored_with_variants_that_are_alike_is_read(tiny: Recipe) -> None:
    """They are refused by now, but may not change under one name."""
    data = tiny.model_dump(mode="json")
    data["evaluate"]["variants"] = {"08": {"steps": 7}, "same": {"steps": 7, "guidance": None}}
    stored = yaml.safe_dump(data)  # as it was written before: without quotes around 08
    assert list(reading.parse(stored, "stored", stored=True).evaluate.variants) == ["08", "same"]
    with pytest.raises(UserError, match=r"variants.same: it samples as 08"):
        reading.parse(stored.replace("guidance: null", ""), "given")


def test_a_stored_recipe_may_have_more_seeds_than_before(tiny: Recipe) -> None:
    stored = reading.dump(reading.load(TINY, ["models.dis.seeds=2"]))
    models = reading.parse(stored, "stored", ["models.dis.seeds=3"], stored=True).models
    assert [name for name in models if name.startswith("dis")] == ["dis", "dis-seed-1", "dis-seed-2"]


def test_a_seed_of_another_model_replaces_none(tmp_path: Path) -> None:
    """Of two models of one name the first was lost."""
    own = "models.dis-seed-1={kind: dit, width: 16, depth: 1, heads: 2, patch: 2}"
    with pytest.raises(UserError, match=r"models.dis-seed-1: it is also a seed of another model: give one of them another name"):
        reading.load(TINY, ["models.dis.seeds=2", own])
    (tmp_path / "twice.yaml").write_text(TINY.read_text() + "train: {learning_rate: 1}\n")
    with pytest.raises(UserError, match=r"twice.yaml: not YAML: line \d+: 'train' is there twice"):
        reading.load(tmp_path / "twice.yaml")


def test_runtime_settings_and_pins_of_further_extractors_may_change() -> None:
    also = "evaluate.also=[{{kind: inception{}}}, {{kind: exported, name: x, path: {}, sha256: {}}}]"
    one, two = "a" * 64, "b" * 64
    many = "evaluate.samples=4000"
    stored = reading.load(TINY, [many, also.format("", "x.pt2", "null")])
    pinned = reading.load(TINY, [many, also.format(", weights: /models/w.pth", "y.pt2", one)])
    assert identity_differences(stored, pinned) == []
    other = reading.load(TINY, [many, also.format("", "x.pt2", two)])
    assert identity_differences(pinned, other) == [f"evaluate.also.1.sha256: stored {one}, given {two}"]


def test_a_cooldown_begins_at_a_complete_step_also_if_its_share_is_rounded() -> None:
    """0.1 of 64,000 images is 6,399.99..., which was step 0 of 6,400."""
    _, branch = reading.cooldown("s", {"kind": "dis"}, 64_000, 0.9, 6400)
    assert branch["branch"]["at"] == 6400


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.lane=4", "train.lane: unknown key (did you mean 'lanes'?)"),
        ("models.dis.widht=8", "models.dis.widht: unknown key (did you mean 'width'?)"),
        ("data.sorce.kind=digits", "data.sorce: unknown key (did you mean 'source'?)"),
        ("train.lanes=two", "train.lanes: got 'two', expected: a valid integer"),
        ("train.lanes=2.5", "train.lanes: got 2.5, expected: a valid integer"),
        ("train.workers=5", "workers 5: expected at most as many as lanes, 4: set workers lower or lanes higher"),
        ("train.micro_images=6", "micro_images 6 is not a multiple of a lane's 4 images"),
        ("train.lanes=5", "batch_images 16 is not a multiple of lanes 5"),
        ("train.publish_images=[0, 17]", "publish_images: 17 is not a multiple of batch_images 16"),
        ("train.zero_stage=0", "train.zero_stage: got 0, expected: 1, 2 or 3"),
        ("evaluate.sampler=euler", "sampler euler does not fit the process gaussian"),
        ("models.dit.heads=3", "models.dit: width 16 is not a multiple of heads 3"),
        ("models.dit.train={batch_images: 18}", "models.dit.train: batch_images 18 is not a multiple of lanes 4"),
        ("models.dit.train={publish_images: [8]}", "models.dit.train: publish_images: 8 is not a multiple of batch_images 16"),
        ("models.dit.train={lanes: 2}", "models.dit.train.lanes: unknown key"),
        ("models.dit.train={learning_rate: 0}", "models.dit.train.learning_rate: got 0, expected: greater than 0"),
        ("train.base_width=0", "train.base_width: got 0, expected: greater than or equal to 1"),
        ("train.base_width=12", "models.dit: heads of size 8 do not divide base_width 12"),
        (
            "models.dit={kind: diffussm, width: 16, depth: 1, hourglass: 4, train: {base_width: 7}}",
            "models.dit: hourglass 4 does not divide twice the base_width 7",
        ),
        ("models.dit.branch={of: dis, at: 160}", "models.dit.branch.of: dis has other sizes"),
        (
            "models.dit.branch={of: dit, at: 160}",
            "models.dit.branch.of: got 'dit', expected a model of this recipe with image counts that is not a branch",
        ),
        ("train.cooldowns=[320]", "train.cooldowns: got [320], expected image counts and a share"),
        ("train.cooldowns={images: [16]}", "models.dis-at-16.branch.at: got 0"),
        ("models.dit={kind: dit, width: 6, depth: 1, heads: 2, patch: 4}", "needs a width that is a multiple of 4, got 6"),
        ("diffusion.steps=0", "diffusion.steps: got 0, expected: greater than or equal to 1"),
        ("models.dit.seeds=0", "models.dit.seeds: got 0, expected: a number of trainings"),
        ("data.num_classes=9", "the digits have 10 classes, got 9"),
        ("format=7", "this version reads recipes of format 1, got format 7"),
        ("data.num_classes=null", "got null, expected: a number of classes, or none for unconditional models"),
        ("data.num_classes=no", "data.num_classes: got False, expected: a valid integer"),
        ("name=123", "name: got 123, expected: a valid string, in quotes"),
        ("seed=null", "seed: got None, expected: a valid integer"),
        ("models.dit.seeds=true", "models.dit.seeds: got True, expected: a number of trainings"),
        ("train.cooldowns={images: [320], shar: 0.5}", "train.cooldowns: got {'images': [320], 'shar': 0.5}, expected"),
        ("train.cooldowns={images: '64000'}", "train.cooldowns: got {'images': '64000'}, expected image counts"),
        ("train.cooldowns={images: [320], share: .nan}", "train.cooldowns: got {'images': [320], 'share': nan}, expected image"),
        ("train={batch_images: 0, cooldowns: {images: [320]}}", "train.batch_images: got 0, expected: greater than or equal to 1"),
        ("models.dit.train=5", "models.dit.train: got 5, expected"),
        ("models.dit.train={batch_images: foo}", "models.dit.train.batch_images: got 'foo', expected: a valid integer"),
        ("models.dit.train={base_width: null}", "models.dit.train.base_width: null is no value here"),
        ("evaluate.variants={a: {guidance: 1}, b: {guidance: 1, guidance_interval: [0, 500]}}", "variants.b: it samples as a"),
        ("evaluate.extractor={kind: none}", "variants: extractor none measures no distance, by which they could differ"),
        (
            "train.workers=3..2",
            "workers 3..2: expected at most as many as lanes, 4: set workers lower or lanes higher, and the least",
        ),
        ("evaluate.variants={few: {guidance_interval: null}}", "evaluate.variants.few.guidance_interval: null is no value here"),
        ("evaluate.variants={metrics.json: {steps: 7}}", "variants.metrics.json: the name is taken by something else"),
        ("evaluate.variants={main: {steps: 7}}", "variants.main: the name is taken by something else"),
        ("evaluate.variants={few: {}}", "variants.few: it samples as the main settings"),
        (
            "evaluate.variants={a: {guidance: 1, steps: 7}, b: {guidance: {by: dit, images: 160, scale: 1}, steps: 7}}",
            "variants.b: it samples as a, and would cost the same again",
        ),
        ("evaluate.variants={a: {steps: 7}, b: {steps: 7}}", "variants.b: it samples as a, and would cost the same again"),
        ("data.source={kind: folder, url: ~no-such-user/x}", "data.source.url: ~no-such-user/x: "),
        ("vae={kind: trained, learning_rate: 0}", "vae.learning_rate: got 0, expected: greater than 0"),
        ("vae={kind: trained, widths: []}", "vae.widths: got [], expected"),
        ("train={lanes: 4, lanes: 2}", "not YAML: line 1: 'lanes' is there twice"),
        ("models={no: {kind: dit}}", "not YAML: line 1: 'no' is no name: put it in quotes"),
        ("models=&a {x: *a}", "a value contains itself, by an alias"),
        ("data.num_classes=none", "extractor digits is a classifier that the sweep trains, and data.num_classes is none"),
        ("train.x.y", "expected a.b=value"),
        ("train.lanes=[1", "--set 'train.lanes=[1': not YAML"),
        ("models=[a]", "models: got ['a'], expected"),
        ("models.dis.preset=[1]", "unknown preset '[1]'"),
    ],
)
def test_mistakes_are_named(override: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        reading.load(TINY, [override])
    assert words in str(caught.value)


def test_rates_transfer_between_heads_of_one_size_alone() -> None:
    other = "models.wide={kind: dit, width: 32, depth: 1, heads: 2, patch: 4}"
    with pytest.raises(UserError, match=r"models.dit: heads of size 8, and wide of the same base_width has 16"):
        reading.load(TINY, [other, "train.base_width=16"])
    reading.load(TINY, [other, "models.wide.train.base_width=32", "models.dit.train.base_width=16"])


@pytest.mark.parametrize(
    ("key", "url"),
    [
        ("tracking.uri", "https://me:pa55word@mlflow:5000"),
        ("tracking.uri", "https://pa55word@mlflow:5000"),
        ("tracking.uri", "postgresql://me:pa55word@db:5432/mlflow"),
        ("tracking.uri", "postgresql://me:pa55/word@db:5432/mlflow"),
        ("tracking.uri", "mysql://db/mlflow?user=me&password=pa55word"),
        ("tracking.uri", "https://mlflow:5000/?access_token=pa55word"),
        ("tracking.uri", "https://mlflow:5000?token=pa55word"),
        ("storage.root", "s3://me:pa55word@bucket/prefix"),
        ("data.source", "{kind: tar, url: 'sftp://me:pa55word@host/images'}"),
        ("vae", "{kind: exported, posterior: false, path: 'https://host/v.pt?X-Amz-Signature=pa55word'}"),
    ],
)
def test_a_url_with_credentials_is_refused_without_showing_it(key: str, url: str) -> None:
    with pytest.raises(UserError) as caught:
        reading.load(TINY, [f"{key}={url}"])
    assert "pa55" not in str(caught.value)
    assert re.search(
        rf"{key}[a-z.]*: a URL with credentials.*MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD", str(caught.value)
    )


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me@db:5432/mlflow?sslmode=require",
        "http://mlflow:5000",
        "http://mlflow:5000/a@b",
        "sqlite:////data/a@b:c/mlflow.db",
    ],
)
def test_a_url_without_credentials_is_taken(url: str) -> None:
    assert reading.load(TINY, [f"tracking.uri={url}"]).tracking.uri == url
    assert reading.load(TINY, ["storage.root=abfs://container@account/x"]).storage.root.startswith("abfs://container@")


def test_what_an_alias_names_is_a_value_of_its_own() -> None:
    """A setting of one model was also that of the other, whose nested mapping it shared."""
    text = TINY.read_text().replace(
        "models:", "models:\n  first: &a {kind: dis, width: 16, depth: 2, patch: 4, train: {ema: 0.9}}\n  second: *a"
    )
    recipe = reading.parse(text, "here", ["models.first.width=32", "models.first.train.ema=0.5"])
    assert (recipe.models["first"].sizes["width"], recipe.models["second"].sizes["width"]) == (32, 16)
    assert (recipe.train_of("first").ema, recipe.train_of("second").ema) == (0.5, 0.9)


@pytest.mark.parametrize("uri", ["none", "./mlruns", "/data/mlruns"])
def test_a_tracking_uri_that_mlflow_would_not_take_is_refused(uri: str) -> None:
    with pytest.raises(UserError, match=rf"tracking.uri: got '{uri}', expected sqlite:///FILE or http://HOST:PORT, or null"):
        reading.load(TINY, [f"tracking.uri={uri}"])


def test_an_unconditional_recipe_is_stored_by_the_same_word() -> None:
    recipe = reading.load(TINY, [*UNCONDITIONAL, "evaluate.guidance=1"])
    assert recipe.data.num_classes is None
    stored = reading.dump(recipe)
    assert "num_classes: none" in stored
    assert reading.parse(stored, "stored") == recipe
    given = reading.load(TINY, ["evaluate.guidance=1", UNCONDITIONAL[1]])
    assert "data.num_classes: stored null, given 10" in identity_differences(recipe, given)


def test_samples_are_not_guided_unless_the_recipe_says_so() -> None:
    without = yaml.safe_load(TINY.read_text())
    del without["evaluate"]["guidance"]
    assert reading.parse(yaml.safe_dump(without), "here").evaluate.guidance == 1.0


def test_a_missing_recipe_is_named() -> None:
    with pytest.raises(UserError, match=r"cannot read the recipe none.yaml: No such file"):
        reading.load("none.yaml")


def test_invalid_yaml_is_named(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("a: [1")
    with pytest.raises(UserError, match=r"r.yaml: not YAML"):
        reading.load(tmp_path / "r.yaml")


def test_a_preset_gives_the_published_size_and_can_be_changed() -> None:
    data = yaml.safe_load(TINY.read_text())
    data["models"] = {"b": {"preset": "DiS-B/2", "drop_path": 0.0}}
    model = reading.parse(yaml.safe_dump(data), "here").models["b"]
    assert model.model_dump(include={"width", "depth", "patch", "drop_path"}) == {
        "width": 768, "depth": 24, "patch": 2, "drop_path": 0.0
    }  # fmt: skip


def test_an_unknown_preset_offers_the_nearest() -> None:
    with pytest.raises(UserError, match=r"unknown preset 'DiS-B/3' \(did you mean 'DiS-B/"):
        preset("DiS-B/3")


@pytest.mark.parametrize(
    "allowed",
    [
        "train.workers=4", "storage.root=x", "train.publish_images=[0,160,320,480]", "device=cpu", "data.undecodable=skip",
        "evaluate.batch_images=16",
    ],
)  # fmt: skip
def test_runtime_and_extent_may_change(tiny: Recipe, allowed: str) -> None:
    assert identity_differences(tiny, reading.load(TINY, [allowed])) == []


@pytest.mark.parametrize(("key", "settings"), [("vae", "posterior: false"), ("evaluate.extractor", "name: dino")])
def test_the_hash_of_a_file_may_be_added_and_not_changed(key: str, settings: str) -> None:
    without, first, second = (
        reading.load(TINY, [f"{key}={{kind: exported, path: v.pt, {settings}{pinned}}}"])
        for pinned in ("", f", sha256: '{'0' * 64}'", f", sha256: '{'1' * 64}'")
    )
    assert identity_differences(without, first) == []
    for given in (second, without):
        (difference,) = identity_differences(first, given)
        assert difference.startswith(f"{key}.sha256: stored {'0' * 64}, given ")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ("seed=1", "seed: stored 0, given 1"),
        ("train.batch_images=32", "train.batch_images: stored 16, given 32"),
        ("models.dis.width=32", "models.dis.width: stored 16, given 32"),
        ("vae.steps=30", "vae.steps: stored 4, given 30"),
        ("train.publish_images=[0, 160]", "train.publish_images: stored up to 320, given only up to 160"),
        ("train.publish_images=[0, 80, 160, 320]", "train.publish_images: 80 is before 320, which training may have passed"),
        ("models.dis.train={ema: 0.5}", "models.dis.train.ema: stored null, given 0.5"),
        ("models.dis.train={publish_images: [0, 160]}", "models.dis.train.publish_images: stored up to 320, given only up to 160"),
        ("models.dis.seed=3", "models.dis.seed: stored null, given 3"),
    ],
)
def test_identity_may_not_change(tiny: Recipe, changed: str, words: str) -> None:
    differences = identity_differences(tiny, reading.load(TINY, [changed, "train.resume_every_images=160"]))
    assert words in differences


def test_a_model_may_not_become_one_of_another_kind(tiny: Recipe) -> None:
    other = reading.load(TINY, ["models.dit={kind: dis, width: 16, depth: 2, patch: 4}"])
    assert identity_differences(tiny, other) == ["models.dit.kind: stored dit, given dis"]


def test_longer_training_is_refused_if_the_schedule_has_an_end() -> None:
    begun = reading.load(TINY, ["train.decay=linear"])
    longer = reading.load(TINY, ["train.decay=linear", "train.publish_images=[0, 160, 320, 640]"])
    assert identity_differences(begun, longer) == ["train.publish_images: the linear decay ends at 320, given 640"]


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (["evaluate.metrics=[distance, kid]"], "kid uses subsets of 1,000 images, and samples is 80"),
        (
            ["evaluate.metrics=[distance, distance_infinity]"],
            "distance_infinity of 64 features (digits) needs at least 320 samples, got 80",
        ),
        (["evaluate.variants={fast: {steps: 2000}}"], "evaluate.variants.fast.steps 2000 exceeds diffusion.steps 1000"),
        (["evaluate.variants={flow: {sampler: heun}}"], "evaluate.variants.flow: sampler heun does not fit the process"),
        (
            ["train.power_ema=null"],
            "evaluate.variants.wide.ema_width needs power-function averages, and train.power_ema tracks none",
        ),
        (["evaluate.ema_width=0.5"], "evaluate.ema_width: got 0.5, expected: less than or equal to 0.28"),
        (
            ["train.label_dropout=0.0"],
            "evaluate.guidance: got 1.5, expected 1: train.label_dropout is 0, so no model learns to do without labels: "
            "set it to 1, or train.label_dropout to 0.1",
        ),
        (
            ["train.label_dropout=0.0", "evaluate.guidance=1", "evaluate.variants={more: {guidance: 3.0}}"],
            "evaluate.variants.more.guidance: got 3, expected 1: train.label_dropout is 0",
        ),
        (
            ["evaluate.guidance={by: diss, images: 320, scale: 2}"],
            "evaluate.guidance: no model 'diss' (did you mean 'dis'?): expected one of dis, dit",
        ),
        (
            [*UNCONDITIONAL, "evaluate.guidance={by: dit, images: 5, scale: 2}"],
            "evaluate.guidance: dit is not published at 5 images: expected 0 or 160 or 320",
        ),
        (["evaluate.guidance={by: dit, images: 320, scale: -1}"], "evaluate.guidance"),
        (["evaluate.guidance=-1"], "evaluate.guidance"),
        (
            [*UNCONDITIONAL, "evaluate.guidance=2"],
            "evaluate.guidance: got 2, expected 1: data.num_classes is none: guidance needs labels or a model that guides: "
            "set it to 1",
        ),
    ],
)
def test_settings_that_cannot_be_sampled_or_measured_are_refused(settings: list[str], line: str) -> None:
    with pytest.raises(UserError, match=re.escape(line)):
        reading.load(TINY, settings)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (["train.compile=true", "train.zero_stage=3"], "ZeRO stage 3 gathers weights inside the blocks: set zero_stage to 1"),
        (["device=cuda", "train.scan=native"], "train.scan native does not run on cuda: set train.scan to auto"),
        (["device=cpu", "train.scan=mamba"], "train.scan mamba does not run on cpu"),
        (["train.scan=natve"], "^--set train.scan: got 'natve', expected: "),
        (["train.batch_image=128"], r"^--set train.batch_image: unknown key \(did you mean 'batch_images'"),
        (["train.compile=true", "train.checkpointing=selective"], "selective checkpointing cannot be compiled"),
        (["train.graphs=true", "train.zero_stage=3"], "graphs: blocks that are compiled or recomputed"),
        (["train.graphs=true", "train.checkpointing=block"], "graphs: blocks that are compiled or recomputed"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(settings: list[str], line: str) -> None:
    with pytest.raises(UserError, match=line):
        reading.load(TINY, settings)


def test_a_variant_may_be_added_but_not_changed() -> None:
    stored, more = reading.load(TINY), reading.load(TINY, ["evaluate.variants.plain={guidance: 1.0}"])
    assert identity_differences(stored, more) == []
    other = reading.load(TINY, ["evaluate.variants.wide.guidance=2.0"])
    assert identity_differences(stored, other) == ["evaluate.variants.wide.guidance: stored 1.0, given 2.0"]


def test_a_model_has_training_settings_of_its_own() -> None:
    own = "models.dis.train={learning_rate: 3e-4, batch_images: 32, publish_images: [0, 640]}"
    recipe = reading.load(TINY, [own])
    changed, common = recipe.train_of("dis"), recipe.train_of("dit")
    assert (changed.learning_rate, changed.batch_images, changed.images, changed.lanes) == (3e-4, 32, 640, 4)
    assert common == recipe.train
    assert reading.parse(reading.dump(recipe), "stored") == recipe
    longer = reading.load(TINY, [own.replace("[0, 640]", "[0, 640, 1280]")])
    assert identity_differences(recipe, longer) == []


def test_several_seeds_of_a_model_are_several_models() -> None:
    recipe = reading.load(TINY, ["seed=5", "models.dis.seeds=3"])
    assert list(recipe.models) == ["dis", "dis-seed-1", "dis-seed-2", "dit"]
    assert [recipe.seed_of(model) for model in recipe.models] == [5, 6, 7, 5]
    assert identity_differences(reading.load(TINY, ["seed=5"]), recipe) == []
    assert reading.parse(reading.dump(recipe), "stored") == recipe


def test_a_stored_recipe_may_gain_seeds_and_cooldowns() -> None:
    """It names each setting, also those that were left out."""
    stored, more = reading.dump(reading.load(TINY)), ["models.dit.seeds=2", "train.cooldowns={images: [320]}"]
    assert reading.parse(stored, "stored", more).models == reading.load(TINY, more).models


def test_a_cooldown_that_is_there_keeps_its_share() -> None:
    """A stored recipe has its branches: another share was taken without a word, and changed nothing."""
    stored = reading.dump(reading.load(TINY, ["train.cooldowns={images: [320], share: 0.25}"]))
    again = reading.parse(stored, "stored", ["train.cooldowns={images: [160, 320], share: 0.25}"])
    assert again.models["dit-at-320"] == reading.parse(stored, "stored").models["dit-at-320"]
    with pytest.raises(UserError, match=r"train.cooldowns: dis-at-320 is there and begins at other images: give its own share"):
        reading.parse(stored, "stored", ["train.cooldowns={images: [320], share: 0.5}"])


def test_a_models_own_decay_may_not_end_elsewhere() -> None:
    begun, longer = (
        reading.load(TINY, ["models.dis.train={decay: linear}", f"train.publish_images={counts}"])
        for counts in ([0, 320], [0, 320, 640])
    )
    assert identity_differences(begun, longer) == ["models.dis.train.publish_images: the linear decay ends at 320, given 640"]


def test_cooldowns_are_branches_of_each_model() -> None:
    recipe = reading.load(TINY, ["models.dit.seeds=2", "train.cooldowns={images: [160, 320], share: 0.25}"])
    assert list(recipe.models) == [
        *("dis", "dit", "dit-seed-1"),
        *(f"{name}-at-{n}" for name in ("dis", "dit", "dit-seed-1") for n in (160, 320)),
    ]
    branch, settings = recipe.models["dit-seed-1-at-160"], recipe.train_of("dit-seed-1-at-160")
    assert branch.branch
    assert (branch.branch.of, branch.seed) == ("dit-seed-1", 1)
    assert (settings.decay, settings.publish_images) == ("linear", (160,))
    assert settings.decay_from * 160 == branch.branch.at == 112
    assert recipe.branches_at("dit") == {112, 240}
    assert reading.parse(reading.dump(recipe), "stored") == recipe
