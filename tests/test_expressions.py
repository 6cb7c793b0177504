"""Random expressions, up to depth 4, against their dense value."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
from hypothesis import HealthCheck, given, settings
from market import small_market

import structmat as sm
from structmat.testing import tolerance

LEAVES = [p for p in small_market() if "inverse" not in p.name and p.dense.ndim == 2 and p.dense.size]
SQUARE = [p for p in LEAVES if p.dense.shape == (6, 6)]
UNARY = ("T", "H", "conj", "negative", "scaled", "scaled-complex", "reversed", "sliced", "divided")
BINARY = ("matmul", "add", "subtract", "kron", "hstack", "vstack", "block_diag")


def unary(name, a, d):
    match name:
        case "T":
            return a.T, d.T
        case "H":
            return a.H, d.conj().T
        case "conj":
            return a.conj(), d.conj()
        case "negative":
            return -a, -d
        case "scaled":
            return 0.5 * a, 0.5 * d
        case "scaled-complex":
            return a * (1 - 2j), d * (1 - 2j)
        case "divided":
            return a / 4, d / 4
        case "reversed":
            return a[::-1, :], d[::-1, :]
    return a[1:, [0, -1]], d[1:, [0, -1]]


def binary(name, a, d, b, e):
    """The combination if the shapes allow it; else the left operand, or a product made to fit."""
    if name == "matmul" and d.shape[1] == e.shape[0]:
        return a @ b, d @ e
    if name == "matmul" and d.shape[1] == e.shape[1]:
        return a @ b.T, d @ e.T
    if name == "add" and d.shape == e.shape:
        return a + b, d + e
    if name == "subtract" and d.shape == e.shape:
        return a - b, d - e
    if name == "kron" and d.size * e.size <= 4096:
        return sm.kron(a, b), np.kron(d, e)
    if name == "hstack" and d.shape[0] == e.shape[0]:
        return sm.hstack([a, b]), np.hstack([d, e])
    if name == "vstack" and d.shape[1] == e.shape[1]:
        return sm.vstack([a, b]), np.vstack([d, e])
    if name == "block_diag" and max(d.shape + e.shape) < 40:
        top = np.hstack([d, np.zeros((d.shape[0], e.shape[1]))])
        return sm.block_diag(a, b), np.vstack([top, np.hstack([np.zeros((e.shape[0], d.shape[1])), e])])
    return a, d


def leaf():
    return st.one_of(st.sampled_from(SQUARE), st.sampled_from(LEAVES)).map(lambda p: (p.operator, p.dense, p.name))


def extend(children):
    def one(pair):
        name, (a, d, text) = pair
        if not d.size or min(d.shape) < 2:
            return a, d, text
        return (*unary(name, a, d), f"{name}({text})")

    def two(triple):
        name, (a, d, s), (b, e, t) = triple
        return (*binary(name, a, d, b, e), f"{name}({s}, {t})")

    return st.one_of(
        st.tuples(st.sampled_from(UNARY), children).map(one),
        st.tuples(st.sampled_from(BINARY), children, children).map(two),
    )


expressions = st.recursive(leaf(), extend, max_leaves=8)


@given(expressions)
@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_expression_has_its_dense_value(expression):
    a, d, text = expression
    assert a.shape == d.shape, text
    assert a.dtype == d.dtype, text
    scale = max(1.0, float(np.abs(d).max(initial=0)))
    bound = 1e4 * tolerance(d.dtype) * scale * 6**4
    got = a.to_dense()
    assert np.abs(got - d).max(initial=0) <= bound, text
    x = np.cos(np.arange(d.shape[1] * 2.0)).reshape(d.shape[1], 2)
    assert np.abs(a @ x - d @ x).max(initial=0) <= bound * max(1, d.shape[1]), text
    assert np.abs(x.T @ a.T - x.T @ d.T).max(initial=0) <= bound * max(1, d.shape[1]), text


@given(st.lists(st.sampled_from(SQUARE), min_size=3, max_size=4), st.booleans())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_products_and_sums_are_associative(parts, product):
    first, *others = (p.operator for p in parts)
    left = first
    for p in others:
        left = left @ p if product else left + p
    right = parts[-1].operator
    for p in reversed(parts[:-1]):
        right = p.operator @ right if product else p.operator + right
    bound = 1e4 * tolerance(left.dtype) * np.prod([max(1.0, np.abs(p.dense).max()) * 6 for p in parts])
    assert left.dtype == right.dtype
    assert np.abs(left.to_dense() - right.to_dense()).max() <= bound
