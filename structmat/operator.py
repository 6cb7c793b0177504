"""The base of all operators: shapes checked once at the public door, everything derivable derived.

A subclass is plain data plus two methods (``docs/your-own-operator.md`` walks through one)::

    fields = ("values",)      # names of the constructor's arguments: arrays, operators, tuples of them, ints
    _matmat(x)                # A x for x of shape (..., n, k), unchecked; returns (..., m, k)
    _transpose()              # the structured transpose

Optional, where the structure knows better than the default: ``_rows``, ``_columns_into``, ``_conj``, ``_flops``,
``_details``.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np

from structmat import arrays, rules
from structmat.arrays import Array, DType

_set = object.__setattr__


class Operator:
    """A matrix known by what it does: shape ``(*batch, m, n)``, applied with ``@``, combined by one algebra.

    Operators are immutable. ``A @ x`` takes ``x`` of shape ``(n,)``, ``(n, k)`` or ``(..., n, k)``; ``X @ A.T`` is the
    row form for ``X`` of shape ``(..., n)``. Results are arrays of the caller's library, device and promoted dtype.
    ``A @ B``, ``A + B``, ``c * A``, ``A.inv()`` and ``structmat.kron(A, B)`` stay structured where an exact identity
    allows it (``structmat/identities.py``) and are lazy otherwise.

    Examples
    --------
    >>> import numpy as np, structmat as sm
    >>> A = sm.Monarch.random((6, 4), blocks=2, rng=0)
    >>> bool(np.allclose(A @ np.ones(4), A.to_dense().sum(axis=1)))
    True
    """

    __slots__ = ("shape", "dtype", "kind", "device", "_plans", "_transposed", "_adjoint", "__weakref__")
    __array_ufunc__ = None  # ndarray @ A and ndarray * A come to our reflected methods

    fields: ClassVar[tuple[str, ...]] = ()
    shape: tuple[int, ...]
    dtype: DType
    kind: str | None
    device: Any

    def __init_subclass__(cls, *, abstract: bool = False) -> None:
        super().__init_subclass__()
        for name in () if abstract else ("_matmat", "_transpose"):
            if getattr(cls, name) is getattr(Operator, name):
                raise TypeError(f"{cls.__name__} must define {name}: see the docstring of structmat.operator")

    # ---- construction -------------------------------------------------------------------------------------------

    def _init(self, shape: tuple[int, ...], dtype: DType, kind: str | None, device: Any, **values: Any) -> None:
        """Set shape, dtype, library and the fields; to be called once, by the constructor."""
        _set(self, "shape", shape)
        _set(self, "dtype", dtype)
        _set(self, "kind", kind)
        _set(self, "device", device)
        _set(self, "_plans", {})
        _set(self, "_transposed", None)
        _set(self, "_adjoint", None)
        for name, value in values.items():
            _set(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{type(self).__name__} is immutable: cannot set {name}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{type(self).__name__} is immutable: cannot delete {name}")

    @classmethod
    def _rebuild(cls, *values: Any) -> Operator:
        """The operator with these field values."""
        return cls(*values)

    def _values(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in self.fields)

    def _map(self, array: Callable[[Array], Array], part: Callable[[Operator], Operator] | None = None) -> Operator:
        """The same operator with ``array(x)`` for every stored array and ``part(A)`` for every operator it is made of."""
        part = part or (lambda operator: operator._map(array))
        return self._rebuild(*(_map_value(v, array, part) for v in self._values()))

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (type(self), self._values())

    def __copy__(self) -> Operator:
        return self

    # ---- what it is made of -------------------------------------------------------------------------------------

    @property
    def arrays(self) -> tuple[Array, ...]:
        """The stored arrays, depth first; an array that occurs twice is listed once."""
        seen: dict[int, Array] = {}
        for x in _leaves(self._values()):
            seen.setdefault(id(x), x)
        return tuple(seen.values())

    @property
    def nparams(self) -> int:
        """Number of stored values (indices are not counted)."""
        return sum(_size(x) for x in self.arrays if arrays.is_inexact(x.dtype))

    @property
    def nbytes(self) -> int:
        """Bytes of the stored arrays, indices included."""
        return sum(_size(x) * arrays.itemsize(x.dtype) for x in self.arrays)

    def flops(self, k: int = 1) -> int:
        """Floating-point operations of ``A @ x`` for ``k`` columns; a multiply-add counts as 2."""
        return k * self._flops()

    def _flops(self) -> int:
        return 2 * self.nparams

    @property
    def ndim(self) -> int:
        """Number of dimensions: 2 plus the batch dimensions."""
        return len(self.shape)

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Leading dimensions of a stack of operators; ``()`` for one matrix."""
        return self.shape[:-2]

    @property
    def is_square(self) -> bool:
        """Whether the operator has as many rows as columns."""
        return self.shape[-2] == self.shape[-1]

    def __repr__(self) -> str:
        return f"<{self._expression()}: {'x'.join(map(str, self.shape))} {_dtype_name(self.dtype)}>"

    def _expression(self) -> str:
        details = self._details()
        size = "x".join(map(str, self.shape))
        return f"{type(self).__name__}({size}{', ' + details if details else ''})"

    def _details(self) -> str:
        return ""

    # ---- transposes and conversions -----------------------------------------------------------------------------

    @property
    def T(self) -> Operator:
        """The transpose, structured, without conjugation. ``A.T.T is A``."""
        result = _recall(self._transposed)
        if result is None:
            result = self._transpose()
            if result is not self:
                if _recall(result._transposed) is None:  # weak, or the pair would keep itself alive
                    _set(result, "_transposed", weakref.ref(self))
                if self.kind != "torch":  # a torch view remembers whether gradients were on: make it anew each time
                    _set(self, "_transposed", result)
        return result

    @property
    def H(self) -> Operator:
        """The adjoint (conjugate transpose), structured. ``A.H.H is A``."""
        if not arrays.is_complex(self.dtype):
            return self.T
        result = _recall(self._adjoint)
        if result is None:
            result = self.T.conj()
            if result is not self:
                _set(result, "_adjoint", self)
                if self.kind != "torch":
                    _set(self, "_adjoint", weakref.ref(result))  # its conjugated arrays live as long as they are used
        return result

    def conj(self) -> Operator:
        """The entrywise complex conjugate; the operator itself if it is real."""
        return self._conj() if arrays.is_complex(self.dtype) else self

    def _conj(self) -> Operator:
        return self._map(_conj_values, Operator.conj)

    def inv(self) -> Operator:
        """The inverse: structured where an identity allows it, lazy otherwise; ``LinAlgError`` if not square."""
        if not self.is_square:
            raise np.linalg.LinAlgError(f"inv: expected a square operator, got shape {self.shape}")
        return rules.apply(rules.INVERSE, self)

    def compress(self, *, tol: float | None = None, rank: int | None = None, budget: float | None = None) -> Any:
        """The nearest operator of the same family with a smaller (block) rank, with a certificate, without a dense matrix.

        Exactly one of ``tol`` (relative Frobenius error), ``rank`` and ``budget`` (parameters, a fraction of dense or a
        count). Returns a :class:`structmat.Projection`. For chains whose links have a rank (LowRank, Monarch,
        BlockTensorTrain, Chain), Interpolative, multiples and sums of those of one layout, sums of Kronecker products of two
        dense factors (fewer terms: ``rank`` is their number), and Kronecker products with two-factor chains; raises
        ``NotImplementedError`` for others and ``ValueError`` for options that do not fit.
        """
        return rules.FALLBACKS["compress"](self, tol, rank, budget)

    def plan(self, batch: int = 1, rows: bool = False) -> Any:
        """Which kernel applies the operator to ``batch`` columns (``rows``: to rows, ``X @ A.T``), and what it was chosen from.

        Returns a decision that prints as a table of kernels and predicted times in microseconds; a composite has one for each
        of its parts. :func:`structmat.tune` measures instead. Raises ``TypeError`` for a batch that is no integer and
        ``ValueError`` for one below 1.

        Examples
        --------
        >>> import structmat as sm
        >>> with sm.use_backend("numpy"):
        ...     print(sm.Monarch.random((64, 64), rng=0).plan(batch=16).kernel)
        library
        """
        return rules.FALLBACKS["plan"](self, batch, rows)

    def _explain(self, k: int, rows: bool) -> Any:  # noqa: ARG002
        """The explanation of the operator's plan; ``None`` where it has none of its own."""
        return None

    def astype(self, dtype: DType) -> Operator:
        """The operator with its values cast; itself where the dtype is already right.

        Raises ``TypeError`` for a dtype that cannot hold values (integers) or would drop an imaginary part.
        """
        dtype = arrays.dtype_for(arrays.as_dtype(dtype), self.kind) if self.kind else arrays.as_dtype(dtype)
        if not arrays.is_inexact(dtype):
            raise TypeError(f"astype: expected a floating or complex dtype, got {dtype}")
        if arrays.is_complex(self.dtype) and not arrays.is_complex(dtype):
            raise TypeError(f"astype: {self.dtype} to {dtype} would drop the imaginary part")
        return self if dtype == self.dtype else self._cast(dtype)

    def _cast(self, dtype: DType) -> Operator:
        return self._map(
            lambda x: arrays.cast(x, dtype) if arrays.is_inexact(x.dtype) else x,
            lambda operator: operator.astype(dtype),
        )

    def to(self, target: Any) -> Operator:
        """The operator in another library or on another device: ``"numpy"``, ``"torch"``, ``"cupy"``, ``torch.device``."""
        library, device = (target, None) if target in ("numpy", "torch", "cupy") else ("torch", target)
        return self._moved(library, device)

    def _moved(self, library: str, device: Any) -> Operator:
        return self._map(lambda x: arrays.convert(x, library, device), lambda part: part._moved(library, device))

    def to_dense(self) -> Array:
        """The dense matrix, an array ``(*batch, m, n)`` of the operator's library."""
        xp = arrays.namespace_of(self.kind or ("torch" if arrays.is_torch_dtype(self.dtype) else None))
        where = {} if self.kind in (None, "numpy") else {"device": self.device}
        eye = xp.eye(self.shape[-1], dtype=self.dtype, **where)
        return self._once(xp.broadcast_to(eye, (*self.batch_shape, *eye.shape)) if self.batch_shape else eye)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("asarray(A, copy=False): an operator has no dense matrix to share; use A.to_dense()")
        dense = arrays.convert(self.to_dense(), "numpy")
        return dense.astype(dense.dtype if dtype is None else dtype, copy=bool(copy))

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        name = getattr(function, "__name__", str(function))
        home = getattr(function, "__module__", "numpy")
        raise TypeError(
            f"{home}.{name} does not take operators: use structmat.{name} or structmat.linalg.{name} where it exists, "
            f"or {home}.{name}(A.to_dense())"
        )

    def to_scipy(self) -> Any:
        """The operator as ``scipy.sparse.linalg.LinearOperator`` with ``matmat`` and ``rmatmat`` passed on.

        Raises ``TypeError`` for operators that do not hold NumPy arrays and ``ValueError`` for batched ones.
        """
        from scipy.sparse.linalg import LinearOperator

        if self.kind not in (None, "numpy"):
            raise TypeError(
                f"to_scipy: SciPy needs NumPy arrays, the operator holds {self.kind}; use A.to('numpy') first"
            )
        if self.batch_shape:
            raise ValueError(f"to_scipy: SciPy's operators are single matrices, got batched shape {self.shape}")
        products = {"matvec": self.matvec, "rmatvec": self.rmatvec, "matmat": self.matmat, "rmatmat": self.rmatmat}
        return LinearOperator(shape=self.shape, dtype=self.dtype, **products)

    # ---- applying -----------------------------------------------------------------------------------------------

    def __matmul__(self, x: Any) -> Any:
        if type(x) is np.ndarray and x.dtype == self.dtype and x.shape == self.shape[-1:] and self.kind == "numpy":
            return self._vector(x)  # the common case, which dot would reach a microsecond later
        if isinstance(x, Operator):
            check_inner(self, x)
            return rules.apply(rules.MATMUL, self, x)
        return self.dot(x)

    def dot(self, x: Array, out: Array | None = None) -> Array:
        """``A x`` for ``x`` of shape ``(n,)`` or ``(..., n, k)``, as ``A @ x``; ``out`` takes the result."""
        x = arrays.operand(x, self, "matmul")
        if x.ndim == 1:
            if x.shape[0] != self.shape[-1]:
                raise _mismatch(self.shape, x.shape, self.shape[-1], x.shape[0])
            y = self._vector(x)
            return y if out is None else arrays.copy_into(y, out)
        return self._checked_matmat(x, out)

    def matmat(self, x: Array, out: Array | None = None) -> Array:
        """``A x`` for ``x`` of shape ``(..., n, k)``; returns ``(..., m, k)``, written to ``out`` if given."""
        if not (type(x) is np.ndarray and x.dtype == self.dtype and self.kind == "numpy"):
            x = arrays.operand(x, self, "matmat")
        return self._checked_matmat(x, out)

    def matvec(self, x: Array, out: Array | None = None) -> Array:
        """``A x`` for one vector ``(n,)`` or a stack of vectors ``(..., n)``; a column ``(n, 1)`` stays a column."""
        x = arrays.operand(x, self, "matvec")
        n = self.shape[-1]
        if x.ndim == 2 and tuple(x.shape) == (n, 1):
            y = self._matmat(x)
        elif x.ndim >= 1 and x.shape[-1] == n:
            if self.batch_shape and x.ndim > 1:
                _check_batches(self.shape, tuple(x.shape), core=1)
            y = self._vector(x) if x.ndim == 1 else self._vectors(x)
        else:
            raise ValueError(f"matvec: {self.shape} applied to {tuple(x.shape)}: expected shape (..., {n})")
        return arrays.copy_into(y, out)

    def rmatvec(self, x: Array) -> Array:
        """``A^H x`` for one vector ``(m,)`` or a stack of vectors ``(..., m)``."""
        return _conj(self.T.matvec(_conj(arrays.operand(x, self, "rmatvec")))) if _complex(self) else self.T.matvec(x)

    def rmatmat(self, x: Array) -> Array:
        """``A^H x`` for ``x`` of shape ``(..., m, k)``."""
        return _conj(self.T.matmat(_conj(arrays.operand(x, self, "rmatmat")))) if _complex(self) else self.T.matmat(x)

    def rdot(self, x: Array) -> Array:
        """``x A`` for ``x`` of shape ``(m,)`` or ``(..., k, m)``, as ``x @ A``: no conjugation."""
        if not (type(x) is np.ndarray and x.dtype == self.dtype and self.kind == "numpy"):
            x = arrays.operand(x, self, "matmul")
        m = self.shape[-2]
        if x.ndim == 0 or x.shape[-1] != m:
            raise _mismatch(x.shape, self.shape, x.shape[-1] if x.ndim else 0, m)
        if self.batch_shape and x.ndim > 2:
            _check_batches(tuple(x.shape), self.shape)
        transposed = self.T
        return transposed._vector(x) if x.ndim == 1 else transposed._rows(x)

    __rmatmul__ = rdot

    def _checked_matmat(self, x: Array, out: Array | None) -> Array:
        shape = self.shape
        if x.ndim < 2:
            raise ValueError(
                f"matmul: {shape} @ {tuple(x.shape)}: expected an operand of at least one dimension, "
                "and of at least two for matmat"
            )
        if x.shape[-2] != shape[-1]:
            raise _mismatch(shape, x.shape, shape[-1], x.shape[-2])
        if len(shape) > 2 and x.ndim > 2:
            _check_batches(shape, tuple(x.shape))
        return self._matmat(x) if out is None else self._columns_into(x, out)

    def _matmat(self, x: Array) -> Array:  # noqa: ARG002  (..., n, k) -> (..., m, k)
        raise TypeError(f"{type(self).__name__} must define _matmat")

    def _transpose(self) -> Operator:
        raise TypeError(f"{type(self).__name__} must define _transpose")

    def _rows(self, x: Array) -> Array:
        """``x A^T`` for rows ``x`` of shape ``(..., k, n)``; returns ``(..., k, m)``."""
        return self._matmat(x.swapaxes(-1, -2)).swapaxes(-1, -2)

    def _vector(self, x: Array) -> Array:
        """``A x`` for one vector of shape ``(n,)``; returns ``(..., m)``."""
        return self._matmat(x[:, None])[..., 0]

    def _once(self, x: Array) -> Array:
        """``A x`` for an operand that comes once; returns ``(..., m, k)``."""
        return self._matmat(x)

    def _vectors(self, x: Array) -> Array:
        """``A x`` for a stack of vectors ``(..., n)`` that broadcasts with the operator's batch."""
        return self._matmat(x[..., None])[..., 0] if self.batch_shape else self._rows(x)

    def _columns_into(self, x: Array, out: Array) -> Array:
        return arrays.copy_into(self._matmat(x), out)

    def _add(self, x: Array, y: Array, rows: bool) -> bool:  # noqa: ARG002
        """``y += A x`` (or ``x A^T``) in the same pass over ``y``; ``False``, and nothing done, where no kernel does it."""
        return False

    # ---- algebra ------------------------------------------------------------------------------------------------

    def __add__(self, other: Any) -> Operator:
        require_operator(other, "+", self)
        if self.shape[-2:] != other.shape[-2:]:
            raise ValueError(f"add: {self.shape} + {other.shape}: shapes differ")
        check_pair(self, other, "add")
        return rules.apply(rules.ADD, self, other)

    def __radd__(self, other: Any) -> Operator:
        require_operator(other, "+", self)
        return NotImplemented

    def __sub__(self, other: Any) -> Operator:
        require_operator(other, "-", self)
        if self.shape[-2:] != other.shape[-2:]:
            raise ValueError(f"subtract: {self.shape} - {other.shape}: shapes differ")
        return self + (-other)

    __rsub__ = __radd__

    def __mul__(self, scalar: Any) -> Operator:
        if isinstance(scalar, Operator):
            raise TypeError(f"*: multiplies an operator by a scalar; for the product of {self} and {scalar} use @")
        if not _is_scalar(scalar):
            raise TypeError(f"*: expected a scalar, got {type(scalar).__name__}; for a product use @")
        return rules.apply(rules.SCALE, self, _scalar_for(self, scalar))

    __rmul__ = __mul__

    def __truediv__(self, scalar: Any) -> Operator:
        if not _is_scalar(scalar):
            raise TypeError(f"/: expected a scalar, got {type(scalar).__name__}; for A / B use A @ B.inv()")
        if isinstance(scalar, (np.generic, np.ndarray)) and self.kind in (None, "numpy"):
            scalar = np.asarray(scalar, dtype=np.result_type(self.dtype, scalar))[()]  # 1/c in the result's precision
        return self * (1 / scalar)  # pyright: ignore[reportOperatorIssue]

    def __neg__(self) -> Operator:
        return self * -1

    def __pow__(self, exponent: int) -> Operator:
        if not isinstance(exponent, (int, np.integer)):
            raise TypeError(f"**: expected an integer exponent, got {type(exponent).__name__}")
        if not self.is_square:
            raise np.linalg.LinAlgError(f"**: expected a square operator, got shape {self.shape}")
        return rules.FALLBACKS["power"](self, int(exponent))

    def __getitem__(self, key: Any) -> Any:
        return rules.FALLBACKS["index"](self, key)

    def __iter__(self) -> Iterator[Any]:
        raise TypeError("an operator is not iterable: use A.to_dense(), or A[i, :] for one row")


# ---- checks at the door ---------------------------------------------------------------------------------------------


def check_inner(left: Operator, right: Operator) -> None:
    """``ValueError`` unless ``left @ right`` is defined; ``TypeError`` for mixed libraries or devices."""
    if left.shape[-1] != right.shape[-2]:
        raise _mismatch(left.shape, right.shape, left.shape[-1], right.shape[-2])
    check_pair(left, right, "matmul")


def check_pair(left: Operator, right: Operator, what: str) -> None:
    """``TypeError`` for operators of different libraries or devices; ``ValueError`` for batches that do not broadcast."""
    if left.kind and right.kind and (left.kind, left.device) != (right.kind, right.device):
        raise TypeError(
            f"{what}: cannot mix an operator of {left.kind} arrays on {left.device} "
            f"with one of {right.kind} arrays on {right.device}"
        )
    if left.batch_shape and right.batch_shape:
        _check_batches(left.shape, right.shape)


def require_operator(other: Any, sign: str, owner: Operator) -> None:
    """``TypeError`` that says what to write instead, unless ``other`` is an operator."""
    if isinstance(other, Operator):
        return
    if _is_scalar(other):
        raise TypeError(
            f"{sign}: cannot combine an operator of shape {owner.shape} with a scalar; add c * structmat.Identity(n)"
        )
    raise TypeError(f"{sign}: expected an operator, got {type(other).__name__}; wrap it with structmat.as_operator(x)")


def _check_batches(left: tuple[int, ...], right: tuple[int, ...], core: int = 2) -> None:
    try:
        np.broadcast_shapes(left[:-2], right[:-core])
    except ValueError:
        raise ValueError(f"matmul: {left} @ {right}: batch dimensions do not broadcast") from None


def _mismatch(left: Any, right: Any, inner: int, outer: int) -> ValueError:
    return ValueError(f"matmul: {tuple(left)} @ {tuple(right)}: inner dimensions {inner} and {outer} differ")


def _is_scalar(x: Any) -> bool:
    return isinstance(x, (int, float, complex, np.number, np.bool_)) or (arrays.kind(x) is not None and x.ndim == 0)


def _scalar_for(operator: Operator, scalar: Any) -> Any:
    """A scalar that meets the operator's arrays: 0-d tensors stay tensors, and only with operators that hold tensors."""
    kind = arrays.kind(scalar)
    if kind in (None, operator.kind):
        return scalar[()] if kind == "numpy" else scalar
    if kind == "numpy":
        return scalar.item() if operator.kind else scalar[()]
    raise TypeError(
        f"*: cannot mix a {kind} scalar with an operator that holds {operator.kind or 'no'} arrays; use scalar.item()"
    )


# ---- generic walks over the fields ------------------------------------------------------------------------------------


def _restore(cls: type[Operator], values: tuple[Any, ...]) -> Operator:
    return cls._rebuild(*values)


def _map_value(value: Any, array: Callable[[Array], Array], part: Callable[[Operator], Operator]) -> Any:
    if isinstance(value, Operator):
        return part(value)
    if type(value) is tuple:
        return tuple(_map_value(v, array, part) for v in value)
    return array(value) if arrays.kind(value) is not None else value


def _leaves(value: Any) -> Iterator[Array]:
    if isinstance(value, Operator):
        yield from value.arrays
    elif isinstance(value, tuple):
        for v in value:
            yield from _leaves(v)
    elif arrays.kind(value) is not None:
        yield value


def _size(x: Array) -> int:
    return int(np.prod(x.shape)) if x.ndim else 1


def _recall(pair: Any) -> Any:
    return pair() if isinstance(pair, weakref.ref) else pair


def _conj_values(x: Array) -> Array:
    return _conj(x) if arrays.is_inexact(x.dtype) else x


def _conj(x: Array) -> Array:
    if not arrays.is_complex(x.dtype):
        return x
    return x.conj().resolve_conj() if arrays.kind(x) == "torch" else x.conj()


def _complex(operator: Operator) -> bool:
    return arrays.is_complex(operator.dtype)


def _dtype_name(dtype: DType) -> str:
    return str(dtype).removeprefix("torch.")
