"""Progress of long projections: a bar where one is asked for, and an interruption that leaves nothing behind."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import scipy.sparse.linalg

import structmat as sm

W = np.random.default_rng(0).standard_normal((24, 24))
X = np.random.default_rng(1).standard_normal((80, 24)) + 0.3
C = X.T @ X / len(X)
BLAST = {"patterns": sm.blast_patterns((24, 24), 3, 4)}
LONG = {
    "sum": ([(sm.LowRank, {"rank": 2}), (sm.Monarch, {"rank": 1})], {}),
    "weighted sum": ([(sm.LowRank, {"rank": 2}), (sm.Monarch, {"rank": 1})], {"weight": C}),
    "blast": (sm.Chain, BLAST),
    "gradient": (sm.Chain, {**BLAST, "method": "gradient"}),
    "weighted monarch": (sm.Monarch, {"blocks": 4, "weight": C}),
    "weighted kronecker": (sm.Kronecker, {"terms": 2, "weight": C}),
    "weighted butterfly": (sm.Butterfly, {"weight": C}),
    "weighted blast": (sm.Chain, {**BLAST, "weight": C}),
    "refined butterfly": (sm.Butterfly, {"radix": 2, "refine": 3}),
    "kronecker of three": (sm.Kronecker, {"shapes": [(2, 2), (3, 3), (4, 4)]}),
    "sum of kronecker of three": (sm.Kronecker, {"shapes": [(2, 2), (3, 3), (4, 4)], "terms": 2}),
    "lanczos": (sm.Kronecker, {"shapes": [(4, 4), (6, 6)], "method": "lanczos", "terms": 1}),
    "randomised": (sm.LowRank, {"rank": 2, "method": "randomized"}),
    "randomised to a tolerance": (sm.LowRank, {"tol": 0.5, "method": "randomized"}),
}


@pytest.fixture
def bars(monkeypatch):
    """Every bar that is made, with what it was told; a ``limit`` of steps after which it interrupts."""
    tqdm = pytest.importorskip("tqdm")
    made = []

    class Recorder:
        limit = None

        def __init__(self, total, **options):
            self.total, self.n, self.closed = total, 0, False
            made.append(self)

        def update(self, done):
            self.n += done
            if self.limit is not None and self.n >= self.limit:
                raise KeyboardInterrupt

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.closed = True

    monkeypatch.setattr(tqdm, "tqdm", Recorder)
    return made, Recorder


@pytest.mark.parametrize("name", LONG)
def test_iterations_move_a_bar(name, bars):
    made, _ = bars
    family, options = LONG[name]
    with_bar = sm.project(W, family, progress=True, **options)
    assert len(made) == 1
    assert made[0].n == made[0].total > 1
    assert made[0].closed
    silent = sm.project(W, family, **options)
    assert len(made) == 1
    assert np.array_equal(np.asarray(with_bar.operator), np.asarray(silent.operator))


@pytest.mark.parametrize("name", LONG)
def test_an_interrupted_projection_leaves_nothing_behind(name, bars):
    made, recorder = bars
    family, options = LONG[name]
    kept, weight = W.copy(), C.copy()
    expected = np.asarray(sm.project(W, family, **options).operator)
    recorder.limit = 2
    with pytest.raises(KeyboardInterrupt):
        sm.project(W, family, progress=True, **options)
    assert made[0].closed
    assert np.array_equal(W, kept)
    assert np.array_equal(C, weight)
    assert W.flags.writeable
    assert np.array_equal(np.asarray(sm.project(W, family, **options).operator), expected)


def test_products_of_an_operator_move_a_bar(bars):
    made, recorder = bars
    A = scipy.sparse.linalg.aslinearoperator(W)
    p = sm.project(A, sm.LowRank, rank=2, method="randomized", progress=True)
    assert "without a dense matrix" in p.method
    assert len(made) == 1
    assert made[0].n == made[0].total > 1
    recorder.limit = 2
    with pytest.raises(KeyboardInterrupt):
        sm.project(A, sm.LowRank, rank=2, method="randomized", progress=True)
    assert made[1].closed


def test_a_missing_tqdm_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ImportError, match=r"project: progress=True needs tqdm"):
        sm.project(W, sm.LowRank, rank=2, progress=True)
