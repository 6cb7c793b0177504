"""Steps of the terms of a sum that are much cheaper than their projections, and never farther."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from structmat.operator import Operator
from structmat.projection import weighted_chain
from structmat.projection.links import adjoint
from structmat.projection.two_factor import Place, blocks_of, place_of
from structmat.projection.weight import Weight
from structmat.structures.block_tensor_train import BlockTensorTrain
from structmat.structures.butterfly import Butterfly
from structmat.structures.chain import Chain
from structmat.structures.low_rank import LowRank
from structmat.structures.monarch import Monarch

_WARM = 4  # ranks up to this share of the size take power steps
_ITERATIONS = 10  # of L-BFGS in one step of a butterfly


def step_from(operator: Operator, weight: Weight | None) -> Callable[[np.ndarray], Operator] | None:
    """A step from where a term is that is much cheaper than its projection, and never farther; ``None`` where none is known.

    Power steps of low-rank matrices and blocks; for butterflies in a weighted norm some iterations of L-BFGS.
    """
    if isinstance(operator, LowRank) and (weight is None or weight.rows is None):
        return partial(power_step, operator=operator, weight=weight) if _flat(operator.rank, operator.shape) else None
    if isinstance(operator, (Monarch, BlockTensorTrain)) and len(operator.factors) == 2 and weight is None:
        at, rank = place_of(operator)
        sides = (at.layout.s, at.layout.p)
        return partial(blockwise_power_step, operator=operator, at=at, rank=rank) if _flat(rank, sides) else None
    if (
        isinstance(operator, Chain)
        and type(operator) in (Butterfly, Chain)
        and weight is not None
        and weight.rows is None
    ):
        return partial(weighted_chain.step, chain=operator, weight=weight, iterations=_ITERATIONS)
    return None


def _flat(rank: int, sides: tuple[int, ...]) -> bool:
    return _WARM * rank <= min(sides)


def power_step(rest: np.ndarray, operator: LowRank, weight: Weight | None) -> Operator:
    """``Q Q^H R`` with ``Q`` spanning ``X X^H U``, ``X = R S`` (``S S^H`` the weight) and ``U`` the columns of an operator.

    No farther from ``R``: ``X`` projected onto ``U`` is, on the way to ``X^H U`` and back to ``Q``, twice replaced by the best
    matrix with this row space or column space.
    """
    q = _turned(np.asarray(operator.left), rest if weight is None else weight.from_right(rest))
    return LowRank(q, q.conj().T @ rest)


def blockwise_power_step(rest: np.ndarray, operator: Monarch | BlockTensorTrain, at: Place, rank: int) -> Operator:
    """:func:`power_step` in every block of a Monarch or two-core Block Tensor-Train matrix."""
    l, k, s, p, _ = at.layout
    blocks = blocks_of(rest, *at)
    u = np.asarray(operator.factors[0]).reshape(l, s, k, rank).transpose(2, 0, 1, 3)
    q = _turned(u, blocks)
    y = adjoint(q) @ blocks
    left, right = q.transpose(1, 2, 0, 3).reshape(1, l, s, k * rank), y.transpose(0, 2, 1, 3)
    return operator.with_factors((left, right.reshape(k, 1, rank * l, p)))


def _turned(u: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Orthonormal columns that span ``x x^H u``, for stacks."""
    right = np.linalg.qr(adjoint(x) @ np.linalg.qr(u)[0])[0]
    return np.linalg.qr(x @ right)[0]
