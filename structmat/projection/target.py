"""Target: the matrix to project, checked, in double precision; and results taken back to its library and dtype."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np

from structmat import arrays
from structmat.algebra import Sum
from structmat.arrays import Array
from structmat.operator import Operator
from structmat.projection.certificate import frobenius
from structmat.projection.device import DeviceArray, current
from structmat.projection.placement import accelerated
from structmat.structures.external import as_operator


def read(W: Any, device: str | None = "host") -> tuple[Array, np.ndarray]:
    """``W`` as an array of its own library, and as a matrix of float64 or complex128 (never written to).

    The matrix is NumPy's, but for ``device="own"``, and for ``None`` where ``W`` is on an accelerator: then it is a
    :class:`structmat.projection.device.DeviceArray` where ``W`` is. Operators, SciPy sparse matrices and LinearOperators are
    made dense. Raises ``TypeError`` for what holds no numbers and ``ValueError`` for anything but one finite matrix with at
    least one row and column.
    """
    source = arrays.values(W if not _is_operator(W) else as_operator(W).to_dense(), "W")
    if source.ndim != 2 or 0 in tuple(source.shape):
        raise ValueError(f"W: expected one matrix (m, n) with m, n >= 1, got shape {tuple(source.shape)}")
    exact = np.complex128 if arrays.is_complex(source.dtype) else np.float64
    library = arrays.kind(source)
    values = source.detach() if library == "torch" else source
    stays = library != "numpy" and (device == "own" or (device is None and accelerated(source)))
    if library == "torch" and not stays:
        values = values.cpu()
    with current(values):
        values = arrays.cast(values, arrays.dtype_for(np.dtype(exact), library))
        target: Any = DeviceArray(values) if stays else arrays.convert(values, "numpy")
        if not math.isfinite(frobenius(target)) and not (finite := np.isfinite(target)).all():
            bad = np.argwhere(~finite)  # on the host, for the message
            first = tuple(int(i) for i in bad[0])
            raise ValueError(f"W: {len(bad)} of {target.size} entries are NaN or infinite, the first at {first}")
    return source, target


def _is_operator(W: Any) -> bool:
    if isinstance(W, Operator):
        return True
    sparse, linear = sys.modules.get("scipy.sparse"), sys.modules.get("scipy.sparse.linalg")
    return (sparse is not None and sparse.issparse(W)) or (linear is not None and isinstance(W, linear.LinearOperator))


def rounding(source: Array) -> float:
    """Relative error that storing factors in the dtype of ``source`` may add."""
    return 2.0 * float(arrays.namespace(source).finfo(source.dtype).eps)


def like(operator: Operator, source: Array) -> Operator:
    """An operator with the library, device and dtype of ``source``."""
    library = arrays.kind(source) or "numpy"
    if library == "torch":
        return operator.to("torch").astype(source.dtype).to(source.device)
    return operator.astype(source.dtype).to(library)


def safe_scale(target: np.ndarray) -> float:
    """A power of two that brings extreme entries to about 1; 1 for others, so that squares neither over- nor underflow."""
    norm = frobenius(target)
    if norm == 0.0 or (norm < 1e100 and norm > 1e-100 * math.sqrt(target.size)):
        return 1.0
    largest = float(np.max(np.abs(target)))
    return float(np.exp2(np.floor(np.log2(largest))))


def scaled(operator: Operator, scale: float) -> Operator:
    """The operator times ``scale``, in the same family."""
    if scale == 1.0:
        return operator
    return Sum(*(t * scale for t in operator.terms)) if isinstance(operator, Sum) else operator * scale
