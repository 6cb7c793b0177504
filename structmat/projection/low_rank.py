"""LowRank: the truncated SVD."""

from __future__ import annotations

import numpy as np

from structmat.projection.selection import Request, Solution
from structmat.projection.two_factor import layout, nearest_pair
from structmat.structures.low_rank import LowRank


def project_low_rank(target: np.ndarray, request: Request) -> Solution:
    """The nearest matrix of a rank, ``u sqrt(s) @ sqrt(s) vh``: one block of the two-factor projection.

    Optimal in the Frobenius norm, ``error**2 = sum of the discarded s**2`` (Eckart and Young, Psychometrika 1, 1936).
    Cost: one thin SVD, ``m n min(m, n)``.
    """
    shape = (target.shape[0], target.shape[1])
    left, right, bound = nearest_pair(target, request, [layout(shape, (1, 1), contiguous=True)])
    return Solution(LowRank(left[0], right[0]), bound, "truncated SVD (optimal)")
