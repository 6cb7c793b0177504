"""Butterfly and other chains: one factor after another is split off by batched SVDs, in any order."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from structmat.patterns import AxisOrder, Pattern, compose
from structmat.projection.alternating import alternate
from structmat.projection.certificate import frobenius
from structmat.projection.chain_bounds import inner_bound
from structmat.projection.device import native, on_device
from structmat.projection.links import (
    adjoint,
    expand,
    left_blocks,
    left_view,
    multiply,
    products,
    right_blocks,
    right_view,
    split_view,
)
from structmat.projection.permutation import digit_orders, reorder
from structmat.projection.progress import Advance, quiet
from structmat.projection.selection import Request, Solution, allowed_error, infeasible, unreachable
from structmat.projection.support import restrict
from structmat.projection.svd import fill, safe_bound, truncated
from structmat.structures.block_tensor_train import (
    BlockTensorTrain,
    balanced_radices,
    chain_patterns,
    digit_reversal,
    output_radices,
)
from structmat.structures.butterfly import Butterfly, butterfly_patterns
from structmat.structures.chain import Chain

_ROUNDING = 1e-13  # relative error below which neither a better lower bound nor a better chain says anything
_LARGE = 1 << 22  # entries from which some rows at a time go through several cuts
_SLAB = 1 << 18  # their entries, which stay in a cache
ORDERS = ("left-to-right", "right-to-left", "balanced")


class Sweep(NamedTuple):
    """Factors ``(a, d, b, c)`` of a chain near a matrix, their distance from it, and a lower bound of the distance."""

    factors: tuple[np.ndarray, ...]
    error: float
    lower_bound: float


class Link(NamedTuple):
    """A factor of the chain without redundancy: its pattern, and the pair it was fused from."""

    pattern: Pattern
    pair: tuple[Link, Link] | None = None


def sweep(
    target: np.ndarray,
    patterns: Sequence[Pattern],
    order: str | Sequence[int] = "left-to-right",
    bounds: bool = True,
) -> Sweep:
    """A chain near a matrix: hierarchical factorization with orthonormal factors around the one that is split.

    At every split the active blocks ``T`` are cut into ``U (U^H T)`` by a truncated SVD. With ``E_s`` the distance to the
    two-factor set at split ``s``, and where the splits peel factors off the ends (``"left-to-right"``, ``"right-to-left"``),
    the discarded parts are orthogonal to each other (as in TT-SVD), so that
    ``max E_s <= best possible <= error = sqrt(sum of the discarded s**2) <= sqrt(sum E_s**2) <= sqrt(L - 1) max E_s``.
    Any other order is proven to ``error <= sum E_s``. Members are recovered to rounding. Source: Le, Zheng, Riccietti,
    Gribonval, "Butterfly factorization with error guarantees", SIAM J. Matrix Anal. Appl. 46(4), 2025 (arXiv 2411.04506),
    algorithm with orthonormalisation; the bound: Oseledets, SIAM J. Sci. Comput. 33, 2011.

    Parameters
    ----------
    target
        ``(rows, columns)`` of the chain, float64 or complex128.
    patterns
        Chainable patterns, left to right, of any ranks. A chain whose product is not dense keeps the entries on its support.
        Redundant pairs (a rank that restricts no block) are fused, and split again exactly at the end.
    order
        One of the names above, ``"balanced"`` (the middle first), or the splits ``0 .. L - 2`` in the order of the cuts.
    bounds
        Whether to look for a better lower bound than the first split gives.

    Notes
    -----
    ``O(n^2)`` for the square radix-2 chain; the lower bound costs as much again, and is left at the first split where the
    error is rounding. Memory: about two and a half times the matrix.
    """
    links = without_redundancy(patterns)
    fused = [link.pattern for link in links]
    whole, outside = restrict(target, reduce(Pattern.product, fused))
    norm = frobenius(target)
    cuts = splits(order, patterns, links)
    factors, discarded, first = hierarchical(whole, fused, cuts)
    if peels(cuts):
        error = math.sqrt(discarded + outside**2)
    else:
        error = math.hypot(frobenius(whole - expand(factors, fused)), outside)
    bound = safe_bound(math.sqrt(max(0.0, first)), norm, max(target.shape))
    if bounds and error > _ROUNDING * norm:
        bound = max(bound, inner_bound(whole, fused, cuts[:1]))
    if len(factors) == 1 and (on_device(target) or np.shares_memory(factors[0], target)):
        factors = [factors[0].copy()]
    parts = [part for link, f in zip(links, factors, strict=True) for part in unfused(link, f)]
    return Sweep(balance(parts), error, math.hypot(bound, outside))


def hierarchical(
    whole: np.ndarray,
    patterns: Sequence[Pattern],
    cuts: Sequence[int],
) -> tuple[list[np.ndarray], float, float]:
    """Factors of a chain without redundancy, the sum of the squares of the discarded parts, and a bound of the first one.

    The parts left of the one that carries the norm have orthonormal columns in every block and those right of it
    orthonormal rows; QR factorizations move the norm to the part that is split next.
    """
    table, last = products(patterns), len(patterns) - 1
    parts, discarded, first = _peel(whole, patterns, cuts)
    done = centre = len(parts) - 1
    spans = [*((i, i) for i in range(done)), (done, last)]
    for i, cut in enumerate(cuts[done:], done):
        k = next(j for j, (low, high) in enumerate(spans) if low <= cut < high)
        while centre != k:
            centre = _move(parts, [table[s] for s in spans], centre, 1 if k > centre else -1)
        low, high = spans[k]
        left, right = table[low, cut], table[cut + 1, high]
        rank = left.chain_rank(right) or 0
        blocks = split_view(parts[k], left, right)
        if i + 1 < len(cuts) and cuts[i + 1] < cut:
            found = truncated(adjoint(blocks), rank)
            x, y = adjoint(found.y), adjoint(found.u)
        else:
            found = truncated(blocks, rank)
            x, y, centre = found.u, found.y, k + 1
        parts[k : k + 1] = [left_blocks(x, left), right_blocks(y, right)]
        spans[k : k + 1] = [(low, cut), (cut + 1, high)]
        discarded += found.discarded
        first = first if i else found.bound
    return parts, discarded, first


def _peel(whole: np.ndarray, patterns: Sequence[Pattern], cuts: Sequence[int]) -> tuple[list[np.ndarray], float, float]:
    """The first factors of a large matrix that is cut from the left, and what is left of it; ``[whole]`` for others.

    Rows of equal residue modulo the ``d`` of a factor meet no others in this factor and those before it: a slab of such classes
    goes through all these cuts before the next one is read. No intermediate result is as large as half the matrix, whose
    memory would cost more than the arithmetic. A device has no cache to keep slabs in: there all goes through at once.
    """
    if on_device(whole):
        return [whole], 0.0, 0.0
    a, d, rows, cols = whole.shape
    ahead = next((i for i, cut in enumerate(cuts) if cut != i), len(cuts))
    deep = [t for t in range(2, ahead + 1) if whole.size // (patterns[t - 1].d // d) <= _SLAB]
    if whole.size < _LARGE or whole.size <= _SLAB or not deep:
        return [whole], 0.0, 0.0
    head, rest = patterns[: deep[-1]], reduce(Pattern.product, patterns[deep[-1] :])
    classes = head[-1].d // d
    width, rank = max(1, _SLAB * classes // whole.size), rest.b // classes
    parts = [np.empty((p.a, p.d // (classes * d), classes, d, p.b, p.c), whole.dtype) for p in head]
    left = np.empty((rest.a, d, rank, classes, rest.c), whole.dtype)
    grouped, discarded, first = whole.reshape(a, d, rows // classes, classes, cols), 0.0, 0.0
    for start in range(0, classes, width):
        at = slice(start, min(start + width, classes))
        size = at.stop - start
        slab = np.ascontiguousarray(grouped[:, :, :, at]).reshape(a, d, -1, cols)
        inner = [p._replace(d=p.d // classes * size) for p in head] + [rest._replace(b=rank * size)]
        found, lost, bound = hierarchical(slab, inner, range(len(head)))
        for part, blocks in zip(parts, found[:-1], strict=True):
            part[:, :, at] = blocks.reshape(*part.shape[:2], size, *part.shape[3:])
        left[:, :, :, at] = found[-1].reshape(rest.a, d, rank, size, rest.c)
        discarded, first = discarded + lost, first + bound
    shapes = [(p.a, p.d, p.b, p.c) for p in (*head, rest)]
    return [x.reshape(shape) for x, shape in zip((*parts, left), shapes, strict=True)], discarded, first


def _move(parts: list[np.ndarray], patterns: Sequence[Pattern], centre: int, step: int) -> int:
    """Carry the norm one part to the right or left by the QR factorization of every block; the product stays."""
    low = min(centre, centre + step)
    left, right = patterns[low], patterns[low + 1]
    x, y = left_view(parts[low], left, right), right_view(parts[low + 1], left, right)
    if step > 0:
        x, r = np.linalg.qr(x)
        y = multiply(r, y)
    else:
        q, r = np.linalg.qr(adjoint(y))
        x, y = multiply(x, adjoint(r)), adjoint(q)
    parts[low], parts[low + 1] = left_blocks(x, left), right_blocks(y, right)
    return centre + step


# ---- orders and redundancy ------------------------------------------------------------------------------------------


def without_redundancy(patterns: Sequence[Pattern]) -> list[Link]:
    """The chain after fusing every pair whose rank ``r >= min(b1, c2)`` restricts nothing (arXiv 2411.04506, section 4)."""
    links, i = [Link(p) for p in patterns], 0
    while i + 1 < len(links):
        left, right = links[i].pattern, links[i + 1].pattern
        if (left.chain_rank(right) or 0) >= min(left.b, right.c):
            links[i : i + 2] = [Link(left.product(right), (links[i], links[i + 1]))]
            i = max(0, i - 1)
        else:
            i += 1
    return links


def unfused(link: Link, blocks: np.ndarray) -> list[np.ndarray]:
    """The factors of a fused pair, exactly: an identity beside the blocks themselves."""
    if link.pair is None:
        return [blocks]
    left, right = (part.pattern for part in link.pair)
    rank, view = left.chain_rank(right) or 0, split_view(blocks, left, right)
    b, c = view.shape[-2:]
    eye = np.broadcast_to(np.eye(min(b, c), dtype=view.dtype, like=view), (*view.shape[:-2], min(b, c), min(b, c)))
    x, y = fill(eye, view, rank) if b <= c else fill(view, eye, rank)
    return [*unfused(link.pair[0], left_blocks(x, left)), *unfused(link.pair[1], right_blocks(y, right))]


def splits(order: str | Sequence[int], patterns: Sequence[Pattern], links: Sequence[Link]) -> list[int]:
    """The splits of the fused chain, in the order of the cuts; ``ValueError`` for what is no order."""
    count = len(patterns) - 1
    if isinstance(order, str):
        if order not in ORDERS:
            raise ValueError(f"order: expected one of {', '.join(ORDERS)} or a sequence of splits, got {order!r}")
        inner = list(range(len(links) - 1))
        return {"left-to-right": inner, "right-to-left": inner[::-1], "balanced": _balanced(0, len(links) - 1)}[order]
    if sorted(order) != list(range(count)):
        raise ValueError(f"order: expected each of the splits 0..{count - 1} once, got {list(order)}")
    ends = np.cumsum([_length(link) for link in links]) - 1  # the last original factor of every link
    place = {int(end): i for i, end in enumerate(ends[:-1])}
    return [place[cut] for cut in order if cut in place]


def _length(link: Link) -> int:
    return 1 if link.pair is None else _length(link.pair[0]) + _length(link.pair[1])


def _balanced(low: int, high: int) -> list[int]:
    if high <= low:
        return []
    middle = (low + high) // 2
    return [middle, *_balanced(low, middle), *_balanced(middle + 1, high)]


def peels(cuts: Sequence[int]) -> bool:
    """Whether every cut takes a single factor off an end of what is left, which makes the discarded parts orthogonal."""
    low, high = 0, len(cuts)
    for cut in cuts:
        if cut == low:
            low += 1
        elif cut == high - 1:
            high -= 1
        else:
            return False
    return True


def balance(factors: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
    """The same chain with factors of nearly equal norm, by exact powers of two: the sweep leaves all of it in one."""
    norms = [frobenius(f) for f in factors]
    if not all(norms):
        return tuple(factors)
    logs = np.log2(norms)
    shifts = np.diff(np.rint(np.cumsum(logs.mean() - logs)), prepend=0.0)  # whole numbers that add up to 0
    return tuple(f * 2.0**shift for f, shift in zip(factors, shifts, strict=True))


# ---- families -------------------------------------------------------------------------------------------------------


class Fit(NamedTuple):
    """A chain near a matrix with the axis orders that the search found, and how it was found."""

    found: Sweep
    out_order: AxisOrder | None
    in_order: AxisOrder | None
    method: str


def fit(target: np.ndarray, patterns: Sequence[Pattern], request: Request) -> Fit:
    """The chain nearest to a matrix that it covers, by the sweep, the search of axis orders and the refinement asked for."""
    padded, order = pad(target, patterns), request.order or ORDERS[0]
    rows = cols = None
    if request.permutation == "search":
        candidates = digit_orders(padded, patterns)
        tried = [
            (sweep(reorder(padded, r, c), patterns, order, bounds=False).error, i)
            for i, (r, c) in enumerate(candidates)
        ]
        rows, cols = candidates[_least(tried, request.norm)]
        padded = reorder(padded, rows, cols)
    found = sweep(padded, patterns, order)
    refined = 0
    if request.refine and found.error > _ROUNDING * request.norm and len(patterns) > 2:
        links = without_redundancy(patterns)
        fused = [link.pattern for link in links]
        found, refined = refine(padded, fused, links, found, request.refine, request.advance)
    note = f" + {refined} sweeps of alternating least squares" if refined else ""
    note += ", axis orders searched" if request.permutation == "search" else ""
    return Fit(found, rows.T if rows else None, cols, method(patterns, order) + note)


def _least(tried: Sequence[tuple[float, int]], norm: float) -> int:
    """The first candidate whose error is the least but for rounding."""
    best = min(error for error, _ in tried)
    return next(i for error, i in tried if error <= best + _ROUNDING * norm)


def refine(
    target: np.ndarray,
    patterns: Sequence[Pattern],
    links: Sequence[Link],
    start: Sweep,
    sweeps: int | bool,
    advance: Advance = quiet,
) -> tuple[Sweep, int]:
    """A sweep's result improved by alternating least squares, never made worse, and the number of sweeps taken."""
    whole, outside = restrict(target, reduce(Pattern.product, patterns))
    factors, errors = alternate(whole, fused_factors(start.factors, links), patterns, sweeps, advance)
    error = math.hypot(errors[-1], outside)
    if error >= start.error:
        return start, 0
    parts = [part for link, f in zip(links, factors, strict=True) for part in unfused(link, f)]
    return Sweep(balance(parts), error, min(start.lower_bound, error)), len(errors) - 1


def fused_factors(factors: Sequence[np.ndarray], links: Sequence[Link]) -> list[np.ndarray]:
    """The factors of the chain without redundancy, from those of the whole chain."""
    rest, result = list(factors), []
    for link in links:
        count = _length(link)
        part, rest = rest[:count], rest[count:]
        result.append(expand(part, [Pattern(f.shape[0], f.shape[2], f.shape[3], f.shape[1]) for f in part]))
    return result


def project_chain(target: np.ndarray, request: Request) -> Solution:
    """A chain of given patterns; optimal for one and two factors, else within ``sqrt(L - 1)`` of the best."""
    if request.patterns is None:
        raise ValueError("patterns: projection onto a Chain needs the patterns (a, b, c, d) of its factors")
    check_chainable(request.patterns, target.shape)
    return _solution(Chain, target, fit(target, request.patterns, request))


def project_butterfly(target: np.ndarray, request: Request) -> Solution:
    """A butterfly matrix of given patterns or radix.

    A budget or a tolerance compares the default patterns and the radices 2, 4, 8, ... that leave at least two factors.
    """
    shape = (target.shape[0], target.shape[1])
    if request.patterns is not None:
        check_chainable(request.patterns, target.shape, rank=1)
        return _solution(Butterfly, target, fit(target, request.patterns, request))
    if request.free:
        radices = (None, *(2**i for i in range(1, max(shape).bit_length() + 1)))
        candidates = {tuple(butterfly_patterns(shape, radix)) for radix in radices}
        longest = max(map(len, candidates))
        return _solution(
            Butterfly, target, choose(target, [c for c in candidates if len(c) >= min(2, longest)], request)
        )
    return _solution(Butterfly, target, fit(target, butterfly_patterns(shape, request.radix), request))


def project_train(target: np.ndarray, request: Request) -> Solution:
    """A Block Tensor-Train of three and more cores: a chain whose output digits are reversed.

    A budget or a tolerance picks the rank, the same for every link: the largest within the budget, the smallest within the
    tolerance by bisection.
    """
    shape, cores = (target.shape[0], target.shape[1]), request.cores or 2
    q, p = balanced_radices(shape[0], cores), balanced_radices(shape[1], cores)

    def patterns(rank: int) -> tuple[Pattern, ...]:
        return tuple(Pattern(*t) for t in chain_patterns(q, p, (1, *([rank] * (cores - 1)), 1)))

    order = digit_reversal(output_radices(patterns(1), "BlockTensorTrain"))
    padded = np.pad(target, [(0, math.prod(q) - shape[0]), (0, math.prod(p) - shape[1])])[order.T.permutation()]
    found = (
        fit(padded, patterns(request.rank or 1), request) if not request.free else _rank_of(padded, patterns, request)
    )
    factors = tuple(native(f) for f in found.found.factors)
    operator = BlockTensorTrain._rebuild(factors, shape, compose(found.out_order, order)[1], found.in_order)
    return Solution(operator, found.found.lower_bound, found.method)


def _rank_of(padded: np.ndarray, patterns: Callable[[int], tuple[Pattern, ...]], request: Request) -> Fit:
    """The fit of the largest rank within the budget, or of the smallest within the tolerance."""
    full = 1  # the first rank that restricts nothing
    while len(without_redundancy(patterns(full))) > 1:
        full *= 2
    low, high = 1, full
    if request.limit is not None:
        if parameters(patterns(1)) > request.limit:
            raise infeasible(request, parameters(patterns(1)))
        rank = max(r for r in range(1, full + 1) if parameters(patterns(r)) <= request.limit)
        return fit(padded, patterns(rank), request)
    best: Fit | None = None
    closest = math.inf
    while low <= high:
        middle = (low + high) // 2
        found = fit(padded, patterns(middle), request)
        if found.found.error <= allowed_error(request):
            best, high = found, middle - 1
        else:
            low = middle + 1
            closest = min(closest, found.found.error)
    if best is None:
        raise unreachable(request, closest)
    return best


def _solution(family: type[Chain], target: np.ndarray, found: Fit) -> Solution:
    shape = (target.shape[0], target.shape[1])
    factors = tuple(native(f) for f in found.found.factors)
    operator = family._rebuild(factors, shape, found.out_order, found.in_order)
    return Solution(operator, found.found.lower_bound, found.method)


def choose(target: np.ndarray, members: Iterable[Sequence[Pattern]], request: Request) -> Fit:
    """The member with the least error within the budget, or the one with the fewest parameters within the tolerance."""
    candidates = sorted(members, key=parameters)
    if request.limit is not None:
        fitting = [c for c in candidates if parameters(c) <= request.limit]
        if not fitting:
            raise infeasible(request, parameters(candidates[0]))
        return min((fit(target, c, request) for c in fitting), key=lambda f: f.found.error)
    best = math.inf
    for c in candidates:  # by size: the first one that is near enough is the smallest
        found = fit(target, c, request)
        if found.found.error <= allowed_error(request):
            return found
        best = min(best, found.found.error)
    raise unreachable(request, best)


def parameters(patterns: Sequence[Pattern]) -> int:
    """Stored numbers of a chain."""
    return sum(p.nparams for p in patterns)


def pad(target: np.ndarray, patterns: Sequence[Pattern]) -> np.ndarray:
    """The matrix extended by zeros to the size of the chain."""
    m, n = target.shape
    rows, cols = patterns[0].rows, patterns[-1].cols
    return target if (rows, cols) == (m, n) else np.pad(target, [(0, rows - m), (0, cols - n)])


def method(patterns: Sequence[Pattern], order: str | Sequence[int]) -> str:
    """What the sweep is for a chain of this length and order."""
    names = {1: "entries on the support (optimal)", 2: "blockwise SVD (optimal)"}
    how = {"left-to-right": "from left to right", "right-to-left": "from right to left", "balanced": "from the middle"}
    return names.get(
        len(patterns), f"hierarchical SVD {how[order] if isinstance(order, str) else 'in the order given'}"
    )


def check_chainable(patterns: Sequence[Pattern], shape: tuple[int, ...], rank: int | None = None) -> None:
    """``ValueError`` unless neighbours are chainable (with ``rank`` if given) and the chain covers the matrix."""
    for p, q in pairwise(patterns):
        found = p.chain_rank(q)
        if found is None:
            raise ValueError(f"patterns: neighbours {tuple(p)} and {tuple(q)} are not chainable")
        if rank is not None and found != rank:
            raise ValueError(f"patterns: neighbours {tuple(p)} and {tuple(q)} have rank {found}, expected {rank}")
    size = (patterns[0].rows, patterns[-1].cols)
    if size[0] < shape[0] or size[1] < shape[1]:
        raise ValueError(f"patterns: the chain is {size[0]}x{size[1]}, too small for a matrix {shape[0]}x{shape[1]}")
