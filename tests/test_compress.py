"""compress: fewer parameters for the same structure, without a dense matrix."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch

import structmat as sm
from structmat.algebra import Scaled, Sum


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex128])
def test_sums_of_low_rank_come_back_to_their_rank(dtype):
    a = sm.LowRank.random((30, 20), rank=3, dtype=dtype, rng=0)
    grown = a + 2 * a @ sm.Identity(20, dtype) + sm.LowRank.random((30, 20), rank=1, dtype=dtype, rng=1)
    assert grown.rank == 7
    p = grown.compress(tol=1e-5)
    assert p.operator.rank == 4
    assert p.operator.dtype == dtype
    assert type(p.operator) is sm.LowRank
    assert np.allclose(p.operator.to_dense(), grown.to_dense(), atol=1e-4)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(24, 20), (23, 19)])
@pytest.mark.parametrize("family", [sm.Monarch, sm.BlockTensorTrain])
def test_block_ranks_are_optimal(family, shape, transposed):
    a = family.random(shape, blocks=(2, 3), rank=4, rng=0)
    a = a.T if transposed else a
    p = a.compress(rank=2)
    again = sm.project(a.T if transposed else a, family, blocks=(2, 3), rank=2)
    assert type(p.operator) is family
    assert p.operator.shape == a.shape
    exact = np.linalg.norm(a.to_dense() - p.operator.to_dense())
    assert p.lower_bound <= exact * (1 + 1e-12)
    assert np.isclose(p.error, exact, rtol=1e-10)
    assert np.isclose(p.error, again.error, rtol=1e-10)
    assert p.params == p.operator.nparams < a.nparams


def test_budget_and_tolerance():
    a = sm.LowRank(np.diag(0.5 ** np.arange(10.0)), np.eye(10))
    norm = np.linalg.norm(0.5 ** np.arange(10.0))
    for rank in (1, 4, 9):
        tail = np.linalg.norm(0.5 ** np.arange(rank, 10.0))
        assert a.compress(tol=1.0001 * tail / norm).operator.rank == rank
        assert a.compress(budget=20 * rank).operator.rank == rank
        assert np.isclose(a.compress(rank=rank).error, tail)
    assert a.compress(rank=50).operator.rank == 10


def test_torch_stays_torch():
    a = sm.LowRank.random((12, 10), rank=4, dtype=torch.float32, rng=0)
    p = (a + a @ sm.Identity(10, torch.float32)).compress(rank=4)
    assert p.operator.dtype == torch.float32
    assert torch.allclose(p.operator.to_dense(), 2 * a.to_dense(), atol=1e-5)


def test_what_cannot_be_compressed():
    a = sm.LowRank.random((6, 6), rank=2, rng=0)
    for options in ({}, {"tol": 0.1, "rank": 1}):
        with pytest.raises(ValueError, match="exactly one"):
            a.compress(**options)
    with pytest.raises(ValueError, match="at least 1"):
        a.compress(rank=0)
    with pytest.raises(ValueError, match="tolerance"):
        a.compress(tol=float("nan"))
    for other in (
        sm.Identity(4),
        sm.Butterfly.random((8, 8), rng=0),
        a + sm.Identity(6),
        sm.Kronecker.random((6, 6), rng=0),
    ):
        with pytest.raises(NotImplementedError, match="project"):
            other.compress(rank=1)
    assert sm.LowRank(np.zeros((4, 2)), np.zeros((2, 4))).compress(tol=0.1).relative_error == 0


# ---- chains, sums, Kronecker products -----------------------------------------------------------------------------------


def dense_error(a, p):
    """Distance in double precision, from dense matrices."""
    return float(np.linalg.norm(double(a) - double(p.operator)))


def double(a):
    exact = np.complex128 if np.dtype(str(a.dtype).removeprefix("torch.")).kind == "c" else np.float64
    return np.asarray(a.to("cpu" if a.kind == "torch" else "numpy").astype(exact))


def certified(a, p):
    error, norm = dense_error(a, p), np.linalg.norm(double(a))
    slack = 1e-13 * norm
    assert p.lower_bound <= error + slack
    assert error <= p.error + slack
    assert p.error <= error + (1e-12 if a.dtype in (np.float64, np.complex128) else 1e-5) * norm
    assert p.params == p.operator.nparams
    assert p.operator.shape == a.shape
    assert np.isclose(p.relative_error, p.error / norm)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex128])
@pytest.mark.parametrize("shape", [(24, 30), (27, 23)])
@pytest.mark.parametrize("transposed", [False, True])
def test_trains_of_three_cores(dtype, shape, transposed):
    a = sm.BlockTensorTrain.random(shape, cores=3, rank=4, dtype=dtype, rng=0)
    a = a.T if transposed else a
    for options in ({"rank": 2}, {"tol": 0.3}, {"budget": a.nparams // 2}):
        p = a.compress(**options)
        certified(a, p)
        assert type(p.operator) is sm.BlockTensorTrain
        assert p.error <= np.sqrt(2) * max(p.lower_bound, 1e-5 * np.linalg.norm(double(a))) or "tol" in options
    assert max(a.compress(rank=2).operator.ranks) == 2
    assert a.compress(tol=0.3).relative_error <= 0.3
    assert a.compress(tol=0.3).params < a.nparams
    assert a.compress(budget=a.nparams // 2).params <= a.nparams // 2


@pytest.mark.parametrize("cores", [2, 3, 4])
def test_grown_chains_come_back_to_their_ranks(cores):
    a = sm.BlockTensorTrain.random((36, 36), cores=cores, rank=2, rng=0)
    b = sm.BlockTensorTrain.random((36, 36), cores=cores, rank=2, rng=1)
    for grown in (Sum(a, Scaled(2.0, a)), Sum(a, b, Scaled(3.0, a), Scaled(-1.0, b))):
        p = grown.compress(tol=1e-12)
        certified(grown, p)
        assert p.relative_error < 1e-12
        assert p.params <= grown.nparams
    grown = Sum(a.T, Scaled(2.0, a.T))
    p = grown.compress(tol=1e-12)
    certified(grown, p)
    assert p.params == a.nparams
    assert set(p.operator.ranks) == {2}


def test_what_has_no_smaller_form_is_kept():
    a = sm.BlockTensorTrain.random((36, 36), cores=4, rank=1, rng=0)
    b = sm.BlockTensorTrain.random((36, 36), cores=4, rank=2, rng=1)
    p = (a + b).compress(tol=1e-10)  # as one train it would have ranks of 3
    assert p.operator.nparams == p.params == a.nparams + b.nparams
    assert p.error == p.lower_bound == 0
    assert (a + b).compress(tol=0.5).params < p.params


def test_bounds_are_those_of_the_dense_matrix():
    a = sm.BlockTensorTrain.random((36, 36), cores=3, rank=4, rng=0)
    p = a.compress(rank=1)
    again = sm.project(a.to_dense(), sm.BlockTensorTrain, cores=3, rank=1)
    first = sm.project(a.to_dense(), sm.BlockTensorTrain, blocks=(a.patterns[0].d, a.patterns[1].a), rank=1)
    assert np.isclose(p.error, again.error, rtol=1e-10)
    assert np.isclose(p.lower_bound, again.lower_bound, rtol=1e-6)
    assert first.error <= p.lower_bound * (1 + 1e-10)  # the first link alone


def test_sums_of_low_rank_terms():
    a, b = sm.LowRank.random((20, 15), rank=2, rng=0), sm.LowRank.random((20, 15), rank=1, rng=1)
    total = Sum(a, b, Scaled(2.0, a))
    p = total.compress(tol=1e-12)
    certified(total, p)
    assert type(p.operator) is sm.LowRank
    assert p.operator.rank == 3
    mixed = Sum(a, sm.Interpolative.random((20, 15), rank=2, rng=2))
    p = mixed.compress(rank=3)
    certified(mixed, p)
    best = np.sqrt(sum(np.linalg.svd(mixed.to_dense(), compute_uv=False)[3:] ** 2))
    assert np.isclose(p.error, best)
    assert np.isclose(p.lower_bound, best)


@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
@pytest.mark.parametrize("side", ["rows", "columns"])
def test_interpolative_stays_interpolative(side, dtype):
    a = sm.Interpolative.random((20, 15), rank=6, side=side, dtype=dtype, rng=0)
    p = a.compress(rank=4)
    certified(a, p)
    assert type(p.operator) is sm.Interpolative
    assert p.params == 4 * (35 - 4)
    best = np.sqrt(sum(np.linalg.svd(a.to_dense(), compute_uv=False)[4:] ** 2))
    assert np.isclose(p.error, best)
    assert a.compress(budget=130).operator.rank == 4  # 4 * 31 = 124, 5 * 30 = 150
    with pytest.raises(ValueError, match="nearest feasible count is 34"):
        a.compress(budget=20)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex128])
def test_sums_of_kronecker_products_need_fewer_terms(dtype):
    rng = np.random.default_rng(0)
    parts = [sm.Kronecker.random((24, 20), shapes=[(4, 5), (6, 4)], dtype=dtype, rng=rng) for _ in range(3)]
    total = Sum(*parts, parts[0] * 2, Scaled(-1.0, parts[1]))
    p = total.compress(tol=1e-5)
    certified(total, p)
    assert len(p.operator.terms) == 2  # 3 of parts[0], none of parts[1]
    q = Sum(*parts).compress(rank=2)
    certified(Sum(*parts), q)
    best = sm.project(Sum(*parts).to_dense(), sm.Kronecker, shapes=[(4, 5), (6, 4)], terms=2)
    assert np.isclose(q.error, best.error, rtol=1e-5)
    assert type(Sum(*parts).compress(rank=1).operator) is sm.Kronecker
    assert Sum(*parts).compress(budget=90).params == 88
    with pytest.raises(ValueError, match="nearest feasible count is 44"):
        Sum(*parts).compress(budget=30)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex128])
def test_kronecker_products_of_low_rank_factors(dtype):
    a = sm.LowRank.random((8, 7), rank=4, dtype=dtype, rng=0)
    b = sm.Monarch.random((6, 8), blocks=2, rank=3, dtype=dtype, rng=1)
    c = sm.Dense.random((2, 3), dtype=dtype, rng=2)
    whole = sm.Kronecker(a, b.T, c)
    p = whole.compress(rank=2)
    certified(whole, p)
    assert [type(f) for f in p.operator.factors] == [sm.LowRank, sm.Monarch, sm.Dense]
    assert p.error <= p.lower_bound * (1 + 1e-4)
    for tol in (0.2, 0.5, 0.9):
        q = whole.compress(tol=tol)
        certified(whole, q)
        assert q.relative_error <= tol


def test_ranks_of_kronecker_factors_are_the_best_there_are():
    a, b = sm.LowRank.random((8, 7), rank=4, rng=0), sm.LowRank.random((6, 9), rank=5, rng=1)
    whole = sm.Kronecker(a, b)
    choices = [
        (15 * r + 15 * s, dense_error(whole, q))
        for r in range(1, 5)
        for s in range(1, 6)
        for q in [
            sm.Projection(sm.Kronecker(a.compress(rank=r).operator, b.compress(rank=s).operator), 0, 0, 0, "", 0, 0)
        ]
    ]
    norm = np.linalg.norm(whole.to_dense())
    for limit in (30, 60, 75, 100, 135):
        p = whole.compress(budget=limit)
        assert p.params <= limit
        assert np.isclose(p.error, min(e for c, e in choices if c <= limit), atol=1e-12 * norm)
    for tol in (0.1, 0.3, 0.6):
        assert whole.compress(tol=tol).params == min(c for c, e in choices if e <= tol * norm)
    with pytest.raises(ValueError, match="nearest feasible count is 30"):
        whole.compress(budget=29)


def test_multiples_are_compressed():
    a = sm.Kronecker(sm.LowRank.random((4, 4), rank=2, rng=0), sm.Dense.random((3, 3), rng=1))
    p = Scaled(-2.0, a).compress(rank=1)
    certified(Scaled(-2.0, a), p)
    assert p.relative_error == a.compress(rank=1).relative_error


def test_zero_and_padding():
    zero = sm.BlockTensorTrain([np.zeros((1, 4, 2, 4)), np.zeros((2, 2, 4, 4)), np.zeros((4, 1, 4, 2))])
    for options in ({"rank": 1}, {"tol": 0.1}, {"budget": 60}):
        assert zero.compress(**options).error == 0
    padded = sm.BlockTensorTrain.random((23, 29), cores=3, rank=3, rng=0)
    full = sm.BlockTensorTrain([*padded.cores])  # what lies in the padding is not counted
    assert np.linalg.norm(full.to_dense()) > np.linalg.norm(padded.to_dense())
    certified(padded, padded.compress(rank=2))


def test_nothing_of_the_size_of_the_matrix_is_formed():
    tracemalloc.start()
    a = sm.LowRank.random((20_000, 20_000), rank=6, rng=0)
    p = Sum(a, a * 2.0).compress(tol=1e-10)
    k = sm.Kronecker(a, sm.LowRank.random((100, 100), rank=3, rng=1)).compress(rank=2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert p.operator.rank == 6
    assert k.operator.shape == (2_000_000, 2_000_000)
    assert peak < 100e6  # a dense matrix would take 3.2 GB


def test_what_no_sweep_compresses():
    a, m = sm.LowRank.random((6, 6), rank=2, rng=0), sm.Monarch.random((6, 6), rank=2, rng=1)
    three = sm.Kronecker.random((8, 8), shapes=[(2, 2)] * 3, rng=0)
    tied = sm.Kronecker(sm.Diagonal.random((2, 2), rng=0), sm.Dense.random((3, 3), rng=0))
    for other in (
        Sum(a, m),
        Sum(three, three),
        Sum(tied, tied),
        Sum(a, sm.Identity(6)),
        sm.Butterfly.random((8, 8), rng=0),
    ):
        with pytest.raises(NotImplementedError, match="project"):
            other.compress(rank=1)
    stack = sm.LowRank(np.ones((3, 4, 2)), np.ones((3, 2, 4)))
    with pytest.raises(NotImplementedError):
        stack.compress(rank=1)
