"""What projection refuses, what it says then, and that nothing is changed: one table for all families and methods."""

from __future__ import annotations

import re

import numpy as np
import pytest
import scipy.linalg
import torch

import structmat as sm
from structmat.projection import drivers

N = 8
FAMILIES = {
    "low-rank": (sm.LowRank, {"rank": 2}),
    "interpolative": (sm.LowRank, {"rank": 2, "interpolative": True}),
    "cur": (sm.LowRank, {"rank": 2, "method": "cur"}),
    "randomised": (sm.LowRank, {"rank": 2, "method": "randomized"}),
    "kronecker": (sm.Kronecker, {}),
    "lanczos": (sm.Kronecker, {"method": "lanczos"}),
    "kronecker of three": (sm.Kronecker, {"shapes": [(2, 2)] * 3, "terms": 2}),
    "monarch": (sm.Monarch, {"blocks": 2}),
    "btt": (sm.BlockTensorTrain, {"blocks": 2}),
    "btt of three": (sm.BlockTensorTrain, {"cores": 3}),
    "interpolative blocks": (sm.Monarch, {"blocks": 2, "rank": 2, "interpolative": True}),
    "butterfly": (sm.Butterfly, {"radix": 2}),
    "refined": (sm.Butterfly, {"radix": 2, "refine": True}),
    "search": (sm.Butterfly, {"radix": 2, "permutation": "search"}),
    "blast": (sm.Chain, {"patterns": sm.blast_patterns((N, N), 2, 2)}),
    "gradient": (sm.Chain, {"patterns": [(2, 4, 4, 1), (1, 4, 4, 2)], "method": "gradient"}),
    "block-sparse": (sm.BlockSparse, {"block": 2}),
    "block-diagonal": (sm.BlockDiagonal, {"blocks": 2}),
    "diagonal": (sm.Diagonal, {}),
    "dense": (sm.Dense, {}),
    "sum": ([(sm.LowRank, {"rank": 1}), sm.Diagonal], {}),
    "sum of two": ([(sm.LowRank, {"rank": 1}), (sm.Monarch, {"rank": 1})], {}),
}
WITHOUT_WEIGHT = ("cur", "randomised", "search")  # methods of their own
by_family = pytest.mark.parametrize("name", FAMILIES)
by_weighted_family = pytest.mark.parametrize("name", [name for name in FAMILIES if name not in WITHOUT_WEIGHT])
SAMPLES = {"plain": None, "weighted": 50, "rank-deficient": 4}
CASES = [(name, kind) for name in FAMILIES for kind in SAMPLES if kind == "plain" or name not in WITHOUT_WEIGHT]


def gaussian(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def moment(count=50, n=N):
    """A second moment; of rank ``count`` where that is below ``n``."""
    X = gaussian((count, n), 3)
    return X.T @ X / count


def refused(W, name, error, message, **more):
    """The call raises, and leaves its inputs as they were."""
    family, options = FAMILIES[name]
    arrays = [x for x in (W, *more.values()) if isinstance(x, np.ndarray)]
    kept = [x.copy() for x in arrays]
    with pytest.raises(error, match=message):
        sm.project(W, family, **{**options, **more})
    for x, y in zip(arrays, kept, strict=True):
        np.testing.assert_array_equal(x, y)


def last_number(error):
    """The last number of a message."""
    return int(re.findall(r"\d+", str(error))[-1])


# ---- the matrix -----------------------------------------------------------------------------------------------------


@by_family
def test_matrices_that_are_none(name):
    holed = gaussian((N, N))
    holed[2, 5], holed[6, 1] = np.nan, -np.inf
    refused(holed, name, ValueError, r"^W: 2 of 64 entries are NaN or infinite, the first at \(2, 5\)$")
    refused(np.full((N, N), np.inf + 0j), name, ValueError, "^W: 64 of 64 entries are NaN or infinite")
    for empty in ((0, N), (N, 0), (0, 0)):
        refused(np.zeros(empty), name, ValueError, r"^W: expected one matrix \(m, n\) with m, n >= 1, got shape \(")
    refused(np.ones(N), name, ValueError, r"^W: .* got shape \(8,\)$")
    refused(np.ones((2, N, N)), name, ValueError, r"^W: .* got shape \(2, 8, 8\)$")
    refused(np.array([["x"]]), name, TypeError, "W: ")
    refused(np.array([[1.0, None]], dtype=object), name, TypeError, "dtype object")


@by_family
def test_integers_are_promoted_and_that_is_said(name):
    family, options = FAMILIES[name]
    W = np.random.default_rng(1).integers(-4, 5, (N, N))
    for given in (W, W.astype(np.int8), W.tolist()):
        p = sm.project(given, family, **options)
        assert p.operator.dtype == np.float64
        assert p.error == pytest.approx(sm.project(W.astype(float), family, **options).error, abs=1e-12)
    assert sm.project(torch.from_numpy(W), family, **options).operator.dtype == torch.get_default_dtype()
    assert sm.project(W > 0, family, **options).operator.dtype == np.float64
    assert "Integers become" in (sm.project.__doc__ or "")


@pytest.mark.parametrize("budget", [{"budget": 0.5}, {"tol": 0.5}])
def test_approximate_and_allocate_read_the_same_matrices(budget):
    holed = gaussian((N, N))
    holed[1, 1] = np.nan
    for W in (holed, np.zeros((0, 3)), np.ones(3)):
        with pytest.raises(ValueError, match=r"^W: "):
            sm.approximate(W, **budget)
        if "budget" in budget:
            with pytest.raises(ValueError, match="W: "):
                sm.allocate({"a": W}, **budget)
    assert sm.approximate(np.eye(N, dtype=int), **budget).best.operator.dtype == np.float64


# ---- architectures and sizes ----------------------------------------------------------------------------------------

IMPOSSIBLE = [
    ("low-rank", {"rank": 0}, "rank: expected at least 1, got 0"),
    ("interpolative", {"rank": 0}, "rank: expected at least 1, got 0"),
    ("randomised", {"rank": 0}, "rank: expected at least 1, got 0"),
    ("monarch", {"rank": 0}, "rank: expected at least 1, got 0"),
    ("btt of three", {"rank": 0}, "rank: expected at least 1, got 0"),
    ("kronecker", {"terms": 0}, "terms: expected at least 1, got 0"),
    ("kronecker", {"shapes": [(3, 2), (2, 4)]}, r"multiply to \(6, 8\), expected \(8, 8\)"),
    ("monarch", {"blocks": 0}, "blocks: expected at least 1, got 0"),
    ("monarch", {"blocks": 9}, "between 1 and 8 for size 8, got 9"),
    ("btt", {"blocks": (2, 9)}, "between 1 and 8 for size 8, got 9"),
    ("btt of three", {"blocks": 2}, "blocks: only for two cores, got cores=3"),
    ("block-diagonal", {"blocks": 9}, "between 1 and 8 for size 8, got 9"),
    ("butterfly", {"radix": 1}, "radix: expected at least 2, got 1"),
    ("butterfly", {"radix": None, "patterns": [(1, 2, 2, 2), (2, 2, 2, 1)]}, "4x4, too small for a matrix 8x8"),
    ("blast", {"patterns": [(1, 8, 3, 1), (1, 2, 8, 1)]}, "patterns: "),
    ("blast", {"patterns": None}, "needs the patterns"),
    ("blast", {"patterns": []}, "4 numbers for each factor"),
    ("block-sparse", {"block": 0}, "block: expected at least 1, got 0"),
    ("block-sparse", {"places": ([0], [9])}, "columns lie in 9..9, expected 0..3"),
]


@pytest.mark.parametrize(("name", "options", "message"), IMPOSSIBLE)
def test_impossible_architectures(name, options, message):
    refused(gaussian((N, N)), name, ValueError, message, **options)
    if name not in WITHOUT_WEIGHT:
        refused(gaussian((N, N)), name, ValueError, message, **options, weight=moment())


def test_a_diagonal_is_square():
    for name in ("diagonal", "sum"):
        refused(gaussian((N, 6)), name, ValueError, r"a Diagonal is square, got shape \(8, 6\)")


BUDGETS = [
    (sm.LowRank, {}),
    (sm.LowRank, {"interpolative": True}),
    (sm.LowRank, {"method": "randomized"}),
    (sm.Kronecker, {}),
    (sm.Kronecker, {"shapes": [(4, 2), (2, 4)]}),
    (sm.Monarch, {}),
    (sm.Monarch, {"blocks": 4}),
    (sm.BlockTensorTrain, {"blocks": (2, 4), "interpolative": True}),
    (sm.BlockTensorTrain, {"cores": 3}),
    (sm.Butterfly, {}),
    (sm.BlockDiagonal, {}),
    (sm.BlockSparse, {"block": 2}),
    (sm.Diagonal, {}),
    (sm.Dense, {}),
]


@pytest.mark.parametrize(("family", "options"), BUDGETS)
@pytest.mark.parametrize("more", [{}, {"weight": moment()}], ids=["plain", "weighted"])
def test_the_nearest_feasible_budget_is_named(family, options, more):
    """It is feasible, and one parameter less is not."""
    W, options = gaussian((N, N)), {k: v for k, v in options.items() if k != "method" or not more}
    with pytest.raises(ValueError, match=r"no .* of this shape has at most 1 parameters") as refusal:
        sm.project(W, family, budget=1, **options, **more)
    nearest = last_number(refusal.value)
    assert sm.project(W, family, budget=nearest, **options, **more).params <= nearest
    with pytest.raises(ValueError, match=f"at most {nearest - 1} parameters; the nearest feasible count is {nearest}$"):
        sm.project(W, family, budget=nearest - 1, **options, **more)


def test_budgets_of_sums_approximate_and_allocate():
    W = gaussian((N, N))
    with pytest.raises(ValueError, match=r"budget: 9 parameters, of which .* take 8|nearest feasible count is 16"):
        sm.project(W, [sm.LowRank, sm.Diagonal], budget=9)
    with pytest.raises(ValueError, match=r"nearest feasible count is 8$"):
        sm.approximate(W, budget=7)
    assert sm.approximate(W, budget=8, allow_slower=True).best.params <= 8
    with pytest.raises(ValueError, match=r"smallest architectures of all matrices take: \d+") as refusal:
        sm.allocate({"a": W, "b": W}, budget=2)
    nearest = last_number(refusal.value)
    assert sm.allocate({"a": W, "b": W}, budget=nearest).params <= nearest


@pytest.mark.parametrize(("budget", "error"), [(0, ValueError), (0.0, ValueError), (1.1, ValueError), ("x", TypeError)])
def test_budgets_that_are_none(budget, error):
    for family, options in BUDGETS:
        with pytest.raises(error, match=r"^budget: expected a"):
            sm.project(gaussian((N, N)), family, budget=budget, **options)


# ---- the weight -----------------------------------------------------------------------------------------------------

WEIGHTS = [
    (np.ones((N, N - 1)), r"expected a second moment \(8, 8\), got shape \(8, 7\)"),
    (np.eye(N - 1), r"expected a second moment \(8, 8\), got shape \(7, 7\)"),
    (np.triu(np.ones((N, N))), "expected a symmetric matrix, got one that differs from its adjoint by"),
    (np.triu(np.ones((N, N)) * 1j), "expected a Hermitian matrix, got one that differs from its adjoint by"),
    (np.diag([1.0] * (N - 1) + [-0.5]), "expected a positive semidefinite matrix, got the eigenvalue -0.5 relative"),
    (np.where(np.eye(N), np.inf, 0.0), "8 of 64 entries are NaN or infinite"),
    (np.zeros((N, N)), "not zero"),
]


@by_weighted_family
@pytest.mark.parametrize(("weight", "message"), WEIGHTS, ids=range(len(WEIGHTS)))
def test_weights_that_are_none(name, weight, message):
    refused(gaussian((N, N)), name, ValueError, f"^weight: .*{message}", weight=weight)


@pytest.mark.parametrize(("weight", "message"), WEIGHTS, ids=range(len(WEIGHTS)))
def test_row_weights_and_weights_of_approximate_that_are_none(weight, message):
    for name in ("low-rank", "monarch", "btt"):
        refused(gaussian((N, N)), name, ValueError, f"^row_weight: .*{message}", row_weight=weight)
    with pytest.raises(ValueError, match=f"^weight: .*{message}"):
        sm.approximate(gaussian((N, N)), budget=0.5, weight=weight)


# ---- LAPACK ---------------------------------------------------------------------------------------------------------

FIRST = ((np.linalg, "svd"), (np.linalg, "eigh"), (np.linalg, "eigvalsh"))
SECOND = ((scipy.linalg, "svd"), (scipy.linalg, "eigh"))
NO_DRIVER = ("block-sparse", "block-diagonal", "diagonal", "dense", "gradient")  # methods without a decomposition


def fails(*args, **options):
    raise np.linalg.LinAlgError("did not converge")


def fails_once(real):
    """The function, but the first call does not converge."""
    calls: list[None] = []

    def call(*args, **options):
        calls.append(None)
        return fails() if len(calls) == 1 else real(*args, **options)

    return call


def solved(name, weight):
    family, options = FAMILIES[name]
    more = {} if weight is None else {"weight": weight}
    return sm.project(gaussian((N, N)), family, **options, **more)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_driver_that_does_not_converge_is_followed_by_the_other(name, kind, monkeypatch):
    weight = None if kind == "plain" else moment(SAMPLES[kind])
    usual = solved(name, weight)
    for fail in (fails_once, lambda _: fails):
        with monkeypatch.context() as patch:
            for module, function in FIRST:
                patch.setattr(module, function, fail(getattr(module, function)))
            found = solved(name, weight)
        assert found.error == pytest.approx(usual.error, rel=1e-5, abs=1e-5)
        assert 0.0 <= found.lower_bound <= found.error


@pytest.mark.parametrize(("name", "kind"), [case for case in CASES if case[0] not in NO_DRIVER])
def test_two_drivers_that_do_not_converge_are_a_clear_error(name, kind, monkeypatch):
    weight = None if kind == "plain" else moment(SAMPLES[kind])
    before = solved(name, weight)
    with monkeypatch.context() as patch:
        for module, function in (*FIRST, *SECOND):
            patch.setattr(module, function, fails)
        message = r"^project: the (SVD|eigendecomposition) of block 0 of \d+ \(\d+x\d+\) converged neither with \w+ nor"
        with pytest.raises(np.linalg.LinAlgError, match=message):
            solved(name, weight)
    after = solved(name, weight)  # nothing of the failure is left
    assert np.array_equal(np.asarray(before.operator), np.asarray(after.operator))
    assert before.error == after.error


@pytest.mark.parametrize("options", [{"budget": 0.5}, {"tol": 0.7}])
def test_approximate_goes_on_with_the_other_driver(options, monkeypatch):
    W = gaussian((24, 16))
    usual = sm.approximate(W, **options)
    with monkeypatch.context() as patch:
        for module, function in FIRST:
            patch.setattr(module, function, fails)
        found = sm.approximate(W, **options)
        for module, function in SECOND:
            patch.setattr(module, function, fails)
        with pytest.raises(np.linalg.LinAlgError, match="converged neither with"):
            sm.approximate(W, **options)
    assert [e.label for e in found] == [e.label for e in usual]
    assert [e.error for e in found] == pytest.approx([e.error for e in usual], rel=1e-6)


@pytest.mark.parametrize("dtype", [float, complex])
@pytest.mark.parametrize("shape", [(3, 2, 5, 5), (1, 4, 4), (6, 6), (2, 0, 0)])
def test_both_drivers_agree(shape, dtype, monkeypatch):
    blocks = gaussian(shape) + (1j * gaussian(shape, 1) if dtype is complex else 0.0)
    hermitian = blocks + blocks.conj().swapaxes(-1, -2)
    singular, eigen = np.linalg.svd(blocks, compute_uv=False), np.linalg.eigvalsh(hermitian)
    for module, function in FIRST:
        monkeypatch.setattr(module, function, fails)
    u, s, vh = drivers.svd(blocks)
    np.testing.assert_allclose((u * s[..., None, :]) @ vh, blocks, atol=1e-12)
    np.testing.assert_allclose(drivers.singular_values(blocks), singular, rtol=1e-9)
    values, vectors = drivers.eigh(hermitian)
    np.testing.assert_allclose(values, eigen, atol=1e-12)
    np.testing.assert_allclose(drivers.eigvalsh(hermitian), eigen, atol=1e-12)
    np.testing.assert_allclose(
        (vectors * values[..., None, :]) @ vectors.conj().swapaxes(-1, -2), hermitian, atol=1e-12
    )


def test_blocks_that_overflow_are_named():
    blocks = np.ones((3, 4, 4))
    blocks[1] = np.nan
    for driver in (drivers.svd, drivers.singular_values, drivers.eigh, drivers.eigvalsh):
        with pytest.raises(np.linalg.LinAlgError, match=r"block 1 of 3 \(4x4\) is not finite"):
            driver(blocks)
