"""The rule table, walked: every rule fires on some market pair and is right in value, dtype, size and cost."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import pytest
from market import market, small_market

import structmat as sm
from structmat import rules
from structmat.algebra import Product, Scaled, Sum
from structmat.testing import tolerance

PAIRS = [p for p in small_market() if "inverse" not in p.name]
BINARY = (rules.MATMUL, rules.ADD, rules.KRON)


def all_rules(operations):
    return [
        pytest.param(op, left, right, f, id=f"{op}-{left.__name__}-{right.__name__}-{f.__name__}")
        for table in (rules.CANCELLATIONS, rules.TABLE)
        for (op, left, right), functions in table.items()
        if op in operations
        for f in functions
    ]


def members(kind, pool):
    return [p for p in pool if isinstance(p.operator, kind)]


def shapes_fit(operation, a, b):
    if len(a.shape) > 2 or len(b.shape) > 2:
        return operation != rules.KRON and a.shape[:-2] == b.shape[:-2] and shapes_fit(operation, a[0], b[0])
    if operation == rules.MATMUL:
        return a.shape[-1] == b.shape[-2]
    return a.shape == b.shape if operation == rules.ADD else a.size * b.size < 5000


def dense_result(operation, a, b):
    return {rules.MATMUL: np.matmul, rules.ADD: np.add, rules.KRON: np.kron}[operation](a, b)


def lazy_result(operation, a, b):
    return {rules.MATMUL: Product, rules.ADD: Sum, rules.KRON: sm.Kronecker}[operation](a, b)


def check_value(result, expected, *operands):
    got = result.to_dense()
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    sizes = np.prod([max(1.0, float(np.abs(o).max(initial=0))) for o in operands])
    bound = tolerance(expected.dtype) * sizes * max(1, max(expected.shape[-2:], default=1))
    assert np.abs(got - expected).max(initial=0) <= bound


def related(pool):
    """Operators that share arrays with one of the market, or undo it: what some rules wait for."""
    extra = []
    for p in pool:
        a, d = p.operator, p.dense
        if d.ndim == 2 and d.shape[0] == d.shape[1] and isinstance(a, Sum) and "sum-with-low-rank" not in p.name:
            well = a + 20 * sm.Identity(d.shape[0], d.dtype)
            extra.append((well, well.inv(), d + 20 * np.eye(len(d)), np.linalg.inv(d + 20 * np.eye(len(d)))))
            extra.append((well.inv(), well, np.linalg.inv(d + 20 * np.eye(len(d))), d + 20 * np.eye(len(d))))
        if isinstance(a, sm.Kronecker) and len(a.factors) == 2 and all(isinstance(f, sm.Dense) for f in a.factors):
            left, right = a.factors
            b = sm.Kronecker(left, 2 * right)
            extra.append((a, b, d, 2 * d))
        if isinstance(a, sm.blocks.HorizontalStack):
            extra.append((a, a.T, d, d.T))
        extra.append((a, a, d, d))
        if isinstance(a, Sum):
            extra.append((Scaled(3, a), Scaled(2, a), 3 * d, 2 * d))
            extra.append((Scaled(3, a), a, 3 * d, d))
            extra.append((a, Scaled(2, a), d, 2 * d))
    return extra


@pytest.mark.parametrize(("operation", "left", "right", "function"), all_rules(BINARY))
def test_binary_rule(operation, left, right, function):
    fired = 0
    cases = [
        (p.operator, q.operator, p.dense, q.dense) for p, q in product(members(left, PAIRS), members(right, PAIRS))
    ]
    cases += related(PAIRS)
    if len(cases) > 1500:  # rules for any operator: thin out, but keep every related pair
        cases = cases[:: len(cases) // 1000] + related(PAIRS)
    for a, b, da, db in cases:
        if not (isinstance(a, left) and isinstance(b, right) and shapes_fit(operation, da, db)):
            continue
        kept = [x.copy() for x in (*a.arrays, *b.arrays)]
        result = function(a, b)
        if result is NotImplemented:
            continue
        fired += 1
        check_value(result, dense_result(operation, da, db), da, db)
        assert result.nparams <= a.nparams + b.nparams, "larger to store"
        assert result._flops() <= lazy_result(operation, a, b)._flops() + result.shape[-2], "costlier to apply"
        assert all(np.array_equal(x, y) for x, y in zip(kept, (*a.arrays, *b.arrays), strict=True))
    assert fired, "no case in the market"


@pytest.mark.parametrize(("operation", "left", "right", "function"), all_rules((rules.SCALE,)))
def test_scale_rule(operation, left, right, function):
    fired = 0
    for p in members(left, PAIRS):
        for c in (1, 2, -0.5, 1 + 2j, np.float64(0.25)):
            result = function(p.operator, c)
            if result is NotImplemented:
                continue
            fired += 1
            check_value(result, c * p.dense, p.dense, np.array(c))
            assert result.nparams <= p.operator.nparams
    assert fired


@pytest.mark.parametrize(("operation", "left", "right", "function"), all_rules((rules.INVERSE,)))
def test_inverse_rule(operation, left, right, function):
    fired = 0
    pool = [p for p in small_market() if isinstance(p.operator, left) and p.operator.is_square and p.dense.ndim == 2]
    for p in pool:
        if (
            not np.linalg.cond(p.dense) < 1e8
        ):  # singular ones: test_market.py; here those that a rule is there to refuse
            if isinstance(p.operator, sm.Zero):
                with pytest.raises(np.linalg.LinAlgError, match="singular"):
                    function(p.operator)
                fired += 1
            continue
        result = function(p.operator)
        if result is NotImplemented:
            continue
        fired += 1
        expected = np.linalg.inv(p.dense)
        slack = 1e3 * np.linalg.cond(p.dense) * np.abs(expected).max()
        assert np.abs(result.to_dense() - expected).max() <= tolerance(p.dense.dtype) * slack
        if not isinstance(result, sm.algebra.Inverse):
            assert result.nparams <= p.operator.nparams
    assert fired


@pytest.mark.parametrize(("operation", "left", "right", "function"), all_rules(("slice",)))
def test_slice_rule(operation, left, right, function):
    pool = members(left, PAIRS)
    assert pool
    for p in pool:
        m, n = p.dense.shape[-2:]
        rows, cols = np.arange(m)[::-2], np.r_[np.arange(n), n - 1]
        check_value(function(p.operator, (rows, cols)), p.dense[..., rows[:, None], cols], p.dense)


def test_block_diag_rule():
    a = np.arange(6.0).reshape(2, 3)
    result = sm.block_diag(a, -a, 2 * a)
    assert type(result) is sm.BlockDiagonal
    expected = np.zeros((6, 9))
    for i, b in enumerate((a, -a, 2 * a)):
        expected[2 * i : 2 * i + 2, 3 * i : 3 * i + 3] = b
    assert np.array_equal(result.to_dense(), expected)


def test_every_rule_says_what_it_is():
    for table in (rules.CANCELLATIONS, rules.TABLE):
        for functions in table.values():
            for f in functions:
                assert f.__doc__, f"{f.__name__} has no identity in its docstring"


def test_every_pair_of_types_has_one_answer():
    """All pairs of structures meet without an error, and the answer is the dense one."""
    one_of_each = {}
    for p in PAIRS:
        if p.dense.shape == (6, 6) and p.dense.dtype == np.float64:
            one_of_each.setdefault(type(p.operator), p)
    assert len(one_of_each) >= 15
    for p, q in product(one_of_each.values(), repeat=2):
        check_value(p.operator @ q.operator, p.dense @ q.dense, p.dense, q.dense)
        check_value(p.operator + q.operator, p.dense + q.dense, p.dense, q.dense)
        check_value(p.operator - q.operator, p.dense - q.dense, p.dense, q.dense)
        check_value(sm.kron(p.operator, q.operator), np.kron(p.dense, q.dense), p.dense, q.dense)


@pytest.mark.parametrize(
    ("left", "right", "kind"),
    [
        (sm.Diagonal, sm.Diagonal, sm.Diagonal),
        (sm.Permutation, sm.Permutation, sm.Permutation),
        (sm.BlockDiagonal, sm.BlockDiagonal, sm.BlockDiagonal),
        (sm.LowRank, sm.LowRank, sm.LowRank),
        (sm.Monarch, sm.LowRank, sm.LowRank),
        (sm.LowRank, sm.Kronecker, sm.LowRank),
        (sm.Diagonal, sm.Monarch, sm.Monarch),
        (sm.Monarch, sm.Diagonal, sm.Monarch),
        (sm.Diagonal, sm.Butterfly, sm.Butterfly),
        (sm.Monarch, sm.Monarch, sm.Chain),
        (sm.Butterfly, sm.Monarch, sm.Chain),
    ],
)
def test_structure_survives_products(left, right, kind):
    a, b = left.random((12, 12), rng=0), right.random((12, 12), rng=1)
    result = a @ b
    assert type(result) is kind
    assert np.allclose(result.to_dense(), a.to_dense() @ b.to_dense())


def test_block_diagonal_folds_into_the_ends_of_monarch_and_btt():
    for family in (sm.Monarch, sm.BlockTensorTrain):
        a = family.random((12, 12), blocks=(3, 4), rank=2, rng=0)
        inner = sm.BlockDiagonal.random((12, 12), blocks=4, rng=1)
        result = a @ inner
        assert type(result) is family
        assert result.nparams == a.nparams
        assert np.allclose(result.to_dense(), a.to_dense() @ inner.to_dense())
    a = sm.BlockTensorTrain.random((12, 12), blocks=(3, 4), rank=2, rng=0)
    outer = sm.BlockDiagonal.random((12, 12), blocks=3, rng=2)
    assert type(outer @ a) is sm.BlockTensorTrain
    assert np.allclose((outer @ a).to_dense(), outer.to_dense() @ a.to_dense())
    assert type(a.T @ outer) is sm.BlockTensorTrain
    assert np.allclose((a.T @ outer).to_dense(), a.to_dense().T @ outer.to_dense())


def test_transpositions_are_absorbed():
    shuffle = sm.Permutation(np.arange(12).reshape(3, 4).T.ravel())
    a = sm.Monarch.random((12, 12), blocks=(4, 3), rng=0)
    for result, expected in (
        (shuffle @ a, shuffle.to_dense() @ a.to_dense()),
        (a @ shuffle, a.to_dense() @ shuffle.to_dense()),
        (shuffle.T @ (shuffle @ a), a.to_dense()),
    ):
        assert type(result) is sm.Monarch
        assert np.allclose(result.to_dense(), expected)
    other = sm.Permutation(np.random.default_rng(0).permutation(12))
    assert type(other @ a) is Product


def test_sums_of_block_ranks():
    for family in (sm.Monarch, sm.BlockTensorTrain):
        a, b = (family.random((24, 24), blocks=4, rank=r, rng=r) for r in (1, 2))
        for x, y in ((a, b), (a.T, b.T)):
            result = x + y
            assert type(result) is family
            assert result.nparams == a.nparams + b.nparams
            assert np.allclose(result.to_dense(), x.to_dense() + y.to_dense())


def test_long_products_cancel_without_recursion():
    parts = [sm.Monarch.random((4, 4), rank=2, rng=i) + sm.Dense.random((4, 4), rng=i) for i in range(300)]
    forward = Product(*parts)
    backward = Product(*(sm.algebra.Inverse(p) for p in reversed(parts)))
    assert isinstance(forward @ backward, sm.Identity)


def test_float32_market_stays_float32():
    for p, q in pairwise([p for p in market() if p.name.endswith("float32") and p.dense.shape == (6, 6)]):
        for result in (p.operator @ q.operator, p.operator + q.operator, 2 * p.operator, p.operator.T):
            assert result.dtype == np.float32
