"""Neighbouring factors multiplied out on a CUDA device: twelve butterfly levels become two factors of 64 x 64 blocks.

The cost model of the GPU decides; the blocks are multiplied out anew in every call, so that gradients flow to the small
factors. Sixteen-bit values are multiplied out in float32 and rounded once.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from structmat.backends import merge
from structmat.backends.cuda import roofline
from structmat.backends.torch.layout import Layout, chain_of, layout_of
from structmat.patterns import Pattern

LARGEST = 256  # side of a merged block
Runs = tuple[tuple[int, int], ...]


def merged_chain(layout: Layout, factors: Sequence[Tensor]) -> tuple[Layout, Sequence[Tensor]]:
    """The same chain with fewer factors ``(blocks, b, c)``, where that is predicted to be faster on a large batch."""
    dtype = factors[0].dtype
    runs, merged = _chain_runs(layout.code, _name(dtype), dtype.itemsize)
    if merged is None:
        return layout, factors
    return merged, [_multiplied_out(factors[i:j], layout.patterns[i:j]) if j - i > 1 else factors[i] for i, j in runs]


def merged_factors(factors: Sequence[Tensor]) -> Sequence[Tensor]:
    """The same Kronecker product with fewer factors ``(m, n)``."""
    dtype = factors[0].dtype
    shapes = tuple((int(f.shape[0]), int(f.shape[1])) for f in factors)
    runs = _kron_runs(shapes, _name(dtype), dtype.itemsize)
    if len(runs) == len(factors):
        return factors
    wide = _wide(dtype)
    return [
        functools.reduce(torch.kron, [f.to(wide) for f in factors[i:j]]).to(dtype) if j - i > 1 else factors[i]
        for i, j in runs
    ]


def chain_layout(layout: Layout, dtype: torch.dtype) -> Layout:
    """The layout that :func:`merged_chain` makes of one."""
    return _chain_runs(layout.code, _name(dtype), dtype.itemsize)[1] or layout


def factor_shapes(shapes: Sequence[tuple[int, int]], dtype: torch.dtype) -> list[tuple[int, int]]:
    """The shapes that :func:`merged_factors` makes of these."""
    runs = _kron_runs(tuple(shapes), _name(dtype), dtype.itemsize)
    return [(math.prod(s[0] for s in shapes[i:j]), math.prod(s[1] for s in shapes[i:j])) for i, j in runs]


@functools.lru_cache(maxsize=1024)
def _chain_runs(code: tuple[int, ...], dtype: str, itemsize: int) -> tuple[Runs, Layout | None]:
    chain = chain_of(code)
    patterns = chain.patterns

    def cost(start: int, stop: int) -> float | None:
        if any(not merge.is_rank_one(p, q) for p, q in itertools.pairwise(patterns[start:stop])):
            return None  # merging them would add sums
        whole = _product(patterns[start:stop])
        if stop - start > 1 and (stop - start == len(patterns) or max(whole.b, whole.c) > LARGEST):
            return None  # the whole of it is the dense matrix
        size = whole.nparams
        return roofline.factor_seconds(whole.rows, whole.cols, size, size, roofline.H200, dtype, itemsize)

    runs = roofline.best_grouping(len(patterns), cost)
    if len(runs) == len(patterns):
        return runs, None
    return runs, layout_of(chain._replace(patterns=tuple(_product(patterns[i:j]) for i, j in runs)))


@functools.lru_cache(maxsize=1024)
def _kron_runs(shapes: tuple[tuple[int, int], ...], dtype: str, itemsize: int) -> Runs:
    inputs = math.prod(n for _, n in shapes)

    def cost(start: int, stop: int) -> float | None:
        m, n = (math.prod(s[i] for s in shapes[start:stop]) for i in range(2))
        if stop - start > 1 and (stop - start == len(shapes) or max(m, n) > LARGEST or 0 in (m, n)):
            return None
        others = inputs // n if n else 0
        return roofline.factor_seconds(m * others, n * others, m * n * others, m * n, roofline.H200, dtype, itemsize)

    return roofline.best_grouping(len(shapes), cost)


def _product(patterns: Sequence[Pattern]) -> Pattern:
    return functools.reduce(Pattern.product, patterns)


def _multiplied_out(factors: Sequence[Tensor], patterns: Sequence[Pattern]) -> Tensor:
    """Blocks of the product of neighbours."""
    dtype = factors[0].dtype
    blocks = [f.to(_wide(dtype)).reshape(p.a, p.d, p.b, p.c) for f, p in zip(factors, patterns, strict=True)]
    return functools.reduce(merge.product, blocks).flatten(0, 1).to(dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
