"""Activation checkpointing: which activations each block keeps for its backward pass, and which it recomputes.

    none        keep everything
    block       keep each block's inputs; every block runs twice (Chen et al. 2016, arXiv 1604.06174)
    every_<k>   the same for every k-th block; the other blocks keep everything
    selective   keep inputs, attention and expensive products; norms, convolutions and scans run twice

Losses do not depend on the mode, except for the rounding of Triton's scan in half precision. Read next: cost.py for the bytes.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from dis_scale.process.errors import UserError, nearest
from dis_scale.process.settings import CHECKPOINTING
from dis_scale.scan.backend import KeepingStates
from dis_scale.scan.counts import active

WORTH_KEEPING_MACS = 128
"""Least multiply-adds per output number of a kept product. The product of the scan's time step, of rank width / 16, has fewer."""

_aten = torch.ops.aten
_INNER: dict[Any, Callable[..., int]] = {
    _aten.mm.default: lambda a, *_: a.shape[1],
    _aten.addmm.default: lambda _, a, *__: a.shape[1],
    _aten.bmm.default: lambda a, *_: a.shape[2],
}
"""Multiply-adds per output number of each kind of product."""
_ATTENTION = (
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
)


def require_known(mode: str) -> None:
    """Raise a UserError for an unknown mode."""
    if not CHECKPOINTING.fullmatch(mode):
        known = ("none", "block", "every_2", "selective")
        raise UserError(f"unknown checkpointing {mode!r}{nearest(mode, known)}; known: none, block, every_<k>, selective")


def recompute_every(mode: str) -> int:
    """Return k if every k-th block is recomputed; 0 for none."""
    return int(mode.removeprefix("every_")) if mode.startswith("every_") else int(mode != "none")


def run_block(mode: str, number: int, block: Callable[..., Any], *inputs: Tensor | None) -> Any:
    """Apply block `number` of the model to its inputs; keep activations as the mode requires."""
    if counter := active.get():
        with counter.block(inputs):
            return block(*inputs)
    if mode == "none" or number % recompute_every(mode) or not torch.is_grad_enabled():
        return block(*inputs)
    # Triton's scan keeps more when recomputed than in the first pass. PyTorch's check would report the other shapes as an error.
    return checkpoint(
        block, *inputs, use_reentrant=False, preserve_rng_state=False, determinism_check="none",
        context_fn=partial(_contexts, selective=mode == "selective"),
    )  # fmt: skip


def _contexts(*, selective: bool) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Return the contexts of a block's first and second forward pass."""
    first, second = create_selective_checkpoint_contexts(_policy) if selective else (nullcontext(), nullcontext())
    return first, KeepingStates(second)


def _policy(_: Any, op: Any, *arguments: Any, **__: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if worth_keeping(op, *arguments) else CheckpointPolicy.PREFER_RECOMPUTE


def worth_keeping(op: Any, *arguments: Any) -> bool:
    """Return whether selective checkpointing keeps the output of an operation."""
    return op in _ATTENTION or (op in _INNER and _INNER[op](*arguments) >= WORTH_KEEPING_MACS)
