"""Calls of cuBLAS on raw pointers: ``cupy.matmul`` copies strided batches, upcasts float16 and knows no bfloat16."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np

from structmat.arrays import Array
from structmat.backends.cuda.precision import Compute
from structmat.backends.cuda.products import Gemm
from structmat.backends.cupy import capture, library

ALGORITHM = -1  # CUBLAS_GEMM_DEFAULT


@cache
def _scalar(value: float, code: str) -> np.ndarray:
    """A number in host memory that lives as long as this module: cuBLAS takes addresses of alpha and beta."""
    return np.array(value, code)


def multiply(
    calls: Sequence[Gemm], compute: Compute, itemsize: int, left: int, right: int, out: int, add: bool = False
) -> Array | None:
    """Launch products on the current stream of the current device; with ``add`` they are added to the result.

    Parameters
    ----------
    calls
        What to multiply: sizes, strides and offsets in elements.
    compute, itemsize
        The one dtype of all three arrays.
    left, right, out
        Addresses in device memory.

    Returns
    -------
    cupy.ndarray or None
        The workspace of products that were captured into a CUDA graph, which needs it, and the memory at the addresses, for
        as long as it lives; ``None`` outside a capture.
    """
    handle = library.module("cupy.cuda.device").get_cublas_handle()
    launch = library.module("cupy_backends.cuda.libs.cublas").gemmStridedBatchedEx
    kind, computed, code = compute
    one, beta = _scalar(1.0, code).ctypes.data, _scalar(1.0 if add else 0.0, code).ctypes.data
    workspace = None
    for g in calls:
        first, second = left + itemsize * g.left_offset, right + itemsize * g.right_offset
        if g.swap:
            first, second = second, first
        arguments = (
            g.first_flag, g.second_flag, g.m, g.n, g.k, one,
            first, kind, g.first_ld, g.first_stride,
            second, kind, g.second_ld, g.second_stride, beta,
            out + itemsize * g.out_offset, kind, g.out_ld, g.out_stride, g.batch, computed, ALGORITHM,
        )  # fmt: skip
        try:
            launch(handle, *arguments)
        except NotImplementedError:  # CuPy's answer during a capture
            workspace = capture.gemm(*arguments)
    return workspace
