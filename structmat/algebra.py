"""The lazy results of the algebra: products, sums, multiples, inverses, stacks and submatrices of operators.

They are flat: a product of products is one product, a sum of sums one sum, scalars are hoisted out. Neighbours meet
through the rule table (``structmat/identities.py``), so that whatever can stay structured does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from structmat import arrays, rules
from structmat.arrays import Array, DType
from structmat.operator import Operator, check_inner, check_pair
from structmat.rules import ADD, INVERSE, KRON, MATMUL, SCALE

MERGE_WINDOW = 16  # a new term meets at most this many of a sum's terms, so that building long sums stays linear


class _Combination(Operator, abstract=True):
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


class Product(_Combination):
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
        return " @ ".join(_shown(self.factors, Sum))


class Sum(_Combination):
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
        return _accumulate(t._matmat(x) for t in self.terms)

    def _rows(self, x: Array) -> Array:
        return _accumulate(t._rows(x) for t in self.terms)

    def _transpose(self) -> Operator:
        return Sum(*(t.T for t in self.terms))

    def _flops(self) -> int:
        return sum(t._flops() for t in self.terms) + (len(self.terms) - 1) * self.shape[-2]

    def _expression(self) -> str:
        return " + ".join(_shown(self.terms, ()))


class Scaled(_Combination):
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
        return Scaled(self.scalar.conjugate(), self.operator.conj())

    def _cast(self, dtype: DType) -> Operator:
        target = arrays.dtype_for(dtype, "numpy") if arrays.kind(self.scalar) is None else None
        scalar = self.scalar if target is None else target.type(self.scalar).item()
        return Scaled(scalar, self.operator.astype(dtype))

    def _flops(self) -> int:
        return self.operator._flops() + self.shape[-2]

    def _expression(self) -> str:
        return f"{self.scalar:.6g} * " + _shown((self.operator,), (Sum, Product))[0]


class Inverse(_Combination):
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


class HorizontalStack(_Combination):
    """Blocks side by side, ``[A_1 A_2 ...]``; the transpose is a vertical stack. Made by :func:`hstack`."""

    __slots__ = ("blocks", "bounds")
    fields = ("blocks",)
    blocks: tuple[Operator, ...]

    def __init__(self, *blocks: Operator) -> None:
        rows = {b.shape[-2] for b in blocks}
        if len(rows) != 1:
            raise ValueError(f"hstack: numbers of rows differ in shapes {', '.join(str(b.shape) for b in blocks)}")
        bounds = _bounds(b.shape[-1] for b in blocks)
        self._init_from(blocks, (rows.pop(), bounds[-1][1]), "hstack", blocks=tuple(blocks), bounds=bounds)

    @classmethod
    def _rebuild(cls, *values: Any) -> HorizontalStack:
        return cls(*values[0])

    def _matmat(self, x: Array) -> Array:
        return _accumulate(b._matmat(x[..., i:j, :]) for b, (i, j) in zip(self.blocks, self.bounds, strict=True))

    def _transpose(self) -> Operator:
        return VerticalStack(*(b.T for b in self.blocks))

    def _flops(self) -> int:
        return sum(b._flops() for b in self.blocks) + (len(self.blocks) - 1) * self.shape[-2]

    def _expression(self) -> str:
        return f"hstack({', '.join(b._expression() for b in self.blocks)})"


class VerticalStack(_Combination):
    """Blocks on top of each other; the transpose is a horizontal stack. Made by :func:`vstack`."""

    __slots__ = ("blocks",)
    fields = ("blocks",)
    blocks: tuple[Operator, ...]

    def __init__(self, *blocks: Operator) -> None:
        cols = {b.shape[-1] for b in blocks}
        if len(cols) != 1:
            raise ValueError(f"vstack: numbers of columns differ in shapes {', '.join(str(b.shape) for b in blocks)}")
        self._init_from(blocks, (sum(b.shape[-2] for b in blocks), cols.pop()), "vstack", blocks=tuple(blocks))

    @classmethod
    def _rebuild(cls, *values: Any) -> VerticalStack:
        return cls(*values[0])

    def _matmat(self, x: Array) -> Array:
        return _concat([b._matmat(x) for b in self.blocks])

    def _transpose(self) -> Operator:
        return HorizontalStack(*(b.T for b in self.blocks))

    def _flops(self) -> int:
        return sum(b._flops() for b in self.blocks)

    def _expression(self) -> str:
        return f"vstack({', '.join(b._expression() for b in self.blocks)})"


class DirectSum(_Combination):
    """Operators along the diagonal, of any shapes; the transpose has the transposed blocks. Made by :func:`block_diag`."""

    __slots__ = ("blocks", "bounds")
    fields = ("blocks",)
    blocks: tuple[Operator, ...]

    def __init__(self, *blocks: Operator) -> None:
        bounds = _bounds(b.shape[-1] for b in blocks)
        size = (sum(b.shape[-2] for b in blocks), bounds[-1][1])
        self._init_from(blocks, size, "block_diag", blocks=tuple(blocks), bounds=bounds)

    @classmethod
    def _rebuild(cls, *values: Any) -> DirectSum:
        return cls(*values[0])

    def _matmat(self, x: Array) -> Array:
        return _concat([b._matmat(x[..., i:j, :]) for b, (i, j) in zip(self.blocks, self.bounds, strict=True)])

    def _transpose(self) -> Operator:
        return DirectSum(*(b.T for b in self.blocks))

    def _flops(self) -> int:
        return sum(b._flops() for b in self.blocks)

    def _expression(self) -> str:
        return f"block_diag({', '.join(b._expression() for b in self.blocks)})"


class Slice(_Combination):
    """Submatrix ``A[rows, :][:, cols]``; the transpose is the submatrix of the transpose. Made by ``A[rows, cols]``."""

    __slots__ = ("operator", "rows", "cols", "repeats")
    fields = ("operator", "rows", "cols")
    operator: Operator
    rows: Array
    cols: Array

    def __init__(self, operator: Operator, rows: Array, cols: Array) -> None:
        size = (rows.shape[0], cols.shape[0])
        repeats = len(set(arrays.convert(cols, "numpy").tolist())) < size[1]
        self._init_from((operator,), size, "index", operator=operator, rows=rows, cols=cols, repeats=repeats)

    def _matmat(self, x: Array) -> Array:
        xp, n = arrays.namespace(x), self.operator.shape[-1]
        full = xp.zeros((*x.shape[:-2], n, x.shape[-1]), dtype=x.dtype, device=arrays.device(x))
        if not self.repeats:
            full[..., self.cols, :] = x
        elif arrays.kind(x) == "torch":
            full = full.index_add(-2, xp.asarray(self.cols, device=arrays.device(x)), x)
        else:
            xp.add.at(full, (..., self.cols, slice(None)), x)
        return self.operator._matmat(full)[..., self.rows, :]

    def _transpose(self) -> Operator:
        return Slice(self.operator.T, self.cols, self.rows)

    def _flops(self) -> int:
        return self.operator._flops()

    def _expression(self) -> str:
        return f"{_shown((self.operator,), (Sum, Product, Scaled))[0]}[{len(self.rows)} rows, {len(self.cols)} cols]"


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
    result = done[0] if len(done) == 1 else Product(*done)
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
    return terms[0] if len(terms) == 1 else Sum(*terms)


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
    result, *others = _operators(operators, "kron")
    for other in others:
        check_pair(result, other, "kron")
        result = rules.apply(KRON, result, other)
    return result


def hstack(operators: Sequence[Any]) -> Operator:
    """Operators side by side, ``[A B ...]``; arrays are taken as dense operators.

    Raises
    ------
    ValueError
        If numbers of rows differ; the message names the shapes.

    Examples
    --------
    >>> import structmat as sm
    >>> sm.hstack([sm.Identity(2), sm.Zero((2, 3))]).shape
    (2, 5)
    """
    blocks = _operators(operators, "hstack")
    return blocks[0] if len(blocks) == 1 else HorizontalStack(*blocks)


def vstack(operators: Sequence[Any]) -> Operator:
    """Operators on top of each other; arrays are taken as dense operators.

    Raises
    ------
    ValueError
        If numbers of columns differ; the message names the shapes.

    Examples
    --------
    >>> import structmat as sm
    >>> sm.vstack([sm.Identity(2), sm.Zero((3, 2))]).shape
    (5, 2)
    """
    blocks = _operators(operators, "vstack")
    return blocks[0] if len(blocks) == 1 else VerticalStack(*blocks)


def block_diag(*operators: Any) -> Operator:
    """Operators along the diagonal, zero elsewhere; arrays are taken as dense operators.

    Dense blocks of one shape become one :class:`BlockDiagonal`.

    Examples
    --------
    >>> import structmat as sm
    >>> sm.block_diag([[1.0, 2.0]], [[3.0, 4.0]]), sm.block_diag(sm.Identity(2), [[1.0]]).shape
    (<BlockDiagonal(2x4, patterns (2,1,2,1)): 2x4 float64>, (3, 3))
    """
    blocks = _operators(operators, "block_diag")
    if len(blocks) == 1:
        return blocks[0]
    result = rules.find("block_diag", tuple(blocks))
    return DirectSum(*blocks) if result is NotImplemented else result


@rules.fallback("index")
def index(operator: Operator, key: Any) -> Any:
    """``A[key]`` with NumPy's meaning: an entry, a row or column, entries at index pairs, or a submatrix (an operator)."""
    keys = list(key) if isinstance(key, tuple) else [key]
    dots = [i for i, k in enumerate(keys) if k is Ellipsis]
    if dots:
        keys[dots[0] : dots[0] + 1] = [slice(None)] * (3 - len(keys))
    if operator.batch_shape and dots[:1] != [0]:
        raise IndexError(
            f"A[...]: shape {operator.shape} has batch dimensions; index the matrix axes with A[..., rows, cols]"
        )
    keys += [slice(None)] * (2 - len(keys))
    if len(keys) > 2:
        raise IndexError(f"A[...]: {len(keys)} indices for a matrix of shape {operator.shape}")
    rows, cols = (
        _axis_key(k, size, axis) for axis, (k, size) in enumerate(zip(keys, operator.shape[-2:], strict=True))
    )
    if isinstance(rows, slice) or isinstance(cols, slice):
        if isinstance(rows, int):
            return _column(operator.T, rows)[..., cols]
        if isinstance(cols, int):
            return _column(operator, cols)[..., rows]
        rows, cols = (
            np.arange(*k.indices(size)) if isinstance(k, slice) else k
            for k, size in zip((rows, cols), operator.shape[-2:], strict=True)
        )
        if rows.ndim != 1 or cols.ndim != 1:
            raise IndexError("A[...]: index arrays beside a slice must have one dimension")
        return submatrix(operator, rows, cols)
    if isinstance(rows, int) and isinstance(cols, int):
        return _column(operator, cols)[..., rows]
    rows, cols = np.asarray(rows), np.asarray(cols)
    if rows.ndim == 2 and cols.ndim == 2 and rows.shape[1] == 1 and cols.shape[0] == 1:  # numpy.ix_
        return submatrix(operator, rows[:, 0], cols[0])
    rows, cols = np.broadcast_arrays(rows, cols)
    wanted, place = np.unique(cols, return_inverse=True)
    columns = _columns(operator, wanted)
    return columns[..., rows, place.reshape(cols.shape)]


def submatrix(operator: Operator, rows: np.ndarray, cols: np.ndarray) -> Operator:
    """The operator ``A[rows, :][:, cols]``, structured where a rule says how."""
    m, n = operator.shape[-2:]
    if np.array_equal(rows, np.arange(m)) and np.array_equal(cols, np.arange(n)):
        return operator
    return rules.apply("slice", operator, (rows, cols))


@rules.fallback("slice")
def lazy_slice(operator: Operator, places: tuple[np.ndarray, np.ndarray]) -> Operator:
    """The lazy submatrix."""
    return Slice(operator, *places)


# ---- small helpers ------------------------------------------------------------------------------------------------------


def scaled_dtype(dtype: DType, scalar: Any) -> DType:
    """Dtype of ``scalar * array``: Python scalars are weak, as in NumPy and torch."""
    if arrays.is_torch_dtype(dtype):
        weak = isinstance(scalar, complex) or (hasattr(scalar, "dtype") and arrays.is_complex(scalar.dtype))
        return dtype.to_complex() if weak else dtype
    return np.result_type(dtype, scalar)


def _operators(values: Iterable[Any], what: str) -> list[Operator]:
    found = [v if isinstance(v, Operator) else rules.FALLBACKS["dense"](v) for v in values]
    if not found:
        raise ValueError(f"{what}: expected at least one operator, got none")
    return found


def _accumulate(results: Iterable[Array]) -> Array:
    """The sum of fresh arrays, in place where NumPy's promotion leaves the dtype and the shape."""
    total = None
    for y in results:
        if total is None:
            total = y
        elif isinstance(total, np.ndarray) and total.shape == y.shape and np.can_cast(y.dtype, total.dtype):
            total += y
        else:
            total = total + y
    return total


def _concat(parts: list[Array]) -> Array:
    xp = arrays.namespace(parts[0])
    lead = np.broadcast_shapes(*(tuple(p.shape[:-2]) for p in parts))
    if lead:
        parts = [xp.broadcast_to(p, (*lead, *p.shape[-2:])) for p in parts]
    return xp.concat(parts, axis=-2)


def _bounds(sizes: Iterable[int]) -> tuple[tuple[int, int], ...]:
    bounds, start = [], 0
    for size in sizes:
        bounds.append((start, start + size))
        start += size
    return tuple(bounds)


def _shown(parts: Sequence[Operator], wrapped: Any) -> list[str]:
    shown = parts if len(parts) <= 8 else (*parts[:3], None, *parts[-1:])
    return [
        "..." if p is None else f"({p._expression()})" if isinstance(p, wrapped) else p._expression() for p in shown
    ]


def _axis_key(key: Any, size: int, axis: int) -> Any:
    if isinstance(key, slice):
        return key
    where = f"A[...]: index {key} is out of bounds for axis {axis} of size {size}"
    if isinstance(key, (int, np.integer)) and not isinstance(key, (bool, np.bool_)):
        if not -size <= key < size:
            raise IndexError(where)
        return int(key) % size
    key = np.asarray(key)
    if key.dtype == bool:
        if key.shape != (size,):
            raise IndexError(f"A[...]: mask of shape {key.shape} for axis {axis} of size {size}")
        return np.flatnonzero(key)
    if key.size == 0:
        key = key.astype(np.intp)
    if key.dtype.kind not in "iu":
        raise IndexError(f"A[...]: expected integers, slices or masks, got dtype {key.dtype}")
    if key.size and (key.min() < -size or key.max() >= size):
        raise IndexError(where)
    return key % size if size else key


def _column(operator: Operator, j: int) -> Array:
    """Column ``j``, ``(*batch, m)``."""
    return _columns(operator, np.array([j]))[..., 0]


def _columns(operator: Operator, js: np.ndarray) -> Array:
    """Columns ``js``, ``(*batch, m, len(js))``."""
    kind = operator.kind or ("torch" if arrays.is_torch_dtype(operator.dtype) else "numpy")
    where = {} if kind == "numpy" else {"device": operator.device}
    unit = arrays.namespace_of(kind).zeros((operator.shape[-1], len(js)), dtype=operator.dtype, **where)
    unit[js, np.arange(len(js))] = 1
    return operator._matmat(unit)
