"""A source is listed once, in bounded memory; the first listing counts, and a new version makes a new one."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dis_scale.data import listing
from dis_scale.data.listing import Contents, Entry
from dis_scale.data.mixing import permutation
from dis_scale.data.sources import open_source
from dis_scale.process.errors import StorageError, UserError
from dis_scale.storage import manifest
from dis_scale.storage.folder import Folder, open_folder
from tests.support import labelled_images
from tests.support.labelled_images import CLASSES, data, png

IMAGENET = 1_281_167
ROOT = Path(__file__).parents[2]


def entries(count: int) -> Iterator[Entry]:
    return (Entry(f"n{i % 997:08d}/n{i % 997:08d}_{i}.JPEG", i % 1000, f"{i // 1000}.tar", (i, 2 * i)) for i in range(count))


def test_entries_are_read_by_position_across_parts() -> None:
    count = listing.PART + 3
    made = listing.in_memory(Contents(entries(count), where="here"), lambda _: None)
    expected = list(entries(count))
    for i in (0, 1, listing.PART - 1, listing.PART, count - 1):
        assert made[i] == expected[i]
    assert made[listing.PART - 2 : listing.PART + 2] == expected[listing.PART - 2 : listing.PART + 2]
    with pytest.raises(IndexError, match=f"here: entry {count} of {count}"):
        made[count]
    assert made.labels().tolist() == [entry.label for entry in expected]


def test_names_of_any_bytes_are_kept() -> None:
    odd = Entry("caf\udce9/\u65e5\u672c.png", 0, "a b.tar")
    assert listing.in_memory(Contents([odd]), lambda _: None)[0] == odd


def test_the_hash_is_of_content_and_order() -> None:
    def sha(items: list[Entry]) -> str:
        return str(listing.in_memory(Contents(items, where="here"), lambda _: None).manifest.sha256)

    one, two = list(entries(2))
    assert sha([one, two]) == sha([one, two])
    assert (
        len({sha(x) for x in ([one, two], [two, one], [one], [one._replace(label=3), two], [one._replace(version="2"), two])}) == 5
    )


def list_many(where: str, count: int, part: int, mixed: bool) -> None:
    """In a process of its own: list, read the ends, print the number of reports and how much memory that needed at most."""
    listing.PART = part
    reports: list[int] = []
    before = peak_bytes()
    made = listing.stored(open_folder(where), "many", lambda: Contents(entries(count), mixed=mixed), lambda _: None, reports.append)
    ends = [0, count - 1]
    expected = permutation(count)[ends].tolist() if mixed else ends
    assert [made[i].location[0] for i in ends] == expected
    assert made[0].label == expected[0] % 1000
    print(len(reports), peak_bytes() - before)


def peak_bytes() -> int:
    """Return this process's peak memory; not getrusage's ru_maxrss, which a child inherits from its parent."""
    return 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])


@pytest.mark.parametrize(
    ("count", "part", "mixed", "most_bytes"),
    [
        (10 * 2**13 + 1, 2**13, False, 10 * 2**20),
        (10 * 2**13 + 1, 2**13, True, 18 * 2**20),
        pytest.param(IMAGENET, listing.PART, False, 5 * 2**25, marks=pytest.mark.slow),
        pytest.param(IMAGENET, listing.PART, True, 7 * 2**25, marks=pytest.mark.slow),
    ],
)
def test_many_images_are_listed_and_read_in_little_memory(
    count: int, part: int, mixed: bool, most_bytes: int, tmp_path: Path
) -> None:
    """Ten parts, as of ImageNet: only one of them is in memory; in the mixed order all, but compact."""
    code = f"from tests.data.test_listing import list_many; list_many({str(tmp_path)!r}, {count}, {part}, {mixed})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    reports, grown_bytes = map(int, done.stdout.split())
    assert reports == count // listing.REPORT_EVERY + mixed * -(-count // part)
    assert grown_bytes < most_bytes
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.npz")) < 26 * count


def test_a_declared_source_is_listed_once_for_each_version(store_url: str, tmp_path: Path) -> None:
    store, images = open_folder(store_url) / "store", open_folder(tmp_path) / "images"
    source = labelled_images.class_folders(images)
    first = open_source(data(source), store)
    images.write("dog/7.png", png(7))
    again = open_source(data(source), store)
    assert (len(first), len(again), again.listing.manifest.sha256) == (7, 7, first.listing.manifest.sha256)
    assert len(open_source(data(source | {"version": "2"}), store)) == 8
    assert len(store.list("listings")) == 2


def test_a_listing_that_does_not_fit_the_recipe_is_not_stored(tmp_path: Path) -> None:
    """So it is enough to repair the source and rerun."""
    store, images = open_folder(tmp_path) / "store", open_folder(tmp_path) / "images"
    source = labelled_images.class_folders(images)
    with pytest.raises(UserError, match=r"data.num_classes: got 3, but the source has 2 classes"):
        open_source(data(source, 3), store)
    images.write("owl/1.png", png(1))
    assert open_source(data(source, 3), store).label_names == [*CLASSES, "owl"]


def test_two_processes_that_list_at_once_use_the_first_listing(tmp_path: Path) -> None:
    """The source changes between them; neither reads a mixture."""
    store = open_folder(tmp_path)

    def slow(count: int) -> Iterator[Entry]:
        for entry in entries(count):
            time.sleep(0.01)
            yield entry

    def run(count: int) -> list[Entry]:
        return list(listing.stored(store, "key", lambda: Contents(slow(count)), lambda _: None, lambda _: None))

    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(run, (10, 11))
    assert one == other
    assert one == list(entries(len(one)))


def test_a_part_that_grows_when_unpacked_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, store = data(labelled_images.csv_file(open_folder(tmp_path))), open_folder(tmp_path / "store")
    assert open_source(source, store).names[0]
    monkeypatch.setattr(listing, "PART_BYTES", 100)
    with pytest.raises(StorageError, match=r"part 0: damaged: unpacked it has .* bytes, and at most 100 are read"):
        open_source(source, store).names[0]


def stored_listing(root: Path) -> Folder:
    """A stored listing of class folders; its folder."""
    store = open_folder(root)
    open_source(data(labelled_images.class_folders(open_folder(root) / "images")), store)
    (folder,) = store.list("listings")
    return store / "listings" / folder


def part_of(folder: Folder) -> str:
    (name,) = [each for each in folder.list() if each != manifest.NAME]
    return name


@pytest.mark.parametrize("damaged", [part_of, lambda _: manifest.NAME], ids=["a part", "the manifest"])
def test_a_damaged_listing_is_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damaged: Callable[[Folder], str]
) -> None:
    folder = stored_listing(tmp_path)
    name, before = damaged(folder), {each: folder.read(each) for each in folder.list()}
    folder.write(name, b"x")
    source = data(labelled_images.class_folders(open_folder(tmp_path) / "images"))
    assert len(list(open_source(source, open_folder(tmp_path)).listing)) == 7
    assert f"{folder}/{name}: damaged: " in caplog.text
    assert {each: folder.read(each) for each in folder.list()} == before


def test_a_damaged_listing_of_a_changed_source_is_named(tmp_path: Path) -> None:
    folder = stored_listing(tmp_path)
    name, images = part_of(folder), open_folder(tmp_path) / "images"
    folder.write(name, b"x")
    images.write("dog/7.png", png(7))
    with pytest.raises(StorageError, match=f"{name}: damaged: 1 bytes, its manifest says"):
        list(open_source(data({"kind": "folder", "url": images.url}), open_folder(tmp_path)).listing)
