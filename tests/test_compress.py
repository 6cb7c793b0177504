"""compress: fewer parameters for the same structure, without a dense matrix."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import structmat as sm


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
