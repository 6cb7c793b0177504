"""LowRank: the product of a tall and a wide matrix."""

from __future__ import annotations

from operator import index
from typing import Any

from structmat import arrays
from structmat.arrays import Array, DType
from structmat.structures.chain import Chain, check_size, random_factors


class LowRank(Chain):
    """Low-rank matrix ``left @ right``: the chain ``(1, m, r, 1) (1, r, n, 1)``; adjoint ``right^H left^H``.

    Parameters
    ----------
    left
        ``(*batch, m, r)``.
    right
        ``(*batch, r, n)``.

    Raises
    ------
    ValueError
        If the two ranks differ.

    Notes
    -----
    ``r (m + n)`` stored numbers, twice that in flops per column. Cheaper than dense for ``r < m n / (m + n)``.

    Examples
    --------
    >>> import numpy as np, structmat as sm
    >>> A = sm.LowRank(np.ones((4, 1)), np.ones((1, 3)))
    >>> (A + A @ sm.Identity(3)).rank, (A @ np.ones(3)).tolist()
    (1, [3.0, 3.0, 3.0, 3.0])
    """

    __slots__ = ()

    def __init__(self, left: Any, right: Any) -> None:
        left, right = arrays.values(left, "LowRank left", 2), arrays.values(right, "LowRank right", 2)
        if left.shape[-1] != right.shape[-2]:
            raise ValueError(f"LowRank: left {tuple(left.shape)} and right {tuple(right.shape)} have different ranks")
        self._set_chain((left[..., None, None, :, :], right[..., None, None, :, :]), None)

    @property
    def left(self) -> Array:
        """The factor applied last, ``(*batch, m, r)``."""
        return self.factors[0][..., 0, 0, :, :]

    @property
    def right(self) -> Array:
        """The factor applied first, ``(*batch, r, n)``."""
        return self.factors[1][..., 0, 0, :, :]

    @property
    def rank(self) -> int:
        """The inner size ``r``, an upper bound of the rank."""
        return self.patterns[0].c

    def _details(self) -> str:
        return f"rank {self.rank}"

    @classmethod
    def random(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls, shape: tuple[int, int], *, rank: int | None = None, dtype: DType = float, rng: Any = None
    ) -> LowRank:
        """A random matrix of a rank (default: a quarter of the smaller size, at least 1).

        Examples
        --------
        >>> import structmat as sm
        >>> sm.LowRank.random((8, 6), rank=2, rng=0).nparams
        28
        """
        m, n = check_size(shape)
        r = max(1, min(m, n) // 4) if rank is None else index(rank)
        if r < 0:
            raise ValueError(f"rank: expected at least 0, got {rank}")
        left, right = random_factors([(1, m, r, 1), (1, r, n, 1)], dtype, rng)
        return cls(left[0, 0], right[0, 0])
