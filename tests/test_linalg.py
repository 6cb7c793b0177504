"""structmat.linalg against numpy.linalg on the dense twin, for every family, rule and known fault of other libraries."""

import functools
import pickle
import warnings

import numpy as np
import pytest
import scipy.linalg
import scipy.sparse

import structmat as sm
import structmat.linalg as sla
from structmat import rules
from structmat.algebra import Inverse, Product, Scaled, Sum
from structmat.linalg.chains import order_parity
from structmat.operator import Operator
from structmat.patterns import AxisOrder

LinAlgError = np.linalg.LinAlgError
NORMS = ("fro", 1, 2, np.inf, "nuc")


def rng(seed=0):
    return np.random.default_rng(seed)


def arr(*shape, dtype=float, seed=0):
    x = rng(seed).standard_normal(shape)
    if np.dtype(dtype).kind == "c":
        x = x + 1j * rng(seed + 100).standard_normal(shape)
    return x.astype(dtype)


def pd(*shape, dtype=float, seed=0):
    """Hermitian positive definite matrices."""
    x = arr(*shape, shape[-1], dtype=dtype, seed=seed)
    x = x @ x.swapaxes(-1, -2).conj() + np.eye(shape[-1])
    return ((x + x.swapaxes(-1, -2).conj()) / 2).astype(dtype)


@functools.cache
def square_cases(t):
    """name -> (operator, names of the functions that have no closed form for it)."""
    monarch = sm.Monarch.random((9, 9), blocks=3, dtype=t, rng=1)
    low = sm.LowRank(arr(7, 2, dtype=t, seed=2), arr(2, 7, dtype=t, seed=3))
    v = arr(7, dtype=t, seed=4)
    holes = np.where(np.arange(7) < 2, 0, v)
    swap = np.array([1, 0, 2, 3, 4, 5, 6])
    dense = sm.Dense(arr(5, 5, dtype=t, seed=5))
    S, P, R, E, X = "slogdet", "pinv", "svdvals", "eigvals", "expm"
    few = {P, R, E, X}  # what chains of several factors lack
    none: set[str] = set()
    kron_sum = sm.kron(dense, sm.Identity(3, t)) + sm.kron(sm.Identity(5, t), sm.Dense(arr(3, 3, dtype=t, seed=6)))
    return {
        "identity": (sm.Identity(5, t), none),
        "zero": (sm.Zero((4, 4), t), none),
        "diagonal": (sm.Diagonal(v), none),
        "singular diagonal": (sm.Diagonal(holes), none),
        "odd permutation": (sm.Permutation(swap, t), {E, X}),
        "even permutation": (sm.Permutation([2, 0, 1, 3, 4], t), {E, X}),
        "dense": (dense, none),
        "dense of size 1": (sm.Dense(arr(1, 1, dtype=t)), none),
        "dense of size 0": (sm.Dense(arr(0, 0, dtype=t)), none),
        "chain of size 0": (sm.BlockDiagonal(arr(2, 0, 0, dtype=t)), none),
        "singular dense": (sm.Dense(np.outer(arr(4, dtype=t), arr(4, dtype=t, seed=1))), none),
        "small determinant": (0.5 * sm.Identity(50, t), none),
        "scaled permutation": (-2.0 * sm.Permutation(swap, t), {E, X}),
        "scaled permutation of even size": (-3.0 * sm.Permutation([1, 0, 3, 2], t), {E, X}),
        "zero times a permutation": (Scaled(0.0, sm.Permutation(swap, t)), {E, X}),
        "scaled monarch product": (0.5 * (monarch @ sm.Dense(arr(9, 9, dtype=t))), few),
        "scaled direct sum": (-0.5 * sm.block_diag(dense, sm.Diagonal(v)), {X}),
        "product": (Product(monarch, sm.Permutation.random(9, dtype=t, rng=0), sm.Dense(arr(9, 9, dtype=t))), few),
        "permuted dense": (Product(sm.Permutation(swap[:5], t), dense, sm.Permutation([4, 0, 1, 2, 3], t)), {E, X}),
        "narrow product": (Product(sm.Dense(arr(6, 3, dtype=t)), sm.Dense(arr(3, 6, dtype=t))), few),
        "wide product": (Product(sm.Dense(arr(3, 6, dtype=t)), sm.Dense(arr(6, 3, dtype=t))), {S, "solve", *few}),
        "kronecker": (sm.Kronecker(*(arr(n, n, dtype=t, seed=n) for n in (2, 3, 4))), {X}),
        "kronecker of one": (sm.Kronecker(arr(3, 3, dtype=t)), {X}),
        "kronecker of operators": (
            sm.Kronecker(sm.Diagonal(v[:3]), sm.BlockDiagonal(arr(2, 2, 2, dtype=t)), sm.Identity(2, t)),
            {X},
        ),
        "kronecker with permutation": (sm.Kronecker(sm.Permutation([1, 0, 2], t), dense), {E, X}),
        "rectangular kronecker": (sm.Kronecker(arr(2, 3, dtype=t), arr(3, 2, dtype=t, seed=1)), {E, X}),
        "rectangular kronecker of three": (
            sm.Kronecker(arr(4, 2, dtype=t), sm.Diagonal(v[:3]), sm.LowRank(arr(1, 1, dtype=t), arr(1, 2, dtype=t))),
            {E, X},
        ),
        "kronecker with a wider first": (sm.Kronecker(arr(2, 4, dtype=t), arr(2, 1, dtype=t)), {E, X}),
        "singular kronecker": (sm.Kronecker(np.ones((2, 2), t), arr(3, 3, dtype=t)), {X}),
        "block diagonal": (sm.BlockDiagonal(arr(3, 2, 2, dtype=t)), none),
        "padded block diagonal": (sm.BlockDiagonal.random((7, 7), blocks=2, dtype=t, rng=0), none),
        "block diagonal padded by a block": (sm.BlockDiagonal(arr(4, 3, 3, dtype=t), (7, 7)), none),
        "block diagonal of wide blocks": (sm.BlockDiagonal(arr(3, 2, 4, dtype=t), (6, 6)), {E, X}),
        "one big block": (sm.BlockDiagonal(arr(2, 5, 4, dtype=t), (3, 3)), none),
        "strided factor": (sm.Chain([arr(2, 3, 2, 2, dtype=t)]), {E, X}),
        "padded strided factor": (sm.Chain([arr(2, 3, 2, 2, dtype=t)], (10, 10)), {S, "solve", E, X}),
        "permuted factor": (sm.Chain([arr(2, 1, 3, 3, dtype=t)], None, AxisOrder((2, 3), (1, 0))), {E, X}),
        "permuted factor transposed": (sm.Chain([arr(2, 1, 3, 3, dtype=t)], None, AxisOrder((2, 3), (1, 0))).T, {E, X}),
        "padded permuted factor": (
            sm.Chain([arr(2, 1, 3, 3, dtype=t)], (4, 4), AxisOrder((2, 3), (1, 0)), AxisOrder((3, 2), (1, 0))),
            {S, "solve", E, X},
        ),
        "monarch": (monarch, few),
        "monarch transposed": (monarch.T, few),
        "permuted monarch": (sm.Permutation(AxisOrder((3, 3), (1, 0)).permutation(), t) @ monarch, few),
        "monarch of rank 2": (sm.Monarch.random((9, 9), blocks=3, rank=2, dtype=t, rng=1), {S, "solve", *few}),
        "padded monarch": (sm.Monarch.random((11, 11), blocks=(3, 4), dtype=t, rng=1), {S, "solve", *few}),
        "block tensor train": (sm.BlockTensorTrain.random((9, 9), blocks=3, dtype=t, rng=2), few),
        "block tensor train of three": (
            sm.BlockTensorTrain.random((8, 8), cores=3, rank=2, dtype=t, rng=2),
            {S, "solve", *few},
        ),
        "butterfly": (sm.Butterfly.random((12, 12), dtype=t, rng=3), few),
        "padded butterfly": (sm.Butterfly.random((13, 13), dtype=t, rng=3), {S, "solve", *few}),
        "chain that is not chainable": (monarch @ monarch, few),
        "low rank": (low, none),
        "low rank of full rank": (sm.LowRank(arr(4, 4, dtype=t), arr(4, 4, dtype=t, seed=1)), none),
        "low rank of more than full rank": (sm.LowRank(arr(4, 6, dtype=t), arr(6, 4, dtype=t, seed=1)), {"solve"}),
        "low rank of rank 0": (sm.LowRank(arr(4, 0, dtype=t), arr(0, 4, dtype=t)), none),
        "identity plus low rank": (3.0 * sm.Identity(7, t) + low, few),
        "diagonal plus low rank": (sm.Diagonal(v) + low, few),
        "two diagonals plus low rank": (3.0 * sm.Identity(7, t) + sm.Diagonal(v) + low, few),
        "diagonal with holes plus low rank": (sm.Diagonal(holes) + low, few),
        "hollow diagonal plus low rank": (sm.Diagonal(np.where(np.arange(7) < 3, 0, v)) + low, few),
        "sum": (sm.Dense(arr(9, 9, dtype=t)) + monarch, {S, "solve", *few}),
        "kronecker sum": (kron_sum, {S, "solve", P, R, E}),
        "direct sum": (sm.block_diag(dense, sm.Diagonal(v), sm.Dense(arr(2, 2, dtype=t))), none),
        "rectangular direct sum": (sm.block_diag(arr(2, 3, dtype=t), arr(3, 2, dtype=t)), {E, X}),
        "inverse": (Inverse(sm.Dense(arr(4, 4, dtype=t))), {R, E, X}),
        "block sparse": (sm.BlockSparse(arr(3, 2, 2, dtype=t), [0, 1, 1], [1, 0, 0], (4, 4)), {S, "solve", *few}),
        "slice": (monarch[1:5, 2:6], {S, "solve", *few}),
        "external": (sm.as_operator(scipy.sparse.csr_array(arr(5, 5, dtype=t))), {S, "solve", *few}),
    }


@functools.cache
def rectangular_cases(t):
    low = sm.LowRank(arr(6, 2, dtype=t), arr(2, 9, dtype=t))
    P, R = "pinv", "svdvals"
    few = {P, R}
    none: set[str] = set()
    return {
        "zero": (sm.Zero((3, 5), t), none),
        "dense": (sm.Dense(arr(5, 3, dtype=t)), none),
        "wide dense": (sm.Dense(arr(3, 70, dtype=t)), none),
        "no columns": (sm.Dense(arr(4, 0, dtype=t)), none),
        "low rank": (low, none),
        "kronecker, wide meets tall": (sm.Kronecker(arr(3, 4, dtype=t), arr(5, 2, dtype=t)), none),
        "kronecker, all tall": (sm.Kronecker(arr(3, 2, dtype=t), arr(5, 2, dtype=t)), none),
        "kronecker, all wide": (sm.Kronecker(arr(1, 2, dtype=t), sm.BlockDiagonal(arr(2, 2, 3, dtype=t))), none),
        "kronecker, first rectangular": (sm.Kronecker(arr(4, 2, dtype=t), sm.Permutation([1, 0, 2], t)), none),
        "block diagonal": (sm.BlockDiagonal(arr(3, 2, 4, dtype=t)), none),
        "padded block diagonal": (sm.BlockDiagonal.random((7, 11), blocks=3, dtype=t, rng=0), none),
        "padded permuted factor": (
            sm.Chain([arr(2, 1, 3, 4, dtype=t)], (4, 5), AxisOrder((2, 3), (1, 0)), AxisOrder((4, 2), (1, 0))),
            none,
        ),
        "monarch": (sm.Monarch.random((12, 10), blocks=(3, 2), rank=2, dtype=t, rng=0), few),
        "prime monarch": (sm.Monarch.random((7, 13), blocks=3, dtype=t, rng=0), few),
        "block tensor train": (sm.BlockTensorTrain.random((24, 27), cores=3, rank=2, dtype=t, rng=0), few),
        "padded block tensor train": (sm.BlockTensorTrain.random((23, 29), cores=3, rank=2, dtype=t, rng=0).T, few),
        "butterfly": (sm.Butterfly.random((12, 18), dtype=t, rng=0), few),
        "direct sum": (sm.block_diag(arr(2, 3, dtype=t), sm.Diagonal(arr(4, dtype=t)), arr(3, 1, dtype=t)), none),
        "hstack": (sm.hstack([sm.Identity(4, t), sm.Dense(arr(4, 3, dtype=t))]), few),
        "vstack": (sm.vstack([sm.Identity(4, t), sm.Dense(arr(3, 4, dtype=t))]), few),
        "slice": (low[1:4, :], none),
        "scaled product": (-2.0 * (sm.Dense(arr(4, 3, dtype=t)) @ sm.Monarch.random((3, 6), rng=0)), few),
        "permuted rectangular": (Product(sm.Permutation([1, 2, 0], t), sm.Dense(arr(3, 5, dtype=t))), none),
    }


@functools.cache
def definite_cases(t):
    """Hermitian positive definite operators."""
    blocks = pd(3, 2, dtype=t)
    v = abs(arr(4)) + 0.5
    return {
        "identity": sm.Identity(3, t),
        "diagonal": sm.Diagonal(v.astype(t)),
        "dense": sm.Dense(pd(5, dtype=t)),
        "dense of size 0": sm.Dense(np.zeros((0, 0), t)),
        "block diagonal": sm.BlockDiagonal(blocks),
        "padded block diagonal": sm.BlockDiagonal(pd(3, 3, dtype=t), (7, 7)),
        "kronecker": sm.Kronecker(pd(2, dtype=t), sm.Diagonal(v.astype(t)), pd(3, dtype=t, seed=1)),
        "kronecker of two negative factors": sm.Kronecker(-pd(2, dtype=t), -pd(3, dtype=t, seed=1)),
        "direct sum": sm.block_diag(pd(2, dtype=t), sm.Diagonal(v.astype(t))),
        "scaled": 3.0 * sm.Identity(4, t),
        "scaled direct sum": 2.5 * sm.block_diag(pd(2, dtype=t), sm.Diagonal(v.astype(t))),
    }


@functools.cache
def hermitian_cases(t):
    """Indefinite ones too, with repeated eigenvalues."""
    h = pd(4, dtype=t) - 3 * np.eye(4, dtype=t)
    return definite_cases(t) | {
        "zero": sm.Zero((3, 3), t),
        "indefinite": sm.Dense(h),
        "indefinite diagonal": sm.Diagonal(np.array([1.0, -2.0, 0.0, -2.0], t)),
        "indefinite kronecker": sm.Kronecker(h, sm.Diagonal(np.array([1.0, -1.0], t))),
        "negative multiple": -1.5 * sm.block_diag(h, sm.Identity(2, t)),
    }


TYPES = (np.float64, np.complex128)
SQUARE = [pytest.param(t, k, id=f"{np.dtype(t).name}-{k}") for t in TYPES for k in square_cases(t)]
ALL = SQUARE + [pytest.param(t, "R " + k, id=f"{np.dtype(t).name}-R {k}") for t in TYPES for k in rectangular_cases(t)]


def case(t, name):
    return rectangular_cases(t)[name[2:]] if name.startswith("R ") else square_cases(t)[name]


# ---- the comparison of each function with NumPy ---------------------------------------------------------------------------


def close(x, y, tol=1e-10):
    x, y = np.asarray(x), np.asarray(y)
    assert x.shape == y.shape
    scale = max(1.0, float(np.abs(y).max(initial=0))) if np.isfinite(y).all() else 1.0
    np.testing.assert_allclose(x, y, rtol=tol, atol=tol * scale)


def rank(d):
    return int(np.linalg.matrix_rank(d)) if d.size else 0


def check_slogdet(a, d, tol=1e-10):
    sign, log = sla.slogdet(a)
    assert sign.dtype == a.dtype
    assert log.dtype == np.abs(sign).dtype
    if sign == 0:
        assert log == -np.inf
        assert rank(d) < d.shape[0]
    elif rank(d) < d.shape[0]:  # LAPACK on a singular block: NumPy's sign is noise as well
        assert log < np.log(np.abs(d).max()) * d.shape[0] - 25
    else:
        want = np.linalg.slogdet(d)
        close(sign, want.sign, tol)
        close(log, want.logabsdet, tol)
    close(sla.det(a), np.linalg.det(d), tol)


def check_trace(a, d, tol=1e-10):
    close(sla.trace(a), np.linalg.trace(d), tol)


def check_diagonal(a, d, tol=1e-10):
    close(sla.diagonal(a), np.linalg.diagonal(d), tol)


def check_svdvals(a, d, tol=1e-10):
    got = sla.svdvals(a)
    assert got.dtype == np.abs(d).dtype
    close(got, np.linalg.svdvals(d), tol)


def check_norm(a, d, tol=1e-10, orders=NORMS):
    for ord in orders:
        close(sla.norm(a, ord), np.linalg.norm(d, ord) if d.size else 0.0, tol)


def check_cond(a, d, tol=1e-8):
    if 0 in d.shape:
        with pytest.raises(LinAlgError, match="empty"):
            sla.cond(a)
        return
    got, want = sla.cond(a), np.linalg.cond(d)
    assert got.dtype == np.abs(d).dtype
    if want > 1e12:
        assert got > 1e12
    else:
        np.testing.assert_allclose(got, want, rtol=tol)


def check_matrix_rank(a, d):
    assert sla.matrix_rank(a) == rank(d)


def matched(x, y):
    """Eigenvalues in the order that pairs them best."""
    from scipy.optimize import linear_sum_assignment

    i, j = linear_sum_assignment(abs(np.asarray(x)[:, None] - np.asarray(y)[None, :]))
    return np.asarray(x)[i], np.asarray(y)[j]


def check_eigvals(a, d, tol=1e-7):
    got = sla.eigvals(a)
    assert got.shape == d.shape[:1]
    if rank(d) < d.shape[0]:  # zero is a defective eigenvalue in some of these cases: sensitive as sqrt(eps)
        tol = 1e-6
    close(*matched(got, np.linalg.eigvals(d)), tol)


def check_eigh(a, d, tol=1e-10):
    w, v = sla.eigh(a)
    close(w, np.linalg.eigvalsh(d), tol)
    close(sla.eigvalsh(a), w, tol)
    v = v.to_dense()
    assert v.dtype == a.dtype
    close(v.conj().T @ v, np.eye(d.shape[0]), tol)
    close(d @ v, v * w, tol)


def check_cholesky(a, d, tol=1e-10):
    factor = sla.cholesky(a)
    assert isinstance(factor, Operator)
    close(factor.to_dense(), np.linalg.cholesky(d), tol)


def check_pinv(a, d, tol=1e-9):
    p = sla.pinv(a)
    assert p.shape == d.shape[::-1]
    assert p.dtype == a.dtype
    close(p.to_dense(), np.linalg.pinv(d, rtol=None) if d.size else d.T, tol)


def check_solve(a, d, tol=1e-7):
    n = d.shape[0]
    if rank(d) < n:
        return
    for b in (arr(n, seed=7), arr(n, 3, dtype=complex, seed=8), arr(2, n, 1, seed=9)):
        x = sla.solve(a, b)
        assert x.shape == b.shape
        assert x.dtype == np.result_type(a.dtype, b.dtype)
        close(d @ x, b, tol)
        close(x, np.linalg.solve(d, b), 1e-5)


def check_lstsq(a, d, tol=1e-7):
    for b in (arr(d.shape[0], seed=7), arr(d.shape[0], 3, seed=8)):
        x, residuals, r, s = sla.lstsq(a, b)
        close(x, np.linalg.pinv(d, rtol=None) @ b if d.size else np.zeros(d.shape[1:] + b.shape[1:]), tol)
        close(residuals, (abs(d @ x - b) ** 2).sum(axis=0), tol)
        if r is not None:
            assert r == rank(d)
            close(s, np.linalg.svdvals(d))


def check_expm(a, d, tol=1e-9):
    close(sla.expm(a).to_dense(), scipy.linalg.expm(d) if d.size else d, tol)


CHECKS = {
    "slogdet": check_slogdet,
    "trace": check_trace,
    "diagonal": check_diagonal,
    "svdvals": check_svdvals,
    "eigvals": check_eigvals,
    "eigh": check_eigh,
    "cond": check_cond,
    "matrix_rank": check_matrix_rank,
    "norm": check_norm,
    "solve": check_solve,
    "pinv": check_pinv,
    "lstsq": check_lstsq,
    "cholesky": check_cholesky,
    "expm": check_expm,
}


def compare(name, a, unknown=frozenset()):
    """The check, or the promised NotImplementedError that names the function and the way out."""
    if name in unknown:
        function = getattr(sla, name)
        with pytest.raises(NotImplementedError, match=r"to_dense\(\)"):
            function(a)
    else:
        CHECKS[name](a, a.to_dense())


@pytest.mark.parametrize(("t", "name"), ALL)
@pytest.mark.parametrize("function", ["trace", "diagonal", "svdvals", "norm", "pinv", "matrix_rank", "cond", "lstsq"])
def test_any_operator(function, t, name):
    a, unknown = case(t, name)
    missing = "svdvals" in unknown
    if function == "norm" and missing:
        check_norm(a, a.to_dense(), orders=("fro", 1, 2, np.inf))
        with pytest.raises(NotImplementedError, match=r"to_dense\(\)"):
            sla.norm(a, "nuc")
    elif function == "cond" and isinstance(a, Inverse):
        with pytest.raises(NotImplementedError, match=r"to_dense\(\)"):
            sla.svdvals(a)
        check_cond(a, a.to_dense())
    else:
        also = {"matrix_rank", "cond"} if missing else set()
        compare(function, a, unknown | also)


@pytest.mark.parametrize(("t", "name"), SQUARE)
@pytest.mark.parametrize("function", ["slogdet", "solve", "eigvals", "expm"])
def test_square_operator(function, t, name):
    a, unknown = case(t, name)
    if function == "solve":
        check_solve(a, a.to_dense())  # GMRES where no rule exists
    else:
        compare(function, a, unknown)


@pytest.mark.parametrize("t", TYPES)
@pytest.mark.parametrize("name", hermitian_cases(float))
def test_eigh(t, name):
    compare("eigh", hermitian_cases(t)[name])


@pytest.mark.parametrize("t", TYPES)
@pytest.mark.parametrize("name", definite_cases(float))
def test_cholesky(t, name):
    compare("cholesky", definite_cases(t)[name])


@pytest.mark.parametrize("name", [k for k in square_cases(float) if "wide product" not in k])
def test_singular_systems_raise(name):
    a, unknown = square_cases(float)[name]
    d = a.to_dense()
    if "solve" in unknown or rank(d) == d.shape[0]:
        return
    if isinstance(a, (sm.Dense, Product)) or name == "singular kronecker":  # the pivot may be rounding, as with NumPy
        return
    with pytest.raises(LinAlgError):
        sla.solve(a, np.ones(d.shape[0]))


@pytest.mark.parametrize("t", [np.float32, np.complex64])
@pytest.mark.parametrize("function", ["slogdet", "trace", "diagonal", "svdvals", "norm", "solve", "pinv"])
def test_single_precision(function, t):
    for name, (a, unknown) in square_cases(t).items():
        d = a.to_dense()
        wide = np.complex128 if np.dtype(t).kind == "c" else np.float64
        if function in unknown or (function == "norm" and "svdvals" in unknown) or name in ("inverse", "sum"):
            continue
        assert d.dtype == t, name
        if function == "solve":
            if rank(d) == len(d) and np.linalg.cond(d) < 100 if d.size else True:
                b = np.ones(len(d), t)
                x = sla.solve(a, b)
                assert x.dtype == t, name
                close(d @ x, b, 1e-3)
        elif function == "slogdet":
            sign, log = sla.slogdet(a)
            assert (sign.dtype, log.dtype) == (t, np.dtype(t).type(0).real.dtype), name
            want = np.linalg.slogdet(d.astype(wide))
            if sign != 0 and rank(d) == len(d):
                close(log, want.logabsdet, 1e-4)
                close(sign, want.sign, 1e-4)
        elif function == "pinv":
            assert sla.pinv(a).dtype == t, name
            close(sla.pinv(a).to_dense(), np.linalg.pinv(d.astype(wide), rtol=1e-5) if d.size else d, 1e-2)
        else:
            CHECKS[function](a, d, tol=2e-5)
            assert getattr(sla, function)(a).dtype in (t, np.dtype(t).type(0).real.dtype), name


# ---- rules: none without a case ---------------------------------------------------------------------------------------------


def candidates_for_rules():
    operators = []
    for t in TYPES:
        operators += [a for a, _ in square_cases(t).values()]
        operators += [a for a, _ in rectangular_cases(t).values()]
        operators += list(hermitian_cases(t).values())
    operators.append(Inverse(sm.Monarch.random((9, 9), blocks=3, rng=0)))
    operators.append(Inverse(sm.Kronecker(arr(2, 2), arr(3, 3))))
    return operators


RULES = [
    pytest.param(key, f, id=f"{key[0]}-{key[1].__name__}-{f.__name__}")
    for key, functions in rules.TABLE.items()
    if key[0] in CHECKS
    for f in functions
]


def test_every_function_of_linalg_is_in_the_table():
    assert {key[0] for key in rules.TABLE} >= set(CHECKS)
    own = {key[0] for key, fs in rules.TABLE.items() if any(f.__module__.startswith("structmat.linalg") for f in fs)}
    assert own == set(CHECKS)
    assert own <= set(rules.FALLBACKS)


@pytest.fixture(scope="module")
def operators():
    return candidates_for_rules()


def arguments(operation, a):
    b = np.ones((a.shape[0], 2), a.dtype)
    return {"solve": (b,), "lstsq": ((b, None),), "norm": ("fro",)}.get(operation, ())


@pytest.mark.parametrize(("key", "function"), RULES)
def test_every_rule_has_a_case_that_it_answers(key, function, operators):
    operation, left, _ = key
    answered = 0
    for a in operators:
        if not isinstance(a, left) or 0 in a.shape or (operation not in NOT_SQUARE and not a.is_square):
            continue
        if function not in rules.candidates(operation, type(a)):
            continue
        before = pickle.dumps(a)
        try:
            for f in rules.candidates(operation, type(a)):
                result = f(a, *arguments(operation, a))
                if result is not NotImplemented:
                    break
        except NotImplementedError:
            continue
        except LinAlgError:
            result = None
        if f is not function:
            continue
        if result is not NotImplemented:
            answered += 1
            if result is None:
                assert operation in ("solve", "cholesky", "eigh")
                if operation == "solve":
                    assert rank(a.to_dense()) < a.shape[0]
            elif operation == "norm":
                check_norm(a, a.to_dense(), orders=("fro", 1, np.inf))
            else:
                CHECKS[operation](a, a.to_dense())
            assert pickle.dumps(a) == before
    assert answered, f"no case for the rule {function.__name__} of {operation} for {left.__name__}"


NOT_SQUARE = {"trace", "diagonal", "svdvals", "norm", "pinv", "lstsq", "cond", "matrix_rank"}


def test_a_subclass_takes_the_rules_of_its_family():
    class Mine(sm.Kronecker):
        __slots__ = ()

    a = Mine(arr(2, 2), arr(3, 3))
    check_slogdet(a, np.asarray(a))


# ---- faults of other libraries (operator-algebra.md, section 2.1) ------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("c", [2.0, -2.0, 0.5, -0.25, 2j, -1 + 1j, 0.0, 3])
def test_v1_slogdet_of_a_scaled_operator(n, c):
    a = arr(n, n) + 2 * np.eye(n)
    p = np.roll(np.arange(n), 1)
    for op in (sm.Identity(n), sm.Dense(a), sm.Permutation(p), sm.Diagonal(a[0]), sm.Kronecker(a, sm.Identity(2))):
        for scaled in (c * op, Scaled(c, op)):
            check_slogdet(scaled, c * op.to_dense())
    assert sla.slogdet(2.0 * sm.Identity(3)).logabsdet == pytest.approx(3 * np.log(2))


def test_v2_slogdet_sign_of_permutations_and_random_matrices():
    for seed in range(40):
        check_slogdet(sm.Permutation.random(6, rng=seed), np.eye(6)[rng(seed).permutation(6)])
        check_slogdet(sm.Dense(arr(4, 4, seed=seed)), arr(4, 4, seed=seed))
    assert sla.slogdet(sm.Permutation([1, 0, 2])).sign == -1
    assert sla.det(sm.Permutation([1, 2, 0])) == 1


def test_v2_parity_of_axis_orders():
    seen = set()
    for radices in [(2, 3), (2, 2), (3, 3), (2, 6), (2, 3, 2), (3, 2, 3), (2, 2, 2, 3), (1, 3, 2), (5, 3, 2)]:
        for seed in range(6):
            order = AxisOrder(radices, tuple(int(i) for i in rng(seed).permutation(len(radices))))
            sign = round(np.linalg.det(np.eye(order.size)[order.permutation()]))
            assert (-1) ** order_parity(order) == sign
            seen.add(sign)
    assert seen == {1, -1}


def test_v2_sign_of_a_chain_with_an_odd_axis_order():
    seen = set()
    for f in (2, 3, 4, 5):
        a = sm.BlockTensorTrain.random((f * f, f * f), blocks=f, rng=f)
        check_slogdet(a, a.to_dense())
        blocks = np.prod([np.linalg.slogdet(x).sign.prod() for x in a.factors])
        seen.add(sla.slogdet(a).sign * blocks)
    assert seen == {1.0, -1.0}  # the order's own sign is not left out


def test_v3_slogdet_of_small_determinants():
    sign, log = sla.slogdet(0.5 * sm.Identity(50))
    assert (sign, log) == (1, pytest.approx(-34.657359))
    for a in (sm.Kronecker(0.1 * arr(3, 3), 0.1 * arr(4, 4)), 0.01 * sm.Monarch.random((9, 9), blocks=3, rng=0)):
        assert sla.slogdet(a).logabsdet < 0
        check_slogdet(a, a.to_dense())


@pytest.mark.parametrize("t", [*TYPES, np.float32])
def test_v4_slogdet_of_singular_operators(t):
    v = np.array([1.0, 0.0, -2.0], t)
    for a in (
        sm.Diagonal(v),
        sm.Zero((3, 3), t),
        sm.Kronecker(sm.Diagonal(v), arr(2, 2, dtype=t)),
        sm.block_diag(sm.Diagonal(v), arr(2, 2, dtype=t)),
        sm.LowRank(arr(3, 1, dtype=t), arr(1, 3, dtype=t)),
        sm.Kronecker(arr(2, 3, dtype=t), arr(3, 2, dtype=t)),
        sm.BlockDiagonal(np.zeros((2, 2, 2), t)),
    ):
        sign, log = sla.slogdet(a)
        assert sign == 0
        assert log == -np.inf
        assert sla.det(a) == 0


@pytest.mark.parametrize("t", TYPES)
def test_v5_slogdet_of_a_kronecker_that_is_not_definite(t):
    for seed in range(10):
        a = sm.Kronecker(arr(3, 3, dtype=t, seed=seed), arr(4, 4, dtype=t, seed=seed + 50))
        check_slogdet(a, a.to_dense())
    indefinite = sm.Kronecker(np.diag([1.0, -1.0]), pd(3))
    with pytest.raises(LinAlgError):
        sla.cholesky(indefinite)


@pytest.mark.parametrize("t", TYPES)
def test_v6_singular_values_without_symmetry(t):
    symmetric = arr(4, 4, dtype=t) + arr(4, 4, dtype=t).T
    for d in (arr(4, 4, dtype=t), symmetric, arr(3, 5, dtype=t), arr(5, 3, dtype=t)):
        check_svdvals(sm.Dense(d), d)
        check_svdvals(sm.Kronecker(d, symmetric), np.kron(d, symmetric))
        check_pinv(sm.Dense(d), d)
    with pytest.raises(LinAlgError, match="Hermitian"):
        sla.eigh(sm.Dense(arr(4, 4, dtype=t)))


def test_v7_diagonal_of_rectangular_kronecker_factors():
    a, b, c = arr(2, 3), arr(3, 2, seed=1), arr(5, 2, seed=2)
    for factors in (
        (a, b),
        (b, a),
        (np.eye(2), a),
        (a, np.eye(2)),
        (a, b, np.eye(2)),
        (np.eye(2), a, b),
        (a, c),
        (c, a),
        (a, np.eye(2), c),
    ):
        k = sm.Kronecker(*factors)
        d = k.to_dense()
        close(d, np.kron(np.kron(*factors[:2]), factors[2]) if len(factors) == 3 else np.kron(*factors))
        close(sla.diagonal(k), np.diagonal(d))
        close(sla.trace(k), np.trace(d))
        if k.is_square:
            assert sla.slogdet(k) == (0, -np.inf)
            with pytest.raises(LinAlgError):
                sla.inv(k)
            with pytest.raises(LinAlgError):
                sla.solve(k, np.ones(d.shape[0]))


def test_v7_singular_values_are_padded_where_wide_meets_tall():
    k = sm.Kronecker(arr(3, 4), arr(5, 2))
    values = sla.svdvals(k)
    assert values.shape == (8,)
    assert (values[:6] > 1e-3).all()
    assert (values[6:] == 0).all()
    assert sla.cond(k) == np.inf
    assert sla.matrix_rank(k) == 6


def test_v8_diagonal_of_rectangular_blocks():
    blocks = arr(2, 3, 2)
    for a in (
        sm.BlockDiagonal(blocks),
        sm.BlockDiagonal(blocks.swapaxes(1, 2)),
        sm.block_diag(arr(2, 3), arr(3, 2)),
        sm.block_diag(arr(3, 2), arr(3, 4)),
    ):
        check_diagonal(a, a.to_dense())
        check_trace(a, a.to_dense())


def test_v9_pinv_of_a_diagonal_with_zeros():
    v = np.array([2.0, 0.0, -4.0, 1e-18])
    p = sla.pinv(sm.Diagonal(v))
    assert isinstance(p, sm.Diagonal)
    assert p.values.tolist() == [0.5, 0.0, -0.25, 0.0]
    assert sla.pinv(sm.Diagonal([2.0, 1e-3]), rtol=1e-2).values.tolist() == [0.5, 0.0]
    assert sla.pinv(sm.Diagonal([0.0, 0.0])).values.tolist() == [0.0, 0.0]


def test_v10_factorwise_functions_of_a_kronecker():
    one = sm.Kronecker([[-1.0]], [[-1.0]])
    assert sla.cholesky(one).to_dense().tolist() == [[1.0]]
    a = sm.Kronecker(-pd(2), -pd(3))
    check_cholesky(a, a.to_dense())
    check_cholesky(sm.Kronecker(1j * pd(2), -1j * pd(3)), np.kron(pd(2), pd(3)).astype(complex))
    with pytest.raises(LinAlgError):
        sla.cholesky(sm.Kronecker(-pd(2), pd(3)))
    with pytest.raises(LinAlgError):
        sla.cholesky(sm.Kronecker(1j * pd(2), pd(3)))
    with pytest.raises(NotImplementedError):  # exp(A (x) B) is not exp(A) (x) exp(B)
        sla.expm(sm.Kronecker(arr(2, 2), arr(2, 2)))


@pytest.mark.parametrize("v", [[-1.0, 2.0, -3.0], [1j, -2.0, 1 - 1j], [-1.0]])
def test_v11_negative_and_complex_diagonals(v):
    a, n = sm.Diagonal(v), len(v)
    for op in (a, sm.Kronecker(a, a), sm.block_diag(a, [[2.0]]), a + sm.LowRank(arr(n, 1), arr(1, n))):
        check_slogdet(op, op.to_dense())
        check_solve(op, op.to_dense())
        check_trace(op, op.to_dense())
    with pytest.raises(LinAlgError):
        sla.cholesky(a)


def test_v14_condition_number_is_a_ratio_of_singular_values():
    d = arr(12, 12)
    assert abs(np.linalg.eigvals(d).imag).max() > 0.1
    for a in (sm.Dense(d), sm.Kronecker(d, arr(3, 3)), sm.block_diag(d, arr(3, 3), [[5.0]])):
        check_cond(a, a.to_dense())
    for p in (1, np.inf, "fro", 2, None):
        for a in (sm.Dense(d), sm.Kronecker(d, arr(2, 2)), sm.Monarch.random((9, 9), blocks=3, rng=0)):
            if p in (2, None) and isinstance(a, sm.Monarch):
                continue
            np.testing.assert_allclose(sla.cond(a, p), np.linalg.cond(a.to_dense(), p), rtol=1e-8)
    assert sla.cond(sm.Diagonal([1.0, 0.0]), 1) == np.inf
    assert sla.cond(sm.Diagonal([1.0, 0.0])) == np.inf
    assert sla.cond(sm.Zero((2, 2))) == np.inf
    assert sla.cond(sm.Kronecker(arr(2, 3), arr(5, 2))) == np.inf
    with pytest.raises(LinAlgError, match="square"):
        sla.cond(sm.Dense(arr(2, 3)), 1)
    with pytest.raises(LinAlgError):  # not inf for the regular one
        sla.cond(sm.Dense(np.stack([np.eye(2), np.zeros((2, 2))])), 1)


@pytest.mark.parametrize(
    ("t", "tol"), [(np.float64, 1e-10), (np.complex128, 1e-10), (np.float32, 1e-4), (np.complex64, 1e-4)]
)
def test_v20_spectral_norm_keeps_the_stated_tolerance(t, tol):
    assert "1e-10 (float64) or 1e-4 (float32)" in " ".join(sla.norm.__doc__.split())
    hard = np.linspace(1, 1.001, 80)  # a cluster: power iteration would need thousands of steps
    near = (sm.Diagonal(hard.astype(t)) @ sm.Monarch.random((80, 90), rng=0, dtype=t)) + sm.Zero((80, 90), t)
    rotation = sm.Dense(np.linalg.qr(arr(80, 80, dtype=t))[0])
    clustered = Product(rotation, sm.Diagonal(hard.astype(t)), sm.Butterfly.random((80, 80), rng=1, dtype=t) @ rotation)
    exact = Product(rotation, sm.Diagonal(hard.astype(t)), rotation)
    for a in (near, clustered, exact, sm.Butterfly.random((100, 100), rng=0, dtype=t)):
        with pytest.raises(NotImplementedError):
            sla.svdvals(a)
        d = a.to_dense()
        want = np.linalg.norm(d.astype(np.complex128), 2)
        assert abs(sla.norm(a, 2) - want) <= tol * want


def test_the_spectral_norm_of_a_hidden_zero():
    a = sm.Dense(arr(70, 70))
    zero = Sum(a, sm.Dense(-a.array))
    assert sla.norm(zero, 2) == 0


# ---- numerics ---------------------------------------------------------------------------------------------------------------


def test_frobenius_norm_of_cancelling_low_rank_terms():
    u, v = 1e3 * arr(50, 3), 1e3 * arr(3, 40)
    a = sm.LowRank(u, v) + sm.LowRank(-u, v)
    assert sla.norm(a) < 1e-7  # a Gram matrix would leave sqrt(eps) * 1e6


def test_determinant_lemma_with_tiny_and_missing_diagonal_entries():
    u, v = arr(6, 2), arr(2, 6)
    for d in (
        [1e-300, 1, 2, 3, 4, 5],
        [1e-18, 1e-18, 2, 3, 4, 5],
        [0, 0, 2, 3, 4, 5],
        [0, 1, 2, -3, 4, 5],
        [1, 2, 3, 4, 5, 6],
    ):
        a = sm.Diagonal(np.array(d, float)) + sm.LowRank(u, v)
        np.testing.assert_allclose(sla.det(a), np.linalg.det(a.to_dense()), rtol=1e-9)
    assert sla.slogdet(sm.Diagonal([0.0, 0, 0, 1, 1, 1]) + sm.LowRank(u, v)) == (0, -np.inf)
    wide = sm.LowRank(arr(3, 5), arr(5, 3))
    check_slogdet(sm.Diagonal([0.0, 0.0, 1.0]) + wide, np.diag([0.0, 0, 1]) + wide.to_dense())


def test_solving_is_backward_stable_where_an_explicit_inverse_is_not():
    d = np.linalg.qr(arr(12, 12))[0] @ np.diag(np.logspace(0, -12, 12)) @ np.linalg.qr(arr(12, 12, seed=1))[0]
    for a in (
        sm.Dense(d),
        sm.BlockDiagonal(np.stack([d, d])),
        sm.Kronecker(sm.Identity(2), d),
        sm.block_diag(d, np.eye(2)),
    ):
        b = a @ np.ones(a.shape[0])
        x = sla.solve(a, b)
        assert np.linalg.norm(a @ x - b) < 1e-14 * np.linalg.norm(x) * 10


def test_eigh_of_a_kronecker_of_skew_factors_is_refused_not_wrong():
    skew = np.array([[0.0, 1.0], [-1.0, 0.0]])
    with pytest.raises(NotImplementedError, match="factors are not"):
        sla.eigh(sm.Kronecker(skew, skew))
    with pytest.raises(LinAlgError):
        sla.eigh(sm.Kronecker(skew, pd(2)))
    with pytest.raises(LinAlgError):
        sla.eigh(sm.Diagonal([1j, 1.0]))


def test_pinv_of_blocks_uses_one_cutoff():
    blocks = np.stack([np.eye(2), 1e-20 * np.eye(2)])
    for a in (sm.BlockDiagonal(blocks), sm.block_diag(sm.Identity(2), 1e-20 * np.eye(2))):
        close(sla.pinv(a).to_dense(), np.linalg.pinv(a.to_dense(), rtol=None))


def test_padding_does_not_leak():
    a = sm.BlockDiagonal(1e6 * arr(2, 4, 4), (5, 5))
    b = sm.Monarch(1e6 * arr(3, 4, 4), 1e6 * arr(4, 3, 3), (10, 11))
    for x in (a, b):
        check_norm(x, x.to_dense(), orders=("fro", 1, np.inf))
    check_svdvals(a, a.to_dense())
    check_pinv(a, a.to_dense())


def test_structure_survives():
    assert type(sla.pinv(sm.LowRank.random((8, 6), rank=2, rng=0))) is sm.LowRank
    assert type(sla.pinv(sm.BlockDiagonal(arr(2, 2, 3)))) is sm.BlockDiagonal
    assert type(sla.pinv(sm.Kronecker(arr(2, 3), arr(4, 1)))) is sm.Kronecker
    assert type(sla.cholesky(sm.BlockDiagonal(pd(3, 2)))) is sm.BlockDiagonal
    assert type(sla.inv(sm.Kronecker(arr(2, 2), arr(3, 3)))) is sm.Kronecker


class Counting(Operator):
    """A dense matrix that records how many columns it is applied to."""

    __slots__ = ("array", "widths")
    fields = ("array", "widths")

    def __init__(self, array, widths):
        self._init(array.shape, array.dtype, "numpy", "cpu", array=array, widths=widths)

    def _matmat(self, x):
        self.widths.append(x.shape[-1])
        return self.array @ x

    def _transpose(self):
        return Counting(self.array.T, self.widths)


@pytest.mark.parametrize("shape", [(150, 130), (70, 200)])
def test_unit_columns_come_in_chunks(shape):
    d = arr(*shape)
    for function in (sla.trace, sla.diagonal, *(lambda a, p=p: sla.norm(a, p) for p in ("fro", 1, np.inf))):
        a = Counting(d, [])
        function(a)
        assert max(a.widths) <= 64
        assert sum(a.widths) <= shape[1]
    a = Counting(d, [])
    check_trace(a, d)
    check_diagonal(a, d)
    check_norm(a, d, orders=("fro", 1, 2, np.inf))


# ---- batches, libraries, errors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", TYPES)
def test_batched_operators(t):
    def stack(*shape, seed=0):
        return arr(4, *shape, dtype=t, seed=seed)

    low = sm.LowRank(stack(3, 2), stack(2, 3))
    cases = [
        sm.Dense(stack(3, 3)),
        sm.Diagonal(stack(3)),
        sm.Kronecker(stack(2, 2), arr(3, 3, dtype=t)),
        sm.Kronecker(arr(2, 2, dtype=t), sm.Diagonal(stack(3)), stack(2, 2)),
        sm.BlockDiagonal(stack(2, 3, 3)),
        sm.BlockDiagonal(stack(2, 3, 3), (5, 5)),
        sm.Monarch(stack(3, 3, 3), arr(3, 3, 3, dtype=t)),
        low,
        Scaled(2.0, sm.Dense(stack(3, 3))),
        Product(sm.Dense(stack(3, 3)), sm.Permutation([1, 0, 2], t)),
        sm.block_diag(sm.Dense(stack(2, 2)), sm.Identity(2, t)),
        2.0 * sm.Identity(3, t) + low,
        sm.Zero((4, 3, 3), t),
    ]
    for a in cases:
        d = a.to_dense()
        assert d.shape[0] == 4
        sign, log = sla.slogdet(a)
        want = np.linalg.slogdet(d)
        regular = np.linalg.matrix_rank(d) == d.shape[-1]
        close(np.where(regular, sign, 0), np.where(regular, want.sign, 0))
        close(np.where(regular, log, 0), np.where(regular, want.logabsdet, 0))
        assert (sign.shape, log.shape) == ((4,), (4,))
        close(sla.diagonal(a), np.linalg.diagonal(d))
        close(sla.trace(a), np.linalg.trace(d))
        for p in ("fro", 1, np.inf):
            close(sla.norm(a, p), np.linalg.norm(d, p, axis=(-2, -1)))
        if not isinstance(a, (sm.Monarch, Sum)):
            close(sla.svdvals(a), np.linalg.svdvals(d))
            close(sla.norm(a, 2), np.linalg.norm(d, 2, axis=(-2, -1)))
            close(sla.matrix_rank(a), np.linalg.matrix_rank(d))
        if regular.all():
            for b in (arr(d.shape[-1]), arr(d.shape[-1], 2), arr(4, d.shape[-1], 2), arr(5, 1, d.shape[-1], 2)):
                rhs = np.broadcast_to(b[:, None], (d.shape[-1], 1)) if b.ndim == 1 else b
                x = np.linalg.solve(d, rhs) if b.ndim != 1 else np.linalg.solve(d, rhs)[..., 0]
                close(sla.solve(a, b), x, 1e-8)
        if isinstance(a, (sm.Dense, sm.Diagonal, sm.LowRank, sm.Kronecker, sm.BlockDiagonal)):
            close(sla.pinv(a).to_dense(), np.linalg.pinv(d, rtol=None), 1e-9)
            close(
                sla.lstsq(a, np.ones(d.shape[-1])).solution, np.linalg.pinv(d, rtol=None) @ np.ones(d.shape[-1]), 1e-9
            )
    stacked = pd(4, 3, dtype=t)
    w, v = sla.eigh(sm.Dense(stacked))
    close(w, np.linalg.eigvalsh(stacked))
    close(stacked @ v.to_dense(), v.to_dense() * w[:, None, :])
    close(sla.cholesky(sm.Dense(stacked)).to_dense(), np.linalg.cholesky(stacked))
    with pytest.raises(NotImplementedError, match="batches"):
        sla.eigh(sm.BlockDiagonal(stacked[:, None]))


def test_torch_operators():
    torch = pytest.importorskip("torch")
    for name, (a, unknown) in square_cases(np.float64).items():
        if name in ("external", "inverse") or a.shape[0] == 0:
            continue
        b = a.to("torch") if a.kind else a.astype(torch.float64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch's remark on arrays that are not writable
            for function in ("slogdet", "trace", "diagonal", "svdvals"):
                if function in unknown:
                    continue
                got, want = getattr(sla, function)(b), getattr(sla, function)(a)
                for x, y in zip(got, want, strict=True) if function == "slogdet" else ((got, want),):
                    assert isinstance(x, torch.Tensor), (name, function)
                    assert x.dtype == torch.float64
                    if not (function == "slogdet" and rank(a.to_dense()) < len(a.to_dense())):
                        close(x.numpy(), y)
            for p in ("fro", 1, np.inf, 2):
                got = sla.norm(b, p)
                assert isinstance(got, torch.Tensor), (name, p)
                close(got.numpy(), sla.norm(a, p))
            if "solve" not in unknown and rank(a.to_dense()) == len(a.to_dense()):
                close(
                    sla.solve(b, torch.ones(a.shape[0], dtype=torch.float64)).numpy(),
                    sla.solve(a, np.ones(a.shape[0])),
                    1e-8,
                )
            if "pinv" not in unknown:
                close(
                    np.asarray(sla.pinv(b).to("numpy").to_dense()) if sla.pinv(b).kind else np.asarray(sla.pinv(b)),
                    sla.pinv(a).to_dense(),
                    1e-8,
                )


def test_torch_errors_and_gradients():
    torch = pytest.importorskip("torch")
    with pytest.raises(LinAlgError):
        sla.solve(sm.Dense(torch.zeros(2, 2)), torch.ones(2))
    with pytest.raises(LinAlgError):
        sla.cholesky(sm.Dense(-torch.eye(2)))
    with pytest.raises(TypeError, match="numpy array"):
        sla.solve(sm.Dense(torch.eye(2)), np.ones(2))
    big = sm.Monarch.random((80, 80), dtype=torch.float64, rng=0)
    with pytest.raises(NotImplementedError, match="numpy"):
        sla.norm(big, 2)
    x = torch.tensor(pd(3), requires_grad=True)
    sla.slogdet(sm.Kronecker(x, torch.eye(2, dtype=torch.float64))).logabsdet.backward()
    close(x.grad.numpy(), 2 * np.linalg.inv(pd(3)).T)
    y = torch.tensor(arr(2, 2, 2), requires_grad=True)
    sla.norm(sm.BlockDiagonal(y)).backward()
    close(y.grad.numpy(), arr(2, 2, 2) / np.linalg.norm(arr(2, 2, 2)))


def test_mixed_dtypes_promote():
    a = sm.Kronecker(arr(2, 2, dtype=np.float32), arr(3, 3, dtype=np.complex128))
    check_slogdet(a, a.to_dense())
    b = sm.LowRank(arr(4, 2, dtype=np.float32), arr(2, 4))
    check_svdvals(b, b.to_dense())
    assert sla.solve(sm.Dense(arr(3, 3, dtype=np.float32)), np.ones(3)).dtype == np.float64
    assert sla.solve(sm.Dense(arr(3, 3, dtype=np.float32)), np.ones(3, np.float32)).dtype == np.float32
    assert sla.solve(sm.Dense(arr(3, 3)), [1, 2, 3]).dtype == np.float64
    chain = sm.Chain([arr(1, 3, 3, 2, dtype=np.float32), arr(2, 1, 3, 5, dtype=complex)])
    check_norm(chain, chain.to_dense(), tol=1e-6, orders=("fro", 1, np.inf))
    check_diagonal(chain, chain.to_dense())


SQUARE_ONLY = ["slogdet", "det", "eigvals", "eigh", "eigvalsh", "inv", "cholesky", "expm"]


@pytest.mark.parametrize("function", SQUARE_ONLY)
def test_square_functions_refuse_rectangular_operators(function):
    with pytest.raises(LinAlgError, match=r"square.*\(2, 3\)"):
        getattr(sla, function)(sm.Dense(arr(2, 3)))


@pytest.mark.parametrize(
    "function", [*SQUARE_ONLY, "trace", "diagonal", "svdvals", "norm", "cond", "matrix_rank", "pinv"]
)
def test_arrays_are_refused_with_a_hint(function):
    with pytest.raises(TypeError, match=r"structmat\.Dense"):
        getattr(sla, function)(arr(3, 3))


def test_errors_name_both_shapes():
    a = sm.Dense(arr(3, 3))
    with pytest.raises(ValueError, match=r"\(3, 3\).*\(4,\)"):
        sla.solve(a, np.ones(4))
    with pytest.raises(ValueError, match=r"\(3, 3\).*\(2, 4, 1\)"):
        sla.solve(a, np.ones((2, 4, 1)))
    with pytest.raises(ValueError, match=r"\(2, 3, 3\).*\(5, 3, 1\)"):
        sla.solve(sm.Dense(arr(2, 3, 3)), np.ones((5, 3, 1)))
    with pytest.raises(LinAlgError, match=r"square.*\(2, 3\)"):
        sla.solve(sm.Dense(arr(2, 3)), np.ones(2))
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(3,\)"):
        sla.lstsq(sm.Dense(arr(2, 3)), np.ones(3))
    with pytest.raises(ValueError, match="'fro', 1, 2, inf or 'nuc', got 3"):
        sla.norm(a, 3)
    with pytest.raises(NotImplementedError, match=r"slogdet.*Monarch.*numpy\.linalg\.slogdet\(A\.to_dense\(\)\)"):
        sla.slogdet(sm.Monarch.random((9, 9), blocks=3, rank=2, rng=0))
    for singular in (
        sm.Dense(np.zeros((2, 2))),
        sm.BlockDiagonal(np.zeros((2, 2, 2))),
        Scaled(0.0, a),
        sm.Zero((2, 2)),
    ):
        with pytest.raises(LinAlgError, match="singular"):
            sla.solve(singular, np.ones(singular.shape[0]))


def test_cholesky_and_eigh_check_what_they_need():
    with pytest.raises(LinAlgError, match="Hermitian"):
        sla.cholesky(sm.Dense(np.array([[2.0, 1.0], [0.0, 2.0]])))
    with pytest.raises(LinAlgError, match="positive definite"):
        sla.cholesky(sm.Dense(np.diag([1.0, -1.0])))
    for a in (-2.0 * sm.Identity(3), Scaled(0.0, sm.Identity(2)), sm.Zero((2, 2)), sm.block_diag(arr(2, 3), arr(3, 2))):
        with pytest.raises(LinAlgError):
            sla.cholesky(a)
    with pytest.raises(LinAlgError, match="Hermitian"):
        sla.cholesky(sm.BlockDiagonal(1j * pd(2, 2)))


def test_expm_of_sums():
    a, b = arr(2, 2), arr(3, 3)
    k = sm.kron(a, sm.Identity(3)) + sm.kron(sm.Identity(2), b)
    e = sla.expm(k)
    assert isinstance(e, sm.Kronecker)
    close(e.to_dense(), scipy.linalg.expm(k.to_dense()))
    both = k + sm.kron(a, b)
    with pytest.raises(NotImplementedError):
        sla.expm(both)
