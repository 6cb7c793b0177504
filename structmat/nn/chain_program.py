"""The program of a chain: the training path, the compiled row kernels where no gradient is needed, or composed of ``bmm``."""

from __future__ import annotations

import functools as tools
from collections.abc import Sequence

from torch import Tensor

from structmat.backends.base import ChainLayout
from structmat.nn import functions, merging
from structmat.nn.inference import Inference
from structmat.nn.program import Factor, Program


class ChainProgram(Program):
    """A product of Kronecker-sparse factors."""

    def __init__(self, slots: Sequence[int], chain: ChainLayout) -> None:
        self.slots, self.shape, self.chain = tuple(slots), (chain.rows, chain.cols), chain
        self.layout = layout = functions.layout_of(chain)
        self.blocks = tuple((p.a * p.d, p.b, p.c) for p in layout.patterns)
        self.inference = Inference(chain)
        self.flops = 2 * sum(p.nparams for p in layout.patterns)
        self.factors = tuple(
            Factor(slot, p.c, p.b, last=i == 0) for i, (slot, p) in enumerate(zip(slots, layout.patterns, strict=True))
        )

    def rows(self, x: Tensor, bias: Tensor | None, values: Sequence[Tensor], places: Sequence[Tensor]) -> Tensor:  # noqa: ARG002
        """Through the training path where the tensors are plain, small factors multiplied out; else composed."""
        factors = [values[slot].reshape(blocks) for slot, blocks in zip(self.slots, self.blocks, strict=True)]
        if not functions.eager(x, bias, *(values[slot] for slot in self.slots)):
            return functions.composed_chain(x, bias, self.layout, factors)
        y = self.inference.rows(x, bias, factors)
        if y is not None:
            return y
        merge = None if functions.takes_operator(x) else merging.merging_of(self.chain, x.shape[0])
        if merge is None:
            return functions.chain(x, bias, self.layout, factors)
        return merging.chain(x, bias, _layout(self.chain._replace(patterns=merge.merged)), merge, factors)


_layout = tools.lru_cache(maxsize=4096)(functions.layout_of)
