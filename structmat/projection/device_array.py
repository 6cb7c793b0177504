"""DeviceArray: an array that stays where it is, seen through NumPy's functions: one text of an algorithm runs anywhere.

The algorithms of this package are written for NumPy. Given a :class:`DeviceArray`, ``np.linalg.svd``, ``@``, ``np.square``
and the others come here by NumPy's protocols (``__array_function__``, NEP 18; ``__array_ufunc__``, NEP 13) and run in the
array's own library, on its own device. There is no way back but :func:`host`: what is not listed below is a ``TypeError``,
and so are ``np.asarray(x)`` and arithmetic with NumPy arrays. Nothing is copied to or from the host unasked.
:mod:`structmat.projection.device` fills the tables.
"""

from __future__ import annotations

import math
import operator as python_operator
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from structmat import arrays

FUNCTIONS: dict[Any, Callable[..., Any]] = {}  # NumPy's function: what runs it
CREATION: set[Any] = set()  # those that take the array as ``like=``
UFUNCS: dict[Any, Callable[..., Any] | str] = {}  # NumPy's ufunc: a function of native operands, or its name there


class DeviceArray:
    """A torch or CuPy array with the manners of ``numpy.ndarray``, as far as projection needs them.

    Parameters
    ----------
    native
        Array of any library that ``array_api_compat`` knows; shared, not copied. Its results are on the same device.

    Examples
    --------
    >>> import numpy as np, torch
    >>> from structmat.projection.device import DeviceArray, host
    >>> x = DeviceArray(torch.eye(3, dtype=torch.float64))
    >>> u, s, vh = np.linalg.svd(2.0 * x[:2], full_matrices=False)
    >>> type(s).__name__, host(s).tolist(), (u @ vh).shape
    ('DeviceArray', [2.0, 2.0], (2, 3))
    """

    __slots__ = ("native", "xp")
    native: Any
    xp: Any

    def __init__(self, native: Any) -> None:
        self.native, self.xp = native, arrays.namespace(native)

    # ---- what it is ---------------------------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, ...]:
        """Lengths of the axes."""
        return tuple(self.native.shape)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.native.shape)

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.native.shape)

    @property
    def dtype(self) -> np.dtype:
        """NumPy's name of the dtype."""
        return np.dtype(arrays.dtype_for(self.native.dtype, "numpy"))

    @property
    def device(self) -> Any:
        """The device, as the library names it."""
        return arrays.device(self.native)

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[DeviceArray]:
        return (self[i] for i in range(len(self)))

    def __float__(self) -> float:
        return float(self.native)

    def __int__(self) -> int:
        return int(self.native)

    def __bool__(self) -> bool:
        return bool(self.native)

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise TypeError(
            f"projection on {self.device}: an array of shape {self.shape} would be copied to the host unasked"
        )

    def __repr__(self) -> str:
        return f"<DeviceArray {self.shape} {self.dtype} on {self.device}>"

    # ---- shapes -------------------------------------------------------------------------------------------------------

    def reshape(self, *shape: Any) -> DeviceArray:
        """The entries in C order in another shape; a view where the library can make one."""
        return DeviceArray(self.xp.reshape(self.native, _axes(shape)))

    def transpose(self, *axes: Any) -> DeviceArray:
        """The axes in another order; a view."""
        return DeviceArray(self.xp.permute_dims(self.native, _axes(axes) or tuple(range(self.ndim))[::-1]))

    @property
    def T(self) -> DeviceArray:
        """The axes in reverse order; a view."""
        return self.transpose()

    def swapaxes(self, first: int, second: int) -> DeviceArray:
        """Two axes exchanged; a view."""
        order = list(range(self.ndim))
        order[first], order[second] = order[second], order[first]
        return self.transpose(order)

    def ravel(self) -> DeviceArray:
        """One axis, C order."""
        return self.reshape(-1)

    def copy(self) -> DeviceArray:
        """A copy in C order."""
        return DeviceArray(arrays.copy(arrays.contiguous(self.native)))

    def astype(self, dtype: Any) -> DeviceArray:
        """The entries in another dtype."""
        return DeviceArray(self.xp.astype(self.native, arrays.dtype_for(np.dtype(dtype), arrays.kind(self.native))))

    # ---- values -------------------------------------------------------------------------------------------------------

    @property
    def real(self) -> DeviceArray:
        """The real part."""
        return DeviceArray(self.native.real) if self.dtype.kind == "c" else self

    def conj(self) -> DeviceArray:
        """The complex conjugate; the array itself where it is real."""
        return DeviceArray(self.xp.conj(self.native)) if self.dtype.kind == "c" else self

    def sum(self, axis: Any = None) -> DeviceArray:
        """Sum over one axis, several or all."""
        return DeviceArray(self.xp.sum(self.native, axis=axis))

    def mean(self, axis: Any = None) -> DeviceArray:
        """Mean over one axis, several or all."""
        return DeviceArray(self.xp.mean(self.native, axis=axis))

    def max(self, axis: Any = None) -> DeviceArray:
        """Largest entry along an axis or of all."""
        return DeviceArray(self.xp.max(self.native, axis=axis))

    def any(self) -> bool:
        """Whether any entry is true."""
        return bool(self.xp.any(self.native != 0))

    def all(self) -> bool:
        """Whether all entries are true."""
        return bool(self.xp.all(self.native != 0))

    def __getitem__(self, index: Any) -> DeviceArray:
        x, index = self.native, _place(index, self)
        if any(isinstance(i, slice) and (i.step or 1) < 0 for i in index):  # torch has no negative strides
            index = _without_ellipsis(index, self.ndim)
            axes = [axis for axis, i in enumerate(j for j in index if j is not None) if _backwards(i)]
            for axis in axes:
                x = self.xp.flip(x, axis=axis)
            index = tuple(slice(None) if _backwards(i) else i for i in index)
        return DeviceArray(x[index])

    def __setitem__(self, index: Any, value: Any) -> None:
        self.native[_place(index, self)] = operand(value, self)

    def __neg__(self) -> DeviceArray:
        return DeviceArray(-self.native)

    def __invert__(self) -> DeviceArray:
        return DeviceArray(~self.native)

    # ---- NumPy's protocols --------------------------------------------------------------------------------------------

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if func not in FUNCTIONS:
            return NotImplemented
        if func in CREATION:  # np.empty(shape, like=x)
            return FUNCTIONS[func](self, *args, **kwargs)
        return FUNCTIONS[func](*args, **kwargs)

    def __array_ufunc__(
        self, ufunc: Any, method: str, *inputs: Any, out: Any = None, where: Any = True, dtype: Any = None
    ) -> Any:
        if method != "__call__" or ufunc not in UFUNCS:
            return NotImplemented
        function, values = UFUNCS[ufunc], [operand(x, self) for x in inputs]
        if isinstance(function, str):
            result = DeviceArray(getattr(self.xp, function)(*(self._number(x) for x in values)))
        else:
            result = DeviceArray(function(*values))
        result = result if dtype is None else result.astype(dtype)
        if out is None:
            return result
        (target,) = out
        if where is not True:
            result = DeviceArray(self.xp.where(operand(where, self), result.native, target.native))
        target[...] = result
        return target

    def _number(self, x: Any) -> Any:
        """A Python number as an array without axes, which the functions of torch ask for."""
        return x if arrays.kind(x) else self.xp.full((), x, dtype=self.native.dtype, device=self.device)


def _binary(function: Callable[[Any, Any], Any], swapped: bool = False) -> Callable[[DeviceArray, Any], Any]:
    def method(self: DeviceArray, other: Any) -> DeviceArray:
        x = operand(other, self)
        return DeviceArray(function(x, self.native) if swapped else function(self.native, x))

    return method


def _in_place(function: Callable[[Any, Any], Any]) -> Callable[[DeviceArray, Any], DeviceArray]:
    def method(self: DeviceArray, other: Any) -> DeviceArray:
        function(self.native, operand(other, self))
        return self

    return method


def _product(x: Any, y: Any) -> Any:
    return python_operator.matmul(*same_dtype(x, y))


DeviceArray.__matmul__ = _binary(_product)  # type: ignore[attr-defined]
for _name in ("add", "sub", "mul", "truediv", "pow"):
    setattr(DeviceArray, f"__{_name}__", _binary(getattr(python_operator, _name)))
    setattr(DeviceArray, f"__r{_name}__", _binary(getattr(python_operator, _name), swapped=True))
for _name in ("iadd", "isub", "imul", "itruediv"):
    setattr(DeviceArray, f"__{_name}__", _in_place(getattr(python_operator, _name)))
for _name in ("lt", "le", "gt", "ge", "and_"):
    setattr(DeviceArray, f"__{_name.strip('_')}__", _binary(getattr(python_operator, _name)))


# ---- operands and indices ----------------------------------------------------------------------------------------------


def uploaded(x: np.ndarray, home: DeviceArray) -> Any:
    """A NumPy array where ``home`` is, not to be written to."""
    x = np.ascontiguousarray(x)
    return home.xp.asarray(x if x.flags.writeable else x.copy(), device=home.device)  # torch wants no read-only ones


def operand(x: Any, home: DeviceArray) -> Any:
    """An operand: an array of the same library, or a Python number."""
    if isinstance(x, DeviceArray):
        return x.native
    if isinstance(x, np.generic) or (isinstance(x, np.ndarray) and x.ndim == 0):
        return x.item()
    if isinstance(x, (bool, int, float, complex)):
        return x
    raise TypeError(f"projection on {home.device}: expected an array there or a number, got {type(x).__name__}")


def same_dtype(*xs: Any) -> tuple[Any, ...]:
    """Native arrays in the dtype that holds all of them, which torch's products ask for."""
    dtype = arrays.promote(*(x.dtype for x in xs))
    return tuple(arrays.cast(x, dtype) for x in xs)


def _axes(given: tuple[Any, ...]) -> tuple[int, ...]:
    return tuple(given[0]) if len(given) == 1 and not isinstance(given[0], (int, np.integer)) else tuple(given)


def _place(index: Any, home: DeviceArray) -> tuple[Any, ...]:
    """An index with its arrays on the device."""
    parts = index if isinstance(index, tuple) else (index,)
    return tuple(
        p.native if isinstance(p, DeviceArray) else uploaded(p, home) if isinstance(p, np.ndarray) else p for p in parts
    )


def _backwards(part: Any) -> bool:
    return isinstance(part, slice) and (part.step or 1) < 0


def _without_ellipsis(index: tuple[Any, ...], ndim: int) -> tuple[Any, ...]:
    """The index with a slice for every axis of an ellipsis; only whole axes are read backwards, beside slices and ``None``."""
    if any(_backwards(p) and p != slice(None, None, -1) for p in index):
        raise TypeError(f"projection on a device: expected slices forwards or [::-1], got {index}")
    at = next((i for i, p in enumerate(index) if p is Ellipsis), len(index))
    missing = ndim - sum(p is not None and p is not Ellipsis for p in index)
    return (*index[:at], *[slice(None)] * missing, *index[at + 1 :])
