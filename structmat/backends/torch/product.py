"""Which way a batch goes through a chain or a Kronecker product: custom operator, training path, or composed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from structmat.backends.torch import autograd, chain_op, forward, fused, kron, kron_op, merging
from structmat.backends.torch.layout import Layout

_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # newer than the oldest torch that is supported


def chain_product(
    x: Tensor,
    bias: Tensor | None,
    layout: Layout,
    factors: Sequence[Tensor],
    columns: bool = False,
    always: bool = False,
) -> Tensor:
    """``x A^T + bias`` for rows ``(B, n)``, or ``A x + bias`` for columns ``(n, B)``.

    Parameters
    ----------
    x, bias
        Tensors of the factors' dtype and device; ``bias`` of shape ``(m,)`` or None.
    layout, factors
        The chain, and its values ``(blocks, b, c)``.
    columns
        Whether samples are columns.
    always
        Take the custom operator on any device; otherwise on CUDA devices alone.
    """
    if autograd.transformed():
        return forward.composed(x, bias, layout, factors, columns)
    if always or (takes_operator(x) and not layout.plain):
        if merges(x):
            layout, factors = merging.merged_chain(layout, factors)
        return chain_op.product(x, bias, layout, factors, columns)
    if autograd.eager(x, bias, *factors):
        return autograd.chain(x, bias, layout, factors, columns)
    return forward.composed(x, bias, layout, factors, columns)


def rows_as_they_come(x: Tensor, layout: Layout, factors: Sequence[Tensor], always: bool = False) -> Tensor:
    """``x A^T`` for rows, without the copy that contiguous rows of outputs in the paper's Monarch order would take.

    The result is then a transposed view of columns.
    """
    operator = always or (takes_operator(x) and not layout.plain)
    if operator and not (autograd.transformed() or torch.compiler.is_compiling()):
        merged = merging.chain_layout(layout, x.dtype) if merges(x) else layout
        if merged.outs[0].lane > 1 and not (fused.suits(x) and _kernel(merged, x, x.shape[0])):
            return chain_product(x.t(), None, layout, factors, True, always).t()
    return chain_product(x, None, layout, factors, False, always)


def kron_product(
    x: Tensor, bias: Tensor | None, factors: Sequence[Tensor], columns: bool = False, always: bool = False
) -> Tensor:
    """The same for a Kronecker product of ``factors`` ``(m_i, n_i)``."""
    if (always or takes_operator(x)) and not autograd.transformed():
        if merges(x):
            factors = merging.merged_factors(factors)
        return kron_op.product(x, bias, factors, columns)
    return kron.run(x, bias, factors, columns)


def takes_operator(x: Tensor) -> bool:
    """Whether the custom operators are the way on this tensor's device: not in programs that are exported to others."""
    return x.device.type == "cuda" and not (_exporting() or torch.jit.is_tracing())  # pyright: ignore[reportPrivateImportUsage]


def merges(x: Tensor) -> bool:
    """Whether the cost model of the GPU decides which neighbouring factors are multiplied out."""
    return x.device.type == "cuda"


# ---- what it will be ----------------------------------------------------------------------------------------------------


def chain_kernel_name(layout: Layout, factor: Tensor, batch: int, rows: bool, always: bool) -> str:
    """What a batch will go through: ``"fused"``, ``"2 products"`` of the operator, or ``"library"``."""
    if not always and not (takes_operator(factor) and not layout.plain):
        return "library"
    if merges(factor):
        layout = merging.chain_layout(layout, factor.dtype)
    if rows and fused.suits(factor) and _kernel(layout, factor, batch):
        return "fused"
    return _products(len(layout.patterns))


def kron_kernel_name(factors: Sequence[Tensor], batch: int, rows: bool, always: bool) -> str:
    """The same for a Kronecker product."""
    first = factors[0]
    if not (always or takes_operator(first)):
        return "library"
    shapes = [(int(f.shape[-2]), int(f.shape[-1])) for f in factors]
    if merges(first):
        shapes = merging.factor_shapes(shapes, first.dtype)
    fits = rows and len(shapes) == 2 and fused.suits(first)
    if fits and fused.kron_kernel((shapes[0], shapes[1]), *fused.key(first, batch)):
        return "fused"
    return _products(len(shapes))


def _kernel(layout: Layout, x: Tensor, batch: int) -> Any:
    """The kernel that is predicted to be faster than products whose result need not be contiguous."""
    return fused.chain_kernel(layout, *fused.key(x, batch), contiguous=False) if batch else None


def _products(count: int) -> str:
    return f"{count} product{'s' * (count > 1)}"
