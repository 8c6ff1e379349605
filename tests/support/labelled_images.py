"""Small labelled images of two classes in every kind of source; all kinds have the same pictures."""

import io
import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from dis_scale.recipe import Data, LatentsSource, reading
from dis_scale.storage.folder import Folder, open_folder
from dis_scale.sweep import Sweep
from tests.conftest import TINY

CLASSES = ["cat", "dog"]
LABELS = [0, 0, 0, 1, 1, 1, 1]
FEATURES = {"info": {"features": {"label": {"names": CLASSES, "_type": "ClassLabel"}}}}

LARGE = np.random.default_rng(0).bytes(2 * 10**6)
"""Long enough that a hole or a second tar lies beyond one window of the listing."""


def png(i: int) -> bytes:
    """Return picture i: its own noise."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(i).integers(0, 255, (24, 20, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def picture(number: int) -> bytes:
    """An image whose colour is its number."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (number % 256, number // 256, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def in_shards(latents: Folder) -> Counter[tuple[int, int]]:
    """The (number of the picture, label) of all samples."""
    found = Counter[tuple[int, int]]()
    for name in latents.list():
        if name.endswith(".tar"):
            with tarfile.open(fileobj=io.BytesIO(latents.read(name))) as shard:
                files = {member.name: shard.extractfile(member).read() for member in shard}  # type: ignore[union-attr]
            for key in {name.partition(".")[0] for name in files}:
                pixels = np.load(io.BytesIO(files[f"{key}.moments.npy"]))[0, :2, 0, 0].astype(float)
                red, green = np.round((pixels + 1) * 127.5).astype(int).tolist()
                found[red + 256 * green, json.loads(files[f"{key}.json"])["label"]] += 1
    return found


def tar(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as out:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def parquet(
    rows: list[tuple[bytes | None, Any]],
    group: int = 2,
    metadata: dict[str, Any] | None = FEATURES,
    columns: tuple[str, ...] = ("image", "label"),
) -> bytes:
    images = pa.array([{"bytes": data, "path": None} for data, _ in rows], pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    labels = pa.array([label for _, label in rows])
    table = pa.Table.from_arrays([images, labels, labels][: len(columns)], columns)
    if metadata:
        table = table.replace_schema_metadata({"huggingface": json.dumps(metadata)})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=group)
    return buffer.getvalue()


def class_folders(root: Folder) -> dict[str, Any]:
    for i, label in enumerate(LABELS):
        root.write(f"{CLASSES[label]}/{i}.png", png(i))
    return {"kind": "folder", "url": root.url}


def csv_file(root: Folder) -> dict[str, Any]:
    for i in range(len(LABELS)):
        root.write(f"pictures/{i}.png", png(i))
    lines = [f"{CLASSES[label]},pictures/{i}.png" for i, label in enumerate(LABELS)]
    root.write("labels.csv", "\n".join(["what,file", *lines]).encode())
    return {"kind": "csv", "url": f"{root}/labels.csv", "path": "file", "label": "what"}


def _shards(root: Folder, companions: Any) -> None:
    """Write two tars, the last part first; each picture with its companion files."""
    for name, part in (("b.tar", range(4, 7)), ("a.tar", range(4))):
        root.write(name, tar({k: v for i in part for k, v in ({f"d/{i}.x.png": png(i)} | companions(i)).items()}))


def webdataset_cls(root: Folder) -> dict[str, Any]:
    _shards(root, lambda i: {f"d/{i}.cls": str(LABELS[i]).encode(), f"d/{i}.txt": b"unused"})
    return {"kind": "tar", "url": root.url}


def webdataset_json(root: Folder) -> dict[str, Any]:
    _shards(root, lambda i: {f"d/{i}.json": json.dumps({"animal": CLASSES[LABELS[i]]}).encode()})
    return {"kind": "tar", "url": root.url, "label": "json", "json_key": "animal"}


def class_folders_in_a_tar(root: Folder) -> dict[str, Any]:
    root.write("all.tar", tar({f"train/{CLASSES[label]}/{i}.PNG": png(i) for i, label in enumerate(LABELS)}))
    return {"kind": "tar", "url": f"{root}/all.tar", "label": "folder"}


def a_tar_for_each_class(root: Folder) -> dict[str, Any]:
    for label, name in enumerate(CLASSES):
        root.write(f"{name}.tar", tar({f"{i}.png": png(i) for i, of in enumerate(LABELS) if of == label}))
    return {"kind": "tar", "url": root.url, "label": "tar"}


def hugging_face(root: Folder) -> dict[str, Any]:
    for name, part in (("train-1.parquet", range(5, 7)), ("train-0.parquet", range(5))):
        root.write(name, parquet([(png(i), LABELS[i]) for i in part]))
    root.write("test-0.parquet", parquet([(png(9), -1)]))
    return {"kind": "parquet", "url": root.url, "files": "train-*.parquet"}


KINDS = {
    function.__name__: function
    for function in (
        class_folders, csv_file, webdataset_cls, webdataset_json, class_folders_in_a_tar, a_tar_for_each_class, hugging_face
    )
}  # fmt: skip


def data(source: dict[str, Any], num_classes: int | str = 2, **more: Any) -> Data:
    return Data.model_validate({"source": source, "resolution": 16, "num_classes": num_classes, **more})


def latents_source(layout: str, url: Path | str = "/latents") -> LatentsSource:
    return LatentsSource.model_validate({"kind": "latents", "layout": layout, "url": str(url)})


def sweep_on(root: Path, source: dict[str, Any], *more: str, classes: int = 100) -> Sweep:
    """A sweep of the tiny recipe whose images are a source."""
    settings = [f"data.source={source}".replace("'", ""), "vae={kind: none}", "data.resolution=8", f"data.num_classes={classes}"]
    return Sweep.below(open_folder(root) / "store", reading.load(TINY, [*settings, *more]))
