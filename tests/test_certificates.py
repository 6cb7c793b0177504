"""Two thousand random projections: the certificate holds in every one of them.

Families x shapes x dtypes x weights, drawn from one seed. In each case the error is recomputed densely in the norm that was
minimised, the lower bound is below it, and no random member of the family of the same size is nearer than the bound.
"""

from __future__ import annotations

import numpy as np
import pytest

import structmat as sm

CASES, PARTS = 2000, 20
FAMILIES = (sm.LowRank, sm.Monarch, sm.BlockTensorTrain, sm.Kronecker, sm.BlockDiagonal, sm.Butterfly)
DTYPES = (np.float32, np.float64, np.complex64, np.complex128)


def draw(rng: np.random.Generator):
    """A matrix of some kind, a family with options, and perhaps a weight."""
    m, n = (int(rng.integers(1, 25)) for _ in range(2))
    dtype = DTYPES[rng.integers(4)]
    W = rng.standard_normal((m, n))
    if np.dtype(dtype).kind == "c":
        W = W + 1j * rng.standard_normal((m, n))
    kind = rng.integers(5)
    if kind == 0:  # low rank and a little noise
        W = np.outer(W[:, 0], W[0]) + 1e-3 * W
    elif kind == 1:  # badly scaled rows
        W = W * np.logspace(-6, 6, m)[:, None]
    elif kind == 2:
        W = np.zeros_like(W) if rng.random() < 0.2 else np.round(W)
    family = FAMILIES[rng.integers(len(FAMILIES))]
    blocks = (int(rng.integers(1, m + 1)), int(rng.integers(1, n + 1)))
    options = {
        sm.LowRank: {"rank": int(rng.integers(1, min(m, n) + 1))},
        sm.Monarch: {"blocks": blocks, "rank": int(rng.integers(1, 4))},
        sm.BlockTensorTrain: {"blocks": blocks, "rank": int(rng.integers(1, 4))},
        sm.Kronecker: {"terms": int(rng.integers(1, 3))},
        sm.BlockDiagonal: {"blocks": min(blocks[0], n)},
        sm.Butterfly: {},
    }[family]
    weight = None
    if rng.random() < 0.35 and family is not sm.Butterfly:
        X = rng.standard_normal((int(rng.integers(1, 2 * n + 2)), n)) * np.logspace(0, -3 * rng.random(), n)
        weight = X.T @ X / len(X)
    return W.astype(dtype), family, options, weight


def norm(E: np.ndarray, weight: np.ndarray | None) -> float:
    E = E.astype(np.complex128)
    if weight is None:
        return float(np.linalg.norm(E))
    return float(np.sqrt(max(0.0, np.einsum("ij,jk,ik->", E, weight, E.conj()).real)))


@pytest.mark.parametrize("part", range(PARTS))
def test_the_certificate_holds(part):
    rng = np.random.default_rng(1000 + part)
    for case in range(CASES // PARTS):
        W, family, options, weight = draw(rng)
        kept = W.copy()
        p = sm.project(W, family, weight=weight, **options)
        where = f"part {part}, case {case}: {family.__name__} {options} {W.shape} {W.dtype} weight {weight is not None}"
        assert np.array_equal(W, kept), where
        assert p.operator.dtype == W.dtype, where
        scale = max(norm(W, weight), 1e-300)
        exact = norm(W - np.asarray(p.operator.astype(np.complex128)), weight)
        assert abs(exact - p.error) <= 2e-6 * scale, where  # squares of a weighted norm cancel
        assert 0 <= p.lower_bound <= p.error, where
        assert p.error <= scale * (1 + 1e-6), where  # the zero matrix is in every family
        near = p.operator.astype(np.result_type(W.dtype, np.float64))
        for step in (1e-3, 0.3):  # members of the same architecture, near the result and far from it
            other = near._map(lambda x, step=step: x + step * np.abs(x).max() * rng.standard_normal(x.shape))
            assert norm(W - np.asarray(other), weight) >= p.lower_bound - 2e-6 * scale, where
