"""Sums of families, BLAST and MM*, the gradient method, block-sparse and diagonal projection."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize

import structmat as sm
from structmat.algebra import Sum
from structmat.patterns import Pattern
from structmat.projection import blast as blast_module
from structmat.projection.blast import Parts, is_blast, mirrored, normalised, residual, sweep
from structmat.projection.certificate import frobenius
from structmat.projection.gradient import outside
from structmat.projection.selection import Request, Solution
from structmat.projection.sums import Problem, State, Term, _deals, _sweep, descend


def gaussian(shape, dtype: type = float, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape)
    return (x + 1j * rng.standard_normal(shape) if np.dtype(dtype).kind == "c" else x).astype(dtype)


def tail(W, rank):
    return math.sqrt((np.linalg.svd(W, compute_uv=False)[rank:] ** 2).sum())


def low_rank(n, rank, seed=2, **options):
    return sm.LowRank.random((n, n), rank=rank, rng=seed, **options).to_dense()


# ---- sums: planted members ------------------------------------------------------------------------------------------

TERMS = {  # name: (families as given to project, shape, the same as (family, options of random))
    "low-rank + monarch": [(sm.LowRank, {"rank": 3}), (sm.Monarch, {"rank": 1})],
    "low-rank + btt": [(sm.LowRank, {"rank": 2}), (sm.BlockTensorTrain, {"blocks": (6, 8), "rank": 1})],
    "pixelfly": [(sm.BlockSparse, {"block": 4}), (sm.LowRank, {"rank": 2})],
    "kronecker + diagonal": [(sm.Kronecker, {"shapes": [(6, 6), (8, 8)]}), sm.Diagonal],
    "diagonal + low-rank": [sm.Diagonal, (sm.LowRank, {"rank": 4})],
    "block-diagonal + low-rank": [(sm.BlockDiagonal, {"blocks": 8}), (sm.LowRank, {"rank": 2})],
    "three terms": [(sm.LowRank, {"rank": 2}), sm.Diagonal, sm.Kronecker],
}
SHAPES = {"low-rank + btt": (60, 64), "pixelfly": (64, 48), "kronecker + diagonal": (48, 48)}


def planted(name, dtype, seed):
    """Random members of the terms."""
    rng = np.random.default_rng(seed)
    pairs = [t if isinstance(t, tuple) else (t, {}) for t in TERMS[name]]
    return [family.random(SHAPES.get(name, (64, 64)), dtype=dtype, rng=rng, **options) for family, options in pairs]


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex128], ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("name", TERMS)
def test_planted_sums_are_recovered(name, dtype):
    parts, families = planted(name, dtype, 7), TERMS[name]
    W = np.sum([p.to_dense() for p in parts], axis=0)
    p = sm.project(W, families)
    assert isinstance(p.operator, Sum)
    assert len(p.operator.terms) == len(families)
    assert p.params == sum(part.nparams for part in parts)
    assert p.operator.dtype == np.dtype(dtype)
    assert p.relative_error <= (1e-12 if np.dtype(dtype).itemsize >= 8 and dtype != np.float32 else 1e-6)
    x = gaussian((W.shape[1], 2), dtype)
    assert np.allclose(p.operator @ x, W @ x, atol=1e-4 * np.abs(W @ x).max())


def test_the_planted_sum_of_the_reference():
    n = 256
    W = low_rank(n, 8) + sm.Monarch.random((n, n), rank=1, rng=1).to_dense()
    p = sm.project(W, [(sm.LowRank, {"rank": 8}), (sm.Monarch, {"rank": 1})])
    assert p.relative_error <= 1e-12
    assert p.params == 8 * 2 * n + 2 * n * 16
    assert tail(W, p.params // (2 * n)) > 0.3 * frobenius(W)  # low rank of the same size


@pytest.mark.parametrize("dtype", [float, complex], ids=["real", "complex"])
@pytest.mark.parametrize("name", TERMS)
def test_bounds_of_noisy_sums_hold(name, dtype):
    """What was planted is a member: no lower bound may exceed its distance."""
    for seed, noise in ((0, 0.02), (1, 0.3)):
        parts = planted(name, dtype, seed)
        N = gaussian(parts[0].shape, dtype, seed + 10)
        W = sum(p.to_dense() for p in parts) + noise * N
        p = sm.project(W, TERMS[name], rng=seed)
        assert p.lower_bound <= noise * frobenius(N)
        assert p.lower_bound <= p.error
        assert p.error <= 1.1 * noise * frobenius(N)
        assert p.error == pytest.approx(frobenius(W - p.operator.to_dense()), rel=1e-12)
        assert (p.lower_bound == 0.0) == ("three" in name or "pixelfly" in name)
        assert ("no lower bound known" in p.method) == (
            "three" in name or (name == "pixelfly" and "bound known" in p.method)
        )


def test_bound_of_diagonal_and_low_rank_against_brute_force():
    for seed in range(3):
        W = gaussian((4, 4), seed=seed)
        p = sm.project(W, [sm.Diagonal, (sm.LowRank, {"rank": 1})])
        options = {"maxiter": 4000, "fatol": 1e-12, "xatol": 1e-10}
        best = math.inf
        for x in 3 * gaussian((12, 4), seed=50 + seed):
            found = scipy.optimize.minimize(
                lambda d, W=W: tail(W - np.diag(d), 1), x, method="Nelder-Mead", options=options
            )
            best = min(best, found.fun)
        assert 0 < p.lower_bound <= best * (1 + 1e-12)
        assert p.error <= 1.02 * best  # a local optimum; here that of the best start
        assert p.error >= best * (1 - 1e-6)


def test_bounds_are_those_of_the_blocks():
    W = gaussian((36, 36))
    p = sm.project(W, [(sm.LowRank, {"rank": 2}), (sm.Monarch, {"blocks": 6, "rank": 1})])
    blocks = W.reshape(6, 6, 6, 6).transpose(1, 2, 0, 3).reshape(-1, 6, 6)  # (row class, column block)
    assert p.lower_bound == pytest.approx(math.hypot(*(tail(b, 3) for b in blocks)))
    p = sm.project(W, [(sm.BlockTensorTrain, {"blocks": (4, 3), "rank": 1}), (sm.LowRank, {"rank": 2})])
    blocks = W.reshape(4, 9, 3, 12).transpose(0, 2, 1, 3).reshape(-1, 9, 12)
    assert p.lower_bound == pytest.approx(math.hypot(*(tail(b, 3) for b in blocks)))
    p = sm.project(W, [sm.Diagonal, (sm.LowRank, {"rank": 2})])
    assert p.lower_bound == pytest.approx(math.hypot(tail(W[:18, 18:], 2), tail(W[18:, :18], 2)))
    p = sm.project(W, [(sm.BlockDiagonal, {"blocks": 3}), (sm.LowRank, {"rank": 2})])
    assert p.lower_bound == pytest.approx(math.hypot(tail(W[:18, 24:], 2), tail(W[18:, :12], 2)))
    p = sm.project(W, [(sm.Kronecker, {"shapes": [(4, 4), (9, 9)], "terms": 2}), sm.Diagonal])
    rearranged = W.reshape(4, 9, 4, 9).transpose(0, 2, 1, 3)
    off, inner = ~np.eye(4, dtype=bool), ~np.eye(9, dtype=bool)
    parts = tail(rearranged[off].reshape(12, 81), 2), tail(rearranged[~off][:, inner], 2)
    assert p.lower_bound == pytest.approx(math.hypot(*parts))


def test_no_sweep_increases_the_error(monkeypatch):
    from structmat.projection import sums

    errors: list[float] = []
    plain = sums._sweep

    def spy(problem, terms, state, before, step, warm):
        now = plain(problem, terms, state, before, step, warm)
        if step == 0.0:
            assert now.error <= state.error
        errors.append(state.error)
        return now

    monkeypatch.setattr(sums, "_sweep", spy)
    W = gaussian((40, 40))
    p = sm.project(W, [(sm.LowRank, {"rank": 3}), (sm.Monarch, {"blocks": 5, "rank": 1})])
    assert len(errors) > 6
    assert p.error <= errors[-1]


def test_a_worse_step_is_refused():
    W = gaussian((12, 12))
    u, s, vh = np.linalg.svd(W)
    good = sm.LowRank(u[:, :4], s[:4, None] * vh[:4])  # of a rank that takes no power steps
    bad = Term(lambda rest, request: Solution(sm.Dense(0 * rest), 0.0, ""), _request(W), False)
    state = State((good, good * 0.0), (good.to_dense(), 0 * W), frobenius(W - good.to_dense()))
    swept = _sweep(Problem(W), [bad, bad], state, state, 0.0)
    assert swept.error == state.error
    assert swept.operators[0] is good
    after = descend(Problem(W), [bad, bad], state, 5)
    assert after.error == state.error


def _request(W):
    return Request(family=sm.LowRank, norm=frobenius(W), rank=1)


def test_sum_is_at_least_as_near_as_each_term_alone():
    W = gaussian((48, 48))
    both = sm.project(W, [(sm.LowRank, {"rank": 4}), (sm.Monarch, {"rank": 1, "blocks": 6})])
    assert both.error < sm.project(W, sm.LowRank, rank=4).error
    assert both.error < sm.project(W, sm.Monarch, rank=1, blocks=6).error


def test_sums_repeat_for_a_seed_and_leave_the_matrix_alone():
    W = gaussian((30, 30))
    W.flags.writeable = False
    families = [(sm.LowRank, {"rank": 2}), (sm.Monarch, {"blocks": 5, "rank": 1})]
    a, b = (sm.project(W, families, rng=3) for _ in range(2))
    assert np.array_equal(a.operator.to_dense(), b.operator.to_dense())


def test_sums_transposed_permuted_scaled_and_zero():
    W = low_rank(36, 2) + sm.Monarch.random((36, 36), rank=1, rng=5).to_dense()
    families = [(sm.LowRank, {"rank": 2}), (sm.Monarch, {"rank": 1})]
    assert sm.project(W.T, families, transposed=True).relative_error < 1e-12
    rows, cols = np.random.default_rng(0).permutation(36), np.random.default_rng(1).permutation(36)
    shuffled = np.empty_like(W)
    shuffled[np.ix_(rows, cols)] = W
    assert sm.project(shuffled, families, permutation=(rows, cols)).relative_error < 1e-12
    assert sm.project(W * 1e200, families).relative_error < 1e-12
    assert sm.project(np.zeros((36, 36)), families).error == 0.0


# ---- sums: budgets --------------------------------------------------------------------------------------------------


def test_budget_goes_to_the_terms_without_a_size():
    n = 64
    W = low_rank(n, 3) + np.diag(gaussian(n))
    p = sm.project(W, [sm.Diagonal, sm.LowRank], budget=3 * 2 * n + n)
    assert p.params == 7 * n
    assert p.relative_error < 1e-12
    q = sm.project(W, [(sm.BlockDiagonal, {"blocks": 8}), sm.LowRank], budget=0.3)
    assert q.params <= 0.3 * n * n
    assert q.operator.terms[0].nparams == n * n // 8


@pytest.mark.parametrize(
    "families",
    [[sm.LowRank, sm.Monarch], [sm.LowRank, (sm.BlockSparse, {"block": 4})], [sm.Kronecker, sm.LowRank, sm.Diagonal]],
)
@pytest.mark.parametrize("budget", [0.3, 1500])
def test_budget_of_a_sum_is_kept_and_dealt(families, budget):
    W = gaussian((64, 64))
    p = sm.project(W, families, budget=budget)
    limit = budget if isinstance(budget, int) else budget * W.size
    assert 0.6 * limit <= p.params <= limit
    assert p.relative_error < 1


def test_a_dealt_budget_finds_what_was_planted():
    n = 64
    B = sm.BlockSparse(
        gaussian((20, 4, 4), seed=1), np.arange(20) % 16, (7 * np.arange(20) + np.arange(20) // 16) % 16, (n, n)
    )
    W = low_rank(n, 2) + 3 * B.to_dense()
    p = sm.project(W, [sm.LowRank, (sm.BlockSparse, {"block": 4})], budget=0.2)
    assert p.relative_error < 1e-10


def test_budget_of_a_term():
    W = gaussian((32, 32))
    p = sm.project(W, [(sm.LowRank, {"budget": 0.125}), (sm.Monarch, {"budget": 512})])
    assert p.operator.terms[0].nparams == 128
    assert p.operator.terms[1].nparams <= 512


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_deals_are_positive_and_add_up(count):
    for deal in _deals(count):
        assert len(deal) == count
        assert min(deal) > 0
        assert sum(deal) == pytest.approx(1.0)


BAD = [
    ([sm.LowRank], {}, ValueError, "at least two in a list, got 1"),
    ([], {}, ValueError, "at least two in a list, got 0"),
    ([sm.LowRank, int], {}, TypeError, "got int"),
    ([sm.LowRank, (sm.Monarch, 3)], {}, TypeError, "dict of options"),
    ([sm.LowRank, (sm.Monarch, {"colour": 3})], {}, TypeError, "colour: Monarch has no such option"),
    ([sm.LowRank, (sm.Monarch, {"terms": 3})], {}, TypeError, "terms: Monarch has no such option"),
    ([sm.LowRank, (sm.Monarch, {"tol": 0.1})], {}, TypeError, "tol: Monarch has no such option"),
    ([sm.LowRank, [sm.Monarch, sm.Diagonal]], {}, TypeError, "dict of options"),
    ([sm.LowRank, [sm.Monarch, sm.Diagonal, sm.Dense]], {}, TypeError, "each term of a sum, got a list"),
    ([sm.LowRank, (sm.Monarch, {"permutation": np.arange(8)})], {}, TypeError, "whole sum"),
    ([(sm.LowRank, {"rank": 0}), sm.Monarch], {}, ValueError, "rank: expected at least 1"),
    ([(sm.LowRank, {"rank": 2, "budget": 0.1}), sm.Monarch], {}, ValueError, "rank and budget"),
    ([sm.LowRank, sm.Monarch], {"tol": 0.1}, ValueError, "tol: a sum of families"),
    ([sm.LowRank, sm.Monarch], {"rank": 2}, TypeError, "rank: Sum has no such option"),
    ([(sm.LowRank, {"rank": 1}), sm.Diagonal], {"budget": 0.5}, ValueError, "every term of the sum has a size"),
    ([sm.LowRank, sm.Diagonal], {"budget": 8}, ValueError, "8 parameters, of which .* take 8"),
    ([sm.LowRank, sm.Diagonal], {"budget": 12}, ValueError, "nearest feasible count is 16"),
]  # fmt: skip


@pytest.mark.parametrize(("families", "options", "error", "message"), BAD)
def test_bad_sums(families, options, error, message):
    with pytest.raises(error, match=message):
        sm.project(gaussian((8, 8)), families, **options)


def test_diagonal_in_a_rectangular_sum():
    with pytest.raises(ValueError, match="a Diagonal is square"):
        sm.project(gaussian((8, 6)), [sm.LowRank, sm.Diagonal])


# ---- block-sparse and diagonal --------------------------------------------------------------------------------------


def test_block_sparse_copies_its_support():
    W = gaussian((10, 13))
    rows, cols = [0, 2, 3, 0], [1, 0, 3, 1]  # one place twice
    p = sm.project(W, sm.BlockSparse, places=(rows, cols), block=(3, 4))
    D = p.operator.to_dense()
    mask = np.zeros((12, 16), bool)
    for i, j in zip(rows, cols, strict=True):
        mask[3 * i : 3 * i + 3, 4 * j : 4 * j + 4] = True
    mask = mask[:10, :13]
    assert np.array_equal(D, np.where(mask, W, 0.0))
    assert p.error == p.lower_bound == pytest.approx(frobenius(W[~mask]))
    default = sm.project(W, sm.BlockSparse, block=3)
    assert np.array_equal(default.operator.rows, sm.flat_block_butterfly((4, 5))[0])


def test_block_sparse_with_a_budget_keeps_the_largest_blocks():
    W = gaussian((12, 12)) * np.exp(gaussian((12, 12), seed=1))
    energies = sorted((frobenius(W[i : i + 3, j : j + 3]) for i, j in itertools.product(range(0, 12, 3), repeat=2)))
    p = sm.project(W, sm.BlockSparse, block=3, budget=5 * 9 + 3)
    assert p.params == 45
    assert p.error == pytest.approx(math.hypot(*energies[:-5]))
    q = sm.project(W, sm.BlockSparse, block=3, tol=p.relative_error * (1 + 1e-9))
    assert q.params == 45


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"places": ([0, 1], [0])}, ValueError, "2 rows but 1 columns"),
        ({"places": ([0], [9]), "block": 2}, ValueError, "columns lie in 9..9, expected 0..3"),
        ({"places": ([0.5], [0])}, ValueError, "two integer arrays"),
        ({"places": ([0], [0]), "budget": 0.5}, ValueError, "places and budget"),
        ({"block": (2, 2, 2)}, ValueError, "got 3 numbers"),
        ({"block": 0}, ValueError, "at least 1, got 0"),
        ({"block": 3, "budget": 8}, ValueError, "nearest feasible count is 9"),
    ],
)
def test_bad_block_sparse(options, error, message):
    with pytest.raises(error, match=message):
        sm.project(gaussian((8, 8)), sm.BlockSparse, **options)


def test_diagonal():
    W = gaussian((6, 6), complex)
    p = sm.project(W, sm.Diagonal)
    assert np.array_equal(p.operator.values, np.diag(W))
    assert p.error == p.lower_bound == pytest.approx(frobenius(W - np.diag(np.diag(W))))
    with pytest.raises(ValueError, match="nearest feasible count is 6"):
        sm.project(W, sm.Diagonal, budget=5)
    with pytest.raises(ValueError, match="tol: no Diagonal"):
        sm.project(W, sm.Diagonal, tol=0.1)


# ---- BLAST ----------------------------------------------------------------------------------------------------------

BLAST = [((12, 8), (3, 2), 2), ((12, 8), (3, 2), 4), ((64, 64), 8, 8), ((60, 48), (5, 4), 10), ((7, 9), (1, 2), 2)]


@pytest.mark.parametrize("dtype", [np.float32, float, complex], ids=["float32", "real", "complex"])
@pytest.mark.parametrize(("shape", "blocks", "rank"), BLAST)
def test_generic_blast_members_are_recovered(shape, blocks, rank, dtype):
    patterns = sm.blast_patterns(shape, blocks, rank)
    for seed in range(3):
        member = sm.Chain.random(shape, patterns, rng=seed, dtype=dtype)
        p = sm.project(member.to_dense(), sm.Chain, patterns=patterns)
        assert p.relative_error <= (1e-5 if dtype == np.float32 else 1e-11)
        assert type(p.operator) is sm.Chain
        assert [tuple(q) for q in p.operator.patterns] == patterns
        assert p.params == member.nparams


@pytest.mark.parametrize("dtype", [float, complex], ids=["real", "complex"])
def test_mm_star_members_are_recovered(dtype):
    b = 5
    left, right = (sm.Monarch.random((b * b, b * b), blocks=b, rank=1, rng=i, dtype=dtype) for i in range(2))
    W = (left @ right.H).to_dense()
    patterns = [(1, b, b, b), (b, b, b, 1), (1, b, b, b)]
    p = sm.project(W, sm.Chain, patterns=patterns)
    assert p.relative_error <= 1e-10
    assert "alternating least squares" in p.method
    x = gaussian((b * b, 2), dtype)
    assert np.allclose(p.operator @ x, W @ x)


def test_circulant_matrices_are_mm_star():
    b = 4
    W = scipy.linalg.circulant(gaussian(b * b, complex))
    assert sm.project(W, sm.Chain, patterns=[(1, b, b, b), (b, b, b, 1), (1, b, b, b)]).relative_error <= 1e-10


@pytest.mark.parametrize("dtype", [float, complex], ids=["real", "complex"])
@pytest.mark.parametrize(("shape", "blocks", "rank"), [*BLAST, ((23, 19), (4, 3), 3), ((16, 16), 4, 7)])
def test_blast_bound_holds_and_low_rank_is_never_better(shape, blocks, rank, dtype):
    patterns = sm.blast_patterns(shape, blocks, rank)
    member = sm.Chain.random(shape, patterns, rng=1, dtype=dtype).to_dense()
    N = gaussian(shape, dtype, 3)
    for noise in (0.01, 0.3, 30.0):
        W = member + noise * N
        p = sm.project(W, sm.Chain, patterns=patterns)
        assert p.lower_bound <= noise * frobenius(N)
        assert p.lower_bound <= p.error <= tail(W, rank) * (1 + 1e-9) + 1e-9
        assert p.error == pytest.approx(frobenius(W - p.operator.to_dense()), rel=1e-9)


def test_bound_of_blast_is_that_of_the_rows_and_columns_of_blocks():
    W = gaussian((24, 20))
    p = sm.project(W, sm.Chain, patterns=sm.blast_patterns(W.shape, (3, 2), 5))
    rows = math.hypot(*(tail(W[i : i + 8], 5) for i in range(0, 24, 8)))
    cols = math.hypot(*(tail(W[:, j : j + 10], 5) for j in range(0, 20, 10)))
    assert p.lower_bound == pytest.approx(max(rows, cols))


def test_one_block_of_blast_is_low_rank():
    W = gaussian((9, 7))
    p = sm.project(W, sm.Chain, patterns=sm.blast_patterns((9, 7), 1, 3))
    assert p.error == pytest.approx(tail(W, 3), rel=1e-9)
    assert p.lower_bound == pytest.approx(p.error, rel=1e-9)


@pytest.mark.parametrize("dtype", [float, complex], ids=["real", "complex"])
def test_each_update_of_blast_is_exact_and_the_error_never_grows(dtype):
    blocks = gaussian((3, 4, 5, 6), dtype)
    parts = Parts(gaussian((3, 5, 3), dtype, 1), gaussian((3, 4, 3), dtype, 2), gaussian((4, 3, 6), dtype, 3))
    before = residual(blocks, parts)
    for _ in range(15):
        parts = normalised(sweep(blocks, parts))
        now = residual(blocks, parts)
        assert now <= before * (1 + 1e-12)
        before = now
    # the middle was updated last: the error is stationary in it
    for step in (1e-4, -1e-4, 1e-4j):
        if dtype is complex or not isinstance(step, complex):
            moved = parts._replace(middle=parts.middle + step * gaussian(parts.middle.shape, float, 9))
            assert residual(blocks, moved) >= before


def test_blast_of_the_reference_start_is_used(monkeypatch):
    """Without the algebraic start the planted member is not found to rounding: the start matters."""
    patterns = sm.blast_patterns((36, 36), 6, 6)
    W = sm.Chain.random((36, 36), patterns, rng=4).to_dense()
    assert sm.project(W, sm.Chain, patterns=patterns).relative_error < 1e-11
    monkeypatch.setattr(blast_module, "diagonalised", lambda *_: None)
    assert sm.project(W, sm.Chain, patterns=patterns).relative_error > 1e-9


def test_zero_and_empty_blast():
    patterns = sm.blast_patterns((6, 6), 2, 2)
    p = sm.project(np.zeros((6, 6)), sm.Chain, patterns=patterns)
    assert (p.error, p.lower_bound) == (0.0, 0.0)
    assert not p.operator.to_dense().any()


def test_blast_patterns():
    patterns = [Pattern(*p) for p in sm.blast_patterns((10, 7), (3, 2), 5)]
    assert is_blast(patterns)
    assert not is_blast(mirrored(patterns))
    assert mirrored(mirrored(patterns)) == tuple(patterns)
    for bad in (
        {"rank": 0, "blocks": 2},
        {"rank": 2, "blocks": 0},
        {"rank": 2, "blocks": (1, 2, 3)},
        {"rank": 2, "blocks": 11},
    ):
        with pytest.raises(ValueError, match=r"rank|blocks"):
            sm.blast_patterns((10, 7), **bad)


# ---- gradient -------------------------------------------------------------------------------------------------------

LOOSE = [
    [(2, 4, 4, 1), (1, 4, 4, 2)],
    [(1, 8, 6, 1), (2, 3, 4, 1), (1, 8, 9, 1)],
    [(2, 3, 3, 1), (1, 3, 3, 2), (3, 2, 2, 1)],
]


@pytest.mark.parametrize("dtype", [float, complex], ids=["real", "complex"])
@pytest.mark.parametrize("patterns", LOOSE)
def test_gradient_fits_chains_that_are_not_chainable(patterns, dtype):
    shape = (Pattern(*patterns[0]).rows, Pattern(*patterns[-1]).cols)
    member = sm.Chain.random(shape, patterns, rng=1, dtype=dtype).to_dense()
    with pytest.raises(ValueError, match="method='gradient' fits them"):
        sm.project(member, sm.Chain, patterns=patterns)
    p = sm.project(member, sm.Chain, patterns=patterns, method="gradient")
    assert p.relative_error < 1e-3
    W = member + 0.1 * gaussian(shape, dtype, 5)
    q = sm.project(W, sm.Chain, patterns=patterns, method="gradient")
    assert q.lower_bound <= 0.1 * frobenius(gaussian(shape, dtype, 5))
    assert q.lower_bound <= q.error < 0.12 * frobenius(gaussian(shape, dtype, 5))
    assert q.error == pytest.approx(frobenius(W - q.operator.to_dense()), rel=1e-9)


def test_gradient_is_never_worse_than_its_start():
    W = gaussian((16, 16))
    butterfly = [(1, 2, 2, 8), (2, 2, 2, 4), (4, 2, 2, 2), (8, 2, 2, 1)]
    for patterns in (butterfly, sm.blast_patterns((16, 16), 4, 6)):
        plain = sm.project(W, sm.Chain, patterns=patterns)
        fitted = sm.project(W, sm.Chain, patterns=patterns, method="gradient")
        assert fitted.error < plain.error
        assert plain.lower_bound * (1 - 1e-12) <= fitted.lower_bound <= fitted.error


def test_gradient_of_a_padded_chain():
    patterns = [(2, 4, 4, 1), (1, 4, 4, 2)]
    W = gaussian((5, 6))
    p = sm.project(W, sm.Chain, patterns=patterns, method="gradient")
    full = sm.project(np.pad(W, [(0, 3), (0, 2)]), sm.Chain, patterns=patterns, method="gradient")
    assert p.operator.shape == (5, 6)
    assert p.error == pytest.approx(full.error, rel=1e-3)  # rows and columns of zeros constrain nothing
    assert p.error == pytest.approx(frobenius(W - p.operator.to_dense()), rel=1e-9)


def test_bound_of_a_chain_that_cannot_reach_everything():
    W = gaussian((8, 8))
    patterns = [(2, 4, 4, 1), (2, 4, 4, 1)]
    expected = frobenius(W[:4, 4:]), frobenius(W[4:, :4])
    assert outside(W, [Pattern(*p) for p in patterns]) == pytest.approx(math.hypot(*expected))
    narrow = [Pattern(1, 8, 3, 1), Pattern(3, 1, 2, 1), Pattern(1, 6, 8, 1)]
    assert outside(W, narrow) == pytest.approx(tail(W, 3), rel=1e-9)


@pytest.mark.parametrize(
    ("patterns", "options", "message"),
    [
        (LOOSE[0], {"method": "als"}, "'als' is for the patterns of BLAST"),
        (LOOSE[0], {"method": "cur"}, "expected one of auto, svd, als, gradient"),
        (LOOSE[0], {"method": "gradient", "refine": True}, "refine: only for chainable"),
        ([(1, 8, 3, 1), (1, 4, 8, 1)], {"method": "gradient"}, r"3 columns but \(1, 4, 8, 1\) has 4 rows"),
        ([(1, 4, 3, 1), (1, 3, 8, 1)], {"method": "gradient"}, "4x8, too small for a matrix 8x8"),
        ([(2, 2, 3, 1), (1, 2, 2, 3), (2, 3, 2, 1)], {}, "4x4, too small for a matrix 8x8"),
    ],
)
def test_bad_chains(patterns, options, message):
    with pytest.raises(ValueError, match=message):
        sm.project(gaussian((8, 8)), sm.Chain, patterns=patterns, **options)
