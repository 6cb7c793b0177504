"""Backends: the NumPy plans against the general ones, the choice of a backend, plans kept, threads."""

from __future__ import annotations

import itertools
import math
from concurrent.futures import ThreadPoolExecutor

import hypothesis.strategies as st
import numpy as np
import pytest
from chains import layouts
from hypothesis import given, settings

import structmat as sm
from structmat.backends import base
from structmat.backends.numpy import NumpyBackend, StridedChainPlan, aligned_view
from structmat.patterns import AxisOrder, axis_order, compose, is_identity, near_square, prime_factors
from structmat.structures.block_tensor_train import balanced_radices
from structmat.structures.butterfly import butterfly_patterns


@given(layouts(), st.sampled_from([1, 3]), st.booleans())
@settings(max_examples=400, deadline=None, derandomize=True)
def test_strided_plans_equal_the_general_ones(layout, k, contiguous):
    rng = np.random.default_rng(0)
    blocks = [rng.standard_normal((p.a, p.d, p.b, p.c)) for p in layout.patterns]
    strided, general = NumpyBackend().chain(layout, blocks), base.ChainPlan(layout, blocks)
    assert isinstance(strided, StridedChainPlan)
    x = rng.standard_normal((layout.cols, k))
    rows = (
        rng.standard_normal((k, layout.cols))
        if contiguous
        else np.asfortranarray(rng.standard_normal((k, layout.cols)))
    )
    assert np.allclose(strided.columns(x), general.columns(x))
    assert np.allclose(strided.rows(rows), general.rows(rows))
    out = np.empty((layout.rows, k))
    assert np.allclose(strided.columns(x, out), general.columns(x))


@given(layouts())
@settings(max_examples=200, deadline=None, derandomize=True)
def test_views_are_the_orders_they_stand_for(layout):
    p, order = layout.patterns[-1], layout.in_order
    view = aligned_view(order, (p.a, p.c, p.d))
    if view is None:
        return
    x = np.arange(p.cols)
    natural = x if order is None else x[order.permutation()]
    axes = (*view.outer, view.inner, *view.stride)
    assert np.array_equal(x.reshape(view.shape).transpose(axes).ravel(), natural)


@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=4).flatmap(
        lambda r: st.tuples(st.just(r), st.permutations(range(len(r))))
    )
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_axis_orders_are_found_in_their_permutations(case):
    order = AxisOrder(tuple(case[0]), tuple(case[1]))
    p = order.permutation()
    found = axis_order(p)
    assert found is not None
    assert np.array_equal(found.permutation(), p)
    assert is_identity(found) == np.array_equal(p, np.arange(order.size)) == is_identity(order)
    assert np.array_equal(p[order.T.permutation()], np.arange(order.size))
    assert compose(order, order.T) == (True, None)


def test_other_permutations_are_no_axis_orders():
    assert axis_order(np.array([1, 0, 2])) is None
    assert axis_order(np.array([0, 2, 1])) is None
    assert axis_order(np.array([0, 3, 1, 2])) is None
    assert axis_order(np.array([0, 2, 1, 3])) == AxisOrder((2, 2), (1, 0))
    swap = AxisOrder((2, 3), (1, 0))
    assert compose(swap, AxisOrder((2, 3), (1, 0)))[0] in (True, False)
    p = swap.permutation()[swap.permutation()]
    assert compose(swap, swap) == ((True, axis_order(p)) if axis_order(p) else (False, None))


def test_sizes():
    assert near_square(12) == (3, 4)
    assert near_square(13) == (1, 13)
    assert prime_factors(360) == [2, 2, 2, 3, 3, 5]
    for size in (1, 7, 12, 97, 1000, 4096):
        for count in (2, 3, 4):
            digits = balanced_radices(size, count)
            assert len(digits) == count
            assert size <= math.prod(digits) <= 2 * size + 8
    for shape in ((1, 1), (13, 13), (1024, 1024), (97, 5), (1536, 384), (1000, 1000)):
        patterns = butterfly_patterns(shape)
        assert patterns[0].rows >= shape[0]
        assert patterns[-1].cols >= shape[1]
        assert all(p.chain_rank(q) == 1 for p, q in itertools.pairwise(patterns))
    assert [tuple(p) for p in butterfly_patterns((8, 8), radix=2)] == [(1, 2, 2, 4), (2, 2, 2, 2), (4, 2, 2, 1)]
    assert butterfly_patterns((1000, 1000), radix=2)[0].rows == 1024


def test_plans_are_made_once():
    a = sm.Monarch.random((12, 12), rng=0)
    _ = a @ np.ones(12)
    plan = a._plan()
    _ = a @ np.ones((12, 3)), np.ones((2, 12)) @ a.T
    assert a._plan() is plan
    assert a.T.T._plan() is plan


class Counting(base.Backend):
    """A backend that counts the plans it makes."""

    name = "counting"

    def __init__(self):
        self.made = []

    def chain(self, layout, blocks):
        self.made.append("chain")
        return super().chain(layout, blocks)

    def kron(self, factors):
        self.made.append("kron")
        return super().kron(factors)


def test_a_backend_can_be_registered_and_chosen():
    counting = Counting()
    sm.backends.register(counting, "numpy")
    chain, kron = sm.Butterfly.random((8, 8), rng=0), sm.Kronecker.random((6, 6), rng=0)
    expected = chain @ np.ones(8), kron @ np.ones(6)
    with sm.use_backend("counting"):
        got = chain @ np.ones(8), kron @ np.ones(6)
        with sm.use_backend("numpy"):
            _ = chain @ np.ones(8)
    assert counting.made == ["chain", "kron"]
    assert all(np.allclose(x, y) for x, y in zip(got, expected, strict=True))
    _ = chain @ np.ones(8)
    assert counting.made == ["chain", "kron"], "the choice ends with the block"


def test_threads_share_an_operator():
    operators = [
        sm.Monarch.random((60, 60), rng=0),
        sm.Kronecker.random((60, 60), rng=0),
        sm.Butterfly.random((64, 64), rng=0),
    ]
    rng = np.random.default_rng(0)
    jobs = [(a, rng.standard_normal((a.shape[1], 5))) for a in operators for _ in range(60)]
    expected = [a.to_dense() @ x for a, x in jobs]
    fresh = [type(a)._rebuild(*a._values()) for a, _ in jobs]
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda job: job[0] @ job[1][1], zip(fresh, jobs, strict=True)))
    assert all(np.allclose(x, y) for x, y in zip(got, expected, strict=True))


@pytest.mark.parametrize("shapes", [((2, 3), (4, 5)), ((5, 1), (1, 7)), ((2, 2), (3, 1), (1, 4))])
def test_kronecker_factors_go_in_the_cheapest_order(shapes):
    from itertools import permutations

    def cost(order):
        sizes, total = [n for _, n in shapes], 0
        for i in order:
            total += math.prod(sizes) * shapes[i][0]
            sizes[i] = shapes[i][0]
        return total

    assert cost(base.cheapest_order(shapes)) == min(map(cost, permutations(range(len(shapes)))))
    factors = [np.ones(s) for s in shapes]
    assert sm.Kronecker(*factors).flops() == 2 * cost(base.cheapest_order(shapes))
