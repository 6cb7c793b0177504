"""Kronecker programs of the Numba backend against ``np.kron``, for every vector width, layout and edge."""

import os
import subprocess
import sys
from functools import reduce

import numpy as np
import pytest

pytest.importorskip("numba")

from structmat.backends.numba import kron
from structmat.backends.numba.program import Program, run

SHAPES = [
    [(3, 5)],
    [(1, 1)],
    [(1, 1), (4, 3)],
    [(4, 3), (1, 1)],
    [(2, 2)] * 7,
    [(4, 4)] * 3,
    [(8, 8)] * 2,
    [(10, 10), (12, 12), (7, 7)],
    [(6, 4), (4, 6), (16, 8)],
    [(3, 40), (40, 3)],
    [(40, 3), (3, 40)],
    [(1, 7), (9, 1), (5, 5)],
    [(32, 32), (16, 16)],
    [(70, 3), (2, 90)],
    [(129, 2), (2, 33)],
]
WIDTHS = {
    "256": {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx,+avx2,+fma,+sse2"},
    "128": {"NUMBA_CPU_NAME": "nehalem", "NUMBA_CPU_FEATURES": "+sse2,+sse4.1"},
}
BAND = 64  # elements around the result that must stay as they are
FORMS = ("row", "rows", "transposed", "best rows", "flat", "columns", "best columns", "tiled columns")


def factors_of(shapes, dtype, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def program_of(form, factors, k):
    made = {
        "row": lambda: kron.row_program(factors),
        "rows": lambda: kron.row_program(factors, 3),
        "transposed": lambda: kron.transposed_program(factors, 16),
        "best rows": lambda: kron.best_rows(factors, k),
        "flat": lambda: kron.flat_program(factors, k),
        "columns": lambda: kron.column_program(factors, 32),
        "best columns": lambda: kron.best_columns(factors, k),
        "tiled columns": lambda: kron.best_columns(factors, k, flat=False),
    }[form]()
    assert isinstance(made, Program)
    return made


def execute(program, form, x, y, add=False):
    """Run a program on ``x (n, k)`` or rows ``(k, n)`` with a workspace full of NaN."""
    space = np.full(program.workspace + 16, np.nan, x.dtype)
    if "row" in form or form == "transposed":
        k, scales = x.shape[0], (1, 1, x.shape[1], y.shape[1])
    elif program.columns:
        k, scales = x.shape[1], (x.shape[1], y.shape[1], 1, 1)
    else:
        k, scales = 1, (1, 1, x.size, y.size)
    run(program.table, x.reshape(-1), y.reshape(-1), space, 0, k, program.width, *scales, add)


def check(shapes, dtype, k, form):
    factors = factors_of(shapes, dtype)
    dense = reduce(np.kron, factors)
    x = np.random.default_rng(k).standard_normal((dense.shape[1], k)).astype(dtype)
    expected = dense @ x
    by_rows = "row" in form or form == "transposed"
    if by_rows:
        x, expected = np.ascontiguousarray(x.T), np.ascontiguousarray(expected.T)
    store = np.full(expected.size + 2 * BAND, 7, dtype)
    y = store[BAND:-BAND].reshape(expected.shape)
    y[...] = np.nan
    program = program_of(form, factors, k)
    kept = [f.copy() for f in factors], x.copy()
    scale = float(np.abs(expected).max())
    for add in (False, True):
        execute(program, form, x, y, add)
        np.testing.assert_allclose(y, (1 + add) * expected, rtol=0, atol=100 * np.finfo(dtype).eps * scale)
    assert (np.concatenate([store[:BAND], store[-BAND:]]) == 7).all()
    assert all((f == g).all() for f, g in zip([*factors, x], [*kept[0], kept[1]], strict=True))


def check_all():
    """Everything, for the vector width of this process."""
    for dtype in (np.float32, np.float64):
        for shapes in SHAPES:
            for k in (1, 5, 35):
                for form in FORMS:
                    check(shapes, dtype, k, form)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_programs_agree_with_kron(shapes, dtype):
    for k in (1, 5, 16, 35):
        for form in FORMS:
            check(shapes, dtype, k, form)


@pytest.mark.parametrize("width", WIDTHS)
def test_narrower_vectors(width):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_numba_kron as t; "
        "from structmat.backends.numba.simd import VECTOR_BYTES; t.check_all(); print(8 * VECTOR_BYTES)"
    )
    command = [sys.executable, "-c", code, os.path.dirname(__file__)]
    done = subprocess.run(command, env={**os.environ, **WIDTHS[width]}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-1] == width


@pytest.mark.parametrize("form", FORMS)
def test_large_intermediates_block_by_block(form, monkeypatch):
    monkeypatch.setattr(kron, "BLOCK_BYTES", 256)
    for shapes in ([(10, 10), (12, 12), (7, 7)], [(3, 2), (4, 4), (5, 6), (2, 3)], [(8, 8)] * 3):
        check(shapes, np.float32, 19, form)


def test_batches_beyond_one_tile():
    for form in FORMS:
        check([(5, 6), (7, 4)], np.float32, 1100, form)


def test_strided_and_misaligned_factors():
    rng = np.random.default_rng(3)
    raw = np.zeros(4 * 12 + 1, np.uint8)
    misaligned = raw[1:].view(np.float32).reshape(3, 4)
    misaligned[...] = rng.standard_normal((3, 4))
    for factors in (
        [rng.standard_normal((10, 8)).astype("f4")[::2, ::2], rng.standard_normal((6, 5)).astype("f4").T],
        [misaligned, misaligned.copy()],
        [rng.standard_normal((4, 3)).astype("f4")[::-1], rng.standard_normal((3, 4)).astype("f4")[:, ::-1]],
    ):
        dense = reduce(np.kron, factors)
        x = rng.standard_normal((5, dense.shape[1])).astype("f4")
        for form in ("row", "rows", "transposed"):
            y = np.full((5, dense.shape[0]), np.nan, "f4")
            execute(program_of(form, factors, 5), form, x, y)
            np.testing.assert_allclose(y, x @ dense.T, rtol=0, atol=1e-5 * np.abs(dense).max() * dense.shape[1])


def test_nan_and_infinity_stay_in_their_sample():
    factors = factors_of([(8, 8), (4, 4), (3, 3)], np.float32)
    x = np.random.default_rng(0).standard_normal((20, 96)).astype("f4")
    x[4, 7], x[9, 95] = np.nan, np.inf
    for form in ("row", "rows", "transposed", "best rows"):
        y = np.empty((20, 96), "f4")
        execute(program_of(form, factors, 20), form, x, y)
        bad = np.logical_not(np.isfinite(y).all(axis=1))
        assert np.flatnonzero(bad).tolist() == [4, 9]


def test_small_factors_are_merged():
    for shapes, k in (([(2, 2)] * 12, 1), ([(4, 4)] * 6, 1), ([(2, 2)] * 12, 64)):
        merged, steps = kron.plan(factors_of(shapes, np.float32), k, 16)
        assert len(steps) == len(merged) < len(shapes)
    merged, _ = kron.plan(factors_of([(64, 64), (64, 64)], np.float32), 1, 16)
    assert len(merged) == 2


def test_order_of_least_work():
    shapes = [(2, 64), (64, 2)]  # from the right: 64 (2 64) + 64 (64 2), from the left: 2 (2 64) + 2 (64 2)
    _, steps = kron.plan(factors_of(shapes, np.float32), 64, 16)
    assert [step.factor for step in steps] == [0, 1]
