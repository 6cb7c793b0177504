"""Monarch: two block-diagonal matrices with a transposition between and after them."""

from __future__ import annotations

from typing import Any

from structmat import arrays
from structmat.arrays import Array, DType
from structmat.structures.chain import Chain, ceil_div, check_size, random_factors, split_counts


class Monarch(Chain):
    """Monarch matrix ``P L P^T R``, rectangular and of any block rank: the chain ``(1, s, k r, l) (k, r l, p, 1)``.

    Entry form: ``M[i l + j, kappa p + t] = sum_rho left[j, i, kappa r + rho] right[kappa, rho l + j, t]``. Rows of equal
    residue ``j`` modulo ``l`` and the columns of one contiguous block ``kappa`` form a block of rank ``r``. Source: Dao et
    al., "Monarch: Expressive Structured Matrices for Efficient and Accurate Training", ICML 2022, definition 3.1
    (there square, rank 1). The transpose is the reversed chain; its ``left`` and ``right`` are again what is applied last
    and first.

    Parameters
    ----------
    left
        ``(*batch, l, s, k*r)``, the last axis with ``r`` fast.
    right
        ``(*batch, k, r*l, p)``, the middle axis with ``l`` fast.
    shape
        Logical ``(m, n)``, at most ``(l*s, k*p)``, the default.

    Raises
    ------
    ValueError
        If no rank ``r`` fits both shapes; the message names them.

    Notes
    -----
    ``r (l n + k m)`` stored numbers, twice that in flops per column.

    Examples
    --------
    >>> import structmat as sm
    >>> A = sm.Monarch.random((12, 10), blocks=(3, 2), rank=2, rng=0)
    >>> A.left.shape, A.right.shape
    ((3, 4, 4), (2, 6, 5))
    """

    __slots__ = ()

    def __init__(self, left: Any, right: Any, shape: tuple[int, int] | None = None) -> None:
        left, right = arrays.values(left, "Monarch left", 3), arrays.values(right, "Monarch right", 3)
        check_ranks(left, right, "Monarch")
        self._set_chain((left[..., None, :, :, :], right[..., :, None, :, :]), shape)

    @property
    def left(self) -> Array:
        """Blocks of the factor applied last, ``(*batch, l, s, k*r)``."""
        return self.factors[0].reshape(*self.factors[0].shape[:-4], -1, *self.factors[0].shape[-2:])

    @property
    def right(self) -> Array:
        """Blocks of the factor applied first, ``(*batch, k, r*l, p)``."""
        return self.factors[1].reshape(*self.factors[1].shape[:-4], -1, *self.factors[1].shape[-2:])

    @property
    def rank(self) -> int:
        """Rank ``r`` of each block."""
        counts = self.left.shape[-3], self.right.shape[-3]
        return self.factors[0].shape[-1] // counts[1]

    @classmethod
    def random(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        shape: tuple[int, int],
        *,
        blocks: int | tuple[int, int] | None = None,
        rank: int = 1,
        dtype: DType = float,
        rng: Any = None,
    ) -> Monarch:
        """A random Monarch matrix; sizes that the counts do not divide are padded.

        Parameters
        ----------
        shape
            ``(m, n)``.
        blocks
            ``(l, k)``, the numbers of row classes and column blocks, or one number for both; default about the square
            roots of the sizes.
        rank
            Rank of each block.
        dtype, rng
            Dtype and seed or generator.

        Examples
        --------
        >>> import structmat as sm
        >>> sm.Monarch.random((7, 11), blocks=3, rank=2, rng=0).shape
        (7, 11)
        """
        m, n = check_size(shape)
        l, k = split_counts(blocks, (m, n))
        left, right = random_factors(two_factor_patterns((m, n), (l, k), rank), dtype, rng)
        return cls(left[0], right[:, 0], (m, n))


def check_ranks(left: Array, right: Array, name: str) -> None:
    """``ValueError`` unless ``left (l, s, k*r)`` and ``right (k, r*l, p)`` share one rank ``r``."""
    l, _, kr = left.shape[-3:]
    k, rl, _ = right.shape[-3:]
    if k * rl != l * kr or (k and kr % k) or (l and rl % l):
        raise ValueError(
            f"{name}: left {tuple(left.shape)} and right {tuple(right.shape)} do not fit: "
            "expected left (l, s, k*r) and right (k, r*l, p)"
        )


def two_factor_patterns(shape: tuple[int, int], counts: tuple[int, int], rank: int) -> list[tuple[int, int, int, int]]:
    """Patterns ``(1, s, k r, l) (k, r l, p, 1)`` that cover ``shape`` with ``counts = (l, k)`` blocks of ``rank``."""
    (m, n), (l, k) = shape, counts
    if rank < 1:
        raise ValueError(f"rank: expected at least 1, got {rank}")
    return [(1, ceil_div(m, l), k * rank, l), (k, rank * l, ceil_div(n, k), 1)]
