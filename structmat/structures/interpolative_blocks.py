"""InterpolativeBlocks: Monarch and two-core Block Tensor-Train matrices without the redundancy of their block ranks."""

from __future__ import annotations

from typing import Any

import numpy as np

from structmat import arrays
from structmat.arrays import Array, DType
from structmat.backends.base import pad, reorder
from structmat.operator import Operator
from structmat.patterns import AxisOrder, is_identity
from structmat.structures.chain import Chain, ceil_div, check_size, split_counts

SIDES = ("columns", "rows")


class InterpolativeBlocks(Operator):
    """Matrix of ``l x k`` blocks of rank ``r``, each ``B [I T] P``: ``r`` of its columns, and what gives the others.

    The chain ``(1, s, k r, l) (k, r l, p, 1)`` of :class:`structmat.Monarch` and :class:`structmat.BlockTensorTrain` with an
    identity in every ``r x p`` block of its right factor, which frees ``r**2`` numbers a block; a storage form of those
    families as :class:`structmat.Interpolative` is of LowRank. Block ``(j, kappa)`` has the columns
    ``B[:, i] = left[j, :, kappa r + i]`` at ``index[kappa, j, i]`` for ``i < r``, and ``B T`` at the rest. With
    ``side="rows"`` the operator is the transpose of all this.

    Parameters
    ----------
    index
        Integers ``(k, l, p)``: for every block a permutation of its ``p`` columns, the stored ones first.
    coefficients
        ``T``, ``(*batch, k, l, r, p - r)``.
    left
        ``(*batch, l, s, k*r)``, the last axis with ``r`` fast, as that of Monarch.
    shape
        Logical shape, of the operator as it is applied; at most ``(l*s, k*p)`` (rows: the reverse), the default.
    out_order, in_order
        Axis orders of the chain (:class:`structmat.patterns.AxisOrder`); without them the rows of a block are those of equal
        residue modulo ``l`` (Monarch), its columns contiguous.
    side
        ``"columns"``, or ``"rows"`` for the transpose.

    Raises
    ------
    ValueError
        If the shapes do not fit each other, or ``index`` does not hold permutations.
    TypeError
        If the arrays are of different libraries or devices, or ``index`` does not hold integers.

    Notes
    -----
    ``k l r (s + p - r)`` stored numbers, twice that in flops per column, and a gather of ``k l p`` entries.

    Examples
    --------
    >>> import structmat as sm
    >>> A = sm.InterpolativeBlocks.random((12, 10), blocks=(3, 2), rank=2, rng=0)
    >>> A.shape, A.nparams, sm.Monarch.random((12, 10), blocks=(3, 2), rank=2).nparams
    ((12, 10), 84, 108)
    """

    __slots__ = ("index", "coefficients", "left", "out_order", "in_order", "side")
    fields = ("index", "coefficients", "left", "shape", "out_order", "in_order", "side")
    index: Array
    coefficients: Array
    left: Array
    out_order: AxisOrder | None
    in_order: AxisOrder | None
    side: str

    def __init__(
        self,
        index: Any,
        coefficients: Any,
        left: Any,
        shape: tuple[int, int] | None = None,
        out_order: AxisOrder | None = None,
        in_order: AxisOrder | None = None,
        side: str = "columns",
    ) -> None:
        if side not in SIDES:
            raise ValueError(f"InterpolativeBlocks: side: expected 'columns' or 'rows', got {side!r}")
        coefficients = arrays.values(coefficients, "InterpolativeBlocks coefficients", 4)
        left = arrays.values(left, "InterpolativeBlocks left", 3)
        arrays.common((coefficients, left), "InterpolativeBlocks")
        index = np.asarray(index) if arrays.kind(index) is None else index
        k, l, r, rest = (int(x) for x in coefficients.shape[-4:])
        if (int(left.shape[-3]), int(left.shape[-1])) != (l, k * r) or left.shape[:-3] != coefficients.shape[:-4]:
            raise ValueError(
                f"InterpolativeBlocks: coefficients {tuple(coefficients.shape)} need a left factor (*batch, {l}, s, {k * r}), "
                f"got {tuple(left.shape)}"
            )
        if tuple(index.shape) != (k, l, r + rest):
            raise ValueError(f"InterpolativeBlocks: index: expected {(k, l, r + rest)}, got {tuple(index.shape)}")
        host = arrays.convert(index, "numpy")
        arrays.indices(host.reshape(-1), "InterpolativeBlocks")
        if not (np.sort(host, axis=-1) == np.arange(r + rest)).all():
            raise ValueError(f"InterpolativeBlocks: index: expected each of 0..{r + rest - 1} once in every block")
        rows, cols = l * int(left.shape[-2]), k * (r + rest)
        most = (rows, cols) if side == "columns" else (cols, rows)
        m, n = most if shape is None else (int(shape[0]), int(shape[1]))
        if not (0 <= m <= most[0] and 0 <= n <= most[1]):
            raise ValueError(f"InterpolativeBlocks: shape {(m, n)} does not fit in the blocks' own shape {most}")
        for what, order, size in (("out_order", out_order, rows), ("in_order", in_order, cols)):
            if order is not None and order.size != size:
                raise ValueError(f"InterpolativeBlocks: {what} has {order.size} entries, expected {size}")
        kind = arrays.kind(left) or "numpy"
        index = arrays.convert(index, kind, None if kind == "numpy" else arrays.device(left))
        self._set(index, coefficients, left, (m, n), out_order, in_order, side)

    def _set(
        self,
        index: Array,
        coefficients: Array,
        left: Array,
        shape: tuple[int, ...],
        out_order: AxisOrder | None,
        in_order: AxisOrder | None,
        side: str,
    ) -> None:
        self._init(
            (*left.shape[:-3], *shape[-2:]),
            arrays.promote(coefficients.dtype, left.dtype),
            arrays.kind(left),
            arrays.device(left),
            index=index,
            coefficients=coefficients,
            left=left,
            out_order=None if is_identity(out_order) else out_order,
            in_order=None if is_identity(in_order) else in_order,
            side=side,
        )

    @classmethod
    def _rebuild(cls, *values: Any) -> InterpolativeBlocks:
        made = object.__new__(cls)
        made._set(*values)
        return made

    # ---- structure ----------------------------------------------------------------------------------------------

    @property
    def rank(self) -> int:
        """Rank ``r`` of the blocks."""
        return int(self.coefficients.shape[-2])

    def _transpose(self) -> Operator:
        swapped = (self.shape[-1], self.shape[-2])
        side = SIDES[1 - SIDES.index(self.side)]
        return self._rebuild(self.index, self.coefficients, self.left, swapped, self.out_order, self.in_order, side)

    def with_values(self, coefficients: Array, left: Array) -> InterpolativeBlocks:
        """The same selection with other coefficients and left factor, of the same shapes."""
        return self._rebuild(self.index, coefficients, left, self.shape, self.out_order, self.in_order, self.side)

    def to_chain(self) -> Chain:
        """The same matrix as a chain of two plain factors."""
        t, (k, l, p), r = self.coefficients, self.index.shape, self.rank
        xp = arrays.namespace(t)
        where = {} if arrays.kind(t) == "numpy" else {"device": arrays.device(t)}
        eye = xp.broadcast_to(xp.eye(r, dtype=t.dtype, **where), (*t.shape[:-1], r))
        columns = xp.concat((eye, t), axis=-1).swapaxes(-1, -2).reshape(*t.shape[:-4], k * l * p, r)
        right = _take(columns, self._gathers[1]).reshape(*t.shape[:-4], k, l, p, r)
        right = xp.permute_dims(right, (*range(t.ndim - 4), *(t.ndim - 4 + i for i in (0, 3, 1, 2))))
        factors = (self.left[..., None, :, :, :], right.reshape(*t.shape[:-4], k, 1, r * l, p))
        m, n = self.shape[-2:]
        shape = (m, n) if self.side == "columns" else (n, m)
        chain: Any = Chain(factors, shape, self.out_order, self.in_order)
        return chain if self.side == "columns" else chain.T

    @property
    def _gathers(self) -> tuple[Array, Array]:
        """Flat indices of the operand for every block, and of every block's entries back in their order."""
        found = self._plans.get("gathers")
        if found is None:
            k, l, p = self.index.shape
            host = arrays.convert(self.index, "numpy")
            forward = (host + p * np.arange(k)[:, None, None]).reshape(-1)
            back = (np.argsort(host, axis=-1) + p * np.arange(k * l).reshape(k, l, 1)).reshape(-1)
            kind = arrays.kind(self.index) or "numpy"
            device = None if kind == "numpy" else arrays.device(self.index)
            found = self._plans["gathers"] = tuple(arrays.convert(x, kind, device) for x in (forward, back))
        return found

    def _flops(self) -> int:
        (k, l, p), r = self.index.shape, self.rank
        return 2 * k * l * r * (int(self.left.shape[-2]) + p - r)

    def _details(self) -> str:
        k, l, _ = self.index.shape
        return f"{l}x{k} blocks, rank {self.rank}, {self.side}"

    # ---- applying -----------------------------------------------------------------------------------------------

    def _matmat(self, x: Array) -> Array:
        t, left = _like(self.coefficients, x), _like(self.left, x)
        return self._forward(x, t, left) if self.side == "columns" else self._backward(x, t, left)

    def _forward(self, x: Array, t: Array, left: Array) -> Array:
        (k, l, p), r, c = self.index.shape, self.rank, x.shape[-1]
        x = reorder(pad(x, k * p), self.in_order)
        x = _take(x, self._gathers[0]).reshape(*x.shape[:-2], k, l, p, c)
        z = (x[..., :r, :] + t @ x[..., r:, :]).swapaxes(-4, -3)
        y = (left @ z.reshape(*z.shape[:-4], l, k * r, c)).swapaxes(-3, -2)
        y = y.reshape(*y.shape[:-3], l * int(left.shape[-2]), c)
        return reorder(y, self.out_order)[..., : self.shape[-2], :]

    def _backward(self, y: Array, t: Array, left: Array) -> Array:
        (k, l, p), r, s, c = self.index.shape, self.rank, int(left.shape[-2]), y.shape[-1]
        y = reorder(pad(y, l * s), self.out_order.T if self.out_order else None)
        y = y.reshape(*y.shape[:-2], s, l, c).swapaxes(-3, -2)
        z = left.swapaxes(-1, -2) @ y
        z = z.reshape(*z.shape[:-3], l, k, r, c).swapaxes(-4, -3)
        z = arrays.namespace(z).concat((z, t.swapaxes(-1, -2) @ z), axis=-2)
        z = _take(z.reshape(*z.shape[:-4], k * l * p, c), self._gathers[1])
        x = z.reshape(*z.shape[:-2], k, l, p, c).sum(-3)
        x = x.reshape(*x.shape[:-3], k * p, c)
        return reorder(x, self.in_order.T if self.in_order else None)[..., : self.shape[-2], :]

    # ---- random members -----------------------------------------------------------------------------------------

    @classmethod
    def random(
        cls,
        shape: tuple[int, int],
        *,
        blocks: int | tuple[int, int] | None = None,
        rank: int = 1,
        dtype: DType = float,
        rng: Any = None,
    ) -> InterpolativeBlocks:
        """A random member; sizes that ``blocks`` does not divide are padded.

        Parameters
        ----------
        shape
            ``(m, n)``.
        blocks
            Number of blocks, or ``(row blocks, column blocks)``; default about the square root of each size.
        rank
            At most the number of columns of a block.
        dtype, rng
            Dtype and seed or generator.

        Examples
        --------
        >>> import structmat as sm
        >>> sm.InterpolativeBlocks.random((7, 5), blocks=2, rng=0).shape
        (7, 5)
        """
        m, n = check_size(shape)
        l, k = split_counts(blocks, (m, n))
        s, p, r = ceil_div(m, l), ceil_div(n, k), int(rank)
        if not 0 <= r <= p:
            raise ValueError(f"rank: expected between 0 and {p}, the columns of a block, got {rank}")
        rng = np.random.default_rng(rng)
        index = np.argsort(rng.random((k, l, p)), axis=-1)
        coefficients = arrays.random((k, l, r, p - r), dtype, rng, max(p - r, 1) ** -0.5)
        return cls(index, coefficients, arrays.random((l, s, k * r), dtype, rng, max(k * r, 1) ** -0.5), (m, n))


def _like(array: Array, x: Array) -> Array:
    """Torch's ``@`` refuses mixed dtypes; NumPy's promotes by itself."""
    return array.to(x.dtype) if arrays.kind(array) == "torch" else array


def _take(x: Array, index: Array) -> Array:
    return np.take(x, index, axis=-2) if arrays.kind(x) == "numpy" else x[..., index, :]
