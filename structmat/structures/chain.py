"""Chain: a product of Kronecker-sparse factors with an axis order at each end.

Low-rank, block-diagonal, Monarch, Block Tensor-Train and butterfly matrices are chains: they share what is here, one way
to be applied, one transpose, one count of costs, and add only their own constructor.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from operator import index
from typing import Any, Self

import numpy as np

from structmat import arrays
from structmat.arrays import Array, DType
from structmat.backends.base import Backend, ChainLayout, Plan
from structmat.operator import Operator
from structmat.patterns import AxisOrder, Pattern, is_identity, near_square
from structmat.structures import factor
from structmat.structures.planned import Planned


class Chain(Planned):
    """Product ``out_order K_1 K_2 ... K_L in_order`` of Kronecker-sparse factors, ``K_L`` applied first.

    Factor ``K`` with blocks ``(a, d, b, c)`` is ``I_a (x) 1_{bxc} (x) I_d`` filled with ``a*d`` dense blocks of ``b x c``:
    ``y[i, j, l] = sum_k K[i, l, j, k] x[i, k, l]`` with ``x`` seen as ``(a, c, d)`` and ``y`` as ``(a, b, d)``. The adjoint
    is the reversed chain of the adjoint blocks with the two orders exchanged. Source: Le, Zheng, Riccietti, Gribonval,
    arXiv 2411.04506, section 4.

    Parameters
    ----------
    factors
        Arrays ``(*batch, a, d, b, c)``, left to right, floating or complex, of one library.
    shape
        Logical ``(m, n)``; smaller than the chain where it is padded: the operand is extended by zeros and the result
        cut. Default: the size of the chain.
    out_order, in_order
        Transpositions of the digits of the output and input index (:class:`structmat.patterns.AxisOrder`).

    Raises
    ------
    ValueError
        If neighbouring sizes differ, an order does not fit, or the logical shape exceeds the chain.
    TypeError
        If the arrays are of different libraries or devices, or hold no floating or complex numbers.

    Notes
    -----
    ``sum a*b*c*d`` stored numbers and as many multiply-adds per column. The arrays are kept as given, not copied.

    Examples
    --------
    >>> import numpy as np, structmat as sm
    >>> rng = np.random.default_rng(0)
    >>> A = sm.Chain([rng.standard_normal((1, 3, 4, 2)), rng.standard_normal((2, 1, 3, 5))])
    >>> A.shape, A.nparams
    ((12, 10), 54)
    """

    __slots__ = ("factors", "in_order", "out_order", "patterns")
    fields = ("factors", "shape", "out_order", "in_order")
    factors: tuple[Array, ...]
    patterns: tuple[Pattern, ...]
    out_order: AxisOrder | None
    in_order: AxisOrder | None

    def __init__(
        self,
        factors: Sequence[Array],  # each (*batch, a, d, b, c)
        shape: tuple[int, int] | None = None,
        out_order: AxisOrder | None = None,
        in_order: AxisOrder | None = None,
    ) -> None:
        if not factors:
            raise ValueError("Chain: expected at least one factor, got none")
        self._set_chain(
            tuple(arrays.values(f, f"{type(self).__name__} factor {i}", 4) for i, f in enumerate(factors)),
            shape,
            out_order,
            in_order,
        )

    def _set_chain(
        self,
        factors: tuple[Array, ...],
        shape: tuple[int, ...] | None,
        out_order: AxisOrder | None = None,
        in_order: AxisOrder | None = None,
    ) -> None:
        """Check and set the state that all chains share."""
        name = type(self).__name__
        kind, device = arrays.common(factors, name)
        patterns = tuple(factor.pattern_of(f) for f in factors)
        for i, (p, q) in enumerate(itertools.pairwise(patterns)):
            if p.cols != q.rows:
                raise ValueError(f"{name}: factor {i} has {p.cols} columns but factor {i + 1} has {q.rows} rows")
        rows, cols = patterns[0].rows, patterns[-1].cols
        m, n = (rows, cols) if shape is None else (int(shape[-2]), int(shape[-1]))
        if not (0 <= m <= rows and 0 <= n <= cols):
            raise ValueError(f"{name}: shape {(m, n)} does not fit in the chain's own shape {(rows, cols)}")
        for what, order, size in (("out_order", out_order, rows), ("in_order", in_order, cols)):
            if order is not None and order.size != size:
                raise ValueError(f"{name}: {what} has {order.size} entries, expected {size}")
        batch = np.broadcast_shapes(*(tuple(f.shape[:-4]) for f in factors))
        self._init(
            (*batch, m, n),
            arrays.promote(*(f.dtype for f in factors)),
            kind,
            device,
            factors=factors,
            patterns=patterns,
            out_order=None if is_identity(out_order) else out_order,
            in_order=None if is_identity(in_order) else in_order,
        )

    @classmethod
    def _rebuild(cls, *values: Any) -> Self:
        """The operator of the same family with this state of a chain (family constructors are left out)."""
        chain = object.__new__(cls)
        chain._set_chain(*values)
        return chain

    # ---- structure ----------------------------------------------------------------------------------------------

    @property
    def padded(self) -> bool:
        """Whether the logical shape is smaller than the chain's own."""
        return self.shape[-2:] != (self.patterns[0].rows, self.patterns[-1].cols)

    def _transpose(self) -> Operator:
        return self._rebuild(
            tuple(f.swapaxes(-1, -2) for f in reversed(self.factors)),
            (self.shape[-1], self.shape[-2]),
            self.in_order.T if self.in_order else None,
            self.out_order.T if self.out_order else None,
        )

    def _flops(self) -> int:
        return 2 * sum(p.nparams for p in self.patterns)

    def _details(self) -> str:
        orders = [
            f"{name} {order.radices}->{tuple(order.radices[i] for i in order.axes)}"
            for name, order in (("out", self.out_order), ("in", self.in_order))
            if order is not None
        ]
        inside = [f"inside {self.patterns[0].rows}x{self.patterns[-1].cols}"] if self.padded else []
        patterns = "patterns " + " ".join(f"({p.a},{p.b},{p.c},{p.d})" for p in self.patterns)
        return ", ".join([patterns, *inside, *orders])

    def with_factors(self, factors: tuple[Array, ...]) -> Self:
        """The same chain with other values, of the same patterns."""
        return self._rebuild(factors, self.shape[-2:], self.out_order, self.in_order)

    def to_dense(self) -> Array:
        """The dense matrix, an array ``(*batch, m, n)`` of the operator's library."""
        if self.shape[-2] >= self.shape[-1]:
            return super().to_dense()
        return arrays.contiguous(
            self.T.to_dense().swapaxes(-1, -2)
        )  # the longer side's identity may not fit into memory

    # ---- applying -----------------------------------------------------------------------------------------------

    def _plan_by(self, backend: Backend) -> Plan:
        m, n = self.shape[-2:]
        return backend.chain(ChainLayout(self.patterns, m, n, self.out_order, self.in_order), self.factors)

    # ---- random members -----------------------------------------------------------------------------------------

    @classmethod
    def random(
        cls,
        shape: tuple[int, int],
        patterns: Sequence[tuple[int, int, int, int]] | None = None,
        *,
        dtype: DType = float,
        rng: Any = None,
    ) -> Chain:
        """A random chain with independent normal entries, scaled so that ``A x`` has the variance of ``x``.

        Parameters
        ----------
        shape
            ``(m, n)``.
        patterns
            ``(a, b, c, d)`` of every factor, left to right. Default: one dense factor.
        dtype
            A floating or complex dtype of NumPy or torch.
        rng
            A seed or ``numpy.random.Generator``.

        Examples
        --------
        >>> import structmat as sm
        >>> sm.Chain.random((6, 6), [(1, 2, 2, 3), (2, 3, 3, 1)], rng=0).nparams
        30
        """
        return cls(random_factors(patterns or [(1, shape[0], shape[1], 1)], dtype, rng), shape)


def random_factors(patterns: Sequence[tuple[int, int, int, int]], dtype: DType, rng: Any) -> tuple[Array, ...]:
    """Blocks of independent normal entries of variance ``1/c``, which keeps the variance of the operand."""
    rng = np.random.default_rng(rng)
    return tuple(arrays.random((a, d, b, c), dtype, rng, max(c, 1) ** -0.5) for a, b, c, d in patterns)


def split_counts(blocks: int | tuple[int, int] | None, shape: tuple[int, int]) -> tuple[int, int]:
    """``(row blocks, column blocks)`` from the option ``blocks``; by default about the square root of each size.

    Raises ``ValueError`` for counts that are not between 1 and the size.
    """
    counts = tuple(blocks) if isinstance(blocks, (tuple, list)) else (blocks, blocks)
    if len(counts) != 2:
        raise ValueError(f"blocks: expected a number or (row blocks, column blocks), got {blocks}")
    chosen = [default_count(size) if count is None else index(count) for count, size in zip(counts, shape, strict=True)]
    for count, size in zip(chosen, shape, strict=True):
        if not 1 <= count <= max(size, 1):
            raise ValueError(f"blocks: expected between 1 and {max(size, 1)} for size {size}, got {count}")
    return chosen[0], chosen[1]


def default_count(size: int) -> int:
    """The divisor of a size nearest to its square root, or the rounded root itself where that is far from it."""
    small, large = near_square(size) if size else (1, 1)
    return small if large <= 4 * small else max(1, round(size**0.5))


def check_size(shape: tuple[int, int]) -> tuple[int, int]:
    """``shape`` as two non-negative ints; ``ValueError`` otherwise."""
    m, n = (int(size) for size in shape)
    if m < 0 or n < 0:
        raise ValueError(f"shape: expected two sizes of at least 0, got {shape}")
    return m, n


def ceil_div(size: int, count: int) -> int:
    """Smallest block size of which ``count`` cover ``size``."""
    return -(-size // count)
