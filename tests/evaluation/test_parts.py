"""Statistics in parts: equal bytes for any number of workers, and only missing or damaged parts are computed again."""

import copy
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dis_scale.data.listing import Entry
from dis_scale.data.sources import Source, open_source
from dis_scale.evaluation import parts, reference
from dis_scale.evaluation.features import Extractor, load_extractors
from dis_scale.process.errors import DisScaleError, Held, UndecodableImage, UserError
from dis_scale.recipe import reading
from dis_scale.storage import lease
from dis_scale.storage.folder import open_folder
from dis_scale.storage.programs import hash_of
from dis_scale.sweep import Sweep, extractors, state
from dis_scale.sweep.extractors import part_count, reference_file
from tests.conftest import TINY
from tests.support.programs import Pixels, export, pixels, with_exported
from tests.support.stage_jobs import deal_of
from tests.support.stages import preparer

PART = 300


@pytest.fixture(autouse=True)
def part_images(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Images of a part; with 300 the 1,797 digits have six parts, the last one of 297."""
    images: int = getattr(request, "param", PART)
    monkeypatch.setattr(extractors, "REFERENCE_PART_IMAGES", images)
    return images


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    """Two extractors, in a store of its own."""
    a, b = export(tmp_path / "a.pt2"), export(tmp_path / "b.pt2", Pixels(8, 8))
    return Sweep.below(open_folder(tmp_path) / "store", with_exported(a=a, b=b))


@pytest.fixture
def source(sweep: Sweep) -> Source:
    return open_source(sweep.recipe.data)


def counted(source: Source) -> tuple[Source, list[int]]:
    """Return the source, and the list to which it appends the position of each image that is read."""
    opened, position = list[int](), {name: i for i, name in enumerate(source.names)}

    def read(entries: Sequence[Entry]) -> list[bytes | None]:
        opened.extend(position[entry.name] for entry in entries)
        return source.read(entries)

    return replace(source, read=read), opened


def make_parts(sweep: Sweep, source: Source, numbers: Sequence[int]) -> None:
    for number in numbers:
        parts.make(sweep, source, loaded(sweep), number, lambda _: None)


def loaded(sweep: Sweep) -> list[Extractor]:
    return load_extractors(sweep, torch.device("cpu"))


def stored(sweep: Sweep) -> list[bytes]:
    return [sweep.references.read(reference_file(sweep, e.name, e.identity)) for e in loaded(sweep)]


def prepare(sweep: Sweep, source: Source) -> tuple[list[int], list[str]]:
    """Store the references; return the progress and the messages."""
    seen, said = list[int](), list[str]()
    reference.prepare(sweep, source, loaded(sweep), seen.append, said.append)
    return seen, said


def elsewhere(sweep: Sweep) -> Sweep:
    return replace(sweep, folder=open_folder(f"{sweep.store}/elsewhere/sweeps/other"))


def test_one_and_three_workers_store_the_same_bytes(sweep: Sweep, source: Source) -> None:
    """Workers on threads of their own, in the methods that run on Ray; none sees all parts."""
    seen, _ = prepare(sweep, source)
    assert seen == sorted(seen)
    assert seen[-1] == 1797
    other, workers = elsewhere(sweep), [preparer(sweep) for _ in range(3)]
    left = state.reference_parts_missing(other, len(source))
    assert left == [0, 1, 2, 3, 4, 5]
    threads = [
        threading.Thread(target=worker.make_parts, args=(other, "cpu", deal_of(left[i::3]))) for i, worker in enumerate(workers)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [worker.poll()[0] for worker in workers] == [600, 600, 597]
    assert state.reference_parts_missing(other, len(source)) == []
    workers[0].merge_parts(other, "cpu")
    assert stored(other) == stored(sweep)


def test_a_stage_that_lost_its_lease_writes_no_reference(sweep: Sweep, source: Source) -> None:
    late = preparer(sweep)
    with lease.hold(sweep.lease("prepare")), pytest.raises(Held, match="another process has taken over from this one"):
        late.merge_parts(sweep, "cpu")
    assert state.references_missing(sweep) == [e.name for e in sweep.recipe.evaluate.extractors]


def test_parts_give_the_statistics_of_one_pass(sweep: Sweep, source: Source) -> None:
    prepare(sweep, source)
    for extractor in loaded(sweep):
        features, ours = (extractor(pixels(source)).pooled, reference.load(sweep, extractor.name, extractor.identity))
        np.testing.assert_allclose(ours.pooled.mean, features.mean(0, np.float64), rtol=1e-12)
        np.testing.assert_allclose(ours.pooled.covariance, np.cov(features.T), rtol=1e-9)
        assert np.array_equal(ours.kept, features)  # type: ignore[arg-type]


def test_a_rerun_computes_only_the_parts_of_the_lost_worker(sweep: Sweep, source: Source) -> None:
    """One worker was lost after two of its parts, the other had made part 4."""
    undisturbed = elsewhere(sweep)
    prepare(undisturbed, source)
    make_parts(sweep, source, [0, 2, 4])
    assert state.references_missing(sweep) == ["a", "b"]
    left = state.reference_parts_missing(sweep, len(source))
    assert left == [1, 3, 5]
    again, opened = counted(source)
    make_parts(sweep, again, left)
    assert sorted(opened) == [*range(300, 600), *range(900, 1200), *range(1500, 1797)]
    opened.clear()
    prepare(sweep, again)
    assert opened == []
    assert stored(sweep) == stored(undisturbed)


def test_an_extractor_that_lacks_a_part_is_computed_alone(sweep: Sweep, source: Source) -> None:
    """A worker was lost between the files of the two extractors."""
    make_parts(sweep, source, range(6))
    b = loaded(sweep)[1]
    sweep.reference_parts.delete(extractors.reference_part(sweep, "b", b.identity, 3))
    assert state.reference_parts_missing(sweep, len(source)) == [3]
    again, opened = counted(source)
    prepare(sweep, again)
    assert sorted(opened) == [*range(900, 1200)]


def test_parts_are_deleted_when_the_statistics_are_stored(sweep: Sweep, source: Source) -> None:
    make_parts(sweep, source, [0, 1])
    assert len(sweep.reference_parts.list()) == 4
    prepare(sweep, source)
    assert [name for name in sweep.references.list() if name.endswith(".npz")] == sorted(
        reference_file(sweep, e.name, e.identity) for e in loaded(sweep)
    )
    assert sweep.reference_parts.list() == []


def test_parts_that_were_left_behind_are_deleted(sweep: Sweep, source: Source) -> None:
    """The worker was lost between the statistics and the deletion."""
    prepare(sweep, source)
    sweep.reference_parts.write("left", b"")
    again, opened = counted(source)
    prepare(sweep, again)
    assert (sweep.reference_parts.list(), opened) == ([], [])


@pytest.mark.parametrize("how", ["flipped", "of another listing"])
def test_a_part_that_cannot_be_used_is_named_and_computed_again(sweep: Sweep, source: Source, how: str) -> None:
    undisturbed = elsewhere(sweep)
    prepare(undisturbed, source)
    make_parts(sweep, source, range(6))
    name = extractors.reference_part(sweep, "a", loaded(sweep)[0].identity, 2)
    if how == "flipped":
        content = bytearray(sweep.reference_parts.read(name))
        content[100] ^= 1
        sweep.reference_parts.write(name, bytes(content))
    else:
        listing = copy.copy(source.listing)
        listing.manifest = source.listing.manifest.changed(sha256="other")
        parts.make(sweep, replace(source, listing=listing), loaded(sweep)[:1], 2, lambda _: None)
    again, opened = counted(source)
    _, said = prepare(sweep, again)
    reason = {"flipped": "damaged: its sha256 differs", "of another listing": "of another listing"}[how]
    assert len(said) == 1
    assert said[0].startswith(f"computed again: {sweep.reference_parts}/{name}: {reason}")
    assert sorted(opened) == [*range(600, 900)]
    assert stored(sweep) == stored(undisturbed)


def photos(tmp_path: Path, count: int = 26) -> Sweep:
    """Return a sweep of small images in one folder; the fourth cannot be decoded."""
    rng = np.random.default_rng(0)
    for i in range(count):
        path = tmp_path / f"photos/{'ab'[i * 2 // count]}/{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(path)
    (tmp_path / "photos/a/03.png").write_bytes(b"broken")
    path = export(tmp_path / "dino.pt2")
    extractor = f"{{kind: exported, name: dino, path: '{path}', sha256: '{hash_of([str(path)], 'dino')}'}}"
    source = f"data.source={{kind: folder, url: '{tmp_path}/photos'}}"
    settings = [source, "data.num_classes=2", f"evaluate.extractor={extractor}", "data.undecodable=skip"]
    return Sweep.below(open_folder(tmp_path) / "store", reading.load(TINY, settings))


class InADict(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"features": x.float().flatten(1)}


@pytest.mark.parametrize(
    ("net", "got"), [(InADict(), "in a dict"), (Pixels(first=31, step=1), None), (torch.nn.Identity(), "of shape")]
)
def test_an_extractor_that_returns_no_features_is_named(net: torch.nn.Module, got: str | None, tmp_path: Path) -> None:
    """Before it is needed: with two images, and with one, as the last batch of a block may be."""
    sweep = Sweep.below(open_folder(tmp_path), with_exported(a=export(tmp_path / "a.pt2", net)))
    if got is None:
        assert load_extractors(sweep, torch.device("cpu"))[0](np.zeros((3, 32, 32, 3), np.uint8)).pooled.shape == (3, 2)
        return
    with pytest.raises(UserError, match=rf"a.pt2: features {got} .*for 2 images, expected \(2, d\) as its first output"):
        load_extractors(sweep, torch.device("cpu"))


@pytest.mark.parametrize("part_images", [10, 1], indirect=True)
def test_an_undecodable_image_is_skipped(tmp_path: Path, part_images: int) -> None:
    """One part has nine decodable images, or none."""
    sweep = photos(tmp_path)
    source, extractor = open_source(sweep.recipe.data), loaded(sweep)[0]
    in_parts = parts.merged(sweep, source, [extractor], lambda _: None, lambda _: None)["dino"]
    broken = source.names.index("a/03.png")
    assert broken < 20, "a part follows"
    decodable = [i for i in range(26) if i != broken]
    features = extractor(np.stack([source.pixels(i, 32) for i in decodable])).pooled
    assert in_parts.pooled.count == 25
    assert np.array_equal(in_parts.kept, features)
    np.testing.assert_allclose(in_parts.pooled.mean_covariance().mean, features.mean(0, np.float64), rtol=1e-12)
    assert part_count(26) == {10: 3, 1: 26}[part_images]


def test_an_undecodable_image_is_refused_by_default(tmp_path: Path) -> None:
    sweep = photos(tmp_path)
    refusing = sweep.recipe.data.model_copy(update={"undecodable": "refuse"})
    sweep = replace(sweep, recipe=sweep.recipe.model_copy(update={"data": refusing}))
    with pytest.raises(UndecodableImage, match=r"image a/03.png cannot be decoded"):
        prepare(sweep, open_source(refusing))
    skipping = photos(tmp_path)
    prepare(skipping, open_source(skipping.recipe.data))
    assert state.references_missing(sweep) == [], "precompute refuses the set, in which the same images are left out"


def test_a_source_without_a_decodable_image_is_refused(tmp_path: Path) -> None:
    sweep = photos(tmp_path, 4)
    for path in (tmp_path / "photos").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(DisScaleError, match="a covariance needs at least 2 samples, got 0"):
        prepare(sweep, open_source(sweep.recipe.data))


def test_files_are_read_by_32_threads(tmp_path: Path) -> None:
    sweep = photos(tmp_path, 832)
    source, extractor = open_source(sweep.recipe.data), loaded(sweep)[0]
    busy, most, lock = 0, 0, threading.Lock()

    def slow(entries: Sequence[Entry]) -> list[bytes | None]:
        nonlocal busy, most
        with lock:
            busy, most = busy + 1, max(most, busy + 1)
        time.sleep(0.05 * len(entries))
        with lock:
            busy -= 1
        return source.read(entries)

    parts.merged(sweep, replace(source, read=slow), [extractor], lambda _: None, lambda _: None)
    assert most == 32
