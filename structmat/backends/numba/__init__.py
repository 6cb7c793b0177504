"""The Numba backend: explicit SIMD kernels for NumPy arrays, compiled on first use and cached on disk."""

from structmat.backends.numba.backend import NumbaBackend

__all__ = ["NumbaBackend"]
