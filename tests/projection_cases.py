"""Projections that run where the matrix is: family, options and shape, for the tests on torch, on the stand-in and on GPUs."""

from __future__ import annotations

import numpy as np

import structmat as sm

CHAIN = [(1, 4, 4, 12), (2, 6, 6, 4), (6, 8, 4, 1)]  # ranks 2 and 2, rectangular
SPARSE = [(2, 3, 4, 2), (4, 2, 2, 2)]  # whose product is not dense
ORDERS = (np.random.default_rng(1).permutation(24), np.random.default_rng(2).permutation(16))
OUTPUTS = np.cov(np.random.default_rng(3).standard_normal((24, 60)))

PLAIN = {
    "low rank": (sm.LowRank, {"rank": 3}, (24, 16)),
    "low rank beyond full": (sm.LowRank, {"rank": 9}, (5, 7)),
    "low rank, tolerance": (sm.LowRank, {"tol": 0.5}, (24, 16)),
    "low rank, budget": (sm.LowRank, {"budget": 0.4}, (24, 16)),
    "low rank, interpolative": (sm.LowRank, {"rank": 3, "interpolative": True}, (24, 16)),
    "low rank, randomised": (sm.LowRank, {"rank": 3, "method": "randomized"}, (60, 50)),
    "low rank, randomised, tolerance": (sm.LowRank, {"tol": 0.5, "method": "randomized"}, (60, 50)),
    "monarch": (sm.Monarch, {"blocks": 4}, (24, 16)),
    "monarch, two rows": (sm.Monarch, {"blocks": 12}, (24, 36)),
    "monarch, padded": (sm.Monarch, {"blocks": (3, 5), "rank": 2}, (25, 18)),
    "monarch, full rank": (sm.Monarch, {"blocks": 4, "rank": 5}, (24, 16)),
    "monarch, orders": (sm.Monarch, {"blocks": 4, "layout": "search"}, (16, 16)),
    "monarch, budget": (sm.Monarch, {"budget": 0.5}, (32, 32)),
    "monarch, tolerance": (sm.Monarch, {"tol": 0.5}, (32, 32)),
    "monarch, interpolative": (sm.Monarch, {"blocks": 4, "rank": 2, "interpolative": True}, (24, 16)),
    "monarch, permuted": (sm.Monarch, {"blocks": 4, "permutation": ORDERS}, (24, 16)),
    "monarch, transposed": (sm.Monarch, {"blocks": 4, "transposed": True}, (24, 16)),
    "train of two": (sm.BlockTensorTrain, {"blocks": 4, "rank": 2}, (24, 16)),
    "train of three": (sm.BlockTensorTrain, {"cores": 3, "rank": 2}, (27, 24)),
    "train, tolerance": (sm.BlockTensorTrain, {"cores": 3, "tol": 0.5}, (27, 24)),
    "butterfly": (sm.Butterfly, {"radix": 2}, (32, 32)),
    "butterfly, rectangular": (sm.Butterfly, {}, (30, 20)),
    "butterfly, refined": (sm.Butterfly, {"radix": 2, "refine": 3}, (16, 16)),
    "butterfly, orders": (sm.Butterfly, {"radix": 2, "permutation": "search"}, (16, 16)),
    "butterfly, balanced": (sm.Butterfly, {"radix": 2, "order": "balanced"}, (32, 32)),
    "butterfly, from the right": (sm.Butterfly, {"radix": 4, "order": "right-to-left"}, (64, 64)),
    "butterfly, budget": (sm.Butterfly, {"budget": 0.5}, (64, 64)),
    "chain": (sm.Chain, {"patterns": CHAIN}, (48, 24)),
    "chain, sparse": (sm.Chain, {"patterns": SPARSE}, (12, 16)),
    "kronecker": (sm.Kronecker, {"shapes": [(4, 4), (6, 4)]}, (24, 16)),
    "kronecker, three terms": (sm.Kronecker, {"shapes": [(4, 4), (6, 4)], "terms": 3}, (24, 16)),
    "kronecker, lanczos": (sm.Kronecker, {"shapes": [(16, 16), (16, 16)], "method": "lanczos"}, (256, 256)),
    "kronecker, budget": (sm.Kronecker, {"budget": 0.4}, (24, 16)),
    "kronecker of three": (sm.Kronecker, {"shapes": [(2, 2), (3, 2), (4, 4)]}, (24, 16)),
    "block diagonal": (sm.BlockDiagonal, {"blocks": 3}, (24, 17)),
    "dense": (sm.Dense, {}, (24, 17)),
}
WEIGHTED = {
    "low rank": (sm.LowRank, {"rank": 3}, 200),
    "low rank, interpolative": (sm.LowRank, {"rank": 3, "interpolative": True}, 200),
    "low rank, tolerance": (sm.LowRank, {"tol": 0.3}, 200),
    "low rank, outputs": (sm.LowRank, {"rank": 3, "row_weight": OUTPUTS}, 200),
    "low rank, mean": (sm.LowRank, {"rank": 2, "mean": True}, 200),
    "low rank, singular": (sm.LowRank, {"rank": 2}, 5),
    "monarch": (sm.Monarch, {"blocks": 4, "rank": 2}, 200),
    "monarch, tolerance": (sm.Monarch, {"blocks": 4, "tol": 0.4}, 200),
    "monarch, permuted": (sm.Monarch, {"blocks": 4, "permutation": ORDERS[1]}, 200),
    "monarch, padded": (sm.Monarch, {"blocks": (5, 3)}, 200),
    "monarch, damped": (sm.Monarch, {"blocks": (4, 1), "damping": 0.1}, 200),
    "monarch, singular": (sm.Monarch, {"blocks": 4}, 5),
    "train, budget": (sm.BlockTensorTrain, {"budget": 0.5}, 200),
    "train, outputs": (sm.BlockTensorTrain, {"blocks": 4, "row_weight": OUTPUTS}, 200),
}
HOST = {
    "diagonal": (sm.Diagonal, {}, (16, 16)),
    "block sparse": (sm.BlockSparse, {"block": 4}, (24, 16)),
    "block diagonal, budget": (sm.BlockDiagonal, {"budget": 0.5}, (24, 16)),
    "low rank, cur": (sm.LowRank, {"rank": 3, "method": "cur"}, (24, 16)),
    "chain, gradient": (sm.Chain, {"patterns": CHAIN, "method": "gradient"}, (48, 24)),
    "kronecker of three, two terms": (sm.Kronecker, {"shapes": [(2, 2), (3, 2), (4, 4)], "terms": 2}, (24, 16)),
    "sum": ([sm.Diagonal, (sm.LowRank, {"rank": 1})], {}, (16, 16)),
    "butterfly, weighted": (sm.Butterfly, {"radix": 2, "weight": np.diag(np.arange(1.0, 17.0))}, (16, 16)),
}


def matrix(shape, dtype=np.float64, seed=0):
    """Normal entries."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape)
    return (x + 1j * rng.standard_normal(shape) if np.dtype(dtype).kind == "c" else x).astype(dtype)


def samples(count, n=16):
    """Activations whose directions matter more and less."""
    return np.random.default_rng(4).standard_normal((count, n)) * 0.8 ** np.arange(n)


def same(found, expected, W):
    """Two certificates of one matrix agree, and so do the operators, which are in the library of the matrix."""
    tolerance = 1e-6 * np.linalg.norm(W)
    assert abs(found.error - expected.error) <= tolerance
    assert abs(found.lower_bound - expected.lower_bound) <= tolerance
    assert abs(found.relative_error - expected.relative_error) <= 1e-6
    assert found.params == expected.params
    assert found.ridge == expected.ridge
    assert not any(getattr(x, "is_conj", bool)() for x in found.operator.arrays)  # torch's memory is what it says
    there = found.operator.to("cpu") if found.operator.kind == "torch" else found.operator
    difference = np.asarray(expected.operator) - np.asarray(there.to("numpy"))
    assert np.abs(difference).max() <= 1e-5 * np.abs(W).max()
