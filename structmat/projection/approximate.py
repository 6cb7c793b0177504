"""approximate: one matrix, all families, ranked."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from structmat.operator import Operator
from structmat.projection.approximations import Approximations
from structmat.projection.progress import Advance, bar
from structmat.projection.search import Search
from structmat.projection.search_blocks import kronecker, low_rank, two_factor, verify
from structmat.projection.search_chains import block_diagonal, butterflies, chains, three_factors
from structmat.structures.block_diagonal import BlockDiagonal
from structmat.structures.block_tensor_train import BlockTensorTrain
from structmat.structures.butterfly import Butterfly
from structmat.structures.chain import Chain
from structmat.structures.kronecker import Kronecker
from structmat.structures.low_rank import LowRank
from structmat.structures.monarch import Monarch

FAMILIES: tuple[type[Operator], ...] = (
    LowRank,
    Kronecker,
    Monarch,
    BlockTensorTrain,
    BlockDiagonal,
    Butterfly,
    Chain,
)


def approximate(
    W: Any,
    *,
    budget: float | None = None,
    tol: float | None = None,
    families: Iterable[type[Operator]] | None = None,
    weight: Any = None,
    batch: int = 1,
    allow_slower: bool = False,
    progress: bool | None = None,
    rng: Any = 0,
) -> Approximations:
    """Find the family that fits a matrix: project it onto many architectures of each, and rank the best of them.

    The spectrum of every arrangement of the matrix gives the errors for all ranks at once; it is estimated for many
    arrangements, from samples, and computed exactly for the few that look best. What is returned is certified, as by
    :func:`structmat.project`. The spectra are computed on the host, wherever ``W`` is.

    Parameters
    ----------
    W
        ``(m, n)``, as for ``project``; never written to.
    budget
        Parameters allowed, a fraction of ``m n`` (float) or a count (int). Entries are ranked by error.
    tol
        Relative Frobenius error allowed. Entries are ranked by parameters. Exactly one of ``budget`` and ``tol``.
    families
        Operator classes, default all: LowRank (plain and interpolative), Kronecker (sums of products of two factors), Monarch
        and BlockTensorTrain (numbers of blocks; classes of rows and columns as runs or strided, four orders), BlockDiagonal
        (numbers of blocks), Butterfly (radices), Chain (three factors).
    weight
        Second moment of the inputs, as for ``project``. Architectures are screened by its diagonal, and then projected onto
        and ranked in the norm of the outputs, which is that of ``tol`` too.
    batch
        Columns to which the result is applied at once, for the predicted speed.
    allow_slower
        By default what is worse than dense in flops or predicted speed is marked and ranks after all others: a Kronecker sum
        with half the parameters can cost nine times the flops. True ranks it with the others.
    progress
        True shows a bar on runs of more than a second (needs tqdm). An interrupted run leaves nothing behind.
    rng
        Seed or ``numpy.random.Generator`` of the samples; results are the same for the same seed.

    Returns
    -------
    Approximations
        Ranked; at least one entry.

    Raises
    ------
    TypeError, ValueError, numpy.linalg.LinAlgError
        As ``project``; if not exactly one of ``budget`` and ``tol`` is given, a family is none of those above, ``batch`` is
        below 1, or nothing tried meets the budget (the message names the nearest count) or the tolerance with fewer
        parameters than dense (it names the best error).
    ImportError
        If ``progress`` is True and tqdm is missing.

    Notes
    -----
    ``flops`` is a ratio to dense; ``speed`` is predicted: every product takes the longer of its flops and its memory traffic
    at 8 flops a byte (the roofline model), with no overhead for calls and small blocks. It tells families apart, it
    promises nothing.

    Screening looks, above 64 x 64, at no more than 24 pairs of Kronecker shapes and at block counts near powers of two whose
    blocks are at most eight times as flat as the matrix; 4, then 32 blocks stand for all. The best is within about 1 % of an
    exhaustive search. Cost for ``n x n``: 3 to 6 dense SVDs. Memory: about 8 times ``W`` in double precision, results included,
    and 14 times with Chain below 2048 x 2048.

    Examples
    --------
    >>> import numpy as np, structmat as sm
    >>> x = np.arange(16.0)
    >>> kernel = np.exp(-((x[:, None] - x) ** 2) / 50)
    >>> found = sm.approximate(np.kron(kernel, kernel), budget=0.02)
    >>> found.best.label, found.best.relative_error < 1e-12
    ('Kronecker, 16x16 (x) 16x16', True)
    >>> print(str(found).splitlines()[0])
    256x256 within 1310 parameters (2.00% of dense), by error
    """
    search = Search(W, budget, tol, _checked(families), weight, batch, allow_slower, rng)
    with bar(progress, "approximate") as advance:
        _run(search, advance)
    return search.result()


def _run(search: Search, advance: Advance) -> None:
    """Screen and verify every family."""
    finalists = []
    if LowRank in search.families:
        finalists = [low_rank(search)]
    if Kronecker in search.families:
        finalists += kronecker(search, advance)
    if Monarch in search.families or BlockTensorTrain in search.families:
        finalists += two_factor(search, advance)
    advance(0, len(finalists))
    for one in finalists:
        verify(search, one)
        advance(1, 0)
    if BlockDiagonal in search.families:
        block_diagonal(search)
    if Butterfly in search.families:
        chains(search, Butterfly, butterflies(search), advance)
    if Chain in search.families:
        chains(search, Chain, three_factors(search), advance)


def _checked(families: Any) -> tuple[type[Operator], ...]:
    if families is None:
        return FAMILIES
    given = (families,) if isinstance(families, type) else tuple(families)
    for f in given:
        if f not in FAMILIES:
            names, shown = ", ".join(x.__name__ for x in FAMILIES), getattr(f, "__name__", type(f).__name__)
            raise TypeError(f"families: expected operator classes of {names}; got {shown}")
    if not given:
        raise ValueError("families: expected at least one operator class, got none")
    return tuple(f for f in FAMILIES if f in given)
