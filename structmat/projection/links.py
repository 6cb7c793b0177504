"""Links of a chain: a pair of neighbours seen as a stack of low-rank blocks, cut, multiplied out and contracted.

A chainable pair ``left (a1, b1, c1, d1)``, ``right (a2, b2, c2, d2)`` of rank ``r`` holds, for every ``(a1, p, q, d2)`` with
``p = a2/a1`` and ``q = d1/d2``, one free ``b1 x c2`` block of rank ``r``, and these blocks partition the entries of the
product pattern (Le, Zheng, Riccietti, Gribonval 2025, section 4). Factors are arrays ``(a, d, b, c)``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from structmat.patterns import Pattern
from structmat.projection.device import straight

_PRODUCT_ENTRIES = 1 << 20  # of a slab of rank above 2: large enough for a matrix product, small beside the matrix


def split_view(active: np.ndarray, left: Pattern, right: Pattern) -> np.ndarray:
    """The blocks ``(a1, p, q, d2, b1, c2)`` of a factor ``(a1, d2, b1 q, p c2)`` with the pattern of the product; a view."""
    p, q = right.a // left.a, left.d // right.d
    return active.reshape(left.a, right.d, left.b, q, p, right.c).transpose(0, 4, 3, 1, 2, 5)


def left_blocks(x: np.ndarray, left: Pattern) -> np.ndarray:
    """The left factor ``(a, d, b, c)`` from ``(a1, p, q, d2, b1, r)``."""
    return x.transpose(0, 2, 3, 4, 1, 5).reshape(left.a, left.d, left.b, left.c)


def right_blocks(y: np.ndarray, right: Pattern) -> np.ndarray:
    """The right factor ``(a, d, b, c)`` from ``(a1, p, q, d2, r, c2)``."""
    return y.transpose(0, 1, 3, 4, 2, 5).reshape(right.a, right.d, right.b, right.c)


def left_view(factor: np.ndarray, left: Pattern, right: Pattern) -> np.ndarray:
    """The left factor as ``(a1, p, q, d2, b1, r)``: the inverse of :func:`left_blocks`."""
    p, q = right.a // left.a, left.d // right.d
    return factor.reshape(left.a, q, right.d, left.b, p, left.c // p).transpose(0, 4, 1, 2, 3, 5)


def right_view(factor: np.ndarray, left: Pattern, right: Pattern) -> np.ndarray:
    """The right factor as ``(a1, p, q, d2, r, c2)``: the inverse of :func:`right_blocks`."""
    p, q = right.a // left.a, left.d // right.d
    return factor.reshape(left.a, p, right.d, right.b // q, q, right.c).transpose(0, 1, 4, 2, 3, 5)


def adjoint(x: np.ndarray) -> np.ndarray:
    """The conjugate transpose of every matrix of a stack."""
    return x.conj().swapaxes(-1, -2)


def multiply(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """``x @ y`` for stacks ``(..., b, r)`` and ``(..., r, c)``; short inner sides by scaled slices, which is faster."""
    inner = x.shape[-1]
    if inner > 2:
        return x @ y
    out = x[..., :, :1] * y[..., :1, :]
    for i in range(1, inner):
        out += x[..., :, i : i + 1] * y[..., i : i + 1, :]
    return out


def merge(x: np.ndarray, y: np.ndarray, left: Pattern, right: Pattern) -> np.ndarray:
    """The product ``(a1, d2, b1 q, p c2)`` of two neighbouring factors."""
    product = left.product(right)
    blocks = multiply(left_view(x, left, right), right_view(y, left, right))
    return blocks.transpose(0, 3, 4, 2, 1, 5).reshape(product.a, product.d, product.b, product.c)


def expand(factors: Sequence[np.ndarray], patterns: Sequence[Pattern]) -> np.ndarray:
    """All factors of a chainable chain multiplied out from the right, ``O(n^2)`` for the square radix-2 chain."""
    whole, rest = factors[-1], patterns[-1]
    for x, left in zip(reversed(factors[:-1]), reversed(patterns[:-1]), strict=True):
        whole, rest = merge(x, whole, left, rest), left.product(rest)
    return whole


def apply(factor: np.ndarray, x: np.ndarray) -> np.ndarray:
    """A factor ``(a, d, b, c)`` times a matrix ``(a c d, N)``."""
    a, d, b, c = factor.shape
    y = factor @ x.reshape(a, c, d, -1).swapaxes(1, 2)
    return y.swapaxes(1, 2).reshape(a * b * d, -1)


def multiplied_out(factors: Sequence[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """The matrix ``(m, n)`` of any factors that can be multiplied, chainable or not, without its padding."""
    a, d, _, c = factors[-1].shape
    dense = np.eye(a * c * d, shape[1], dtype=factors[-1].dtype, like=factors[-1])
    for factor in reversed(factors):
        dense = apply(factor, dense)
    return dense[: shape[0]]


def pair_of(factors: Sequence[np.ndarray], patterns: Sequence[Pattern]) -> tuple[np.ndarray, np.ndarray] | None:
    """A chain ``(1, ...) ... (..., 1)`` as two factors, where it is chainable and they are smaller than the matrix."""
    if (
        len(patterns) < 2
        or patterns[0].a != 1
        or patterns[-1].d != 1
        or any(not p.chain_rank(q) for p, q in pairwise(patterns))
    ):
        return None
    table, last = products(patterns), len(patterns) - 1
    sizes = [table[0, s].nparams + table[s + 1, last].nparams for s in range(last)]
    cut = sizes.index(min(sizes))
    if sizes[cut] >= patterns[0].rows * patterns[-1].cols:
        return None
    return expand(factors[: cut + 1], patterns[: cut + 1]), expand(factors[cut + 1 :], patterns[cut + 1 :])


def row_slabs(
    halves: Sequence[np.ndarray], entries: int, transposed: bool = False
) -> Iterator[tuple[slice | np.ndarray, np.ndarray]]:
    """A pair ``(1, s, k r, l), (k, r l, p, 1)`` as some rows of the dense ``(s l, k p)`` at a time, ``2 r`` flops an entry.

    Yields the indices of the rows and the rows: runs with about the number of entries asked for, so that they stay in a
    cache, or for ranks above 2 what keeps matrix products large. ``transposed``: columns, as rows.
    """
    (_, l, s, _), (k, _, rl, p) = (f.shape for f in halves)
    rank, rows, cols = rl // l, s * l, k * p
    x, y = halves[0].reshape(l, s, k, rank), halves[1].reshape(k, rank, l, p)
    if rank > 2 and transposed:
        step = max(1, _PRODUCT_ENTRIES // max(rows, 1))
        for i, at in itertools.product(range(k), range(0, p, step)):
            block = y[i, :, :, at : at + step].transpose(1, 2, 0) @ x[:, :, i].swapaxes(1, 2)  # (l, step, s)
            first, count = i * p + at, block.shape[1]
            yield slice(first, first + count), block.transpose(1, 2, 0).reshape(count, rows)
    elif rank > 2:
        step = max(1, _PRODUCT_ENTRIES // max(cols, 1))
        for i, at in itertools.product(range(l), range(0, s, step)):
            block = x[i, at : at + step].swapaxes(0, 1) @ y[:, :, i]  # (k, step, p)
            places = slice(at, at + step) if l == 1 else np.arange(i, rows, l)[at : at + step]
            yield places, block.swapaxes(0, 1).reshape(-1, cols)
    elif transposed:
        y, x = y.transpose(1, 0, 3, 2)[..., None, :], x.transpose(3, 2, 1, 0)[:, :, None]
        yield from _runs(y, x, entries)  # (r, k, p, 1, l) and (r, k, 1, s, l)
    else:
        x, y = x.transpose(3, 1, 0, 2)[..., None], y.transpose(1, 2, 0, 3)[:, None]
        yield from _runs(x, y, entries)  # (r, s, l, k, 1) and (r, 1, l, k, p)


def _runs(x: np.ndarray, y: np.ndarray, entries: int) -> Iterator[tuple[slice, np.ndarray]]:
    """Runs of the first two of four axes of ``sum_r x[r] * y[r]``, which broadcast against each other."""
    _, first, second, *inner = np.broadcast_shapes(x.shape, y.shape)
    cols = math.prod(inner)
    x, y = straight(x), straight(y)
    x = np.broadcast_to(x, (len(x), first, second, *x.shape[3:]))
    y = np.broadcast_to(y, (len(y), first, second, *y.shape[3:]))
    tall, wide = max(1, entries // (second * cols)), min(second, max(1, entries // cols))
    for i in range(0, first, tall):
        for j in range(0, second, wide):
            at = (slice(i, i + tall), slice(j, j + wide))
            run = x[0][at] * y[0][at]
            for u, v in zip(x[1:], y[1:], strict=True):
                run += u[at] * v[at]
            start = i * second + j
            run = run.reshape(-1, cols)
            yield slice(start, start + len(run)), run


def contract_left(active: np.ndarray, x: np.ndarray, left: Pattern, right: Pattern) -> np.ndarray:
    """``U^H T``: the blocks of a product pattern without their left factor, as a factor with the right pattern."""
    u, blocks = left_view(x, left, right), split_view(active, left, right)
    return right_blocks(multiply(adjoint(u), blocks) if left.b <= 2 else adjoint(u) @ blocks, right)


def contract_right(active: np.ndarray, y: np.ndarray, left: Pattern, right: Pattern) -> np.ndarray:
    """``T V^H``: the blocks of a product pattern without their right factor, as a factor with the left pattern."""
    v, blocks = right_view(y, left, right), split_view(active, left, right)
    return left_blocks(multiply(blocks, adjoint(v)), left)


def products(patterns: Sequence[Pattern]) -> dict[tuple[int, int], Pattern]:
    """Pattern of the product of the factors ``i`` to ``j``, for every ``i <= j``."""
    table = {}
    for i, first in enumerate(patterns):
        table[i, i] = first
        for j in range(i + 1, len(patterns)):
            table[i, j] = table[i, j - 1].product(patterns[j])
    return table
