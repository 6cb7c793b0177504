"""Kronecker projection: Lanczos and its bound, sums, three and more factors, PHM, given permutations."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

import structmat as sm
from structmat.algebra import Sum
from structmat.projection import lanczos
from structmat.projection.canonical import canonical
from structmat.projection.certificate import frobenius
from structmat.projection.kronecker import unfold
from structmat.projection.lanczos import leading_triplets


def gaussian(shape, dtype=float, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape)
    return x + 1j * rng.standard_normal(shape) if np.dtype(dtype).kind == "c" else x


def orthogonal(n, dtype=float, seed=0):
    return np.linalg.qr(gaussian((n, n), dtype, seed))[0]


def with_spectrum(s, dtype=float):
    return (orthogonal(len(s), dtype, 1) * s) @ orthogonal(len(s), dtype, 2)


# ---- Lanczos --------------------------------------------------------------------------------------------------------

N = 160
SPECTRA = {
    "harmonic": 1.0 / np.arange(1, N + 1),
    "geometric": 0.5 ** np.arange(N),
    "all equal": np.ones(N),
    "triple top": np.r_[2.0, 2.0, 2.0, np.ones(N - 3)],
    "degenerate at the cut": np.r_[3.0, 1.0, 1.0, 1.0, 1.0, np.full(N - 5, 0.1)],
    "rank 2": np.r_[1.0, 1e-3, np.zeros(N - 2)],
    "ill-conditioned rank 3": np.r_[1.0, 1e-5, 1e-9, np.zeros(N - 3)],
    "small tail": np.r_[1.0, 0.1, 0.01, 1e-8 * np.linspace(1, 0.1, N - 3)],
    "tall": None,
    "wide": None,
    "gaussian": None,
}


@pytest.mark.parametrize("dtype", [float, complex], ids=["real", "complex"])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", SPECTRA)
def test_lanczos_finds_the_optimum_and_its_bound_holds(name, count, dtype):
    shape = {"tall": (300, 100), "wide": (100, 300)}.get(name, (N, N))
    A = gaussian(shape, dtype) if SPECTRA[name] is None else with_spectrum(SPECTRA[name], dtype)
    norm = frobenius(A)
    found = leading_triplets(A, count, norm, np.random.default_rng(0))
    s = np.linalg.svd(A, compute_uv=False)
    optimum = math.sqrt((s[count:] ** 2).sum())
    if found is None:  # a flat spectrum may take more vectors than it is worth, and says so
        assert name in ("tall", "wide", "gaussian", "harmonic")
        return
    u, values, vh, bound = found
    eye = np.eye(count)
    assert np.allclose(u.conj().T @ u, eye, atol=1e-12)
    assert np.allclose(vh @ vh.conj().T, eye, atol=1e-12)
    error = frobenius(A - (u * values) @ vh)
    assert error <= optimum * (1 + 1e-9) + 4e-15 * norm
    assert bound <= optimum
    assert bound >= 0.9 * optimum - 1e-6 * norm * (name != "harmonic")


def test_the_bound_survives_a_direction_that_was_missed(monkeypatch):
    A = np.diag(np.r_[10.0, 5.0, np.linspace(1, 0.1, 98)])
    wrong = np.eye(100)[:, 1:2]  # a singular vector, exact, but not the first
    monkeypatch.setattr(lanczos, "_right_vectors", lambda *_: wrong)
    found = leading_triplets(A, 1, frobenius(A), np.random.default_rng(0))
    best = math.sqrt((np.diag(A)[1:] ** 2).sum())
    assert found is not None
    assert found.s[0] == pytest.approx(5.0)
    assert found.lower_bound <= best
    assert found.lower_bound > 0.5 * best


def test_the_bound_allows_for_what_the_check_has_not_found(monkeypatch):
    s = np.r_[1.002, np.linspace(1.0, 0.5, 599)]
    A = np.diag(s)
    wrong = np.eye(600)[:, 300:301]  # the check has steps enough to come near the largest, not to reach it
    monkeypatch.setattr(lanczos, "_right_vectors", lambda *_: wrong)
    best = math.sqrt((s[1:] ** 2).sum())
    for seed in range(10):
        found = leading_triplets(A, 1, frobenius(A), np.random.default_rng(seed))
        assert found is not None
        assert 0.99 * best <= found.lower_bound <= best


def test_the_bound_survives_vectors_that_have_not_converged(monkeypatch):
    A = with_spectrum(1.0 / np.arange(1, 101))
    for noise, share in ((1e-1, 0.0), (1e-2, 0.5), (1e-4, 0.9), (1e-6, 0.9999)):
        v = np.linalg.qr(np.linalg.svd(A)[2][:2].T + noise * gaussian((100, 2), seed=3))[0]
        monkeypatch.setattr(lanczos, "_right_vectors", lambda *_, v=v: v)
        found = leading_triplets(A, 2, frobenius(A), np.random.default_rng(1))
        best = math.sqrt((1.0 / np.arange(3, 101) ** 2).sum())
        assert found is not None
        assert share * best <= found.lower_bound <= best


def test_the_bound_holds_for_many_seeds():
    A = np.diag(np.r_[1.0, np.full(59, 0.99)])  # no gap: the check is all there is
    best = math.sqrt(59 * 0.99**2)
    for seed in range(60):
        found = leading_triplets(A, 1, frobenius(A), np.random.default_rng(seed))
        assert found is not None
        assert found.lower_bound <= best * (1 + 1e-14)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex128])
@pytest.mark.parametrize("shapes", [((16, 12), (14, 18)), ((20, 20), (10, 10))])
def test_project_by_lanczos_is_the_svd_projection(shapes, dtype):
    shape = (shapes[0][0] * shapes[1][0], shapes[0][1] * shapes[1][1])
    A, B = gaussian(shapes[0], dtype, 1), gaussian(shapes[1], dtype, 2)
    W = (np.kron(A, B) + 0.5 * gaussian(shape, dtype, 3)).astype(dtype)
    fast = sm.project(W, sm.Kronecker, shapes=shapes, terms=1, method="lanczos")
    full = sm.project(W, sm.Kronecker, shapes=shapes, terms=1, method="svd")
    assert "Lanczos" in fast.method
    assert "SVD" in full.method
    assert fast.error == pytest.approx(full.error, rel=1e-9)
    assert fast.lower_bound <= full.error
    assert fast.lower_bound >= full.error * (1 - 1e-3)
    assert fast.operator.dtype == dtype


def test_large_rearrangements_go_by_lanczos_unasked():
    W = np.kron(gaussian((24, 24), seed=1), gaussian((24, 24), seed=2)) + 0.1 * gaussian((576, 576), seed=3)
    p = sm.project(W, sm.Kronecker, terms=1, shapes=[(24, 24), (24, 24)])
    assert "Lanczos" in p.method
    s = np.linalg.svd(unfold(W, ((24, 24), (24, 24))), compute_uv=False)
    assert p.error == pytest.approx(math.sqrt((s[1:] ** 2).sum()), rel=1e-9)
    q = sm.project(W, sm.Kronecker, budget=2 * 1152, shapes=[(24, 24), (24, 24)], rng=3)
    assert "Lanczos" in q.method
    assert q.params == 2304
    assert q.error == pytest.approx(math.sqrt((s[2:] ** 2).sum()), rel=1e-9)
    assert sm.project(W, sm.Kronecker, tol=0.5).relative_error <= 0.5


def test_lanczos_results_repeat_for_a_seed():
    W = gaussian((576, 576))
    a, b = (sm.project(W, sm.Kronecker, rng=5) for _ in range(2))
    assert np.array_equal(a.operator.to_dense(), b.operator.to_dense())
    assert a.lower_bound == b.lower_bound


# ---- PHM and permutations -------------------------------------------------------------------------------------------


def test_phm_is_a_sum_of_terms():
    n, m, k = 4, 24, 32
    rules, weights = gaussian((n, n, n), seed=1), gaussian((n, m // n, k // n), seed=2)
    W = sum(np.kron(a, s) for a, s in zip(rules, weights, strict=True))
    p = sm.project(W, sm.Kronecker, shapes=[(n, n), (m // n, k // n)], terms=n)
    assert p.relative_error < 1e-14
    assert p.params == n**3 + m * k // n


@pytest.mark.parametrize("terms", [1, 2])
def test_permuted_kronecker(terms):
    rng = np.random.default_rng(0)
    shapes = [(3, 4), (5, 2)]
    rows, cols = rng.permutation(15), rng.permutation(8)
    K = np.sum([sm.Kronecker.random((15, 8), shapes=shapes, rng=i).to_dense() for i in range(terms)], axis=0)
    W = np.empty_like(K)
    W[np.ix_(rows, cols)] = K
    p = sm.project(W, sm.Kronecker, shapes=shapes, terms=terms, permutation=(rows, cols))
    assert p.relative_error < 1e-14
    assert p.params < K.size
    x = gaussian((8, 3))
    assert np.allclose(p.operator @ x, W @ x)
    assert sm.project(W, sm.Kronecker, shapes=shapes, terms=terms).relative_error > 0.1


# ---- three and more factors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [float, complex], ids=["real", "complex"])
def test_three_factors_error_bound_and_optimum_of_a_small_case(dtype):
    shapes = ((2, 2), (2, 1), (1, 2))
    for seed in range(4):
        W = gaussian((4, 4), dtype, seed)
        p = sm.project(W, sm.Kronecker, shapes=shapes)
        tensor = unfold(W, shapes)
        best = np.inf
        for trial in range(40):  # brute force: power iterations from random vectors
            v = [gaussian((k,), dtype, 100 * trial + i) for i, k in enumerate(tensor.shape)]
            for _ in range(60):
                v[0] = np.einsum("ijk,j,k", tensor, v[1].conj(), v[2].conj())
                v[1] = np.einsum("ijk,i,k", tensor, v[0].conj(), v[2].conj())
                v[1] /= np.linalg.norm(v[1])
                v[2] = np.einsum("ijk,i,j", tensor, v[0].conj(), v[1].conj())
                v[2] /= np.linalg.norm(v[2])
                v[0] = np.einsum("ijk,j,k", tensor, v[1].conj(), v[2].conj())
            best = min(best, frobenius(tensor - np.einsum("i,j,k", *v)))
        assert p.lower_bound <= best * (1 + 1e-12)
        assert best <= p.error * (1 + 1e-12)
        assert p.error <= 1.1 * best
        unfoldings = [
            np.linalg.svd(np.moveaxis(tensor, i, 0).reshape(tensor.shape[i], -1), compute_uv=False) for i in range(3)
        ]
        assert p.lower_bound == pytest.approx(max(math.sqrt((s[1:] ** 2).sum()) for s in unfoldings), rel=1e-6)


CANONICAL = [
    ([(2, 2)] * 3, 2),
    ([(3, 4), (4, 3), (2, 5)], 3),
    ([(2, 3)] * 4, 3),
    ([(4, 4)] * 3, 6),
    ([(1, 2), (3, 1), (2, 2)], 2),
]


@pytest.mark.parametrize("dtype", [float, complex], ids=["real", "complex"])
@pytest.mark.parametrize(("shapes", "terms"), CANONICAL)
def test_sums_of_products_of_many_factors_are_recovered(shapes, terms, dtype):
    shape = (math.prod(s[0] for s in shapes), math.prod(s[1] for s in shapes))
    W = sum(sm.Kronecker.random(shape, shapes=shapes, dtype=dtype, rng=i).to_dense() for i in range(terms))
    p = sm.project(W, sm.Kronecker, shapes=shapes, terms=terms)
    assert isinstance(p.operator, Sum)
    assert len(p.operator.terms) == terms
    assert p.relative_error < 1e-12
    assert p.params == terms * sum(m * n for m, n in shapes)
    fewer = sm.project(W, sm.Kronecker, shapes=shapes, terms=terms - 1)
    assert 0 < fewer.lower_bound <= fewer.error


def test_bound_of_a_sum_of_products_of_many_factors():
    W, shapes = gaussian((27, 27)), [(3, 3)] * 3
    p = sm.project(W, sm.Kronecker, shapes=shapes, terms=3)
    tensor = unfold(W, tuple(shapes))
    unfoldings = [np.moveaxis(tensor, i, 0).reshape(9, 81) for i in range(3)]
    tails = [math.sqrt((np.linalg.svd(u, compute_uv=False)[3:] ** 2).sum()) for u in unfoldings]
    assert p.lower_bound == pytest.approx(max(tails), rel=1e-6)


def test_more_terms_of_many_factors_are_never_worse_than_one():
    W = gaussian((27, 27))
    shapes = [(3, 3)] * 3
    errors = [sm.project(W, sm.Kronecker, shapes=shapes, terms=t).relative_error for t in (1, 2, 4, 8)]
    assert all(b < a for a, b in itertools.pairwise(errors))


def test_canonical_of_a_tensor_without_a_best_approximation_stays_finite():
    a, b = np.eye(2)
    limit = np.sum(
        [np.einsum("i,j,k", *v) for v in ((a, a, b), (a, b, a), (b, a, a))], axis=0
    )  # rank 3, a limit of rank 2
    f = canonical(limit, 2, np.random.default_rng(0))
    assert all(np.isfinite(x).all() for x in f)
    assert frobenius(limit - np.einsum("it,jt,kt->ijk", *f)) < 0.2


def test_canonical_of_zero_is_zero():
    assert not any(f.any() for f in canonical(np.zeros((2, 3, 2)), 2, np.random.default_rng(0)))
    p = sm.project(np.zeros((8, 8)), sm.Kronecker, shapes=[(2, 2)] * 3, terms=2)
    assert p.error == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shapes": [(2, 2)] * 3, "tol": 0.1}, "need two factors"),
        ({"shapes": [(2, 2)] * 3, "budget": 0.5}, "need two factors"),
        ({"shapes": [(8, 8)], "terms": 2}, "terms at least two"),
        ({"method": "cur"}, "expected one of auto, svd, lanczos; got 'cur'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        sm.project(gaussian((8, 8)), sm.Kronecker, **options)
