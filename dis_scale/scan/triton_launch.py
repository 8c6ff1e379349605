"""Launching the Triton backend's kernels: grids, limits, compilation before the first launch.

Sizes and distances between rows are compile-time constants of the kernels, so each shape has kernels of its own.
"""

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import triton
from torch import Tensor

from dis_scale.errors import UserError

LANES = 32
"""Channels per warp, one per thread: a thread reads back only what it wrote itself."""
WARPS = 4
"""Warps of a program. Those of a scan's program sum their parts of B's and C's gradients."""
CHUNK = LANES // 2
"""Steps between stored states, limited by registers. Each step has one lane for B's gradient and one for C's."""
MOST_PROGRAMS = 65_535
"""Largest grid of a kernel on its second axis (the batch) and on its third (the convolution's groups of steps)."""

_launched = dict[tuple[Any, ...], tuple[Any, list[Any]]]()
"""Compiled kernels by all that Triton compiles for, and their numbers in the order of the parameters."""
_compiled = set[tuple[Any, ...]]()
"""Sizes and types whose kernels are compiled."""


def launch(kernel: Any, grid: tuple[int, int, int], *arguments: Any, **numbers: Any) -> None:
    """Launch a kernel on tensors, tuples of tensors and tuples of such tuples; for the meta device, only compile it.

    A later launch of the same kernel skips Triton's own look-up, which takes 4 us more: Triton compiles for types, for pointers
    that are multiples of 16 bytes, and for constants.
    """
    tensors: list[Tensor] = []
    for argument in arguments:
        if not isinstance(argument, tuple):
            tensors.append(argument)
        elif isinstance(argument[0], tuple):
            tensors += [x for each in argument for x in each]
        else:
            tensors += argument
    first = tensors[0]
    if first.is_meta:
        kernel.warmup(*arguments, grid=grid, **numbers)
        return
    types, aligned = [x.dtype for x in tensors], [x.data_ptr() % 16 == 0 for x in tensors]
    key = id(kernel), first.device, *types, *aligned, *numbers, *numbers.values()
    with torch.cuda.device_of(first):
        if known := _launched.get(key):
            compiled, values = known
            compiled[grid](*arguments, *values)
        elif compiled := kernel[grid](*arguments, **numbers):  # the interpreter returns None
            _launched[key] = compiled, [numbers[name] for name in kernel.arg_names[len(arguments) :]]


def rowwise(x_BLX: Tensor) -> Tensor:
    """x with contiguous channels and evenly spaced rows in the whole batch; a copy only if necessary."""
    (B, L, X), (image, row, channel) = x_BLX.shape, x_BLX.stride()
    if (B > 1 and image != L * row) or (X > 1 and channel != 1):
        x_BLX, row = x_BLX.contiguous(), X
    check_offsets(L, row)
    return x_BLX


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up. `triton.cdiv`, which kernels can call too, takes many microseconds."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def check_offsets(rows: int, row: int) -> None:
    """UserError if an offset within a batch row needs more than 32 bits."""
    if rows * row >= 2**31:
        raise UserError(
            f"the triton scan takes batch rows of fewer than 2**31 numbers, got {rows:,} rows of {row:,}: "
            "set the backend to chunked"
        )


def grid(x_BLE: Tensor, steps: int | None = None, lanes: int = 1) -> tuple[int, int, int]:
    """Programs of an image's channels, LANES * WARPS / `lanes` each, and of `steps` steps if given. UserError beyond a GPU's
    limits."""
    B, L, E = x_BLE.shape
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


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def compile_once(x: Tensor, key: tuple[Any, ...], launches: Callable[[], object]) -> None:
    """Compile all kernels of these launches together before the first one: one after the other, a scan's take a minute."""
    key = (x.device, x.dtype, x.shape[1:], *key)
    if key not in _compiled:
        _compiled.add(key)
        with torch.cuda.device_of(x):
            compile_together(launches)


def compile_together(launches: Callable[[], object]) -> None:
    """Compile the kernels of launches for tensors without memory, in threads: Triton's compiler runs outside of Python's lock.

    A kernel that cannot be compiled is an error at its first launch: an error here would leave Triton in this mode.
    """
    with ThreadPoolExecutor() as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
        launches()


def without_memory(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
