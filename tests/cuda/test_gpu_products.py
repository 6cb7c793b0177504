"""Schedules of the GPU backends, byte by byte: random shapes and strides through an emulation of cuBLAS on raw pointers."""

from __future__ import annotations

import math

import emulated
import fakecublas
import hypothesis.strategies as st
import numpy as np
import pytest
from chains import layouts
from hypothesis import given, settings

import structmat as sm
from structmat.backends import base
from structmat.backends.cuda import products, schedule
from structmat.backends.cuda.products import Box, Digit, Gemm, Matrix, boxes, contraction, fused, gemm, orientation
from structmat.backends.cuda.schedule import Sizes, Strided, chain_schedule, kron_schedule, packed

DTYPES = ("float32", "float64", "complex64", "complex128")


def entries(rng, shape, dtype):
    x = rng.standard_normal(shape)
    return (x + 1j * rng.standard_normal(shape) if np.dtype(dtype).kind == "c" else x).astype(dtype)


def tolerance(dtype):
    return 2e-4 if np.finfo(dtype).bits == 32 or np.dtype(dtype) == np.complex64 else 1e-10


# ---- one product ------------------------------------------------------------------------------------------------------


def one_product(rng, dtype="float64"):
    """A random product of three strided batches; whether it took no copy."""
    m, n, k, g = (int(v) for v in rng.integers(1, 7, 4))
    memory = emulated.Memory()

    def strides(rows, cols, may_repeat):
        order = rng.permutation(2)
        lengths = (rows, cols)
        unit = 1 if rng.random() < 0.9 else 2
        inner = [0, 0]
        inner[order[0]] = unit
        inner[order[1]] = unit * lengths[order[0]] + int(rng.integers(0, 3))
        batch = (
            0 if may_repeat and rng.random() < 0.3 else inner[order[1]] * lengths[order[1]] + int(rng.integers(0, 3))
        )
        for axis, length in enumerate(lengths):
            if length == 1 and rng.random() < 0.5:
                inner[axis] = 0  # as after a broadcast
        return batch, *inner

    placed, made = [], []
    for rows, cols, may_repeat in ((m, k, True), (k, n, True), (m, n, False)):
        s = strides(rows, cols, may_repeat)
        values = None if not may_repeat else entries(rng, (g if s[0] else 1, rows, cols), dtype)
        placed.append(memory.place((g, rows, cols), s, dtype, values))
        made.append(s)
    (a, b, c), (sa, sb, sc) = placed, made
    call = gemm(Matrix(m, k, *sa[1:]), Matrix(k, n, *sb[1:]), Matrix(m, n, *sc[1:]), g, (sa[0], sb[0], sc[0]))
    if call is None:
        units = [min(s for s, size in zip(s3[1:], x.shape[1:], strict=True) if size > 1) if max(x.shape[1:]) > 1 else 1
                 for s3, x in zip(made, placed, strict=True)]  # fmt: skip
        assert max(units) > 1, "refused although every matrix has a unit stride"
        return False
    emulated.multiply([call], dtype, *(x.__array_interface__["data"][0] for x in (a, b, c)))
    np.testing.assert_allclose(c, a @ b, rtol=tolerance(dtype), atol=tolerance(dtype))
    memory.check()
    return True


def many_products(count=1200, seed=0):
    rng = np.random.default_rng(seed)
    done = [one_product(rng, DTYPES[i % 4]) for i in range(count)]
    assert sum(done) > count * 0.6
    return sum(done)


def test_a_thousand_random_products():
    many_products()


def test_products_that_need_a_copy():
    assert orientation(Matrix(3, 4, 2, 8)) is None
    assert orientation(Matrix(3, 4, 1, 2)) is None, "columns overlap"
    assert orientation(Matrix(3, 4, 1, 1 << 31)) is None, "the leading dimension has 32 bits"
    assert orientation(Matrix(1, 4, 0, 5)) == (0, 5)
    assert orientation(Matrix(4, 1, 5, 0)) == (1, 5)
    assert orientation(Matrix(1, 1, 0, 0)) == (0, 1)
    with pytest.raises(ValueError, match="does not make"):
        gemm(Matrix(2, 3, 3, 1), Matrix(4, 4, 4, 1), Matrix(2, 4, 4, 1))


def test_the_table_of_monarch_forward_and_backward():
    """The six products of two factors of rank R, forward and backward, none with a copy (reference: einsum)."""
    rng = np.random.default_rng(0)
    for _ in range(60):
        B, K, R, P, Q, S = (int(v) for v in rng.integers(1, 7, 6))
        ldx, ldy, ldt = K * P + int(rng.integers(0, 3)), Q * S + int(rng.integers(0, 3)), -(-B // 8) * 8
        dtype = DTYPES[int(rng.integers(4))]
        memory = emulated.Memory()
        x = memory.place((B, K, P), (ldx, P, 1), dtype, entries(rng, (B, K, P), dtype))
        g = memory.place((B, Q, S), (ldy, S, 1), dtype, entries(rng, (B, Q, S), dtype))
        w1 = memory.place((K, R, Q, P), (R * Q * P, Q * P, P, 1), dtype, entries(rng, (K, R, Q, P), dtype))
        w2 = memory.place((Q, S, K, R), (S * K * R, K * R, R, 1), dtype, entries(rng, (Q, S, K, R), dtype))
        t, u = (memory.place((K, R, Q, B), (R * Q * ldt, Q * ldt, ldt, 1), dtype) for _ in range(2))
        y, dx = memory.place((B, Q, S), (ldy, S, 1), dtype), memory.place((B, K, P), (ldx, P, 1), dtype)
        d1 = memory.place((K, R * Q, P), (R * Q * P, P, 1), dtype)
        d2 = memory.place((Q, S, K * R), (S * K * R, K * R, 1), dtype)
        inner, outer = (K, (R * Q * P, P, R * Q * ldt)), (Q, (S * K * R, ldt, S))
        table = [
            (w1, x, t, Matrix(R * Q, P, P, 1), Matrix(P, B, 1, ldx), Matrix(R * Q, B, ldt, 1), *inner),
            (w2, t, y, Matrix(S, K * R, K * R, 1), Matrix(K * R, B, Q * ldt, 1), Matrix(S, B, 1, ldy), *outer),
            (w2, g, u, Matrix(K * R, S, 1, K * R), Matrix(S, B, 1, ldy), Matrix(K * R, B, Q * ldt, 1), Q,
             (S * K * R, S, ldt)),
            (w1, u, dx, Matrix(P, R * Q, 1, P), Matrix(R * Q, B, ldt, 1), Matrix(P, B, 1, ldx), K,
             (R * Q * P, R * Q * ldt, P)),
            (g, t, d2, Matrix(S, B, 1, ldy), Matrix(B, K * R, 1, Q * ldt), Matrix(S, K * R, K * R, 1), Q,
             (S, ldt, S * K * R)),
            (u, x, d1, Matrix(R * Q, B, ldt, 1), Matrix(B, P, ldx, 1), Matrix(R * Q, P, P, 1), K,
             (R * Q * ldt, P, R * Q * P)),
        ]  # fmt: skip
        for left, right, out, *matrices, count, strides in table:
            call = gemm(*matrices, count, strides)
            assert call is not None
            emulated.multiply([call], dtype, *(v.__array_interface__["data"][0] for v in (left, right, out)))
        full = np.einsum("qskr,krqp->qskp", w2, w1)
        tol = 50 * tolerance(dtype)
        np.testing.assert_allclose(y, np.einsum("qskp,bkp->bqs", full, x), rtol=tol, atol=tol)
        np.testing.assert_allclose(dx, np.einsum("qskp,bqs->bkp", full, g), rtol=tol, atol=tol)
        np.testing.assert_allclose(d2.reshape(w2.shape), np.einsum("bqs,krqp,bkp->qskr", g, w1, x), rtol=tol, atol=tol)
        np.testing.assert_allclose(d1.reshape(w1.shape), np.einsum("bqs,qskr,bkp->krqp", g, w2, x), rtol=tol, atol=tol)
        memory.check()


# ---- digits and boxes -------------------------------------------------------------------------------------------------


@given(st.integers(0, 40), st.integers(1, 4), st.permutations(range(3)), st.tuples(*[st.integers(1, 4)] * 2))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_boxes_are_what_lies_below_the_stop(stop, depth, order, sizes):
    lengths, steps = (depth, *sizes), [0, 0, 0]
    step = 1
    for axis in order:
        steps[axis] = step
        step *= lengths[axis]
    digits = [(sizes[0], steps[1]), (sizes[1], steps[2])]
    seen = np.zeros(sizes, int)
    for box in boxes(stop, depth, steps[0], digits):
        for i in np.ndindex(*box.sizes):
            values = tuple(a + b for a, b in zip(i, box.starts, strict=True))
            seen[values] += 1
            offset = values[0] * steps[1] + values[1] * steps[2]
            assert box.depth == sum(offset + k * steps[0] < stop for k in range(depth))
    assert (seen == 1).all()
    if stop >= step:
        assert boxes(stop, depth, steps[0], digits) == (Box((0, 0), sizes, depth),)


def test_digits_that_follow_each_other_are_one():
    assert fused([Digit(3, 0, 20, 40), Digit(5, 0, 4, 8)]) == [Digit(15, 0, 4, 8)]
    assert len(fused([Digit(3, 0, 20, 41), Digit(5, 0, 4, 8)])) == 2
    assert len(fused([Digit(3, 1, 20, 40), Digit(5, 0, 4, 8)])) == 2


def test_a_long_batch_is_several_calls():
    digits = [Digit(100_000, 0, 6, 8), Digit(2, 0, 1, 1)]
    calls = contraction(Matrix(4, 3, 3, 1), 2, 2, digits)
    assert [c.batch for c in calls] == [65_535, 34_465]
    assert calls[1].right_offset == 65_535 * 6
    assert calls[1].out_offset == 65_535 * 8


# ---- chains -----------------------------------------------------------------------------------------------------------


def one_chain(layout, rng, rows, k, dtype="float64"):
    """A chain on a random operand with strides of its own; the schedule."""
    memory = emulated.Memory()
    blocks = [entries(rng, (p.a, p.d, p.b, p.c), dtype) for p in layout.patterns]
    if rng.random() < 0.3:  # as in a transposed operator
        blocks = [np.ascontiguousarray(b.swapaxes(-1, -2)).swapaxes(-1, -2) for b in blocks]
    held = [memory.place(b.shape, [s // b.itemsize for s in b.strides], dtype, b) for b in blocks]
    n, pad = layout.cols, int(rng.integers(0, 3))
    place = Strided(1, n + pad) if rows else Strided(k + pad, 1)
    x = memory.place((n, k), (place.row, place.col), dtype, entries(rng, (n, k), dtype))
    weights = [emulated.weights_of(b) for b in held]
    made = chain_schedule(layout, weights, Sizes((), n, layout.rows, k), place, rows)
    source = x
    if "operand" in made.copies:
        source = memory.place((n, k), (k, 1), dtype, np.asarray(x))
    if "digits" in made.copies:
        p = layout.patterns[-1]
        moved = np.asarray(x).T.reshape(k, p.a, p.c, p.d).swapaxes(2, 3).reshape(k, n)
        source = memory.place((n, k), (1, n), dtype, moved.T)
    if "order" in made.copies:
        natural = base.reorder(base.pad(np.asarray(x), layout.patterns[-1].cols), layout.in_order)
        source = memory.place(natural.shape, (k, 1), dtype, natural)
    result = emulated.result_array(memory, made.result, made.rows, k, dtype)
    emulated.run(made, memory, held, source, result)
    y = base.reorder(np.asarray(result), layout.out_order) if "result" in made.copies else result
    expected = base.ChainPlan(layout, blocks).columns(x)
    tol = 20 * tolerance(dtype) * max(1.0, float(np.abs(expected).max(initial=0)))
    np.testing.assert_allclose(y[: layout.rows], expected, rtol=tol, atol=tol)
    memory.check()
    return made


@given(layouts(), st.booleans(), st.sampled_from([1, 3, 8, 11]), st.integers(0, 1 << 30))
@settings(max_examples=500, deadline=None, derandomize=True)
def test_chains_with_orders_padding_and_strides(layout, rows, k, seed):
    rng = np.random.default_rng(seed)
    made = one_chain(layout, rng, rows, k, DTYPES[seed % 4])
    if not rows and layout.in_order is None and layout.out_order is None:
        assert made.copies == (), "columns need no copy"


FAMILIES = {
    "monarch": lambda: sm.Monarch.random((12, 20), blocks=(3, 4), rank=2, rng=0),
    "monarch padded": lambda: sm.Monarch.random((13, 19), blocks=(3, 4), rng=0),
    "btt": lambda: sm.BlockTensorTrain.random((12, 20), blocks=(3, 4), rank=2, rng=0),
    "btt padded": lambda: sm.BlockTensorTrain.random((11, 17), blocks=3, rng=0),
    "btt of three": lambda: sm.BlockTensorTrain.random((12, 30), cores=3, rank=2, rng=0),
    "low rank": lambda: sm.LowRank.random((9, 14), rank=3, rng=0),
    "block diagonal": lambda: sm.BlockDiagonal.random((13, 10), blocks=3, rng=0),
    "block diagonal cut": lambda: sm.BlockDiagonal(np.random.default_rng(0).standard_normal((4, 3, 2)), (12, 3)),
    "butterfly": lambda: sm.Butterfly.random((16, 16), radix=2, rng=0),
    "butterfly of two": lambda: sm.Butterfly.random((16, 16), radix=4, rng=0),
}
COPIES = {  # copies in rows, forward and transposed; columns never need one
    "monarch": (0, 1), "monarch padded": (0, 1), "btt": (0, 0), "btt padded": (0, 0), "btt of three": (0, 0),
    "low rank": (0, 0), "block diagonal": (0, 0), "block diagonal cut": (0, 0), "butterfly": (0, 1), "butterfly of two": (0, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_copies_of_every_family_are_as_documented(name):
    rng = np.random.default_rng(0)
    a = FAMILIES[name]()
    found = []
    for operator in (a, a.T):
        layout = base.ChainLayout(operator.patterns, *operator.shape, operator.out_order, operator.in_order)
        assert one_chain(layout, rng, False, 10).copies == ()
        found.append(len(one_chain(layout, rng, True, 10).copies))
    assert tuple(found) == COPIES[name]


def test_calls_of_the_common_families():
    a = FAMILIES["monarch"]()
    layout = base.ChainLayout(a.patterns, *a.shape, a.out_order, a.in_order)
    weights = [emulated.weights_of(np.asarray(f)) for f in a.factors]
    made = chain_schedule(layout, weights, Sizes((), 20, 12, 64), Strided(1, 20), True)
    assert [len(step.calls) for step in made.steps] == [1, 1]
    first, second = (step.calls[0] for step in made.steps)
    assert isinstance(first, Gemm)
    assert (first.batch, second.batch) == (4, 3)
    assert made.result == Strided(64, 1), "the paper's order: written with the samples last"


# ---- Kronecker products -----------------------------------------------------------------------------------------------


def one_kron(rng, dtype="float64"):
    count = int(rng.integers(1, 4))
    shapes = [tuple(int(v) for v in rng.integers(1, 5, 2)) for _ in range(count)]
    k, rows, pad = int(rng.integers(1, 9)), bool(rng.integers(2)), int(rng.integers(0, 3))
    memory = emulated.Memory()
    factors = [entries(rng, s, dtype) for s in shapes]
    held = [memory.place(f.shape, (f.shape[1], 1), dtype, f) for f in factors]
    n, m = (math.prod(s[axis] for s in shapes) for axis in (1, 0))
    place = Strided(1, n + pad) if rows else Strided(k + pad, 1)
    x = memory.place((n, k), (place.row, place.col), dtype, entries(rng, (n, k), dtype))
    weights = [schedule.Weights(0, 0, f.shape[1], 1) for f in factors]
    order = base.cheapest_order(shapes)
    made = kron_schedule(shapes, order, weights, Sizes((), n, m, k), place, bool(rng.integers(2)))
    source = x
    if "operand" in made.copies:
        source = memory.place((n, k), (k, 1), dtype, np.asarray(x))
    result = emulated.result_array(memory, made.result, m, k, dtype)
    emulated.run(made, memory, held, source, result)
    expected = base.KronPlan(factors).columns(np.asarray(x))
    tol = 20 * tolerance(dtype) * max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(result, expected, rtol=tol, atol=tol)
    memory.check()
    return made, place


def test_kronecker_products():
    rng = np.random.default_rng(0)
    for i in range(300):
        one_kron(rng, DTYPES[i % 4])


def test_a_kronecker_product_in_rows_takes_one_plain_and_one_batched_product():
    weights = [schedule.Weights(0, 0, 64, 1)] * 2
    made = kron_schedule([(64, 64)] * 2, (1, 0), weights, Sizes((), 4096, 4096, 100), Strided(1, 4096), True)
    (plain,), (batched,) = (step.calls for step in made.steps)
    assert (plain.m, plain.n, plain.k, plain.batch) == (64, 6400, 64, 1)
    assert (batched.batch, batched.second_stride) == (100, 0), "the left factor is the same for all samples"
    assert made.copies == ()
    assert made.result == packed((), 4096, 100, by_rows=True)


# ---- planted bugs -----------------------------------------------------------------------------------------------------


def all_checks():
    """What the tests above do, in short; an error of any of these kinds is a bug found."""
    many_products(200)
    rng = np.random.default_rng(1)
    for name in FAMILIES:
        a = FAMILIES[name]()
        for operator in (a, a.T):
            layout = base.ChainLayout(operator.patterns, *operator.shape, operator.out_order, operator.in_order)
            for rows in (False, True):
                one_chain(layout, rng, rows, 10)
    for _ in range(60):
        one_kron(rng)


def _swapped_flags(call):
    return call and call._replace(first_flag=call.second_flag, second_flag=call.first_flag)


def _plant(monkeypatch, name):
    """Replace a function by one with an error."""
    original = {n: getattr(products, n) for n in ("orientation", "gemm", "fused", "boxes")}
    if name == "ignored leading dimension":
        wrong = lambda m: (f := original["orientation"](m)) and (f[0], (m.rows, m.cols)[f[0]])  # noqa: E731
        monkeypatch.setattr(products, "orientation", wrong)
    elif name == "stride of an axis of length one trusted":

        def wrong(matrix):
            rows, cols, row, col = matrix
            return (0, col) if row == 1 and col >= rows else (1, row) if col == 1 and row >= cols else None

        monkeypatch.setattr(products, "orientation", wrong)
    elif name == "swapped flags":
        monkeypatch.setattr(products, "gemm", lambda *a: _swapped_flags(original["gemm"](*a)))
        monkeypatch.setitem(globals(), "gemm", products.gemm)
    elif name == "wrong batch stride":

        def wrong(*a):
            call = original["gemm"](*a)
            return call and call._replace(second_stride=call.first_stride)

        monkeypatch.setattr(products, "gemm", wrong)
        monkeypatch.setitem(globals(), "gemm", wrong)
    elif name == "operands not exchanged":
        monkeypatch.setattr(products, "gemm", lambda *a: (c := original["gemm"](*a)) and c._replace(swap=False))
        monkeypatch.setitem(globals(), "gemm", products.gemm)
    elif name == "digits joined whatever the result's stride":

        def wrong(digits):
            return original["fused"]([d._replace(target=d.source) for d in digits])

        monkeypatch.setattr(products, "fused", wrong)
    elif name == "padding read":

        def wrong(stop, depth, step, digits):
            return tuple(b._replace(depth=depth) for b in original["boxes"](stop, depth, step, digits))

        monkeypatch.setattr(schedule, "boxes", wrong)
    elif name == "what nobody writes is not cleared":

        def wrong(*a):
            return tuple(b for b in original["boxes"](*a) if b.depth)

        monkeypatch.setattr(schedule, "boxes", wrong)
    elif name == "weights of all blocks the same":
        spread = schedule._spread
        monkeypatch.setattr(schedule, "_spread", lambda digits, stride: spread(digits, 0))
    elif name == "area of an intermediate too small":
        scratch = schedule._scratch
        monkeypatch.setattr(schedule, "_scratch", lambda *a: tuple(s - 1 for s in scratch(*a)))  # fmt: skip


BUGS = (
    "ignored leading dimension", "stride of an axis of length one trusted", "swapped flags", "wrong batch stride",
    "operands not exchanged", "digits joined whatever the result's stride", "padding read",
    "what nobody writes is not cleared", "weights of all blocks the same", "area of an intermediate too small",
)  # fmt: skip


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_found(bug, monkeypatch):
    all_checks()
    _plant(monkeypatch, bug)
    with pytest.raises((AssertionError, fakecublas.CUBLASError, MemoryError)):
        all_checks()
