"""In what precision products on a GPU are multiplied and accumulated: chosen by the caller, never by the environment.

================  ==========================  =====================
values            products and sums in        cuBLAS compute type
================  ==========================  =====================
float16 bfloat16  float32 (exact products)    ``COMPUTE_32F``
float32           float32, or TF32 products   ``COMPUTE_32F``, ``COMPUTE_32F_FAST_TF32``
float64           float64                     ``COMPUTE_64F``
complex64         float32, or TF32 products   as float32
complex128        float64                     ``COMPUTE_64F``
================  ==========================  =====================

Results are rounded once to the dtype of the values; an intermediate of a chain is held in that dtype too. cuBLAS may split
a long contraction of 16-bit values and add its parts in 16 bits; it is not asked not to.
"""

from __future__ import annotations

from contextvars import ContextVar, Token
from functools import cache
from types import TracebackType
from typing import NamedTuple

import numpy as np

from structmat.arrays import DType

PRECISIONS = ("exact", "tf32")
_chosen: ContextVar[str] = ContextVar("structmat_precision", default="exact")


class Compute(NamedTuple):
    """How cuBLAS is told about a dtype."""

    data_type: int  # cudaDataType_t
    compute_type: int  # cublasComputeType_t
    scalar: str  # NumPy's code of alpha and beta


_EXACT = {
    "float16": Compute(2, 68, "f"),
    "bfloat16": Compute(14, 68, "f"),
    "float32": Compute(0, 68, "f"),
    "float64": Compute(1, 70, "d"),
    "complex64": Compute(4, 68, "F"),
    "complex128": Compute(5, 70, "D"),
}
_TF32 = {
    name: compute._replace(compute_type=77) for name, compute in _EXACT.items() if name in ("float32", "complex64")
}


class use_precision:  # noqa: N801 (reads as a verb, as use_backend)
    """Choose how float32 products on a GPU are multiplied, from here on in this thread or for a ``with`` block.

    Parameters
    ----------
    name
        ``"exact"`` (the default): float32 products and sums. ``"tf32"``: factors are rounded to 10 bits of mantissa on the
        tensor cores, sums stay in float32; relative errors of about 3e-4, and several times the rate. Other dtypes have one
        way each (the table in ``structmat/backends/cuda/precision.py``).

    Raises
    ------
    ValueError
        For any other name.

    Notes
    -----
    It concerns the products that this library launches itself on CuPy arrays. torch has its own switch
    (``torch.backends.cuda.matmul.allow_tf32``).

    Examples
    --------
    >>> import structmat as sm
    >>> with sm.backends.use_precision("tf32"):
    ...     y = sm.Identity(3) @ [1.0, 2.0, 3.0]
    """

    def __init__(self, name: str) -> None:
        if name not in PRECISIONS:
            raise ValueError(f"use_precision: expected one of {', '.join(PRECISIONS)}; got {name!r}")
        self._token: Token[str] = _chosen.set(name)

    def __enter__(self) -> use_precision:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _chosen.reset(self._token)


def precision() -> str:
    """The precision chosen in this context."""
    return _chosen.get()


def compute_for(dtype: DType) -> Compute | None:
    """How products of a dtype are computed in this context; ``None`` for dtypes that cuBLAS does not multiply.

    Examples
    --------
    >>> compute_for("float16").compute_type == 68  # accumulated in float32
    True
    """
    return _compute(dtype, _chosen.get())


@cache
def _compute(dtype: DType, precision: str) -> Compute | None:
    name = np.dtype(dtype).name
    return (_TF32 if precision == "tf32" and name in _TF32 else _EXACT).get(name)
