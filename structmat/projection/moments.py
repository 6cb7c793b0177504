"""Moments: what the inputs of a matrix look like, checked: the weight that a caller asks for."""

from __future__ import annotations

from typing import Any

import numpy as np

from structmat import arrays
from structmat.projection.device import DeviceArray, current, host, on_device, straight, uploaded
from structmat.projection.drivers import eigh
from structmat.projection.placement import accelerated
from structmat.projection.weight import Metric, Weight

_CHUNK = 8192  # rows of activations in double precision at a time
_EPS = float(np.finfo(np.float64).eps)


class Moments:
    """Sums over samples ``x``: their number, their total and ``sum x x^H``; sums of parts of the data add up by ``+``.

    The weight of :func:`structmat.project`: the mean squared output error over the samples is
    ``tr((W - A) E[x x^H] (W - A)^H)``.

    Parameters
    ----------
    gram
        ``sum x x^H``, ``(n, n)``.
    total
        ``sum x``, ``(n,)``.
    count
        Number of samples, at least 1.

    Raises
    ------
    ValueError
        If the shapes do not fit each other or there are no samples.

    Examples
    --------
    >>> import numpy as np, structmat as sm
    >>> X = np.random.default_rng(0).standard_normal((100, 3))
    >>> both = sm.Moments.of(X[:40]) + sm.Moments.of(X[40:])
    >>> both.count, bool(np.allclose(both.second_moment, X.T @ X / 100)), bool(np.allclose(both.mean, X.mean(0)))
    (100, True, True)
    """

    __slots__ = ("gram", "total", "count")

    def __init__(self, gram: Any, total: Any, count: int) -> None:
        self.gram, self.total, self.count = _exact(gram, "gram"), _exact(total, "total"), int(count)
        if self.gram.ndim != 2 or self.gram.shape != (*self.total.shape, *self.total.shape):
            raise ValueError(
                f"Moments: expected gram (n, n) and total (n,), got {self.gram.shape} and {self.total.shape}"
            )
        if self.count < 1:
            raise ValueError(f"Moments: expected at least one sample, got {self.count}")

    @classmethod
    def of(cls, activations: Any) -> Moments:
        """The moments of samples, the rows of ``(..., n)``; NumPy, torch or CuPy, summed in double precision.

        Samples on an accelerator are summed there; the sums are on the host. Cost ``samples * n**2``; memory ``n**2`` and a
        few thousand rows in double precision.

        Examples
        --------
        >>> import structmat as sm
        >>> sm.Moments.of([[1.0, 2.0], [3.0, 4.0]]).total.tolist()
        [4.0, 6.0]
        """
        gram, total, count = _sums(activations)
        return cls(host(gram), host(total), count)

    def __add__(self, other: Moments) -> Moments:
        if not isinstance(other, Moments):
            return NotImplemented
        if self.gram.shape != other.gram.shape:
            raise ValueError(f"Moments: cannot add those of {len(self.total)} and {len(other.total)} inputs")
        return Moments(self.gram + other.gram, self.total + other.total, self.count + other.count)

    @property
    def second_moment(self) -> np.ndarray:
        """``E[x x^H]``, ``(n, n)``, not centred."""
        return self.gram / self.count

    @property
    def mean(self) -> np.ndarray:
        """``E[x]``, ``(n,)``."""
        return self.total / self.count

    def __repr__(self) -> str:
        return f"<Moments of {self.count} samples of {len(self.total)} inputs>"


def _sums(activations: Any, home: Any = None) -> tuple[Any, Any, int]:
    """``sum x x^H``, ``sum x`` and the number of samples, where ``home`` is or the samples are."""
    source = arrays.values(activations, "activations")
    n = 0 if source.ndim < 2 else source.shape[-1]
    if source.ndim < 2 or n == 0 or 0 in tuple(source.shape):
        raise ValueError(f"activations: expected samples as rows (tokens, n), got shape {tuple(source.shape)}")
    if not on_device(home) and accelerated(source):
        home = DeviceArray(source.detach() if arrays.kind(source) == "torch" else source)
    with current(source):
        rows = source.reshape(-1, n)
        gram, total = (np.zeros(size, like=home) if on_device(home) else np.zeros(size) for size in ((n, n), (n,)))
        for start in range(0, rows.shape[0], _CHUNK):
            x = _exact(rows[start : start + _CHUNK], "activations", home)
            if not np.isfinite(x).all():
                raise ValueError("activations: expected finite numbers, got NaN or infinite ones")
            gram, total = gram + x.T @ x.conj(), total + x.sum(axis=0)
    return gram, total, rows.shape[0]


def read_weight(
    weight: Any,
    activations: Any,
    mean: Any,
    row_weight: Any,
    damping: Any,
    target: np.ndarray,
) -> tuple[Weight, np.ndarray | None]:
    """The weight that the caller asked for, checked, and the mean of the inputs; where ``target`` is.

    Raises ``TypeError`` and ``ValueError`` that name what was found.
    """
    (m, n), real = target.shape, not np.iscomplexobj(target)
    if weight is not None and activations is not None:
        raise ValueError("weight and activations: each gives the weight; expected one of them")
    matrix, average, count = weight, None, None
    if isinstance(weight, Moments):
        matrix, average, count = weight.second_moment, weight.mean, weight.count
    elif activations is not None:
        gram, total, count = _sums(activations, target)
        gram, total = (gram, total) if on_device(target) else (host(gram), host(total))
        matrix, average = gram / count, total / count
    name = "weight" if activations is None else "activations"
    center = _mean(mean, average, n, target)
    if matrix is None and center is not None:
        raise ValueError("mean: expected a weight or activations with it, got none")
    if matrix is None and damping is not None:
        raise ValueError("damping: expected a weight or activations to dampen, got none")
    columns = None
    if matrix is not None:
        columns = _metric(matrix, name, n, _damping(damping), real, target, center, count)
    rows = None if row_weight is None else _metric(row_weight, "row_weight", m, 0.0, real, target)
    return Weight(columns, rows), center


def _mean(mean: Any, average: np.ndarray | None, n: int, home: Any) -> np.ndarray | None:
    if mean is None or mean is False:
        return None
    if mean is True:
        if average is None:
            raise ValueError(
                "mean: True takes it from activations or Moments; with a matrix as weight expected the vector"
            )
        mean = average
    center = _exact(mean, "mean", home)
    if center.shape != (n,) or not np.isfinite(center).all():
        raise ValueError(f"mean: expected {n} finite numbers, got shape {center.shape}")
    return center


def _damping(damping: Any) -> float:
    if damping is None:
        return 0.0
    if isinstance(damping, (bool, np.bool_)) or not isinstance(damping, (int, float, np.integer, np.floating)):
        raise TypeError(f"damping: expected a number, got {type(damping).__name__}")
    if not 0.0 <= damping < np.inf:
        raise ValueError(f"damping: expected a finite number of at least 0, got {damping}")
    return float(damping)


def _metric(
    value: Any,
    name: str,
    size: int,
    damping: float,
    real: bool,
    home: Any = None,
    center: np.ndarray | None = None,
    count: int | None = None,
) -> Metric:
    """A second moment, checked: square, Hermitian, positive semidefinite up to rounding; centred, damped and scaled."""
    source = value if on_device(value) else arrays.values(value, name)
    short = arrays.itemsize(source.dtype) // (2 if arrays.is_complex(source.dtype) else 1) < 8
    slack = 1e-4 if short else 1e-6  # sums in single precision are common, even where they are stored in double
    c = _exact(source, name, home)
    if c.shape != (size, size):
        raise ValueError(f"{name}: expected a second moment ({size}, {size}), got shape {c.shape}")
    if not np.isfinite(c).all():
        raise ValueError(f"{name}: {int((~np.isfinite(c)).sum())} of {c.size} entries are NaN or infinite")
    largest = float(np.max(np.abs(c)))
    if largest == 0.0:
        raise ValueError(f"{name}: expected a second moment that is not zero: every matrix would be optimal")
    exponent = np.floor(np.log2(largest) / 2)  # an even power of two: the norm scales by a power of two
    c = c / 2.0**exponent / 2.0**exponent
    skew = float(np.max(np.abs(c - c.conj().T)))
    if skew > slack * 4.0:
        hermitian = "Hermitian" if np.iscomplexobj(c) else "symmetric"
        raise ValueError(f"{name}: expected a {hermitian} matrix, got one that differs from its adjoint by {skew:.3g}")
    c = (c + c.conj().T) / 2
    c = straight(c.real) if real else c  # the imaginary part of x x^H cancels for a real error
    top = float(np.max(np.real(np.diagonal(c))))
    notes: list[str] = []
    if center is not None:
        unit = center / 2.0**exponent
        shift = unit[:, None] * unit.conj()
        c = c - (shift.real if real else shift)
    c, negative, triangle = _positive(c, name, slack, top, center is not None)
    if negative:
        notes.append(f"negative eigenvalues of the {name} down to {negative:.1e} of the largest set to 0")
    if damping:
        c, triangle = c + damping * float(np.trace(c).real) / size * np.eye(size, like=c), None
        notes.append(f"{name} damped by {damping:g} of its mean diagonal")
    if count is not None and count < size:
        notes.append(f"{count} samples of {size} inputs")
    metric = Metric(c, float(2.0**exponent), tuple(notes))
    if triangle is not None:
        metric.__dict__["triangle"] = triangle  # the check has paid for it
    return metric


def _positive(
    c: np.ndarray, name: str, slack: float, top: float, centred: bool
) -> tuple[np.ndarray, float, np.ndarray | None]:
    """The matrix without negative eigenvalues that rounding made, the lowest of those relative to the largest, its factor."""
    size = len(c)
    for noise in (0.0, 4.0 * _EPS * size * top):
        try:
            triangle = np.linalg.cholesky(c + noise * np.eye(size, like=c) if noise else c)
        except np.linalg.LinAlgError:
            continue
        return c, 0.0, None if noise else triangle
    values, vectors = eigh(c)
    largest = max(float(values[-1]), top)
    if float(values[0]) < -slack * largest:
        hint = "; with mean, weight is the second moment E[x x^H] before centring" if centred else ""
        raise ValueError(
            f"{name}: expected a positive semidefinite matrix, got the eigenvalue {float(values[0]) / largest:.3g} "
            f"relative to the largest{hint}"
        )
    return (vectors * np.maximum(values, 0.0)) @ vectors.conj().T, float(values[0]) / largest, None


def _exact(x: Any, name: str, home: Any = None) -> Any:
    """A float64 or complex128 array, of NumPy or where ``home`` is, without copying one that already is."""
    if on_device(x):
        return x if on_device(home) else host(x)
    source = arrays.values(x, name)
    library = arrays.kind(source)
    source = source.detach() if library == "torch" else source
    if library == "torch" and not on_device(home):
        source = source.cpu()
    exact = np.complex128 if arrays.is_complex(source.dtype) else np.float64
    source = arrays.cast(source, arrays.dtype_for(np.dtype(exact), library))
    if not on_device(home):
        return arrays.convert(source, "numpy")
    if library == "numpy":
        return DeviceArray(uploaded(source, home))
    if library == "cupy" and arrays.device(source) != home.device:
        raise TypeError(f"{name}: on {arrays.device(source)}, the matrix on {home.device}; expected both on one device")
    torch_device = home.device if arrays.kind(home.native) == "torch" else None
    return DeviceArray(arrays.convert(source, arrays.kind(home.native) or "numpy", torch_device))
