"""The kernels without weights: the Hadamard transform and the exchange of two digits of an index.

As in :mod:`structmat.backends.cuda.sources`, which exports them, a maker returns ``None`` where its kernel does not fit.
"""

from __future__ import annotations

from functools import cache

from structmat.backends.cuda.kernel import ITEMSIZE, TYPES, Kernel, Launch, check_alignment, source

# ---- Hadamard transform ---------------------------------------------------------------------------------------------

HADAMARD_LIMITS = {"float32": 32768, "float16": 16384, "bfloat16": 16384}
HADAMARD_THREADS = 128  # of a block, at least, where a row needs fewer
HADAMARD_REGISTERS = 128


@cache
def hadamard_kernel(dtype: str, n: int) -> Kernel | None:
    """Sylvester's Hadamard matrix of size ``n`` applied to rows: ``y = scale * H x``, summed in float32, rounded once.

    Parameters
    ----------
    dtype
        ``"float32"``, ``"float16"`` or ``"bfloat16"``.
    n
        Size.

    Returns
    -------
    Kernel or None
        ``None`` unless ``n`` is a power of two from one 16-byte access (4 or 8 elements) up to 16384,
        in float32 up to 32768.

    Examples
    --------
    >>> hadamard_kernel("bfloat16", 4096).name
    'hadamard<__nv_bfloat16, 4096, 8, 8, 2, 2>'
    >>> hadamard_kernel("float32", 96) is None
    True
    """
    if n < 1 or n & (n - 1) or n > HADAMARD_LIMITS.get(dtype, 0):
        return None
    piece = 16 // ITEMSIZE[dtype]
    if n < piece:
        return None
    pieces = n // piece
    chunks = max(1, min(pieces // 32, 64 // piece))  # of a thread: up to 64 numbers, and a whole warp for a row first
    threads = pieces // chunks
    warps, rows = max(1, threads // 32), max(1, HADAMARD_THREADS // threads)
    t = TYPES[dtype]
    return Kernel(
        source("hadamard.cuh"),
        f"hadamard<{t}, {n}, {piece}, {chunks}, {warps}, {rows}>",
        threads=threads * rows,
        shared=4 * n * rows if warps > 1 else 0,
        registers=HADAMARD_REGISTERS,
        parameters=(f"const {t}*", f"{t}*", "float", "int", "long long", "long long"),
        rows=rows,
    )


def hadamard_launch(kernel: Kernel, x: int, y: int, scale: float, rows: int, x_stride: int, y_stride: int) -> Launch:
    """Arguments of :func:`hadamard_kernel`: addresses, factor of the result, samples, strides of their rows in elements.

    Raises
    ------
    ValueError
        If an address or stride is not a multiple of 16 bytes, or there is no row.
    """
    itemsize = 4 if kernel.parameters[0] == "const float*" else 2
    check_alignment(kernel, rows, {"x": x, "y": y}, {"x": x_stride, "y": y_stride}, itemsize)
    return kernel.launch(kernel.grid(rows), x, y, scale, rows, x_stride, y_stride)


# ---- exchange of two digits -----------------------------------------------------------------------------------------

TRANSPOSE_BLOCKS = 1 << 20  # more tiles are taken in turns


@cache
def transpose_kernel(itemsize: int) -> Kernel | None:
    """Rows with two digits of their index exchanged: ``y[b, h, l, o] = x[b, h, o, l]``, for elements of any type.

    Parameters
    ----------
    itemsize
        Bytes of an element: 2, 4, 8 or 16. Trailing digits that stay may be part of the element.

    Returns
    -------
    Kernel or None
        ``None`` for other sizes.

    Examples
    --------
    >>> transpose_kernel(8).shared, transpose_kernel(3)
    (8448, None)
    """
    if itemsize not in (2, 4, 8, 16):
        return None
    return Kernel(
        source("transpose.cuh"),
        f"transpose<{itemsize}>",
        threads=256,
        shared=32 * 33 * itemsize,
        registers=64,
        parameters=("const void*", "void*", *["int"] * 4, *["long long"] * 2),
        rows=1,
    )


def transpose_launch(
    kernel: Kernel, x: int, y: int, rows: int, heads: int, outer: int, lanes: int, x_stride: int, y_stride: int
) -> Launch:
    """Arguments of :func:`transpose_kernel`: ``x (rows, heads, outer, lanes)``, strides of its rows in elements.

    Addresses must be multiples of the element's size.

    Raises
    ------
    ValueError
        If a size is less than 1.
    """
    if min(rows, heads, outer, lanes) < 1:
        raise ValueError(f"{kernel.name}: expected sizes of at least 1, got {(rows, heads, outer, lanes)}")
    tiles = rows * heads * -(-outer // 32) * -(-lanes // 32)
    grid = (min(tiles, TRANSPOSE_BLOCKS), 1, 1)
    return kernel.launch(grid, x, y, rows, heads, outer, lanes, x_stride, y_stride)
