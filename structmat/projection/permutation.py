"""Orders of rows and columns under which a matrix is nearer to a chain: digit reversals, axis transpositions, given ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from structmat.operator import Operator
from structmat.patterns import AxisOrder, Pattern, is_identity
from structmat.projection.svd import truncated
from structmat.structures.block_tensor_train import output_radices
from structmat.structures.permutation import Permutation

_SAMPLE = 1 << 15  # entries that one candidate digit is judged by
_TIE = 1e-9  # relative squared error below which two digits are equally good

Order = AxisOrder | None


def digit_orders(target: np.ndarray, patterns: Sequence[Pattern]) -> list[tuple[Order, Order]]:
    """Candidate orders of the rows and columns of a matrix for a chain, as transpositions of the digits of the index.

    All pairs of the identity and the digit reversal, and the pair that a greedy search finds: for every factor from the left
    it takes the row digit that the factor mixes and the column digit that it fixes with the least discarded energy, which
    covers every transposition of axes. A matrix that is a chain up to such an order is found where each split that is exact
    stays so. Source of the fixed candidates: Zheng, Riccietti, Gribonval, "Efficient identification of butterfly sparse
    matrix factorizations", SIAM J. Math. Data Sci. 5(1), 2023.

    Parameters
    ----------
    target
        ``(rows, columns)`` of the chain.
    patterns
        A chain in normal form, whose product is dense; ``ValueError`` otherwise.

    Returns
    -------
    orders
        ``(rows, columns)``, ``None`` for the identity: ``reorder(target, rows, columns)`` is what the chain is fitted to.

    Notes
    -----
    The digits are judged by a fixed sample of the blocks; the errors that decide in the end are those of whole sweeps.
    """
    q = output_radices(patterns, "permutation='search'")
    p = tuple(big // small for small, big in pairwise([*(x.a for x in patterns), patterns[-1].cols]))
    turned = [(None, _reversal(q)), (None, _reversal(p))]
    pairs = [(r, c) for r in turned[0] for c in turned[1]]
    pairs.append(_greedy(target, patterns, q, p))
    clean = [(None if is_identity(r) else r, None if is_identity(c) else c) for r, c in pairs]
    return list(dict.fromkeys(clean))


def _reversal(radices: Sequence[int]) -> AxisOrder:
    """The order that reverses the digits of an index and leaves them with these radices."""
    return AxisOrder(tuple(reversed(radices)), tuple(range(len(radices)))[::-1])


def reorder(target: np.ndarray, rows: Order, cols: Order) -> np.ndarray:
    """The matrix with its rows and columns in the given orders."""
    if rows is not None:
        target = target[rows.permutation()]
    return target if cols is None else target[:, cols.permutation()]


def _greedy(
    target: np.ndarray, patterns: Sequence[Pattern], q: Sequence[int], p: Sequence[int]
) -> tuple[AxisOrder, AxisOrder]:
    """Row and column digits in the order in which the factors take them, judged by the energy that each split discards."""
    column_radices = tuple(reversed(p))  # so that the full reversal is among them also for unequal radices
    active = target[None, None]  # (columns fixed so far, link, rows, columns)
    rows, cols = list(range(len(q))), list(range(len(p)))  # digits that are left, slow to fast
    chosen_rows: list[int] = []
    chosen_cols: list[int] = []
    for i, left in enumerate(patterns[:-1]):
        rank = left.chain_rank(patterns[i + 1]) or 0
        row_radices, col_radices = [q[r] for r in rows], [column_radices[c] for c in cols]
        pairs, scores = [], []
        for at in (x for x, radix in enumerate(row_radices) if radix == q[i]):
            sample = _mixed_rows(active, row_radices, at, _SAMPLE)
            norm = float(np.vdot(sample, sample).real) or 1.0
            for to in (x for x, radix in enumerate(col_radices) if radix == p[i]):
                pairs.append((at, to))
                scores.append(truncated(_fixed_column(sample, col_radices, to), rank).discarded / norm)
        at, to = pairs[int(np.argmax(np.array(scores) <= min(scores) + _TIE))]
        y = truncated(_fixed_column(_mixed_rows(active, row_radices, at), col_radices, to), rank).y
        active = y.reshape(-1, *y.shape[2:]).swapaxes(1, 2)  # (fixed, other rows, link, columns) before
        chosen_rows.append(rows.pop(at))
        chosen_cols.append(cols.pop(to))
    return AxisOrder(tuple(q), (*chosen_rows, *rows)), AxisOrder(column_radices, (*chosen_cols, *cols))


def _mixed_rows(active: np.ndarray, radices: Sequence[int], at: int, limit: int | None = None) -> np.ndarray:
    """Rows grouped by all digits but one: ``(fixed, others, link * radix, columns)``; about ``limit`` entries of them."""
    table = np.moveaxis(np.arange(active.shape[2]).reshape(radices), at, -1).reshape(-1, radices[at])
    take = len(table) if limit is None else max(1, limit * len(table) // active.size)
    if take < len(table):
        table = table[np.sort(np.random.default_rng(len(table)).choice(len(table), take, replace=False))]
    grouped = active[:, :, table].swapaxes(1, 2)
    return grouped.reshape(*grouped.shape[:2], -1, grouped.shape[-1])


def _fixed_column(grouped: np.ndarray, radices: Sequence[int], to: int) -> np.ndarray:
    """Columns cut by one digit: the blocks ``(fixed, radix, others, link * radix, other columns)``."""
    parts = (math.prod(radices[:to]), radices[to], math.prod(radices[to + 1 :]))
    cut = grouped.reshape(*grouped.shape[:3], *parts).transpose(0, 4, 1, 2, 3, 5)
    return cut.reshape(*cut.shape[:4], -1)


# ---- given permutations and transposes ------------------------------------------------------------------------------


class View(NamedTuple):
    """How the matrix is seen by the family: rows and columns in a given order, then transposed."""

    rows: np.ndarray | None = None
    cols: np.ndarray | None = None
    transposed: bool = False

    def of(self, target: np.ndarray) -> np.ndarray:
        """``W[rows][:, cols]``, or its transpose; a view of ``W`` where nothing is permuted."""
        if self.rows is not None:
            target = target[self.rows]
        if self.cols is not None:
            target = target[:, self.cols]
        return target.T if self.transposed else target

    def back(self, operator: Operator) -> Operator:
        """``P_rows^T A P_cols``, near ``W`` where ``A``, or its transpose, is near ``of(W)``; axis orders are absorbed."""
        operator = operator.T if self.transposed else operator
        if self.rows is not None:
            operator = Permutation(np.argsort(self.rows), operator.dtype) @ operator
        return operator if self.cols is None else operator @ Permutation(self.cols, operator.dtype)

    def indices(self, rows: np.ndarray, cols: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows and columns of ``W`` from those of ``of(W)``."""
        rows, cols = (cols, rows) if self.transposed else (rows, cols)
        return rows if self.rows is None else self.rows[rows], cols if self.cols is None else self.cols[cols]


def read_view(permutation: Any, transposed: bool, shape: tuple[int, int]) -> View:
    """The view that the options ``permutation`` and ``transposed`` ask for.

    ``permutation`` is an index array for the columns or a tuple ``(rows, columns)`` with ``None`` for the identity, or
    ``"search"``, which is left to the family. Raises ``ValueError`` for anything else, naming what was expected.
    """
    if permutation is None or isinstance(permutation, str):
        return View(transposed=transposed)
    is_pair = isinstance(permutation, tuple) and len(permutation) == 2
    pair = permutation if is_pair and any(v is None or np.ndim(v) for v in permutation) else (None, permutation)
    return View(_index(pair[0], shape[0], "rows"), _index(pair[1], shape[1], "columns"), transposed)


def _index(value: Any, size: int, what: str) -> np.ndarray | None:
    if value is None:
        return None
    index = np.asarray(value)
    if index.dtype.kind not in "iu" or index.shape != (size,) or not np.array_equal(np.sort(index), np.arange(size)):
        raise ValueError(
            f"permutation: expected 'search' or an index array of the {size} {what} holding each of 0..{size - 1} once, "
            f"got {index.dtype} of shape {index.shape}"
        )
    return index.astype(np.intp)
