"""Files of latents that others wrote: pickles that run nothing, headers and zips that are damaged or do not fit."""

import contextlib
import io
import itertools
import json
import os
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch

from dis_scale.data import layouts
from dis_scale.data.sources import open_source
from dis_scale.process.errors import StorageError, UndecodableImage, UserError
from dis_scale.recipe import Data
from dis_scale.vae.interface import NO_VARIANCE
from tests.support.labelled_images import data, latents_source


def test_each_float16_comes_back_through_a_deviation_but_for_those_next_to_one() -> None:
    """A float32 deviation near 1 has no room for log-variances within 0.001 of 0, which no autoencoder of images has."""
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    every = every[np.isfinite(every) & (every >= -30) & (every <= 20)]
    moments = np.concatenate([np.zeros_like(every), every]).reshape(2, 1, -1)
    for layout, write in (("edm2", layouts.mean_and_deviation), ("webdataset", layouts.mean_and_log_variance)):
        (back,) = layouts.moments(latents_source(layout), write(moments, posterior=True), "x", mirror=False)
        different = np.abs(back.view(np.uint16) != moments.view(np.uint16)) & (moments != 0)
        if layout == "edm2":
            assert different.any()
            assert np.abs(moments[different]).max() < 0.001
            assert np.abs(back.astype(float) - moments.astype(float)).max() < 2e-7
        else:
            assert not different.any()
    beyond = np.array([[[0.0]], [[-40.0]]], np.float16)  # as its readers do
    assert from_pickle(layouts.mean_and_log_variance(beyond, posterior=True)).min() == -30


def test_a_pickled_latent_names_no_module_that_numpy_1_lacks() -> None:
    """MaskDiT's environment has NumPy 1, whose functions are in `numpy.core`."""
    written = layouts.mean_and_log_variance(np.ones((8, 2, 2), np.float16), posterior=True)
    assert (b"numpy.core.multiarray" in written, b"_core" in written) == (True, False)
    assert np.ones((8, 2, 2), np.float32).tobytes() in written, "as bytes, not as text of protocol 2, which is longer"
    np.testing.assert_array_equal(pickle.loads(written), np.ones((8, 2, 2), np.float32))


@pytest.mark.parametrize("layout", ["edm2", "webdataset"])
def test_latents_without_variance_come_back(layout: str) -> None:
    assert layouts.NO_VARIANCE == NO_VARIANCE
    write = {"edm2": layouts.mean_and_deviation, "webdataset": layouts.mean_and_log_variance}[layout]
    latent = np.random.default_rng(0).standard_normal((4, 8, 8)).astype(np.float16)
    (back,) = layouts.moments(latents_source(layout), write(latent, posterior=False), "x", mirror=False)
    np.testing.assert_array_equal(back, np.concatenate([latent, np.full_like(latent, NO_VARIANCE)]))


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


class Uninitialised:
    """An array whose values are whatever the memory had."""

    def __reduce__(self) -> tuple[Any, ...]:
        return np.ndarray, ((10**11,),)


def from_pickle(data: bytes) -> np.ndarray:
    return layouts.moments(latents_source("webdataset"), data, "x", mirror=False)


def test_a_pickle_makes_an_array_or_nothing(tmp_path: Path) -> None:
    array = np.random.default_rng(0).standard_normal((8, 4, 4)).astype(np.float32)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        for each in (array, np.asfortranarray(array), array.astype(">f8")):
            np.testing.assert_array_equal(from_pickle(pickle.dumps(each, protocol))[0], array.astype(np.float16))
    assert from_pickle(pickle.dumps(array * 1000))[0, 4:].max() == 20  # as MaskDiT bounds
    others = (array.astype(object), array[0, 0], array.astype(np.int32), array[:7], array.astype("U3"), np.float32(1))
    for bad in (Evil(mark := tmp_path / "was-here"), Uninitialised(), {"a": array}, *others):
        with pytest.raises(UndecodableImage, match="latent x cannot be read"):
            from_pickle(pickle.dumps(bad))
    assert not mark.exists()


class HugeType:
    """Of 300 bytes, and 2^40 characters as a text."""

    def __reduce__(self) -> tuple[object, ...]:
        names: tuple[object, ...] = ("f4",)
        for _ in range(40):
            names = (names, names)
        return np.dtype, (names,), (3, "<")


class OfHugeType:
    def __reduce__(self) -> tuple[object, ...]:
        reduced = np.ones(1).__reduce__()
        assert isinstance(reduced, tuple)
        return *reduced[:2], (1, (1,), HugeType(), False, b"")


def test_a_pickle_makes_no_more_bytes_than_it_has() -> None:
    """Eight bytes of it would make as many as its longest text has, again and again."""
    text = b"X" + (1000).to_bytes(4, "little") + b"x" * 1000
    start = b"\x80\x02c_codecs\nencode\nq\x00" + text + b"q\x01X\x06\x00\x00\x00latin1q\x02"
    with pytest.raises(pickle.UnpicklingError, match="a pickle of more bytes than it has"):
        layouts._unpickled(start + b"h\x00h\x01h\x02\x86R" * 3 + b".")
    with pytest.raises(TypeError, match="expected string or bytes-like"):
        layouts._unpickled(pickle.dumps(OfHugeType()))


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_damaged_pickle_is_read_or_named(protocol: int) -> None:
    """NumPy's own functions crash the process on some of these, and a length that is damaged may ask for all memory."""
    huge = pickle.dumps(bytearray(300), 5).replace((300).to_bytes(8, "little"), (2**36).to_bytes(8, "little"))
    with pytest.raises(UndecodableImage, match="bytearray8"):
        from_pickle(huge)
    rng, good = np.random.default_rng(0), pickle.dumps(np.ones((8, 2, 2), np.float32), protocol)
    for _ in range(5000):
        data = bytearray(good)
        for place in rng.integers(0, len(data), rng.integers(1, 4)).tolist():
            data[place] = rng.integers(256)
        with contextlib.suppress(UndecodableImage):
            assert from_pickle(bytes(data)).dtype == np.float16


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "it is empty"),
        (npy(np.ones((8, 4, 4), np.float32))[:-1], "buffer size must be"),
        (npy(np.ones((3, 4, 4), np.float32)), r"\(3, 4, 4\); expected floating point \(2C, h, w\)"),
        (npy(np.ones((2, 8, 4, 4), np.float32)), r"expected floating point \(2C, h, w\)"),
        (npy(np.ones((8, 4, 4), np.uint8)), "an array of uint8"),
        (npy(-np.ones((8, 4, 4), np.float32)), "a deviation is negative"),
        (npy(np.full((8, 4, 4), np.nan, np.float32)), "a deviation is negative or not a number"),
        (npy(np.full((8, 4, 4), 1e6, np.float32)), "not finite in float16"),
        (npy(np.full((8, 4, 4), None)), "expected numbers"),
    ],
)
def test_a_damaged_latent_is_named(data: bytes, words: str) -> None:
    with pytest.raises(UndecodableImage, match=f"latent a/b.npy cannot be read: .*(?:{words})"):
        layouts.moments(latents_source("edm2"), data, "a/b.npy", mirror=False)


@pytest.mark.parametrize(
    ("hole", "why"),
    [(range(400, 600), "its bytes are not those of the zip's CRC: it is damaged"), (range(20), "its header in the zip is damaged")],
    ids=["values", "header"],
)
def test_a_damaged_latent_of_a_zip_is_named(hole: range, why: str, tmp_path: Path) -> None:
    latents = np.ones((3, 8, 8, 8), np.float32)
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as file:
        for i, latent in enumerate(latents):
            file.writestr(layouts.edm2_file(i), npy(latent))
    content = bytearray((tmp_path / "set.zip").read_bytes())
    second = content.index(b"PK\3\4", 100)
    content[second + hole.start : second + hole.stop] = bytes(len(hole))
    (tmp_path / "set.zip").write_bytes(content)
    source = {"kind": "latents", "layout": "edm2", "url": f"{tmp_path}/set.zip"}
    opened = open_source(data(source, "none", mirror=False))
    broken = [each for each in opened.decoded(range(3), 8) if isinstance(each, UndecodableImage)]
    assert [each.why for each in broken] == [why]


def test_a_latent_that_a_zip_has_twice_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as file, warnings.catch_warnings(action="ignore"):
        for _ in range(2):
            file.writestr(layouts.edm2_file(0), b"x")
    source = {"kind": "latents", "layout": "edm2", "url": f"{tmp_path}/set.zip"}
    with pytest.raises(UserError, match=r"set.zip: 00000/img-mean-std-00000000.npy is in it twice: write it again"):
        open_source(data(source, "none", mirror=False))


def headed(header: object, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


F32 = {"dtype": "F32", "shape": [2, 1, 1, 1], "data_offsets": [0, 8]}


I64 = {"dtype": "I64", "shape": [2], "data_offsets": [8, 24]}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "a header of 0 bytes"),
        (headed([1]), "not a complete safetensors file"),
        (headed({"latents": None}), "not a complete safetensors file"),
        (headed({"latents": {"shape": [1]}}), "not a complete safetensors file"),
        (headed({"latents": F32, "labels": I64}, bytes(16)), "labels is not within the file"),
        (headed({"latents": F32 | {"shape": [10**12, 1, 1, 1]}}, bytes(8)), "latents is not within the file"),
        (headed({"latents": F32 | {"shape": [2, 1]}, "labels": I64}, bytes(24)), r"latents are \(2, 1\), expected"),
        (headed({"latents": F32, "labels": I64 | {"shape": []}}, bytes(24)), "labels is not within the file"),
        (headed({"latents": F32}, bytes(8)), "labels are none, expected 2 integers"),
        (headed({"latents": F32, "labels": F32}, bytes(8)), r"labels are F32 \(2, 1, 1, 1\), expected 2 integers"),
        (headed({"latents": F32 | {"dtype": "F8_E4M3"}}, bytes(8)), "latents is F8_E4M3, expected one of"),
        (headed({"latents": F32 | {"dtype": "I32"}}, bytes(8)), "latents is I32, expected floating point"),
        (headed({"images": F32}, bytes(8)), "no tensor 'latents', it has images"),
    ],
)
def test_a_safetensors_file_that_does_not_fit_is_named(data: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(data)
    settings = {"source": latents_source("safetensors", tmp_path), "resolution": 8, "num_classes": 10, "mirror": False}
    with pytest.raises((UserError, StorageError), match=words):
        open_source(Data.model_validate(settings))


def test_latents_of_mirror_images_that_are_not_used_are_not_read(tmp_path: Path) -> None:
    tensors = {"latents": np.ones((3, 1, 2, 2), np.float32), "latents_flip": np.ones((1, 7), np.float32)}
    safetensors.numpy.save_file(tensors | {"labels": np.arange(3)}, tmp_path / "a.safetensors")
    settings = {"source": latents_source("safetensors", tmp_path), "resolution": 8, "num_classes": 10, "mirror": False}
    made = open_source(Data.model_validate(settings))
    assert made.pixels(2, 8).shape == (1, 1, 2, 2)
    assert list(itertools.chain(made.labels)) == [0, 1, 2]
    with pytest.raises(UserError, match=r"latents are .*, expected .* of one shape"):
        open_source(Data.model_validate(settings | {"mirror": True}))
