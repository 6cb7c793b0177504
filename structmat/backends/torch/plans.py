"""Plans of operators that hold torch tensors: stacks of operands and of operators become one batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from structmat import arrays
from structmat.backends import base
from structmat.backends.base import ChainLayout, Explanation
from structmat.backends.torch import autograd, fused, hadamard_op
from structmat.backends.torch.layout import layout_of, stacked
from structmat.backends.torch.product import (
    chain_kernel_name,
    chain_product,
    kron_kernel_name,
    kron_product,
    rows_as_they_come,
    takes_operator,
)


class ChainPlan(base.LibraryPlan):
    """A chain of factors ``(*batch, a, d, b, c)``; the values are cast where torch would refuse mixed dtypes."""

    def __init__(self, layout: ChainLayout, blocks: Sequence[Tensor], always: bool = False) -> None:
        self.chain, self.blocks, self.always = layout, tuple(blocks), always
        self.batch = tuple(torch.broadcast_shapes(*(f.shape[:-4] for f in blocks)))
        self.layout = layout_of(layout)

    def columns(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """``A x`` for ``x`` of shape ``(..., n, k)``."""
        if self.batch:
            return arrays.copy_into(self._stacked(x), out)
        if x.ndim == 2:
            factors = _reshaped(self.blocks, self.layout.shapes, x.dtype)
            return arrays.copy_into(chain_product(x, None, self.layout, factors, True, self.always), out)
        y = self.rows(x.transpose(-1, -2)).transpose(-1, -2)
        return arrays.copy_into(y.contiguous() if out is None else y, out)

    def rows(self, x: Tensor) -> Tensor:
        """``x A^T`` for ``x`` of shape ``(..., k, n)``."""
        if self.batch:
            return self._stacked(x.transpose(-1, -2)).transpose(-1, -2)
        lead = x.shape[:-1]
        x = x.reshape(math.prod(lead), x.shape[-1])
        y = rows_as_they_come(x, self.layout, _reshaped(self.blocks, self.layout.shapes, x.dtype), self.always)
        return y.reshape(*lead, self.chain.rows)

    def vector(self, x: Tensor) -> Tensor:
        """``A x`` for one vector ``x`` of shape ``(n,)``."""
        return self.columns(x[:, None])[..., 0] if self.batch else self.rows(x[None])[0]

    def explain(self, k: int, rows: bool = False) -> Explanation:
        """How many products the custom operator makes, or that it is one kernel; products of the library elsewhere."""
        return Explanation(chain_kernel_name(self.layout, self.blocks[0], k, rows, self.always))

    def _stacked(self, x: Tensor) -> Tensor:
        """``A x`` for stacks of operators: their number is one more digit of a block-diagonal chain."""
        chain, stack = self.chain, self.batch
        lead = torch.broadcast_shapes(stack, x.shape[:-2])
        count, k, rest = math.prod(stack), x.shape[-1], lead[: len(lead) - len(stack)]
        whole = chain._replace(rows=chain.patterns[0].rows, cols=chain.patterns[-1].cols)
        n = whole.cols
        x = torch.nn.functional.pad(x, (0, 0, 0, n - x.shape[-2])) if n != x.shape[-2] else x
        x = x.expand(*lead, n, k).reshape(math.prod(rest), count * n, k).permute(1, 0, 2)
        x = x.reshape(count * n, math.prod(rest) * k)
        layout = layout_of(stacked(whole, count))
        factors = _reshaped([f.expand(*stack, *f.shape[-4:]) for f in self.blocks], layout.shapes, x.dtype)
        y = chain_product(x, None, layout, factors, True, self.always)
        y = y.reshape(count, whole.rows, math.prod(rest), k).permute(2, 0, 1, 3)
        return y.reshape(*rest, *stack, whole.rows, k)[..., : chain.rows, :].contiguous()


class KronPlan(base.KronPlan):
    """A Kronecker product of dense factors ``(*batch, m_i, n_i)``."""

    def __init__(self, factors: Sequence[Tensor], always: bool = False) -> None:
        super().__init__(factors)
        self.always = always
        self._scale: float | Literal[False] | None = False  # not looked at yet
        self.batch = tuple(torch.broadcast_shapes(*(f.shape[:-2] for f in factors)))

    def columns(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """``A x`` for ``x`` of shape ``(..., n, k)``."""
        if self.batch:
            return arrays.copy_into(self._stacked(x), out)
        if x.ndim == 2:
            return arrays.copy_into(self._product(x, True), out)
        y = self.rows(x.transpose(-1, -2)).transpose(-1, -2)
        return arrays.copy_into(y.contiguous() if out is None else y, out)

    def rows(self, x: Tensor) -> Tensor:
        """``x A^T`` for ``x`` of shape ``(..., k, n)``."""
        if self.batch:
            return self._stacked(x.transpose(-1, -2)).transpose(-1, -2)
        lead = x.shape[:-1]
        return self._product(x.reshape(math.prod(lead), x.shape[-1]), False).reshape(*lead, self.m)

    def vector(self, x: Tensor) -> Tensor:
        """``A x`` for one vector ``x`` of shape ``(n,)``."""
        return self.columns(x[:, None])[..., 0] if self.batch else self.rows(x[None])[0]

    def explain(self, k: int, rows: bool = False) -> Explanation:
        """How many products the custom operator makes, or that it is one kernel; products of the library elsewhere."""
        if rows and self._hadamard() is not None and fused.here(self.factors[0].device):
            return Explanation("fused")
        return Explanation(kron_kernel_name(self.factors, k, rows, self.always))

    def _product(self, x: Tensor, columns: bool) -> Tensor:
        scale = self._hadamard()
        if scale is not None and not autograd.transformed():
            return hadamard_op.product(x, scale, columns)
        return kron_product(x, None, self._cast(x), columns, self.always)

    def _hadamard(self) -> float | None:
        """The multiple of a Hadamard matrix that this is, where the operators are the way."""
        if not (self.always or takes_operator(self.factors[0])) or any(f.requires_grad for f in self.factors):
            return None
        if self._scale is False:
            self._scale = hadamard_op.scale_of(self.factors)
        return self._scale

    def _cast(self, x: Tensor) -> list[Tensor]:
        return [f.to(x.dtype) for f in self.factors]

    def _stacked(self, x: Tensor) -> Tensor:
        """``A x`` for stacks of operators, member by member."""
        lead = torch.broadcast_shapes(self.batch, x.shape[:-2])
        count, k = math.prod(lead), x.shape[-1]
        members = [f.expand(*lead, *f.shape[-2:]).reshape(count, *f.shape[-2:]) for f in self._cast(x)]
        x = x.expand(*lead, *x.shape[-2:]).reshape(count, *x.shape[-2:])
        parts = [kron_product(x[i], None, [f[i] for f in members], True, self.always) for i in range(count)]
        return torch.stack(parts).reshape(*lead, self.m, k) if parts else x.new_zeros(*lead, self.m, k)


def _reshaped(factors: Sequence[Tensor], shapes: Sequence[tuple[int, int, int]], dtype: torch.dtype) -> list[Tensor]:
    """Factors as ``(blocks, b, c)`` in a dtype; made anew for every product, so that views keep their gradients."""
    return [f.reshape(s).to(dtype) for f, s in zip(factors, shapes, strict=True)]
