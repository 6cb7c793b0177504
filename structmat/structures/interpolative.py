"""Interpolative: a low-rank matrix as some of its rows (or columns) and the coefficients that give the others."""

from __future__ import annotations

from operator import index as as_int
from typing import Any

import numpy as np

from structmat import arrays
from structmat.arrays import Array, DType
from structmat.operator import Operator
from structmat.structures.chain import check_size
from structmat.structures.low_rank import LowRank

SIDES = ("rows", "columns")


class Interpolative(Operator):
    """Low-rank matrix in interpolative form, ``P [I; T] B``: ``r`` of its rows, and the others as combinations of them.

    With ``side="rows"``, ``A[index[:r]] = B`` and ``A[index[r:]] = T B``; with ``side="columns"``,
    ``A[:, index[:r]] = B`` and ``A[:, index[r:]] = B T``. The same matrices as :class:`structmat.LowRank`, of which this is
    a storage form without the ``r**2`` numbers that a product ``U V = (U G) (G**-1 V)`` has too many. The transpose holds
    the same arrays transposed, with the other side. Source: Cheng, Gimbutas, Martinsson, Rokhlin, "On the compression of
    low rank matrices", SIAM J. Sci. Comput. 26 (2005).

    Parameters
    ----------
    index
        Integers: a permutation of the rows ``(m,)`` or columns ``(n,)``, the ``r`` that are stored first.
    coefficients
        ``T``, ``(*batch, m - r, r)`` for rows, ``(*batch, r, n - r)`` for columns.
    basis
        ``B``, ``(*batch, r, n)`` for rows, ``(*batch, m, r)`` for columns.
    side
        ``"rows"`` or ``"columns"``.

    Raises
    ------
    ValueError
        If the shapes do not fit each other, ``index`` is not a permutation or ``side`` is neither name.
    TypeError
        If the arrays are of different libraries or devices, or ``index`` does not hold integers.

    Notes
    -----
    ``r (m + n - r)`` stored numbers, twice that in flops per column: always at most dense. The identity block costs nothing;
    the permutation is one gather of the outputs (rows) or inputs (columns).

    Examples
    --------
    >>> import numpy as np, structmat as sm
    >>> A = sm.Interpolative([1, 0, 2], [[2.0], [3.0]], [[1.0, 5.0]])
    >>> A.to_dense().tolist(), A.nparams
    ([[2.0, 10.0], [1.0, 5.0], [3.0, 15.0]], 4)
    >>> A.T.side, (A.T @ np.ones(3)).tolist()
    ('columns', [6.0, 30.0])
    """

    __slots__ = ("index", "coefficients", "basis", "side")
    fields = ("index", "coefficients", "basis", "side")
    index: Array
    coefficients: Array
    basis: Array
    side: str

    def __init__(self, index: Any, coefficients: Any, basis: Any, side: str = "rows") -> None:
        if side not in SIDES:
            raise ValueError(f"Interpolative: side: expected 'rows' or 'columns', got {side!r}")
        basis = arrays.values(basis, "Interpolative basis", 2)
        coefficients = arrays.values(coefficients, "Interpolative coefficients", 2)
        arrays.common((coefficients, basis), "Interpolative")
        b, t = (tuple(x.shape) if side == "rows" else _swap(x.shape) for x in (basis, coefficients))
        if t[-1] != b[-2] or t[:-2] != b[:-2]:
            raise ValueError(
                f"Interpolative: coefficients {tuple(coefficients.shape)} and basis {tuple(basis.shape)} do not fit each "
                f"other for side={side!r}: expected the same batch and rank"
            )
        index = arrays.indices(index, "Interpolative")
        size = t[-2] + t[-1]
        if not np.array_equal(np.sort(arrays.convert(index, "numpy")), np.arange(size)):
            raise ValueError(
                f"Interpolative: index: expected each of 0..{size - 1} once, got {tuple(index.shape)} numbers"
            )
        kind = arrays.kind(basis) or "numpy"
        self._set(
            arrays.convert(index, kind, None if kind == "numpy" else arrays.device(basis)), coefficients, basis, side
        )

    def _set(self, index: Array, coefficients: Array, basis: Array, side: str) -> None:
        size, other = index.shape[0], basis.shape[-1 if side == "rows" else -2]
        shape = (size, other) if side == "rows" else (other, size)
        self._init(
            (*basis.shape[:-2], *shape),
            arrays.promote(coefficients.dtype, basis.dtype),
            arrays.kind(basis),
            arrays.device(basis),
            index=index,
            coefficients=coefficients,
            basis=basis,
            side=side,
        )

    @classmethod
    def _rebuild(cls, *values: Any) -> Interpolative:
        made = object.__new__(cls)
        made._set(*values)
        return made

    # ---- structure ----------------------------------------------------------------------------------------------

    @property
    def rank(self) -> int:
        """Number of stored rows or columns, an upper bound of the rank."""
        return int(self.basis.shape[-2 if self.side == "rows" else -1])

    @property
    def selected(self) -> Array:
        """Indices ``(r,)`` of the rows or columns of the matrix that are stored as they are."""
        return self.index[: self.rank]

    @property
    def left(self) -> Array:
        """The left factor ``(*batch, m, r)`` with its identity block written out, or the basis."""
        return self._expanded(self.coefficients, -2) if self.side == "rows" else self.basis

    @property
    def right(self) -> Array:
        """The right factor ``(*batch, r, n)`` with its identity block written out, or the basis."""
        return self.basis if self.side == "rows" else self._expanded(self.coefficients, -1)

    def to_low_rank(self) -> LowRank:
        """The same matrix as a plain product of two factors."""
        return LowRank(self.left, self.right)

    def _expanded(self, t: Array, axis: int) -> Array:
        xp = arrays.namespace(t)
        where = {} if arrays.kind(t) == "numpy" else {"device": arrays.device(t)}
        eye = xp.eye(self.rank, dtype=t.dtype, **where)
        both = xp.concat((xp.broadcast_to(eye, (*t.shape[:-2], *eye.shape)), t), axis=axis)
        return both[..., self._inverse, :] if axis == -2 else both[..., self._inverse]

    @property
    def _inverse(self) -> Array:
        found = self._plans.get("inverse")
        if found is None:
            found = self._plans["inverse"] = arrays.namespace(self.index).argsort(self.index)
        return found

    def _transpose(self) -> Operator:
        side = SIDES[1 - SIDES.index(self.side)]
        return self._rebuild(self.index, self.coefficients.swapaxes(-1, -2), self.basis.swapaxes(-1, -2), side)

    def with_values(self, coefficients: Array, basis: Array) -> Interpolative:
        """The same selection with other coefficients and basis, of the same shapes."""
        return self._rebuild(self.index, coefficients, basis, self.side)

    def _flops(self) -> int:
        r = self.rank
        return 2 * r * (self.shape[-2] + self.shape[-1] - r)

    def _details(self) -> str:
        return f"rank {self.rank}, {self.side}"

    # ---- applying -----------------------------------------------------------------------------------------------

    def _matmat(self, x: Array) -> Array:
        t, basis, r = _like(self.coefficients, x), _like(self.basis, x), self.rank
        if self.side == "columns":
            gathered = _take(x, self.index, -2)
            return basis @ (gathered[..., :r, :] + t @ gathered[..., r:, :])
        z = basis @ x
        return _take(arrays.namespace(z).concat((z, t @ z), axis=-2), self._inverse, -2)

    def _rows(self, x: Array) -> Array:
        t, basis = (_like(y, x).swapaxes(-1, -2) for y in (self.coefficients, self.basis))
        r = self.rank
        if self.side == "columns":
            gathered = _take(x, self.index, -1)
            return (gathered[..., :r] + gathered[..., r:] @ t) @ basis
        z = x @ basis
        return _take(arrays.namespace(z).concat((z, z @ t), axis=-1), self._inverse, -1)

    # ---- random members -----------------------------------------------------------------------------------------

    @classmethod
    def random(
        cls,
        shape: tuple[int, int],
        *,
        rank: int | None = None,
        side: str = "rows",
        dtype: DType = float,
        rng: Any = None,
    ) -> Interpolative:
        """A random matrix of a rank (default: a quarter of the smaller size, at least 1), in interpolative form.

        Parameters
        ----------
        shape
            ``(m, n)``.
        rank
            At most the number of rows or columns on ``side``.
        side
            ``"rows"`` or ``"columns"``: which of them are stored.
        dtype, rng
            Dtype and seed or generator.

        Examples
        --------
        >>> import structmat as sm
        >>> sm.Interpolative.random((8, 6), rank=2, rng=0).nparams
        24
        """
        m, n = check_size(shape)
        if side == "columns":
            made = cls.random((n, m), rank=rank, dtype=dtype, rng=rng)
            return cls._rebuild(made.index, made.coefficients.swapaxes(-1, -2), made.basis.swapaxes(-1, -2), side)
        r = min(m, max(1, min(m, n) // 4)) if rank is None else as_int(rank)
        if not 0 <= r <= m:
            raise ValueError(f"rank: expected between 0 and {m}, the size of the side that is selected, got {rank}")
        rng = np.random.default_rng(rng)
        coefficients = arrays.random((m - r, r), dtype, rng, max(r, 1) ** -0.5)
        basis = arrays.random((r, n), dtype, rng, max(n, 1) ** -0.5)
        return cls(rng.permutation(m), coefficients, basis, side)


def _swap(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-2], shape[-1], shape[-2])


def _like(array: Array, x: Array) -> Array:
    """Torch's ``@`` refuses mixed dtypes; NumPy's promotes by itself."""
    return array.to(x.dtype) if arrays.kind(array) == "torch" else array


def _take(x: Array, index: Array, axis: int) -> Array:
    if arrays.kind(x) == "numpy":
        return np.take(x, index, axis=axis)  # faster than indexing for rows
    return x[..., index, :] if axis == -2 else x[..., index]
