"""Monarch and two-core Block Tensor-Train in a weighted norm: block coordinate descent with exact rank-r updates."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from structmat.projection.certificate import frobenius
from structmat.projection.device import straight
from structmat.projection.drivers import eigh, svd
from structmat.projection.progress import Advance, quiet
from structmat.projection.selection import Ladder, Request, Solution, allowed_error, choose, unreachable
from structmat.projection.svd import fill
from structmat.projection.two_factor import Layout, Place, candidates, member
from structmat.projection.weight import Weight
from structmat.projection.weighted_bounds import two_factor_bound
from structmat.projection.weighted_chain import weighted_train
from structmat.projection.weighted_classes import Classes, Pair, safe, truncated

SWEEPS = 20
STALLED = 3e-3  # relative decrease of the error in one sweep at which the descent stops
EXACT = 1e-13  # relative error that no sweep improves


def descend(
    white: np.ndarray,  # (l, s, k, p): the target with whitened diagonal blocks of the weight
    start: tuple[np.ndarray, np.ndarray],  # u (k, l, s, r), v (k, l, r, p)
    columns: np.ndarray | None,  # (k p, k p), the identity in every diagonal block
    rows: np.ndarray | None,  # (l s, l s), likewise
    advance: Advance = quiet,
) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """Better factors and the error after every sweep, which never grows: each block in turn gets its best rank-r value.

    With ``E = W - X`` and the gradient ``G = D E C``, block ``(j, k)`` of all others fixed wants ``Z = G_jk + X_jk``, because
    the diagonal blocks of ``C`` and ``D`` are identities; its best value is the truncated SVD of ``Z`` (Eckart-Young). Without
    weights between row classes all ``j`` are updated at once. Cost of a sweep: ``m n^2`` and the truncations (times ``l`` with
    weights between row classes).
    """
    l, s, k, p = white.shape
    u, v = (x.copy() for x in start)
    rank = u.shape[-1]
    x = np.einsum("klsr,klrp->lskp", u, v, optimize=True)
    error = (white - x).reshape(l * s, k * p)
    gradient = error if columns is None else error @ columns
    gradient = gradient if rows is None else rows @ gradient
    gradient = gradient.copy().reshape(l, s, k, p)
    groups = [slice(0, l)] if rows is None else [slice(j, j + 1) for j in range(l)]
    norm = frobenius(white)
    history = [_energy(white - x, gradient)]
    while len(history) <= SWEEPS and history[-1] > EXACT * norm:
        advance(1, 1)
        before = (u.copy(), v.copy())
        accurate = history[-1] <= 1e-6 * norm  # where Gram matrices would lose what is left
        for j in groups:
            for i in range(k):
                u[i, j], v[i, j] = best_rank(gradient[j, :, i] + x[j, :, i], rank, accurate)
                new = u[i, j] @ v[i, j]
                change = (x[j, :, i] - new).reshape(-1, p)
                x[j, :, i] = new
                if rows is not None:
                    change = rows[:, j.start * s : j.stop * s] @ change
                if columns is None:
                    gradient[:, :, i] += change.reshape(l, s, p)
                else:
                    gradient += (change @ columns[i * p : (i + 1) * p]).reshape(l, s, k, p)
        energy = _energy(white - x, gradient)
        if not energy < history[-1]:
            u, v = before
            break
        history.append(energy)
        if history[-2] - energy <= STALLED * history[-2]:
            break
    return u, v, history


def _energy(error: np.ndarray, gradient: np.ndarray) -> float:
    return float(np.sqrt(max(0.0, float(np.vdot(error, gradient).real))))


def best_rank(z: np.ndarray, rank: int, accurate: bool) -> tuple[np.ndarray, np.ndarray]:
    """Factors ``(..., s, r)`` and ``(..., r, p)`` of the best rank-r blocks, from the smaller Gram matrix where allowed."""
    s, p = z.shape[-2:]
    zh = z.conj().swapaxes(-1, -2)
    if rank >= min(s, p):
        eye = np.broadcast_to(np.eye(min(s, p), dtype=z.dtype, like=z), (*z.shape[:-2], min(s, p), min(s, p)))
        return fill(eye, z, rank) if s <= p else fill(z, eye, rank)
    if accurate:
        u, values, vh = svd(z)
        return u[..., :rank], values[..., :rank, None] * vh[..., :rank, :]
    if s <= p:
        u = eigh(z @ zh)[1][..., -rank:]
        return u, u.conj().swapaxes(-1, -2) @ z
    v = eigh(zh @ z)[1][..., -rank:]
    return z @ v, v.conj().swapaxes(-1, -2)


def fit(classes: Classes, rank: int, norm: float, advance: Advance = quiet) -> Pair:
    """The best pair of factors found: closed form where the classes are independent, else descent from it.

    The unweighted projection is the other start, where its weighted error is lower: the result is never worse than it.
    """
    at = classes.at
    kept = min(rank, at.s, at.p)
    c, d = classes.columns, classes.rows
    factors = (None if d is None else d.factors, None if c is None else c.factors[:, None])
    left, right = truncated(classes.blocks, *factors, classes.parts, kept)
    if classes.decoupled:
        return classes.pair(left, right, closed=True)
    found = improve(classes, left, right, advance)
    if classes.ridge:  # the descent goes by the damped norm, in which an exact start is not exact
        found = min(classes.pair(left, right), found, key=lambda pair: pair.error)
    plain = classes.pair(*best_rank(classes.blocks, kept, accurate=False))
    if plain.error < found.error and found.error > EXACT * norm:
        found = min(plain, improve(classes, plain.left, plain.right, advance), key=lambda pair: pair.error)
    return found


def improve(classes: Classes, left: np.ndarray, right: np.ndarray, advance: Advance = quiet) -> Pair:
    """The pair after descent, in whitened coordinates and back."""
    c, d = classes.columns, classes.rows
    u, v, blocks = left, right, classes.blocks
    if d is not None:
        th = d.solid.conj().swapaxes(-1, -2)
        u, blocks = th @ u, th @ blocks
    if c is not None:
        v, blocks = v @ c.solid[:, None], blocks @ c.solid[:, None]
    white = straight(blocks.transpose(1, 2, 0, 3))
    coupling = (None if c is None else c.coupling, None if d is None else d.coupling)
    u, v, history = descend(white, (u, v), *coupling, advance)
    if d is not None:
        u = d.inverse.conj().swapaxes(-1, -2) @ u
    if c is not None:
        v = v @ c.inverse[:, None]
    return classes.pair(u, v, history, error=None if classes.ridge else history[-1])


def balanced(left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same blocks as ``U sqrt(s)`` and ``sqrt(s) V^H``: both factors equal in norm, as a plain projection leaves them."""
    q1, r1 = np.linalg.qr(left)
    q2, r2 = np.linalg.qr(right.conj().swapaxes(-1, -2))
    x, s, yh = svd(r1 @ r2.conj().swapaxes(-1, -2))
    root = np.sqrt(s)
    return (q1 @ x) * root[..., None, :], (root[..., None] * yh) @ q2.conj().swapaxes(-1, -2)


def weighted_two_factor(target: np.ndarray, request: Request, weight: Weight) -> Solution:
    """The Monarch or two-core Block Tensor-Train matrix whose outputs are nearest, by block coordinate descent.

    Optimal where the weight has no entries between column classes and between row classes (for one class of columns and no
    weight of the rows: low-rank row blocks). A budget or a tolerance compares the same layouts as without a weight: a budget
    by the spectra in the weight's diagonal blocks, a tolerance by bisection over ranks, which descends for each.
    """
    if (request.cores or 2) > 2:
        if request.interpolative:
            raise ValueError(f"interpolative: only for two cores, got cores={request.cores}")
        return weighted_train(target, request, weight)
    shape = (target.shape[0], target.shape[1])
    places = candidates(request, shape)
    if request.tol is not None:
        classes, found = smallest(target, request, weight, places)
    elif request.limit is not None:
        ladders = [ladder(Classes(target, a, weight), request) for a in places]
        classes, rank = choose(ladders, request)
        found = fit(classes, rank, request.norm, request.advance)
    else:
        every = [Classes(target, a, weight) for a in places]
        fits = [(c, fit(c, request.rank or 1, request.norm, request.advance)) for c in every]
        classes, found = min(fits, key=lambda pair: pair[1].error)
    left, right = stored(found, classes.at, None if request.interpolative else request.rank)
    bound = found.error if found.closed else 0.0
    if request.bound and not found.closed:
        bound = two_factor_bound(classes, found.left.shape[-1])
    name = "weighted blockwise SVD (optimal)"
    if not found.closed:
        name = f"weighted block coordinate descent, {max(0, len(found.history) - 1)} sweeps"
    name += ", interpolative form" if request.interpolative else ""
    operator = member(left, right, classes.place, request, shape)
    return Solution(operator, safe(bound, target, weight), name, ridge=0.0 if found.closed else weight.ridge)


def smallest(target: np.ndarray, request: Request, weight: Weight, places: Sequence[Place]) -> tuple[Classes, Pair]:
    """The layout and rank with the fewest parameters that meet the tolerance: the error falls with the rank."""
    best: tuple[Classes, Pair] | None = None
    nearest, allowed = np.inf, allowed_error(request) * (1.0 - 1e-12)
    for place in places:
        at = place.layout
        most = min(at.s, at.p)
        while (
            best is not None and most and cost(at, most, request) >= cost(best[0].at, best[1].left.shape[-1], request)
        ):
            most -= 1
        if most < 1:
            continue
        classes = Classes(target, place, weight)
        found = fit(classes, most, request.norm, request.advance)
        nearest = min(nearest, found.error)
        if not found.error <= allowed:
            continue
        low, high = 0, most  # `high` meets the tolerance, `low` does not
        while high - low > 1:
            middle = (low + high) // 2
            tried = fit(classes, middle, request.norm, request.advance)
            low, high, found = (low, middle, tried) if tried.error <= allowed else (middle, high, found)
        best = classes, found
    if best is None:
        raise unreachable(request, float(nearest))
    return best


def cost(at: Layout, rank: int, request: Request) -> int:
    """Parameters of a rank, which the interpolative form has fewer of."""
    return rank * (at.step - (rank * at.l * at.k if request.interpolative else 0))


def ladder(classes: Classes, request: Request) -> Ladder:
    """All ranks of a layout, with their errors in the weight's diagonal blocks."""
    at = classes.at
    return Ladder(classes, at.step, classes.errors, at.l * at.k if request.interpolative else 0)


def stored(found: Pair, at: Layout, rank: int | None) -> tuple[np.ndarray, np.ndarray]:
    """``left (l, s, k*r)`` and ``right (k, r*l, p)`` of a pair, balanced, filled with zeros up to a given rank."""
    x, y = fill(*balanced(found.left, found.right), max(rank or 0, found.left.shape[-1]))
    r = x.shape[-1]
    return x.transpose(1, 2, 0, 3).reshape(at.l, at.s, at.k * r), y.transpose(0, 2, 1, 3).reshape(at.k, r * at.l, at.p)
