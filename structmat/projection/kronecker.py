"""Kronecker products and sums of them: SVD of the rearranged matrix; rank-one tensors for three and more factors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from structmat.algebra import Sum
from structmat.operator import Operator
from structmat.projection.canonical import canonical
from structmat.projection.certificate import frobenius
from structmat.projection.device import native
from structmat.projection.drivers import singular_values, svd
from structmat.projection.lanczos import leading_triplets
from structmat.projection.progress import Advance, quiet
from structmat.projection.selection import Ladder, Request, Solution, choose
from structmat.projection.svd import gram_tail, safe_bound, tails, truncate, truncated
from structmat.structures.kronecker import Kronecker, kronecker_shapes

Shapes = tuple[tuple[int, int], ...]

METHODS = ("auto", "svd", "lanczos")
LARGE = 512  # rearranged matrices with a shorter side have their SVD in well below a second
SHARE = 32  # more terms than this fraction of the side are found sooner by the full SVD

_SWEEPS = 200
_STALLED = 1e-13  # relative growth of the captured norm at which the power iteration stops
_ROUNDING = 1e-13  # relative error below which a better lower bound says nothing


def project_kronecker(target: np.ndarray, request: Request) -> Solution:
    """The nearest Kronecker product, or sum of ``terms`` products.

    A budget or a tolerance without ``shapes`` compares the two near-square splits ``(m1, n1), (m2, n2)``; where neither
    meets a budget it takes the split with the fewest parameters.
    """
    shape = (target.shape[0], target.shape[1])
    shapes = request.shapes or tuple(kronecker_shapes(shape))
    check_shapes(shapes, shape)
    if len(shapes) == 1 and not request.free and (request.terms or 1) == 1:
        return Solution(Kronecker(native(target.copy())), 0.0, "copy (exact)")
    if len(shapes) != 2:
        if request.free or len(shapes) == 1:
            raise ValueError(
                "shapes: a budget and a tolerance need two factors (no SVD says how many terms of more factors are "
                f"needed), terms at least two; got {len(shapes)}"
            )
        return (
            rank_one(target, shapes, request.advance)
            if (request.terms or 1) == 1
            else canonical_sum(target, shapes, request)
        )
    splits = [shapes]
    if request.free and request.shapes is None:
        splits = near_square_splits(shape)
        if request.limit is not None:
            splits = [a for a in splits if parameters(a) <= request.limit] or [cheapest_split(shape)]
    return kronecker_sum(target, request, splits)


def kronecker_sum(target: np.ndarray, request: Request, splits: Sequence[Shapes]) -> Solution:
    """The nearest sum of Kronecker products of two factors: optimal.

    The rearranged matrix ``R[(i1 k1), (i2 k2)] = W[(i1 i2), (k1 k2)]`` of ``sum_t X_t (x) Y_t`` is
    ``sum_t vec(X_t) vec(Y_t)^T``, so that its truncated SVD is the answer and ``error**2 = sum of the discarded s**2``.
    Source: Van Loan and Pitsianis, "Approximation with Kronecker products", 1993. ``N`` terms of shapes ``(N, N)`` and
    ``(m/N, n/N)`` are the parameterised hypercomplex multiplications of Zhang et al., ICLR 2021 (arXiv 2102.08597).

    Cost: one thin SVD of ``R``, or ``m n`` for each of some tens of Lanczos steps where few terms of a large ``R`` are
    wanted (:func:`structmat.projection.lanczos.leading_triplets`: the same optimum to ``1e-10``).
    """
    fast = lanczos_sum(target, request, splits)
    if fast is not None:
        return fast
    if len(splits) > 1:
        ladders = [Ladder(a, parameters(a), tails(singular_values(unfold(target, a)))) for a in splits]
        shapes, terms = choose(ladders, request)
        u, s, vh = svd(unfold(target, shapes))
    else:
        (shapes,) = splits
        u, s, vh = svd(unfold(target, shapes))
        terms = request.terms or choose([Ladder(shapes, parameters(shapes), tails(s))], request)[1]
    bound = safe_bound(float(tails(s)[min(terms, len(s))]), request.norm, max(u.shape[0], vh.shape[1]))
    return Solution(products(u, s, vh, shapes, terms), bound, "Van Loan-Pitsianis SVD (optimal)")


def lanczos_sum(target: np.ndarray, request: Request, splits: Sequence[Shapes]) -> Solution | None:
    """The same from a few Lanczos vectors; ``None`` where the full SVD is asked for, is sooner found, or has to decide."""
    if request.method == "svd" or request.tol is not None:
        return None
    best = None
    for shapes in splits:
        terms = request.terms or (request.limit or 0) // parameters(shapes)
        side = min(math.prod(s) for s in shapes)
        few = side >= LARGE and SHARE * terms <= side
        if terms < 1 or not (few or (request.method == "lanczos" and request.terms and terms < side)):
            return None
        rng = np.random.default_rng(0 if request.rng is None else request.rng)
        found = leading_triplets(unfold(target, shapes), terms, request.norm, rng, request.advance)
        if found is None:
            return None
        error = request.norm**2 - float(np.square(found.s).sum())
        if best is None or error < best[0]:
            best = (error, shapes, found, terms)
    if best is None:
        return None
    _, shapes, (u, s, vh, bound), terms = best
    if request.limit is not None:  # terms that are rounding are not stored
        terms = max(1, min(terms, int((s > np.finfo(np.float64).eps * request.norm).sum())))
    return Solution(products(u, s, vh, shapes, terms), bound, "Van Loan-Pitsianis, Lanczos (optimal to 1e-10)")


def products(u: np.ndarray, s: np.ndarray, vh: np.ndarray, shapes: Shapes, terms: int) -> Operator:
    """The sum of Kronecker products that the first ``terms`` singular triplets of the rearranged matrix stand for."""
    x, y = truncate(u, s, vh, terms)
    x = x.T.copy()
    parts = [Kronecker(native(x[t].reshape(shapes[0])), native(y[t].reshape(shapes[1]))) for t in range(terms)]
    return parts[0] if terms == 1 else Sum(*parts)


def rank_one(target: np.ndarray, shapes: Shapes, advance: Advance = quiet) -> Solution:
    """A Kronecker product of any number of factors: the rearranged tensor is approximated by one of rank 1.

    Successive SVDs (within ``sqrt(k - 1)`` of the best, Oseledets 2011), then the higher-order power method: every update
    is the best factor for the others, so that the error never grows (De Lathauwer, De Moor, Vandewalle, SIAM J. Matrix
    Anal. Appl. 21, 2000). The problem is NP-hard in general: the result is a local optimum. Every unfolding of the tensor
    would have rank 1, so that the error of its best rank-1 approximation is a lower bound. Cost: about ``m n`` times the
    smallest factor size for the start, ``2 m n`` for each update of a small factor.
    """
    tensor = unfold(target, shapes)
    norm = frobenius(target)
    start, first = successive_svd(tensor)
    vectors, captured = power_iteration(tensor, start, advance)
    scale = captured ** (1.0 / len(shapes))
    factors = [native((scale * v).reshape(s)) for v, s in zip(vectors, shapes, strict=True)]
    error = frobenius(tensor - captured * outer(vectors))
    bound = safe_bound(first, norm, max(target.shape))
    if error > _ROUNDING * norm:
        bound = max(bound, unfolding_bound(tensor, 1))
    return Solution(Kronecker(*factors), bound, "successive SVDs, then higher-order power iterations")


def canonical_sum(target: np.ndarray, shapes: Shapes, request: Request) -> Solution:
    """A sum of Kronecker products of three and more factors: the rearranged tensor is approximated by one of rank ``terms``.

    Alternating least squares (:func:`structmat.projection.canonical.canonical`): a local optimum. A tensor of rank ``t`` has
    unfoldings of rank ``t``, which give the lower bound.
    """
    tensor, terms = unfold(target, shapes), request.terms or 1
    rng = np.random.default_rng(0 if request.rng is None else request.rng)
    factors = canonical(tensor, terms, rng, request.advance)
    parts = [
        Kronecker(*(np.ascontiguousarray(f[:, t]).reshape(s) for f, s in zip(factors, shapes, strict=True)))
        for t in range(terms)
    ]
    return Solution(Sum(*parts), unfolding_bound(tensor, terms), "alternating least squares (canonical decomposition)")


def unfolding_bound(tensor: np.ndarray, rank: int) -> float:
    """The largest error of the best rank-``rank`` approximation of any unfolding: no tensor of that rank is nearer."""
    return max((gram_tail(matrix, rank) for matrix in unfoldings(tensor)), default=0.0)


def unfold(target: np.ndarray, shapes: Shapes) -> np.ndarray:
    """The matrix as a tensor ``(m1 n1, m2 n2, ...)``, one axis per factor."""
    rows, cols = [s[0] for s in shapes], [s[1] for s in shapes]
    count = len(shapes)
    axes = [axis for i in range(count) for axis in (i, count + i)]
    return target.reshape(*rows, *cols).transpose(axes).reshape([m * n for m, n in shapes])


def unfoldings(tensor: np.ndarray) -> Iterator[np.ndarray]:
    """Matrices of rank 1 if the tensor has rank 1: leading axes against the others, and each axis against the others."""
    for i in range(1, tensor.ndim):
        yield tensor.reshape(math.prod(tensor.shape[:i]), -1)
    for i in range(1, tensor.ndim - 1):
        yield np.moveaxis(tensor, i, 0).reshape(tensor.shape[i], -1)


def successive_svd(tensor: np.ndarray) -> tuple[list[np.ndarray], float]:
    """Unit vectors, one per axis, whose outer product is near the tensor up to a factor; the error of the first split."""
    vectors, rest, first = [], tensor, 0.0
    for i, size in enumerate(tensor.shape[:-1]):
        cut = truncated(rest.reshape(size, -1), 1)
        first = first if i else math.sqrt(max(0.0, cut.bound))
        vectors.append(cut.u[:, 0])
        rest = cut.y[0]
    last = rest.ravel()
    norm = frobenius(last)
    return [*vectors, last / norm if norm else last], first


def power_iteration(
    tensor: np.ndarray, vectors: list[np.ndarray], advance: Advance = quiet
) -> tuple[list[np.ndarray], float]:
    """Better unit vectors, and the norm of the tensor along them, which no step decreases."""
    captured = 0.0
    for _ in range(_SWEEPS):
        advance(1, 1)
        before, head = captured, tensor.ravel()
        for i, size in enumerate(tensor.shape):
            update = head
            for v in reversed(vectors[i + 1 :]):
                update = update.reshape(-1, v.size) @ v.conj()
            captured = frobenius(update)
            if captured == 0.0:  # nothing along these vectors, as for the zero matrix
                return vectors, 0.0
            vectors[i] = update / captured
            head = vectors[i].conj() @ head.reshape(size, -1)
        if captured <= before * (1.0 + _STALLED):
            break
    return vectors, captured


def outer(vectors: Sequence[np.ndarray]) -> np.ndarray:
    """The outer product of vectors, one axis each."""
    product = vectors[0]
    for v in vectors[1:]:
        product = product[..., None] * v
    return product


def parameters(shapes: Shapes) -> int:
    """Stored numbers of one product."""
    return sum(m * n for m, n in shapes)


def near_square_splits(shape: tuple[int, int]) -> list[Shapes]:
    """The near-square factor shapes in both orders; a 1x1 factor, which leaves the other dense, only if there is no other."""
    first, second = kronecker_shapes(shape)
    if (1, 1) in (first, second):
        return [cheapest_split(shape)]
    return list(dict.fromkeys([(first, second), (second, first)]))


def cheapest_split(shape: tuple[int, int]) -> Shapes:
    """The shapes of two factors with the fewest parameters."""
    m, n = shape
    splits = [((a, b), (m // a, n // b)) for a in divisors(m) for b in divisors(n)]
    return min(splits, key=parameters)


def divisors(n: int) -> list[int]:
    """Divisors of ``n``, ascending."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return small + [n // d for d in reversed(small) if d * d != n]


def check_shapes(shapes: Shapes, shape: tuple[int, int]) -> None:
    """``ValueError`` unless the factor shapes multiply to ``shape``."""
    product = (math.prod(s[0] for s in shapes), math.prod(s[1] for s in shapes))
    if product != shape:
        raise ValueError(f"shapes: {list(shapes)} multiply to {product}, expected {shape}")
