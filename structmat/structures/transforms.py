"""Fast transforms as operators: Fourier, Hadamard, cosine."""

from __future__ import annotations

from typing import Any

import numpy as np

from structmat import arrays
from structmat.arrays import Array, DType
from structmat.operator import Operator
from structmat.structures.diagonal import result_dtype
from structmat.structures.kronecker import Kronecker


class Fourier(Operator):
    """Discrete Fourier transform ``F[j, k] = exp(-2 pi i j k / n)``, unnormalised, by FFT. Made by :func:`fourier`.

    Symmetric: ``F.T is F``; ``F.H`` is the transform with the other sign, ``F.inv() = F.H / n``. It holds no array and
    meets arrays of every library. Source: Cooley and Tukey, Math. Comp. 19, 1965.

    Parameters
    ----------
    n
        Size, any positive integer.
    dtype
        complex64 or complex128.
    conjugate
        Whether the sign in the exponent is positive.

    Raises
    ------
    TypeError
        For a dtype that is not complex.

    Examples
    --------
    >>> import numpy as np, structmat as sm
    >>> x = np.arange(5.0)
    >>> bool(np.allclose(sm.fourier(5) @ x, np.fft.fft(x)))
    True
    """

    __slots__ = ("conjugate",)
    fields = ("n", "dtype", "conjugate")
    conjugate: bool

    def __init__(self, n: int, dtype: DType = complex, conjugate: bool = False) -> None:
        dtype = arrays.as_dtype(dtype)
        if not arrays.is_complex(dtype):
            raise TypeError(f"fourier: expected a complex dtype, got {dtype}")
        if n < 1:
            raise ValueError(f"fourier: expected a size of at least 1, got {n}")
        self._init((int(n), int(n)), dtype, None, None, conjugate=bool(conjugate))

    @property
    def n(self) -> int:
        """Size."""
        return self.shape[0]

    def _matmat(self, x: Array) -> Array:
        xp, dtype = arrays.namespace(x), result_dtype(self, x)
        x = arrays.cast(x, dtype)
        if 0 in tuple(x.shape):  # not every FFT takes empty arrays
            return arrays.copy(x)
        return arrays.cast(xp.fft.ifft(x, axis=-2) * self.n if self.conjugate else xp.fft.fft(x, axis=-2), dtype)

    def _transpose(self) -> Operator:
        return self

    def _conj(self) -> Operator:
        return Fourier(self.n, self.dtype, not self.conjugate)

    def _cast(self, dtype: DType) -> Operator:
        return Fourier(self.n, dtype, self.conjugate)

    def _moved(self, library: str, device: Any) -> Operator:  # noqa: ARG002  (there is nothing on a device)
        return Fourier(self.n, arrays.dtype_for(self.dtype, library), self.conjugate)

    def _flops(self) -> int:
        return int(5 * self.n * max(1.0, float(np.log2(self.n))))


class Cosine(Operator):
    """Orthonormal discrete cosine transform of type 2 or 3, by ``scipy.fft``. Made by :func:`cosine`.

    ``C[j, k] = sqrt(2/n) c_j cos(pi j (2 k + 1) / (2 n))`` with ``c_0 = 1/sqrt(2)``, else 1 (type 2); type 3 is its
    transpose and inverse. Source: Ahmed, Natarajan, Rao, IEEE Trans. Computers 23, 1974. NumPy arrays only.

    Examples
    --------
    >>> import numpy as np, structmat as sm
    >>> C = sm.cosine(4)
    >>> bool(np.allclose((C.T @ C).to_dense(), np.eye(4)))
    True
    """

    __slots__ = ("type",)
    fields = ("n", "type", "dtype")
    type: int

    def __init__(self, n: int, type: int = 2, dtype: DType = float) -> None:
        dtype = arrays.as_dtype(dtype)
        if type not in (2, 3):
            raise ValueError(f"cosine: expected type 2 or 3, got {type}")
        if n < 1:
            raise ValueError(f"cosine: expected a size of at least 1, got {n}")
        if arrays.is_torch_dtype(dtype) or dtype.kind not in "fc":
            raise TypeError(f"cosine: expected a floating or complex dtype of NumPy, got {dtype}")
        self._init((int(n), int(n)), dtype, "numpy", "cpu", type=type)

    @property
    def n(self) -> int:
        """Size."""
        return self.shape[0]

    def _matmat(self, x: Array) -> Array:
        from scipy.fft import dct

        dtype = result_dtype(self, x)
        return arrays.cast(np.asarray(dct(arrays.cast(x, dtype), type=self.type, axis=-2, norm="ortho")), dtype)

    def _transpose(self) -> Operator:
        return Cosine(self.n, 5 - self.type, self.dtype)

    def _conj(self) -> Operator:
        return self

    def _cast(self, dtype: DType) -> Operator:
        return Cosine(self.n, self.type, dtype)

    def _moved(self, library: str, device: Any) -> Operator:
        if library != "numpy":
            raise TypeError(f"to: the cosine transform is SciPy's and cannot move to {device or library}")
        return self

    def _flops(self) -> int:
        return int(5 * self.n * max(1.0, float(np.log2(self.n))))


def fourier(n: int, dtype: DType = complex) -> Fourier:
    """The discrete Fourier transform of size ``n``, unnormalised, as ``numpy.fft.fft``; see :class:`Fourier`.

    Examples
    --------
    >>> import structmat as sm
    >>> sm.fourier(4).inv()
    <0.25 * Fourier(4x4): 4x4 complex128>
    """
    return Fourier(n, dtype)


def hadamard(n: int, dtype: DType = float) -> Kronecker:
    """Sylvester's Hadamard matrix of size ``n = 2^J``: the Kronecker product of ``J`` matrices ``[[1, 1], [1, -1]]``.

    Entries 1 and -1, unnormalised: ``H @ H = n I``. Source: Sylvester, Phil. Mag. 34, 1867.

    Raises
    ------
    ValueError
        If ``n`` is not a power of two.

    Examples
    --------
    >>> import structmat as sm
    >>> sm.hadamard(4).to_dense()[3].tolist()
    [1.0, -1.0, -1.0, 1.0]
    """
    if n < 1 or n & (n - 1):
        raise ValueError(f"hadamard: expected a power of two, got {n}")
    dtype = arrays.as_dtype(dtype)
    core = np.array([[1.0, 1.0], [1.0, -1.0]], arrays.dtype_for(dtype, "numpy"))
    core = arrays.cast(arrays.convert(core, "torch"), dtype) if arrays.is_torch_dtype(dtype) else core
    return Kronecker(*([arrays.copy(core) for _ in range(n.bit_length() - 1)] or [core[:1, :1]]))


def cosine(n: int, type: int = 2, dtype: DType = float) -> Cosine:
    """The orthonormal discrete cosine transform of size ``n``, as ``scipy.fft.dct(norm="ortho")``; see :class:`Cosine`.

    Examples
    --------
    >>> import structmat as sm
    >>> sm.cosine(4).inv() @ sm.cosine(4)
    <Identity(4x4): 4x4 float64>
    """
    return Cosine(n, type, dtype)
