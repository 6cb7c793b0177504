"""Activation-aware projection: the weighted norm, closed forms, monotone descents, bounds, bias correction, bad weights."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize

import structmat as sm
from structmat.patterns import Pattern
from structmat.projection.links import multiplied_out
from structmat.projection.moments import Moments
from structmat.projection.two_factor import Layout, Place
from structmat.projection.weight import RIDGE, Metric, Weight
from structmat.projection.weighted_chain import descend as descend_chain
from structmat.projection.weighted_classes import Classes
from structmat.projection.weighted_kronecker import Unfolded, alternate
from structmat.projection.weighted_two_factor import fit

# (name, family, options); every family, with rectangular, prime and padded shapes
CASES = [
    ("low-rank", sm.LowRank, {"rank": 5}),
    ("low-rank interpolative", sm.LowRank, {"rank": 5, "interpolative": True}),
    ("block-diagonal", sm.BlockDiagonal, {"blocks": 4}),
    ("block-diagonal padded", sm.BlockDiagonal, {"blocks": 5}),
    ("monarch", sm.Monarch, {"blocks": (3, 4), "rank": 2}),
    ("monarch padded", sm.Monarch, {"blocks": (5, 7), "rank": 2}),
    ("monarch searched", sm.Monarch, {"blocks": (2, 4), "rank": 2, "layout": "search"}),
    ("monarch interpolative", sm.Monarch, {"blocks": (3, 2), "rank": 3, "interpolative": True}),
    ("btt", sm.BlockTensorTrain, {"blocks": 2, "rank": 3}),
    ("btt three cores", sm.BlockTensorTrain, {"cores": 3, "rank": 2}),
    ("butterfly", sm.Butterfly, {"radix": 2}),
    ("chain", sm.Chain, {"patterns": [(1, 4, 4, 6), (2, 6, 6, 2), (6, 4, 4, 1)]}),
    ("chain of two", sm.Chain, {"patterns": [(1, 6, 4, 4), (4, 4, 6, 1)]}),
    ("chain of one", sm.Chain, {"patterns": [(3, 8, 8, 1)]}),
    ("kronecker", sm.Kronecker, {"shapes": [(4, 6), (6, 4)]}),
    ("kronecker sum", sm.Kronecker, {"shapes": [(4, 6), (6, 4)], "terms": 3}),
    ("kronecker of three", sm.Kronecker, {"shapes": [(2, 3), (3, 2), (4, 4)]}),
    ("diagonal", sm.Diagonal, {}),
    ("block-sparse", sm.BlockSparse, {"block": (3, 4)}),
    ("block-sparse padded", sm.BlockSparse, {"block": (5, 7), "places": ([0, 0, 2, 4], [1, 3, 0, 1])}),
    ("blast", sm.Chain, {"patterns": [(3, 8, 4, 1), (1, 3, 3, 4), (3, 4, 8, 1)]}),
    ("dense", sm.Dense, {}),
]
NAMES = [case[0] for case in CASES]
SHAPE = (24, 24)


def gaussian(shape, seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape)
    return (x + 1j * rng.standard_normal(shape) if np.dtype(dtype).kind == "c" else x).astype(dtype)


def samples(count, n, seed=0, dtype=np.float64):
    """Correlated samples with a mean and a decaying spectrum."""
    mix = gaussian((n, n), seed, dtype) * np.exp(-4.0 * np.arange(n) / n)
    return (gaussian((count, n), seed + 1, dtype) @ mix.T + 0.4).astype(dtype)


def moment(X):
    X = X.astype(np.complex128 if X.dtype.kind == "c" else np.float64)
    return X.T @ X.conj() / len(X)


def root(C):
    """``S`` with ``S S^H = C``, by a road of its own."""
    values, vectors = np.linalg.eigh(C)
    return vectors * np.sqrt(np.maximum(values, 0))


def weighted(E, C=None, D=None):
    E = E if C is None else E @ root(C)
    return float(np.linalg.norm(E if D is None else root(D).conj().T @ E))


def exact_dense(operator):
    return np.asarray(operator.astype(np.complex128 if np.dtype(operator.dtype).kind == "c" else np.float64))


# ---- the certificate -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.complex128], ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("count", [200, 10], ids=["full", "rank-deficient"])
@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_certificate_is_true_and_no_worse_than_without_a_weight(case, count, dtype):
    _, family, options = case
    W, X = gaussian(SHAPE, 3, dtype), samples(count, SHAPE[1], 5, dtype)
    C = moment(X)
    p = sm.project(W, family, weight=C, **options)
    target = W.astype(np.complex128 if np.dtype(dtype).kind == "c" else np.float64)
    norm = weighted(target, C)
    error = weighted(target - exact_dense(p.operator), C)
    assert abs(p.error - error) <= 2e-7 * norm  # the square root of rounding: a weight is known by its moment alone
    assert p.relative_error == pytest.approx(p.error / norm, abs=1e-7)
    assert 0.0 <= p.lower_bound <= p.error
    assert p.params == p.operator.nparams
    assert p.operator.dtype == np.dtype(dtype)
    plain = sm.project(W, family, **options)
    slack = 1e-5 if dtype == np.float32 else 2e-7
    assert p.error <= weighted(target - exact_dense(plain.operator), C) + slack * norm


@pytest.mark.parametrize("dtype", [np.float64, np.complex128], ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_members_are_recovered_whatever_the_weight(case, dtype):
    name, family, options = case
    member = sm.project(gaussian(SHAPE, 8, dtype), family, **options).operator
    W = np.asarray(member)
    C = moment(samples(100, SHAPE[1], 2, dtype))
    p = sm.project(W, family, weight=C, **options)
    assert p.relative_error <= (1e-8 if "three" in name else 1e-11)
    assert p.lower_bound <= p.error


def test_the_weight_of_the_identity_is_the_plain_projection():
    W = gaussian((12, 16))
    for family, options in ((sm.LowRank, {"rank": 3}), (sm.Monarch, {"blocks": 4}), (sm.BlockDiagonal, {"blocks": 4})):
        plain, aware = (sm.project(W, family, **options, **o) for o in ({}, {"weight": 4.0 * np.eye(16)}))
        assert aware.error == pytest.approx(2.0 * plain.error, rel=1e-12)
        assert np.allclose(np.asarray(plain.operator), np.asarray(aware.operator), atol=1e-12)
        assert aware.lower_bound == pytest.approx(aware.error, rel=1e-9)
        assert "optimal" in aware.method


def test_the_result_does_not_depend_on_the_scale_of_the_weight():
    W, C = gaussian((16, 16)), moment(samples(60, 16))
    p, q = (sm.project(W, sm.Monarch, blocks=4, rank=2, weight=c) for c in (C, 1e-200 * C))
    assert np.array_equal(np.asarray(p.operator), np.asarray(q.operator)) or np.allclose(
        np.asarray(p.operator), np.asarray(q.operator), rtol=1e-8
    )
    assert q.error == pytest.approx(1e-100 * p.error, rel=1e-9)
    big = sm.project(1e150 * W, sm.Monarch, blocks=4, rank=2, weight=C)
    assert big.error == pytest.approx(1e150 * p.error, rel=1e-9)


# ---- closed forms ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float64, np.complex128], ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("shape", [(20, 30), (30, 20)])
@pytest.mark.parametrize("count", [100, 12])
def test_low_rank_is_the_tail_of_the_weighted_singular_values(shape, count, dtype):
    W, C = gaussian(shape, 1, dtype), moment(samples(count, shape[1], 4, dtype))
    s = np.linalg.svd(W @ root(C), compute_uv=False)
    for rank in (1, 4, 11):
        p = sm.project(W, sm.LowRank, rank=rank, weight=C)
        best = math.sqrt((s[rank:] ** 2).sum())
        assert p.error == pytest.approx(best, rel=1e-9, abs=1e-7 * s[0])
        assert p.lower_bound == pytest.approx(best, rel=1e-6, abs=1e-6 * s[0])
        assert p.lower_bound <= best + 1e-12 * s[0]


@pytest.mark.parametrize("dtype", [np.float64, np.complex128], ids=lambda d: np.dtype(d).name)
def test_low_rank_with_both_weights_is_optimal(dtype):
    m, n, rank = 14, 18, 4
    W = gaussian((m, n), 1, dtype)
    C, D = moment(samples(80, n, 4, dtype)), moment(samples(9, m, 6, dtype))
    s = np.linalg.svd(root(D).conj().T @ W @ root(C), compute_uv=False)
    p = sm.project(W, sm.LowRank, rank=rank, weight=C, row_weight=D)
    assert p.error == pytest.approx(math.sqrt((s[rank:] ** 2).sum()), rel=1e-7)
    assert p.error == pytest.approx(weighted(W - np.asarray(p.operator), C, D), rel=1e-7)
    only = sm.project(W, sm.LowRank, rank=rank, row_weight=D)
    s = np.linalg.svd(root(D).conj().T @ W, compute_uv=False)
    assert only.error == pytest.approx(math.sqrt((s[rank:] ** 2).sum()), rel=1e-7, abs=1e-7 * s[0])


def class_moment(count, size, seed=0, singular=False):
    """A weight without entries between classes of columns."""
    return scipy.linalg.block_diag(
        *(moment(samples(size - 2 if singular else 40, size, seed + i)) for i in range(count))
    )


@pytest.mark.parametrize("singular", [False, True])
@pytest.mark.parametrize("family", [sm.Monarch, sm.BlockTensorTrain])
def test_two_factor_closed_form_where_the_weight_has_no_entries_between_classes(family, singular):
    (l, k), r, (m, n) = (3, 4), 2, (18, 24)
    W, C = gaussian((m, n)), class_moment(k, n // k, singular=singular)
    p = sm.project(W, family, blocks=(l, k), rank=r, weight=C)
    best = 0.0
    for j in range(l):
        rows = W[j * m // l : (j + 1) * m // l] if family is sm.BlockTensorTrain else W[j::l]
        for i in range(k):
            part = slice(i * n // k, (i + 1) * n // k)
            best += (np.linalg.svd(rows[:, part] @ root(C[part, part]), compute_uv=False)[r:] ** 2).sum()
    assert p.error == pytest.approx(math.sqrt(best), rel=1e-7)
    assert p.lower_bound == pytest.approx(p.error, rel=1e-6)
    assert "optimal" in p.method
    assert p.ridge == 0.0


def test_two_factor_with_row_weights_of_classes_is_optimal():
    (l, k), r, (m, n) = (3, 2), 2, (18, 12)
    W, C, D = gaussian((m, n)), class_moment(k, n // k), class_moment(l, m // l, 9)
    p = sm.project(W, sm.BlockTensorTrain, blocks=(l, k), rank=r, weight=C, row_weight=D)
    best = 0.0
    for a in (slice(j * m // l, (j + 1) * m // l) for j in range(l)):
        for b in (slice(i * n // k, (i + 1) * n // k) for i in range(k)):
            white = root(D[a, a]).T @ W[a, b] @ root(C[b, b])
            best += (np.linalg.svd(white, compute_uv=False)[r:] ** 2).sum()
    assert p.error == pytest.approx(math.sqrt(best), rel=1e-8)
    assert p.lower_bound == pytest.approx(p.error, rel=1e-6)


def test_kronecker_closed_form_where_the_weight_is_a_kronecker_product():
    W, C1, C2 = gaussian((12, 20)), moment(samples(30, 4)), moment(samples(30, 5, 7))
    p = sm.project(W, sm.Kronecker, shapes=[(3, 4), (4, 5)], terms=2, weight=np.kron(C1, C2))
    white = W @ np.kron(root(C1), root(C2))
    rearranged = white.reshape(3, 4, 4, 5).transpose(0, 2, 1, 3).reshape(12, 20)
    best = math.sqrt((np.linalg.svd(rearranged, compute_uv=False)[2:] ** 2).sum())
    assert p.error == pytest.approx(best, rel=1e-8)
    assert p.lower_bound == pytest.approx(best, rel=1e-6)
    assert "optimal" in p.method


def test_block_diagonal_solves_the_normal_equations():
    W, C = gaussian((12, 15)), moment(samples(60, 15))
    p = sm.project(W, sm.BlockDiagonal, blocks=3, weight=C)
    gradient = (W - np.asarray(p.operator)) @ C
    for i in range(3):
        assert np.abs(gradient[4 * i : 4 * i + 4, 5 * i : 5 * i + 5]).max() <= 1e-9 * np.abs(W @ C).max()
    assert p.lower_bound == pytest.approx(p.error, rel=1e-6)


def test_diagonal_and_block_sparse_solve_the_normal_equations():
    W, C = gaussian((12, 12)), moment(samples(60, 12))
    for family, options in ((sm.Diagonal, {}), (sm.BlockSparse, {"block": 3, "places": ([0, 0, 3], [1, 2, 0])})):
        p = sm.project(W, family, weight=C, **options)
        A = np.asarray(p.operator)
        gradient = (W - A) @ C
        assert np.abs(gradient[A != 0]).max() <= 1e-9 * np.abs(W @ C).max()
        assert p.lower_bound == pytest.approx(p.error, rel=1e-6)


def test_a_chain_of_one_factor_solves_the_normal_equations():
    W, C, (a, b, c, d) = gaussian((12, 16)), moment(samples(60, 16)), (2, 3, 4, 2)
    p = sm.project(W, sm.Chain, patterns=[(a, b, c, d)], weight=C)
    gradient = ((W - np.asarray(p.operator)) @ C).reshape(a, b, d, a, c, d)
    inside = np.einsum("ijlikl->iljk", gradient)
    assert np.abs(inside).max() <= 1e-9 * np.abs(W @ C).max()
    assert np.abs(gradient).max() > 1e-3 * np.abs(W @ C).max()


# ---- descents ----------------------------------------------------------------------------------------------------------


def metric(C):
    return Metric(C / np.abs(C).max(), math.sqrt(np.abs(C).max()))


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("dtype", [np.float64, np.complex128], ids=lambda d: np.dtype(d).name)
def test_block_descent_never_increases_the_error_and_ends_stationary(dtype, rows, monkeypatch):
    monkeypatch.setattr("structmat.projection.weighted_two_factor.STALLED", 1e-12)
    monkeypatch.setattr("structmat.projection.weighted_two_factor.SWEEPS", 3000)
    W = gaussian((12, 16), 0, dtype)
    C, D = moment(samples(200, 16, 3, dtype)) + np.eye(16), moment(samples(200, 12, 4, dtype)) + np.eye(12)
    weight = Weight(metric(C), metric(D) if rows else None)
    classes = Classes(W, Place(Layout(2, 4, 6, 4, True)), weight)
    found = fit(classes, 2, weight.norm(W))
    assert len(found.history) > 3
    assert all(b <= a for a, b in pairwise(found.history))
    assert found.error == pytest.approx(found.history[-1], rel=1e-9)
    assert found.error < 0.97 * found.history[0]
    # the gradient with respect to both factors of every block vanishes
    E = W - classes.assemble(found.left, found.right)
    G = E @ C if not rows else D @ E @ C
    for i in range(4):
        for j in range(2):
            block = G[6 * j : 6 * j + 6, 4 * i : 4 * i + 4]
            assert np.abs(block @ found.right[i, j].conj().T).max() <= 1e-4 * np.abs(W @ C).max()
            assert np.abs(found.left[i, j].conj().T @ block).max() <= 1e-4 * np.abs(W @ C).max()


def test_block_descent_beats_the_best_of_one_block_at_a_time():
    """Correlated classes: what the closed form of independent classes leaves on the table."""
    W, C = gaussian((32, 32)), moment(samples(400, 32))
    aware = sm.project(W, sm.Monarch, blocks=4, rank=3, weight=C)
    diagonal = np.zeros_like(C)
    for i in range(4):
        diagonal[8 * i : 8 * i + 8, 8 * i : 8 * i + 8] = C[8 * i : 8 * i + 8, 8 * i : 8 * i + 8]
    local = sm.project(W, sm.Monarch, blocks=4, rank=3, weight=diagonal)
    assert aware.error < 0.9 * weighted(W - np.asarray(local.operator), C)


@pytest.mark.parametrize("dtype", [np.float64, np.complex128], ids=lambda d: np.dtype(d).name)
def test_kronecker_iteration_never_increases_the_error(dtype, monkeypatch):
    monkeypatch.setattr("structmat.projection.weighted_kronecker.STALLED", 1e-9)
    W, C = gaussian((12, 20), 0, dtype), moment(samples(200, 20, 3, dtype))
    weight, shapes = Weight(metric(C)), ((3, 4), (4, 5))
    start = [[gaussian(s, t, dtype) for s in shapes] for t in (11, 12)]
    terms, history = alternate(W, start, shapes, metric(C))
    assert len(history) > 3
    assert all(b <= a for a, b in pairwise(history))
    dense = sum(np.kron(*factors) for factors in terms)
    assert weight.norm(W - dense) == pytest.approx(history[-1], rel=1e-8)
    assert Unfolded(W, shapes, weight).fit(2).error <= history[0]


@pytest.mark.parametrize("dtype", [np.float64, np.complex128], ids=lambda d: np.dtype(d).name)
def test_gradient_of_a_chain_is_right(dtype):
    """L-BFGS from a perturbed member finds it again, which a wrong gradient would not."""
    patterns = [Pattern(1, 2, 2, 4), Pattern(2, 2, 2, 2), Pattern(4, 2, 2, 1)]
    member = sm.Chain.random((8, 8), patterns, rng=0, dtype=dtype)
    C = moment(samples(100, 8, 3, dtype)) + np.eye(8)
    start = [f + 0.05 * gaussian(f.shape, i, dtype) for i, f in enumerate(member.factors)]
    target = np.asarray(member)
    factors, steps = descend_chain(target, start, C)
    assert steps > 2
    before, after = (np.linalg.norm(target - multiplied_out(f, (8, 8))) for f in (start, factors))
    assert after <= 1e-2 * before


def test_butterfly_gains_much_over_the_unweighted_projection():
    W, C = gaussian((32, 32)), moment(samples(200, 32))
    plain, aware = (sm.project(W, sm.Butterfly, radix=2, **o) for o in ({}, {"weight": C}))
    assert aware.error < 0.8 * weighted(W - np.asarray(plain.operator), C)


# ---- lower bounds --------------------------------------------------------------------------------------------------------


def test_lower_bounds_hold_against_brute_force():
    """Gradient descent from many starts on small cases never goes below the bound, and the projection is near its best."""
    rng = np.random.default_rng(0)
    for case in range(6):
        m, n, blocks = 6, 6, (2, 2) if case % 2 else (3, 2)
        W, C = rng.standard_normal((m, n)), moment(samples(50, n, case)) + 0.1 * np.eye(n)
        D = moment(samples(50, m, case + 50)) + 0.1 * np.eye(m) if case >= 4 else None
        p = sm.project(W, sm.BlockTensorTrain, blocks=blocks, rank=1, weight=C, row_weight=D)
        S, T = root(C), np.eye(m) if D is None else root(D)
        (l, k), best = blocks, math.inf

        def objective(x, l=l, k=k, m=m, n=n, W=W, S=S, T=T):
            u, v = x[: l * k * (m // l)].reshape(l, k, -1), x[l * k * (m // l) :].reshape(l, k, -1)
            A = np.einsum("jki,jkt->jikt", u, v).reshape(m, n)
            E = T.T @ (A - W) @ S
            G = (T @ E @ S.T).reshape(l, m // l, k, n // k)
            return (E**2).sum(), 2 * np.concatenate(
                [np.einsum("jikt,jkt->jki", G, v).ravel(), np.einsum("jikt,jki->jkt", G, u).ravel()]
            )

        for _ in range(12):
            x = rng.standard_normal(l * k * (m // l + n // k))
            found = scipy.optimize.minimize(objective, x, jac=True, method="L-BFGS-B", options={"maxiter": 3000})
            best = min(best, math.sqrt(found.fun))
        assert p.lower_bound <= best * (1 + 1e-9)
        assert p.lower_bound > 0.0
        assert p.error >= best * (1 - 1e-6) or p.error >= p.lower_bound
        assert p.error <= 1.15 * best


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_no_member_is_below_the_bound(case):
    """Members near the matrix, fitted by any other weight, are above the bound of this one."""
    _, family, options = case
    for seed in range(4):
        W = gaussian(SHAPE, seed)
        C = moment(samples(300, SHAPE[1], seed)) + (0.5 if seed % 2 else 0.0) * np.eye(SHAPE[1])
        bound = sm.project(W, family, weight=C, **options).lower_bound
        for other in (None, moment(samples(300, SHAPE[1], seed)) + 0.01 * np.eye(SHAPE[1]), np.eye(SHAPE[1])):
            member = sm.project(W, family, **options, **({} if other is None else {"weight": other})).operator
            assert bound <= weighted(W - np.asarray(member), C) * (1 + 1e-9)


def test_the_bound_is_tight_for_nearly_independent_classes():
    W, C = gaussian((24, 24)), class_moment(4, 6) + 1e-3
    p = sm.project(W, sm.Monarch, blocks=(3, 4), rank=2, weight=C)
    assert p.lower_bound >= 0.9 * p.error


def test_a_row_weight_bounds_like_the_columns_of_the_transpose():
    W, C = gaussian((18, 24)), moment(samples(300, 24)) + np.eye(24)
    p = sm.project(W, sm.Monarch, blocks=(3, 4), rank=2, layout=("contiguous", "contiguous"), weight=C)
    q = sm.project(W.T, sm.Monarch, blocks=(4, 3), rank=2, layout=("contiguous", "contiguous"), row_weight=C)
    assert q.lower_bound == pytest.approx(p.lower_bound, rel=1e-9)
    assert q.error == pytest.approx(p.error, rel=2e-2)


# ---- budget and tolerance --------------------------------------------------------------------------------------------


FREE = [
    sm.LowRank,
    sm.Monarch,
    sm.BlockTensorTrain,
    sm.Kronecker,
    sm.BlockDiagonal,
    sm.BlockSparse,
    sm.Butterfly,
]


@pytest.mark.parametrize("family", FREE, ids=lambda f: f.__name__)
def test_budget_is_kept(family):
    W, X = gaussian((24, 30)), samples(200, 30)
    for budget in (0.5, 250):
        p = sm.project(W, family, budget=budget, activations=X)
        assert p.params <= (budget if isinstance(budget, int) else budget * W.size)
        assert p.error == pytest.approx(weighted(W - np.asarray(p.operator), moment(X)), rel=1e-7)


@pytest.mark.parametrize("family", FREE, ids=lambda f: f.__name__)
def test_tolerance_is_met_in_the_weighted_norm(family):
    W, X = gaussian((24, 24)), samples(200, 24)
    loose, tight = (sm.project(W, family, tol=tol, activations=X) for tol in (0.7, 0.5))
    assert loose.relative_error <= 0.7
    assert tight.relative_error <= 0.5
    assert loose.params <= tight.params < W.size * 2
    norm = weighted(W, moment(X))
    assert weighted(W - np.asarray(tight.operator), moment(X)) <= 0.5 * norm * (1 + 1e-9)


def test_tolerance_takes_the_smallest_rank():
    W, X = gaussian((24, 24)), samples(200, 24)
    s = np.linalg.svd(W @ root(moment(X)), compute_uv=False)
    tails = np.sqrt(np.cumsum((s**2)[::-1])[::-1]) / np.linalg.norm(s)
    assert sm.project(W, sm.LowRank, tol=0.3, activations=X).operator.rank == int(np.argmax(tails <= 0.3))
    p = sm.project(W, sm.BlockTensorTrain, blocks=2, tol=0.3, activations=X)
    rank = p.operator.ranks[0]
    assert sm.project(W, sm.BlockTensorTrain, blocks=2, rank=rank - 1, activations=X).relative_error > 0.3


def test_interpolative_form_buys_rank_with_the_budget():
    W, X = gaussian((30, 30)), samples(200, 30)
    for family, options in ((sm.LowRank, {}), (sm.BlockTensorTrain, {"blocks": 2})):
        plain = sm.project(W, family, budget=0.5, activations=X, **options)
        form = sm.project(W, family, budget=0.5, activations=X, interpolative=True, **options)
        assert form.params <= 450
        assert form.error < 0.97 * plain.error


def test_unreachable_and_infeasible_name_what_is_possible():
    W, X = gaussian((24, 24)), samples(100, 24)
    with pytest.raises(ValueError, match=r"best relative error reachable is 0\.\d"):
        sm.project(W, sm.BlockDiagonal, tol=1e-3, activations=X)
    with pytest.raises(ValueError, match="nearest feasible count is 48"):
        sm.project(W, sm.LowRank, budget=40, activations=X)


# ---- moments, centring and bias ---------------------------------------------------------------------------------------


def test_centring_with_bias_correction_reproduces_the_mean_and_never_costs():
    W, X = gaussian((12, 16)), samples(150, 16) + 2.0
    b, mu = gaussian(12), X.mean(0)
    centred = sm.project(W, sm.LowRank, rank=3, activations=X, mean=True)
    raw = sm.project(W, sm.LowRank, rank=3, activations=X)
    assert raw.bias_correction is None
    A = np.asarray(centred.operator)
    output, wanted = X @ A.T + b + centred.bias_correction, X @ W.T + b
    assert np.allclose(output.mean(0), wanted.mean(0), atol=1e-12)
    mse = np.linalg.norm(output - wanted) / math.sqrt(len(X))
    assert mse == pytest.approx(centred.error, rel=1e-9)
    assert centred.error < raw.error
    given = sm.project(W, sm.LowRank, rank=3, weight=moment(X), mean=mu)
    assert given.error == pytest.approx(centred.error, rel=1e-9)
    assert np.allclose(given.bias_correction, (W - np.asarray(given.operator)) @ mu)


def test_moments_add_up_and_stand_for_activations():
    W, X = gaussian((12, 16)), samples(90, 16)
    parts = Moments.of(X[:20]) + Moments.of(X[20:].reshape(7, 10, 16))
    whole = Moments.of(X)
    assert parts.count == whole.count == 90
    assert np.allclose(parts.gram, whole.gram, rtol=1e-13)
    p, q, r = (
        sm.project(W, sm.Monarch, blocks=4, **o) for o in ({"weight": parts}, {"activations": X}, {"weight": moment(X)})
    )
    assert p.error == pytest.approx(q.error, rel=1e-9)
    assert r.error == pytest.approx(q.error, rel=1e-9)
    assert "90 samples" in repr(whole)
    with pytest.raises(ValueError, match="cannot add those of 16 and 12 inputs"):
        whole + Moments.of(X[:, :12])
    with pytest.raises(ValueError, match="at least one sample"):
        Moments(np.eye(3), np.zeros(3), 0)
    with pytest.raises(ValueError, match=r"gram \(n, n\) and total \(n,\)"):
        Moments(np.eye(3), np.zeros(4), 2)


def test_damping_is_part_of_the_norm():
    W, C = gaussian((10, 14)), moment(samples(6, 14))
    p = sm.project(W, sm.LowRank, rank=3, weight=C, damping=0.1)
    damped = C + 0.1 * np.trace(C) / 14 * np.eye(14)
    assert p.error == pytest.approx(weighted(W - np.asarray(p.operator), damped), rel=1e-9)
    assert "damped by 0.1" in p.method


def test_nearly_singular_weights_are_reported():
    W, X = gaussian((16, 16)), samples(6, 16)
    p = sm.project(W, sm.Monarch, blocks=4, activations=X)
    assert p.ridge == RIDGE
    assert "relative ridge 1e-06" in p.method
    assert "6 samples of 16 inputs" in p.method
    assert sm.project(W, sm.LowRank, rank=3, activations=X).ridge == 0.0
    assert sm.project(W, sm.Monarch, blocks=4, activations=samples(200, 16)).ridge == 0.0


def test_badly_scaled_and_dead_inputs():
    W, X = gaussian((16, 16)), samples(100, 16) * np.logspace(-12, 0, 16)
    X[:, 3] = 0.0
    C = moment(X)
    for family, options in (
        (sm.LowRank, {"rank": 3}),
        (sm.Monarch, {"blocks": 4}),
        (sm.Butterfly, {}),
        (sm.Kronecker, {}),
    ):
        p = sm.project(W, family, weight=C, **options)
        E = (W - np.asarray(p.operator)).astype(np.longdouble)  # roots lose the small entries
        assert np.isfinite(np.asarray(p.operator)).all()
        assert p.error == pytest.approx(float(np.sqrt(((E @ C.astype(np.longdouble)) * E).sum())), rel=1e-9)


def test_moments_summed_in_single_precision_are_accepted():
    W = gaussian((16, 16))
    X = samples(12, 16).astype(np.float32)
    C = (X.T @ X / np.float32(12)).astype(np.float64)  # negative eigenvalues by rounding
    assert np.linalg.eigvalsh(C)[0] < 0.0
    p = sm.project(W, sm.Monarch, blocks=4, weight=C)
    assert p.lower_bound <= p.error
    assert p.relative_error < 0.9


# ---- views, torch, bad input ---------------------------------------------------------------------------------------------


def test_permuted_and_transposed_matrices_take_the_weight_with_them():
    rng = np.random.default_rng(0)
    W, C = gaussian((16, 24)), moment(samples(100, 24))
    rows, columns = rng.permutation(16), rng.permutation(24)
    p = sm.project(W, sm.Monarch, blocks=4, permutation=(rows, columns), weight=C)
    q = sm.project(W[rows][:, columns], sm.Monarch, blocks=4, weight=C[np.ix_(columns, columns)])
    assert p.error == pytest.approx(q.error, rel=1e-9)
    assert p.error == pytest.approx(weighted(W - np.asarray(p.operator), C), rel=1e-7)
    t = sm.project(W, sm.Monarch, blocks=4, transposed=True, weight=C)
    assert t.error == pytest.approx(weighted(W - np.asarray(t.operator), C), rel=1e-7)
    Wc, Cc = gaussian((16, 24), 0, np.complex128), moment(samples(100, 24, 0, np.complex128))
    t = sm.project(Wc, sm.LowRank, rank=3, transposed=True, weight=Cc)
    assert t.error == pytest.approx(sm.project(Wc, sm.LowRank, rank=3, weight=Cc).error, rel=1e-9)


def test_a_complex_weight_of_a_real_matrix_counts_by_its_real_part():
    W, C = gaussian((8, 8)), moment(samples(50, 8, 0, np.complex128))
    p = sm.project(W, sm.LowRank, rank=2, weight=C)
    assert p.operator.dtype == np.float64
    assert p.error == pytest.approx(weighted(W - np.asarray(p.operator), C), rel=1e-9)


def test_torch_in_torch_out():
    torch = pytest.importorskip("torch")
    W, X = torch.from_numpy(gaussian((16, 16)).astype(np.float32)), torch.from_numpy(samples(60, 16)).float()
    p = sm.project(W.requires_grad_(), sm.Monarch, blocks=4, activations=X.requires_grad_(), mean=True)
    assert p.operator.kind == "torch"
    assert p.operator.dtype == p.bias_correction.dtype == torch.float32
    q = sm.project(W.detach().numpy(), sm.Monarch, blocks=4, activations=X.detach().numpy(), mean=True)
    assert p.error == pytest.approx(q.error, rel=1e-6)
    assert np.allclose(p.bias_correction.numpy(), q.bias_correction, atol=1e-6)


def test_nothing_is_changed_and_results_repeat():
    W, C = gaussian((16, 16)), moment(samples(60, 16))
    copies = W.copy(), C.copy()
    W.setflags(write=False)
    C.setflags(write=False)
    for _, family, options in CASES:
        if {"patterns", "shapes", "cores", "places"} & options.keys():  # for another size
            continue
        p, q = (sm.project(W, family, weight=C, **options) for _ in range(2))
        assert np.array_equal(np.asarray(p.operator), np.asarray(q.operator))
    assert np.array_equal(W, copies[0])
    assert np.array_equal(C, copies[1])


EYE = np.eye(6)
BAD = [
    ({"weight": np.ones(6)}, ValueError, r"expected a second moment \(6, 6\), got shape \(6,\)"),
    ({"weight": np.eye(5)}, ValueError, r"expected a second moment \(6, 6\), got shape \(5, 5\)"),
    ({"weight": np.triu(np.ones((6, 6)))}, ValueError, "expected a symmetric matrix, got one that differs"),
    ({"weight": np.diag([1, 1, 1, 1, 1, -1.0])}, ValueError, r"positive semidefinite matrix, got the eigenvalue -1 "),
    ({"weight": EYE * np.nan}, ValueError, "NaN or infinite"),
    ({"weight": 0 * EYE}, ValueError, "not zero"),
    ({"weight": EYE, "activations": EYE}, ValueError, "expected one of them"),
    ({"activations": np.ones((4, 5))}, ValueError, r"expected a second moment \(6, 6\), got shape \(5, 5\)"),
    ({"activations": np.ones(6)}, ValueError, r"rows \(tokens, n\), got shape \(6,\)"),
    ({"activations": np.full((3, 6), np.inf)}, ValueError, "finite"),
    ({"activations": np.zeros((0, 6))}, ValueError, "tokens"),
    ({"weight": EYE, "mean": np.ones(5)}, ValueError, r"mean: expected 6 finite numbers, got shape \(5,\)"),
    ({"weight": EYE, "mean": True}, ValueError, "with a matrix as weight expected the vector"),
    ({"weight": EYE, "mean": 2 * np.ones(6)}, ValueError, "before centring"),
    ({"mean": np.ones(6)}, ValueError, "expected a weight or activations with it"),
    ({"damping": 0.1}, ValueError, "expected a weight or activations to dampen"),
    ({"weight": EYE, "damping": -1.0}, ValueError, "at least 0, got -1"),
    ({"weight": EYE, "damping": "x"}, TypeError, "expected a number, got str"),
    ({"weight": "x"}, TypeError, "weight: expected an array"),
    ({"row_weight": np.eye(4)}, ValueError, r"row_weight: expected a second moment \(6, 6\)"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD, ids=range(len(BAD)))
def test_bad_weights(options, error, message):
    with pytest.raises(error, match=message):
        sm.project(np.ones((6, 6)), sm.LowRank, rank=2, **options)


def test_options_that_a_weight_does_not_go_with():
    W, C = gaussian((16, 16)), np.eye(16)
    with pytest.raises(TypeError, match=r"row_weight .* only for LowRank, Monarch, BlockTensorTrain, got Butterfly"):
        sm.project(W, sm.Butterfly, row_weight=C)
    with pytest.raises(TypeError, match="got Kronecker"):
        sm.project(W, sm.Kronecker, weight=C, row_weight=C)
    with pytest.raises(ValueError, match="with a weight expected 'auto' or 'svd'"):
        sm.project(W, sm.LowRank, rank=2, method="cur", weight=C)
    with pytest.raises(ValueError, match="'search' is not for a weight"):
        sm.project(W, sm.Butterfly, permutation="search", weight=C)
