"""Counts of a forward pass that computes nothing: its operations, and the memory that it would keep for a backward pass.

Operations below autograd return uninitialised memory, which the system allocates only when it is written. The meta device would
not even need address space, but it imports torch._dynamo, which takes 0.8 s of CPU time. Read next: cost.py.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dis_scale.models.checkpointing import worth_keeping
from dis_scale.process.errors import UserError
from dis_scale.scan.counts import active

aten = torch.ops.aten
Storage = int
"""Number of a storage, in the order of first use in the pass."""


@dataclass
class Operation:
    """Multiply-adds of one kind of operation in one forward pass; training needs `passes` times as many.

    The backward pass of a product adds one pass for each factor with a gradient; that of an FFT adds one."""

    passes: int
    macs: float = 0.0


@dataclass
class Saved:
    """Storages needed for the backward pass of one block, or of the code outside all blocks."""

    inputs: set[Storage] = field(default_factory=set)
    kept: set[Storage] = field(default_factory=set)
    products: set[Storage] = field(default_factory=set)
    """Outputs of expensive products, which selective checkpointing keeps."""


class CountedPass(TorchDispatchMode):
    """Counts a forward pass within its context."""

    def __init__(self, parameters: Iterable[tuple[str, Tensor]]) -> None:
        super().__init__()
        self.operations: dict[tuple[str, bool], Operation] = {}
        """Operations by (name, inside a block)."""
        self.outside, self.blocks = Saved(), list[Saved]()
        self.states = 0
        self.bytes: list[int] = []
        """Size of each storage."""
        self._names = {_address(weight): name for name, weight in parameters}
        self._storages: dict[int, Storage] = {}
        self._alive: list[Any] = []  # holds the storages, so that no address is reused
        self._current, self._silent = self.outside, False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Return False, so that PyTorch does not wrap `__torch_dispatch__`: the wrapper would import the compiler."""
        return False

    def __enter__(self) -> "CountedPass":
        self._token = active.set(self)
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda _: None)  # type: ignore[arg-type, return-value]
        self._hooks.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._hooks.__exit__()
        active.reset(self._token)
        self._alive.clear()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self._silent:
            _require_counted(op, args)
        if op in _PRODUCTS:
            left, right = (args[i] for i in _PRODUCTS[op])
            out = left.new_empty(*left.shape[:-1], right.shape[-1])
            self._product(left, right, out.numel() * left.shape[-1])
        elif op is aten.convolution.default and not args[6]:
            out = _convolved(*args)
            self._product(args[0], args[1], out.numel() * args[1][0].numel())
        elif op is aten._scaled_dot_product_flash_attention_for_cpu.default:
            return self._attention(*args[:3])
        elif op in _FFT:
            out, n = _FFT[op](*args)
            self.add("FFT", 1.25 * n * math.log2(n) * max(out.numel() // out.shape[args[1][-1]], 1), passes=2)
        elif op in _SHAPES:
            out = _SHAPES[op](*args, **kwargs)
        elif torch.Tag.pointwise in op.tags and not op._schema.is_mutable:
            out = _pointwise(op, args, kwargs)
        else:
            return op(*args, **kwargs)
        if isinstance(out, Tensor) and not (out.is_floating_point() or out.is_complex()):
            out.zero_()  # it may be an index
        if worth_keeping(op, *args):
            self._current.products.add(self._number(out))
        return out

    def add(self, name: str, macs: float, passes: int = 3) -> None:
        if not self._silent:
            part = self.operations.setdefault((name, self._current is not self.outside), Operation(passes))
            part.macs += macs

    @contextmanager
    def alone(self, name: str, macs: float) -> Iterator[None]:
        self.add(name, macs)
        before, self._silent = self._silent, True
        try:
            yield
        finally:
            self._silent = before

    @contextmanager
    def block(self, inputs: tuple[Tensor | None, ...]) -> Iterator[None]:
        self._current = Saved({self._number(x) for x in inputs if x is not None})
        self.blocks.append(self._current)
        try:
            yield
        finally:
            self._current = self.outside

    def _product(self, left: Tensor, right: Tensor, macs: int) -> None:
        """Add a product. Its backward pass has one product for each factor that needs a gradient."""
        name = self._names.get(_address(right)) or self._names.get(_address(left), "product")
        self.add(name, macs * (4 if left.is_complex() else 1), 1 + left.requires_grad + right.requires_grad)

    def _attention(self, q_BHTd: Tensor, k_BHTd: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        B, H, T, d = q_BHTd.shape
        out = q_BHTd.new_empty(B, T, H, d).transpose(1, 2)
        self.add("attention", 2 * q_BHTd.numel() * k_BHTd.shape[2])
        self._current.products.add(self._number(out))
        return out, q_BHTd.new_empty(B, H, T, dtype=torch.float32)

    def _pack(self, tensor: Tensor) -> None:
        """Record a tensor that autograd saves. Returning the tensor would make a reference cycle that is never freed."""
        if _address(tensor) not in self._names:
            self._current.kept.add(self._number(tensor))

    def _number(self, tensor: Tensor) -> Storage:
        address = _address(tensor)
        if address not in self._storages:
            self._storages[address] = len(self.bytes)
            self.bytes.append(tensor.untyped_storage().nbytes())
            self._alive.append(tensor.untyped_storage())
        return self._storages[address]


def _require_counted(op: Any, args: Any) -> None:
    """Raise a UserError for a product operation without a counting rule, and for operators of other libraries."""
    transposed = op is aten.convolution.default and args[6]
    if transposed or op.overloadpacket in _UNCOUNTED or op.namespace not in ("aten", "prim", "prims"):
        words = f"{'transposed ' if transposed else ''}{op.namespace}.{op.overloadpacket.__name__}"
        raise UserError(
            f"cannot be priced: nobody counts the multiply-adds of {words}: call it within "
            "dis_scale.scan.counts.reporting(name, multiply-adds)"
        )


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _pointwise(op: Any, args: Any, kwargs: Any) -> Tensor:
    """Return the uninitialised output of an elementwise operation, whose type is found by running it on one element."""
    tensors = [x for x in args if isinstance(x, Tensor)]
    one: Tensor = op(*(x.new_ones(()) if isinstance(x, Tensor) else x for x in args), **kwargs)
    axes = zip_longest(*(reversed(x.shape) for x in tensors), fillvalue=1)  # torch.broadcast_shapes would import sympy
    shape = torch.Size([next((n for n in each if n != 1), 1) for each in axes][::-1])
    like = next((x for x in tensors if x.shape == shape), None)
    if like is None:
        return one.new_empty(shape)
    return torch.empty_like(like, dtype=one.dtype, memory_format=kwargs.get("memory_format") or torch.preserve_format)


def _convolved(x: Tensor, weight: Tensor, _: Any, stride: Any, padding: Any, dilation: Any, *__: Any) -> Tensor:
    sizes = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=False)
    spatial = [(n + 2 * pad - by * (taps - 1) - 1) // step + 1 for n, taps, step, pad, by in sizes]
    return x.new_empty(len(x), len(weight), *spatial)


def _spectrum(x: Tensor, dims: list[int], *_: Any) -> tuple[Tensor, int]:
    shape, n = list(x.shape), x.shape[dims[-1]]
    shape[dims[-1]] = n // 2 + 1
    return x.new_empty(shape, dtype=torch.promote_types(x.dtype, torch.complex64)), n


def _signal(x: Tensor, dims: list[int], _: int, n: int) -> tuple[Tensor, int]:
    shape = list(x.shape)
    shape[dims[-1]] = n
    return x.real.new_empty(shape), n


def _concatenated(tensors: list[Tensor], dim: int = 0) -> Tensor:
    shape = list(tensors[0].shape)
    shape[dim] = sum(x.shape[dim] for x in tensors)
    return tensors[0].new_empty(shape)


def _stacked(tensors: list[Tensor], dim: int = 0) -> Tensor:
    return _concatenated([x.unsqueeze(dim) for x in tensors], dim)


def _padded(x: Tensor, padding: list[int], *_: Any) -> Tensor:
    shape = list(x.shape)
    for i, (before, after) in enumerate(zip(padding[::2], padding[1::2], strict=True)):
        shape[-1 - i] += before + after
    return x.new_empty(shape)


def _reduced(x: Tensor, dims: list[int] | None, keepdim: bool = False, **_: Any) -> Tensor:  # noqa: FBT001, FBT002  # as PyTorch's
    gone = {d % x.ndim for d in dims or range(x.ndim)}
    return x.new_empty([1 if d in gone else n for d, n in enumerate(x.shape) if keepdim or d not in gone])


def _copied(x: Tensor, *, dtype: torch.dtype | None = None, memory_format: Any = None, **_: Any) -> Tensor:
    return torch.empty_like(x, dtype=dtype or x.dtype, memory_format=memory_format or torch.preserve_format)


def _normalised(x: Tensor, shape: list[int], *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    one_each = x.new_empty([*x.shape[: -len(shape)], *[1] * len(shape)], dtype=torch.float32)
    return torch.empty_like(x, memory_format=torch.contiguous_format), one_each, torch.empty_like(one_each)


_SHAPES: dict[Any, Callable[..., Any]] = {
    aten._to_copy.default: _copied,
    aten.clone.default: _copied,
    aten.native_layer_norm.default: _normalised,
    aten.cat.default: _concatenated,
    aten.stack.default: _stacked,
    aten.constant_pad_nd.default: _padded,
    aten.mean.dim: _reduced,
    aten.sum.dim_IntList: _reduced,
}
"""Uninitialised outputs of the operations that would write much memory; other operations run."""
_PRODUCTS = {aten.mm.default: (0, 1), aten.bmm.default: (0, 1), aten.addmm.default: (1, 2), aten.baddbmm.default: (1, 2)}
"""Positions of the two factors in the arguments of each product operation."""
_UNCOUNTED = {
    aten.mv, aten.dot, aten.vdot, aten.addmv, aten.addmv_, aten.addr, aten.addbmm, aten.addbmm_, aten.addmm_, aten.baddbmm_,
    aten._fft_c2c, aten._trilinear, aten._cdist_forward, aten.mkldnn_rnn_layer, aten._thnn_fused_lstm_cell,
    aten._thnn_fused_gru_cell,
}  # fmt: skip
"""Product operations without a counting rule."""
_FFT: dict[Any, Callable[..., tuple[Tensor, int]]] = {aten._fft_r2c.default: _spectrum, aten._fft_c2r.default: _signal}
