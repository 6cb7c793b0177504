"""The kernels that exist: for which types and shapes, with which tiles, shared memory and arguments.

A maker returns ``None`` where its kernel does not fit: the caller then takes matrix products instead. All kernels read
and write 16 bytes at a time, so that addresses must be multiples of 16 bytes and so must the strides of rows
(:func:`aligned`). Rows may be padded; outputs must not overlap inputs. What a kernel computes is stated at the top of its
file in ``kernels/``.
"""

from __future__ import annotations

from functools import cache

from structmat.backends.cuda.kernel import ITEMSIZE, TENSOR_CORE_TYPES, Kernel, Launch, check_alignment, source
from structmat.backends.cuda.weightless import hadamard_kernel, hadamard_launch, transpose_kernel, transpose_launch

__all__ = [
    "ACTIVATIONS",
    "ITEMSIZE",
    "SHARED_LIMIT",
    "Kernel",
    "Launch",
    "aligned",
    "hadamard_kernel",
    "hadamard_launch",
    "kron_kernel",
    "kron_launch",
    "kron_shared",
    "monarch_kernel",
    "monarch_launch",
    "monarch_shared",
    "transpose_kernel",
    "transpose_launch",
]

SHARED_LIMIT = 163 << 10
"""Dynamic shared memory of one block on compute capability 8.0; 227 KiB on 9.0, 99 KiB on 8.6 and 8.9."""
PROCESSORS = 128  # multiprocessors that the choice of tiles counts with; only the order of magnitude matters
ACTIVATIONS = {None: 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}
"""Epilogues and their numbers in ``prelude.cuh``: ``gelu`` by the error function, ``gelu_tanh`` by its approximation."""


def aligned(address: int, stride: int, dtype: str, rows: int = 2) -> bool:
    """Whether a kernel can read or write rows at ``address`` that are ``stride`` elements apart, 16 bytes at a time.

    Examples
    --------
    >>> aligned(256, 1024, "bfloat16"), aligned(256, 1023, "bfloat16"), aligned(258, 1024, "bfloat16")
    (True, False, False)
    """
    return address % 16 == 0 and (rows < 2 or stride * ITEMSIZE[dtype] % 16 == 0)


def _activation(activation: str | None) -> int:
    if activation not in ACTIVATIONS:
        raise ValueError(f"expected an activation of {list(ACTIVATIONS)}, got {activation!r}")
    return ACTIVATIONS[activation]


# ---- two factors of blocks ------------------------------------------------------------------------------------------

MONARCH_REGISTERS = 128


def monarch_shared(depth: int, rows: int, cols: int) -> int:
    """Shared memory in bytes of a tile of ``rows`` samples and ``cols`` blocks; ``depth = K * R``. See ``MonarchTile``.

    Examples
    --------
    >>> monarch_shared(32, 64, 32)
    164352
    """
    return 2 * cols * (rows * (depth + 8) + 8)


@cache
def monarch_kernel(
    dtype: str,
    K: int,
    P: int,
    Q: int,
    S: int,
    R: int = 1,
    activation: str | None = None,
    *,
    lanes: bool = False,
    rows: int | None = None,
    shared: int = SHARED_LIMIT,
    tile: tuple[int, int] | None = None,
) -> Kernel | None:
    """Two factors of blocks, with bias and activation, in one pass: ``y = act(W x + bias)``.

    ``y[b, q, s] = act(bias[q, s] + sum_{k, r} w2[q, s, k, r] sum_p w1[k, r, q, p] x[b, k, p])``, the inner sum rounded
    to ``dtype``, everything else in float32 and rounded once. Weights are contiguous: ``w1 (K, R, Q, P)`` and
    ``w2 (Q, S, K, R)``, which are the blocks of the right and of the left factor of a Monarch or Block Tensor-Train
    operator as they are stored.

    Parameters
    ----------
    dtype
        ``"float16"`` or ``"bfloat16"``, of all arrays.
    K, P
        Number and size of the input blocks.
    Q, S
        Number and size of the output blocks.
    R
        Rank.
    activation
        One of :data:`ACTIVATIONS`.
    lanes
        Outputs in the paper's Monarch order ``(S, Q)`` (and ``bias`` too) instead of contiguous blocks ``(Q, S)``.
    rows
        Samples of a call, if known: the tile is chosen for so many, else for very many.
    shared
        Bytes of shared memory that a block of the device may use.
    tile
        Samples and blocks of a tile, instead of the choice.

    Returns
    -------
    Kernel or None
        ``None`` unless ``P`` and ``K * R`` are multiples of 16, ``Q`` and ``S`` of 8, some tile fits into ``shared``,
        and with ``lanes`` ``S`` is at most 64 and at most ``K * R + 8``.

    Raises
    ------
    ValueError
        If the activation is unknown.

    Examples
    --------
    >>> kernel = monarch_kernel("bfloat16", 32, 32, 32, 32, activation="silu")
    >>> kernel.name
    'monarch<__nv_bfloat16, 32, 32, 32, 32, 1, 64, 32, 16, 4, false>'
    >>> monarch_kernel("float32", 32, 32, 32, 32) is None
    True
    """
    number, depth = _activation(activation), K * R
    fits = dtype in TENSOR_CORE_TYPES and min(K, P, Q, S, R) > 0 and not (P % 16 or depth % 16 or Q % 8 or S % 8)
    if not fits or (lanes and min(64, depth + 8) < S):
        return None
    tiles = [tile] if tile else _monarch_tiles(K, P, Q, S, R, rows)
    chosen = next(((r, c) for r, c in tiles if Q % c == 0 and monarch_shared(depth, r, c) <= shared), None)
    if chosen is None:
        return None
    t = TENSOR_CORE_TYPES[dtype]
    r, c = chosen
    warps = 16 if monarch_shared(depth, r, c) > 80 << 10 else 8  # where one block fills a multiprocessor, a larger one
    order = "true" if lanes else "false"
    return Kernel(
        source("monarch.cuh"),
        f"monarch<{t}, {K}, {P}, {Q}, {S}, {R}, {r}, {c}, {warps}, {number}, {order}>",
        threads=32 * warps,
        shared=monarch_shared(depth, r, c),
        registers=MONARCH_REGISTERS,
        parameters=(*[f"const {t}*"] * 4, f"{t}*", "int", "long long", "long long"),
        rows=r,
        columns=Q // c,
    )


def _monarch_tiles(K: int, P: int, Q: int, S: int, R: int, rows: int | None) -> list[tuple[int, int]]:
    """Tiles (samples, blocks), best first: by the elements that the busiest multiprocessor moves through its L1 cache.

    A tile reads its samples and its share of both factors, and writes its outputs.
    """

    def cost(tile: tuple[int, int]) -> float:
        r, c = tile
        moved = r * K * P + c * (K * R * P + S * K * R) + r * c * S
        if rows is None:
            return moved / (r * c)
        blocks = -(-rows // r) * (Q // c)
        return moved * -(-blocks // PROCESSORS)

    tiles = [(r, c) for r in (16, 32, 64, 128) for c in range(8, min(Q, 64) + 1, 8) if Q % c == 0]
    return sorted(tiles, key=lambda tile: (cost(tile), tile))


def monarch_launch(
    kernel: Kernel, x: int, w1: int, w2: int, bias: int, y: int, rows: int, x_stride: int, y_stride: int
) -> Launch:
    """Arguments of :func:`monarch_kernel`: addresses (``bias`` may be 0), samples, strides of their rows in elements.

    Raises
    ------
    ValueError
        If an address or stride is not a multiple of 16 bytes, or there is no row.
    """
    arrays = {"x": x, "w1": w1, "w2": w2, "bias": bias, "y": y}
    check_alignment(kernel, rows, arrays, {"x": x_stride, "y": y_stride})
    return kernel.launch(kernel.grid(rows), x, w1, w2, bias, y, rows, x_stride, y_stride)


# ---- Kronecker products ---------------------------------------------------------------------------------------------

KRON_WARPS = 8
KRON_REGISTERS = 128  # where two blocks share a multiprocessor
KRON_PAIR = 112 << 10  # bytes of shared memory of a block up to which they do, as in kron.cuh


def kron_shared(P: int, S: int, warps: int = KRON_WARPS) -> int:
    """Shared memory in bytes of a block of ``warps`` warps, each of which keeps ``(S, P)`` with padded rows.

    Examples
    --------
    >>> kron_shared(64, 64)
    73728
    """
    return 2 * warps * S * (P + 8)


@cache
def kron_kernel(
    dtype: str, R: int, P: int, S: int, Q: int, activation: str | None = None, *, shared: int = SHARED_LIMIT
) -> Kernel | None:
    """A Kronecker product ``a (x) c`` in one pass, with bias and activation: ``y = act((a (x) c) x + bias)``.

    ``y[b, r, s] = act(bias[r, s] + sum_p a[r, p] sum_q c[s, q] x[b, p, q])``, the inner sum rounded to ``dtype``,
    everything else in float32 and rounded once. All arrays are contiguous but for the strides of rows.

    Parameters
    ----------
    dtype
        ``"float16"`` or ``"bfloat16"``, of all arrays.
    R, P
        Shape of ``a``.
    S, Q
        Shape of ``c``.
    activation
        One of :data:`ACTIVATIONS`.
    shared
        Bytes of shared memory that a block of the device may use.

    Returns
    -------
    Kernel or None
        ``None`` unless all four sizes are multiples of 16 up to 128.

    Raises
    ------
    ValueError
        If the activation is unknown.

    Examples
    --------
    >>> kron_kernel("float16", 64, 64, 32, 16).name
    'kron<__half, 64, 64, 32, 16, 8, 0>'
    >>> kron_kernel("float16", 64, 64, 32, 17) is None
    True
    """
    number = _activation(activation)
    if dtype not in TENSOR_CORE_TYPES or not all(16 <= n <= 128 and n % 16 == 0 for n in (R, P, S, Q)):
        return None
    warps = next((w for w in (KRON_WARPS, 6, 4, 2, 1) if kron_shared(P, S, w) <= shared), None)
    if warps is None:
        return None
    t = TENSOR_CORE_TYPES[dtype]
    bytes_of_block = kron_shared(P, S, warps)
    return Kernel(
        source("kron.cuh"),
        f"kron<{t}, {R}, {P}, {S}, {Q}, {warps}, {number}>",
        threads=32 * warps,
        shared=bytes_of_block,
        registers=KRON_REGISTERS if bytes_of_block <= KRON_PAIR else 255,
        parameters=(*[f"const {t}*"] * 4, f"{t}*", "int", "long long", "long long"),
        rows=warps,
        resident=max(1, min(4, shared // bytes_of_block)),
    )


def kron_launch(
    kernel: Kernel,
    x: int,
    a: int,
    c: int,
    bias: int,
    y: int,
    rows: int,
    x_stride: int,
    y_stride: int,
    processors: int = 132,
) -> Launch:
    """Arguments of :func:`kron_kernel`: addresses (``bias`` may be 0), samples, strides of their rows in elements.

    ``processors`` is the number of multiprocessors of the device.

    Raises
    ------
    ValueError
        If an address or stride is not a multiple of 16 bytes, or there is no row.
    """
    arrays = {"x": x, "a": a, "c": c, "bias": bias, "y": y}
    check_alignment(kernel, rows, arrays, {"x": x_stride, "y": y_stride})
    return kernel.launch(kernel.grid(rows, processors), x, a, c, bias, y, rows, x_stride, y_stride)
