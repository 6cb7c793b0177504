"""Roads that chains take for speed: shared Gram matrices, ties, norms by runs, the certificate by slabs."""

from __future__ import annotations

import numpy as np
import pytest
from test_projection_chains import CHAINS, IDS, gaussian

import structmat as sm
from structmat.projection import chain_bounds, hierarchical
from structmat.projection.certificate import frobenius
from structmat.projection.chain_bounds import inner_bound
from structmat.projection.hierarchical import sweep
from structmat.projection.links import products, row_slabs, split_view
from structmat.projection.svd import gram_error, gram_tail, truncated
from structmat.structures.block_tensor_train import chain_patterns
from structmat.structures.butterfly import butterfly_patterns


@pytest.mark.parametrize("complex_values", [False, True])
@pytest.mark.parametrize(("name", "patterns"), CHAINS[:5], ids=IDS[:5])
def test_bounds_from_shared_gram_matrices_are_those_of_every_split(name, patterns, complex_values):
    product = products(patterns)[0, len(patterns) - 1]
    whole = gaussian((product.a, product.d, product.b, product.c), complex_values, seed=3)
    table, last = products(patterns), len(patterns) - 1
    each = [
        gram_tail(split_view(whole, table[0, s], table[s + 1, last]), table[0, s].chain_rank(table[s + 1, last]) or 0)
        for s in range(last)
    ]
    assert inner_bound(whole, patterns) == pytest.approx(max(each), rel=1e-12)
    for s in range(last):
        others = [e for i, e in enumerate(each) if i != s]
        assert inner_bound(whole, patterns, [s]) == pytest.approx(max(others, default=0.0), rel=1e-12)


def test_bounds_of_a_large_matrix_look_at_the_middle(monkeypatch):
    patterns = butterfly_patterns((64, 64), 2)
    W = gaussian((1, 1, 64, 64))
    expected = inner_bound(W, patterns)
    monkeypatch.setattr(chain_bounds, "_LARGE", 1)
    assert inner_bound(W, patterns) == pytest.approx(
        expected, rel=1e-12
    )  # of a Gaussian matrix the middle is the largest


def test_splits_are_passed_over_only_where_they_cannot_win():
    blocks = gaussian((40, 8, 20))
    grams = blocks @ blocks.swapaxes(-1, -2)
    exact = gram_tail(blocks, 1)
    assert gram_error(grams, 1, 20, 0.0) == pytest.approx(exact, rel=1e-12)
    assert gram_error(grams, 1, 20, exact * 0.999999) == pytest.approx(exact, rel=1e-12)
    assert gram_error(grams, 1, 20, exact * 1.05) == 0.0
    assert gram_error(np.zeros((3, 4, 4)), 1, 20, 1.0) == 0.0


@pytest.mark.parametrize("complex_values", [False, True])
def test_blocks_without_a_leading_vector_all_get_the_same(complex_values):
    q = np.linalg.qr(gaussian((20, 20), complex_values))[0]
    rotations = np.linalg.qr(gaussian((9, 2, 2), complex_values, seed=1))[0]
    found = truncated(rotations @ np.broadcast_to(q[:2], (9, 2, 20)), 1)
    np.testing.assert_allclose(found.u, np.full((9, 2, 1), 0.5**0.5), atol=1e-12)
    assert found.discarded == pytest.approx(9.0, rel=1e-12)


@pytest.mark.parametrize("n", [16, 64, 256])
def test_fourier_in_natural_order_is_as_near_as_can_be(n):
    p = sm.project(np.fft.fft(np.eye(n)), sm.Butterfly, radix=2)
    levels = n.bit_length() - 1
    assert p.relative_error == pytest.approx((1 - 2.0 ** -(levels // 2)) ** 0.5, abs=1e-4)
    assert p.lower_bound == pytest.approx(p.error, rel=1e-4)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("entries", [1, 50, 10**6])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_row_slabs_are_the_rows_of_the_product(rank, entries, transposed):
    patterns = chain_patterns((3, 4), (5, 2), (1, rank, 1))
    A = sm.Chain([gaussian((a, d, b, c), True, seed=a) for a, b, c, d in patterns])
    dense = np.asarray(A).T if transposed else np.asarray(A)
    seen = np.zeros(len(dense), int)
    for at, rows in row_slabs(A.factors, entries, transposed):
        np.testing.assert_allclose(rows, dense[at], atol=1e-12)
        seen[at] += 1
    assert (seen == 1).all()


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("family", [sm.Butterfly, sm.Monarch, sm.BlockTensorTrain, sm.LowRank])
def test_certificate_of_a_medium_matrix_is_the_distance(family, order):
    W = np.asarray(gaussian((300, 260), True), order=order)
    for dtype in (np.complex128, np.complex64):
        p = sm.project(W.astype(dtype, order="K"), family)
        dense = np.asarray(p.operator.astype(np.complex128))
        assert p.error == pytest.approx(np.linalg.norm(W.astype(dtype) - dense), rel=1e-12)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("direction", ["left-to-right", "right-to-left", "balanced"])
def test_memory_order_does_not_change_the_result(order, direction):
    W = gaussian((64, 64), True)
    expected = sm.project(W, sm.Butterfly, order=direction)
    found = sm.project(np.asarray(W, order=order), sm.Butterfly, order=direction)
    assert found.error == pytest.approx(expected.error, rel=1e-12)
    assert found.lower_bound == pytest.approx(expected.lower_bound, rel=1e-12)


@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1.0, 1e160, 1e300])
@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (64, 64), (61, 203)])
@pytest.mark.parametrize("complex_values", [False, True])
def test_frobenius_norm_at_every_size_and_scale(shape, scale, complex_values):
    x = gaussian(shape, complex_values)
    expected = np.linalg.norm(x) * scale
    for y in (x * scale, (x * scale).T, np.repeat(x * scale, 2, axis=1)[:, ::2]):
        assert frobenius(y) == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("complex_values", [False, True])
@pytest.mark.parametrize(("name", "patterns"), CHAINS, ids=IDS)
@pytest.mark.parametrize("entries", [1, 60, 150])
def test_slabs_of_a_large_matrix_do_not_change_the_sweep(name, patterns, complex_values, entries, monkeypatch):
    W = gaussian((patterns[0].rows, patterns[-1].cols), complex_values, seed=2)
    expected = sweep(W, patterns)
    monkeypatch.setattr(hierarchical, "_LARGE", 1)
    monkeypatch.setattr(hierarchical, "_SLAB", entries)
    found = sweep(W, patterns)
    assert found.error == pytest.approx(expected.error, rel=1e-12)
    assert found.lower_bound == pytest.approx(expected.lower_bound, rel=1e-12)
    for x, y in zip(found.factors, expected.factors, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-10)


def test_slabs_are_taken_where_the_matrix_is_cut_from_the_left(monkeypatch):
    patterns = butterfly_patterns((64, 64), 2)
    W = gaussian((1, 1, 64, 64))
    monkeypatch.setattr(hierarchical, "_LARGE", 1)
    monkeypatch.setattr(hierarchical, "_SLAB", 600)
    assert [len(hierarchical._peel(W, patterns, cuts)[0]) for cuts in ((0, 1, 2, 3, 4), (4, 3, 2, 1, 0))] == [4, 1]
