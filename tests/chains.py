"""Chains for the tests of kernels: named ones, random ones, and a check of every kernel that a planner may choose."""

from __future__ import annotations

import math
from collections.abc import Iterator

import hypothesis.strategies as st
import numpy as np
from market import dense_chain, entries

import structmat as sm
from structmat.backends.base import ChainLayout
from structmat.patterns import AxisOrder, Pattern, prime_factors

DTYPES: tuple[type, ...] = (np.float32, np.float64)
BAND = 67  # numbers around a result that nobody may touch; odd, so that results are not aligned to vectors
SENTINEL = -7.5


def chains(dtype: type = np.float64) -> Iterator[tuple[str, sm.Chain]]:
    """Chains in every regime of the kernels: block sizes around the lanes, padding, cuts, orders, transposes."""
    options = {"dtype": dtype, "rng": 0}
    for blocks, shape in ((8, (64, 64)), (2, (64, 48)), (32, (64, 64)), (5, (40, 130)), (9, (97, 89)), (4, (144, 100))):
        yield f"monarch-{blocks}-{shape}", sm.Monarch.random(shape, blocks=blocks, **options)
    yield "monarch-rank-2", sm.Monarch.random((96, 80), blocks=8, rank=2, **options)
    yield "monarch-rank-3-padded", sm.Monarch.random((83, 101), blocks=(6, 9), rank=3, **options)
    for cores, rank, shape in (
        (2, 1, (64, 64)),
        (2, 3, (60, 84)),
        (3, 2, (64, 64)),
        (3, 1, (61, 100)),
        (4, 2, (81, 36)),
    ):
        yield f"btt-{cores}-rank-{rank}", sm.BlockTensorTrain.random(shape, cores=cores, rank=rank, **options)
    yield "butterfly-radix-2", sm.Butterfly.random((128, 128), radix=2, **options)
    yield "butterfly-radix-3", sm.Butterfly.random((81, 81), radix=3, **options)
    yield "butterfly-mixed", sm.Butterfly.random((60, 60), **options)
    yield "butterfly-prime", sm.Butterfly.random((61, 67), **options)
    yield "butterfly-cut", sm.Butterfly.random((100, 100), radix=2, **options)
    for rank in (1, 5, 19):
        yield f"low-rank-{rank}", sm.LowRank.random((70, 51), rank=rank, **options)
    for count, shape in ((5, (65, 45)), (40, (80, 80)), (3, (100, 31))):
        yield f"block-diagonal-{count}", sm.BlockDiagonal.random(shape, blocks=count, **options)
    yield "one-number", sm.Chain.random((1, 1), **options)
    yield "dense-prime", sm.Chain.random((37, 23), **options)
    patterns = [(2, 6, 4, 10), (4, 5, 7, 4)]
    yield "any-patterns", sm.Chain.random((120, 112), patterns, **options)
    factors = sm.Chain.random((120, 112), patterns, **options).factors
    ends = AxisOrder((4, 15, 2), (2, 0, 1)), AxisOrder((7, 16), (1, 0))
    yield "orders", sm.Chain(factors, None, *ends)
    yield "orders-cut", sm.Chain(factors, (113, 111), *ends)
    scattered = AxisOrder((2, 3, 20), (1, 0, 2)), AxisOrder((2, 4, 7, 2), (0, 2, 1, 3))
    yield "orders-that-scatter", sm.Chain(factors, (119, 107), *scattered)


def with_transposes(dtype: type = np.float64) -> Iterator[tuple[str, sm.Chain]]:
    """The same, and each transposed: blocks that are not contiguous, cuts at the other end."""
    for name, chain in chains(dtype):
        yield name, chain
        yield f"{name}-T", chain.T  # type: ignore[misc]


def operators(dtype):
    """One of each family with 96 columns."""
    options = {"dtype": dtype, "rng": 0}
    yield sm.Monarch.random((96, 96), blocks=8, **options)
    yield sm.Monarch.random((96, 96), blocks=2, **options).T
    yield sm.BlockTensorTrain.random((97, 96), rank=2, **options)
    yield sm.Butterfly.random((64, 96), **options)
    yield sm.Butterfly.random((96, 96), radix=2, **options)
    yield sm.LowRank.random((50, 96), rank=5, **options)
    yield sm.Kronecker.random((60, 96), **options)
    yield sm.BlockDiagonal.random((80, 96), blocks=4, **options)


def composites(dtype):
    """What is made of them: sums, which accumulate, products and blocks."""
    monarch, butterfly, *_ = (a for a in operators(dtype) if a.is_square)
    rank = sm.LowRank.random((96, 96), rank=5, dtype=dtype, rng=1)
    diagonal = sm.Diagonal(entries((96,), dtype, 6))
    permutation = sm.Permutation(np.random.default_rng(0).permutation(96), dtype)
    yield monarch + rank
    yield 2 * (rank + monarch + sm.Kronecker.random((96, 96), dtype=dtype, rng=1)) - butterfly
    hadamard = sm.kron(sm.Identity(3, dtype), sm.hadamard(32, dtype))
    for first in (sm.Identity(96, dtype), diagonal, permutation, sm.Zero((96, 96), dtype), hadamard):
        yield sm.algebra.Sum(first, monarch, butterfly)
    yield monarch @ permutation @ butterfly
    yield sm.hstack([monarch[:, :40], rank[:, :56]])
    yield sm.vstack([monarch, rank])


def dense_of(chain: sm.Chain) -> np.ndarray:
    """The matrix of a chain from its definition, in double precision."""
    return dense_chain([f.astype(float) for f in chain.factors], chain.shape, chain.out_order, chain.in_order)


@st.composite
def layouts(draw, size=4):
    """Any layout of a chain: random patterns with sizes up to ``size``, orders at both ends, padding."""
    small = st.integers(1, size)
    patterns = [Pattern(draw(small), draw(small), draw(small), draw(small))]
    for _ in range(draw(st.integers(0, 2))):
        rows = patterns[-1].cols
        a = draw(st.sampled_from([k for k in range(1, rows + 1) if rows % k == 0]))
        b = draw(st.sampled_from([k for k in range(1, rows // a + 1) if (rows // a) % k == 0]))
        patterns.append(Pattern(a, b, draw(small), rows // a // b))

    def order(size):
        radices = prime_factors(size)
        radices = draw(st.permutations(radices)) if radices else [1]
        cut = draw(st.integers(0, len(radices) - 1))
        radices = [*radices[:cut], math.prod(radices[cut:])]
        return draw(
            st.one_of(
                st.none(), st.permutations(range(len(radices))).map(lambda p: AxisOrder(tuple(radices), tuple(p)))
            )
        )

    rows, cols = patterns[0].rows, patterns[-1].cols
    m, n = rows - draw(st.integers(0, min(2, rows - 1))), cols - draw(st.integers(0, min(2, cols - 1)))
    return ChainLayout(tuple(patterns), m, n, order(rows), order(cols))


def guarded(shape, dtype):
    """A C-contiguous result full of NaN, inside a larger array of sentinels."""
    size = math.prod(shape)
    whole = np.full(size + 2 * BAND, SENTINEL, dtype)
    out = whole[BAND : BAND + size].reshape(shape)
    out[...] = np.nan
    return whole, out


def untouched(whole) -> bool:
    """Whether the sentinels of :func:`guarded` are still there."""
    return bool((whole[:BAND] == SENTINEL).all() and (whole[-BAND:] == SENTINEL).all())


def kernels(plan, k, rows):
    """Every kernel that the plan may choose for a batch and can make, by name; "numpy" is the plan's reference."""
    from structmat.backends.numba.machine import machine

    made = {kernel.name: kernel.make() for kernel in plan.candidates(k, rows, machine())}
    return {name: apply for name, apply in made.items() if apply is not None}


def check_kernels(plan, dense, k, dtype) -> set[str]:
    """Run every kernel of a plan for ``k`` samples in both layouts, also accumulating; the names of those that ran."""
    m, n = dense.shape
    x = np.random.default_rng(k).standard_normal((n, k)).astype(dtype)
    expected = dense @ x.astype(float)
    scale = np.abs(dense).max(initial=1e-30) * np.abs(x).max(initial=1.0) * max(m, n, 8)
    seen = set()
    for rows in (False, True):
        operand = np.array(x.T if rows else x, order="C")
        want = expected.T if rows else expected
        kept = operand.copy()
        for name, apply in kernels(plan, k, rows).items():
            whole, out = guarded(want.shape, dtype)
            for times, add in ((1, 0), (2, 1)):
                apply(operand.reshape(-1), out.reshape(-1), add)
                message = f"{name}, {'rows' if rows else 'columns'}, {k} samples, add {add}"
                np.testing.assert_allclose(
                    out, times * want, rtol=0, atol=4 * np.finfo(dtype).eps * scale, err_msg=message
                )
                assert untouched(whole), f"{message}: wrote outside of the result"
                np.testing.assert_array_equal(operand, kept, err_msg=message)
            seen.add(name)
    return seen


def main() -> None:
    """A compact self-check for the vector width of this process; prints the width in bytes."""
    from structmat.backends.numba.simd import VECTOR_BYTES

    with sm.use_backend("numba"):
        for dtype in DTYPES:
            for name, chain in with_transposes(dtype):
                if "radix-2" in name:  # kernels of their own, with tests of their own
                    continue
                for k in (1, 21):
                    check_kernels(chain._plan(), dense_of(chain), k, dtype)
    print(VECTOR_BYTES)


if __name__ == "__main__":
    main()
