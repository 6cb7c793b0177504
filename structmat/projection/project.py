"""project: the front door of projection."""

from __future__ import annotations

import operator as python_operator
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from structmat.algebra import Sum
from structmat.operator import Operator
from structmat.patterns import Pattern
from structmat.projection import gradient, kronecker, low_rank
from structmat.projection.block_sparse import project_block_sparse, project_diagonal
from structmat.projection.certificate import Projection, certify, frobenius
from structmat.projection.chain_options import read_layout, read_order, read_refine, read_search
from structmat.projection.device import current
from structmat.projection.gradient import project_any_chain
from structmat.projection.hierarchical import project_butterfly
from structmat.projection.kronecker import project_kronecker
from structmat.projection.low_rank import project_implicit, project_low_rank
from structmat.projection.matrix_free import is_operator
from structmat.projection.moments import read_weight
from structmat.projection.permutation import read_view
from structmat.projection.placement import read_device, runs_on_device, where
from structmat.projection.progress import bar
from structmat.projection.selection import Request, Solution, parameter_limit, read_tolerance, unreachable
from structmat.projection.sums import Term, project_sum
from structmat.projection.support import project_block_diagonal, project_dense
from structmat.projection.target import like, read, rounding, safe_scale, scaled
from structmat.projection.two_factor import project_two_factor
from structmat.projection.weight import Weight
from structmat.projection.weighted import project_weighted
from structmat.projection.weighted import solve as solve_weighted
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


class Family(NamedTuple):
    """How a family is projected onto, and which options it takes."""

    solve: Callable[..., Solution]  # (target, request), and for a sum the weight
    options: tuple[str, ...]
    sizes: tuple[str, ...]  # options that leave nothing for a budget or a tolerance to choose
    methods: tuple[str, ...] = ()


FAMILIES: dict[type[Operator], Family] = {
    LowRank: Family(project_low_rank, ("rank", "interpolative", "method", "rng"), ("rank",), low_rank.METHODS),
    Kronecker: Family(project_kronecker, ("shapes", "terms", "method", "rng"), ("terms",), kronecker.METHODS),
    BlockDiagonal: Family(project_block_diagonal, ("blocks",), ("blocks",)),
    Monarch: Family(project_two_factor, ("blocks", "rank", "interpolative", "layout", "permutation"), ("rank",)),
    BlockTensorTrain: Family(
        project_two_factor,
        ("blocks", "rank", "interpolative", "cores", "layout", "order", "refine", "permutation"),
        ("rank",),
    ),
    Butterfly: Family(
        project_butterfly, ("radix", "patterns", "order", "refine", "permutation"), ("radix", "patterns")
    ),
    Chain: Family(
        project_any_chain,
        ("patterns", "order", "refine", "permutation", "method", "rng"),
        ("patterns",),
        gradient.METHODS,
    ),
    BlockSparse: Family(project_block_sparse, ("block", "places"), ("places",)),
    Diagonal: Family(project_diagonal, (), ()),
    Dense: Family(project_dense, (), ()),
}


def project(
    W: Any,
    family: type[Operator] | Sequence[Any],
    *,
    blocks: int | tuple[int, int] | None = None,
    shapes: Sequence[tuple[int, int]] | None = None,
    terms: int | None = None,
    block: int | tuple[int, int] | None = None,
    places: tuple[Any, Any] | None = None,
    radix: int | None = None,
    patterns: Sequence[tuple[int, int, int, int]] | None = None,
    rank: int | None = None,
    budget: float | None = None,
    tol: float | None = None,
    cores: int | None = None,
    order: str | Sequence[int] | None = None,
    refine: int | bool | None = None,
    layout: str | tuple[str, str] | None = None,
    permutation: Any = None,
    transposed: bool = False,
    interpolative: bool = False,
    method: str | None = None,
    rng: Any = None,
    weight: Any = None,
    activations: Any = None,
    mean: Any = None,
    row_weight: Any = None,
    damping: float | None = None,
    device: str | None = None,
    progress: bool | None = None,
) -> Projection:
    """Find the member of a structured family nearest to a matrix, with a certificate of how near it is.

    Minimises the Frobenius norm of ``W - A``. The result is the nearest member for every family but Butterfly and Chain of
    three and more factors, Kronecker of three and more factors and sums of families, where it is near and ``lower_bound`` says
    how near, or is 0 where nothing is known.
    Without any option the architecture is that of ``family.random``.

    ============================= ======================= ==================================================================
    family                        options                 method
    ============================= ======================= ==================================================================
    LowRank                       rank, interpolative,    truncated SVD (Eckart-Young 1936); randomised block Krylov
                                  method, rng             (Musco-Musco 2015); CUR
    Monarch, BlockTensorTrain     blocks, rank            SVD of every block (Dao et al. 2022, theorem 1)
    Kronecker                     shapes, terms,          SVD of the rearranged matrix (Van Loan-Pitsianis 1993), Lanczos
                                  method, rng             where it is large; power iterations for three and more factors,
                                                          alternating least squares for sums of such products
    Butterfly, Chain              radix, patterns,        hierarchical SVD (Le et al., arXiv 2411.04506); Chain of BLAST
                                  method, rng             patterns (:func:`structmat.blast_patterns`) and MM*: alternating
                                                          least squares
    BlockSparse                   block, places           entries on the blocks, given ones or the largest
    BlockDiagonal, Diagonal,      blocks                  entries on the support
    Dense
    ``[family, ...]``             rng, and for each       alternating projections of the terms of a sum
                                  term its own
    ============================= ======================= ==================================================================

    Parameters
    ----------
    W
        ``(m, n)``: a NumPy array, torch tensor (the operator comes back in its library, device and dtype) or nested lists.
        Operators, SciPy sparse matrices and LinearOperators are made dense, except for LowRank (see Notes). Integers become
        float64 (torch: the default dtype). Computed in float64 or complex128; never written to. CuPy arrays and torch's CUDA
        tensors are computed where they are (see ``device``).
    family
        LowRank, Kronecker, BlockDiagonal, Monarch, BlockTensorTrain, Butterfly, Chain, BlockSparse, Diagonal or Dense; or a
        list of at least two for a sum of one member of each, with options in a dict: ``[Diagonal, (LowRank, {"rank": 8})]``.
        A term may have a ``budget`` of its own; the budget of the call is dealt to the terms without a size.
    blocks
        Number of blocks, or ``(row blocks, column blocks)``. Sizes that it does not divide are padded.
    shapes, terms
        ``[(m1, n1), (m2, n2), ...]`` of the Kronecker factors; number of Kronecker products that are added. ``terms=N`` of
        shapes ``[(N, N), (m // N, n // N)]`` is the PHM layer.
    block, places
        Shape of the blocks of BlockSparse, or one number for both; ``(rows, cols)``, the block rows and columns of those that
        are kept. Default: a flat block butterfly, or with a budget or tolerance the blocks of largest norm.
    radix, patterns
        Radix of a butterfly; ``(a, b, c, d)`` of every factor of a chain, left to right, at least as large as ``W``.
    rank
        Rank of every block. Ranks beyond the size of a block are kept and filled with zeros.
    budget
        Instead of the size: parameters allowed, a fraction of ``m n`` (float) or a count (int). Gives the least error over
        ranks, terms and, where they are not given, some numbers of blocks, shapes or radices.
    tol
        Instead of the size: relative Frobenius error allowed. Gives the fewest parameters over the same members.
    cores
        Number of cores of a BlockTensorTrain; default 2. More than two have the radices of ``BlockTensorTrain.random`` and
        one ``rank`` for every link.
    order
        Order in which chains of three and more factors are split: ``"left-to-right"`` (default), ``"right-to-left"``,
        ``"balanced"`` or the splits ``0 .. L - 2`` in the order of the cuts.
    refine
        Sweeps of alternating least squares over such a chain, which never increase the error; ``True`` until they converge.
    layout
        Axis orders of Monarch and two-core BlockTensorTrain: ``(rows, columns)``, each ``"strided"`` (a block has the rows of
        equal residue) or ``"contiguous"``; ``"search"`` tries all four. The Fourier matrix is of rank 1 in
        ``("strided", "strided")`` alone.
    permutation
        An index array ``p`` (n,) for the columns or a tuple ``(rows, columns)``: ``W[rows][:, p]`` is projected and
        ``operator`` is the result with the permutations, near ``W`` itself. ``"search"``, for Monarch (the four layouts),
        BlockTensorTrain, Butterfly and Chain, finds digit reversals and transpositions of the axes of the index, which become
        axis orders of the operator. ``lower_bound`` is that of the order found.
    transposed
        Project ``W.T`` and transpose the result: the transposed class of the family.
    interpolative
        LowRank as :class:`structmat.Interpolative`: the same matrix with ``r (m + n - r)`` numbers instead of ``r (m + n)``,
        so that a budget buys a larger rank; Monarch and BlockTensorTrain of two cores as
        :class:`structmat.InterpolativeBlocks`, ``r**2`` numbers less in every block. Ranks beyond a block's smaller size are
        cut to it.
    method
        LowRank: ``"svd"``; ``"randomized"``; ``"cur"``, columns and rows of ``W`` with the best core between them (``indices``
        says which; with ``tol`` the smallest rank found whose own error meets it); or ``"auto"``, the default: randomised for
        sizes above 1024 and ranks up to a sixteenth of them, or a tolerance that such a basis meets with a quarter of the
        columns, and the SVD for all else. Kronecker of two factors: ``"svd"``, ``"lanczos"`` or ``"auto"``, Lanczos for few
        terms of a large matrix, where ``lower_bound`` fails with a probability of 1e-12 over ``rng``. Chain: ``"gradient"``,
        L-BFGS on all factors, which fits patterns that no SVD solves and starts from the other methods where there is one;
        ``"als"``, ``"svd"`` or ``"auto"``.
    rng
        Seed or ``numpy.random.Generator`` of the randomised steps. Default: seed 0, so that results repeat.
    weight, activations
        What the inputs look like: the second moment ``C = E[x x^H]``, ``(n, n)``, a :class:`structmat.Moments`, or samples as
        rows ``(tokens, n)``. The norm is then that of the outputs, ``||(W - A) S||`` with ``S S^H = C``: ``error``,
        ``relative_error``, ``lower_bound`` and ``tol`` are in it (see Notes). For a sum of
        families every term is projected with it.
    mean
        The mean input ``(n,)``, or True to take it from activations or Moments: the weight is centred, and
        ``bias_correction = (W - A) mean`` makes the mean output exact.
    row_weight
        Second moment ``D`` of the outputs' importance, ``(m, m)``, e.g. of the gradients: the norm is
        ``sqrt(tr(D E C E^H))``. For LowRank, Monarch and two-core BlockTensorTrain, with or without ``weight``.
    damping
        Adds this fraction of the mean diagonal to ``C``, and so as much of the Frobenius norm to the error: 1e-3 for many
        samples, 0.1 for fewer than ``2 n``. Default: none.
    device
        None, the default: a CuPy array or CUDA tensor is projected where it is, by its library, without a copy of it on the
        host; all else in NumPy. ``"host"``: in NumPy. ``"own"``: by the library of ``W``, a torch tensor of the CPU too.
        ``method`` says where. Always on the host: Diagonal, BlockSparse, sums of families, ``"cur"``, chains that no SVD
        solves, BlockDiagonal with a budget or tolerance, ``terms`` of three and more Kronecker factors, and with a weight all
        but LowRank, Monarch and two-core BlockTensorTrain.
    progress
        True shows a bar on iterations of more than a second (needs tqdm). An interrupted call leaves nothing behind.

    Returns
    -------
    Projection
        ``operator``, ``error``, ``relative_error``, ``lower_bound``, ``method``, ``seconds``, ``params``, ``indices``,
        ``bias_correction``, ``ridge``.

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
    ImportError
        If ``progress`` is True and tqdm is missing.

    Notes
    -----
    Without ``blocks``, a budget or tolerance compares for Monarch and BlockTensorTrain the default and 4, 8, 16, ... blocks
    in both directions; for BlockDiagonal all counts from 2; without ``shapes``, for Kronecker the two near-square splits.

    An operator, sparse matrix or LinearOperator projected onto LowRank is asked for products alone, ``W @ X`` and
    ``W.H @ Y``, if the randomised method is called for or it has more than ``2**24`` entries: ``rank + 10`` at once for the
    basis, and its ``n`` columns, 128 at once, for the exact error. The randomised error is within about 1 % of the optimum;
    its ``lower_bound`` is certain, not probable, and therefore looser.

    With a weight, LowRank and BlockDiagonal are optimal in closed form; so are Monarch and BlockTensorTrain where the weight
    has no entries between their column classes, and Kronecker where it is a Kronecker product. Else block coordinate descent
    with exact updates (Monarch, BlockTensorTrain), alternating least squares (Kronecker) or L-BFGS (Butterfly, Chain) lead to
    a local optimum that is never worse than the projection without a weight. The closed forms need no inverse of the weight.
    The others put a relative ridge of 1e-6 on one that is nearly singular, for the solution alone and not in the error:
    ``method`` says so and ``ridge`` holds it. Cost: ``m n^2`` for each sweep or iteration.

    Cost for ``n x n``: LowRank and Kronecker one SVD, ``O(n^3)``; Monarch and BlockTensorTrain ``O(n^3 / blocks)``; radix-2
    Butterfly ``O(n^2)``. Memory with ``W``: 3 to 4 times ``W``, 7 with ``refine`` and 10 for the exact LowRank.

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
    >>> W = np.outer(np.ones(16), np.arange(16.0)) + np.eye(16)
    >>> sm.project(W, [sm.Diagonal, (sm.LowRank, {"rank": 1})]).relative_error < 1e-10
    True
    """
    started = time.perf_counter()
    asked = {
        "blocks": blocks,
        "shapes": shapes,
        "terms": terms,
        "block": block,
        "places": places,
        "radix": radix,
        "patterns": patterns,
        "rank": rank,
        "cores": cores,
        "order": order,
        "refine": refine,
        "layout": layout,
        "permutation": permutation,
        "interpolative": interpolative,
        "method": method,
        "rng": rng,
    }
    family, kind = _family(family)
    given = _read_options(asked, kind)
    _check_options(family, kind, given, budget, tol)
    transposed, device = _flag(transposed, "transposed") is True, read_device(device)
    mean = None if mean is False else mean
    weighted = any(option is not None for option in (weight, activations, mean, row_weight, damping))
    if family is LowRank and is_operator(W) and permutation is None and not transposed and not weighted:
        request = _request(family, tuple(W.shape), given, budget, tol)
        with bar(progress, "project") as advance:
            found = project_implicit(W, replace(request, advance=advance), started)
        if found is not None:
            return found
    stays = runs_on_device(family, given, budget is not None or tol is not None, weighted)
    source, target = read(W, device if stays else "host")
    view = read_view(permutation, transposed, (target.shape[0], target.shape[1]))
    note = where(source, target, device)
    with current(target), bar(progress, "project") as advance:
        if weighted:
            norm, center = read_weight(weight, activations, mean, row_weight, damping, target)
            request = replace(_request(family, view.of(target).shape, given, budget, tol), advance=advance)
            solver = kind.solve if family is Sum else solve_weighted
            found = project_weighted(source, target, view, request, norm, center, started, solver)
            return replace(found, method=found.method + note)
        scale = safe_scale(target)
        prepared = view.of(target if scale == 1.0 else target / scale)
        request = _request(family, (prepared.shape[0], prepared.shape[1]), given, budget, tol)
        request = replace(request, norm=frobenius(prepared), rounding=rounding(source), advance=advance)
        solution = kind.solve(prepared, request)
        result = like(scaled(view.back(solution.operator), scale), source)
        found = certify(result, target, solution.lower_bound * scale, solution.method + note, started)
    if (
        request.tol is not None and found.relative_error > request.tol
    ):  # rounding to a short dtype is not in the spectrum
        raise unreachable(request, found.relative_error * request.norm)
    return found if solution.indices is None else replace(found, indices=view.indices(*solution.indices))


def _request(family: Any, shape: tuple[int, ...], given: dict[str, Any], budget: Any, tol: Any) -> Request:
    """What is asked for, but the norm and the rounding, which are those of the matrix."""
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"W: expected one matrix (m, n) with m, n >= 1, got shape {tuple(shape)}")
    free = budget is not None or tol is not None
    return Request(
        family=family,
        norm=0.0,
        limit=None if budget is None else parameter_limit(budget, (shape[0], shape[1])),
        tol=None if tol is None else read_tolerance(tol),
        **(given if free else _defaults(family, (shape[0], shape[1])) | given),
    )


def _family(family: Any) -> tuple[type[Operator], Family]:
    """The operator class and how it is projected onto; :class:`Sum` for a list of families, which is projected in turn."""
    if isinstance(family, (list, tuple)):
        terms = [_term(one) for one in family]
        if len(terms) < 2:
            raise ValueError(f"family: expected one family or at least two in a list, got {len(terms)}")
        return Sum, Family(partial(_solve_sum, terms=terms), ("rng",), ())
    if isinstance(family, type) and issubclass(family, Operator) and family in FAMILIES:
        return family, FAMILIES[family]
    names = ", ".join(f.__name__ for f in FAMILIES)
    shown = family.__name__ if isinstance(family, type) else type(family).__name__
    raise TypeError(f"family: expected one of the operator classes {names}, or a list of them; got {shown}")


def _term(one: Any) -> tuple[type[Operator], Family, dict[str, Any], Any]:
    """A family of a sum, its options and its budget from ``Family`` or ``(Family, options)``."""
    family, options = one if isinstance(one, (list, tuple)) and len(one) == 2 else (one, {})
    if isinstance(family, (list, tuple)):
        raise TypeError("family: expected an operator class or (class, options) for each term of a sum, got a list")
    family, kind = _family(family)
    if not isinstance(options, dict):
        shown = type(options).__name__
        raise TypeError(f"family: expected (class, dict of options) for {family.__name__}, got {shown}")
    budget = options.get("budget")
    for option in options:
        if option not in READERS and option != "budget":
            takes = ", ".join((*kind.options, "budget"))
            raise TypeError(f"{option}: {family.__name__} has no such option; it takes {takes}")
    if isinstance(options.get("permutation"), (list, tuple, np.ndarray)):
        raise TypeError("permutation: index arrays hold for the whole sum; give them to project")
    given = _read_options({name: v for name, v in options.items() if name != "budget"}, kind)
    _check_options(family, kind, given, budget, None)
    return family, kind, given, budget


def _solve_sum(
    target: np.ndarray,
    request: Request,
    weight: Weight | None = None,
    *,
    terms: Sequence[tuple[Any, Family, Any, Any]],
) -> Solution:
    if request.tol is not None:
        raise ValueError("tol: a sum of families takes the sizes of its terms or a budget; expected no tolerance")
    shape, found = (target.shape[0], target.shape[1]), []
    for family, kind, given, budget in terms:
        sized = budget is not None or not kind.sizes or any(size in given for size in kind.sizes)
        free = request.limit is not None and not sized
        one = _request(family, shape, given, request.limit if free else budget, None)
        found.append(Term(kind.solve, replace(one, rounding=request.rounding), free))
    return project_sum(target, request, found, weight)


def _read_options(asked: dict[str, Any], kind: Family) -> dict[str, Any]:
    """The options that are given, checked one by one."""
    read = {name: READERS[name](value) for name, value in asked.items()}
    if kind.methods:
        read["method"] = _name(asked.get("method"), kind.methods, "method")
    return {name: value for name, value in read.items() if value is not None}


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


def _flag(value: Any, name: str) -> bool | None:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}: expected True or False, got {type(value).__name__}")
    return True if value else None


def _name(value: Any, names: tuple[str, ...], name: str) -> str | None:
    if value is not None and value not in names:
        raise ValueError(f"{name}: expected one of {', '.join(names)}; got {value!r}")
    return value


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


def _block(value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    if not isinstance(value, (tuple, list)):
        value = (value, value)
    if len(value) != 2:
        raise ValueError(f"block: expected an int or (rows, columns), got {len(value)} numbers")
    return _count(value[0], "block") or 0, _count(value[1], "block") or 0


READERS: dict[str, Callable[[Any], Any]] = {
    "blocks": _blocks,
    "shapes": partial(_tuples, name="shapes", length=2),
    "terms": partial(_count, name="terms"),
    "block": _block,
    "places": lambda value: value,
    "radix": partial(_count, name="radix", least=2),
    "patterns": _patterns,
    "rank": partial(_count, name="rank"),
    "cores": partial(_count, name="cores", least=2),
    "order": read_order,
    "refine": read_refine,
    "layout": read_layout,
    "permutation": read_search,
    "interpolative": partial(_flag, name="interpolative"),
    "method": lambda value: value,
    "rng": lambda value: value,
}
