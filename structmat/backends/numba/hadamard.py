"""The Walsh-Hadamard transform: a butterfly of sums and differences, without weights.

Source: Fino and Algazi, IEEE Trans. Computers C-25(11), 1976.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from structmat.backends.numba.network import Level, Network


def scale_of(factors: Sequence[np.ndarray]) -> tuple[float, ...] | None:
    """``(scale,)`` if ``factors`` are ``s_i [[1, 1], [1, -1]]``, whose Kronecker product is ``scale * H``, else ``None``.

    At least two real factors of one dtype, float32 or float64, without batch dimensions; ``scale = prod_i s_i``.
    """
    if len(factors) < 2:
        return None
    dtype = factors[0].dtype
    scale = 1.0
    for f in factors:
        if f.shape != (2, 2) or f.dtype != dtype or f.dtype not in (np.float32, np.float64):
            return None
        s = float(f[0, 0])
        if not np.isfinite(s) or f[0, 1] != s or f[1, 0] != s or f[1, 1] != -s:
            return None
        scale *= s
    limits = np.finfo(dtype)
    if scale and not float(limits.tiny) <= abs(scale) <= float(limits.max):
        return None
    return (scale,)


class HadamardPlan:
    """``y = scale * H x`` for Sylvester's matrix ``H`` of size ``n = 2^J >= 4``, entries 1 and -1.

    Parameters
    ----------
    n
        Size, a power of two of at least 4.
    scale
        A number; 1 costs nothing.
    dtype
        float32 or float64.

    Notes
    -----
    ``n log2(n)`` flops per sample.
    """

    def __init__(self, n: int, scale: float, dtype: np.dtype | type) -> None:
        if n < 4 or n & (n - 1):
            raise ValueError(f"HadamardPlan: expected a power of two of at least 4, got {n}")
        levels = [Level(bit, None) for bit in range(n.bit_length() - 1)]
        self.network = Network(n, np.dtype(dtype), levels, scale=scale)

    def columns(self, x: np.ndarray, out: np.ndarray, start: int = 0, stop: int | None = None) -> None:
        """Write ``scale * H x`` for the columns ``start .. stop`` of C-contiguous ``x (n, k)`` to ``out (n, k)``."""
        self.network.columns(x, out, start, x.shape[1] if stop is None else stop)

    def rows(self, x: np.ndarray, out: np.ndarray, start: int = 0, stop: int | None = None) -> None:
        """Write ``scale * x H`` for the rows ``start .. stop`` of C-contiguous ``x (k, n)`` to ``out (k, n)``."""
        self.network.rows(x, out, start, x.shape[0] if stop is None else stop)
