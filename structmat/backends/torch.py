"""The torch backend: the general plans on torch tensors, differentiable in the operator's values and in the operand."""

from __future__ import annotations

from collections.abc import Sequence

from structmat.arrays import Array
from structmat.backends import base
from structmat.backends.base import ChainLayout


class TorchBackend(base.Backend):
    """Batched products of torch, on any device; values are cast where torch's ``@`` would refuse mixed dtypes."""

    name = "torch"

    def chain(self, layout: ChainLayout, blocks: Sequence[Array]) -> base.Plan:
        """The plan of a chain."""
        return _ChainPlan(layout, blocks)

    def kron(self, factors: Sequence[Array]) -> base.Plan:
        """The plan of a Kronecker product of dense factors."""
        return _KronPlan(factors)


class _ChainPlan(base.ChainPlan):
    def _like(self, block: Array, _x: Array) -> Array:
        return block.to(_x.dtype)


class _KronPlan(base.KronPlan):
    def _like(self, factor: Array, _x: Array) -> Array:
        return factor.to(_x.dtype)
