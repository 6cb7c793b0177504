"""Butterfly and Walsh-Hadamard kernels of the Numba backend against the general plans, element by element."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import structmat as sm
from structmat.backends.base import ChainLayout, ChainPlan, KronPlan
from structmat.patterns import AxisOrder, Pattern

pytest.importorskip("numba")

from structmat.backends.numba.butterfly import ButterflyPlan, applies
from structmat.backends.numba.hadamard import HadamardPlan, scale_of

DTYPES = (np.float32, np.float64)
GUARD = 64  # numbers before and after a result that nobody may touch


def chain(n, dtype, bits=None, in_order=None, out_order=None, seed=0):
    """Layout and values of a butterfly whose levels are applied in the order ``bits``, ascending if not given."""
    rng = np.random.default_rng(seed)
    bits = range(n.bit_length() - 1) if bits is None else bits
    patterns = tuple(Pattern(n >> bit + 1, 2, 2, 1 << bit) for bit in bits)[::-1]
    blocks = [rng.standard_normal((p.a, p.d, 2, 2)).astype(dtype) for p in patterns]
    return ChainLayout(patterns, n, n, out_order, in_order), blocks


def guarded(shape, dtype):
    """A C-contiguous array inside a larger one of sentinels, at an address that is no multiple of a vector."""
    size = int(np.prod(shape))
    whole = np.full(size + 2 * GUARD + 1, -7.0, dtype)
    return whole, whole[GUARD + 1 : GUARD + 1 + size].reshape(shape)


def untouched(whole):
    """Whether the sentinels of :func:`guarded` are still there."""
    return bool((whole[: GUARD + 1] == -7).all() and (whole[-GUARD:] == -7).all())


def check(plan, reference, n, k, dtype, seed=0):
    """Both layouts of ``plan`` against the columns of ``reference`` in double precision."""
    x = np.random.default_rng(seed).standard_normal((n, k)).astype(dtype)
    expected = reference.columns(x.astype(np.float64))
    tolerance = 40 * np.finfo(dtype).eps * np.abs(expected).max()
    for rows in (False, True):
        operand = np.ascontiguousarray(x.T) if rows else x
        kept = operand.copy()
        whole, out = guarded(operand.shape, dtype)
        (plan.rows if rows else plan.columns)(operand, out)
        np.testing.assert_allclose(out.T if rows else out, expected, rtol=0, atol=tolerance)
        assert untouched(whole)
        np.testing.assert_array_equal(operand, kept)


def check_chain(layout, blocks, k):
    assert applies(layout, blocks)
    reference = ChainPlan(layout, [b.astype(np.float64) for b in blocks])
    check(ButterflyPlan(layout, blocks), reference, layout.cols, k, blocks[0].dtype.type)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [4, 8, 16, 32, 64, 128, 256, 512, 1024])
def test_every_size_batch_and_direction(n, dtype):
    for k in (1, 2, 3, 7, 8, 15, 16, 17, 33, 70):
        check_chain(*chain(n, dtype), k)
        check_chain(*chain(n, dtype, bits=range(n.bit_length() - 1)[::-1]), k)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(4096, 5), (8192, 17), (512, 1029), (16384, 33), (65536, 1)])
def test_large_operands_go_through_stages_and_tiles(n, k, dtype):
    check_chain(*chain(n, dtype), k)
    check_chain(*chain(n, dtype, bits=range(n.bit_length() - 1)[::-1]), k)


@pytest.mark.parametrize("dtype", DTYPES)
def test_levels_and_ends_in_any_order(dtype):
    rng = np.random.default_rng(1)
    for n in (8, 64, 512, 1024):
        count = n.bit_length() - 1
        reversal = AxisOrder((2,) * count, tuple(range(count))[::-1])
        mixed = AxisOrder((4, *(2,) * (count - 2)), tuple(int(i) for i in rng.permutation(count - 1)))
        for bits in (None, [int(b) for b in rng.permutation(count)]):
            for k in (1, 19, 70):
                check_chain(*chain(n, dtype, bits, reversal, None), k)
                check_chain(*chain(n, dtype, bits, None, mixed), k)
                check_chain(*chain(n, dtype, bits, mixed, reversal), k)
    check_chain(*chain(512, dtype, None, AxisOrder((2, 256), (1, 0)), AxisOrder((4, 128), (1, 0))), 1029)


def test_the_operators_of_the_package_are_served():
    A = sm.Butterfly.random((256, 256), radix=2, rng=0)
    for op in (A, A.T):
        assert isinstance(op, sm.Chain)
        layout = ChainLayout(tuple(op.patterns), op.shape[0], op.shape[1], op.out_order, op.in_order)
        blocks = list(op.arrays)
        assert applies(layout, blocks)
        x = np.random.default_rng(0).standard_normal((256, 5))
        out = np.empty_like(x)
        ButterflyPlan(layout, blocks).columns(x, out)
        np.testing.assert_allclose(out, op.to_dense() @ x, atol=1e-12)


def test_what_is_not_such_a_butterfly_is_refused():
    layout, blocks = chain(16, np.float64)
    assert not applies(layout._replace(rows=15), blocks)
    assert not applies(layout._replace(cols=13), blocks)
    assert not applies(layout, [b.astype(complex) for b in blocks])
    assert not applies(layout, [b.astype(np.float16) for b in blocks])
    assert not applies(layout, [blocks[0].astype(np.float32), *blocks[1:]])
    assert not applies(layout, [b[None] for b in blocks])
    assert not applies(layout._replace(patterns=layout.patterns[:-1]), blocks[:-1])
    assert not applies(layout._replace(patterns=(layout.patterns[0], *layout.patterns[:-1])), blocks)
    two, values = chain(2, np.float64)
    assert not applies(two, values)
    radix4 = sm.Butterfly.random((16, 16), radix=4, rng=0)
    assert not applies(ChainLayout(tuple(radix4.patterns), 16, 16), list(radix4.arrays))


@pytest.mark.parametrize("n", [16, 1024])
def test_weights_in_any_memory_layout(n):
    layout, blocks = chain(n, np.float32)
    strided = [np.asfortranarray(b) for b in blocks]
    x = np.random.default_rng(0).standard_normal((n, 20)).astype(np.float32)
    y, z = np.empty_like(x), np.empty_like(x)
    ButterflyPlan(layout, blocks).columns(x, y)
    ButterflyPlan(layout, strided).columns(x, z)
    np.testing.assert_array_equal(y, z)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize(("n", "k"), [(16, 50), (512, 50), (512, 1050), (8192, 50)])
def test_a_range_of_samples_writes_no_other(n, k, rows):
    layout, blocks = chain(n, np.float32)
    plan = ButterflyPlan(layout, blocks)
    x = np.random.default_rng(0).standard_normal((k, n) if rows else (n, k)).astype(np.float32)
    whole, part = np.empty_like(x), np.full_like(x, -7)
    apply = plan.rows if rows else plan.columns
    apply(x, whole)
    apply(x, part, 3, k - 5)
    view, other = (part, whole) if rows else (part.T, whole.T)
    np.testing.assert_allclose(view[3 : k - 5], other[3 : k - 5], rtol=0, atol=1e-5 * np.abs(whole).max())
    assert (view[:3] == -7).all()
    assert (view[k - 5 :] == -7).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("n", [16, 512])
def test_nan_and_infinity_go_where_they_go_in_the_chain(n, value):
    layout, blocks = chain(n, np.float64)
    for b in blocks:
        b[np.abs(b) < 0.2] = 0  # 0 * inf is nan
    for k, column in ((1, 0), (40, 3), (40, 39)):
        x = np.random.default_rng(0).standard_normal((n, k))
        x[5, column] = value
        with np.errstate(invalid="ignore"):
            expected = ChainPlan(layout, blocks).columns(x)
        for rows in (False, True):
            operand = np.ascontiguousarray(x.T) if rows else x
            out = np.empty_like(operand)
            plan = ButterflyPlan(layout, blocks)
            (plan.rows if rows else plan.columns)(operand, out)
            np.testing.assert_allclose(out.T if rows else out, expected, atol=1e-9)


def test_eight_threads_share_a_plan():
    layout, blocks = chain(1024, np.float32)
    plan = ButterflyPlan(layout, blocks)
    rng = np.random.default_rng(0)
    operands = [rng.standard_normal((1024, k)).astype(np.float32) for k in (1, 3, 16, 37) * 8]

    def work(x):
        out, rows = np.empty_like(x), np.empty_like(x.T, order="C")
        plan.columns(x, out)
        plan.rows(np.ascontiguousarray(x.T), rows)
        return out, rows

    expected = [work(x) for x in operands]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            for got, want in zip(pool.map(work, operands), expected, strict=True):
                np.testing.assert_array_equal(got[0], want[0])
                np.testing.assert_array_equal(got[1], want[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, -0.375])
@pytest.mark.parametrize("n", [4, 32, 128, 256, 512, 4096])
def test_hadamard_equals_the_kronecker_product(n, scale, dtype):
    H = np.array([[1.0, 1.0], [1.0, -1.0]])
    factors = [scale * H, *[H] * (n.bit_length() - 2)]
    for k in (1, 5, 16, 37):
        check(HadamardPlan(n, scale, dtype), KronPlan(factors), n, k, dtype)


def test_hadamard_on_integers_is_exact_and_staged_columns_too():
    x = np.random.default_rng(0).integers(-50, 50, (512, 1033)).astype(np.float32)
    out = np.empty_like(x)
    HadamardPlan(512, 1, np.float32).columns(x, out)
    np.testing.assert_array_equal(out, sm.hadamard(512).to_dense() @ x)
    with pytest.raises(ValueError, match="power of two"):
        HadamardPlan(12, 1, np.float32)


def test_the_scale_of_a_product_of_hadamard_matrices():
    H = np.array([[1.0, 1.0], [1.0, -1.0]])
    assert scale_of([H, H]) == (1.0,)
    assert scale_of([0.5 * H, -3 * H, H]) == (-1.5,)
    assert scale_of(list(sm.hadamard(16).arrays)) == (1.0,)
    assert scale_of([H]) is None
    assert scale_of([H, H.astype(np.float32)]) is None
    assert scale_of([H, H[:1]]) is None
    assert scale_of([H, np.eye(2)]) is None
    assert scale_of([H, np.nextafter(H, 2)]) is None
    assert scale_of([H, np.nan * H]) is None
    assert scale_of([H.astype(complex), H.astype(complex)]) is None
    assert scale_of([np.float32(1e30) * H.astype(np.float32)] * 2) is None


WIDTHS = {
    "32": ("haswell", "+avx,+avx2,+fma,+sse2"),
    "16": ("nehalem", "+sse2,+sse4.1"),
}

SCRIPT = """
import sys
sys.path.insert(0, "tests")
import numpy as np
import test_numba_butterfly as t
from structmat.backends.numba import radix, simd
for dtype in t.DTYPES if sys.argv[1] == "all" else t.DTYPES[:1]:
    for n, k in ((4, 3), (16, 9), (64, 21), (256, 5), (512, 37)):
        t.check_chain(*t.chain(n, dtype), k)
        if sys.argv[1] == "all":
            H = [np.array([[1.0, 1], [1, -1]])] * (n.bit_length() - 1)
            t.check(t.HadamardPlan(n, 1, dtype), t.KronPlan(H), n, k, dtype)
hits = sum(sum(f.stats.cache_hits.values()) for f in (radix.run_rows, radix.run_tiles))
misses = sum(sum(f.stats.cache_misses.values()) for f in (radix.run_rows, radix.run_tiles))
print(simd.VECTOR_BYTES, hits, misses)
"""


def in_another_process(width, cache, what):
    """Vector bytes, cache hits and misses of the script above, run for a target CPU."""
    env = {**os.environ, "NUMBA_CACHE_DIR": str(cache)}
    if width is not None:
        env |= {"NUMBA_CPU_NAME": width[0], "NUMBA_CPU_FEATURES": width[1]}
    done = subprocess.run([sys.executable, "-c", SCRIPT, what], capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()]


@pytest.mark.skipif(sys.platform == "win32" or os.uname().machine != "x86_64", reason="names of x86 targets")
@pytest.mark.parametrize("target", ["32", "16"])
def test_narrower_vectors(target, tmp_path):
    assert in_another_process(WIDTHS[target], tmp_path, "all")[0] == int(target)


def test_a_second_process_compiles_nothing(tmp_path):
    _, _, compiled = in_another_process(None, tmp_path, "one dtype")
    assert compiled > 0
    _, hits, misses = in_another_process(None, tmp_path, "one dtype")
    assert (hits, misses) == (compiled, 0)
