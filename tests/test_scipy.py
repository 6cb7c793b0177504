"""Manners towards SciPy, NumPy and torch: semantics of SciPy's operators, its algorithms, its matrices as ours."""

from __future__ import annotations

import operator as python_operator
import re

import numpy as np
import pytest
import scipy
import scipy.linalg
import scipy.sparse
import scipy.sparse.linalg as ssl
from market import Pair, entries
from oracles import assert_close, at_random, batched, representatives

import structmat as sm

SINGLE = representatives("float64", "complex128")
BATCHED = batched("float64", "complex128")
ALL = (*SINGLE, *BATCHED)


def sizes(pair: Pair) -> tuple[int, int]:
    return pair.dense.shape[-2:]


def adjoint(x: np.ndarray) -> np.ndarray:
    return x.conj().swapaxes(-1, -2)


def vectors(dense: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The dense twin of ``matvec``: one product per vector in the last axis."""
    return (dense @ x[..., None])[..., 0]


# ---- the semantics of SciPy's operators ------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", SINGLE, ids=repr)
@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (0,), (1,)])
def test_matvec_and_rmatvec_take_stacks_of_vectors(pair, lead):
    m, n = sizes(pair)
    x, y = at_random((*lead, n), pair.dense.dtype), at_random((*lead, m), pair.dense.dtype)
    assert_close(pair.operator.matvec(x), vectors(pair.dense, x))
    assert_close(pair.operator.rmatvec(y), vectors(adjoint(pair.dense), y))


@pytest.mark.parametrize("pair", SINGLE, ids=repr)
def test_matvec_and_rmatvec_keep_a_column_a_column(pair):
    m, n = sizes(pair)
    x, y = at_random((n, 1), pair.dense.dtype), at_random((m, 1), pair.dense.dtype)
    assert_close(pair.operator.matvec(x), pair.dense @ x)
    assert_close(pair.operator.rmatvec(y), adjoint(pair.dense) @ y)


def test_matvec_of_a_square_array_is_a_stack_of_vectors_and_dot_is_a_product():
    a, x = entries((4, 4), complex, 1), entries((4, 4), complex, 2)
    assert_close(sm.Dense(a).matvec(x), x @ a.T)
    assert_close(sm.Dense(a).dot(x), a @ x)


@pytest.mark.parametrize("pair", BATCHED, ids=repr)
@pytest.mark.parametrize("more", [(), (4,), (3, 1)])
def test_matvec_and_rmatvec_broadcast_with_the_batch(pair, more):
    m, n = sizes(pair)
    lead = (*more, *pair.dense.shape[:-2])
    x, y = at_random((*lead, n), pair.dense.dtype), at_random((*lead, m), pair.dense.dtype)
    assert_close(pair.operator.matvec(x), vectors(pair.dense, x))
    assert_close(pair.operator.rmatvec(y), vectors(adjoint(pair.dense), y))
    assert_close(pair.operator.matvec(x[(0,) * len(lead)]), vectors(pair.dense, x[(0,) * len(lead)]))


@pytest.mark.parametrize("pair", ALL, ids=repr)
@pytest.mark.parametrize("more", [(), (4,), (3, 1), (0,)])
@pytest.mark.parametrize("k", [1, 3, 0])
def test_matmat_and_rmatmat_take_stacks_of_matrices(pair, more, k):
    m, n = sizes(pair)
    lead = (*more, *pair.dense.shape[:-2])
    x, y = at_random((*lead, n, k), pair.dense.dtype), at_random((*lead, m, k), pair.dense.dtype)
    for apply in (pair.operator.matmat, pair.operator.dot, pair.operator.__matmul__):
        assert_close(apply(x), pair.dense @ x)
    assert_close(pair.operator.rmatmat(y), adjoint(pair.dense) @ y)
    assert_close(pair.operator.H @ y, adjoint(pair.dense) @ y)


@pytest.mark.parametrize("pair", ALL, ids=repr)
def test_dot_and_at_take_one_vector(pair):
    x = at_random(sizes(pair)[1:], pair.dense.dtype)
    assert_close(pair.operator @ x, pair.dense @ x)
    assert_close(pair.operator.dot(x), pair.dense @ x)


@pytest.mark.parametrize("pair", ALL, ids=repr)
@pytest.mark.parametrize("more", [(), (4,)])
def test_rdot_and_at_from_the_left_use_the_transpose_without_conjugation(pair, more):
    m, _ = sizes(pair)
    y = at_random((*more, *pair.dense.shape[:-2], 3, m), pair.dense.dtype)
    for x in (y, y[(0,) * (y.ndim - 1)]):
        assert_close(x @ pair.operator, x @ pair.dense)
        assert_close(pair.operator.rdot(x), x @ pair.dense)


@pytest.mark.parametrize("pair", ALL, ids=repr)
def test_wrong_shapes_raise_value_errors_that_name_both_shapes(pair):
    m, n = sizes(pair)
    a = pair.operator
    rows, cols = n + 1, m + 1  # never the right size
    calls = [
        (a.matvec, (rows,)),
        (a.matvec, (2, rows)),
        (a.matvec, (rows, 1)),
        (a.matmat, (rows, 3)),
        (a.matmat, (n,)),
        (a.matmat, (2, rows, 3)),
        (a.dot, (rows,)),
        (a.dot, (rows, n)),  # a stack of vectors is not for dot
        (a.__matmul__, (rows,)),
        (a.__matmul__, (rows, n)),
        (a.rmatvec, (cols,)),
        (a.rmatmat, (cols, 3)),
        (a.rmatmat, (m,)),
        (a.rdot, (cols,)),
        (a.rdot, (3, cols)),
        (a.__rmatmul__, (m, cols)),
    ]
    for call, shape in calls:
        ours = re.escape(str(tuple(a.shape))) + "|" + re.escape(str(tuple(a.T.shape)))
        with pytest.raises(ValueError, match=ours) as caught:
            call(np.ones(shape))
        assert str(shape) in str(caught.value), (call.__name__, shape)


@pytest.mark.parametrize("name", ["matvec", "rmatvec", "matmat", "rmatmat", "dot", "rdot"])
def test_batches_that_do_not_broadcast_raise_value_errors_that_name_both_shapes(name):
    for pair in BATCHED:
        m, n = sizes(pair)
        core = {"matvec": (n,), "rmatvec": (m,), "rmatmat": (m, 3), "rdot": (3, m)}.get(name, (n, 3))
        x = np.ones((7, *pair.dense.shape[1:-2], *core))  # seven never meets a batch of two or three
        with pytest.raises(ValueError, match=re.escape(str(x.shape))) as caught:
            getattr(pair.operator, name)(x)
        assert any(str(a.shape) in str(caught.value) for a in (pair.operator, pair.operator.T))


@pytest.mark.parametrize("scalar", [2.0, np.float64(2.0), np.array(2.0)])
def test_at_refuses_scalars(scalar):
    a = sm.Monarch.random((6, 6), rng=0)
    with pytest.raises(ValueError, match=re.escape("(6, 6)")):
        a @ scalar
    with pytest.raises(ValueError, match=re.escape("(6, 6)")):
        scalar @ a


def test_star_is_for_scalars_only():
    a = sm.Monarch.random((6, 6), rng=0)
    for other in (np.ones(6), np.ones((6, 6)), a):
        with pytest.raises(TypeError, match="@"):
            a * other
    with pytest.raises(TypeError, match="@"):
        np.ones(6) * a


def test_lists_are_taken_as_arrays():
    a = sm.Dense([[1.0, 2.0], [3.0, 4.0]])
    assert (a @ [1, 1]).tolist() == [3.0, 7.0]
    assert ([1, 1] @ a).tolist() == [4.0, 6.0]
    assert a.matmat([[1], [1]]).tolist() == [[3.0], [7.0]]
    assert a.rmatvec([1, 1]).tolist() == [4.0, 6.0]


MATRIX = pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")


@MATRIX
def test_numpy_matrices_are_taken_as_arrays():
    a = entries((3, 3), float, 1)
    x = np.asmatrix(entries((3, 2), float, 2))
    y = sm.Dense(a) @ x
    assert type(y) is np.ndarray
    assert_close(y, a @ np.asarray(x))


# ---- to_scipy --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", SINGLE, ids=repr)
def test_to_scipy_is_a_linear_operator_with_the_same_values(pair):
    m, n = sizes(pair)
    theirs = pair.operator.to_scipy()
    assert isinstance(theirs, ssl.LinearOperator)
    assert theirs.shape == (m, n)
    assert theirs.dtype == pair.operator.dtype
    x, y = at_random((n, 3), pair.dense.dtype), at_random((m, 3), pair.dense.dtype)
    assert_close(theirs.matmat(x), pair.dense @ x)
    assert_close(theirs.rmatmat(y), adjoint(pair.dense) @ y)
    assert_close(theirs.matvec(x[:, 0]), pair.dense @ x[:, 0])
    assert_close(theirs.rmatvec(y[:, 0]), adjoint(pair.dense) @ y[:, 0])
    assert_close(theirs.T @ y, pair.dense.T @ y)
    assert_close((theirs @ theirs.H) @ y, pair.dense @ (adjoint(pair.dense) @ y))


class Counting(sm.Operator):
    """A dense matrix that counts how often it is applied, its transpose with it."""

    __slots__ = ("array", "calls")
    fields = ("array", "calls")

    def __init__(self, array, calls):
        self._init(array.shape, array.dtype, "numpy", "cpu", array=array, calls=calls)

    def _matmat(self, x):
        self.calls.append(x.shape)
        return self.array @ x

    def _transpose(self):
        return Counting(self.array.T, self.calls)


def test_six_columns_are_one_call():
    """SciPy's own wrapper of a duck type makes six of them (scipy/scipy#16113)."""
    calls: list[tuple[int, ...]] = []
    a = Counting(entries((5, 4), complex, 1), calls)
    for theirs in (a.to_scipy(), 2 * a.to_scipy(), a.to_scipy() + a.T.T.to_scipy()):
        for apply, size in ((theirs.matmat, 4), (theirs.dot, 4), (theirs.rmatmat, 5)):
            calls.clear()
            apply(np.ones((size, 6)))
            assert set(calls) == {(size, 6)}
            assert len(calls) <= 2  # one per term


def test_six_columns_are_one_call_of_a_kronecker_factor_and_of_our_algebra():
    calls: list[tuple[int, ...]] = []
    a = Counting(entries((4, 4), float, 1), calls)
    for operator, x in (
        (sm.kron(a, sm.Dense(np.ones((3, 3)))), np.ones((12, 6))),
        (a + sm.Monarch.random((4, 4), rng=0), np.ones((2, 4, 6))),
        (a @ sm.Monarch.random((4, 4), rng=0), np.ones((4, 6))),
        (2 * sm.hstack([a, sm.Identity(4)]), np.ones((8, 6))),
    ):
        calls.clear()
        operator @ x
        assert len(calls) == 1


def test_to_scipy_refuses_what_scipy_cannot_hold():
    with pytest.raises(ValueError, match=re.escape("(2, 3, 3)")):
        sm.Dense(np.ones((2, 3, 3))).to_scipy()
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match=r"torch.*A\.to\('numpy'\)"):
        sm.Dense(torch.ones(3, 3)).to_scipy()


# ---- SciPy's algorithms, on A.to_scipy() and on A itself -------------------------------------------------------------


def definite(dtype) -> list[sm.Operator]:
    """Hermitian positive definite operators."""
    low = sm.LowRank.random((24, 24), rank=3, dtype=dtype, rng=1)
    monarch = sm.Monarch.random((24, 24), blocks=4, dtype=dtype, rng=2)
    factor = sm.Dense.random((4, 4), dtype=dtype, rng=3)
    other = sm.Dense.random((6, 6), dtype=dtype, rng=4)
    return [
        low @ low.H + 2 * sm.Identity(24),
        monarch.H @ monarch + sm.Diagonal(np.linspace(1, 2, 24)),
        sm.kron(factor @ factor.H + sm.Identity(4), other @ other.H + sm.Identity(6)),
    ]


def general(dtype) -> list[sm.Operator]:
    """Square operators without symmetry, well conditioned."""
    return [
        4 * sm.Identity(24) + sm.Monarch.random((24, 24), blocks=4, rank=2, dtype=dtype, rng=1),
        sm.Diagonal(np.linspace(3, 9, 24)) + sm.BlockTensorTrain.random((24, 24), blocks=(4, 6), dtype=dtype, rng=2),
        sm.Kronecker(*(3 * np.eye(n) + entries((n, n), dtype, n) / 2 for n in (4, 6))),
    ]


def rectangular(dtype) -> list[sm.Operator]:
    """Tall operators of full column rank."""
    return [
        sm.vstack([general(dtype)[0], sm.Butterfly.random((24, 24), dtype=dtype, rng=3)]),
        sm.Kronecker(*(entries(s, dtype, s[0]) for s in ((5, 3), (6, 4)))),
        sm.Monarch.random((40, 20), blocks=4, rank=4, dtype=dtype, rng=5),
    ]


def both(operators: list[sm.Operator]):
    """Every operator as SciPy's object and as itself, with its dense matrix."""
    for a in operators:
        dense = np.asarray(a)
        yield a.to_scipy(), dense
        yield a, dense


REAL_AND_COMPLEX = pytest.mark.parametrize("dtype", [float, complex], ids=["real", "complex"])


@REAL_AND_COMPLEX
def test_svds(dtype):
    for a, dense in both(rectangular(dtype) + general(dtype)):
        u, s, vh = ssl.svds(a, k=4, v0=np.ones(min(dense.shape)))
        assert_close(np.sort(s)[::-1], np.linalg.svd(dense, compute_uv=False)[:4])
        assert_close(dense @ vh.conj().T, u * s)


@REAL_AND_COMPLEX
def test_eigs(dtype):
    for a, dense in both(general(dtype)):
        values, x = ssl.eigs(a, k=3, v0=np.ones(24), tol=1e-13)
        largest = np.sort(np.abs(np.linalg.eigvals(dense)))
        np.testing.assert_allclose(
            np.sort(np.abs(values))[1:], largest[-2:], rtol=1e-8
        )  # a pair may be cut at the third
        np.testing.assert_allclose(dense @ x, x * values, atol=1e-8)


@REAL_AND_COMPLEX
def test_eigsh(dtype):
    for a, dense in both(definite(dtype)):
        values, x = ssl.eigsh(a, k=3, v0=np.ones(24))
        assert_close(np.sort(values), np.linalg.eigvalsh(dense)[-3:])
        np.testing.assert_allclose(dense @ x, x * values, atol=1e-8)


@REAL_AND_COMPLEX
@pytest.mark.parametrize("solver", [ssl.cg, ssl.minres, ssl.gmres, ssl.bicgstab], ids=lambda f: f.__name__)
def test_krylov_solvers_of_definite_systems(solver, dtype):
    if solver is ssl.minres:
        dtype = float  # SciPy's minres is for real symmetric matrices
    b = at_random((24,), dtype)
    for a, dense in both(definite(dtype)):
        x, info = solver(a, b, rtol=1e-10)
        assert info == 0
        np.testing.assert_allclose(x, np.linalg.solve(dense, b), rtol=1e-6, atol=1e-8)


@REAL_AND_COMPLEX
def test_gmres(dtype):
    b = at_random((24,), dtype)
    for a, dense in both(general(dtype)):
        x, info = ssl.gmres(a, b, rtol=1e-11, restart=24)
        assert info == 0
        np.testing.assert_allclose(x, np.linalg.solve(dense, b), rtol=1e-7, atol=1e-9)


def test_gmres_preconditioned_by_a_structured_inverse():
    a = sm.Kronecker(*(2 * np.eye(n) + entries((n, n), float, n) / 4 for n in (4, 6)))
    dense = np.asarray(a) + 0.01 * np.ones((24, 24))
    b = at_random((24,), float)
    steps: list[float] = []
    x, info = ssl.gmres(dense, b, M=a.inv(), rtol=1e-12, callback=steps.append, callback_type="pr_norm")
    assert info == 0
    assert len(steps) <= 5
    np.testing.assert_allclose(x, np.linalg.solve(dense, b), rtol=1e-9, atol=1e-10)


@REAL_AND_COMPLEX
@pytest.mark.parametrize("solver", [ssl.lsqr, ssl.lsmr], ids=lambda f: f.__name__)
def test_least_squares_solvers(solver, dtype):
    limits = {ssl.lsqr: "iter_lim", ssl.lsmr: "maxiter"}
    for a, dense in both(rectangular(dtype)):
        b = at_random((dense.shape[0],), dtype)
        x = solver(a, b, atol=1e-13, btol=1e-13, conlim=0, **{limits[solver]: 500})[0]
        np.testing.assert_allclose(x, np.linalg.lstsq(dense, b)[0], rtol=1e-6, atol=1e-8)


@REAL_AND_COMPLEX
def test_onenormest(dtype):
    for a, dense in both(general(dtype)):
        assert ssl.onenormest(a, t=24) == pytest.approx(np.linalg.norm(dense, 1), rel=1e-12)  # t = n is exact
        np.random.seed(1)  # noqa: NPY002 (SciPy draws from the global generator)
        estimate = ssl.onenormest(a)
        np.random.seed(1)  # noqa: NPY002
        assert estimate == pytest.approx(ssl.onenormest(dense), rel=1e-12)


@REAL_AND_COMPLEX
def test_expm_multiply(dtype):
    b = at_random((24, 2), dtype)
    for a in general(dtype):
        dense = np.asarray(a)
        theirs = (-0.2 * a).to_scipy()
        expected = scipy.linalg.expm(-0.2 * dense) @ b
        assert_close(ssl.expm_multiply(theirs, b, traceA=-0.2 * np.trace(dense)), expected)
        assert_close(ssl.expm_multiply(theirs, b[:, 0], traceA=-0.2 * np.trace(dense)), expected[:, 0])


def test_expm_multiply_takes_no_duck_types_of_anybody():
    """SciPy subtracts a dense identity from what is not its own: the way is ``A.to_scipy()``."""
    with pytest.raises(TypeError, match="expected an operator, got ndarray"):
        ssl.expm_multiply(general(float)[0], np.ones(24), traceA=1.0)


# ---- SciPy's matrices as operators -----------------------------------------------------------------------------------

SPARSE = [
    scipy.sparse.csr_array,
    scipy.sparse.csr_matrix,
    scipy.sparse.csc_array,
    scipy.sparse.csc_matrix,
    scipy.sparse.coo_array,
    scipy.sparse.coo_matrix,
    scipy.sparse.bsr_array,
    scipy.sparse.dia_array,
    scipy.sparse.lil_array,
]


def sparse_values(shape: tuple[int, int], dtype, seed: int = 1) -> np.ndarray:
    return entries(shape, dtype, seed) * (np.random.default_rng(seed).random(shape) < 0.4)


class Custom(ssl.LinearOperator):
    """A SciPy operator that knows only its two vector products."""

    def __init__(self, array):
        super().__init__(array.dtype, array.shape)
        self.array = array

    def _matvec(self, x):
        return self.array @ x

    def _rmatvec(self, x):
        return self.array.conj().T @ x


MAKERS = [*SPARSE, ssl.aslinearoperator, Custom, lambda a: 2 * ssl.aslinearoperator(a / 2)]
MAKER_NAMES = [*(s.__name__ for s in SPARSE), "aslinearoperator", "custom", "scaled operator"]


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex128"])
@pytest.mark.parametrize("make", MAKERS, ids=MAKER_NAMES)
def test_as_operator_of_scipy_objects(make, dtype):
    dense = sparse_values((6, 5), dtype)
    theirs = make(dense)
    a = sm.as_operator(theirs)
    assert isinstance(a, sm.Operator)
    assert not isinstance(a, sm.Dense)
    assert (a.shape, a.dtype) == ((6, 5), theirs.dtype)
    for shape in ((), (1,), (3,)):
        x, y = at_random((5, *shape), dtype), at_random((6, *shape), dtype)
        for result, expected in (
            (a @ x, dense @ x),
            (a.T @ y, dense.T @ y),
            (a.H @ y, dense.conj().T @ y),
            (a.conj() @ x, dense.conj() @ x),
            (a.rmatvec(y), dense.conj().T @ y) if shape in ((), (1,)) else (a.rmatmat(y), dense.conj().T @ y),
            (y.T @ a, y.T @ dense),
        ):
            assert type(result) is np.ndarray
            assert_close(result, expected)
    x = at_random((2, 4, 5, 3), dtype)
    assert_close(a @ x, dense @ x)
    assert_close(np.asarray(a), dense)
    assert a.T.T is a
    assert a.H.H is a


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 5, 0), (5, 0)])
@pytest.mark.parametrize("make", [scipy.sparse.csr_array, ssl.aslinearoperator])
def test_as_operator_of_scipy_objects_takes_empty_operands(make, shape):
    dense = sparse_values((6, 5), float)
    assert_close(sm.as_operator(make(dense)) @ np.ones(shape), dense @ np.ones(shape))


@REAL_AND_COMPLEX
@pytest.mark.parametrize("make", MAKERS, ids=MAKER_NAMES)
def test_algebra_with_scipy_objects(make, dtype):
    dense = sparse_values((6, 6), dtype) + 3 * np.eye(6)
    a = sm.as_operator(make(dense))
    monarch = sm.Monarch.random((6, 6), blocks=2, dtype=dtype, rng=1)
    low = sm.LowRank.random((6, 6), rank=1, dtype=dtype, rng=2)
    m, l = np.asarray(monarch), np.asarray(low)
    scalar = 1 - 2j if dtype is complex else -2
    expressions = {
        "a @ m": (a @ monarch, dense @ m),
        "m @ a": (monarch @ a, m @ dense),
        "a @ low": (a @ low, dense @ l),
        "low @ a": (low @ a, l @ dense),
        "a + m": (a + monarch, dense + m),
        "m - a": (monarch - a, m - dense),
        "c a": (scalar * a, scalar * dense),
        "a / 2": (a / 2, dense / 2),
        "(c a).H": ((scalar * a).H, (scalar * dense).conj().T),
        "a**3": (a**3, np.linalg.matrix_power(dense, 3)),
        "kron": (sm.kron(a, monarch), np.kron(dense, m)),
        "kron of a": (sm.kron(sm.Identity(2), a), np.kron(np.eye(2), dense)),
        "block_diag": (sm.block_diag(a, monarch), scipy.linalg.block_diag(dense, m)),
        "hstack": (sm.hstack([a, monarch]), np.hstack([dense, m])),
        "vstack": (sm.vstack([a, monarch]), np.vstack([dense, m])),
        "slice": (a[1:4, [0, 5]], dense[1:4, [0, 5]]),
        "p @ a": (sm.Permutation([2, 0, 1, 5, 4, 3]) @ a, dense[[2, 0, 1, 5, 4, 3]]),
        "d @ a": (sm.Diagonal(np.arange(1.0, 7.0)) @ a, np.arange(1.0, 7.0)[:, None] * dense),
    }
    for name, (operator, expected) in expressions.items():
        assert operator.shape == expected.shape, name
        assert_close(np.asarray(operator), expected)
        assert_close(np.asarray(operator.H), expected.conj().T)
        assert_close(np.asarray(operator.T), expected.T)
    assert_close(a.inv() @ (dense @ np.ones(6)), np.ones(6))


@pytest.mark.parametrize("make", [scipy.sparse.csr_array, ssl.aslinearoperator, Custom])
def test_float32_scipy_objects_are_promoted_by_the_algebra(make):
    dense = sparse_values((4, 4), "float32")
    a = sm.as_operator(make(dense))
    for b in (sm.Identity(4), sm.Permutation([1, 0, 3, 2]), sm.Zero((4, 4)), sm.Diagonal(np.ones(4))):
        for result, expected in (
            (b @ a, np.asarray(b) @ dense),
            (a @ b, dense @ np.asarray(b)),
            (a + b, dense + np.asarray(b)),
        ):
            assert result.dtype == np.float64
            assert_close(result @ np.ones(4), expected @ np.ones(4), "float32")


@pytest.mark.parametrize("dtype", [bool, np.int8, np.uint16, np.int64])
def test_integer_and_boolean_scipy_objects_become_float64(dtype):
    dense = np.array([[1, 0, 1], [0, 1, 0]], dtype)
    for a in (sm.as_operator(scipy.sparse.csr_array(dense)), sm.as_operator(ssl.aslinearoperator(dense))):
        assert a.dtype == np.float64
        assert (a @ np.ones(3)).tolist() == [2.0, 1.0]
        assert np.asarray(a).tolist() == dense.astype(float).tolist()
        assert (a.T @ np.array([200, 100])).tolist() == [200.0, 100.0, 200.0]


@MATRIX
def test_as_operator_returns_operators_and_takes_arrays():
    a = sm.Monarch.random((4, 4), rng=0)
    assert sm.as_operator(a) is a
    x = entries((2, 3, 4), complex, 1)
    assert np.asarray(sm.as_operator(x)) is x
    assert sm.as_operator([[1, 2]]).dtype == np.float64
    assert sm.as_operator(np.asmatrix([[1.0, 2.0]])).shape == (1, 2)
    for wrong in (None, "text", object(), 3 + 0j, {1: 2}):
        with pytest.raises((TypeError, ValueError)):
            sm.as_operator(wrong)


def test_round_trips_through_scipy():
    a = sm.BlockTensorTrain.random((12, 10), blocks=2, rank=2, dtype=complex, rng=1)
    back = sm.as_operator(a.to_scipy())
    x, y = at_random((10, 3), complex), at_random((12, 3), complex)
    assert_close(back @ x, a @ x)
    assert_close(back.H @ y, a.H @ y)
    assert_close(back.T @ y, a.T @ y)
    sparse = scipy.sparse.csr_array(sparse_values((6, 5), complex))
    again = sm.as_operator(sparse).to_scipy()
    assert_close(again @ np.eye(5), sparse.toarray())
    assert_close(again.H @ np.eye(6), sparse.toarray().conj().T)


# ---- objects of SciPy on the left: SciPy never defers ----------------------------------------------------------------


@pytest.mark.parametrize("make", [ssl.aslinearoperator, scipy.sparse.csr_array, scipy.sparse.csc_matrix])
def test_scipy_objects_on_the_left_make_the_dense_matrix(make):
    """``theirs @ A`` asks NumPy for an array of A and so multiplies densely; structured ways follow below."""
    dense = sparse_values((5, 6), complex)
    a = sm.Monarch.random((6, 4), blocks=2, dtype=complex, rng=1)
    product = make(dense) @ a
    assert type(product) is np.ndarray
    assert_close(product, dense @ np.asarray(a))


def test_structured_products_with_scipy_objects_on_the_left():
    dense = sparse_values((5, 6), complex)
    a = sm.Monarch.random((6, 4), blocks=2, dtype=complex, rng=1)
    theirs = ssl.aslinearoperator(dense) @ a.to_scipy()
    assert isinstance(theirs, ssl.LinearOperator)
    assert_close(theirs @ np.eye(4), dense @ np.asarray(a))
    ours = sm.as_operator(scipy.sparse.csr_array(dense)) @ a
    assert isinstance(ours, sm.Operator)
    assert_close(np.asarray(ours), dense @ np.asarray(a))


@pytest.mark.parametrize("make", [ssl.aslinearoperator, scipy.sparse.csr_array])
@pytest.mark.parametrize("combine", [python_operator.add, python_operator.sub])
def test_sums_with_scipy_objects_say_how_to_convert(make, combine):
    a = sm.Monarch.random((6, 6), rng=0)
    with pytest.raises(TypeError, match="structmat"):
        combine(a, make(np.eye(6)))


# ---- NumPy -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", ALL, ids=repr)
def test_asarray_is_the_dense_matrix(pair):
    for make in (np.asarray, np.array, np.asanyarray, np.ascontiguousarray):
        dense = make(pair.operator)
        assert type(dense) is np.ndarray
        assert dense.dtype == pair.operator.dtype
        assert_close(dense, pair.dense)
    assert_close(pair.operator.to_dense(), pair.dense)
    assert np.asarray(pair.operator, dtype=np.complex64).dtype == np.complex64
    with pytest.raises(ValueError, match="copy"):
        np.asarray(pair.operator, copy=False)


def test_array_makes_a_copy():
    """``numpy.array(A)`` may be written to: it must not be the array that the operator (and its caller) holds."""
    x = np.ones((2, 2))
    copied = np.array(sm.Dense(x))
    copied[0, 0] = 7.0
    assert x[0, 0] == 1.0


@pytest.mark.parametrize("pair", ALL, ids=repr)
@pytest.mark.parametrize(
    "scalar", [np.float64(3), np.float32(3), np.complex64(2 - 1j), np.int64(-2), np.array(3.0)], ids=repr
)
def test_numpy_scalars_on_both_sides(pair, scalar):
    expected = scalar * pair.dense
    for scaled in (scalar * pair.operator, pair.operator * scalar):
        assert isinstance(scaled, sm.Operator)
        assert scaled.dtype == expected.dtype
        assert_close(np.asarray(scaled), expected)


@pytest.mark.parametrize("scalar", [3, 3.0, np.float64(3), np.float32(3), np.complex64(2 - 1j), np.int64(-3)], ids=repr)
@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64", "complex128"])
def test_division_is_as_accurate_as_numpy(dtype, scalar):
    """``1 / float32(3)`` is rounded to single precision: it must not stand for a division in double precision."""
    a = entries((4, 4), dtype, 1)
    quotient = sm.Dense(a) / scalar
    assert quotient.dtype == (a / scalar).dtype
    assert_close(np.asarray(quotient), a / scalar)


DISPATCHED = {
    "sum": np.sum,
    "mean": np.mean,
    "trace": np.trace,
    "kron": lambda a: np.kron(a, a),
    "dot": lambda a: np.dot(a, np.ones(6)),
    "vdot": lambda a: np.vdot(a, a),
    "tensordot": lambda a: np.tensordot(a, a),
    "einsum": lambda a: np.einsum("ij->i", a),
    "concatenate": lambda a: np.concatenate([a, a]),
    "stack": lambda a: np.stack([a, a]),
    "hstack": lambda a: np.hstack([np.ones((6, 6)), a]),
    "where": lambda a: np.where(np.ones((6, 6)) > 0, a, 0),
    "transpose": np.transpose,
    "real": np.real,
    "reshape": lambda a: np.reshape(a, -1),
    "diag": np.diag,
    "norm": np.linalg.norm,
    "inv": np.linalg.inv,
    "svd": np.linalg.svd,
    "solve": lambda a: np.linalg.solve(a, np.ones(6)),
    "det": np.linalg.det,
    "fft": np.fft.fft,
    "zeros_like": np.zeros_like,
    "shape": np.shape,
    "allclose": lambda a: np.allclose(a, a),
    "array_equal": lambda a: np.array_equal(a, a),
}


@pytest.mark.parametrize("name", DISPATCHED)
def test_numpy_functions_raise_a_type_error_that_names_to_dense(name):
    with pytest.raises(TypeError, match=rf"{name}.*to_dense\(\)"):
        DISPATCHED[name](sm.Monarch.random((6, 6), rng=0))


@pytest.mark.parametrize("name", ["inv", "norm", "svd", "fft"])
def test_numpy_functions_are_called_by_their_full_name(name):
    function, module = {"fft": (np.fft.fft, "fft")}.get(name, (DISPATCHED[name], "linalg"))
    with pytest.raises(TypeError, match=rf"numpy\.{module}\.{name}"):
        function(sm.Monarch.random((6, 6), rng=0))


UFUNCS = [
    np.exp,
    np.conj,
    np.isfinite,
    lambda a: np.add(a, 1),
    lambda a: np.matmul(np.ones(6), a),
    lambda a: np.add.reduce(a),
]


@pytest.mark.parametrize("function", UFUNCS)
def test_universal_functions_raise_a_type_error(function):
    with pytest.raises(TypeError, match="Monarch"):
        function(sm.Monarch.random((6, 6), rng=0))


def test_augmented_assignment():
    """NumPy never defers in place; an operator on the left is simply bound anew."""
    a = sm.Monarch.random((6, 6), rng=0)
    x = np.ones((3, 6))
    with pytest.raises(TypeError, match="Monarch"):
        x @= a
    with pytest.raises(TypeError, match="Monarch"):
        x += a
    assert_close(x, np.ones((3, 6)))
    total = first = sm.Diagonal(np.ones(6))
    total += a
    total @= a
    total *= 2
    assert_close(np.asarray(total), 2 * (np.eye(6) + np.asarray(a)) @ np.asarray(a))
    assert_close(np.asarray(first), np.eye(6))


# ---- torch -----------------------------------------------------------------------------------------------------------


def test_torch_tensors_on_both_sides():
    torch = pytest.importorskip("torch")
    dense = torch.from_numpy(entries((6, 4), complex, 1))
    left, right = torch.from_numpy(entries((2, 3, 2), complex, 2)), torch.from_numpy(entries((2, 2, 2), complex, 3))
    x, y = torch.from_numpy(at_random((4, 3), complex)), torch.from_numpy(at_random((2, 5, 6), complex))
    for a in (sm.Dense(dense), sm.Monarch(left, right)):
        full = a.to_dense()
        for result, expected in (
            (a @ x, full @ x),
            (a @ x[:, 0], full @ x[:, 0]),
            (y @ a, y @ full),
            (y[0, 0] @ a, y[0, 0] @ full),
            (y @ a.conj(), y @ full.conj()),
            (a.rmatmat(y[0].T), full.mH @ y[0].T),
        ):
            assert type(result) is torch.Tensor
            torch.testing.assert_close(result, expected)
        scaled = torch.tensor(2.0, dtype=torch.complex128) * a
        assert isinstance(scaled, sm.Operator)
        torch.testing.assert_close(scaled.to_dense(), 2 * full)


@pytest.mark.parametrize("n", [4, 6])
def test_operators_without_arrays_meet_both_libraries(n):
    torch = pytest.importorskip("torch")
    for a in (sm.Identity(n), sm.Zero((n, n)), sm.Permutation(np.arange(n)[::-1].copy()), 2 * sm.Identity(n)):
        dense = np.asarray(a)
        for x in (np.ones((n, 2)), torch.ones(n, 2, dtype=torch.float64)):
            for result, expected in ((a @ x, dense @ np.ones((n, 2))), (x.T @ a, np.ones((2, n)) @ dense)):
                assert type(result) is type(x)
                assert_close(np.asarray(result), expected)


def test_mixing_torch_and_numpy_raises_a_type_error_that_names_both():
    torch = pytest.importorskip("torch")
    ours, theirs = sm.Monarch.random((6, 6), rng=0), sm.Monarch.random((6, 6), dtype=torch.float64, rng=0)
    array, tensor = np.ones((6, 6)), torch.ones(6, 6, dtype=torch.float64)
    mixtures = [
        lambda: ours @ tensor,
        lambda: tensor @ ours,
        lambda: tensor[0] @ ours,
        lambda: theirs @ array,
        lambda: array @ theirs,
        lambda: array[0] @ theirs,
        lambda: ours.matvec(tensor[0]),
        lambda: ours.rmatmat(tensor),
        lambda: theirs.rmatvec(array[0]),
        lambda: ours @ theirs,
        lambda: ours + theirs,
        lambda: ours - theirs,
        lambda: sm.kron(ours, theirs),
        lambda: sm.hstack([ours, theirs]),
        lambda: sm.vstack([theirs, ours]),
        lambda: sm.block_diag(ours, theirs),
        lambda: sm.Kronecker(array, tensor),
        lambda: sm.LowRank(array, tensor),
        lambda: sm.Monarch(np.ones((2, 3, 2)), torch.ones(2, 2, 3)),
        lambda: sm.Chain([np.ones((1, 2, 2, 2)), torch.ones(1, 2, 2, 2)]),
        lambda: sm.BlockTensorTrain([np.ones((2, 3, 2)), torch.ones(2, 2, 3)]),
    ]
    for i, mix in enumerate(mixtures):
        with pytest.raises(TypeError) as caught:
            mix()
        message = str(caught.value)
        assert "torch" in message, (i, message)
        assert "numpy" in message, (i, message)
