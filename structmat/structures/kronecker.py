"""Kronecker: the Kronecker product of any number of factors, applied one factor at a time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from structmat import arrays
from structmat.arrays import Array, DType
from structmat.backends.base import Backend, LibraryPlan, Plan, cheapest_order
from structmat.operator import Operator, check_pair
from structmat.patterns import near_square
from structmat.structures.chain import check_size
from structmat.structures.dense import Dense
from structmat.structures.external import as_operator
from structmat.structures.planned import Planned


class Kronecker(Planned):
    """Kronecker product ``A_1 (x) A_2 (x) ...`` of arrays or operators, rectangular, any number.

    ``(A_1 (x) A_2)[(i1 i2), (k1 k2)] = A_1[i1, k1] A_2[i2, k2]`` with ``i2``, ``k2`` fast, as ``numpy.kron``. Applied with
    ``(A (x) B) vec(X) = vec(A X B^T)`` (rows of ``X`` stacked), factors in the order of least work. The adjoint is the
    Kronecker product of the adjoints. Source: Van Loan, "The ubiquitous Kronecker product", J. Comput. Appl. Math. 123,
    2000.

    Parameters
    ----------
    factors
        Arrays ``(*batch, m_i, n_i)`` or operators; nested Kronecker products are flattened.

    Raises
    ------
    TypeError
        For factors of different libraries or devices.

    Notes
    -----
    The factors' stored numbers; with ``c`` square factors of size ``m_i`` and ``n = prod m_i``, ``2 n sum m_i`` flops per
    column.

    Examples
    --------
    >>> import numpy as np, structmat as sm
    >>> A = sm.Kronecker(np.ones((2, 3)), sm.Diagonal([1.0, 2.0]))
    >>> A.shape, A.nparams
    ((4, 6), 8)
    """

    __slots__ = ("factors",)
    fields = ("factors",)
    factors: tuple[Operator, ...]

    def __init__(self, *factors: Any) -> None:
        if not factors:
            raise ValueError("Kronecker: expected at least one factor, got none")
        flat: list[Operator] = []
        for f in factors:
            f = as_operator(f)
            flat += f.factors if isinstance(f, Kronecker) else (f,)
        anchor = next((f for f in flat if f.kind), flat[0])
        for f in flat:
            check_pair(anchor, f, "kron")
        batch = np.broadcast_shapes(*(f.batch_shape for f in flat))
        shape = (*batch, math.prod(f.shape[-2] for f in flat), math.prod(f.shape[-1] for f in flat))
        self._init(shape, arrays.promote(*(f.dtype for f in flat)), anchor.kind, anchor.device, factors=tuple(flat))

    @classmethod
    def _rebuild(cls, *values: Any) -> Kronecker:
        return cls(*values[0])

    def _plan_by(self, backend: Backend) -> Plan:
        if all(type(f) is Dense for f in self.factors):
            return backend.kron(tuple(f.array for f in self.factors))  # pyright: ignore[reportAttributeAccessIssue]
        return OperatorKronPlan(self.factors)

    def _transpose(self) -> Operator:
        return Kronecker(*(f.T for f in self.factors))

    def to_dense(self) -> Array:
        """The dense matrix, an array ``(*batch, m, n)``, by outer products."""
        if any(f.kind != self.kind for f in self.factors):  # factors without arrays do not know the device
            return super().to_dense()
        result, *others = (f.astype(self.dtype).to_dense() for f in self.factors)
        for other in others:
            (m1, n1), (m2, n2) = result.shape[-2:], other.shape[-2:]
            result = result[..., :, None, :, None] * other[..., None, :, None, :]
            result = result.reshape(*result.shape[:-4], m1 * m2, n1 * n2)
        return result

    def _flops(self) -> int:
        sizes = [f.shape[-1] for f in self.factors]
        total = 0
        for i in cheapest_order([(f.shape[-2], f.shape[-1]) for f in self.factors]):
            total += math.prod(sizes[:i]) * math.prod(sizes[i + 1 :]) * self.factors[i]._flops()
            sizes[i] = self.factors[i].shape[-2]
        return total

    def _expression(self) -> str:
        return "Kronecker(" + ", ".join(f._expression() for f in self.factors) + ")"

    @classmethod
    def random(
        cls,
        shape: tuple[int, int],
        *,
        shapes: list[tuple[int, int]] | None = None,
        dtype: DType = float,
        rng: Any = None,
    ) -> Kronecker:
        """A random Kronecker product of dense factors.

        Parameters
        ----------
        shape
            ``(m, n)``.
        shapes
            Shapes of the factors, whose products are ``m`` and ``n``; default two factors with sizes nearest to the square
            roots (a prime size stays whole: no padding is possible inside a Kronecker product).
        dtype, rng
            Dtype and seed or generator.

        Raises
        ------
        ValueError
            If the products of ``shapes`` are not ``shape``.

        Examples
        --------
        >>> import structmat as sm
        >>> [f.shape for f in sm.Kronecker.random((12, 6), rng=0).factors]
        [(3, 2), (4, 3)]
        """
        m, n = check_size(shape)
        shapes = kronecker_shapes((m, n)) if shapes is None else shapes
        product = (math.prod(s[0] for s in shapes), math.prod(s[1] for s in shapes))
        if product != (m, n):
            raise ValueError(f"shapes: {shapes} multiply to {product}, expected {(m, n)}")
        rng = np.random.default_rng(rng)
        return cls(*(Dense.random(s, dtype=dtype, rng=rng) for s in shapes))


def kronecker_shapes(shape: tuple[int, int]) -> list[tuple[int, int]]:
    """Two factor shapes for a matrix of ``shape``: the divisors nearest to the square roots, the smaller ones first."""
    (m1, m2), (n1, n2) = (near_square(size) if size else (1, 0) for size in shape)
    return [(m1, n1), (m2, n2)]


class OperatorKronPlan(LibraryPlan):
    """A Kronecker product whose factors are operators: each is applied to the stack of its slices."""

    def __init__(self, factors: tuple[Operator, ...]) -> None:
        self.factors = factors
        self.order = cheapest_order([(f.shape[-2], f.shape[-1]) for f in factors])

    def columns(self, x: Array, out: Array | None = None) -> Array:
        """``A x`` for ``x`` of shape ``(..., n, k)``."""
        k = x.shape[-1]
        sizes = [f.shape[-1] for f in self.factors]
        z = x
        for i in self.order:
            f = self.factors[i]
            before, after = math.prod(sizes[:i]), math.prod(sizes[i + 1 :])
            lead = tuple(z.shape[:-2])
            z = z.reshape(*lead, before, sizes[i], after * k)
            sizes[i] = f.shape[-2]
            if f.batch_shape and before > 1:  # the operator's batch goes with the leading axes, not with `before`
                z = z.swapaxes(-3, -2).reshape(*lead, f.shape[-1], before * after * k)
                z = f._matmat(z)
                lead = tuple(z.shape[:-2])
                z = z.reshape(*lead, sizes[i], before, after * k).swapaxes(-3, -2)
            elif f.batch_shape:
                z = f._matmat(z.reshape(*lead, f.shape[-1], after * k))
                lead = tuple(z.shape[:-2])
            else:
                z = f._matmat(z)
            z = z.reshape(*lead, before * sizes[i] * after, k)
        return arrays.copy_into(z, out)
