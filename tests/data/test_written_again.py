"""Sources that change after they were listed, and web servers that do not say whether they did."""

import os
import re
import threading
from collections.abc import Callable, Iterable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from dis_scale.data.sources import open_source
from dis_scale.process.errors import StorageError, UserError
from dis_scale.storage.folder import open_folder
from tests.support.labelled_images import LARGE, data, parquet, picture, tar


def test_a_file_that_is_written_again_after_it_was_listed_is_refused(store_url: str) -> None:
    """Rows in another order: each label would be of another image."""
    root, store = open_folder(store_url) / "images", open_folder(store_url) / "store"
    rows = [(picture(number), number % 2) for number in range(40)]
    files: dict[str, Callable[[Iterable[int]], bytes]] = {
        "tar": lambda order: tar({k: v for i in order for k, v in ((f"{i}.png", rows[i][0]), (f"{i}.cls", b"01"[i % 2 :][:1]))}),
        "parquet": lambda order: parquet([rows[i] for i in order]),
    }  # fmt: skip
    for kind, file in files.items():
        recipe = data({"kind": kind, "url": (root / kind).url})
        (root / kind).write(f"a.{kind}", file(range(40)))
        open_source(recipe, store).pixels(0, 8)
        (root / kind).write(f"a.{kind}", file(reversed(range(40))))
        with pytest.raises(StorageError, match=rf"a.{kind}: it was written again after it was listed .*data.source.version"):
            open_source(recipe, store).pixels(0, 8)


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_a_file_that_is_written_again_while_a_process_reads_it_is_refused(kind: str, store_url: str) -> None:
    """Hours after it was opened; what was read before is of the listed file."""
    root = open_folder(store_url) / "images"
    rows = [(picture(number), number % 2) for number in range(40)]

    def write(numbers: list[int]) -> None:
        members = {k: v for i in numbers for k, v in ((f"{i}.png", rows[i][0]), (f"{i}.cls", b"01"[i % 2 :][:1]))}
        root.write(f"a.{kind}", tar(members) if kind == "tar" else parquet([rows[i] for i in numbers], group=5))

    write(list(range(40)))
    source = open_source(data({"kind": kind, "url": root.url}))
    assert source.pixels(0, 8)[0, 0, 0] == 0
    write(list(reversed(range(40))))
    with pytest.raises(StorageError, match=rf"a.{kind}: it was written again after it was listed"):
        source.pixels(20, 8)


def test_labels_that_are_corrected_after_they_were_listed_are_refused(tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
    file, store = tmp_path / "labels.csv", open_folder(tmp_path / "store")
    for labels in ("0101", "1010"):
        file.write_text("\n".join(["path,label", *(f"{i}.png,{y}" for i, y in enumerate(labels))]))
        os.utime(file, (int(labels), int(labels)))
        source = {"kind": "csv", "url": str(file)}
        if labels == "0101":
            assert sorted(open_source(data(source), store).labels) == [0, 0, 1, 1]
            continue
        with pytest.raises(StorageError, match=r"labels.csv: it was written again after it was listed"):
            open_source(data(source), store)


class WholeServer(SimpleHTTPRequestHandler):
    """Answers with the complete file, whatever range is asked for."""

    def log_message(self, *_: object) -> None:
        pass


def test_a_web_server_without_byte_ranges_is_named_and_no_file_called_damaged(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar({f"{i}.png": picture(i) for i in range(20)} | {"x.bin": LARGE}))
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(WholeServer, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/a.tar"
        with pytest.raises(StorageError, match=r"a.tar: the server ignores byte ranges: copy it to a disk or a store"):
            open_source(data({"kind": "tar", "url": url}, "none"))
        server.shutdown()


class WebServer(SimpleHTTPRequestHandler):
    """Serves a folder with its files' times, by range."""

    def do_GET(self) -> None:
        data, (first, last) = (Path(self.translate_path(self.path)).read_bytes(), re.findall(r"\d+", self.headers["Range"]))
        part = data[int(first) : int(last) + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)

    def log_message(self, *_: object) -> None:
        pass


def test_a_file_of_a_web_server_that_is_written_again_is_refused(tmp_path: Path) -> None:
    """It has as many bytes as before, and the server states its time only."""
    file = tmp_path / "a.parquet"
    file.write_bytes(parquet([(picture(1), 0), (picture(2), 1)], metadata=None))
    os.utime(file, (10**9, 10**9))
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(WebServer, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        recipe = data({"kind": "parquet", "url": f"http://127.0.0.1:{server.server_port}/a.parquet"})
        assert len(open_source(recipe, open_folder(tmp_path / "store"))) == 2
        os.utime(file)
        with pytest.raises(StorageError, match=r"a.parquet: it was written again after it was listed \(.*2001"):
            open_source(recipe, open_folder(tmp_path / "store")).pixels(0, 8)
        server.shutdown()


class NoTimeServer(WebServer):
    """Serves a folder by range, and states neither time nor ETag."""

    def send_header(self, keyword: str, value: str) -> None:
        if keyword != "Last-Modified":
            super().send_header(keyword, value)


def test_a_file_whose_server_states_no_version_is_refused(tmp_path: Path) -> None:
    """If it was written again, nothing would tell, and all labels could be wrong."""
    (tmp_path / "a.tar").write_bytes(tar({"1.png": picture(1), "1.cls": b"0"}))
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(NoTimeServer, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/a.tar"
        with pytest.raises(UserError, match=r"a.tar: its server states neither a time nor an ETag, .*: copy it to a disk"):
            open_source(data({"kind": "tar", "url": url}))
        server.shutdown()
