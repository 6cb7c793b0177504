"""Neighbouring factors of a chain multiplied out before the batch goes through: fewer passes over the batch, larger products.

A butterfly of radix 2 has ``log2 n`` factors of 2x2 blocks, which are all memory traffic; three factors of 16x16 blocks do
more arithmetic in a tenth of the time. The blocks are multiplied out anew in every call, so that gradients flow to the small
factors, which stay the parameters.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from structmat.backends.base import ChainLayout
from structmat.backends.merge import is_rank_one, product
from structmat.backends.torch import forward
from structmat.backends.torch.autograd import wants_gradient
from structmat.backends.torch.gradients import differentiable_gradients, gradients
from structmat.backends.torch.layout import Layout
from structmat.patterns import Pattern

LARGEST = 64  # side of a merged block
# Time of a factor in multiply-adds, fitted to forward and backward passes on one core (n = 256 to 4096, radix 2 to 64)
TRAFFIC = 40  # of one input or output entry of a row
THIN = 2.6  # times the traffic of blocks thinner than 4, which no product of matrices runs well on
MERGING = 250  # of one entry of a merged block, and of its gradient; once per call


class Merging(NamedTuple):
    """Runs of neighbouring factors of ``patterns``, left to right as ``(start, stop)``, and the patterns of their products."""

    patterns: tuple[Pattern, ...]
    runs: tuple[tuple[int, int], ...]
    merged: tuple[Pattern, ...]

    def products(self, factors: Sequence[Tensor]) -> list[Tensor]:
        """The products of the runs ``(blocks, b, c)``; half precision rounds once, at the end."""
        return [
            _multiplied_out(factors[start:stop], self.patterns[start:stop]) if stop - start > 1 else factors[start]
            for start, stop in self.runs
        ]


def merging_of(chain: ChainLayout, batch: int) -> Merging | None:
    """The cheapest way to merge the factors of a chain for a batch of rows; None where that is none at all."""
    return _merging(chain.patterns, 1 << max(batch - 1, 0).bit_length())


@functools.lru_cache(maxsize=4096)
def _merging(patterns: tuple[Pattern, ...], batch: int) -> Merging | None:
    """Least cost over all divisions into runs, from the left (dynamic programming)."""
    best: list[tuple[float, tuple[tuple[int, int], ...], tuple[Pattern, ...]]] = [(0.0, (), ())]
    for stop in range(1, len(patterns) + 1):
        candidates = []
        merged = patterns[stop - 1]
        for start in range(stop - 1, -1, -1):
            if start < stop - 1:
                if not is_rank_one(patterns[start], merged):
                    break
                merged = patterns[start].product(merged)
                if max(merged.b, merged.c) > LARGEST:
                    break
            cost, runs, products = best[start]
            cost += _cost(merged) + (MERGING / batch * merged.nparams if start < stop - 1 else 0)
            candidates.append((cost, (*runs, (start, stop)), (*products, merged)))
        best.append(min(candidates))
    _, runs, products = best[-1]
    return Merging(patterns, runs, products) if len(runs) < len(patterns) else None


def _cost(p: Pattern) -> float:
    return p.nparams + TRAFFIC * (p.rows + p.cols) * (THIN if min(p.b, p.c) < 4 else 1)


def _multiplied_out(factors: Sequence[Tensor], patterns: Sequence[Pattern]) -> Tensor:
    """Blocks of the product of neighbours."""
    dtype = factors[0].dtype
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    blocks = [f.to(wide).reshape(p.a, p.d, p.b, p.c) for f, p in zip(factors, patterns, strict=True)]
    return _halves(blocks).flatten(0, 1).to(dtype)


def _halves(blocks: Sequence[Tensor]) -> Tensor:
    """The product, halves first: most of the work is in the last multiplication."""
    if len(blocks) == 1:
        return blocks[0]
    middle = len(blocks) // 2
    return product(_halves(blocks[:middle]), _halves(blocks[middle:]))


# ---- the training path ----------------------------------------------------------------------------------------------------


def chain(x: Tensor, bias: Tensor | None, layout: Layout, merging: Merging, factors: Sequence[Tensor]) -> Tensor:
    """``x A^T + bias`` through the merged chain of ``layout``; saves ``x`` and the small factors, multiplied out again.

    For tensors without a transform around them; differentiable twice.
    """
    if wants_gradient(x, bias, *factors):
        return _Merged.apply(x, bias, layout, merging, *factors)  # pyright: ignore[reportReturnType]
    return forward.run(x, bias, layout, merging.products(factors))


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layout: Layout, merging: Merging, *factors: Tensor) -> Tensor:
        ctx.save_for_backward(x, *factors)
        ctx.layout, ctx.merging = layout, merging
        return forward.run(x, bias, layout, merging.products(factors))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, *factors = ctx.saved_tensors
        need_x, need_bias, _, _, *needs = ctx.needs_input_grad
        twice = torch.is_grad_enabled()  # the gradient is to be differentiated again
        if not twice:
            factors = [f.detach().requires_grad_(need) for f, need in zip(factors, needs, strict=True)]
        with torch.enable_grad():
            products = ctx.merging.products(factors)
        wanted = [p.requires_grad for p in products]
        if twice:
            dx, dbias, *found = differentiable_gradients(x, grads[0], ctx.layout, products)
        else:
            plain = [p.detach() for p in products]
            dx, dbias, *found = gradients(x, grads[0], ctx.layout, plain, (need_x, need_bias, *wanted))
        inputs = [f for f, need in zip(factors, needs, strict=True) if need]
        outputs = [p for p, w in zip(products, wanted, strict=True) if w]
        seeds = [g for g, w in zip(found, wanted, strict=True) if w and g is not None]
        made = iter(torch.autograd.grad(outputs, inputs, seeds, create_graph=twice)) if inputs else iter(())
        return (
            dx if need_x else None,
            dbias if need_bias else None,
            None,
            None,
            *(next(made) if n else None for n in needs),
        )
