"""Launching the Triton backend's kernels: grids, limits, compilation before the first launch.

Sizes and distances between rows are compile-time constants of the kernels, so each shape has kernels of its own.
"""

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only
from triton.runtime import driver

from dis_scale.process.errors import UserError
from dis_scale.scan.triton_fill import FULL, Filling, filling

T = TypeVar("T")
LANES = 32
"""Channels per warp, one per thread: a thread reads back only what it wrote itself."""
WARPS = 4
"""Warps of a program. Those of a scan's program sum their parts of B's and C's gradients."""
CHUNK = LANES // 2
"""Steps between stored states, limited by registers. Each step has one lane for B's gradient and one for C's."""
ALIGNMENT = 16
"""Bytes of which each pointer is a multiple, since one load takes this many. PyTorch's own memory is aligned."""
MOST_PROGRAMS = 65_535
"""Largest grid of a kernel on its second axis (the batch) and on its third (the convolution's groups of steps)."""


class Launch:
    """A kernel with its grid and its numbers, for tensors of one kind: device, types, and pointers at multiples of ALIGNMENT.

    A call takes tensors, tuples of tensors and tuples of such tuples; for the meta device it only compiles. Triton compiles for
    types, alignment and constants, which do not change: from the second call on Triton's look-up, the slowest part, is skipped.
    """

    def __init__(self, kernel: Any, grid: tuple[int, int, int], **numbers: Any):
        self.kernel, self.grid, self.numbers = kernel, grid, numbers
        self._compiled: tuple[Any, list[Any]] | None = None

    @property
    def is_new(self) -> bool:
        return self._compiled is None

    def __call__(self, *arguments: Any) -> None:
        if self._compiled is None:
            self._first_call(arguments)
        else:
            compiled, values = self._compiled
            stream = driver.active.get_current_stream(driver.active.get_current_device())
            # As `compiled[grid]`, without the objects that it makes for the hooks of Triton's own profiler.
            compiled.run(*self.grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments, *values)

    def _first_call(self, arguments: tuple[Any, ...]) -> None:
        if tree_leaves(arguments)[0].is_meta:
            self.kernel.warmup(*arguments, grid=self.grid, **self.numbers)
        elif compiled := self.kernel[self.grid](*arguments, **self.numbers):  # the interpreter returns None
            names = self.kernel.arg_names[len(arguments) :]
            self._compiled = compiled, [self.numbers[name] for name in names]


def rowwise(x_BLX: Tensor, align: bool = True) -> Tensor:
    """x with contiguous channels and evenly spaced rows in the whole batch, and aligned; a copy only if necessary."""
    (B, L, X), (image, row, channel) = x_BLX.shape, x_BLX.stride()
    if (B > 1 and image != L * row) or (X > 1 and channel != 1) or (align and x_BLX.data_ptr() % ALIGNMENT):
        x_BLX, row = x_BLX.clone(memory_format=torch.contiguous_format), X
    check_offsets(L, row)
    return x_BLX


def of_training(x: Tensor, weights: Sequence[Tensor], *starts: int) -> bool:
    """Return whether the types are those of training, and the columns `starts` of an aligned tensor of x's type are aligned."""
    aligned = not any(start % (ALIGNMENT // min(x.element_size(), 4)) for start in starts)
    return aligned and x.dtype != torch.float64 and all(weight.dtype == torch.float32 for weight in weights)


def plain(x: Tensor) -> Tensor:
    """x, contiguous and aligned; a copy only if necessary."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % ALIGNMENT else x


def empty_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Contiguous memory of x's shape."""
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def alike(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Matrices with contiguous rows, or all with contiguous columns, and aligned; copies only if necessary."""
    shape = matrices[0].shape
    for strides in ((1, shape[0]), (shape[1], 1)):
        if all(x.stride() == strides and not x.data_ptr() % ALIGNMENT for x in matrices):
            return list(matrices)
    return [plain(x) for x in matrices]


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up. `triton.cdiv`, which kernels can call too, takes many microseconds."""
    return -(-a // b)


def padded(L: int) -> int:
    """L steps rounded up to complete chunks."""
    return ceil_div(L, CHUNK) * CHUNK


def next_power_of_2(n: int) -> int:
    """The least power of 2 that is at least n."""
    return 1 << (n - 1).bit_length()


def check_offsets(rows: int, row: int) -> None:
    """UserError if an offset within a batch row needs more than 32 bits."""
    if rows * row >= 2**31:
        raise UserError(
            f"the triton scan takes batch rows of fewer than 2**31 numbers, got {rows:,} rows of {row:,}: "
            "set the backend to chunked"
        )


def grid(B: int, L: int, E: int, steps: int | None = None, lanes: int = 1) -> tuple[int, int, int]:
    """Programs of an image's channels, LANES * WARPS / `lanes` each, and of `steps` steps if given. UserError beyond a GPU's
    limits."""
    if B > MOST_PROGRAMS:
        raise UserError(
            f"the triton scan takes at most {MOST_PROGRAMS:,} images per call, got {B:,}: "
            "take smaller micro-batches, or set the backend to chunked"
        )
    groups = ceil_div(L, steps or L)
    if steps and groups > MOST_PROGRAMS:
        raise UserError(
            f"the triton convolution takes at most {MOST_PROGRAMS * steps:,} steps, got {L:,}: set the backend to chunked"
        )
    return ceil_div(E, LANES // lanes * WARPS), B, groups


def filling_on(device: torch.device, B: int, L: int, E: int, N: int, directions: int) -> Filling:
    """Return how a scan of these sizes fills this device. The interpreter, on a CPU, has no multiprocessors."""
    if device.type != "cuda":
        return FULL
    groups, _, _ = grid(B, L, E)
    return filling(groups * B, N, directions, multiprocessors(device))


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Number of the GPU's multiprocessors."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def compile_together(launches: Callable[[], object]) -> None:
    """Compile the kernels of launches for tensors without memory, in threads: Triton's compiler runs outside of Python's lock.

    One after the other, a scan's kernels would take half a minute. A kernel that cannot be compiled raises its error at the first
    launch: an error here would leave Triton in this mode.
    """
    with ThreadPoolExecutor() as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
        launches()


def without_memory(tensors: T) -> T:
    """Tuples and lists of tensors, and of None, with tensors of the same shapes and strides on the meta device."""
    empty: T = tree_map_only(Tensor, lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta"), tensors)
    return empty
