"""Alternating least squares for chains: two neighbours at a time are replaced by the best pair, the others held."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from structmat.patterns import Pattern
from structmat.projection.certificate import frobenius
from structmat.projection.links import (
    adjoint,
    contract_left,
    contract_right,
    expand,
    left_blocks,
    left_view,
    multiply,
    products,
    right_blocks,
    right_view,
    split_view,
)
from structmat.projection.progress import Advance, quiet
from structmat.projection.svd import truncated

SWEEPS = 50  # at most, where the caller asks for convergence
_GAIN = 1e-5  # relative: convergence is a sweep that gains less


def alternate(
    whole: np.ndarray,
    factors: Sequence[np.ndarray],
    patterns: Sequence[Pattern],
    sweeps: int | bool = True,
    advance: Advance = quiet,
) -> tuple[list[np.ndarray], list[float]]:
    """Improve a chain by two-site alternating least squares in orthogonal gauge; the error never grows.

    With every factor left of a pair orthonormal in its columns and every one right of it in its rows, the best pair is the
    blockwise truncated SVD of ``L^H W R^H``: the least-squares problem has no matrix to invert. Source: the density-matrix
    renormalisation idea for tensor trains (Holtz, Rohwedder, Schneider, SIAM J. Sci. Comput. 34, 2012), here for
    Kronecker-sparse chains.

    Parameters
    ----------
    whole
        Blocks ``(a, d, b, c)`` of the matrix on the support of the product pattern.
    factors
        The start: blocks of a chainable chain without redundant pairs.
    patterns
        The patterns of the factors.
    sweeps
        Number of sweeps there and back. ``True``: until one gains less than ``1e-5`` of the error, at most 50.
    advance
        Moves a progress bar by one for every sweep.

    Returns
    -------
    factors
        The blocks after the last sweep that gained.
    errors
        Distance from ``whole`` at the start and after every sweep, from the residual itself; it never grows.

    Notes
    -----
    Contractions of ``W`` from both ends are kept, so that a sweep costs four times the size of ``W`` for the radix-2 chain,
    and takes twice its memory.
    """
    site = _Sites(whole, factors, patterns)
    best, errors = list(factors), [frobenius(whole - expand(factors, patterns))]
    if len(factors) < 3 or errors[0] == 0.0:
        return best, errors
    limit = SWEEPS if sweeps is True else int(sweeps)
    for _ in range(limit):
        advance(1, 1)
        site.there()
        site.back()
        error = frobenius(whole - expand(site.factors, patterns))
        if error >= errors[-1]:  # nothing is left to gain but rounding
            break
        best = list(site.factors)
        errors.append(error)
        if sweeps is True and error > (1.0 - _GAIN) * errors[-2]:
            break
    return best, errors


class _Sites:
    """The factors in orthogonal gauge around one of them, and ``W`` contracted with those before and after every pair."""

    def __init__(self, whole: np.ndarray, factors: Sequence[np.ndarray], patterns: Sequence[Pattern]) -> None:
        self.factors, self.table, self.last = list(factors), products(patterns), len(factors) - 1
        for i in range(self.last, 0, -1):
            self._orthonormal_rows(i)
        self.lefts = {0: whole}  # lefts[i]: W without the factors before i
        self.rights = {self.last: whole}  # rights[i]: W without the factors after i
        for i in range(self.last, 1, -1):
            self._shrink_right(i)
        self.turned = False

    def there(self) -> None:
        """Every pair once, from left to right; the norm ends in the last factor but one."""
        for i in range(1 if self.turned else 0, self.last):
            self._solve(i, to_right=i < self.last - 1)
            if i < self.last - 1:
                self._shrink_left(i)
        self._shrink_right(self.last)

    def back(self) -> None:
        """Every pair but the last, from right to left; the norm ends in the second factor."""
        for i in range(self.last - 2, -1, -1):
            self._solve(i, to_right=i == 0)
            if i:
                self._shrink_right(i + 1)
        self._shrink_left(0)
        self.turned = True

    def _orthonormal_rows(self, i: int) -> None:
        left, right = self.table[i - 1, i - 1], self.table[i, i]
        q, r = np.linalg.qr(adjoint(right_view(self.factors[i], left, right)))
        x = multiply(left_view(self.factors[i - 1], left, right), adjoint(r))
        self.factors[i - 1], self.factors[i] = left_blocks(x, left), right_blocks(adjoint(q), right)

    def _shrink_left(self, i: int) -> None:
        left, right = self.table[i, i], self.table[i + 1, self.last]
        self.lefts[i + 1] = contract_left(self.lefts[i], self.factors[i], left, right)

    def _shrink_right(self, i: int) -> None:
        left, right = self.table[0, i - 1], self.table[i, i]
        self.rights[i - 1] = contract_right(self.rights[i], self.factors[i], left, right)

    def _solve(self, i: int, to_right: bool) -> None:
        """The best pair ``i, i + 1``; its left factor orthonormal, or its right one."""
        left, right = self.table[i, i], self.table[i + 1, i + 1]
        active, low, high = self.lefts[i], i, self.last
        if active.size > self.rights[i + 1].size:
            active, low, high = self.rights[i + 1], 0, i + 1
        for j in range(high, i + 1, -1):
            active = contract_right(active, self.factors[j], self.table[low, j - 1], self.table[j, j])
        for j in range(low, i):
            active = contract_left(active, self.factors[j], self.table[j, j], self.table[j + 1, i + 1])
        blocks, rank = split_view(active, left, right), left.chain_rank(right) or 0
        if to_right:
            found = truncated(blocks, rank)
            x, y = found.u, found.y
        else:
            found = truncated(adjoint(blocks), rank)
            x, y = adjoint(found.y), adjoint(found.u)
        self.factors[i], self.factors[i + 1] = left_blocks(x, left), right_blocks(y, right)
