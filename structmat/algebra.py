"""The lazy results of the algebra: products, sums, multiples and inverses of operators.

They are flat: a product of products is one product, a sum of sums one sum, scalars are hoisted out. Neighbours meet
through the rule table (``structmat/identities.py``), so that whatever can stay structured does.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from structmat import arrays, rules
from structmat.arrays import Array, DType
from structmat.operator import Operator, check_inner, check_pair
from structmat.rules import ADD, INVERSE, KRON, MATMUL, SCALE

MERGE_WINDOW = 16  # a new term meets at most this many of a sum's terms, so that long sums are built quickly


class Combination(Operator, abstract=True):
    """Shape, dtype, library and device of a result made of several operators."""

    __slots__ = ()

    def _init_from(self, parts: Sequence[Operator], size: tuple[int, int], what: str, **values: Any) -> None:
        anchor = next((p for p in parts if p.kind), parts[0])
        for p in parts:
            if p.kind:
                check_pair(anchor, p, what)
        batch = np.broadcast_shapes(*{p.batch_shape for p in parts})
        dtype = arrays.promote(*{p.dtype for p in parts})
        self._init((*batch, *size), dtype, anchor.kind, anchor.device, **values)

    @classmethod
    def _grown(cls, parts: tuple[Operator, ...], left: Operator, right: Operator, size: tuple[int, int]) -> Any:
        """The combination of flat parts that are those of two checked operands: nothing is derived again."""
        result = object.__new__(cls)
        result._init_from((left, right), size, cls.__name__, **{cls.fields[0]: parts})
        return result


class Product(Combination):
    """Lazy product ``A_1 @ A_2 @ ...``, flat, applied from the right; adjoint: the reversed adjoints.

    Examples
    --------
    >>> import structmat as sm
    >>> A = sm.Monarch.random((4, 4), rng=0) @ sm.Dense.random((4, 3), rng=0)
    >>> type(A).__name__, A.T.shape
    ('Product', (3, 4))
    """

    __slots__ = ("factors",)
    fields = ("factors",)
    factors: tuple[Operator, ...]

    def __init__(self, *factors: Operator) -> None:
        flat: list[Operator] = []
        for f in factors:
            flat += f.factors if isinstance(f, Product) else (f,)
        for left, right in pairwise(flat):
            if left.shape[-1] != right.shape[-2]:
                check_inner(left, right)
        self._init_from(flat, (flat[0].shape[-2], flat[-1].shape[-1]), "matmul", factors=tuple(flat))

    @classmethod
    def _rebuild(cls, *values: Any) -> Product:
        return cls(*values[0])

    def _matmat(self, x: Array) -> Array:
        for f in reversed(self.factors):
            x = f._matmat(x)
        return x

    def _rows(self, x: Array) -> Array:
        for f in reversed(self.factors):
            x = f._rows(x)
        return x

    def _transpose(self) -> Operator:
        return Product(*(f.T for f in reversed(self.factors)))

    def _flops(self) -> int:
        return sum(f._flops() for f in self.factors)

    def _expression(self) -> str:
        return " @ ".join(shown(self.factors, Sum))


class Sum(Combination):
    """Lazy sum ``A_1 + A_2 + ...``, flat; adjoint: the sum of the adjoints.

    Examples
    --------
    >>> import structmat as sm
    >>> A = sm.LowRank.random((4, 4), rank=1, rng=0) + sm.Identity(4)
    >>> type(A).__name__, A.nparams
    ('Sum', 8)
    """

    __slots__ = ("terms",)
    fields = ("terms",)
    terms: tuple[Operator, ...]

    def __init__(self, *terms: Operator) -> None:
        flat: list[Operator] = []
        for t in terms:
            flat += t.terms if isinstance(t, Sum) else (t,)
        m, n = flat[0].shape[-2:]
        for t in flat:
            if t.shape[-2:] != (m, n):
                raise ValueError(f"add: {flat[0].shape} + {t.shape}: shapes differ")
        self._init_from(flat, (m, n), "add", terms=tuple(flat))

    @classmethod
    def _rebuild(cls, *values: Any) -> Sum:
        return cls(*values[0])

    def _matmat(self, x: Array) -> Array:
        return self._accumulated(x, rows=False)

    def _rows(self, x: Array) -> Array:
        return self._accumulated(x, rows=True)

    def _accumulated(self, x: Array, rows: bool) -> Array:
        """The sum of the terms' results, each added by its own kernel where it has one that can."""
        first, *others = self.terms
        total = first._rows(x) if rows else first._matmat(x)
        for t in others:
            if not t._add(x, total, rows):
                total = plus(total, t._rows(x) if rows else t._matmat(x))
        return total

    def _transpose(self) -> Operator:
        return Sum(*(t.T for t in self.terms))

    def _flops(self) -> int:
        return sum(t._flops() for t in self.terms) + (len(self.terms) - 1) * self.shape[-2]

    def _expression(self) -> str:
        return " + ".join(shown(self.terms, ()))


class Scaled(Combination):
    """Lazy multiple ``c * A``; adjoint ``conj(c) * A^H``.

    Examples
    --------
    >>> import structmat as sm
    >>> (2.0 * sm.Identity(3) @ [1.0, 1.0, 1.0]).tolist()
    [2.0, 2.0, 2.0]
    """

    __slots__ = ("scalar", "operator")
    fields = ("scalar", "operator")
    scalar: Any
    operator: Operator

    def __init__(self, scalar: Any, operator: Operator) -> None:
        dtype = scaled_dtype(operator.dtype, scalar)
        self._init(operator.shape, dtype, operator.kind, operator.device, scalar=scalar, operator=operator)

    def _matmat(self, x: Array) -> Array:
        return self._times(self.operator._matmat(x))

    def _rows(self, x: Array) -> Array:
        return self._times(self.operator._rows(x))

    def _times(self, y: Array) -> Array:
        return self.scalar * arrays.cast(y, arrays.dtype_for(arrays.promote(self.dtype, y.dtype), arrays.kind(y)))

    def _transpose(self) -> Operator:
        return Scaled(self.scalar, self.operator.T)

    def _conj(self) -> Operator:
        c = self.scalar
        return Scaled(c.conj() if hasattr(c, "conj") else c.conjugate(), self.operator.conj())

    def _cast(self, dtype: DType) -> Operator:
        target = arrays.dtype_for(dtype, "numpy") if arrays.kind(self.scalar) is None else None
        scalar = self.scalar if target is None else target.type(self.scalar).item()
        return Scaled(scalar, self.operator.astype(dtype))

    def _flops(self) -> int:
        return self.operator._flops() + self.shape[-2]

    def _expression(self) -> str:
        return f"{self.scalar:.6g} * " + shown((self.operator,), (Sum, Product))[0]


class Inverse(Combination):
    """Lazy inverse, applied by GMRES to the precision of the dtype; adjoint: the inverse of the adjoint.

    It stands where no exact identity gives the inverse as a structured operator. Source of the method: Saad and Schultz,
    SIAM J. Sci. Stat. Comput. 7(3), 1986, as implemented by ``scipy.sparse.linalg.gmres``.

    Raises
    ------
    numpy.linalg.LinAlgError
        When applied, if GMRES does not reach the tolerance (singular or very ill-conditioned operators).
    NotImplementedError
        When applied to arrays other than NumPy's.

    Examples
    --------
    >>> import numpy as np, structmat as sm
    >>> A = sm.Monarch.random((4, 4), rank=2, rng=0) + sm.Monarch.random((4, 4), blocks=1, rng=1)
    >>> bool(np.allclose(A.inv() @ (A @ np.ones(4)), 1))
    True
    """

    __slots__ = ("operator",)
    fields = ("operator",)
    operator: Operator

    def __init__(self, operator: Operator) -> None:
        if not operator.is_square:
            raise np.linalg.LinAlgError(f"inv: expected a square operator, got shape {operator.shape}")
        self._init_from((operator,), operator.shape[-2:], "inv", operator=operator)  # pyright: ignore[reportArgumentType]

    def _matmat(self, x: Array) -> Array:
        if arrays.kind(x) != "numpy" or self.batch_shape:
            raise NotImplementedError(
                f"the inverse of {self.operator} has no closed form and is applied by SciPy to single NumPy operators; "
                "use the inverse of A.to_dense() instead"
            )
        from scipy.sparse.linalg import gmres

        n, dtype = self.shape[-1], np.result_type(self.dtype, x.dtype)
        operator = self.operator.to_scipy()
        columns = np.moveaxis(x, -2, -1).reshape(-1, n)
        solutions = np.empty(columns.shape, dtype)
        tolerance = 50 * float(np.finfo(dtype).eps)
        for i, b in enumerate(columns):
            y, info = gmres(operator, b.astype(dtype), rtol=tolerance, atol=0.0, restart=min(n, 200), maxiter=50)
            solutions[i] = y
            residual = float(np.linalg.norm(self.operator @ y - b))
            if info and not residual <= 1e3 * tolerance * float(np.linalg.norm(b)):
                raise np.linalg.LinAlgError(
                    f"inv: GMRES reached a residual of {residual:.1e} for a right-hand side of norm "
                    f"{np.linalg.norm(b):.1e}; the operator {self.operator} is singular or very ill-conditioned"
                )
        lead = (*x.shape[:-2], x.shape[-1])
        return np.moveaxis(solutions.reshape(*lead, n), -1, -2)

    def _transpose(self) -> Operator:
        return self.operator.T.inv()

    def _expression(self) -> str:
        return f"inv({self.operator._expression()})"


# ---- how operators meet -----------------------------------------------------------------------------------------------


@rules.fallback(MATMUL)
def multiply(left: Operator, right: Operator) -> Operator:
    """The product in lowest terms: flat, scalars in front, neighbours merged wherever a rule applies."""
    if not isinstance(left, Product) and not isinstance(right, Product):
        return Product(left, right)  # the table has just been asked for this pair
    done: list[Operator] = list(left.factors) if isinstance(left, Product) else [left]
    todo: deque[Operator] = deque(right.factors if isinstance(right, Product) else (right,))
    scalar: Any = None
    while todo:
        factor = todo.popleft()
        if isinstance(factor, Scaled):
            scalar = factor.scalar if scalar is None else scalar * factor.scalar
            factor = factor.operator
        merged = rules.find(MATMUL, done[-1], factor) if done else NotImplemented
        if merged is NotImplemented:
            done.append(factor)
        else:  # the result may now meet its own left neighbour
            done.pop()
            todo.extendleft(reversed(merged.factors) if isinstance(merged, Product) else (merged,))
    if len(done) == 1:
        result = done[0]
    elif scalar is None:
        result = Product._grown(tuple(done), left, right, (left.shape[-2], right.shape[-1]))
    else:
        result = Product(*done)
    return result if scalar is None else result * scalar


@rules.fallback(ADD)
def add(left: Operator, right: Operator) -> Operator:
    """The sum in lowest terms: flat, a new term merged into the first term that a rule lets it join."""
    terms = list(left.terms) if isinstance(left, Sum) else [left]
    asked = not isinstance(left, Sum) and not isinstance(right, Sum)
    window = range(max(0, len(terms) - MERGE_WINDOW), len(terms))  # terms of one sum have met each other already
    for term in right.terms if isinstance(right, Sum) else (right,):
        for i in window:
            merged = NotImplemented if asked else rules.find(ADD, terms[i], term)
            if merged is not NotImplemented:
                terms[i] = merged
                break
        else:
            terms.append(term)
    return terms[0] if len(terms) == 1 else Sum._grown(tuple(terms), left, right, (left.shape[-2], left.shape[-1]))


@rules.fallback(SCALE)
def scale(operator: Operator, scalar: Any) -> Operator:
    """The lazy multiple."""
    return Scaled(scalar, operator)


@rules.fallback(INVERSE)
def inverse(operator: Operator) -> Operator:
    """The lazy inverse."""
    return Inverse(operator)


@rules.fallback("power")
def power(operator: Operator, exponent: int) -> Operator:
    """``A**k`` by repeated squaring; negative exponents are powers of the inverse."""
    if exponent < 0:
        return power(operator.inv(), -exponent)
    if exponent == 0:
        return rules.FALLBACKS["identity"](operator)
    result = None
    while exponent:
        if exponent & 1:
            result = operator if result is None else result @ operator
        exponent >>= 1
        operator = operator @ operator if exponent else operator
    return result if result is not None else operator


def kron(*operators: Any) -> Operator:
    """Kronecker product of operators or arrays, in lowest terms.

    Parameters
    ----------
    operators
        Two or more operators, or arrays ``(m, n)``.

    Raises
    ------
    TypeError
        For operators of different libraries or devices, or objects that are neither operators nor arrays.

    Examples
    --------
    >>> import structmat as sm
    >>> sm.kron(sm.Identity(2), sm.Identity(3)).shape
    (6, 6)
    """
    result, *others = operators_of(operators, "kron")
    for other in others:
        check_pair(result, other, "kron")
        result = rules.apply(KRON, result, other)
    return result


# ---- small helpers ------------------------------------------------------------------------------------------------------


def scaled_dtype(dtype: DType, scalar: Any) -> DType:
    """Dtype of ``scalar * array``: Python scalars are weak, as in NumPy and torch."""
    if arrays.is_torch_dtype(dtype):
        weak = isinstance(scalar, complex) or (hasattr(scalar, "dtype") and arrays.is_complex(scalar.dtype))
        return dtype.to_complex() if weak else dtype
    return np.result_type(dtype, scalar)


def operators_of(values: Iterable[Any], what: str) -> list[Operator]:
    """Operators as they are, arrays and SciPy objects as operators; ``ValueError`` if there are none."""
    found = [v if isinstance(v, Operator) else rules.FALLBACKS["as_operator"](v) for v in values]
    if not found:
        raise ValueError(f"{what}: expected at least one operator, got none")
    return found


def accumulate(results: Iterable[Array]) -> Array:
    """The sum of fresh arrays."""
    return functools.reduce(plus, results)


def plus(total: Array, y: Array) -> Array:
    """The sum of two fresh arrays, in place where NumPy's promotion leaves the dtype and the shape."""
    if isinstance(total, np.ndarray) and total.shape == y.shape and np.can_cast(y.dtype, total.dtype):
        total += y
        return total
    return total + y


def shown(parts: Sequence[Operator], wrapped: Any) -> list[str]:
    """Expressions of the parts, those of the types ``wrapped`` in brackets; many parts are shortened."""
    few = parts if len(parts) <= 8 else (*parts[:3], None, *parts[-1:])
    return ["..." if p is None else f"({p._expression()})" if isinstance(p, wrapped) else p._expression() for p in few]
