"""Device: NumPy's functions on arrays of another library, and the way there and back.

Linear algebra is the library's own, batched: cuSOLVER and MAGMA behind ``torch.linalg``, cuSOLVER behind ``cupy.linalg``.
"""

from __future__ import annotations

import operator as python_operator
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np

from structmat import arrays
from structmat.projection.device_array import CREATION, FUNCTIONS, UFUNCS, DeviceArray, operand, same_dtype
from structmat.projection.device_array import uploaded as uploaded

# ---- to and fro -------------------------------------------------------------------------------------------------------


def on_device(x: Any) -> bool:
    """Whether an array is one of those here, and not NumPy's."""
    return isinstance(x, DeviceArray)


def native(x: Any) -> Any:
    """The array of its own library, torch's with its conjugation done; NumPy's as they are."""
    if not isinstance(x, DeviceArray):
        return x
    return x.native.resolve_conj() if arrays.kind(x.native) == "torch" else x.native


def host(x: Any) -> np.ndarray:
    """A NumPy array of a small result: singular values, a thin factor. NumPy's as they are."""
    return arrays.convert(x.native, "numpy") if isinstance(x, DeviceArray) else x


def beside(x: Any, home: Any) -> Any:
    """A NumPy array where ``home`` is: itself for NumPy's, a copy on the device for others."""
    if not isinstance(home, DeviceArray) or isinstance(x, DeviceArray):
        return x
    return DeviceArray(uploaded(np.asarray(x), home))


def straight(x: np.ndarray) -> np.ndarray:
    """The array in C order; one on a device, whose library copies where it has to, as it is."""
    return x if on_device(x) else np.ascontiguousarray(x)


def current(home: Any) -> Any:
    """A context in which CuPy works on the device of an array; torch and NumPy need none."""
    array = native(home)
    return array.device if arrays.kind(array) == "cupy" else nullcontext()


def place(home: DeviceArray) -> str:
    """The device and its library, in words."""
    name, library = home.device, arrays.kind(home.native)
    return f"cuda:{name.id} by CuPy" if library == "cupy" else f"{name} by {library}"


# ---- functions --------------------------------------------------------------------------------------------------------


def _of(x: DeviceArray, name: str) -> Any:
    return getattr(x.xp, name)


def _dtype(home: DeviceArray, dtype: Any) -> Any:
    return arrays.dtype_for(np.dtype(dtype), arrays.kind(home.native))


def _made(name: str) -> Callable[..., DeviceArray]:
    def create(home: DeviceArray, shape: Any, dtype: Any = np.float64, **_: Any) -> DeviceArray:  # in C order only
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        return DeviceArray(_of(home, name)(shape, dtype=_dtype(home, dtype), device=home.device))

    return create


def _eye(home: DeviceArray, N: int, M: int | None = None, k: int = 0, dtype: Any = np.float64, **_: Any) -> DeviceArray:
    return DeviceArray(home.xp.eye(N, M, k=k, dtype=_dtype(home, dtype), device=home.device))


def _like(name: str) -> Callable[[DeviceArray], DeviceArray]:
    return lambda x: DeviceArray(_of(x, name)(x.native))


def _pad(x: DeviceArray, widths: Any) -> DeviceArray:
    shape = [size + before + after for size, (before, after) in zip(x.shape, widths, strict=True)]
    result = FUNCTIONS[np.zeros](x, shape, x.dtype)
    inside = tuple(slice(before, before + size) for size, (before, _) in zip(x.shape, widths, strict=True))
    result[inside] = x
    return result


def _joined(axis: int) -> Callable[[Any], DeviceArray]:
    return lambda parts: DeviceArray(_of(parts[0], "concat")([p.native for p in parts], axis=axis))


def _stack(parts: Any, axis: int = 0) -> DeviceArray:
    return DeviceArray(_of(parts[0], "stack")([p.native for p in parts], axis=axis))


def _einsum(subscripts: str, *operands: DeviceArray, optimize: bool = False) -> DeviceArray:  # noqa: ARG001 (NumPy's)
    return DeviceArray(_of(operands[0], "einsum")(subscripts, *same_dtype(*(x.native for x in operands))))


def _vdot(x: DeviceArray, y: DeviceArray) -> DeviceArray:
    return DeviceArray((x.conj().native * y.native).sum())


def _where(condition: DeviceArray, x: Any, y: Any) -> DeviceArray:
    return DeviceArray(condition.xp.where(condition.native, operand(x, condition), operand(y, condition)))


def _max(x: DeviceArray, axis: Any = None, keepdims: bool = False, initial: float | None = None) -> DeviceArray | float:
    if x.size == 0 and axis is None and initial is not None:
        return initial
    return DeviceArray(x.xp.max(x.native, axis=axis, keepdims=keepdims))


def _argwhere(x: DeviceArray) -> np.ndarray:
    return np.stack([host(DeviceArray(i)) for i in x.xp.nonzero(x.native)], axis=1)


def _norm(x: DeviceArray, axis: int | None = None) -> DeviceArray:
    if axis is not None:
        return DeviceArray(x.xp.linalg.vector_norm(x.native, axis=axis))
    return DeviceArray(frobenius_norm(x))


def frobenius_norm(x: DeviceArray) -> Any:
    """The root of the sum of the squares of all entries, rows first: a native number, without a copy of the array."""
    vector_norm = x.xp.linalg.vector_norm
    return vector_norm(vector_norm(x.native, axis=-1)) if x.ndim > 1 else vector_norm(x.native)


# ---- linear algebra ---------------------------------------------------------------------------------------------------


@contextmanager
def _strict(x: DeviceArray, name: str) -> Iterator[None]:
    """``numpy.linalg.LinAlgError`` where the library raises its own, and where CuPy would return what is not finite."""
    torch, state = sys.modules.get("torch"), nullcontext()
    if arrays.kind(x.native) == "cupy":
        from cupyx import errstate

        state = errstate(linalg="raise")
    try:
        with state:
            yield
    except RuntimeError as error:
        if torch is None or not isinstance(error, torch.linalg.LinAlgError):
            raise
        raise np.linalg.LinAlgError(f"{name} of {x.shape} on {x.device}: {error}") from error


def _solved(name: str, x: DeviceArray, **options: Any) -> Any:
    """What ``linalg.name`` of the library makes of an array; ``LinAlgError`` for a spectrum that is not finite."""
    with _strict(x, name):
        found = getattr(x.xp.linalg, name)(x.native, **options)
    parts = [DeviceArray(part) for part in found] if isinstance(found, tuple) else [DeviceArray(found)]
    for part in parts if name in ("eigh", "eigvalsh", "svd", "svdvals") else ():
        if part.ndim == x.ndim - 1 and not np.isfinite(part).all():
            raise np.linalg.LinAlgError(f"{name} of {x.shape} on {x.device} did not converge")
    return tuple(parts) if isinstance(found, tuple) else parts[0]


def _svd(x: DeviceArray, full_matrices: bool = True, compute_uv: bool = True) -> Any:
    return _solved("svd", x, full_matrices=full_matrices) if compute_uv else _solved("svdvals", x)


def _qr(x: DeviceArray, mode: str = "reduced") -> Any:
    found = _solved("qr", x)
    return found[1] if mode == "r" else found


def triangular_inverse(lower: DeviceArray) -> DeviceArray:
    """The inverse of a lower triangular matrix."""
    eye = _eye(lower, len(lower), dtype=lower.dtype).native
    if arrays.kind(lower.native) == "torch":
        return DeviceArray(sys.modules["torch"].linalg.solve_triangular(lower.native, eye, upper=False))
    if arrays.kind(lower.native) == "cupy":
        from cupyx.scipy.linalg import solve_triangular

        return DeviceArray(solve_triangular(lower.native, eye, lower=True))
    return DeviceArray(lower.xp.linalg.solve(lower.native, eye))


# ---- NumPy's names ----------------------------------------------------------------------------------------------------

FUNCTIONS |= {
    np.empty: _made("empty"),
    np.zeros: _made("zeros"),
    np.eye: _eye,
    np.empty_like: _like("empty_like"),
    np.zeros_like: _like("zeros_like"),
    np.ones_like: _like("ones_like"),
    np.pad: _pad,
    np.hstack: lambda parts: _joined(min(1, parts[0].ndim - 1))(parts),
    np.vstack: _joined(0),
    np.stack: _stack,
    np.broadcast_to: lambda x, shape: DeviceArray(x.xp.broadcast_to(x.native, tuple(shape))),
    np.moveaxis: lambda x, source, to: DeviceArray(x.xp.moveaxis(x.native, source, to)),
    np.einsum: _einsum,
    np.vdot: _vdot,
    np.where: _where,
    np.max: _max,
    np.argwhere: _argwhere,
    np.trace: lambda x, axis1=0, axis2=1: DeviceArray(
        x.xp.linalg.trace(x.xp.moveaxis(x.native, (axis1, axis2), (-2, -1)))
    ),
    np.diagonal: lambda x: DeviceArray(x.xp.linalg.diagonal(x.native)),
    np.real: lambda x: x.real,
    np.iscomplexobj: lambda x: x.dtype.kind == "c",
    np.result_type: lambda *xs: np.result_type(*(x.dtype if isinstance(x, DeviceArray) else x for x in xs)),
    np.linalg.norm: _norm,
    np.linalg.svd: _svd,
    np.linalg.eigh: lambda x: _solved("eigh", x),
    np.linalg.eigvalsh: lambda x: _solved("eigvalsh", x),
    np.linalg.cholesky: lambda x: _solved("cholesky", x),
    np.linalg.qr: _qr,
}
CREATION |= {np.empty, np.zeros, np.eye}

UFUNCS |= {
    np.square: lambda x: x * x,
    np.vecdot: lambda x, y: (x.conj() * y).sum(-1),
    np.add: python_operator.add,
    np.subtract: python_operator.sub,
    np.multiply: python_operator.mul,
    np.divide: python_operator.truediv,
    np.matmul: lambda x, y: python_operator.matmul(*same_dtype(x, y)),
    np.less: python_operator.lt,
    np.less_equal: python_operator.le,
    np.greater: python_operator.gt,
    np.greater_equal: python_operator.ge,
    np.arctan2: "atan2",
    np.rint: "round",
    np.abs: "abs",
} | {
    getattr(np, name): name
    for name in ("hypot", "sqrt", "exp2", "log2", "cos", "sin", "isfinite", "maximum", "minimum")
}
