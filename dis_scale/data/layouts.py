"""Latents in the layouts of other programs: read as a source, and written by `dis-scale data export`.

| layout | a latent is | its class is |
|---|---|---|
| edm2 | `NNNNN/img-mean-std-NNNNNNNN.npy`, float32 (2C, h, w): mean, then deviation; in a folder or a `.zip` | in `dataset.json` |
| repa | the same, below `vae-sd/` | in `vae-sd/dataset.json` |
| webdataset | `<key>.latent` in tars, a pickled float32 array (2C, h, w): mean, then log-variance (MaskDiT's) | in `<key>.cls` |
| safetensors | a row of `latents`, (N, C, h, w), and of `latents_flip` if there are mirror images (LightningDiT's) | in `labels` |

Sources: NVlabs/edm2 `dataset_tool.py`, sihyun-yu/REPA `preprocessing/`, Anima-Lab/MaskDiT `lmdb2wds.py` and `utils.py`,
hustvl/LightningDiT `datasets/img_latent_dataset.py`.
"""

import io
import json
import math
import pickle
import pickletools
import re
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np

from dis_scale.data import tars
from dis_scale.data.images import ending, hidden, undecodable
from dis_scale.data.listing import HIDDEN, Contents, Entry, LeftOut, of_files
from dis_scale.process.errors import StorageError, UserError, printable
from dis_scale.process.progress import some
from dis_scale.recipe import LatentsSource, TarSource
from dis_scale.storage import npy
from dis_scale.storage.document import LARGEST_BYTES
from dis_scale.storage.folder import Folder

LABELS = "dataset.json"
REPA_FOLDER = "vae-sd"
UNFINISHED = ".unfinished"
"""A file in the folder of an incomplete export; it names the layout and the exported set."""
NO_VARIANCE = float(np.finfo(np.float16).min)
"""The same value as in vae/interface.py, which imports PyTorch."""
LEAST_LOG_VARIANCE, MOST_LOG_VARIANCE = -30.0, 20.0
"""Bounds of a log-variance in Stable Diffusion's autoencoder and in each program that samples from stored moments."""
HEADER_BYTES = 2**26
"""Most bytes of a safetensors file's header."""
_LOCAL_HEADER = 30
"""Bytes of a zip member's own header before its name."""
_TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "U8": "|u1"}


class InFiles(NamedTuple):
    """A layout with many images or latents in a file: the files' ending, and how they are listed and read."""

    suffix: str
    find: Callable[[Folder, list[str]], Contents]
    read: Callable[[Folder, Sequence[Entry]], list[bytes]]
    near: Callable[[Entry, Entry], bool]


def root_of(source: LatentsSource, url: Folder) -> Folder:
    """Return the folder of the latents: for REPA, `vae-sd` beside its images. UserError if the URL is `vae-sd` itself."""
    if source.layout == "repa" and url.name == REPA_FOLDER:
        raise UserError(f"data.source.url: {url} has the latents: layout repa expects the folder above {REPA_FOLDER}")
    return url / REPA_FOLDER if source.layout == "repa" else url


def many_in_a_file(source: LatentsSource, *, mirror: bool, labelled: bool) -> InFiles | None:
    """Return the functions that read a layout with many latents in a file; None if each latent has a file of its own."""
    match source.layout:
        case "webdataset":
            settings = TarSource(kind="tar", url=source.url, image=tars.LATENT, label="cls")
            return InFiles(".tar", partial(tars.find, settings=settings, labelled=labelled), tars.read, tars.near)
        case "safetensors":
            files = _Safetensors(mirror=mirror, labelled=labelled)
            return InFiles(".safetensors", files.find, files.read, lambda first, entry: first.file == entry.file)
        case _ if source.url.endswith(".zip"):

            def find(root: Folder, names: list[str]) -> Contents:
                return Contents(of_files(root, names, lambda name: _in_zip(root, name, labelled=labelled), 0))

            return InFiles(".zip", find, tars.read, tars.near)
    return None


def has_numbered_folders(root: Folder, folders: Sequence[str]) -> bool:
    """Return whether a folder is in the layout of EDM's `dataset_tool.py`: numbered folders of a thousand images each."""
    return bool(folders) and all(re.fullmatch(r"\d{5,}", name) for name in folders) and root.exists(LABELS)


def require_finished(root: Folder) -> None:
    """Raise UserError for the folder of an interrupted export, which otherwise looks complete."""
    if root.exists(UNFINISHED):
        raise UserError(f"{root}: an export was cut off, and latents are missing: run its dis-scale data export again")


def _bounded(root: Folder) -> bytes:
    if len(data := root.read_up_to(LABELS, LARGEST_BYTES)) > LARGEST_BYTES:
        raise UserError(f"{root}/{LABELS}: expected at most {LARGEST_BYTES:,} bytes of classes")
    return data


def find_files(root: Folder, *, labelled: bool) -> Iterator[Entry | LeftOut]:
    """List EDM2's files of a folder. UserError if a file has no class, or a class has no file."""
    labels = _labels(lambda: _bounded(root), f"{root}/{LABELS}") if labelled else None
    return _labelled(((name, "", (0, 0)) for name in root.walk() if name != LABELS), labels, str(root))


def moments(source: LatentsSource, data: bytes, name: str, *, mirror: bool) -> np.ndarray:
    """Return a latent's moments as shards have them, float16 (1, 2C, h, w).

    Layout safetensors has no variance: (1, C, h, w), or (2, C, h, w) with `mirror`. UndecodableImage if the bytes are no latent.
    """
    with undecodable(f"latent {printable(name)} cannot be read"):
        match source.layout:
            case "edm2" | "repa":
                return _of_mean_and_deviation(npy.read(_unzipped(data) if source.url.endswith(".zip") else data))
            case "webdataset":
                return _of_mean_and_log_variance(_unpickled(data))
            case "safetensors":
                return _finite(npy.read(data)[: 1 + mirror])


def edm2_file(position: int) -> str:
    """Return EDM2's name of the file of a latent."""
    return f"{position // 1000:05d}/img-mean-std-{position:08d}.npy"


def mean_and_deviation(moments_XHW: np.ndarray, *, posterior: bool) -> bytes:
    """Return EDM2's file of one latent's moments, float16 (2C, h, w); the deviation is 0 if they have no variance."""
    mean, log_variance = _split(moments_XHW, posterior=posterior)
    return npy.to_bytes(np.concatenate([mean, np.exp(log_variance / 2)]).astype(np.float32))


def mean_and_log_variance(moments_XHW: np.ndarray, *, posterior: bool) -> bytes:
    """Return MaskDiT's `.latent` of one latent's moments, float16 (2C, h, w)."""
    pickled = pickle.dumps(np.concatenate(_split(moments_XHW, posterior=posterior)).astype(np.float32), 3)
    # NumPy 1, which MaskDiT uses, knows only the old name; NumPy 2 knows both.
    return pickled.replace(b"cnumpy._core.", b"cnumpy.core.")


def _split(moments_XHW: np.ndarray, *, posterior: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and log-variance, float64."""
    if not posterior:
        return moments_XHW.astype(np.float64), np.full(moments_XHW.shape, NO_VARIANCE)
    mean, log_variance = np.split(moments_XHW.astype(np.float64), 2)
    return mean, log_variance


def _of_mean_and_deviation(stored: np.ndarray) -> np.ndarray:
    mean, deviation = _halves(stored)
    if not (deviation >= 0).all():
        raise ValueError("a deviation is negative or not a number: is it mean and deviation?")
    with np.errstate(divide="ignore"):  # of 0 it is minus infinity
        log_variance = np.maximum(2 * np.log(deviation), NO_VARIANCE)
    return _finite(np.concatenate([mean, log_variance])[None])


def _of_mean_and_log_variance(stored: np.ndarray) -> np.ndarray:
    mean, log_variance = _halves(stored)
    bounded = np.clip(log_variance, LEAST_LOG_VARIANCE, MOST_LOG_VARIANCE)
    bounded[log_variance <= NO_VARIANCE] = NO_VARIANCE
    return _finite(np.concatenate([mean, bounded])[None])


def _halves(stored: np.ndarray) -> list[np.ndarray]:
    """Return the halves of an array (2C, h, w) in float64; leading axes of one element are dropped."""
    if stored.ndim < 3 or stored.dtype.kind != "f" or int(np.prod(stored.shape[:-3])) != 1 or stored.shape[-3] % 2:
        raise ValueError(f"an array of {stored.dtype}, {stored.shape}; expected floating point (2C, h, w)")
    return np.split(stored.reshape(stored.shape[-3:]).astype(np.float64), 2)


def _finite(moments: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        half = moments.astype(np.float16)
    if not np.isfinite(half).all():
        raise ValueError("a value is not finite in float16")
    return half


class _Pickled:
    """Pickled facts of an array or of its type: the arguments of the function that would create it, and its state."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments, self.state = arguments, tuple[Any, ...]()

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _FromBuffer(_Pickled):
    pass


_PICKLED: dict[tuple[str, str], Any] = {("numpy", "ndarray"): None, ("numpy", "dtype"): _Pickled}
for _core in ("numpy.core", "numpy._core"):  # for NumPy 1 and 2, and all protocols of pickle
    _PICKLED |= {(f"{_core}.multiarray", "_reconstruct"): _Pickled, (f"{_core}.numeric", "_frombuffer"): _FromBuffer}


class _Unpickler(pickle._Unpickler):
    """Reads the facts of an array and calls no function: a pickle may name any, and NumPy's own trust their arguments.

    Based on the unpickler in Python: the one in C allocates a table of a length that a damaged byte states.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self._left = len(data)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            return self._encode
        if (module, name) not in _PICKLED:
            raise pickle.UnpicklingError(f"a pickle that calls {module}.{name}, expected an array of NumPy")
        return _PICKLED[module, name]

    def _encode(self, text: str, _: str) -> bytes:
        """Return a text as bytes. UnpicklingError if a pickle repeats a text until the copies are longer than the pickle."""
        self._left -= len(text)
        if self._left < 0:
            raise pickle.UnpicklingError("a pickle of more bytes than it has")
        return text.encode("latin1")


def _unpickled(data: bytes) -> np.ndarray:
    """Return the array in a pickle; ValueError or TypeError if it is anything else."""
    for _ in pickletools.genops(data):
        pass  # ValueError for a length beyond the data, before memory is allocated for it
    found = _Unpickler(data).load()
    if isinstance(found, _FromBuffer):
        values, kind, shape, order = found.arguments
    elif isinstance(found, _Pickled):
        _, shape, kind, by_columns, values = found.state
        order = "F" if by_columns else "C"
    else:
        raise TypeError(f"it is a pickled {type(found).__name__}, expected an array")
    name, endian = kind.arguments[0], kind.state[1]
    if not re.fullmatch(r"f[248]", name) or endian not in "<>":
        raise ValueError(f"an array of {name}, expected floating point")
    return np.frombuffer(values, f"{endian}{name}").reshape(shape, order=order)


def _labels(read: Callable[[], bytes], where: str) -> dict[str, int]:
    """Return the classes of EDM2's `dataset.json` by file."""
    try:
        pairs = json.loads(read())["labels"]
        labels = dict(pairs or ())
        if len(labels) < len(pairs or ()):
            raise ValueError("a file is named twice")
    except (FileNotFoundError, KeyError) as error:
        raise UserError(
            f"data.source.url: no classes in {where}, which is beside the folder 00000; for latents without classes set "
            "data.num_classes: none"
        ) from error
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f'{where}: expected {{"labels": [[file, class], ...]}}: {error}') from error
    if not labels:
        raise UserError(f"{where}: its labels are empty: set data.num_classes: none")
    if bad := next(((n, y) for n, y in labels.items() if isinstance(y, bool) or not isinstance(y, int)), None):
        raise UserError(f"{where}: {printable(bad[0])} has the class {bad[1]!r}, expected a number")
    return labels


def _labelled(
    files: Iterable[tuple[str, str, tuple[int, int]]], labels: dict[str, int] | None, where: str
) -> Iterator[Entry | LeftOut]:
    """Yield the latents among files, with their classes. Each file is a name, the file with its bytes, and the location there."""
    left = dict(labels or ())
    for name, file, location in files:
        if hidden(name) or not name.endswith(".npy"):
            yield LeftOut(name, HIDDEN if hidden(name) else ending(name))
            continue
        label = left.pop(name, None) if labels is not None else 0
        if label is None:
            raise UserError(f"{where}: {printable(name)} has no class in {LABELS}: add it, or remove the file")
        yield Entry(name, label, file, location)
    if left:
        raise UserError(
            f"{where}: {len(left):,} files of {LABELS} are not there: {some([printable(name) for name in left])}; "
            "copy them, or remove them from it"
        )


def _in_zip(root: Folder, name: str, *, labelled: bool) -> Iterator[Entry | LeftOut]:
    """Yield the latents of a zip, which must be uncompressed. A location is from the member's header to the next member's."""
    where = f"{root}/{name}"
    try:
        with root.open(name) as file, npy.open_zip(file) as opened:
            labels = _labels(lambda: npy.member(opened, LABELS, LARGEST_BYTES), f"{where}/{LABELS}") if labelled else None
            members = sorted((m for m in opened.infolist() if not m.is_dir()), key=lambda m: m.header_offset)
            end = opened.start_dir
    except npy.MALFORMED as error:
        raise StorageError(f"{where}: not a complete zip: {error}") from error
    if packed := next((m.filename for m in members if m.compress_type and m.filename.endswith(".npy")), None):
        raise UserError(f"{where}: {printable(packed)} is compressed, and single latents are read: write it with zip -0")
    if twice := next((name for name, count in Counter(m.filename for m in members).items() if count > 1), None):
        raise UserError(f"{where}: {printable(twice)} is in it twice: write it again with one of them")
    ends = [member.header_offset for member in members[1:]] + [end]
    files = (
        (member.filename, name, (member.header_offset, end - member.header_offset))
        for member, end in zip(members, ends, strict=True) if member.filename != LABELS
    )  # fmt: skip
    yield from _labelled(files, labels, where)


def _unzipped(member: bytes) -> bytes:
    """Return the file in a zip's member; ValueError if it is damaged. The CRC is in the header or after the file."""
    if member[:4] != b"PK\3\4":
        raise ValueError("its header in the zip is damaged")
    flags, name, extra = struct.unpack("<6xH18xHH", member[:_LOCAL_HEADER])
    file = member[_LOCAL_HEADER + name + extra :]
    size = npy.header(file).size
    crc = file[size:].removeprefix(b"PK\7\10")[:4] if flags & 8 else member[14:18]
    if zlib.crc32(file[:size]) != int.from_bytes(crc, "little"):
        raise ValueError("its bytes are not those of the zip's CRC: it is damaged")
    return file[:size]


class _Tensor(NamedTuple):
    """A tensor of a safetensors file: its type there, its shape, and its first byte."""

    kind: str
    shape: tuple[int, ...]
    first: int

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(_TYPES[self.kind])

    def read(self, root: Folder, file: str, first: int, last: int) -> np.ndarray:
        """Return rows of the tensor."""
        row_bytes = self.dtype.itemsize * int(np.prod(self.shape[1:]))
        data = root.read(file, self.first + first * row_bytes, self.first + last * row_bytes)
        if len(data) != (last - first) * row_bytes:
            raise StorageError(f"{printable(f'{root}/{file}')}: it is shorter than when it was listed: restore it")
        values = np.frombuffer(data, self.dtype).reshape(-1, *self.shape[1:])
        if self.kind == "BF16":  # the upper half of a float32
            return (values.astype(np.uint32) << 16).view(np.float32)
        return values


def _tensors(root: Folder, file: str, *, mirror: bool) -> dict[str, _Tensor]:
    """Return a safetensors file's latents, its labels if any, and with `mirror` the latents of mirror images.

    Reads the header only: its length, then JSON. UserError if a tensor is missing or of an unexpected type or shape; StorageError
    if the header is damaged, or if the file is shorter than it states.
    """
    where, found, wanted = printable(f"{root}/{file}"), dict[str, _Tensor](), ["latents", "latents_flip"][: 1 + mirror]
    try:
        length, size = int.from_bytes(root.read(file, 0, 8), "little"), root.size(file)
        if not 0 < length <= min(HEADER_BYTES, size):
            raise ValueError(f"a header of {length:,} bytes")
        header = dict(json.loads(root.read(file, 8, 8 + length)))
        names = [name for name in header if name != "__metadata__"]
        for name in {"labels", *wanted} & set(names):
            kind, shape = str(header[name]["dtype"]), tuple(map(int, header[name]["shape"]))
            start, end = map(int, header[name]["data_offsets"])
            if kind not in _TYPES:
                raise UserError(f"{where}: {name} is {kind}, expected one of {', '.join(_TYPES)}")
            if name != "labels" and "F" not in kind:
                raise UserError(f"{where}: {name} is {kind}, expected floating point")
            tensor = _Tensor(kind, shape, 8 + length + start)
            if min(shape[:1], default=0) < 0 or min(shape[1:], default=1) < 1:  # any file has 10^12 rows of no bytes
                raise ValueError(f"{name} is of shape {shape}")
            if end - start != math.prod(shape) * tensor.dtype.itemsize or 8 + length + end > size:
                raise ValueError(f"{name} is not within the file")
            found[name] = tensor
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise StorageError(f"{where}: not a complete safetensors file: {error}") from error
    if missing := [name for name in wanted if name not in found]:
        more = "; set data.mirror: false" if missing[0] == "latents_flip" else ""
        raise UserError(f"{where}: no tensor {missing[0]!r}, it has {some(sorted(names))}{more}")
    shapes = [found[name].shape for name in wanted]
    if len(shapes[0]) != 4 or len(set(shapes)) > 1:
        raise UserError(f"{where}: latents are {' and '.join(map(str, shapes))}, expected (N, C, h, w) of one shape")
    return found


def _rows(root: Folder, name: str, *, labelled: bool, mirror: bool) -> Iterator[Entry]:
    tensors = _tensors(root, name, mirror=mirror)
    count = tensors["latents"].shape[0]
    labels: Iterable[int] = repeat(0, count)
    if labelled:
        known = tensors.get("labels")
        if known is None or known.dtype.kind not in "iu" or known.shape != (count,) or known.kind == "BF16":
            got = f"{known.kind} {known.shape}" if known else "none"
            raise UserError(f"{printable(f'{root}/{name}')}: labels are {got}, expected {count:,} integers, one for each latent")
        labels = known.read(root, name, 0, count).tolist()
    for row, label in enumerate(labels):
        yield Entry(f"{name}/{row:06d}", label, name, (row, 1))


class _Safetensors:
    """Lists and reads rows of safetensors files. Reading parses the header of each file once."""

    def __init__(self, *, mirror: bool, labelled: bool) -> None:
        self._mirror, self._labelled = mirror, labelled
        self._tensors = cache(lambda root, file, _: _tensors(root, file, mirror=mirror))

    def find(self, root: Folder, names: list[str]) -> Contents:
        return Contents(of_files(root, names, lambda name: _rows(root, name, labelled=self._labelled, mirror=self._mirror), 0))

    def read(self, root: Folder, entries: Sequence[Entry]) -> list[bytes]:
        """Return each row as a `.npy`: (2, C, h, w) with its mirror image, else (1, C, h, w)."""
        file, first, last = entries[0].file, entries[0].location[0], entries[-1].location[0] + 1
        tensors = self._tensors(root, file, entries[0].version)
        sides = [tensors[name].read(root, file, first, last) for name in ("latents", "latents_flip") if name in tensors]
        rows = np.stack(sides, axis=1)
        return [npy.to_bytes(rows[entry.location[0] - first]) for entry in entries]
