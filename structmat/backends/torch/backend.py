"""The two torch backends: ``torch`` chooses how, ``torch-op`` always takes the custom operators."""

from __future__ import annotations

from collections.abc import Sequence

from structmat.arrays import Array
from structmat.backends import base
from structmat.backends.base import ChainLayout


class TorchBackend(base.Backend):
    """Products of torch, on any device: the custom operators on CUDA devices, on the others what is fastest there."""

    name = "torch"
    always = False  # through the custom operators, on every device

    def chain(self, layout: ChainLayout, blocks: Sequence[Array]) -> base.Plan:
        """The plan of a chain."""
        from structmat.backends.torch.plans import ChainPlan

        return ChainPlan(layout, blocks, self.always)

    def kron(self, factors: Sequence[Array]) -> base.Plan:
        """The plan of a Kronecker product of dense factors."""
        from structmat.backends.torch.plans import KronPlan

        return KronPlan(factors, self.always)


class TorchOperatorBackend(TorchBackend):
    """``torch.ops.structmat.chain`` and ``torch.ops.structmat.kron`` on every device, the CPU included."""

    name = "torch-op"
    always = True
