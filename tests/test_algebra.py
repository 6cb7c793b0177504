"""Cases that a market of small square operators does not reach: padding, mixed batches, lifetimes, long sums, scalars."""

from __future__ import annotations

import gc
import time
import weakref

import numpy as np
import pytest
import scipy.sparse
import torch

import structmat as sm
from structmat.algebra import Product, Sum
from structmat.testing import allclose, assert_matches


def test_padded_block_diagonal_matrices_have_exact_inverses():
    for n, blocks in ((7, 3), (13, 4), (100, 32), (5, 5)):
        a = sm.BlockDiagonal.random((n, n), blocks=blocks, rng=0)
        assert not isinstance(a.inv(), sm.algebra.Inverse)
        assert np.allclose(a.inv().to_dense() @ a.to_dense(), np.eye(n), atol=1e-8)


def test_woodbury_for_any_base_with_a_closed_inverse():
    low = sm.LowRank.random((12, 12), rank=2, rng=0)
    for base in (
        sm.BlockDiagonal.random((12, 12), blocks=3, rng=1),
        sm.Permutation.random(12, rng=2),
        3 * sm.Identity(12),
    ):
        for total in (base + low, low + base):
            inverse = total.inv()
            assert not isinstance(inverse, sm.algebra.Inverse)
            assert np.allclose(inverse.to_dense() @ total.to_dense(), np.eye(12), atol=1e-9)


def test_a_transpose_does_not_keep_its_operator_alive():
    gc.disable()
    try:
        for dtype in (float, complex):
            a = sm.Monarch.random((12, 12), dtype=dtype, rng=0)
            assert a.T.T is a
            assert a.H.H is a
            h = a.H
            assert a.H is h
            gone = weakref.ref(a)
            del a, h
            assert gone() is None, "a reference cycle"
        t = sm.Monarch.random((12, 8), rng=0).T
        assert t.T.shape == (12, 8)
        assert t.T.T is t
    finally:
        gc.enable()


def test_the_rank_of_a_train_survives_permutations():
    p = sm.Permutation(np.arange(16).reshape(4, 4).T.ravel())
    a = sm.BlockTensorTrain.random((16, 16), rank=2, rng=0)
    for b in (a, p @ a, a @ p, p @ a @ p, a.T, (p @ a).T):
        assert b.ranks == (2,)


def test_a_permuted_block_diagonal_is_a_chain_that_says_how_it_is_permuted():
    p = sm.Permutation(np.arange(16).reshape(4, 4).T.ravel())
    a = sm.BlockDiagonal.random((16, 16), blocks=4, rng=0)
    assert type(p @ a) is sm.Chain
    assert "out (4, 4)->" in repr(p @ a)
    assert "inside" in repr(sm.Monarch.random((7, 7), blocks=3, rng=0))
    assert allclose(p.T @ (p @ a), a)


@pytest.mark.parametrize("family", [sm.Dense, sm.Monarch, sm.LowRank, sm.BlockDiagonal])
def test_a_stack_of_diagonals_does_not_multiply_what_is_stored(family):
    v = sm.Diagonal(np.random.default_rng(0).standard_normal((5, 12)))
    a = family.random((12, 12), rng=0)
    for result in (v @ a, a @ v):
        assert result.nparams <= v.nparams + a.nparams
        assert result.shape == (5, 12, 12)
    assert_matches(v @ a, v.to_dense() @ a.to_dense())
    assert_matches(a @ v, a.to_dense() @ v.to_dense())
    low = sm.LowRank(np.ones((5, 12, 1)), np.ones((5, 1, 12)))
    assert (low + sm.LowRank.random((12, 12), rank=3, rng=0)).nparams <= low.nparams + 72


def test_ten_thousand_terms_one_at_a_time():
    term = sm.Kronecker(np.eye(2), np.eye(2))
    other = sm.Diagonal(np.ones(4))
    total, product = term + other.inv(), term @ sm.Dense(np.ones((4, 4)))
    start = time.process_time()
    for i in range(5_000):
        total = total + sm.Permutation([1, 0, 3, 2]) if i % 2 else total + sm.Toeplitz(np.ones(4))
        product = product @ (sm.Permutation([1, 0, 3, 2]) if i % 2 else sm.Toeplitz(np.eye(4)[0]))
    assert isinstance(total, Sum)
    assert isinstance(product, Product)
    assert np.isfinite(total @ np.ones(4)).all()
    assert time.process_time() - start < 60  # quadratic in Python it took minutes


def test_shifted_diagonals_stay_diagonal():
    d, i = sm.Diagonal([1.0, 2.0, 3.0]), sm.Identity(3)
    for result, expected in (
        (d - i, [0, 1, 2]),
        (d + 2 * i, [3, 4, 5]),
        (2 * i + d, [3, 4, 5]),
        (1j * i + d, [1 + 1j, 2 + 1j, 3 + 1j]),
    ):
        assert type(result) is sm.Diagonal
        assert result.values.tolist() == expected


def test_entries_at_many_places_take_little_memory():
    import tracemalloc

    a = sm.Diagonal(np.arange(20_000.0))
    where = np.arange(0, 20_000, 10)
    tracemalloc.start()
    values = a[where, where]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.array_equal(values, where)
    assert peak < 64 * 20_000 * 8 * 4
    b = sm.Dense(np.arange(30_000.0).reshape(100, 300))
    rows, cols = np.random.default_rng(0).integers(0, (100, 300), (50, 7, 2)).transpose(2, 0, 1)
    assert np.array_equal(b[rows, cols], b.array[rows, cols])


def test_scalars_of_other_libraries():
    with pytest.raises(TypeError, match=r"torch.*item"):
        sm.Identity(4) * torch.tensor(2.0)
    with pytest.raises(TypeError, match=r"torch.*numpy"):
        sm.Monarch.random((4, 4)) * torch.tensor(2.0)
    a = sm.Dense(torch.ones(2, 2)) * np.array(2.0)
    assert a.array.tolist() == [[2.0, 2.0], [2.0, 2.0]]
    s = sm.Dense(torch.ones(2, 2, dtype=torch.complex64)) + sm.Identity(2, torch.complex64)
    assert_matches((torch.tensor(2j) * s).H, (2j * s.to_dense()).conj().T)
    assert (np.True_ * sm.Diagonal([3.0])).values.tolist() == [3.0]


def test_scipy_objects_meet_operators():
    sparse = scipy.sparse.csr_array(np.diag([1.0, 2.0]))
    assert_matches(sm.kron(sm.Identity(2), sparse), np.kron(np.eye(2), sparse.toarray()))
    assert_matches(sm.hstack([sparse, np.ones((2, 1))]), np.hstack([sparse.toarray(), np.ones((2, 1))]))
    with pytest.raises(TypeError, match="as_operator"):
        sm.Identity(2) @ sparse


def test_large_awkward_sizes_are_planned_quickly():
    start = time.process_time()
    patterns = sm.Butterfly.random((100_003, 100_003), rng=0).patterns
    assert 100_003 <= patterns[0].rows <= 2**17
    rows, _ = sm.flat_block_butterfly((100_000, 100_000))
    assert rows.size == 100_000 * 18 or rows.size > 100_000
    assert sm.Permutation(np.random.default_rng(0).permutation(10**6)).T.index.shape == (10**6,)
    assert time.process_time() - start < 60


def test_flat_block_butterfly_is_the_stretched_union_of_supports():
    for grid, levels in (((8, 8), None), ((8, 8), 1), ((5, 7), None), ((9, 4), 2), ((1, 3), None)):
        size = 2 ** int(np.ceil(np.log2(min(grid))))
        full = int(np.log2(size)) if levels is None else levels
        mask = np.eye(size, dtype=bool)
        for t in range(full):
            mask[np.arange(size), np.arange(size) ^ (1 << t)] = True
        expected = mask[np.arange(grid[0]) * size // grid[0]][:, np.arange(grid[1]) * size // grid[1]]
        got = np.zeros(grid, int)
        np.add.at(got, sm.flat_block_butterfly(grid, levels), 1)
        assert np.array_equal(got, expected)


def test_empty_trains_are_legal():
    for shape in ((0, 0), (0, 4), (4, 0)):
        a = sm.BlockTensorTrain.random(shape, rng=0)
        assert (a @ np.ones(shape[1])).tolist() == [0.0] * shape[0]
