"""Arrays in NumPy's format are read as NumPy reads them, in any number of threads."""

import gc
import io
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from dis_scale.storage import npy


def saved(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["<f2", "<f4", ">f8", "|u1", "<i8", "|b1"])
@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 1, 5)])
def test_an_array_is_read_as_numpy_reads_it(kind: str, shape: tuple[int, ...]) -> None:
    array = (np.random.default_rng(0).standard_normal(shape) * 100).astype(kind)
    for each in (array, np.asfortranarray(array)):
        file = io.BytesIO()
        np.lib.format.write_array(file, each, version=(2, 0))
        for data in (saved(each), file.getvalue()):
            read = npy.read(data)
            assert read.dtype == np.load(io.BytesIO(data)).dtype
            np.testing.assert_array_equal(read, array)


def test_text_is_read() -> None:
    assert npy.read(saved(np.array("größe"))) == "größe"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "it is empty"),
        (b"GIF89a", "not an array in NumPy's format"),
        (saved(np.ones(4))[:6], "not an array in NumPy's format"),
        (saved(np.ones(4))[:-1], "buffer size|smaller than"),
        (saved(np.ones(4)) + b"12345678", "cannot reshape"),
        (saved(np.array([None])), "expected numbers or text"),
        (saved(np.ones(4)).replace(b"<f8", b"<f9"), "of type <f9, which NumPy does not have"),
        (saved(np.array([(1, 2)], dtype=[("a", "<i4"), ("b", "<i4")])), "expected numbers or text"),
    ],
)
def test_what_is_no_array_of_numbers_is_refused(data: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        npy.read(data)


def test_an_npz_that_would_fill_the_memory_is_refused() -> None:
    file = io.BytesIO()
    np.savez_compressed(file, a=np.zeros(10**6), b=np.arange(3))
    arrays = npy.read_all(file.getvalue(), 10**7)
    np.testing.assert_array_equal(arrays["b"], np.arange(3))
    arrays["b"][0] = 1
    with pytest.raises(ValueError, match=r"unpacked it has 8,\d+,\d+ bytes, and at most 1,000 are read"):
        npy.read_all(file.getvalue(), 1000)


@pytest.fixture
def interrupted() -> Iterator[None]:
    """Another thread runs whenever the garbage collector does, as the finalizers of large programs let it."""
    before, interval = gc.get_threshold(), sys.getswitchinterval()

    def pause(*_: object) -> None:
        time.sleep(1e-6)

    gc.callbacks.append(pause)
    gc.set_threshold(10)
    sys.setswitchinterval(1e-6)
    yield
    gc.callbacks.remove(pause)
    gc.set_threshold(*before)
    sys.setswitchinterval(interval)


def failures(read: Callable[[bytes], object], data: bytes) -> int:
    """Read in threads, each at another depth of the stack; return how often it failed."""
    failed = []

    def at_depth(depth: int) -> None:
        if depth:
            return at_depth(depth - 1)
        for _ in range(200):
            try:
                read(data)
            except SystemError as error:
                failed.append(error)

    threads = [threading.Thread(target=at_depth, args=(7 * n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(failed)


def test_threads_that_read_at_the_same_time_do_not_fail(interrupted: None) -> None:
    data = saved(np.ones((2, 8, 4, 4), np.float16))
    assert failures(npy.read, data) == 0
    if sys.version_info[:3] == (3, 11, 7):  # a round fails about twice, and one of ten not at all
        rounds = (failures(lambda data: np.load(io.BytesIO(data)), data) for _ in range(100))
        assert any(rounds), "NumPy's way does not fail: is ours needed?"
