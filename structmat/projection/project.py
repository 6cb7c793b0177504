"""project: the front door of projection."""

from __future__ import annotations

import operator as python_operator
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from structmat.operator import Operator
from structmat.patterns import Pattern
from structmat.projection.certificate import Projection, certify, frobenius
from structmat.projection.hierarchical import project_butterfly, project_chain
from structmat.projection.kronecker import project_kronecker
from structmat.projection.low_rank import project_low_rank
from structmat.projection.selection import Request, Solution, parameter_limit, unreachable
from structmat.projection.support import project_block_diagonal, project_dense
from structmat.projection.target import like, read, rounding, safe_scale, scaled
from structmat.projection.two_factor import project_two_factor
from structmat.structures.block_diagonal import BlockDiagonal
from structmat.structures.block_tensor_train import BlockTensorTrain
from structmat.structures.butterfly import Butterfly
from structmat.structures.chain import Chain
from structmat.structures.dense import Dense
from structmat.structures.kronecker import Kronecker
from structmat.structures.low_rank import LowRank
from structmat.structures.monarch import Monarch


class Family(NamedTuple):
    """How a family is projected onto, and which options it takes."""

    solve: Callable[[np.ndarray, Request], Solution]
    options: tuple[str, ...]
    sizes: tuple[str, ...]  # options that leave nothing for a budget or a tolerance to choose


FAMILIES: dict[type[Operator], Family] = {
    LowRank: Family(project_low_rank, ("rank",), ("rank",)),
    Kronecker: Family(project_kronecker, ("shapes", "terms"), ("terms",)),
    BlockDiagonal: Family(project_block_diagonal, ("blocks",), ("blocks",)),
    Monarch: Family(project_two_factor, ("blocks", "rank"), ("rank",)),
    BlockTensorTrain: Family(project_two_factor, ("blocks", "rank"), ("rank",)),
    Butterfly: Family(project_butterfly, ("radix", "patterns"), ("radix", "patterns")),
    Chain: Family(project_chain, ("patterns",), ("patterns",)),
    Dense: Family(project_dense, (), ()),
}


def project(
    W: Any,
    family: type[Operator],
    *,
    blocks: int | tuple[int, int] | None = None,
    shapes: Sequence[tuple[int, int]] | None = None,
    terms: int | None = None,
    radix: int | None = None,
    patterns: Sequence[tuple[int, int, int, int]] | None = None,
    rank: int | None = None,
    budget: float | None = None,
    tol: float | None = None,
) -> Projection:
    """Find the member of a structured family nearest to a matrix, with a certificate of how near it is.

    Minimises the Frobenius norm of ``W - A``. The result is the nearest member for every family but Butterfly and Chain of
    three and more factors and Kronecker of three and more factors, where it is near and ``lower_bound`` says how near.
    Without any option the architecture is that of ``family.random``.

    ============================= ======================= ==================================================================
    family                        options                 method
    ============================= ======================= ==================================================================
    LowRank                       rank                    truncated SVD (Eckart-Young 1936)
    Monarch, BlockTensorTrain     blocks, rank            SVD of every block (Dao et al. 2022, theorem 1)
    Kronecker                     shapes, terms           SVD of the rearranged matrix (Van Loan-Pitsianis 1993); power
                                                          iterations for three and more factors
    Butterfly, Chain              radix, patterns         hierarchical SVD (Le et al., arXiv 2411.04506)
    BlockDiagonal, Dense          blocks                  entries on the support
    ============================= ======================= ==================================================================

    Parameters
    ----------
    W
        ``(m, n)``: a NumPy array, torch tensor (the operator comes back in its library, device and dtype) or nested lists.
        Operators, SciPy sparse matrices and LinearOperators are made dense. Integers become float64 (torch: the default
        dtype). Computed in float64 or complex128; never written to.
    family
        LowRank, Kronecker, BlockDiagonal, Monarch, BlockTensorTrain, Butterfly, Chain or Dense.
    blocks
        Number of blocks, or ``(row blocks, column blocks)``. Sizes that it does not divide are padded.
    shapes, terms
        ``[(m1, n1), (m2, n2), ...]`` of the Kronecker factors; number of Kronecker products that are added (two factors).
    radix, patterns
        Radix of a butterfly; ``(a, b, c, d)`` of every factor of a chain, left to right, at least as large as ``W``.
    rank
        Rank of every block. Ranks beyond the size of a block are kept and filled with zeros.
    budget
        Instead of the size: parameters allowed, a fraction of ``m n`` (float) or a count (int). Gives the least error over
        ranks, terms and, where they are not given, some numbers of blocks, shapes or radices.
    tol
        Instead of the size: relative Frobenius error allowed. Gives the fewest parameters over the same members.

    Returns
    -------
    Projection
        ``operator``, ``error``, ``relative_error``, ``lower_bound``, ``method``, ``seconds``, ``params``.

    Raises
    ------
    TypeError
        If ``family`` is none of the above or does not take an option, or ``W`` holds no numbers.
    ValueError
        If ``W`` is not one finite matrix, an architecture does not fit its shape, two of size, budget and tolerance are
        given, or no member meets the budget (the message names the nearest feasible count) or the tolerance (it names the
        best relative error).
    numpy.linalg.LinAlgError
        If an SVD converges with neither LAPACK driver.

    Notes
    -----
    Without ``blocks``, a budget or tolerance compares for Monarch and BlockTensorTrain the default and 4, 8, 16, ... blocks
    in both directions; for BlockDiagonal all counts from 2; without ``shapes``, for Kronecker the two near-square splits.

    Cost for ``n x n``: LowRank and Kronecker one SVD, ``O(n^3)``; Monarch and BlockTensorTrain ``O(n^3 / blocks)``; radix-2
    Butterfly ``O(n^2)``. Memory: a few times ``W``.

    Examples
    --------
    >>> import numpy as np, structmat as sm
    >>> W = np.random.default_rng(0).standard_normal((24, 16))
    >>> p = sm.project(W, sm.Monarch, blocks=4, rank=1)
    >>> p.params, bool(p.lower_bound <= p.error), bool(np.isclose(p.error, np.linalg.norm(W - np.asarray(p.operator))))
    (160, True, True)
    >>> sm.project(W, sm.LowRank, budget=0.25).operator.rank
    2
    >>> sm.project(np.kron(W, np.eye(2)), sm.Kronecker, tol=1e-6, shapes=[(24, 16), (2, 2)]).params
    388
    """
    started = time.perf_counter()
    options = {
        "blocks": _blocks(blocks),
        "shapes": _tuples(shapes, "shapes", 2),
        "terms": _count(terms, "terms"),
        "radix": _count(radix, "radix", 2),
        "patterns": _patterns(patterns),
        "rank": _count(rank, "rank"),
    }
    kind = _family(family)
    given = {name: value for name, value in options.items() if value is not None}
    _check_options(family, kind, given, budget, tol)
    source, target = read(W)
    shape = (target.shape[0], target.shape[1])
    scale = safe_scale(target)
    prepared = target if scale == 1.0 else target / scale
    request = Request(
        family=family,
        norm=frobenius(prepared),
        limit=None if budget is None else parameter_limit(budget, shape),
        tol=None if tol is None else _tolerance(tol),
        rounding=rounding(source),
        **(given if budget is not None or tol is not None else _defaults(family, shape) | given),
    )
    solution = kind.solve(prepared, request)
    result = like(scaled(solution.operator, scale), source)
    found = certify(result, target, solution.lower_bound * scale, solution.method, started)
    if (
        request.tol is not None and found.relative_error > request.tol
    ):  # rounding to a short dtype is not in the spectrum
        raise unreachable(request, found.relative_error * request.norm)
    return found


def _family(family: Any) -> Family:
    if isinstance(family, type) and issubclass(family, Operator) and family in FAMILIES:
        return FAMILIES[family]
    names = ", ".join(f.__name__ for f in FAMILIES)
    shown = family.__name__ if isinstance(family, type) else type(family).__name__
    raise TypeError(f"family: expected one of the operator classes {names}; got {shown}")


def _check_options(family: type, kind: Family, given: dict[str, Any], budget: Any, tol: Any) -> None:
    """Refuse options that the family does not take, and two options that fix the same thing."""
    name = family.__name__
    for option in given:
        if option not in kind.options:
            takes = ", ".join((*kind.options, "budget", "tol"))
            raise TypeError(f"{option}: {name} has no such option; it takes {takes}")
    if "radix" in given and "patterns" in given:
        raise ValueError("radix, patterns: expected one of them, got both")
    goals = [option for option in kind.sizes if option in given]
    goals += [option for option, value in (("budget", budget), ("tol", tol)) if value is not None]
    if len(goals) > 1:
        raise ValueError(f"{' and '.join(goals)}: each fixes the size of the {name}; expected one of them")


def _defaults(family: type, shape: tuple[int, int]) -> dict[str, Any]:
    """The sizes that ``family.random`` takes where none is given."""
    if family is LowRank:
        return {"rank": max(1, min(shape) // 4)}
    if family in (Monarch, BlockTensorTrain):
        return {"rank": 1}
    return {"terms": 1} if family is Kronecker else {}


def _count(value: Any, name: str, least: int = 1) -> int | None:
    if value is None:
        return None
    if isinstance(value, (bool, np.bool_)) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    count = python_operator.index(value)
    if count < least:
        raise ValueError(f"{name}: expected at least {least}, got {count}")
    return count


def _blocks(value: Any) -> Any:
    if value is None or not isinstance(value, (tuple, list)):
        return _count(value, "blocks")
    if len(value) != 2:
        raise ValueError(f"blocks: expected an int or (row blocks, column blocks), got {len(value)} numbers")
    return tuple(_count(v, "blocks") for v in value)


def _tuples(value: Any, name: str, length: int) -> tuple[tuple[int, ...], ...] | None:
    if value is None:
        return None
    rows = [tuple(row) for row in value]
    if not rows or any(len(row) != length for row in rows):
        raise ValueError(f"{name}: expected a sequence of {length} numbers for each factor, got {value}")
    return tuple(tuple(_count(v, name) or 0 for v in row) for row in rows)


def _patterns(value: Any) -> tuple[Pattern, ...] | None:
    rows = _tuples(value, "patterns", 4)
    return None if rows is None else tuple(Pattern(*row) for row in rows)


def _tolerance(tol: Any) -> float:
    if isinstance(tol, (bool, np.bool_)) or not isinstance(tol, (int, float, np.integer, np.floating)):
        raise TypeError(f"tol: expected a number, got {type(tol).__name__}")
    if not 0.0 < tol <= 1.0:
        raise ValueError(f"tol: expected a relative error in (0, 1], got {tol}")
    return float(tol)
