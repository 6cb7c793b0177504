"""Low-rank projection: randomised and matrix-free, with their bounds; the interpolative form; CUR."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.sparse
import scipy.sparse.linalg

import structmat as sm
from structmat.projection import low_rank, randomized
from structmat.projection.interpolative import interpolate, select
from structmat.projection.matrix_free import CHUNK, Explicit, Implicit, distance

DTYPES = [np.float32, np.float64, np.complex64, np.complex128]


def gaussian(shape, dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape)
    return (x + 1j * rng.standard_normal(shape) if np.dtype(dtype).kind == "c" else x).astype(dtype)


def with_spectrum(shape, s, dtype=np.float64, seed=0):
    m, n = shape
    u, v = (np.linalg.qr(gaussian((k, len(s)), dtype, seed + i))[0] for i, k in enumerate((m, n)))
    return ((u * s) @ v.conj().T).astype(dtype)


def double(x):
    return x.astype(np.complex128 if x.dtype.kind == "c" else np.float64)


def best(W, rank):
    """Error of the best approximation of a rank, by a dense SVD."""
    return math.sqrt(float((np.linalg.svd(double(W), compute_uv=False)[rank:] ** 2).sum()))


def check_certificate(W, p, rank):
    """The error is that of the stored values; the bound is below what is best possible, and that below the error."""
    exact = np.asarray(p.operator.astype(double(W).dtype))
    norm = np.linalg.norm(double(W))
    assert abs(p.error - np.linalg.norm(double(W) - exact)) <= 1e-13 * norm * math.sqrt(max(W.shape))
    assert p.relative_error == pytest.approx(p.error / norm, rel=1e-12)
    optimum = best(W, rank)
    assert p.lower_bound <= optimum + 1e-14 * norm
    assert p.lower_bound <= p.error
    assert optimum <= p.error + 1e-14 * norm * math.sqrt(max(W.shape))
    assert p.params == p.operator.nparams


SPECTRA = {
    "flat": np.ones(60),
    "slow": 1 / np.sqrt(1 + np.arange(60)),
    "fast": 0.5 ** np.arange(60),
    "step": np.r_[np.ones(9), np.full(51, 1e-3)],
    "rank 7": np.r_[np.ones(7), np.zeros(53)],
    "zero": np.zeros(60),
}


# ---- randomised -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("shape", [(90, 60), (60, 90)], ids=str)
@pytest.mark.parametrize("name", SPECTRA)
def test_randomised_is_near_the_best_and_its_bound_holds(name, shape, dtype):
    W = with_spectrum(shape, SPECTRA[name], dtype)
    for rank in (1, 8):
        p = sm.project(W, sm.LowRank, rank=rank, method="randomized", rng=3)
        assert p.operator.rank == rank
        assert p.operator.dtype == dtype
        if name == "zero":
            assert p.error == p.lower_bound == 0
            continue
        check_certificate(W, p, rank)
        assert p.error <= 1.01 * best(W, rank) + 1e2 * np.finfo(dtype).eps * np.linalg.norm(W)
        assert "randomised" in p.method


def test_the_bound_is_certain_even_if_the_basis_is_hopeless():
    for seed in range(40):
        rng = np.random.default_rng(seed)
        m, n = rng.integers(5, 30, 2)
        W = with_spectrum((m, n), rng.random(min(m, n)) ** rng.integers(1, 12), seed=seed)
        c = int(rng.integers(1, min(m, n) + 1))
        q = np.linalg.qr(rng.standard_normal((m, c)))[0]
        if seed % 2:  # orthogonal to all that matters
            q = np.linalg.svd(W)[0][:, -c:]
        basis = randomized.Basis(q, q.T @ W)
        s = randomized.basis_svd(basis)[1]
        rest = distance(Explicit(W), q, basis.b)
        for rank in range(1, c + 1):
            for matrix in (Explicit(W), Implicit(sm.Dense(W))):
                bound = randomized.best_possible(matrix, basis, s, rest, rank)
                assert bound <= best(W, rank) * (1 + 1e-12) + 1e-13 * np.linalg.norm(W)


def test_the_bound_says_something_about_flat_and_steep_spectra():
    W = gaussian((400, 300))
    p = sm.project(W, sm.LowRank, rank=8, method="randomized")
    assert 0.85 * p.error <= p.lower_bound
    steep = with_spectrum((400, 300), 0.7 ** np.arange(300))
    p = sm.project(steep, sm.LowRank, rank=8, method="randomized")
    assert p.lower_bound == pytest.approx(best(steep, 8), rel=1e-3)
    assert p.error == pytest.approx(best(steep, 8), rel=1e-6)


def test_results_repeat_for_a_seed():
    W = gaussian((80, 70))
    make = lambda **o: sm.project(W, sm.LowRank, rank=4, method="randomized", **o)  # noqa: E731
    first, second, other = make(), make(rng=0), make(rng=1)
    assert np.array_equal(first.operator.left, second.operator.left)
    assert first.error == second.error
    assert not np.array_equal(first.operator.left, other.operator.left)
    assert make(rng=np.random.default_rng(1)).error == other.error


@pytest.mark.parametrize("tol", [0.3, 1e-2, 1e-5, 1e-9, 1e-12])
def test_adaptive_rank_meets_the_tolerance_also_below_the_digits_of_the_indicator(tol):
    W = with_spectrum((200, 150), 0.6 ** np.arange(150))  # ||W||^2 - ||Q^H W||^2 is rounding from 1e-8 on
    p = sm.project(W, sm.LowRank, tol=tol, method="randomized")
    assert p.relative_error <= tol
    assert "randomised" in p.method
    tails = np.sqrt(np.cumsum((0.6 ** np.arange(150))[::-1] ** 2)[::-1])
    least = int(np.argmax(np.append(tails, 0) <= tol * tails[0]))
    assert least <= p.operator.rank <= least + 1
    check_certificate(W, p, p.operator.rank)


def test_adaptive_rank_gives_way_to_the_svd_where_it_would_be_slower(monkeypatch):
    monkeypatch.setattr(low_rank, "LARGE", 32)
    W = gaussian((120, 100))
    p = sm.project(W, sm.LowRank, tol=0.3)
    assert "optimal" in p.method
    assert p.relative_error <= 0.3
    assert "blocked QB" in sm.project(with_spectrum((120, 100), 0.5 ** np.arange(100)), sm.LowRank, tol=1e-2).method


def test_auto_chooses_by_size_and_rank(monkeypatch):
    W = gaussian((200, 180))
    assert "optimal" in sm.project(W, sm.LowRank, rank=4).method
    monkeypatch.setattr(low_rank, "LARGE", 100)
    assert "Krylov" in sm.project(W, sm.LowRank, rank=4).method
    assert "Krylov" in sm.project(W, sm.LowRank, budget=0.05).method
    assert "optimal" in sm.project(W, sm.LowRank, rank=40).method
    assert "optimal" in sm.project(W, sm.LowRank, budget=0.5).method
    assert "optimal" in sm.project(W, sm.LowRank, rank=4, method="svd").method


def test_randomised_budgets_stop_where_only_rounding_is_left():
    W = with_spectrum((100, 80), np.ones(5))
    p = sm.project(W, sm.LowRank, budget=0.5, method="randomized")
    assert p.operator.rank == 5
    p = sm.project(gaussian((100, 80)), sm.LowRank, budget=1900, method="randomized")
    assert p.operator.rank == 10
    with pytest.raises(ValueError, match="at most 100 parameters; the nearest feasible count is 180"):
        sm.project(W, sm.LowRank, budget=100, method="randomized")


def test_randomised_ranks_beyond_the_size_are_filled_with_zeros():
    W = gaussian((7, 5))
    p = sm.project(W, sm.LowRank, rank=9, method="randomized")
    assert p.operator.rank == 9
    assert p.relative_error <= 1e-14


@pytest.mark.slow
def test_randomised_is_chosen_for_large_matrices_and_within_one_percent():
    W = gaussian((1500, 1300))
    p = sm.project(W, sm.LowRank, rank=40)
    assert "Krylov" in p.method
    check_certificate(W, p, 40)
    assert p.error <= 1.01 * best(W, 40)


# ---- without a dense matrix ------------------------------------------------------------------------------------------


class Counted(scipy.sparse.linalg.LinearOperator):
    """Products only, and how many columns were asked for at once."""

    def __init__(self, W):
        super().__init__(W.dtype, W.shape)
        self.W, self.widest = W, 0

    def _matmat(self, x):
        self.widest = max(self.widest, x.shape[1])
        return self.W @ x

    def _rmatmat(self, x):
        self.widest = max(self.widest, x.shape[1])
        return self.W.conj().T @ x

    def _matvec(self, x):
        return self.W @ x

    def _rmatvec(self, x):
        return self.W.conj().T @ x


@pytest.mark.parametrize("dtype", [np.float64, np.complex128, np.float32], ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("option", [{"rank": 6}, {"tol": 1e-2}, {"budget": 0.1, "interpolative": True}], ids=str)
def test_linear_operators_are_asked_for_products_alone(option, dtype):
    W = with_spectrum((500, 400), 0.6 ** np.arange(400), dtype)
    counted = Counted(W)
    p = sm.project(counted, sm.LowRank, method="randomized", **option)
    assert "without a dense matrix" in p.method
    assert counted.widest <= CHUNK
    assert p.operator.dtype == dtype
    check_certificate(W, p, p.operator.rank)
    assert p.error <= 1.01 * best(W, p.operator.rank) + 1e2 * np.finfo(dtype).eps


def test_sparse_matrices_and_operators_give_what_their_dense_twins_give():
    a = scipy.sparse.random(300, 200, 0.05, format="coo", rng=np.random.default_rng(0))
    twice = scipy.sparse.coo_array((np.r_[a.data, a.data], (np.r_[a.row, a.row], np.r_[a.col, a.col])), a.shape)
    for W in (a.tocsr(), a.tocsc(), twice, sm.Monarch.random((300, 200), blocks=4, rank=2, rng=0), sm.Identity(150)):
        dense = np.asarray(sm.as_operator(W).to_dense())
        p = sm.project(W, sm.LowRank, rank=5, method="randomized")
        q = sm.project(dense, sm.LowRank, rank=5, method="randomized")
        assert "without a dense matrix" in p.method
        assert p.error == pytest.approx(q.error, rel=1e-9)
        check_certificate(dense, p, 5)


def test_torch_operators_stay_in_torch():
    torch = pytest.importorskip("torch")
    A = sm.Monarch.random((60, 50), blocks=2, rank=2, rng=0).to("torch").astype(torch.float32)
    p = sm.project(A, sm.LowRank, rank=3, method="randomized")
    assert p.operator.kind == "torch"
    assert p.operator.dtype == torch.float32
    W = A.to_dense()
    q = sm.project(W, sm.LowRank, rank=3, interpolative=True)
    assert q.operator.kind == "torch"
    x = torch.ones(50)
    assert torch.allclose(q.operator @ x, q.operator.to_dense() @ x, atol=1e-5)
    sm.testing.check_operator(q.operator)


def test_operators_are_not_made_dense_where_that_is_large(monkeypatch):
    monkeypatch.setattr(low_rank, "AFFORDABLE", 1000)
    W = with_spectrum((90, 80), 0.5 ** np.arange(80))
    for option in ({"rank": 30}, {"tol": 1e-6}, {"budget": 0.9}):
        counted = Counted(W)
        p = sm.project(counted, sm.LowRank, **option)
        assert "without a dense matrix" in p.method
        check_certificate(W, p, p.operator.rank)
    assert "optimal" in sm.project(Counted(W), sm.LowRank, rank=3, method="svd").method


def test_operators_in_other_families_are_made_dense_as_before():
    A = sm.LowRank.random((36, 36), rank=1, rng=0)
    assert sm.project(A, sm.Monarch, blocks=6, rank=1).relative_error <= 1e-14
    assert "optimal" in sm.project(A, sm.LowRank, rank=1).method  # small: the SVD is sooner found


def test_a_matrix_free_operator_without_adjoint_or_with_nan_is_refused():
    W = gaussian((40, 30))
    half = scipy.sparse.linalg.LinearOperator(W.shape, matvec=lambda x: W @ x, dtype=W.dtype)
    with pytest.raises(TypeError, match=r"W\.H.*rmatmat"):
        sm.project(half, sm.LowRank, rank=2, method="randomized")
    W[3, 4] = np.nan
    with pytest.raises(ValueError, match="NaN, infinite"):
        sm.project(Counted(W), sm.LowRank, rank=2, method="randomized")
    sparse = scipy.sparse.csr_array(np.nan_to_num(W, nan=np.inf))
    with pytest.raises(ValueError, match="NaN, infinite"):
        sm.project(sparse, sm.LowRank, rank=2, method="randomized")
    with pytest.raises(ValueError, match=r"expected one matrix.*\(2, 8, 6\)"):
        sm.project(sm.Dense(gaussian((2, 8, 6))), sm.LowRank, rank=2, method="randomized")


# ---- interpolative --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("shape", [(20, 13), (13, 20), (12, 12)], ids=str)
def test_interpolative_is_the_truncated_svd_with_fewer_numbers(shape, dtype):
    W = gaussian(shape, dtype)
    for rank in (1, 4, 12, 40):
        p = sm.project(W, sm.LowRank, rank=rank, interpolative=True)
        plain = sm.project(W, sm.LowRank, rank=rank)
        r = min(rank, *shape)
        assert type(p.operator) is sm.Interpolative
        assert p.operator.rank == r
        assert p.params == r * (sum(shape) - r)
        assert p.operator._flops() == 2 * p.params
        tol = 200 * np.finfo(dtype).eps * np.linalg.norm(W)
        assert np.abs(np.asarray(p.operator) - np.asarray(plain.operator)).max() <= tol
        check_certificate(W, p, r)
        assert np.abs(p.operator.coefficients).max(initial=0) <= 2.001


def test_interpolative_budget_and_tolerance_count_their_own_parameters():
    W = gaussian((384, 384), np.float32)
    p = sm.project(W, sm.LowRank, budget=0.5, interpolative=True)
    assert p.operator.rank == 112  # gauge-free: ((m + n) - sqrt((m + n)^2 - 4 f m n)) / 2
    assert sm.project(W, sm.LowRank, budget=0.5).operator.rank == 96
    assert p.params <= 384 * 384 / 2 < 113 * (768 - 113)
    full = sm.project(W, sm.LowRank, budget=1.0, interpolative=True)
    assert full.params == W.size
    assert full.relative_error <= 1e-6
    q = sm.project(W, sm.LowRank, tol=0.5, interpolative=True)
    assert q.relative_error <= 0.5
    assert q.operator.rank == sm.project(W, sm.LowRank, tol=0.5).operator.rank
    r = sm.project(W, sm.LowRank, budget=0.1, interpolative=True, method="randomized")
    assert r.operator.rank == sm.project(W, sm.LowRank, budget=0.1, interpolative=True).operator.rank
    check_certificate(W, r, r.operator.rank)
    with pytest.raises(ValueError, match="nearest feasible count is 767"):
        sm.project(W, sm.LowRank, budget=766, interpolative=True)


def test_selection_swaps_until_the_coefficients_are_small():
    for seed in range(30):
        rng = np.random.default_rng(seed)
        m, r = int(rng.integers(3, 40)), int(rng.integers(1, 4))
        q = np.linalg.qr(rng.standard_normal((m, r)) * 10.0 ** rng.integers(-6, 1, (m, 1)))[0]
        index, t = select(q)
        assert sorted(index) == list(range(m))
        assert np.abs(t).max(initial=0) <= 2 + 1e-9
        assert np.allclose(q[index[r:]], t @ q[index[:r]], atol=1e-12)
    n, c = 60, 0.1  # Kahan's matrix: column pivoting leaves it as it is, with coefficients c (1 + c)^(n - 2)
    kahan = np.diag(math.sqrt(1 - c * c) ** np.arange(n)) @ (np.eye(n) - c * np.triu(np.ones((n, n)), 1))
    basis = (kahan[: n - 1] * (1 - 1e-6) ** np.arange(n)).T
    triangle = scipy.linalg.qr(basis.T, mode="r", pivoting=True)[0]
    assert np.abs(np.linalg.solve(triangle[:, : n - 1], triangle[:, n - 1 :])).max() > 10
    index, t = select(basis)
    assert np.abs(t).max() <= 2 + 1e-9
    assert np.allclose(basis[index[n - 1 :]], t @ basis[index[: n - 1]], atol=1e-10)


def test_interpolate_takes_the_side_it_is_told():
    W = gaussian((9, 6))
    u, s, vh = (x[..., :3] if i < 2 else x[:3] for i, x in enumerate(np.linalg.svd(W, full_matrices=False)))
    for side in ("rows", "columns"):
        A = interpolate(u, s, vh, side)
        assert A.side == side
        assert np.allclose(A.to_dense(), (u * s) @ vh)
    assert interpolate(u, s, vh).side == "columns"  # the shorter side


def test_interpolative_operator():
    A = sm.Interpolative.random((9, 6), rank=2, rng=0)
    dense = np.asarray(A)
    assert np.array_equal(dense[A.selected], A.basis)
    assert type(A.T) is sm.Interpolative
    assert A.T.T is A
    assert np.allclose(A.to_low_rank().to_dense(), dense)
    assert np.allclose(A.left @ A.right, dense)
    assert np.allclose(A.T.left @ A.T.right, dense.T)
    assert type(A * 3) is sm.Interpolative
    sm.testing.check_operator(A)
    B = sm.Interpolative.random((6, 9), rank=2, side="columns", rng=0, dtype=np.complex64)
    assert B.shape == (6, 9)
    sm.testing.check_operator(B)
    index, t, b = np.arange(3), np.ones((2, 1)), np.ones((1, 4))
    for arguments, error, message in (
        ((index, t, b, "diagonal"), ValueError, "'rows' or 'columns', got 'diagonal'"),
        ((index, np.ones((2, 2)), b), ValueError, r"coefficients \(2, 2\) and basis \(1, 4\)"),
        (([0, 1, 1], t, b), ValueError, r"each of 0\.\.2 once"),
        (([0, 1], t, b), ValueError, r"each of 0\.\.2 once"),
        (([0.0, 1.0, 2.0], t, b), TypeError, "integers"),
        ((index, t[None], b), ValueError, "batch"),
    ):
        with pytest.raises(error, match=message):
            sm.Interpolative(*arguments)
    with pytest.raises(ValueError, match="rank: expected between 0 and 9"):
        sm.Interpolative.random((9, 6), rank=10)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize(("shape", "blocks", "rank"), [((24, 20), (2, 3), 4), ((23, 31), (5, 3), 2), ((6, 40), 2, 9)])
@pytest.mark.parametrize("family", [sm.Monarch, sm.BlockTensorTrain])
def test_interpolative_blocks_are_the_same_matrix_with_fewer_numbers(family, shape, blocks, rank, dtype):
    W = gaussian(shape, dtype)
    plain = sm.project(W, family, blocks=blocks, rank=rank)
    p = sm.project(W, family, blocks=blocks, rank=rank, interpolative=True)
    assert type(p.operator) is sm.InterpolativeBlocks
    l, k = blocks if isinstance(blocks, tuple) else (blocks, blocks)
    s, q = -(-shape[0] // l), -(-shape[1] // k)
    r = min(rank, s, q)
    assert p.params == k * l * r * (s + q - r)
    assert p.operator._flops() == 2 * p.params
    tol = 200 * np.finfo(dtype).eps * np.linalg.norm(W)
    assert np.abs(np.asarray(p.operator) - np.asarray(plain.operator)).max() <= tol
    assert p.lower_bound <= p.error
    assert p.lower_bound == pytest.approx(plain.lower_bound, rel=1e-6, abs=float(tol))
    assert np.abs(p.operator.coefficients).max(initial=0) <= 2.001
    assert np.abs(np.asarray(p.operator.to_chain()) - np.asarray(p.operator)).max() <= tol
    sm.testing.check_operator(p.operator)
    sm.testing.check_operator(p.operator.T)


def test_interpolative_blocks_buy_a_larger_rank():
    W = gaussian((96, 96))
    plain = sm.project(W, sm.BlockTensorTrain, blocks=2, budget=0.5)
    p = sm.project(W, sm.BlockTensorTrain, blocks=2, budget=0.5, interpolative=True)
    assert (plain.operator.ranks[0], p.operator.rank) == (12, 14)
    assert p.params <= W.size // 2
    assert p.error < plain.error
    full = sm.project(W, sm.Monarch, blocks=4, budget=1.0, interpolative=True)
    assert full.relative_error <= 1e-13  # the family contains dense
    assert full.params <= W.size
    q = sm.project(W, sm.Monarch, tol=0.5, blocks=2, interpolative=True)
    assert q.relative_error <= 0.5
    assert q.operator.rank == sm.project(W, sm.Monarch, tol=0.5, blocks=2).operator.rank


def test_interpolative_blocks_in_torch_and_refusals():
    torch = pytest.importorskip("torch")
    p = sm.project(torch.from_numpy(gaussian((14, 12), np.float32)), sm.Monarch, blocks=2, rank=2, interpolative=True)
    assert p.operator.kind == "torch"
    sm.testing.check_operator(p.operator)
    sm.testing.check_operator(p.operator.T)
    t, left, index = np.ones((2, 3, 1, 1)), np.ones((3, 4, 2)), np.tile(np.arange(2), (2, 3, 1))
    assert sm.InterpolativeBlocks(index, t, left).shape == (12, 4)
    for arguments, error, message in (
        ((index, t, left, None, None, None, "up"), ValueError, "'columns' or 'rows', got 'up'"),
        ((index, t, np.ones((3, 4, 3))), ValueError, r"need a left factor \(\*batch, 3, s, 2\), got \(3, 4, 3\)"),
        ((index[:1], t, left), ValueError, r"index: expected \(2, 3, 2\), got \(1, 3, 2\)"),
        ((index * 0, t, left), ValueError, r"each of 0\.\.1 once"),
        ((index * 1.0, t, left), TypeError, "integers"),
        ((index, t, left, (13, 4)), ValueError, r"shape \(13, 4\) does not fit"),
    ):
        with pytest.raises(error, match=message):
            sm.InterpolativeBlocks(*arguments)
    with pytest.raises(ValueError, match="rank: expected between 0 and 5"):
        sm.InterpolativeBlocks.random((12, 10), blocks=2, rank=6)


# ---- CUR ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float64, np.complex128], ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("tol", [0.3, 1e-3, 1e-9])
def test_cur_takes_the_smallest_rank_that_meets_a_tolerance(tol, dtype):
    rng = np.random.default_rng(0)
    U, V = (np.linalg.qr(rng.standard_normal((n, 30)).astype(dtype))[0] for n in (40, 30))
    W = (U * np.exp(-np.arange(30.0))) @ V.conj().T
    p = sm.project(W, sm.LowRank, tol=tol, method="cur")
    rank = p.operator.rank
    assert p.error == pytest.approx(np.linalg.norm(W - np.asarray(p.operator)), abs=1e-14)
    assert p.relative_error <= tol
    assert rank == 1 or sm.project(W, sm.LowRank, rank=rank - 1, method="cur").relative_error > tol
    assert rank >= sm.project(W, sm.LowRank, tol=tol).operator.rank
    assert p.lower_bound == pytest.approx(np.sqrt((np.exp(-np.arange(rank, 30.0)) ** 2).sum()), rel=1e-3, abs=1e-14)
    rows, columns = p.indices
    assert len(rows) == len(columns) == rank
    assert np.array_equal(np.asarray(p.operator.left), W[:, columns])
    with pytest.raises(ValueError, match="best relative error reachable"):
        sm.project(rng.standard_normal((8, 8)).astype(np.float32), sm.LowRank, tol=1e-9, method="cur")


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
def test_cur_is_made_of_rows_and_columns_with_the_best_core(dtype):
    W = with_spectrum((40, 30), 0.6 ** np.arange(30), dtype)
    for rank in (1, 6):
        p = sm.project(W, sm.LowRank, rank=rank, method="cur")
        rows, columns = p.indices
        assert type(p.operator) is sm.LowRank
        assert np.array_equal(p.operator.left, W[:, columns])
        c, r = double(W[:, columns]), double(W[rows])
        core = np.linalg.pinv(c) @ double(W) @ np.linalg.pinv(r)
        assert np.linalg.norm(double(W) - c @ core @ r) == pytest.approx(p.error, rel=1e-4)
        check_certificate(W, p, rank)
        assert p.error <= 2 * math.sqrt(1 + 4 * rank * 40) * best(W, rank)
        assert p.lower_bound == pytest.approx(best(W, rank), rel=1e-4)
    exact = sm.LowRank.random((20, 15), rank=4, rng=0).to_dense()
    assert sm.project(exact, sm.LowRank, rank=4, method="cur").relative_error <= 1e-13
    assert sm.project(exact, sm.LowRank, rank=9, method="cur").relative_error <= 1e-13  # dependent columns
    assert sm.project(exact, sm.LowRank, rank=4).indices is None


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "options", "error", "message"),
    [
        (
            sm.LowRank,
            {"method": "magic"},
            ValueError,
            "method: expected one of auto, svd, randomized, cur; got 'magic'",
        ),
        (sm.LowRank, {"method": "cur", "interpolative": True}, ValueError, "tolerance and no interpolative"),
        (sm.LowRank, {"interpolative": 1}, TypeError, "interpolative: expected True or False, got int"),
        (sm.Kronecker, {"interpolative": True}, TypeError, "Kronecker has no such option"),
        (sm.LowRank, {"rank": 2, "tol": 0.1, "method": "randomized"}, ValueError, "rank and tol"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_options_that_do_not_fit_are_named(family, options, error, message):
    with pytest.raises(error, match=message):
        sm.project(gaussian((8, 8)), family, **options)


@pytest.mark.parametrize("options", [{"method": "randomized", "rank": 3}, {"method": "randomized", "tol": 0.5}])
def test_a_driver_that_does_not_converge_is_followed_by_the_other(options, monkeypatch):
    W = np.random.default_rng(0).standard_normal((60, 50))
    expected = sm.project(W, sm.LowRank, **options)

    def fails(*args, **kwargs):
        raise np.linalg.LinAlgError("SVD did not converge")

    monkeypatch.setattr(np.linalg, "svd", fails)
    found = sm.project(W, sm.LowRank, **options)
    assert found.error == pytest.approx(expected.error, rel=1e-9)
    monkeypatch.setattr(scipy.linalg, "svd", fails)
    with pytest.raises(np.linalg.LinAlgError, match="converged neither with gesdd nor with gesvd"):
        sm.project(W, sm.LowRank, **options)
