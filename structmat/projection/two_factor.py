"""Monarch and two-core Block Tensor-Train: every block gets its nearest matrix of a rank, all in one batched call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from structmat.operator import Operator
from structmat.patterns import AxisOrder
from structmat.projection.device import native
from structmat.projection.drivers import singular_values
from structmat.projection.hierarchical import project_train
from structmat.projection.interpolative import interpolate_blocks
from structmat.projection.selection import Ladder, Request, Solution, choose
from structmat.projection.svd import Truncation, safe_bound, tails, truncated
from structmat.structures.block_tensor_train import BlockTensorTrain
from structmat.structures.chain import Chain, ceil_div, split_counts
from structmat.structures.monarch import Monarch

_TIE = 1e-12  # relative squared error below which two axis orders are equally good


class Layout(NamedTuple):
    """``l x k`` blocks of ``s x p`` that cover a matrix; ``contiguous`` says whether a row class is a run of rows."""

    l: int
    k: int
    s: int
    p: int
    contiguous: bool

    @property
    def step(self) -> int:
        """Parameters for each rank."""
        return self.l * self.k * (self.s + self.p)


def layout(shape: tuple[int, int], counts: tuple[int, int], contiguous: bool) -> Layout:
    """The layout of ``counts = (l, k)`` blocks for a matrix of ``shape``."""
    (m, n), (l, k) = shape, counts
    return Layout(l, k, ceil_div(m, l), ceil_div(n, k), contiguous)


def blocks_of(target: np.ndarray, layout: Layout, strided: bool = False) -> np.ndarray:
    """The blocks ``(k, l, s, p)`` of a matrix, which is extended by zeros where they do not cover it evenly.

    ``strided``: the columns of a block are those of equal residue modulo ``k`` instead of a run.
    """
    l, k, s, p, contiguous = layout
    m, n = target.shape
    if (m, n) != (l * s, k * p):
        target = np.pad(target, [(0, l * s - m), (0, k * p - n)])
    rows = target.reshape((l, s, -1) if contiguous else (s, l, -1))
    whole = rows.reshape(*rows.shape[:2], *((p, k) if strided else (k, p)))
    return whole.transpose(3 if strided else 2, 0 if contiguous else 1, 1 if contiguous else 0, 2 if strided else 3)


class Place(NamedTuple):
    """A layout of the rows and whether a column class is strided."""

    layout: Layout
    strided: bool = False


def place_of(operator: Chain) -> tuple[Place, int]:
    """Where the two factors of a projected Monarch or Block Tensor-Train matrix fit, and the rank of its blocks."""
    (_, l, s, kr), (k, _, _, p) = (f.shape for f in operator.factors)
    return Place(Layout(l, k, s, p, operator.out_order is not None), operator.in_order is not None), kr // k


def nearest_pair(
    target: np.ndarray,  # (m, n)
    request: Request,
    places: Sequence[Place],
) -> tuple[np.ndarray, np.ndarray, float, Place]:
    """``left (l, s, k*r)``, ``right (k, r*l, p)`` nearest to the matrix, a lower bound of the error, and where they fit.

    The blocks partition the matrix and each is free up to its rank, so that Eckart-Young in every block is optimal:
    ``error**2 = sum over blocks of the discarded s**2`` (Dao et al. 2022, theorem 1, there for rank 1). Padding does not
    change this: rows and columns of zeros change no singular value. Cost: ``m n min(s, p)``. Of several places the one with
    the least error is taken, or what a budget or a tolerance picks.
    """
    if request.rank is None:
        gauge = 1 if request.interpolative else 0
        ladders = [
            Ladder(a, a.layout.step, tails(singular_values(blocks_of(target, *a))), gauge * a.layout.l * a.layout.k)
            for a in places
        ]
        place, rank = choose(ladders, request)
        found = truncated(blocks_of(target, *place), rank)
    else:
        rank, place = request.rank, places[0]
        found = truncated(blocks_of(target, *place), rank)
        for a in places[1:]:
            other = truncated(blocks_of(target, *a), rank)
            if other.discarded < found.discarded - _TIE * request.norm**2:
                found, place = other, a
    x, y = shared(found)  # (k, l, s, r) and (k, l, r, p)
    l, k, s, p, _ = place.layout
    left = x.transpose(1, 2, 0, 3).reshape(l, s, k * rank)
    right = y.transpose(0, 2, 1, 3).reshape(k, rank * l, p)
    return left, right, safe_bound(math.sqrt(max(0.0, found.bound)), request.norm, max(s, p)), place


def shared(found: Truncation) -> tuple[np.ndarray, np.ndarray]:
    """The factors of every block with the norm shared between them, by exact powers of two."""
    size = np.sqrt(np.square(np.abs(found.y)).sum(axis=-1))
    power = np.exp2(np.rint(0.5 * np.log2(size, out=np.zeros_like(size), where=size > 0)))
    return found.u * power[..., None, :], found.y / power[..., None]


def project_two_factor(target: np.ndarray, request: Request) -> Solution:
    """The nearest Monarch or Block Tensor-Train matrix; three and more cores go through the hierarchical sweep.

    A budget or tolerance without ``blocks`` compares the default numbers of blocks and 2, 4, 8, ... in both directions up
    to the square root of the smaller size; one block in each direction (low rank) is the last resort for a budget.
    ``layout`` names the classes of rows and columns, contiguous or strided; ``"search"`` tries all four, and so does
    ``permutation="search"``.
    """
    if (request.cores or 2) > 2:
        if request.blocks is not None or request.layout is not None:
            option = "blocks" if request.blocks is not None else "layout"
            raise ValueError(f"{option}: only for two cores, got cores={request.cores}")
        if request.interpolative:
            raise ValueError(f"interpolative: only for two cores, got cores={request.cores}")
        return project_train(target, request)
    shape = (target.shape[0], target.shape[1])
    left, right, bound, place = nearest_pair(target, request, candidates(request, shape))
    name = _method(request, place) + (", interpolative form" if request.interpolative else "")
    return Solution(member(left, right, place, request, shape), bound, name)


def candidates(request: Request, shape: tuple[int, int]) -> list[Place]:
    """The layouts that the caller's ``blocks`` and ``layout`` leave open."""
    counts = [split_counts(request.blocks, shape)]
    if request.free and request.blocks is None:
        counts += [(2**i, 2**i) for i in range(1, 32) if 4**i <= min(shape)]
    orders = axis_orders(request)
    places = [Place(layout(shape, c, rows), cols) for c in counts for rows, cols in orders]
    if request.limit is not None and request.blocks is None:
        saved = 1 if request.interpolative else 0
        fitting = [a for a in places if a.layout.step - saved * a.layout.l * a.layout.k <= request.limit]
        places = fitting or [Place(layout(shape, (1, 1), rows), cols) for rows, cols in orders[:1]]
    return list(dict.fromkeys(places))


def member(left: np.ndarray, right: np.ndarray, place: Place, request: Request, shape: tuple[int, int]) -> Operator:
    """The operator of a pair ``(l, s, k*r)``, ``(k, r*l, p)``, in the family and the form asked for."""
    l, k, s, p, contiguous = place.layout
    family = BlockTensorTrain if request.family is BlockTensorTrain else Monarch
    chain = family._rebuild(
        (native(left[None]), native(right[:, None])),
        shape,
        AxisOrder((s, l), (1, 0)) if contiguous else None,
        AxisOrder((p, k), (1, 0)) if place.strided else None,
    )
    if not request.interpolative:
        return chain
    host: Any = chain.to("numpy")  # pivoting is the host's
    return interpolate_blocks(host)


def axis_orders(request: Request) -> list[tuple[bool, bool]]:
    """``(contiguous rows, strided columns)`` of every axis order to try, the family's own first."""
    own = (request.family is BlockTensorTrain, False)
    if "search" in (request.layout, request.permutation):
        return [own, (own[0], True), (not own[0], False), (not own[0], True)]
    if request.layout is None:
        return [own]
    rows, cols = request.layout
    return [(rows == "contiguous", cols == "strided")]


def _method(request: Request, place: Place) -> str:
    own = (request.family is BlockTensorTrain, False)
    rows, cols = ("contiguous" if flag else "strided" for flag in (place.layout.contiguous, not place.strided))
    same = (place.layout.contiguous, place.strided) == own
    return "blockwise SVD (optimal)" + ("" if same else f", {rows} rows, {cols} columns")
