"""What structmat is compared with: dense products, plain chains, other libraries, and torch code written from the formula.

Every function returns calls by name for one operator and one operand; a peer that is not installed or does not take the
operand is a string that says why, so that it stays in the tables. Every call delivers an array in the layout of its operand,
contiguous: a transposed view would leave out the copy that the layout is about.
"""

from __future__ import annotations

import contextvars
import importlib
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

import structmat as sm

Call = Callable[[], Any]
Calls = dict[str, "Call | str"]

PINNED = {
    "torch": "torch",
    "lazylinop": "lazylinop",
    "pyfastkron": "pyfastkron",
    "pyfaust": "pyfaust",
    "cola": "cola-ml",
    "linear_operator": "linear_operator",
    "pylops": "pylops",
    "scipy": "scipy",
    "numba": "numba",
}


@cache
def library(name: str) -> Any:
    """A module, or the reason why there is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peers warn about each other when they are imported
            return importlib.import_module(name)
    except Exception as error:
        return f"not available ({type(error).__name__})"


def versions() -> dict[str, str]:
    """Installed versions of everything that takes part."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"numpy": np.__version__}
    for distribution in PINNED.values():
        try:
            found[distribution] = version(distribution)
        except PackageNotFoundError:
            found[distribution] = "not available"
    return found


def build(needs: str, make: Callable[[Any], Call]) -> Call | str:
    """The call of a peer that needs a library, or why there is none."""
    module = library(needs)
    if isinstance(module, str):
        return module
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return make(module)
    except Exception as error:
        return f"failed ({type(error).__name__})"


def ours(a: sm.Operator, x: np.ndarray, layout: str) -> Call:
    """``A @ X`` for columns, ``X @ A.T`` for rows."""
    if layout == "columns":
        return lambda: a @ x
    at = a.T
    return lambda: x @ at


_numpy = contextvars.copy_context()
_numpy.run(sm.use_backend, "numpy")


def plain(a: sm.Operator, x: np.ndarray, layout: str) -> Call:
    """The same by the NumPy backend, whatever the default is."""
    call = ours(a, x, layout)
    return lambda: _numpy.run(call)


def default_backend() -> str:
    from structmat.backends.selection import backend_for

    return backend_for("numpy").name


def dense(matrix: np.ndarray, x: np.ndarray, layout: str) -> Calls:
    """The dense product in NumPy and in torch."""

    def in_torch(torch):
        d, t = torch.from_numpy(matrix), torch.from_numpy(x)
        dt = d.T
        return (lambda: d @ t) if layout == "columns" else (lambda: t @ dt)

    dt = matrix.T
    return {
        "dense numpy": (lambda: matrix @ x) if layout == "columns" else (lambda: x @ dt),
        "dense torch": build("torch", in_torch),
    }


def yardsticks(x: np.ndarray, layout: str) -> Calls:
    """Not the same result: a copy of the operand, and the real FFT of its length."""
    y = np.empty_like(x)
    axis = 0 if layout == "columns" else -1
    return {
        "memcpy": lambda: np.copyto(y, x),
        "scipy rfft": build("scipy.fft", lambda fft: lambda: fft.rfft(x, axis=axis)),
    }


# ---- chains ----------------------------------------------------------------------------------------------------------


def padded(a: Any) -> bool:
    """Whether a chain is larger than its logical shape."""
    first, last = a.factors[0], a.factors[-1]
    return a.shape != (first.shape[0] * first.shape[1] * first.shape[2], last.shape[0] * last.shape[1] * last.shape[3])


def bare_columns(a: Any, x: np.ndarray) -> Call:
    """One ``np.matmul`` for each factor, reading and writing strided views; nothing else around it."""
    factors = [np.ascontiguousarray(f) for f in reversed(a.factors)]
    turned, k = a.out_order is not None, x.size // x.shape[0]

    def call():
        z = x
        for f in factors:
            p, d, b, c = f.shape
            y = np.empty((p * b * d, k), x.dtype)
            last = turned and f is factors[-1]  # p = 1: the transposition of the output is the order of its blocks
            out = y.reshape(p, d, b, k) if last else y.reshape(p, b, d, k).transpose(0, 2, 1, 3)
            np.matmul(f, z.reshape(p, c, d, k).transpose(0, 2, 1, 3), out=out)
            z = y
        return z

    return call


def strided_bmm(torch: Any, a: Any, x: np.ndarray) -> Call:
    """Columns: two ``torch.bmm`` whose permutation is the stride of ``out=``."""
    left, right = (torch.from_numpy(np.ascontiguousarray(f)) for f in a.factors)
    (_, l, s, kr), (k, _, q, p) = left.shape, right.shape
    left, right, n = left.reshape(l, s, kr), right.reshape(k, q, p), x.size // x.shape[0]
    blocks = torch.from_numpy(x).view(k, p, n)
    train = a.out_order is not None

    def call():
        z = torch.empty((k * q, n), dtype=left.dtype)
        torch.bmm(right, blocks, out=z.view(k, q, n))
        y = torch.empty((l * s, n), dtype=left.dtype)
        out = y.view(l, s, n) if train else y.view(s, l, n).transpose(0, 1)
        torch.bmm(left, z.view(kr, l, n).transpose(0, 1), out=out)
        return y

    return call


def shape_operations(torch: Any, a: Any, x: np.ndarray) -> Call:
    """Rows, in the order of the M2 layers: bmm, transpose and reshape to contiguous, bmm, permute."""
    left, right = (torch.from_numpy(np.ascontiguousarray(f)) for f in a.factors)
    (_, l, s, kr), (k, _, q, p) = left.shape, right.shape
    left, right = left.reshape(l, s, kr).transpose(1, 2), right.reshape(k, q, p).transpose(1, 2)
    t, n = torch.from_numpy(x), x.shape[0]
    axes = (1, 0, 2) if a.out_order is not None else (1, 2, 0)

    def call():
        z = torch.bmm(t.view(n, k, p).transpose(0, 1), right)
        z = z.transpose(0, 1).reshape(n, kr, l).transpose(1, 2).contiguous().transpose(0, 1)
        return torch.bmm(z, left).permute(*axes).reshape(n, l * s)

    return call


def ksm(butterfly: Any, a: Any, x: np.ndarray, layout: str) -> Call:
    """lazylinop's product of Kronecker-sparse factors."""
    operator = butterfly.ksm([np.ascontiguousarray(f.transpose(0, 2, 3, 1)) for f in a.factors])
    order, z = a.out_order, x if layout == "columns" else x.T

    def call():
        y = operator @ z
        if order is not None:
            y = y.reshape(*order.radices, -1).transpose(*order.axes, -1).reshape(y.shape)
        return np.ascontiguousarray(y if layout == "columns" else y.T)

    return call


def two_factors(a: Any, x: np.ndarray, layout: str) -> Calls:
    """Peers of Monarch and Block Tensor-Train matrices."""
    if padded(a):
        return dict.fromkeys(("torch strided bmm", "torch M2-style", "lazylinop ksm"), "not written for padded sizes")
    lazy = build("lazylinop.butterfly", lambda b: ksm(b, a, x, layout))
    if layout == "columns":
        return {"torch strided bmm": build("torch", lambda t: strided_bmm(t, a, x)), "lazylinop ksm": lazy}
    return {"torch M2-style": build("torch", lambda t: shape_operations(t, a, x)), "lazylinop ksm": lazy}


def low_rank(a: Any, x: np.ndarray, layout: str) -> Calls:
    """Two products with contiguous factors in torch; linear_operator and cola take columns."""
    left, right = (np.ascontiguousarray(v) for v in (a.left, a.right))

    def two_products(torch):
        u, v, t = (torch.from_numpy(y) for y in (left, right, x))
        ut, vt = u.T.contiguous(), v.T.contiguous()
        return (lambda: u @ (v @ t)) if layout == "columns" else (lambda: (t @ vt) @ ut)

    found: Calls = {"torch two products": build("torch", two_products)}
    if layout == "columns":
        found["linear_operator"] = build(
            "linear_operator.operators", lambda o: linear_operator_product(o, left, right, x)
        )
        found["cola"] = build("cola.ops", lambda o: product_in_cola(o, left, right, x))
    return found


def linear_operator_product(operators: Any, left: np.ndarray, right: np.ndarray, x: np.ndarray) -> Call:
    torch = library("torch")
    u, v, t = (torch.from_numpy(y) for y in (left, right, x))
    product = operators.MatmulLinearOperator(operators.DenseLinearOperator(u), operators.DenseLinearOperator(v))
    return lambda: product @ t


def product_in_cola(operators: Any, left: np.ndarray, right: np.ndarray, x: np.ndarray) -> Call:
    torch = library("torch")
    u, v, t = (torch.from_numpy(y) for y in (left, right, x))
    product = operators.Dense(u) @ operators.Dense(v)
    return lambda: product @ t


# ---- transforms ------------------------------------------------------------------------------------------------------


def sparse_factors(a: Any) -> list[Any]:
    """The factors of a chain as SciPy's sparse matrices."""
    import scipy.sparse

    found = []
    for f in a.factors:
        p, d, b, c = f.shape
        i, l, j, k = np.indices(f.shape)
        at = ((i * b * d + j * d + l).ravel(), (i * c * d + k * d + l).ravel())
        found.append(scipy.sparse.csr_matrix((np.ravel(f), at), shape=(p * b * d, p * c * d)))
    return found


def by_columns(operator: Any, x: np.ndarray, layout: str) -> Call:
    """Operators of columns; pyfaust's are fastest on Fortran order, which rows in C order are."""
    if layout == "columns":
        return lambda: np.ascontiguousarray(operator @ x)
    return lambda: np.ascontiguousarray((operator @ x.T).T)


def butterfly(a: Any, x: np.ndarray, layout: str) -> Calls:
    """Sparse factors in pyfaust, Kronecker-sparse ones in lazylinop."""
    return {
        "pyfaust": build("pyfaust", lambda f: by_columns(f.Faust(sparse_factors(a)), x, layout)),
        "lazylinop ksm": build("lazylinop.butterfly", lambda b: ksm(b, a, x, layout)),
    }


def hadamard(a: sm.Operator, x: np.ndarray, layout: str) -> Calls:
    """The Hadamard matrices of pyfaust and lazylinop, without normalisation."""
    n = a.shape[0]

    def lazy(b):
        values = b.fwht(n, dtype=str(x.dtype)).ks_values
        operator = b.ksm([v * v.dtype.type(n ** (0.5 / len(values))) for v in values])
        return by_columns(operator, x, layout)

    return {
        "pyfaust wht": build("pyfaust", lambda f: by_columns(f.wht(n, normed=False, dtype=str(x.dtype)), x, layout)),
        "lazylinop fwht": build("lazylinop.butterfly", lazy),
    }


# ---- Kronecker products ----------------------------------------------------------------------------------------------


def kronecker(a: Any, x: np.ndarray, layout: str) -> Calls:
    """pyfastkron in both layouts; linear_operator, cola and PyLops take columns."""
    factors = [np.ascontiguousarray(np.asarray(f)) for f in a.factors]
    if layout == "rows":
        turned = [np.ascontiguousarray(f.T) for f in factors]
        return {"pyfastkron": build("pyfastkron.fastkronnumpy", lambda k: lambda: k.gemkm(x, turned))}
    x = x.reshape(x.shape[0], -1)

    def gpytorch(operators):
        torch = library("torch")
        t = torch.from_numpy(x)
        product = operators.KroneckerProductLinearOperator(
            *(operators.DenseLinearOperator(torch.from_numpy(f)) for f in factors)
        )
        return lambda: product @ t

    def in_cola(operators):
        torch = library("torch")
        t = torch.from_numpy(x)
        product = operators.Kronecker(*(operators.Dense(torch.from_numpy(f)) for f in factors))
        return lambda: product @ t

    def in_pylops(pylops):
        operators = [pylops.MatrixMult(f, dtype=f.dtype) for f in factors]
        product = operators[-1]
        for operator in operators[-2::-1]:
            product = pylops.Kronecker(operator, product, dtype=x.dtype)
        return lambda: np.ascontiguousarray(product @ x)

    return {
        "pyfastkron": build("pyfastkron.fastkronnumpy", lambda k: lambda: k.gekmm(factors, x)),
        "linear_operator": build("linear_operator.operators", gpytorch),
        "cola": build("cola.ops", in_cola),
        "pylops": build("pylops", in_pylops),
    }


PEERS = {
    "monarch": two_factors,
    "btt": two_factors,
    "low rank": low_rank,
    "butterfly": butterfly,
    "hadamard": hadamard,
    "kronecker": kronecker,
}


def contenders(family: str, a: Any, x: np.ndarray, layout: str) -> dict[str, tuple[str, Call | str]]:
    """Everything that meets one operator, ours first: name -> (role, call)."""
    found: dict[str, tuple[str, Call | str]] = {
        "structmat": ("ours", ours(a, x, layout)),
        "again": ("control", ours(a, x, layout)),  # the same once more: how far from 1.0 is noise
    }
    if default_backend() != "numpy":
        found["numpy backend"] = ("numpy", plain(a, x, layout))
    chain = hasattr(a, "out_order") and a.in_order is None and not padded(a)
    if chain and layout == "columns" and len(a.factors) <= 2:
        found["numpy strided"] = ("numpy", bare_columns(a, x))
    found |= {name: ("peer", call) for name, call in PEERS[family](a, x, layout).items()}
    if family in ("butterfly", "hadamard"):
        found |= {name: ("yardstick", call) for name, call in yardsticks(x, layout).items()}
    return found
