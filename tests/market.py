"""The market: named operators with their dense twins, over families, dtypes and shapes.

Dense twins are built here from the definitions, entry by entry or by NumPy, never by the library's own kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np

import structmat as sm
from structmat.patterns import AxisOrder

DTYPES = (np.float32, np.float64, np.complex64, np.complex128)


@dataclass(frozen=True)
class Pair:
    """One entry of the market."""

    name: str
    operator: sm.Operator
    dense: np.ndarray

    def __repr__(self) -> str:
        return self.name


def entries(shape: tuple[int, ...], dtype, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape)
    if np.dtype(dtype).kind == "c":
        x = x + 1j * rng.standard_normal(shape)
    return x.astype(dtype)


def dense_factor(blocks: np.ndarray) -> np.ndarray:
    """A Kronecker-sparse factor from its definition: blocks (a, d, b, c)."""
    a, d, b, c = blocks.shape
    full = np.zeros((a, b, d, a, c, d), blocks.dtype)
    for i in range(a):
        for l in range(d):
            full[i, :, l, i, :, l] = blocks[i, l]
    return full.reshape(a * b * d, a * c * d)


def dense_chain(factors, shape=None, out_order=None, in_order=None) -> np.ndarray:
    full = dense_factor(factors[0])
    for f in factors[1:]:
        full = full @ dense_factor(f)
    if out_order is not None:
        full = full[out_order.permutation()]
    if in_order is not None:
        full = full[:, np.argsort(in_order.permutation())]
    m, n = shape or full.shape
    return full[:m, :n]


def dense_monarch(left: np.ndarray, right: np.ndarray, shape=None) -> np.ndarray:
    """M[i l + j, kappa p + t] = sum_rho left[j, i, kappa r + rho] right[kappa, rho l + j, t]."""
    l, s, kr = left.shape
    k, _, p = right.shape
    r = kr // k
    four = np.einsum("jikr,krjt->ijkt", left.reshape(l, s, k, r), right.reshape(k, r, l, p))
    full = four.reshape(s * l, k * p)
    m, n = shape or full.shape
    return full[:m, :n]


def dense_btt(left: np.ndarray, right: np.ndarray, shape=None) -> np.ndarray:
    """Contiguous blocks W[f, :, g, :] = left[f, :, (g rho)] @ right[g, (rho f), :]."""
    f, e, gr = left.shape
    g, _, a = right.shape
    r = gr // g
    four = np.einsum("fegr,grfa->fega", left.reshape(f, e, g, r), right.reshape(g, r, f, a))
    full = four.reshape(f * e, g * a)
    m, n = shape or full.shape
    return full[:m, :n]


def block_diag(*blocks: np.ndarray) -> np.ndarray:
    full = np.zeros((sum(b.shape[0] for b in blocks), sum(b.shape[1] for b in blocks)), np.result_type(*blocks))
    i = j = 0
    for b in blocks:
        full[i : i + b.shape[0], j : j + b.shape[1]] = b
        i, j = i + b.shape[0], j + b.shape[1]
    return full


def _dense(dtype) -> Iterator[tuple[str, sm.Operator, np.ndarray]]:
    for shape in ((6, 6), (7, 5), (3, 11), (1, 1), (13, 1)):
        a = entries(shape, dtype, 1)
        yield f"dense-{shape[0]}x{shape[1]}", sm.Dense(a), a
    a = np.outer(entries((6,), dtype, 2), entries((6,), dtype, 3))
    yield "dense-singular", sm.Dense(a), a
    yield "dense-zero", sm.Dense(np.zeros((6, 6), dtype)), np.zeros((6, 6), dtype)


def _simple(dtype):
    for n in (1, 6, 13):
        yield f"identity-{n}", sm.Identity(n, dtype), np.eye(n, dtype=dtype)
        v = entries((n,), dtype, 4)
        yield f"diagonal-{n}", sm.Diagonal(v), np.diag(v)
        p = np.random.default_rng(n).permutation(n)
        yield f"permutation-{n}", sm.Permutation(p, dtype), np.eye(n, dtype=dtype)[p]
    yield (
        "diagonal-zero-entry",
        sm.Diagonal(np.array([1, 0, -2, 3, 0, 1], dtype)),
        np.diag([1, 0, -2, 3, 0, 1]).astype(dtype),
    )
    p = np.arange(6).reshape(2, 3).T.ravel()
    yield "permutation-transposition", sm.Permutation(p, dtype), np.eye(6, dtype=dtype)[p]
    for shape in ((6, 6), (7, 5), (1, 1)):
        yield f"zero-{shape[0]}x{shape[1]}", sm.Zero(shape, dtype), np.zeros(shape, dtype)


def _block_diagonal(dtype):
    for (count, p, q), shape in (
        ((3, 2, 2), None),
        ((2, 3, 3), None),
        ((2, 3, 4), None),
        ((4, 3, 2), (11, 7)),
        ((1, 1, 1), None),
    ):
        b = entries((count, p, q), dtype, 5)
        full = block_diag(*b)
        m, n = shape or full.shape
        yield f"block_diagonal-{count}x{p}x{q}-{m}x{n}", sm.BlockDiagonal(b, shape), full[:m, :n]


def _low_rank(dtype):
    for (m, n), r in (
        ((6, 6), 2),
        ((7, 5), 1),
        ((3, 11), 3),
        ((1, 1), 1),
        ((6, 6), 6),
        ((6, 6), 0),
        ((5, 7), 9),
        ((4, 4), 6),
    ):
        u, v = entries((m, r), dtype, 6), entries((r, n), dtype, 7)
        yield f"low_rank-{m}x{n}-r{r}", sm.LowRank(u, v), u @ v


def _interpolative(dtype):
    for (m, n), r, side in (
        ((6, 6), 2, "rows"),
        ((6, 6), 2, "columns"),
        ((7, 5), 1, "rows"),
        ((3, 11), 2, "columns"),
        ((1, 1), 1, "rows"),
        ((6, 6), 6, "rows"),
        ((6, 6), 0, "rows"),
    ):
        size, other = (m, n) if side == "rows" else (n, m)
        t, b = entries((size - r, r), dtype, 47), entries((r, other), dtype, 48)
        p = np.random.default_rng(size).permutation(size)
        full = np.empty((size, other), dtype)
        full[p[:r]], full[p[r:]] = b, t @ b
        t, b, full = (t, b, full) if side == "rows" else (t.T, b.T, full.T)
        yield f"interpolative-{m}x{n}-r{r}-{side}", sm.Interpolative(p, t, b, side), full


def _interpolative_blocks(dtype):
    for (l, k, s, p), r, shape, contiguous, strided in (
        ((2, 3, 3, 2), 1, None, False, False),
        ((2, 2, 4, 3), 2, (7, 5), True, False),
        ((2, 3, 2, 4), 2, (4, 11), False, True),
        ((2, 3, 3, 2), 1, None, True, True),
        ((1, 1, 1, 1), 1, None, False, False),
    ):
        t, left = entries((k, l, r, p - r), dtype, 49), entries((l, s, k * r), dtype, 50)
        index = np.argsort(np.random.default_rng(l + k).random((k, l, p)), axis=-1)
        full = np.zeros((l, s, k, p), dtype)
        for j in range(l):
            for i in range(k):
                b = left[j, :, i * r : (i + 1) * r]
                full[j][:, i, index[i, j]] = np.hstack([b, b @ t[i, j]])
        full = full if contiguous else full.transpose(1, 0, 2, 3)
        full = (full.transpose(0, 1, 3, 2) if strided else full).reshape(l * s, k * p)
        m, n = shape or full.shape
        orders = AxisOrder((s, l), (1, 0)) if contiguous else None, AxisOrder((p, k), (1, 0)) if strided else None
        name = f"interpolative_blocks-{m}x{n}-{l}x{k}-r{r}" + "-contiguous" * contiguous + "-strided" * strided
        operator = sm.InterpolativeBlocks(index, t, left, shape, *orders)
        yield name, operator, full[:m, :n]
        yield name + "-transposed", operator.T, full[:m, :n].T


def _kronecker(dtype):
    for shapes in (
        ((2, 2), (3, 3)),
        ((2, 3), (3, 2)),
        ((2, 3), (1, 2), (4, 1)),
        ((3, 2), (2, 5)),
        ((1, 1), (1, 1)),
        ((7, 5),),
    ):
        fs = [entries(s, dtype, 8 + i) for i, s in enumerate(shapes)]
        full = fs[0]
        for f in fs[1:]:
            full = np.kron(full, f)
        yield "kronecker-" + "-".join(f"{m}x{n}" for m, n in shapes), sm.Kronecker(*fs), full
    d, m = entries((3,), dtype, 9), entries((2, 2), dtype, 10)
    yield "kronecker-of-operators", sm.Kronecker(sm.Dense(m), sm.Diagonal(d)), np.kron(m, np.diag(d))
    l, r = entries((2, 1, 2), dtype, 11), entries((2, 2, 1), dtype, 12)
    yield (
        "kronecker-of-monarch",
        sm.Kronecker(sm.Monarch(l, r), sm.Identity(3, dtype)),
        np.kron(dense_monarch(l, r), np.eye(3, dtype=dtype)),
    )


def _monarch(dtype):
    cases = (
        ((2, 3, 2), (2, 2, 3), None),  # square, rank 1
        ((3, 2, 2), (2, 3, 3), None),
        ((3, 4, 4), (2, 6, 5), None),  # rank 2, rectangular
        ((2, 4, 3), (3, 2, 4), (7, 11)),  # padded, primes
        ((1, 1, 1), (1, 1, 1), None),
        ((2, 3, 4), (2, 4, 3), None),  # rank 2, square
        ((2, 8, 2), (2, 2, 8), None),  # few blocks, so that sums of block ranks stay below dense
    )
    for left, right, shape in cases:
        l, r = entries(left, dtype, 13), entries(right, dtype, 14)
        full = dense_monarch(l, r, shape)
        name = f"monarch-{left[0]}.{right[0]}-{full.shape[0]}x{full.shape[1]}-r{left[2] // right[0]}"
        operator = sm.Monarch(l, r, shape)
        yield name, operator, full
        yield name + "-transposed", operator.T, full.T


def _block_tensor_train(dtype):
    for left, right, shape in (
        ((2, 3, 2), (2, 2, 3), None),
        ((3, 4, 4), (2, 6, 5), None),
        ((2, 4, 3), (3, 2, 4), (7, 11)),
        ((2, 8, 2), (2, 2, 8), None),
        ((1, 1, 1), (1, 1, 1), None),
    ):
        l, r = entries(left, dtype, 15), entries(right, dtype, 16)
        full = dense_btt(l, r, shape)
        name = f"btt-{left[0]}.{right[0]}-{full.shape[0]}x{full.shape[1]}-r{left[2] // right[0]}"
        operator = sm.BlockTensorTrain([l, r], shape)
        yield name, operator, full
        yield name + "-transposed", operator.T, full.T
    q, p, r = (2, 3, 2), (3, 2, 2), (1, 2, 3, 1)
    cores = [
        entries((int(np.prod(p[:i])), int(np.prod(q[i + 1 :])), r[i] * q[i], p[i] * r[i + 1]), dtype, 17 + i)
        for i in range(3)
    ]
    order = AxisOrder(q, (2, 1, 0))
    yield "btt-3-cores-12x12", sm.BlockTensorTrain(cores), dense_chain(cores, None, order)
    yield "btt-3-cores-11x7", sm.BlockTensorTrain(cores, (11, 7)), dense_chain(cores, (11, 7), order)


def _butterfly(dtype):
    for patterns, shape in (
        (((1, 2, 2, 4), (2, 2, 2, 2), (4, 2, 2, 1)), None),
        (((1, 3, 2, 2), (2, 2, 3, 1)), None),
        (((1, 3, 2, 2), (2, 2, 3, 1)), (5, 5)),
        (((1, 1, 1, 1),), None),
    ):
        fs = [entries((a, d, b, c), dtype, 20 + i) for i, (a, b, c, d) in enumerate(patterns)]
        full = dense_chain(fs, shape)
        yield f"butterfly-{len(fs)}-{full.shape[0]}x{full.shape[1]}", sm.Butterfly(fs, shape), full


def _chain(dtype):
    fs = [entries(s, dtype, 23 + i) for i, s in enumerate(((2, 3, 2, 1), (1, 6, 1, 3), (3, 2, 3, 2)))]  # not chainable
    yield "chain-12x12", sm.Chain(fs), dense_chain(fs)
    orders = {"out_order": AxisOrder((3, 4), (1, 0)), "in_order": AxisOrder((2, 2, 3), (2, 0, 1))}
    yield "chain-with-orders", sm.Chain(fs, **orders), dense_chain(fs, None, **orders)
    yield "chain-with-orders-11x7", sm.Chain(fs, (11, 7), **orders), dense_chain(fs, (11, 7), **orders)
    square = [entries(s, dtype, 26 + i) for i, s in enumerate(((1, 3, 2, 2), (2, 1, 3, 3)))]
    yield (
        "chain-square-6x6",
        sm.Chain(square, None, AxisOrder((2, 3), (1, 0))),
        dense_chain(square, None, AxisOrder((2, 3), (1, 0))),
    )


def _block_sparse(dtype):
    for (p, q), shape in (((2, 3), (6, 6)), ((2, 3), (7, 11)), ((2, 2), (5, 7))):
        grid = -(-shape[0] // p), -(-shape[1] // q)
        rows, cols = sm.flat_block_butterfly(grid)
        rows, cols = np.r_[rows, 0], np.r_[cols, 0]  # one place twice
        blocks = entries((len(rows), p, q), dtype, 28)
        full = np.zeros((grid[0] * p, grid[1] * q), dtype)
        for b, i, j in zip(blocks, rows, cols, strict=True):
            full[i * p : (i + 1) * p, j * q : (j + 1) * q] += b
        name = f"block_sparse-{shape[0]}x{shape[1]}"
        yield name, sm.BlockSparse(blocks, rows, cols, shape), full[: shape[0], : shape[1]]
    b = entries((1, 1, 1), dtype, 29)
    yield "block_sparse-1x1", sm.BlockSparse(b, [0], [0], (1, 1)), b[0]


def _toeplitz(dtype):
    import scipy.linalg

    for m, n in ((6, 6), (7, 4), (1, 5), (1, 1)):
        c, r = entries((m,), dtype, 50), entries((n,), dtype, 51)
        yield f"toeplitz-{m}x{n}", sm.Toeplitz(c, r), scipy.linalg.toeplitz(c, r)
    for n in (1, 6, 7):
        c = entries((n,), dtype, 52)
        yield f"circulant-{n}", sm.Circulant(c), scipy.linalg.circulant(c)


def _transforms(dtype):
    for n in (1, 6, 7):
        if np.dtype(dtype).kind == "c":
            j = np.arange(n)
            f = np.exp(-2j * np.pi * (np.outer(j, j) % n) / n).astype(dtype)
            yield f"fourier-{n}", sm.fourier(n, dtype), f
            yield f"fourier-{n}-conjugated", sm.fourier(n, dtype).conj(), f.conj()
        weights = np.where(np.arange(n) == 0, np.sqrt(0.5), 1) * np.sqrt(2 / n)
        c = weights[:, None] * np.cos(np.pi * np.outer(np.arange(n), 2 * np.arange(n) + 1) / (2 * n))
        yield f"cosine-{n}", sm.cosine(n, dtype=dtype), c.astype(dtype)
        yield f"cosine-{n}-transposed", sm.cosine(n, 3, dtype), c.T.astype(dtype)
    yield "hadamard-8", sm.hadamard(8, dtype), scipy_hadamard(8).astype(dtype)


def scipy_hadamard(n):
    import scipy.linalg

    return scipy.linalg.hadamard(n)


def _external(dtype):
    import scipy.sparse

    a = entries((6, 6), dtype, 30) * (np.random.default_rng(0).random((6, 6)) < 0.5)
    yield "external-csr", sm.as_operator(scipy.sparse.csr_array(a)), a


def _composite(dtype):
    a, b = entries((6, 6), dtype, 31), entries((6, 6), dtype, 32)
    l, r = entries((2, 3, 2), dtype, 33), entries((2, 2, 3), dtype, 34)
    monarch, dense_of_monarch = sm.Monarch(l, r), dense_monarch(l, r)
    v = entries((6,), dtype, 35)
    u, w = entries((6, 2), dtype, 36), entries((2, 6), dtype, 37)
    p = np.array([3, 0, 5, 1, 2, 4])
    yield "product", monarch @ sm.Dense(a), dense_of_monarch @ a
    yield "product-permuted", sm.Permutation(p, dtype) @ monarch, dense_of_monarch[p]
    yield "sum", monarch + sm.Dense(b), dense_of_monarch + b
    yield "sum-with-low-rank", sm.Diagonal(v) + sm.LowRank(u, w), np.diag(v) + u @ w
    yield "pixelfly", *_pixelfly(dtype, u, w)
    yield "scaled-sum", 2 * (monarch + sm.Dense(b)), 2 * (dense_of_monarch + b)
    yield "scaled-identity", 3 * sm.Identity(6, dtype), 3 * np.eye(6, dtype=dtype)
    well = sm.Identity(6, dtype) * 10 + monarch
    yield "inverse-lazy", well.inv(), np.linalg.inv(10 * np.eye(6, dtype=dtype) + dense_of_monarch)
    kron, dense_of_kron = sm.Kronecker(a[:2, :2], b[:3, :3]), np.kron(a[:2, :2], b[:3, :3])
    yield "product-invertible", sm.Permutation(p, dtype) @ kron, dense_of_kron[p]
    yield "direct-sum-invertible", sm.block_diag(kron, sm.Dense(a[:2, :2])), block_diag(dense_of_kron, a[:2, :2])
    yield "hstack", sm.hstack([monarch, sm.Dense(a)]), np.hstack([dense_of_monarch, a])
    yield "vstack", sm.vstack([monarch, sm.Dense(a)]), np.vstack([dense_of_monarch, a])
    yield "direct-sum", sm.block_diag(monarch, sm.Diagonal(v)), block_diag(dense_of_monarch, np.diag(v))
    yield "direct-sum-rectangular", sm.block_diag(sm.Dense(u), sm.Dense(w)), block_diag(u, w)
    rows, cols = np.array([4, 1, 1]), np.array([5, 0, 2, 2])
    yield "slice", monarch[np.ix_(rows, cols)], dense_of_monarch[np.ix_(rows, cols)]


def _pixelfly(dtype, u, w):
    rows, cols = sm.flat_block_butterfly((3, 3), levels=1)
    blocks = entries((len(rows), 2, 2), dtype, 38)
    full = np.zeros((6, 6), dtype)
    for b, i, j in zip(blocks, rows, cols, strict=True):
        full[2 * i : 2 * i + 2, 2 * j : 2 * j + 2] += b
    return sm.BlockSparse(blocks, rows, cols, (6, 6)) + sm.LowRank(u, w), full + u @ w


def _batched(dtype):
    a, v = entries((2, 4, 3), dtype, 40), entries((2, 4), dtype, 41)
    u, w = entries((2, 4, 2), dtype, 42), entries((2, 2, 3), dtype, 43)
    l, r = entries((2, 2, 3, 2), dtype, 44), entries((2, 2, 2, 3), dtype, 45)
    stack = lambda f, *parts: np.stack([f(*(p[i] for p in parts)) for i in range(2)])  # noqa: E731
    yield "batched-dense", sm.Dense(a), a
    yield "batched-diagonal", sm.Diagonal(v), stack(np.diag, v)
    yield "batched-low_rank", sm.LowRank(u, w), u @ w
    yield "batched-monarch", sm.Monarch(l, r), stack(dense_monarch, l, r)
    yield (
        "batched-kronecker",
        sm.Kronecker(a, entries((2, 2), dtype, 46)),
        stack(lambda x: np.kron(x, entries((2, 2), dtype, 46)), a),
    )
    yield "batched-kronecker-right", sm.Kronecker(a[0], sm.Diagonal(v)), stack(lambda x: np.kron(a[0], np.diag(x)), v)
    yield "batched-block_diagonal", sm.BlockDiagonal(l), stack(lambda b: block_diag(*b), l)
    yield "batched-sum", sm.LowRank(u, w) + sm.Dense(a[0]), u @ w + a[0]
    yield "batched-product", sm.Diagonal(v) @ sm.Dense(a[0]), stack(lambda x: np.diag(x) @ a[0], v)


MAKERS: tuple[Callable, ...] = (
    _batched,
    _dense,
    _simple,
    _block_diagonal,
    _low_rank,
    _interpolative,
    _interpolative_blocks,
    _kronecker,
    _monarch,
    _block_tensor_train,
    _butterfly,
    _chain,
    _block_sparse,
    _toeplitz,
    _transforms,
    _external,
    _composite,
)


@cache
def market() -> tuple[Pair, ...]:
    """All pairs."""
    return tuple(
        Pair(f"{name}-{np.dtype(dtype).name}", operator, np.asarray(dense))
        for dtype in DTYPES
        for maker in MAKERS
        for name, operator, dense in maker(dtype)
    )


@cache
def small_market() -> tuple[Pair, ...]:
    """One real and one complex dtype."""
    return tuple(p for p in market() if p.name.endswith(("float64", "complex128")))


def names(pairs) -> list[str]:
    return [p.name for p in pairs]
