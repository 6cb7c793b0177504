"""Projection: exact recovery of members, optimality, the certificate, budgets and tolerances, bad input."""

from __future__ import annotations

import math
import pickle
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import scipy.linalg
import scipy.sparse
import scipy.sparse.linalg

import structmat as sm
from structmat.algebra import Sum
from structmat.patterns import Pattern
from structmat.projection.certificate import Projection, frobenius
from structmat.projection.drivers import svd
from structmat.projection.hierarchical import sweep
from structmat.projection.project import FAMILIES, project
from structmat.projection.svd import gram_tail, left_svd

DTYPES = [np.float32, np.float64, np.complex64, np.complex128]


def gaussian(shape, dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape)
    return (x + 1j * rng.standard_normal(shape) if np.dtype(dtype).kind == "c" else x).astype(dtype)


def exact_dense(operator):
    """The stored values multiplied out in double precision."""
    return np.asarray(operator.astype(np.complex128 if np.dtype(operator.dtype).kind == "c" else np.float64))


def tail(blocks, rank):
    """Error of the best rank-``rank`` blocks, one dense SVD at a time."""
    return math.sqrt(sum((np.linalg.svd(b, compute_uv=False)[rank:] ** 2).sum() for b in blocks))


# (name, family, options of project, maker of a random member)
FOUR_RANKS = [(1, 4, 4, 12), (2, 6, 6, 4), (6, 8, 4, 1)]  # ranks 2 and 2, rectangular
MEMBERS = [
    ("low-rank", sm.LowRank, {"rank": 3}, lambda **o: sm.LowRank.random((17, 11), rank=3, **o)),
    ("low-rank 1x1", sm.LowRank, {"rank": 1}, lambda **o: sm.LowRank.random((1, 1), rank=1, **o)),
    ("low-rank beyond full", sm.LowRank, {"rank": 9}, lambda **o: sm.LowRank.random((5, 7), rank=9, **o)),
    ("block-diagonal", sm.BlockDiagonal, {"blocks": 3}, lambda **o: sm.BlockDiagonal.random((12, 9), blocks=3, **o)),
    ("block-diagonal 7x5", sm.BlockDiagonal, {"blocks": 2}, lambda **o: sm.BlockDiagonal.random((7, 5), blocks=2, **o)),
    ("monarch", sm.Monarch, {}, lambda **o: sm.Monarch.random((36, 16), **o)),
    (
        "monarch rank 2",
        sm.Monarch,
        {"blocks": (3, 2), "rank": 2},
        lambda **o: sm.Monarch.random((12, 10), blocks=(3, 2), rank=2, **o),
    ),
    (
        "monarch prime",
        sm.Monarch,
        {"blocks": (5, 3), "rank": 2},
        lambda **o: sm.Monarch.random((23, 31), blocks=(5, 3), rank=2, **o),
    ),
    (
        "btt",
        sm.BlockTensorTrain,
        {"blocks": (2, 4), "rank": 3},
        lambda **o: sm.BlockTensorTrain.random((20, 32), blocks=(2, 4), rank=3, **o),
    ),
    (
        "btt prime",
        sm.BlockTensorTrain,
        {"blocks": 4, "rank": 1},
        lambda **o: sm.BlockTensorTrain.random((29, 13), blocks=4, rank=1, **o),
    ),
    ("butterfly", sm.Butterfly, {}, lambda **o: sm.Butterfly.random((32, 32), **o)),
    ("butterfly radix 4", sm.Butterfly, {"radix": 4}, lambda **o: sm.Butterfly.random((64, 16), radix=4, **o)),
    ("butterfly 12x18", sm.Butterfly, {}, lambda **o: sm.Butterfly.random((12, 18), **o)),
    ("chain", sm.Chain, {"patterns": FOUR_RANKS}, lambda **o: sm.Chain.random((48, 24), FOUR_RANKS, **o)),
    (
        "chain on a support",
        sm.Chain,
        {"patterns": [(2, 2, 3, 6), (2, 9, 2, 2)]},
        lambda **o: sm.Chain.random((24, 8), [(2, 2, 3, 6), (2, 9, 2, 2)], **o),
    ),
    (
        "chain of one",
        sm.Chain,
        {"patterns": [(2, 3, 2, 4)]},
        lambda **o: sm.Chain.random((24, 16), [(2, 3, 2, 4)], **o),
    ),
    (
        "kronecker",
        sm.Kronecker,
        {"shapes": [(2, 5), (7, 3)]},
        lambda **o: sm.Kronecker.random((14, 15), shapes=[(2, 5), (7, 3)], **o),
    ),
    ("kronecker prime", sm.Kronecker, {}, lambda **o: sm.Kronecker.random((13, 6), **o)),
    (
        "kronecker 4 factors",
        sm.Kronecker,
        {"shapes": [(2, 1), (3, 2), (1, 3), (2, 2)]},
        lambda **o: sm.Kronecker.random((12, 12), shapes=[(2, 1), (3, 2), (1, 3), (2, 2)], **o),
    ),
    (
        "kronecker 1 factor",
        sm.Kronecker,
        {"shapes": [(4, 3)]},
        lambda **o: sm.Kronecker.random((4, 3), shapes=[(4, 3)], **o),
    ),
    ("dense", sm.Dense, {}, lambda **o: sm.Dense.random((5, 3), **o)),
]
NAMES = [member[0] for member in MEMBERS]


# ---- members are recovered ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("member", MEMBERS, ids=NAMES)
def test_members_are_recovered_to_rounding(member, dtype):
    _, family, options, make = member
    original = make(dtype=dtype, rng=3)
    p = project(original, family, **options)
    assert type(p.operator) is family
    assert p.operator.shape == original.shape
    assert p.operator.dtype == np.dtype(dtype)
    assert p.params == p.operator.nparams == original.nparams
    assert p.relative_error <= 40 * np.finfo(dtype).eps
    if hasattr(original, "patterns"):
        assert p.operator.patterns == original.patterns


def test_sum_of_kronecker_products_is_recovered():
    shapes = [(3, 4), (5, 2)]
    W = sum(sm.Kronecker.random((15, 8), shapes=shapes, rng=i).to_dense() for i in range(3))
    p = project(W, sm.Kronecker, shapes=shapes, terms=3)
    assert isinstance(p.operator, Sum)
    assert len(p.operator.terms) == 3
    assert p.relative_error <= 1e-14
    assert project(W, sm.Kronecker, shapes=shapes, terms=2).relative_error > 1e-3


def test_hadamard_1024():
    H = scipy.linalg.hadamard(1024).astype(np.float64)
    butterfly = project(H, sm.Butterfly, radix=2)
    assert butterfly.params == 20480
    assert butterfly.relative_error <= 1e-14
    kronecker = project(H, sm.Kronecker, shapes=[(2, 2)] * 10)
    assert kronecker.params == 40
    assert kronecker.relative_error <= 1e-13
    assert project(H, sm.LowRank, rank=10).relative_error > 0.9


def test_integer_matrix_is_promoted():
    H = scipy.linalg.hadamard(16)
    p = project(H, sm.Butterfly)
    assert p.operator.dtype == np.float64
    assert p.relative_error <= 1e-15 * 4


@pytest.mark.parametrize(("n1", "n2"), [(32, 32), (16, 8), (6, 10)])
def test_permuted_fourier_matrix_is_a_rank_one_monarch(n1, n2):
    n = n1 * n2
    F = np.fft.fft(np.eye(n))
    p = project(F[:, np.arange(n).reshape(n1, n2).T.ravel()], sm.Monarch, blocks=(n1, n2), rank=1)
    assert p.relative_error <= 1e-13
    assert project(F, sm.Monarch, blocks=(n1, n2), rank=1).relative_error > 0.5


def test_bit_reversed_fourier_matrix_is_a_butterfly():
    F = np.fft.fft(np.eye(64))
    order = [int(f"{i:06b}"[::-1], 2) for i in range(64)]
    assert project(F[:, order], sm.Butterfly, radix=2).relative_error <= 1e-13
    natural = project(F, sm.Butterfly, radix=2)
    assert natural.lower_bound >= math.sqrt(1 - 2**-3) * np.linalg.norm(F) * (1 - 1e-7)  # the proven infimum
    assert natural.lower_bound <= natural.error


# ---- nothing is nearer ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
def test_low_rank_is_optimal(dtype):
    W = gaussian((19, 30), dtype)
    p = project(W, sm.LowRank, rank=4)
    assert p.error == pytest.approx(tail([W], 4), rel=1e-12)
    assert p.lower_bound == pytest.approx(p.error, rel=1e-11)


@pytest.mark.parametrize("shape", [(12, 20), (13, 19)])
@pytest.mark.parametrize("rank", [1, 2])
def test_two_factor_is_optimal(shape, rank):
    W, (l, k) = gaussian(shape, np.complex128), (4, 5)
    s, p = -(-shape[0] // l), -(-shape[1] // k)
    columns = [slice(g * p, (g + 1) * p) for g in range(k)]
    strided = [W[j::l, c] for j in range(l) for c in columns]
    contiguous = [W[f * s : (f + 1) * s, c] for f in range(l) for c in columns]
    for family, blocks in ((sm.Monarch, strided), (sm.BlockTensorTrain, contiguous)):
        found = project(W, family, blocks=(l, k), rank=rank)
        assert found.error == pytest.approx(tail(blocks, rank), rel=1e-12)
        assert found.lower_bound == pytest.approx(found.error, rel=1e-11)


def test_kronecker_sum_is_optimal():
    W, terms = gaussian((12, 10)), 2
    rearranged = np.array([W[4 * i : 4 * i + 4, 5 * k : 5 * k + 5].ravel() for i in range(3) for k in range(2)])
    p = project(W, sm.Kronecker, shapes=[(3, 2), (4, 5)], terms=terms)
    assert p.error == pytest.approx(tail([rearranged], terms), rel=1e-12)
    assert p.lower_bound == pytest.approx(p.error, rel=1e-11)


def test_block_diagonal_keeps_its_entries():
    W = gaussian((7, 10))
    p = project(W, sm.BlockDiagonal, blocks=3)
    mask = np.kron(np.eye(3), np.ones((3, 4)))[:7, :10]
    np.testing.assert_array_equal(np.asarray(p.operator), W * mask)
    assert p.error == p.lower_bound == pytest.approx(np.linalg.norm(W * (1 - mask)), rel=1e-14)


def test_power_iteration_improves_on_its_start():
    shapes = [(2, 3), (3, 2), (2, 2)]
    W = gaussian((12, 12), seed=4)
    p = project(W, sm.Kronecker, shapes=shapes)
    rest, captured = W.reshape(2, 3, 2, 3, 2, 2).transpose(0, 3, 1, 4, 2, 5).reshape(6, 6, 4), 1.0
    for size in (6, 6):
        _, s, vh = np.linalg.svd(rest.reshape(size, -1), full_matrices=False)
        captured, rest = s[0], s[0] * vh[0]
    start = math.sqrt(np.linalg.norm(W) ** 2 - captured**2)
    assert p.error < start * (1 - 1e-6)
    assert 0 < p.lower_bound < p.error
    for i in range(3):  # a local optimum: no single factor can be improved
        arrays = [np.array(f.array) for f in p.operator.factors]
        others = np.ones(())
        columns = []
        for j in range(arrays[i].size):
            unit = np.zeros(arrays[i].size)
            unit[j] = 1.0
            arrays[i] = unit.reshape(shapes[i])
            columns.append(np.kron(np.kron(arrays[0], arrays[1]), arrays[2]).ravel() * others)
        _, residual, *_ = np.linalg.lstsq(np.array(columns).T, W.ravel(), rcond=None)
        assert math.sqrt(residual[0]) == pytest.approx(p.error, rel=1e-7)


def test_sweep_satisfies_its_two_sided_bound():
    patterns = [Pattern(*p) for p in [(1, 4, 4, 12), (2, 6, 6, 4), (6, 8, 4, 1)]]
    for seed in range(20):
        W = gaussian((48, 24), np.complex128 if seed % 2 else np.float64, seed)
        found = sweep(W, patterns)
        product = np.asarray(sm.Chain(found.factors))
        assert found.error == pytest.approx(np.linalg.norm(W - product), rel=1e-11)  # Pythagoras
        assert found.lower_bound <= found.error <= math.sqrt(2) * found.lower_bound * (1 + 1e-6)


def test_lower_bound_of_a_sweep_is_the_largest_split():
    """Splits of the chain (1,4,4,12) (2,6,6,4) (6,8,4,1), ranks 2 and 2, by their blocks written out by hand."""
    patterns, larger_first = [Pattern(*p) for p in [(1, 4, 4, 12), (2, 6, 6, 4), (6, 8, 4, 1)]], 0
    for seed in range(12):
        W = np.einsum("ij,i->ij", gaussian((48, 24), seed=seed), 10.0 ** (np.arange(48) % 12 % (seed + 1) / 4))
        first = tail([W[j::12, 12 * i : 12 * i + 12] for j in range(12) for i in range(2)], 2)
        second = tail([W[j::4, 4 * i : 4 * i + 4] for j in range(4) for i in range(6)], 2)
        larger_first += first > second
        found = sweep(W, patterns).lower_bound
        assert found == pytest.approx(max(first, second), rel=1e-11 if first > second else 1e-7)
    assert larger_first > 0


def test_chain_on_a_support_counts_the_entries_outside():
    W, pattern = gaussian((24, 16)), (2, 3, 2, 4)
    inside = np.kron(np.kron(np.eye(2), np.ones((3, 2))), np.eye(4))
    p = project(W, sm.Chain, patterns=[pattern])
    np.testing.assert_array_equal(np.asarray(p.operator), W * inside)
    assert p.lower_bound == pytest.approx(p.error, rel=1e-14)
    assert p.error == pytest.approx(np.linalg.norm(W * (1 - inside)), rel=1e-14)


# ---- the certificate ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*DTYPES, np.float16], ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("member", MEMBERS, ids=NAMES)
def test_certificate_is_true(member, dtype):
    _, family, options, make = member
    for seed, noise in enumerate((0.0, 1e-12, 1e-3, 2.0, 1e6)):
        near = make(dtype=np.complex128 if np.dtype(dtype).kind == "c" else np.float64, rng=seed).to_dense()
        unit = gaussian(near.shape, near.dtype, seed + 50)
        W = near + noise * np.linalg.norm(near) * unit / np.linalg.norm(unit)
        W = (W / np.linalg.norm(W)).astype(dtype)
        p = project(W, family, **options)
        norm = np.linalg.norm(W.astype(near.dtype))
        error = np.linalg.norm(W.astype(near.dtype) - exact_dense(p.operator))
        assert p.error == pytest.approx(error, rel=1e-10, abs=1e-16)
        assert p.relative_error == pytest.approx(error / norm, rel=1e-10, abs=1e-16)
        assert 0.0 <= p.lower_bound <= p.error
        known = np.linalg.norm(W.astype(near.dtype) - near * (np.vdot(near, W) / np.vdot(near, near)))  # a member
        assert p.lower_bound <= known * (1 + 1e-12)


def test_lower_bound_holds_over_many_random_cases():
    rng = np.random.default_rng(11)
    tight = 0
    for _ in range(150):
        m, n = (int(x) for x in rng.integers(1, 25, 2))
        W = rng.standard_normal((m, n)) * 10.0 ** rng.integers(-3, 4)
        if rng.random() < 0.5:
            W = W + 1j * rng.standard_normal((m, n))
        blocks, rank = (int(rng.integers(1, min(m, n) + 1)), int(rng.integers(1, 4)))
        for family, options in (
            (sm.LowRank, {"rank": rank}),
            (sm.Kronecker, {"terms": rank}),
            (sm.BlockDiagonal, {"blocks": blocks}),
            (sm.Monarch, {"blocks": blocks, "rank": rank}),
            (sm.BlockTensorTrain, {"blocks": blocks, "rank": rank}),
            (sm.Butterfly, {}),
        ):
            p = project(W, family, **options)
            assert 0.0 <= p.lower_bound <= p.error <= np.linalg.norm(W) * (1 + 1e-12)
            if p.relative_error > 1e-6:
                assert p.lower_bound > 0.0
                tight += p.lower_bound > 0.999 * p.error
            dense = np.asarray(p.operator)
            assert p.error == pytest.approx(np.linalg.norm(W - dense), rel=1e-10, abs=1e-13 * np.linalg.norm(W))
    assert tight > 300


def test_lower_bound_stays_below_the_best_after_rounding():
    """W is a member exactly, so that the best possible error is 0 and no tail of rounded singular values may show."""
    for family, options in ((sm.LowRank, {"rank": 2}), (sm.Monarch, {"blocks": 2, "rank": 2})):
        left, right = np.arange(1.0, 41.0).reshape(20, 2), np.arange(2.0, 34.0).reshape(2, 16)
        p = project(left @ right, family, **options)  # integers: the product has no rounding
        assert p.lower_bound == 0.0


def test_gram_tail_is_a_lower_bound():
    blocks = gaussian((6, 5, 9), np.complex128)
    for rank in range(6):
        exact = tail(blocks, rank)
        assert exact * (1 - 1e-7) <= gram_tail(blocks, rank) <= exact if rank < 5 else gram_tail(blocks, rank) == 0.0
        assert gram_tail(blocks.swapaxes(-1, -2), rank) == pytest.approx(gram_tail(blocks, rank), rel=1e-12)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f is not sm.Chain], ids=lambda f: f.__name__)
def test_zero_matrix(family):
    p = project(np.zeros((6, 6 if family is sm.Diagonal else 9)), family)
    assert (p.error, p.relative_error, p.lower_bound) == (0.0, 0.0, 0.0)
    assert not np.asarray(p.operator).any()


@pytest.mark.parametrize("scale", [1e200, 1e-200, 1e-305])
@pytest.mark.parametrize("family", [sm.LowRank, sm.Kronecker, sm.Monarch, sm.Butterfly, sm.BlockDiagonal, sm.Dense])
def test_extreme_scales(family, scale):
    W = gaussian((16, 12))
    expected, found = project(W, family), project(W * scale, family)
    assert found.relative_error == pytest.approx(expected.relative_error, rel=1e-9, abs=1e-14)
    assert found.lower_bound == pytest.approx(expected.lower_bound * scale, rel=1e-9)
    assert found.error == pytest.approx(expected.error * scale, rel=1e-9)


def test_frobenius_survives_extremes():
    assert frobenius(np.array([3e-200, 4e-200])) == pytest.approx(5e-200, rel=1e-14)
    assert frobenius(np.array([3e200, 4e200])) == pytest.approx(5e200, rel=1e-14)
    assert frobenius(np.zeros(3)) == 0.0


def test_projection_is_frozen_and_prints():
    p = project(gaussian((8, 8)), sm.Monarch, blocks=2)
    with pytest.raises(AttributeError):
        p.error = 0.0
    assert repr(p).startswith("<Projection onto Monarch(8x8")
    assert f"{p.relative_error:.4g}" in str(p)
    assert f"{p.params} parameters = 50.0% of dense" in str(p)
    assert "optimal" in p.method
    assert p.seconds > 0
    copy = pickle.loads(pickle.dumps(p))
    assert isinstance(copy, Projection)
    assert copy.error == p.error


# ---- budgets and tolerances -----------------------------------------------------------------------------------------


def test_budget_is_a_fraction_or_a_count():
    W = gaussian((40, 24))
    fraction, count = project(W, sm.LowRank, budget=0.25), project(W, sm.LowRank, budget=240)
    assert fraction.operator.rank == count.operator.rank == 3
    assert project(W, sm.LowRank, budget=np.float64(0.25)).params == project(W, sm.LowRank, budget=np.int64(240)).params
    assert project(gaussian((10, 10)), sm.BlockDiagonal, budget=0.5).params == 50
    assert project(gaussian((10, 10)), sm.LowRank, budget=0.29 * 100 / 29 * 0.2).params == 20


@pytest.mark.parametrize("budget", [0.25, 0.3, 0.6, 1.0, 700])
@pytest.mark.parametrize(
    "family", [f for f in FAMILIES if f not in (sm.Chain, sm.Dense, sm.Diagonal)], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("shape", [(48, 60), (53, 47)])
def test_budget_is_kept(family, budget, shape):
    W = gaussian(shape)
    if shape == (53, 47) and family is sm.Kronecker:
        assert project(W, family, budget=budget).operator.shape == shape  # sums of outer products
    p = project(W, family, budget=budget)
    limit = budget if isinstance(budget, int) else budget * W.size
    assert p.params <= limit
    assert type(p.operator) is family or isinstance(p.operator, Sum)
    assert p.relative_error < 1


def test_more_budget_gives_less_error():
    W = gaussian((48, 48))
    for family in (sm.LowRank, sm.Kronecker, sm.BlockDiagonal, sm.Monarch, sm.BlockTensorTrain, sm.Butterfly):
        errors = [project(W, family, budget=b).error for b in (0.25, 0.4, 0.6, 0.8)]
        assert all(a >= b for a, b in pairwise(errors)), (family, errors)
        assert errors[-1] < errors[0]


def test_budget_with_blocks_picks_the_largest_rank():
    W = gaussian((48, 48))
    for family in (sm.Monarch, sm.BlockTensorTrain):
        p = project(W, family, blocks=4, budget=0.5)  # 4*4*(12 + 12) = 384 parameters for each rank
        assert p.params == 3 * 384 == 1152
        assert p.error == pytest.approx(project(W, family, blocks=4, rank=3).error, rel=1e-12)
    p = project(W, sm.Kronecker, shapes=[(6, 6), (8, 8)], budget=250)
    assert p.params == 200


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
def test_budget_spends_nothing_on_noise(dtype):
    W = sm.LowRank.random((40, 40), rank=2, rng=0, dtype=np.complex128).to_dense()
    p = project((W if np.dtype(dtype).kind == "c" else W.real).astype(dtype), sm.LowRank, budget=0.9)
    assert p.operator.rank == (2 if np.dtype(dtype).kind == "c" else 4)
    assert p.relative_error <= 20 * np.finfo(dtype).eps


def test_budget_picks_the_better_layout():
    W = sm.Monarch.random((64, 64), blocks=4, rank=2, rng=0).to_dense()
    p = project(W, sm.Monarch, budget=0.3)
    assert p.relative_error <= 1e-13
    W = np.kron(gaussian((4, 4)), gaussian((6, 6)))
    flipped = np.kron(gaussian((6, 6)), gaussian((4, 4)))
    assert project(W, sm.Kronecker, budget=60).relative_error <= 1e-14
    assert project(flipped, sm.Kronecker, budget=60).relative_error <= 1e-14


@pytest.mark.parametrize(
    ("family", "options", "nearest"),
    [
        (sm.LowRank, {}, 12 + 18),
        (sm.Monarch, {"blocks": 3}, 3 * (12 + 18)),
        (sm.Monarch, {}, 12 + 18),
        (sm.BlockTensorTrain, {"blocks": (2, 3)}, 2 * 18 + 3 * 12),
        (sm.Kronecker, {"shapes": [(3, 3), (4, 6)]}, 9 + 24),
        (sm.Kronecker, {}, 15 + 14),
        (sm.BlockDiagonal, {}, 18 + 6),
        (sm.Dense, {}, 216),
    ],
)
def test_infeasible_budget_names_the_nearest_count(family, options, nearest):
    W = gaussian((12, 18))
    with pytest.raises(ValueError, match="nearest feasible count is") as caught:
        project(W, family, budget=2, **options)
    count = int(str(caught.value).rsplit(" ", 1)[1])
    assert project(W, family, budget=count, **options).params <= count
    with pytest.raises(ValueError, match="nearest feasible"):
        project(W, family, budget=count - 1, **options)
    if family not in (sm.Kronecker, sm.BlockDiagonal):
        assert count == nearest


def test_infeasible_butterfly_budget():
    with pytest.raises(ValueError, match=r"no Butterfly of this shape has at most 5 parameters.*count is 128$"):
        project(gaussian((16, 16)), sm.Butterfly, budget=5)


@pytest.mark.parametrize("tol", [0.5, 0.1, 1e-3, 1e-9])
def test_tolerance_takes_the_smallest_rank(tol):
    u, v = (np.linalg.qr(gaussian((30, 30), seed=s))[0] for s in (1, 2))
    W = u @ np.diag(0.6 ** np.arange(30.0)) @ v
    p = project(W, sm.LowRank, tol=tol)
    assert p.relative_error <= tol
    if p.operator.rank > 1:
        assert project(W, sm.LowRank, rank=p.operator.rank - 1).relative_error > tol
    for family in (sm.Monarch, sm.BlockTensorTrain):
        q = project(W, family, blocks=3, tol=tol)
        assert q.relative_error <= tol
        if q.params > 3 * 60:
            smaller = project(W, family, blocks=3, rank=q.params // (3 * 60) - 1)
            assert smaller.relative_error > tol


def test_tolerance_without_blocks_takes_the_smallest_layout():
    W = sm.Monarch.random((64, 64), blocks=4, rank=2, rng=0).to_dense()
    p = project(W, sm.Monarch, tol=1e-10)
    assert p.params == 1024
    assert p.relative_error <= 1e-13


def test_tolerance_of_kronecker_and_butterfly():
    W = sum(np.kron(gaussian((4, 4), seed=i), gaussian((6, 6), seed=9 - i)) for i in range(3))
    p = project(W, sm.Kronecker, tol=1e-10)
    assert p.params == 3 * 52
    b = project(scipy.linalg.hadamard(64), sm.Butterfly, tol=1e-10)
    assert b.params == 768
    assert project(gaussian((16, 16)), sm.Dense, tol=1e-12).error == 0.0


def test_tolerance_of_block_diagonal():
    W = scipy.linalg.block_diag(*gaussian((4, 5, 3))) + 1e-9 * gaussian((20, 12))
    assert project(W, sm.BlockDiagonal, tol=1e-6).operator.blocks.shape == (4, 5, 3)


@pytest.mark.parametrize("family", [sm.BlockDiagonal, sm.Butterfly])
def test_unreachable_tolerance_names_the_best_error(family):
    W = gaussian((24, 24))
    with pytest.raises(ValueError, match="best relative error reachable is") as caught:
        project(W, family, tol=1e-3)
    best = float(str(caught.value).rsplit(" ", 1)[1])
    assert project(W, family, tol=best * 1.01).relative_error == pytest.approx(best, rel=0.01)
    with pytest.raises(ValueError, match="reachable"):
        project(W, family, tol=best * 0.99)


def test_tolerance_below_the_rounding_of_the_dtype():
    W = gaussian((12, 12), np.float32)
    assert project(W, sm.LowRank, tol=1e-5).relative_error <= 1e-5
    with pytest.raises(ValueError, match="in this dtype"):
        project(W, sm.LowRank, tol=1e-9)


# ---- what goes in, what comes out -----------------------------------------------------------------------------------


def test_torch_in_torch_out():
    torch = pytest.importorskip("torch")
    W = torch.from_numpy(gaussian((24, 16)))
    for dtype in (torch.float32, torch.float64, torch.complex64, torch.bfloat16, torch.float16):
        x = W.to(dtype).requires_grad_()
        before = x.detach().clone()
        for family, options in ((sm.Monarch, {}), (sm.Kronecker, {"terms": 2}), (sm.Butterfly, {}), (sm.LowRank, {})):
            p = project(x, family, **options)
            assert p.operator.kind == "torch"
            assert p.operator.dtype == dtype
            assert p.operator.device == x.device
            assert isinstance(p.error, float)
            wide = torch.complex128 if dtype.is_complex else torch.float64
            error = torch.linalg.norm(before.to(wide) - p.operator.astype(wide).to_dense()).item()
            assert p.error == pytest.approx(error, rel=1e-10)
            assert p.lower_bound <= p.error
        assert torch.equal(x.detach(), before)
    small = project(torch.eye(4, dtype=torch.int64), sm.BlockDiagonal, blocks=2)
    assert small.operator.dtype == torch.get_default_dtype()
    with pytest.raises(ValueError, match="1 of 4 entries are NaN or infinite, the first at"):
        project(torch.tensor([[1.0, float("nan")], [0.0, 1.0]]), sm.LowRank)


def test_kinds_of_input_agree():
    W = np.round(gaussian((12, 9)), 2)
    expected = project(W, sm.Monarch, blocks=3)
    for same in (
        W.tolist(),
        np.asfortranarray(W),
        np.repeat(W, 2, axis=1)[:, ::2],
        sm.Dense(W),
        scipy.sparse.csr_array(W),
        scipy.sparse.coo_matrix(W),
        scipy.sparse.linalg.aslinearoperator(W),
        sm.LowRank(W, np.eye(9)),
    ):
        p = project(same, sm.Monarch, blocks=3)
        assert p.operator.dtype == np.float64
        np.testing.assert_allclose(np.asarray(p.operator), np.asarray(expected.operator), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("member", MEMBERS, ids=NAMES)
def test_the_matrix_is_not_changed_nor_shared(member):
    _, family, options, make = member
    W = np.array(make(dtype=np.float64, rng=0).to_dense()) + 0.1
    W.flags.writeable = False
    before = W.copy()
    p = project(W, family, **options)
    np.testing.assert_array_equal(W, before)
    W.flags.writeable = True
    dense = np.array(p.operator.to_dense())
    W[...] = 7.0
    np.testing.assert_array_equal(np.asarray(p.operator), dense)
    assert all(not np.shares_memory(a, W) for a in p.operator.arrays)


def test_zero_matrix_is_not_shared():
    W = np.zeros((6, 4))
    for family, options in (
        (sm.Chain, {"patterns": [(1, 6, 4, 1)]}),
        (sm.Dense, {}),
        (sm.BlockDiagonal, {"blocks": 1}),
    ):
        assert all(not np.shares_memory(a, W) for a in project(W, family, **options).operator.arrays)


def test_result_is_deterministic():
    W = gaussian((30, 20))
    for family in (sm.LowRank, sm.Kronecker, sm.Monarch, sm.Butterfly):
        one, two = project(W, family), project(W, family)
        assert all(np.array_equal(a, b) for a, b in zip(one.operator.arrays, two.operator.arrays, strict=True))


def test_factors_of_a_sweep_have_similar_norms():
    p = project(1e3 * gaussian((64, 64)), sm.Butterfly)
    norms = [np.linalg.norm(f) for f in p.operator.factors]
    assert max(norms) / min(norms) <= 4


# ---- bad input ------------------------------------------------------------------------------------------------------

W8 = gaussian((8, 8))
HOLED = W8.copy()
HOLED[2, 5] = np.nan
HOLED[6, 1] = -np.inf

BAD = [
    (HOLED, sm.LowRank, {}, ValueError, r"2 of 64 entries are NaN or infinite, the first at \(2, 5\)"),
    (HOLED.astype(complex), sm.Butterfly, {}, ValueError, "NaN or infinite"),
    (W8[0], sm.LowRank, {}, ValueError, r"expected one matrix \(m, n\).*shape \(8,\)"),
    (W8[None], sm.LowRank, {}, ValueError, r"shape \(1, 8, 8\)"),
    (3.0, sm.LowRank, {}, ValueError, r"shape \(\)"),
    (np.zeros((0, 4)), sm.LowRank, {}, ValueError, r"m, n >= 1, got shape \(0, 4\)"),
    (np.zeros((4, 0)), sm.Butterfly, {}, ValueError, r"shape \(4, 0\)"),
    (np.array([[1, "a"]], dtype=object), sm.LowRank, {}, TypeError, "dtype object"),
    (np.array([["x"]]), sm.LowRank, {}, TypeError, "floating or complex"),
    (W8, W8, {}, TypeError, "LowRank, Kronecker, BlockDiagonal, Monarch.*got ndarray"),
    (W8, int, {}, TypeError, "got int"),
    (W8, "Monarch", {}, TypeError, "got str"),
    (W8, sm.Permutation, {}, TypeError, "BlockSparse, Diagonal, Dense, or a list of them; got Permutation"),
    (W8, sm.LowRank, {"rank": 0}, ValueError, "rank: expected at least 1, got 0"),
    (W8, sm.Monarch, {"rank": -2}, ValueError, "rank: expected at least 1, got -2"),
    (W8, sm.LowRank, {"rank": 2.0}, TypeError, "rank: expected an int, got float"),
    (W8, sm.LowRank, {"rank": True}, TypeError, "rank: expected an int, got bool"),
    (W8, sm.LowRank, {"blocks": 2}, TypeError, "LowRank has no such option; it takes rank, .*budget, tol"),
    (W8, sm.Kronecker, {"rank": 2}, TypeError, "takes shapes, terms"),
    (W8, sm.Kronecker, {"terms": 0}, ValueError, "terms: expected at least 1"),
    (W8, sm.Kronecker, {"shapes": [(2, 2), (3, 4)]}, ValueError, r"multiply to \(6, 8\), expected \(8, 8\)"),
    (W8, sm.Kronecker, {"shapes": [(2, 2, 1)]}, ValueError, "2 numbers for each factor"),
    (W8, sm.Kronecker, {"shapes": []}, ValueError, "2 numbers for each factor"),
    (W8, sm.Kronecker, {"shapes": [(8, 8)], "terms": 2}, ValueError, "need two factors"),
    (W8, sm.Kronecker, {"shapes": [(2, 2)] * 3, "tol": 0.1}, ValueError, "need two factors"),
    (W8, sm.BlockDiagonal, {"blocks": 9}, ValueError, "between 1 and 8 for size 8, got 9"),
    (W8, sm.BlockDiagonal, {"blocks": (2, 2)}, ValueError, "one number of blocks"),
    (W8, sm.BlockDiagonal, {"blocks": 2, "budget": 0.5}, ValueError, "blocks and budget"),
    (W8, sm.Monarch, {"blocks": 0}, ValueError, "blocks: expected at least 1"),
    (W8, sm.Monarch, {"blocks": (2, 2, 2)}, ValueError, "row blocks, column blocks"),
    (W8, sm.Monarch, {"blocks": 2.5}, TypeError, "expected an int, got float"),
    (W8, sm.Butterfly, {"radix": 1}, ValueError, "radix: expected at least 2"),
    (W8, sm.Butterfly, {"radix": 2, "patterns": [(1, 8, 8, 1)]}, ValueError, "got both"),
    (W8, sm.Butterfly, {"radix": 2, "budget": 0.5}, ValueError, "radix and budget"),
    (W8, sm.Butterfly, {"patterns": [(1, 4, 4, 2), (2, 4, 4, 1)]}, ValueError, "have rank 2, expected 1"),
    (W8, sm.Chain, {}, ValueError, "needs the patterns"),
    (W8, sm.Chain, {"budget": 0.5}, ValueError, "needs the patterns"),
    (W8, sm.Chain, {"patterns": [(2, 4, 4, 1), (1, 4, 4, 2)]}, ValueError, "not chainable"),
    (W8, sm.Chain, {"patterns": [(1, 2, 2, 2), (2, 2, 2, 1)]}, ValueError, "4x4, too small for a matrix 8x8"),
    (W8, sm.Chain, {"patterns": [(1, 2, 2)]}, ValueError, "4 numbers for each factor"),
    (W8, sm.LowRank, {"rank": 2, "budget": 0.5}, ValueError, "rank and budget"),
    (W8, sm.LowRank, {"budget": 0.5, "tol": 0.1}, ValueError, "budget and tol"),
    (W8, sm.Monarch, {"rank": 2, "tol": 0.1}, ValueError, "rank and tol"),
    (W8, sm.Kronecker, {"terms": 2, "budget": 0.5}, ValueError, "terms and budget"),
    (W8, sm.LowRank, {"budget": 1.5}, ValueError, r"fraction in \(0, 1\]"),
    (W8, sm.LowRank, {"budget": 0.0}, ValueError, "fraction"),
    (W8, sm.LowRank, {"budget": math.nan}, ValueError, "fraction"),
    (W8, sm.LowRank, {"budget": 0}, ValueError, "at least 1, got 0"),
    (W8, sm.LowRank, {"budget": "half"}, TypeError, "got str"),
    (W8, sm.LowRank, {"budget": True}, TypeError, "got bool"),
    (W8, sm.LowRank, {"tol": 0.0}, ValueError, r"in \(0, 1\]"),
    (W8, sm.LowRank, {"tol": -1.0}, ValueError, r"in \(0, 1\]"),
    (W8, sm.LowRank, {"tol": math.nan}, ValueError, r"in \(0, 1\]"),
    (W8, sm.LowRank, {"tol": "small"}, TypeError, "got str"),
]


@pytest.mark.parametrize(("W", "family", "options", "error", "message"), BAD)
def test_bad_input(W, family, options, error, message):
    before = np.array(W).copy()
    with pytest.raises(error, match=message):
        project(W, family, **options)
    np.testing.assert_array_equal(np.array(W), before)


def test_batched_operator_is_refused():
    with pytest.raises(ValueError, match="expected one matrix"):
        project(sm.Dense(np.ones((2, 3, 3))), sm.LowRank)


def test_second_driver_takes_over(monkeypatch):
    W, numpy_svd = gaussian((12, 8), np.complex128), np.linalg.svd
    expected = project(W, sm.Monarch, blocks=2)

    def fails(*args, **kwargs):
        raise np.linalg.LinAlgError("SVD did not converge")

    monkeypatch.setattr(np.linalg, "svd", fails)  # gesdd fails, gesvd works
    found = project(W, sm.Monarch, blocks=2)
    assert found.error == pytest.approx(expected.error, rel=1e-12)
    assert project(W, sm.Monarch, budget=0.8).relative_error < 1
    assert left_svd(W)[1] == pytest.approx(numpy_svd(W, compute_uv=False), rel=1e-12)
    monkeypatch.setattr(scipy.linalg, "svd", fails)
    with pytest.raises(np.linalg.LinAlgError, match=r"block 0 of 4 \(6x4\) converged neither"):
        project(W, sm.Monarch, blocks=2)


def test_left_svd_of_wide_and_tall_stacks():
    for shape in ((2, 3, 4, 9), (2, 3, 9, 4), (5, 1, 3)):
        blocks = gaussian(shape, np.complex128)
        u, s = left_svd(blocks)
        np.testing.assert_allclose(s, svd(blocks)[1], rtol=1e-12)
        np.testing.assert_allclose(u @ (u.conj().swapaxes(-1, -2) @ blocks), blocks, atol=1e-13)


def test_importing_projection_loads_neither_scipy_nor_torch():
    code = (
        "import sys, structmat, structmat.projection.project; "
        "print([m for m in ('scipy', 'torch') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
