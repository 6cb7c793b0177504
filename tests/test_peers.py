"""Other libraries as oracles: PyLops, linear_operator, lazylinop and SciPy judge our operators by their own suites.

A peer that is not installed skips its part by name. Peers warn when they are imported; each of these warnings is
allowed by name, everything else stays an error.
"""

from __future__ import annotations

import itertools
import math
import os
import unittest
import warnings
from functools import cache

import numpy as np
import pytest
from market import Pair, entries, market
from oracles import assert_close, at_random, batched

import structmat as sm
from structmat.patterns import Pattern

pytestmark = pytest.mark.peers
os.environ["CUPY_PYLOPS"] = "0"  # PyLops imports CuPy where it is installed, and fails where CUDA is not


# ---- PyLops: the adjoint identity on random complex vectors ----------------------------------------------------------


@pytest.fixture(scope="module")
def dottest():
    return pytest.importorskip("pylops.utils").dottest


def matrices() -> list[Pair]:
    """The market without its batched operators."""
    return [p for p in market() if p.dense.ndim == 2]


def run_dottest(dottest, operator) -> None:
    np.random.seed(7)  # noqa: NPY002 (PyLops draws from the global generator)
    single = np.finfo(operator.dtype).eps > 1e-10
    rtol, atol = (1e-4, 1e-4) if single else (1e-10, 1e-11)
    dottest(operator, rtol=rtol, atol=atol, complexflag=3 if operator.dtype.kind == "c" else 0)


@pytest.mark.parametrize("pair", matrices(), ids=repr)
def test_pylops_dottest(dottest, pair: Pair):
    run_dottest(dottest, pair.operator)
    run_dottest(dottest, pair.operator.T)


def expressions(dtype) -> dict[str, sm.Operator]:
    """Results of the algebra over several families."""
    monarch = sm.Monarch.random((12, 10), blocks=(3, 2), rank=2, dtype=dtype, rng=1)
    train = sm.BlockTensorTrain.random((10, 12), blocks=2, rank=2, dtype=dtype, rng=2)
    butterfly = sm.Butterfly.random((12, 12), dtype=dtype, rng=3)
    kronecker = sm.Kronecker.random((12, 10), dtype=dtype, rng=4)
    low = sm.LowRank.random((12, 10), rank=2, dtype=dtype, rng=5)
    sparse = sm.BlockSparse.random((12, 12), block=3, dtype=dtype, rng=6)
    permutation = sm.Permutation.random(12, dtype=dtype, rng=7)
    scalar = 2 - 3j if np.dtype(dtype).kind == "c" else -3
    return {
        "sum": monarch + kronecker + low,
        "difference": scalar * monarch - kronecker,
        "product": monarch @ train @ butterfly,
        "power": butterfly**3,
        "kron": sm.kron(monarch, train, sm.Diagonal.random(2, dtype=dtype, rng=8)),
        "hstack": sm.hstack([monarch, sparse, permutation]),
        "vstack": sm.vstack([train, butterfly, sm.Zero((1, 12), dtype)]),
        "block_diag": sm.block_diag(monarch, low, permutation),
        "permuted": permutation @ butterfly @ permutation.T,
        "scaled": scalar * (sparse + butterfly),
        "submatrix": (monarch @ train)[np.ix_([3, 1, 1], [0, 5, 7, 7])],
        "adjoint of a product": (sparse @ permutation @ monarch).H,
        "nested": scalar * sm.hstack([monarch + low, kronecker]) @ sm.vstack([train, train]),
    }


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64", "complex128"])
@pytest.mark.parametrize("name", expressions(float))
def test_pylops_dottest_of_expressions(dottest, name, dtype):
    operator = expressions(dtype)[name]
    for a in (operator, operator.T, operator.conj(), operator.H):
        run_dottest(dottest, a)


def test_pylops_dottest_sees_a_missing_conjugate(dottest):
    """The oracle itself: an adjoint without its conjugate must not pass."""

    class Unconjugated(sm.Dense):
        __slots__ = ()

        def rmatvec(self, x):
            return self.T.matvec(x)

    with pytest.raises(AssertionError, match="Dot test failed"):
        run_dottest(dottest, Unconjugated(entries((6, 5), complex, 1)))


# ---- linear_operator: its rectangular suite, gradients included ------------------------------------------------------

RECTANGULAR_TESTS = 22


def allow_torch_warnings(test):
    """Warnings of torch about linear_operator's use of it."""
    for warning in (
        "ignore:`torch.jit.script` is deprecated:DeprecationWarning",
        "ignore:Sparse invariant checks are implicitly disabled:UserWarning",
    ):
        test = pytest.mark.filterwarnings(warning)(test)
    return test


def monarch_dense(left, right):
    torch = pytest.importorskip("torch")
    (l, s, kr), (k, _, p) = left.shape[-3:], right.shape[-3:]
    r = kr // k
    left, right = left.reshape(*left.shape[:-1], k, r), right.reshape(*right.shape[:-2], r, l, p)
    return torch.einsum("...jikr,...krjt->...ijkt", left, right).reshape(*left.shape[:-4], s * l, k * p)


def train_dense(left, right):
    torch = pytest.importorskip("torch")
    (f, e, gr), (g, _, a) = left.shape[-3:], right.shape[-3:]
    r = gr // g
    left, right = left.reshape(*left.shape[:-1], g, r), right.reshape(*right.shape[:-2], r, f, a)
    return torch.einsum("...fegr,...grfa->...fega", left, right).reshape(*left.shape[:-4], f * e, g * a)


def kronecker_dense(a, b):
    torch = pytest.importorskip("torch")
    full = torch.einsum("...ij,...kl->...ikjl", a, b)
    return full.reshape(*full.shape[:-4], a.shape[-2] * b.shape[-2], a.shape[-1] * b.shape[-1])


def build_train(left, right):
    return sm.BlockTensorTrain([left[..., None, :, :, :], right[..., :, None, :, :]])


SUITES = {  # name: (our operator from tensors, its dense twin from the same tensors, shapes of the tensors)
    "monarch": (sm.Monarch, monarch_dense, [(3, 2, 4), (2, 6, 4)]),
    "kronecker": (sm.Kronecker, kronecker_dense, [(2, 3), (3, 2)]),
    "low_rank": (sm.LowRank, lambda left, right: left @ right, [(6, 2), (2, 5)]),
    "block_tensor_train": (build_train, train_dense, [(3, 2, 4), (2, 6, 4)]),
}


@cache
def adapter():
    """A LinearOperator of theirs that holds tensors and multiplies with an operator of ours built from them."""
    linear_operator = pytest.importorskip("linear_operator")

    class Adapter(linear_operator.operators.LinearOperator):
        def __init__(self, *tensors, build, transposed=False):
            super().__init__(*tensors, build=build, transposed=transposed)
            self.tensors, self.build, self.transposed = tensors, build, transposed

        @property
        def ours(self):  # made on use: gradients are on or off as they are then
            operator = self.build(*self.tensors)
            return operator.T if self.transposed else operator

        def _matmul(self, rhs):
            return self.ours @ rhs

        def _size(self):
            return pytest.importorskip("torch").Size(self.ours.shape)

        def _transpose_nonbatch(self):
            return Adapter(*self.tensors, build=self.build, transposed=not self.transposed)

        def _expand_batch(self, batch_shape):
            old = len(self.batch_shape)
            tensors = (t.expand(*batch_shape, *t.shape[old:]) for t in self.tensors)
            return Adapter(*tensors, build=self.build, transposed=self.transposed)

    return Adapter


@allow_torch_warnings
@pytest.mark.parametrize("batch", [(), (2,), (3, 2)], ids=["plain", "batched", "batched twice"])
@pytest.mark.parametrize("structure", SUITES)
def test_linear_operator_rectangular_suite(structure, batch):
    torch = pytest.importorskip("torch")
    pytest.importorskip("linear_operator")
    from linear_operator.test.linear_operator_test_case import RectangularLinearOperatorTestCase

    build, dense, shapes = SUITES[structure]

    class Case(RectangularLinearOperatorTestCase, unittest.TestCase):
        seed = 3

        def create_linear_op(self):
            tensors = [torch.randn(*batch, *s, requires_grad=True) for s in shapes]
            return adapter()(*tensors, build=build)

        def evaluate_linear_op(self, linear_op):
            return dense(*linear_op.representation())

    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromTestCase(Case).run(result)
    faults = [f"{case.id()}\n{trace}" for case, trace in (*result.failures, *result.errors)]
    assert not faults, "\n".join(faults)
    assert (result.testsRun, result.skipped) == (RECTANGULAR_TESTS, [])


@allow_torch_warnings
@pytest.mark.parametrize("structure", SUITES)
def test_linear_operator_adapter_passes_every_gradient(structure):
    """Their suite skips parameters without a gradient, so here each one must have one, equal to the dense twin's."""
    torch = pytest.importorskip("torch")
    build, dense, shapes = SUITES[structure]
    generator = torch.Generator().manual_seed(5)
    tensors = [torch.randn(*s, generator=generator, requires_grad=True) for s in shapes]
    twins = [t.detach().clone().requires_grad_(True) for t in tensors]
    operator = adapter()(*tensors, build=build)
    rhs = torch.randn(operator.shape[-1], 4, generator=generator)
    weight = torch.randn(operator.shape[-2], 4, generator=generator)
    (weight * (operator @ rhs)).sum().backward()
    (weight * (dense(*twins) @ rhs)).sum().backward()
    for t, twin in zip(tensors, twins, strict=True):
        assert twin.grad.abs().max() > 0
        torch.testing.assert_close(t.grad, twin.grad)


# ---- lazylinop: chains of Kronecker-sparse factors -------------------------------------------------------------------


@pytest.fixture(scope="module")
def ksm():
    for name in ("psutil", "pandas"):
        pytest.importorskip(name)
    with warnings.catch_warnings(record=True) as caught:  # it resets everybody's filters, so they are put back
        module = pytest.importorskip("lazylinop.butterfly")
    assert {str(w.message) for w in caught} <= {"PyWavelets is not installed."}
    return module.ksm


def random_patterns(seed: int, chainable: bool) -> list[Pattern]:
    """A chain of two to four patterns with matching sizes, all neighbours chainable or at least one pair not."""
    rng = np.random.default_rng(seed)
    while True:
        patterns = [Pattern(*(int(i) for i in rng.integers(1, 4, 4)))]
        for _ in range(rng.integers(1, 4)):
            size = patterns[-1].cols
            a = rng.choice([i for i in range(1, size + 1) if size % i == 0])
            d = rng.choice([i for i in range(1, size // a + 1) if size // a % i == 0])
            patterns.append(Pattern(int(a), int(size // a // d), int(rng.integers(1, 4)), int(d)))
        ranks = [p.chain_rank(q) for p, q in itertools.pairwise(patterns)]
        if (None not in ranks) == chainable and math.prod(max(p) for p in patterns) > 4:
            return patterns


def compare_with_ksm(ksm, ours: sm.Operator, blocks: list[np.ndarray]) -> None:
    """Ours against theirs on blocks (a, d, b, c), forward and adjoint, vectors and matrices."""
    dtype = ours.dtype
    theirs = ksm([np.ascontiguousarray(b.transpose(0, 2, 3, 1)) for b in blocks])
    assert tuple(theirs.shape) == ours.shape
    m, n = ours.shape
    for shape in ((), (1,), (5,)):
        x, y = at_random((n, *shape), dtype, 1), at_random((m, *shape), dtype, 2)
        assert_close(ours @ x, theirs @ x, dtype)
        assert_close(ours.H @ y, theirs.H @ y, dtype)
        assert_close(ours.T @ y, theirs.T @ y, dtype)
    assert_close(ours.rmatmat(y), theirs.H @ y, dtype)
    assert (ours @ x).dtype == dtype


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64", "complex128"])
@pytest.mark.parametrize("chainable", [True, False], ids=["chainable", "not chainable"])
@pytest.mark.parametrize("seed", range(6))
def test_lazylinop_ksm_of_random_chains(ksm, seed, chainable, dtype):
    patterns = random_patterns(seed, chainable)
    blocks = [entries((a, d, b, c), dtype, i) for i, (a, b, c, d) in enumerate(patterns)]
    ours = sm.Chain(blocks)
    assert list(ours.patterns) == patterns
    compare_with_ksm(ksm, ours, blocks)


@pytest.mark.parametrize(
    "ours",
    [
        sm.Butterfly.random((16, 16), rng=0),
        sm.Butterfly.random((27, 8), dtype=complex, rng=1),
        sm.Butterfly.random((64, 64), radix=4, dtype=np.float32, rng=2),
        sm.Butterfly.random((30, 30), rng=3),
        sm.Monarch.random((36, 36), blocks=6, rng=4),
        sm.Monarch.random((12, 20), blocks=(3, 4), rank=2, dtype=complex, rng=5),
        sm.Monarch.random((20, 12), blocks=(5, 2), rank=3, dtype=np.float32, rng=6),
        sm.LowRank.random((9, 7), rank=2, rng=7),
        sm.BlockDiagonal.random((12, 8), blocks=4, rng=8),
        sm.Chain.random((24, 24), [(1, 4, 4, 6), (4, 3, 3, 2), (12, 2, 2, 1)], rng=9),
    ],
    ids=lambda a: f"{type(a).__name__}-{a.dtype}-{a.shape[0]}x{a.shape[1]}",
)
def test_lazylinop_ksm_of_families(ksm, ours):
    assert not ours.padded
    compare_with_ksm(ksm, ours, list(ours.factors))
    transposed = ours.T
    compare_with_ksm(ksm, transposed, list(transposed.factors))


@pytest.mark.parametrize("cores", [2, 3])
def test_lazylinop_ksm_of_block_tensor_trains(ksm, cores):
    """The same factors with the digits of the output index reversed."""
    ours = sm.BlockTensorTrain.random((24, 27), cores=cores, rank=2, rng=1)
    assert not ours.padded
    theirs = ksm([np.ascontiguousarray(b.transpose(0, 2, 3, 1)) for b in ours.cores])
    order = ours.out_order.permutation()
    x, y = at_random((27, 3), float, 1), at_random((24, 3), float, 2)
    assert_close(ours @ x, (theirs @ x)[order])
    assert_close(ours.H @ y, theirs.H @ y[np.argsort(order)])


@pytest.mark.parametrize("pattern", [(6, 2, 3, 1), (2, 2, 1, 3)], ids=["appended", "fused"])
def test_lazylinop_ksm_products_are_chains(ksm, pattern):
    a = sm.Chain.random((24, 12), [(2, 4, 2, 3)], rng=1)
    b = sm.Chain.random((12, pattern[0] * pattern[2] * pattern[3]), [pattern], rng=2)
    product = a @ b
    assert isinstance(product, sm.Chain)
    assert product.nparams <= a.nparams + b.nparams
    theirs = ksm([f.transpose(0, 2, 3, 1) for f in a.factors]) @ ksm([f.transpose(0, 2, 3, 1) for f in b.factors])
    x = at_random((b.shape[1], 4), float)
    assert_close(product @ x, theirs @ x)


# ---- SciPy: the suite of its own operators ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dot_tests():
    pytest.importorskip("scipy", minversion="1.18")
    return pytest.importorskip("scipy.sparse.linalg.tests.test_interface").TestDotTests()


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64", "complex128"])
def test_scipy_dot_tests(dot_tests, dtype):
    single = [
        p for p in matrices() if not isinstance(p.operator, sm.algebra.Inverse)
    ]  # that one obeys GMRES's tolerance
    pairs = [p for p in single if p.dense.dtype == dtype] + list(batched(dtype))
    real, has_imaginary = np.finfo(dtype).dtype.name, dtype.startswith("complex")
    assert len(pairs) > 50
    for pair in pairs:
        try:
            dot_tests.check_matvec(np, pair.operator, real, has_imaginary)
            dot_tests.check_matmat(np, pair.operator, real, has_imaginary, check_operators=False, check_dot=True)
        except Exception as error:
            error.add_note(f"operator: {pair.name}")
            raise
