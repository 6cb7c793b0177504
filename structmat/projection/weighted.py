"""Activation-aware projection: the family member whose outputs are nearest, in the norm of a second moment."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from structmat import arrays
from structmat.arrays import Array
from structmat.projection.certificate import Projection, dense
from structmat.projection.device import host, native
from structmat.projection.drivers import svd
from structmat.projection.interpolative import interpolate
from structmat.projection.permutation import View
from structmat.projection.selection import Ladder, Request, Solution, choose, infeasible, unreachable
from structmat.projection.svd import tails, truncate
from structmat.projection.target import like, rounding, safe_scale, scaled
from structmat.projection.weight import Weight
from structmat.projection.weighted_chain import weighted_butterfly, weighted_chain
from structmat.projection.weighted_classes import safe, truncated
from structmat.projection.weighted_kronecker import weighted_kronecker
from structmat.projection.weighted_support import weighted_block_diagonal, weighted_block_sparse, weighted_diagonal
from structmat.projection.weighted_two_factor import weighted_two_factor
from structmat.structures.block_diagonal import BlockDiagonal
from structmat.structures.block_sparse import BlockSparse
from structmat.structures.block_tensor_train import BlockTensorTrain
from structmat.structures.butterfly import Butterfly
from structmat.structures.chain import Chain
from structmat.structures.dense import Dense
from structmat.structures.diagonal import Diagonal
from structmat.structures.kronecker import Kronecker
from structmat.structures.low_rank import LowRank
from structmat.structures.monarch import Monarch

Solver = Callable[[np.ndarray, Request, Weight], Solution]


def solve(target: np.ndarray, request: Request, weight: Weight) -> Solution:
    """The member of ``request.family`` nearest in the norm of ``weight``; ``request.norm`` is in that norm too.

    Raises ``TypeError`` for a family without a weighted solver, and for output weights where only input weights are known.
    """
    name = request.family.__name__
    if request.family not in SOLVERS:
        known = ", ".join(family.__name__ for family in SOLVERS)
        raise TypeError(f"weight: {name} has no weighted projection; expected one of {known}")
    if weight.rows is not None and request.family not in BOTH_SIDES:
        known = ", ".join(family.__name__ for family in BOTH_SIDES)
        raise TypeError(f"row_weight (or weight with transposed=True): only for {known}, got {name}")
    return SOLVERS[request.family](target, request, weight)


def project_weighted(
    source: Array,  # the caller's matrix, whose library and dtype the results take
    target: np.ndarray,  # (m, n), float64 or complex128
    view: View,  # how the family sees the matrix
    request: Request,
    weight: Weight,
    mean: np.ndarray | None,  # (n,)
    started: float,
    solver: Solver = solve,
) -> Projection:
    """The projection with its exact error in the norm of the weight, and the bias that makes the mean output exact."""
    scale = safe_scale(target)
    prepared = target if scale == 1.0 else target / scale
    request = replace(request, norm=weight.norm(prepared), rounding=rounding(source))
    solution = solver(view.of(prepared), request, weight.seen(view))
    operator = like(scaled(view.back(solution.operator), scale), source)
    difference = target - dense(operator, target)
    error, norm = weight.norm(difference), request.norm * scale
    relative = error / norm if norm else 0.0
    if request.tol is not None and relative > request.tol:  # rounding to a short dtype is not in the spectrum
        raise unreachable(request, relative * request.norm)
    notes = [solution.method, *weight.notes]
    if solution.ridge:
        notes.append(f"nearly singular weight: relative ridge {solution.ridge:g}")
    return Projection(
        operator=operator,
        error=error * weight.scale,
        relative_error=relative,
        lower_bound=min(solution.lower_bound * scale, error) * weight.scale,
        method="; ".join(notes),
        seconds=time.perf_counter() - started,
        params=operator.nparams,
        bias_correction=None if mean is None else _like(difference @ mean, source),
        ridge=solution.ridge,
    )


def _like(vector: np.ndarray, source: Array) -> Array:
    """A vector in the library, device and precision of a matrix; complex where it is, or the matrix is."""
    library = arrays.kind(source) or "numpy"
    made = arrays.convert(native(vector), library, None if library == "numpy" else arrays.device(source))
    short = arrays.promote(source.dtype, arrays.dtype_for(np.dtype(np.complex64), library))
    return arrays.cast(made, short if arrays.is_complex(made.dtype) else source.dtype)


# ---- closed forms ------------------------------------------------------------------------------------------------------


def weighted_low_rank(target: np.ndarray, request: Request, weight: Weight) -> Solution:
    """The nearest matrix of a rank: ``U U^H W`` with ``U`` the leading left singular vectors of ``W S``, ``S S^H = C``.

    Optimal, and free of any inverse: ``C`` may be singular (Eckart-Young for ``W S``; the identity behind SVD-LLM, arXiv
    2403.07378, and the output principal components of LiteASR, arXiv 2502.20583). With a weight ``D = T T^H`` of the outputs
    ``A = (W S V / s) (U^H T^H W)`` from the leading singular triples ``U s V^H`` of ``T^H W S``. Cost: one thin SVD and
    ``m n^2``.
    """
    if request.method not in ("auto", "svd"):
        raise ValueError(f"method: with a weight expected 'auto' or 'svd', got {request.method!r}")
    m, n = target.shape
    u, s, vh = svd(weight.from_left(weight.from_right(target)))
    errors = tails(s)
    gauge = 1 if request.interpolative else 0
    rank = request.rank or choose([Ladder(None, m + n, errors, gauge)], request)[1]
    kept = min(rank, len(s))
    factors = (weight.rows and weight.rows.factor, weight.columns and weight.columns.factor)
    left, right = truncated(target, *factors, (u, s, vh), kept)
    q, r = np.linalg.qr(left)  # back to singular vectors, of A itself: balanced factors, and what the selection needs
    x, values, yh = svd(r @ right)
    x = q @ x
    bound = safe(float(errors[kept]), target, weight)
    if request.interpolative:
        return Solution(
            interpolate(host(x), host(values), host(yh)), bound, "weighted truncated SVD (optimal), interpolative form"
        )
    return Solution(
        LowRank(*(native(f) for f in truncate(x, values, yh, rank))), bound, "weighted truncated SVD (optimal)"
    )


def weighted_dense(target: np.ndarray, request: Request, weight: Weight) -> Solution:  # noqa: ARG001 (as all solvers)
    """The matrix itself, copied."""
    if request.limit is not None and request.limit < target.size:
        raise infeasible(request, target.size)
    return Solution(Dense(target.copy()), 0.0, "copy (exact)")


SOLVERS: dict[Any, Solver] = {
    LowRank: weighted_low_rank,
    Kronecker: weighted_kronecker,
    BlockDiagonal: weighted_block_diagonal,
    Monarch: weighted_two_factor,
    BlockTensorTrain: weighted_two_factor,
    Butterfly: weighted_butterfly,
    Chain: weighted_chain,
    BlockSparse: weighted_block_sparse,
    Diagonal: weighted_diagonal,
    Dense: weighted_dense,
}
BOTH_SIDES = (LowRank, Monarch, BlockTensorTrain)
