"""Program: how the rows of a batch go through one operator, on tensors that live elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Factor(NamedTuple):
    """What the initialisation and the learning rate of one array of values follow from."""

    slot: int
    fan_in: float  # contraction size of the factor as it is applied
    fan_out: float
    terms: int = 1  # of the sum that it is in
    last: bool = False  # applied last in its product: zero there makes the term zero


class Program:
    """One node: its flops per row, its factors, and the rows that it makes.

    A program is made once from a spec and holds integers only; the values and index arrays come with every call, by slot.
    ``rows`` is made of torch operations that can be compiled, exported and differentiated.
    """

    shape: tuple[int, int]  # logical (m, n)
    flops: int
    factors: tuple[Factor, ...]

    def rows(self, x: Tensor, bias: Tensor | None, values: Sequence[Tensor], places: Sequence[Tensor]) -> Tensor:
        """``x A^T + bias`` for ``x`` of shape ``(B, n)``; returns contiguous ``(B, m)``."""
        raise NotImplementedError
