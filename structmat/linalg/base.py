"""What all files of linalg share: checks at the door, results in the operator's library, unit columns, LAPACK's errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from structmat import arrays
from structmat.arrays import Array, DType
from structmat.operator import Operator
from structmat.structures.external import External

CHUNK = 64  # unit columns that an operator is applied to at once: bounds the memory of what has no rule


def check(a: Any, what: str) -> None:
    """``TypeError`` unless ``a`` is an operator."""
    if not isinstance(a, Operator):
        raise TypeError(f"{what}: expected an operator, got {type(a).__name__}; wrap arrays with structmat.Dense(x)")


def check_square(a: Any, what: str) -> None:
    """``TypeError`` unless ``a`` is an operator, ``LinAlgError`` unless it is square."""
    check(a, what)
    if not a.is_square:
        raise np.linalg.LinAlgError(f"{what}: expected a square operator, got shape {a.shape}")


def unknown(what: str, a: Operator) -> NotImplementedError:
    """The error for a quantity that has no closed form here; it says how to get it from the dense matrix."""
    library = "torch" if library_of(a) == "torch" else "numpy"
    return NotImplementedError(
        f"{what}: no closed form is known for {a}; {library}.linalg.{what}(A.to_dense()) computes it from the dense matrix"
    )


# ---- libraries and dtypes -----------------------------------------------------------------------------------------------


def library_of(a: Operator) -> str:
    """The library of an operator's results; operators without arrays go by their dtype."""
    return a.kind or ("torch" if arrays.is_torch_dtype(a.dtype) else "numpy")


def namespace(a: Operator) -> Any:
    """The array namespace of an operator's results."""
    return arrays.namespace_of(library_of(a))


def real_dtype(dtype: DType) -> DType:
    """The dtype of absolute values."""
    return dtype.to_real() if arrays.is_torch_dtype(dtype) else np.finfo(dtype).dtype


def epsilon(dtype: DType) -> float:
    """Distance from 1 to the next number of the dtype."""
    return float((arrays.namespace_of("torch") if arrays.is_torch_dtype(dtype) else np).finfo(dtype).eps)


def constant(a: Operator, value: Any, shape: tuple[int, ...] = (), *, real: bool = False) -> Array:
    """An array ``(*batch, *shape)`` of one value in the operator's library, device and (real) dtype."""
    dtype = real_dtype(a.dtype) if real else a.dtype
    return namespace(a).full((*a.batch_shape, *shape), value, dtype=dtype, device=a.device)


def like(a: Operator, x: Any) -> Array:
    """A part's result in the library of the whole: a part without arrays answers in NumPy."""
    x = np.asarray(x) if arrays.kind(x) is None else x
    library = library_of(a)
    return x if arrays.kind(x) == library else arrays.convert(x, library, a.device)


def finish(a: Operator, x: Any, shape: tuple[int, ...] = (), *, real: bool = False) -> Any:
    """A result in the operator's library and (real) dtype, ``(*batch, *shape)``; NumPy scalars instead of 0-d arrays."""
    x = arrays.cast(like(a, x), real_dtype(a.dtype) if real else a.dtype)
    shape = (*a.batch_shape, *shape)
    if tuple(x.shape) != shape:
        x = namespace(a).asarray(namespace(a).broadcast_to(x, shape), copy=True)
    return x[()] if isinstance(x, np.ndarray) else x


def parts(a: Operator, operators: tuple[Operator, ...]) -> list[Operator]:
    """The parts of ``a`` in its own dtype, so that float32 parts of a float64 operator are factorised in float64."""
    return [p if p.dtype == a.dtype or isinstance(p, External) else p.astype(a.dtype) for p in operators]


def adjoint(x: Array) -> Array:
    """The conjugate transpose of an array of matrices."""
    return x.swapaxes(-1, -2).conj() if arrays.is_complex(x.dtype) else x.swapaxes(-1, -2)


def join(a: Operator, vectors: list[Any]) -> Array:
    """Vectors of the blocks of ``a``, each ``(*batch, n_i)``, one after the other."""
    xp = namespace(a)
    same = [like(a, p) for p in vectors]
    dtype = arrays.promote(*(p.dtype for p in same))
    batch = np.broadcast_shapes(*(tuple(p.shape[:-1]) for p in same))
    return xp.concat([xp.broadcast_to(arrays.cast(p, dtype), (*batch, p.shape[-1])) for p in same], axis=-1)


# ---- computing ----------------------------------------------------------------------------------------------------------


def columns(a: Operator, count: int | None = None) -> Iterator[tuple[int, Array]]:
    """The first ``count`` columns (default all), as ``(start, block (*batch, m, at most 64))``."""
    xp, n = namespace(a), a.shape[-1]
    count = n if count is None else count
    for start in range(0, count, CHUNK):
        width = min(CHUNK, count - start)
        yield start, a._matmat(xp.eye(n, width, k=-start, dtype=a.dtype, device=a.device))


def lapack(what: str, function: Callable[..., Any], *args: Any) -> Any:
    """A call of the library's LAPACK with torch's own error turned into ``numpy.linalg.LinAlgError``."""
    try:
        return function(*args)
    except RuntimeError as error:
        if type(error).__name__ != "_LinAlgError":
            raise
        raise np.linalg.LinAlgError(f"{what}: {error}") from error


def hermitian(x: Array) -> bool:
    """Whether matrices ``(..., n, n)`` equal their adjoints up to rounding, ``10 n eps`` of the largest entry."""
    if 0 in x.shape:
        return True
    xp = arrays.namespace(x)
    difference, size = (xp.max(xp.abs(y), axis=(-2, -1)) for y in (x - adjoint(x), x))
    return bool(xp.all(difference <= 10 * x.shape[-1] * epsilon(x.dtype) * size))


def check_hermitian(what: str, a: Operator, x: Array) -> None:
    """``LinAlgError`` unless the matrices ``x`` that stand for ``a`` are Hermitian up to rounding."""
    if not hermitian(x):
        raise np.linalg.LinAlgError(f"{what}: expected a Hermitian operator, {a} differs from its adjoint")


def sort_descending(x: Array) -> Array:
    """Values sorted from large to small along the last axis."""
    xp = arrays.namespace(x)
    return xp.flip(xp.sort(x, axis=-1), axis=-1)


def outer(vectors: list[Array]) -> Array:
    """All products of one entry of each vector ``(*batch, n_i)``, the last index fast."""
    result = vectors[0]
    for x in vectors[1:]:
        result = result[..., :, None] * x[..., None, :]
        result = result.reshape(*result.shape[:-2], -1)
    return result


def right_hand_side(a: Operator, b: Array, what: str) -> Array:
    """``b`` checked against the rows of ``a``."""
    b = arrays.operand(b, a, what)
    axis = -1 if b.ndim == 1 else -2
    if b.ndim == 0 or b.shape[axis] != a.shape[-2]:
        raise ValueError(
            f"{what}: an operator of shape {a.shape} needs b of shape ({a.shape[-2]},) or (..., {a.shape[-2]}, k), "
            f"got {tuple(b.shape)}"
        )
    try:
        np.broadcast_shapes(a.batch_shape, tuple(b.shape[:-2]))
    except ValueError:
        raise ValueError(f"{what}: batch dimensions of {a.shape} and {tuple(b.shape)} do not broadcast") from None
    return b
