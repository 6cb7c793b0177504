"""Sums of families in a weighted norm: monotone, never farther than without the weight, and bounds that hold."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import scipy.optimize

import structmat as sm
from structmat.projection import sums
from structmat.projection.sum_bounds import weighted_lower_bound
from structmat.projection.sum_steps import power_step, step_from
from structmat.projection.weight import Metric, Weight

CASES = {
    "low-rank + monarch": [(sm.LowRank, {"rank": 3}), (sm.Monarch, {"blocks": (4, 3), "rank": 1})],
    "low-rank + btt": [(sm.BlockTensorTrain, {"blocks": 4, "rank": 1}), (sm.LowRank, {"rank": 2})],
    "low-rank + block-diagonal": [(sm.LowRank, {"rank": 2}), (sm.BlockDiagonal, {"blocks": 6})],
    "low-rank + diagonal": [(sm.LowRank, {"rank": 4}), sm.Diagonal],
    "low-rank + block-sparse": [(sm.BlockSparse, {"block": 4}), (sm.LowRank, {"rank": 2})],
    "kronecker + diagonal": [(sm.Kronecker, {"shapes": [(4, 4), (6, 6)]}), sm.Diagonal],
    "three terms": [(sm.LowRank, {"rank": 2}), sm.Diagonal, (sm.Monarch, {"blocks": 4, "rank": 1})],
}
by_case = pytest.mark.parametrize("name", CASES)
N = 24


def gaussian(shape, seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape)
    return (x + 1j * rng.standard_normal(shape) if np.dtype(dtype).kind == "c" else x).astype(dtype)


def moment(count, n=N, seed=0, dtype=np.float64):
    """Second moment of correlated samples with a mean and a decaying spectrum."""
    X = gaussian((count, n), seed, dtype) @ (gaussian((n, n), seed + 1, dtype) * np.exp(-3.0 * np.arange(n) / n)) + 0.4
    return X.T @ X.conj() / count


def norm_in(E, C):
    return math.sqrt(max(0.0, np.trace(E @ C @ E.conj().T).real))


@by_case
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.complex128], ids=lambda d: np.dtype(d).name)
def test_the_certificate_is_true_and_no_worse_than_without_the_weight(name, dtype):
    W, C = gaussian((N, N), 3, dtype), moment(200, dtype=np.complex128 if np.dtype(dtype).kind == "c" else np.float64)
    p = sm.project(W, CASES[name], weight=C)
    exact = W.astype(np.result_type(dtype, np.float64))
    assert p.error == pytest.approx(norm_in(exact - np.asarray(p.operator).astype(exact.dtype), C), rel=1e-5)
    assert 0.0 <= p.lower_bound <= p.error
    assert p.lower_bound == 0.0 or "no lower bound known" not in p.method
    assert p.operator.dtype == np.dtype(dtype)
    plain = sm.project(W, CASES[name])
    assert p.error <= norm_in(exact - np.asarray(plain.operator), C) * (1 + 1e-5)
    assert p.error < 0.97 * norm_in(exact - np.asarray(plain.operator), C), "the weight pays"


@by_case
@pytest.mark.parametrize("count", [300, 10], ids=["full", "rank-deficient"])
def test_bounds_hold_for_every_member(name, count):
    """Members of the same architectures, near in this norm or in others, are above the bound."""
    for seed in range(2):
        W, C = gaussian((N, N), seed), moment(count, seed=seed)
        bound = sm.project(W, CASES[name], weight=C).lower_bound
        for other in ({}, {"weight": moment(300, seed=seed + 7)}, {"weight": C + 0.05 * np.eye(N)}):
            member = np.asarray(sm.project(W, CASES[name], **other).operator)
            assert bound <= norm_in(W - member, C) * (1 + 1e-9) + 1e-6


def test_bound_of_low_rank_and_diagonal_against_brute_force():
    for seed in range(3):
        W, C = gaussian((4, 4), seed), moment(60, 4, seed) + 0.05 * np.eye(4)
        S, best = np.linalg.cholesky(C), math.inf
        p = sm.project(W, [sm.Diagonal, (sm.LowRank, {"rank": 1})], weight=C)

        def rest(d, W=W, S=S):
            return math.sqrt((np.linalg.svd((W - np.diag(d)) @ S, compute_uv=False)[1:] ** 2).sum())

        for x in 3 * gaussian((12, 4), 50 + seed):
            options = {"maxiter": 4000, "fatol": 1e-12, "xatol": 1e-10}
            best = min(best, scipy.optimize.minimize(rest, x, method="Nelder-Mead", options=options).fun)
        assert 0.0 < p.lower_bound <= best * (1 + 1e-12)
        assert best * (1 - 1e-6) <= p.error <= 1.1 * best


@by_case
def test_the_weight_of_the_identity_gives_the_bound_without_a_weight(name):
    W = gaussian((N, N), 1)
    operators = sm.project(W, CASES[name]).operator.terms
    unit = Weight(Metric(np.eye(N), 1.0))
    with_it, without = weighted_lower_bound(W, operators, unit), sums.lower_bound(W, operators)
    assert (with_it is None) == (without is None)
    if without is not None:
        assert with_it >= without * (1 - 1e-9)


def test_no_sweep_increases_the_weighted_error(monkeypatch):
    steps, plain = [], sums._sweep

    def spy(problem, terms, state, before, step, warm=False):
        now = plain(problem, terms, state, before, step, warm)
        assert now.error == pytest.approx(problem.norm(problem.target - sum(now.parts)), rel=1e-9)
        if step == 0.0:
            assert now.error <= state.error
        steps.append(problem.weight is not None)
        return now

    monkeypatch.setattr(sums, "_sweep", spy)
    sm.project(gaussian((N, N)), CASES["low-rank + monarch"], weight=moment(200))
    assert sum(steps) > 6
    assert not all(steps)


@pytest.mark.parametrize("dtype", [np.float64, np.complex128], ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_a_power_step_is_never_farther(weighted, dtype):
    weight = Weight(Metric(moment(200, dtype=dtype), 1.0)) if weighted else None
    problem = sums.Problem(gaussian((30, N), 2, dtype), weight)
    operator = sm.LowRank.random((30, N), rank=3, dtype=dtype, rng=0)
    errors = [problem.norm(problem.target - operator.to_dense())]
    for _ in range(60):
        operator = power_step(problem.target, operator, weight)
        errors.append(problem.norm(problem.target - operator.to_dense()))
    assert all(b <= a * (1 + 1e-12) for a, b in pairwise(errors))
    options = {} if weight is None else {"weight": weight.columns.matrix}
    assert errors[-1] == pytest.approx(sm.project(problem.target, sm.LowRank, rank=3, **options).error, rel=1e-3)


@pytest.mark.parametrize("dtype", [np.float64, np.complex128], ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("layout", [("strided", "contiguous"), ("contiguous", "strided")], ids=str)
def test_power_steps_of_blocks_are_never_farther(layout, dtype):
    W, options = gaussian((34, 46), 2, dtype), {"blocks": (3, 4), "rank": 2, "layout": layout}
    problem = sums.Problem(W)
    operator = sm.project(gaussian(W.shape, 3, dtype), sm.Monarch, **options).operator
    errors = [problem.norm(W - operator.to_dense())]
    for _ in range(100):
        move = step_from(operator, problem.weight)
        assert move is not None
        operator = move(W)
        errors.append(problem.norm(W - operator.to_dense()))
    assert all(b <= a * (1 + 1e-12) for a, b in pairwise(errors))
    assert errors[-1] == pytest.approx(sm.project(W, sm.Monarch, **options).error, rel=1e-3)
    assert errors[0] > 1.1 * errors[-1]


@pytest.mark.parametrize("dtype", [np.float64, np.complex128], ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("shape", [(8, 8), (7, 6)])
def test_steps_of_a_butterfly_in_a_weighted_norm_are_never_farther(shape, dtype):
    W, weight = gaussian(shape, 2, dtype), Weight(Metric(moment(200, shape[1], dtype=dtype), 1.0))
    problem = sums.Problem(W, weight)
    operator = sm.project(W, sm.Butterfly, radix=2).operator
    errors = [problem.norm(W - operator.to_dense())]
    for _ in range(30):
        move = step_from(operator, problem.weight)
        assert move is not None
        operator = move(W)
        errors.append(problem.norm(W - operator.to_dense()))
    assert all(b <= a * (1 + 1e-9) for a, b in pairwise(errors))
    assert errors[-1] <= 1.02 * sm.project(W, sm.Butterfly, radix=2, weight=weight.columns.matrix).error


def test_terms_without_a_cheap_step():
    problem = sums.Problem(gaussian((N, N)))
    both = sums.Problem(problem.target, Weight(Metric(moment(90), 1.0), Metric(moment(90), 1.0)))
    for operator in (sm.Diagonal.random((N, N)), sm.LowRank.random((N, N), rank=9), sm.Monarch.random((N, N), rank=3)):
        assert step_from(operator, problem.weight) is None
    for operator in (sm.LowRank.random((N, N), rank=2), sm.Butterfly.random((N, N))):
        assert step_from(operator, both.weight) is None


@pytest.mark.parametrize("name", ["low-rank + diagonal", "low-rank + block-diagonal", "kronecker + diagonal"])
def test_planted_sums_are_recovered_in_any_weight(name):
    pairs = [t if isinstance(t, tuple) else (t, {}) for t in CASES[name]]
    rng = np.random.default_rng(4)
    W = sum(family.random((N, N), rng=rng, **options).to_dense() for family, options in pairs)
    assert sm.project(W, CASES[name], weight=moment(300) + np.eye(N)).relative_error < 2e-3


def test_a_sum_with_a_butterfly():
    W, C = gaussian((8, 8), 3), moment(100, 8)
    terms = [(sm.LowRank, {"rank": 1}), (sm.Butterfly, {"radix": 2})]
    p, plain = sm.project(W, terms, weight=C), sm.project(W, terms)
    assert p.error == pytest.approx(norm_in(W - np.asarray(p.operator), C))
    assert p.error < norm_in(W - np.asarray(plain.operator), C)
    assert "no lower bound known" in p.method


def test_budget_activations_centring_and_output_weights():
    W, X = gaussian((N, N), 5), gaussian((100, N), 6) + 0.3
    p = sm.project(W, [sm.LowRank, sm.Monarch], budget=0.5, activations=X, mean=True)
    assert p.params <= N * N // 2
    assert np.allclose(p.bias_correction, (W - np.asarray(p.operator)) @ X.mean(0))
    both = [(sm.LowRank, {"rank": 2}), (sm.Monarch, {"blocks": 4, "rank": 1})]
    D, C = moment(90, seed=8), moment(90, seed=9)
    p = sm.project(W, both, weight=C, row_weight=D)
    E = W - np.asarray(p.operator)
    assert p.error == pytest.approx(math.sqrt(np.trace(D @ E @ C @ E.T)))
    assert 0.0 < p.lower_bound <= p.error
    with pytest.raises(TypeError, match=r"row_weight .* got Diagonal"):
        sm.project(W, [sm.Diagonal, (sm.LowRank, {"rank": 2})], row_weight=D)
    with pytest.raises(ValueError, match="tol: a sum of families"):
        sm.project(W, both, weight=C, tol=0.5)


def test_results_repeat_and_inputs_are_left_alone():
    W, C = gaussian((N, N), 5), moment(90)
    kept = W.copy(), C.copy()
    p, q = (sm.project(W, CASES["three terms"], weight=C) for _ in range(2))
    assert np.array_equal(np.asarray(p.operator), np.asarray(q.operator))
    assert np.array_equal(W, kept[0])
    assert np.array_equal(C, kept[1])
