"""BlockDiagonal: equal blocks along the diagonal, held in one array."""

from __future__ import annotations

from typing import Any

from structmat import arrays
from structmat.arrays import Array, DType
from structmat.structures.chain import Chain, ceil_div, check_size, random_factors, split_counts


class BlockDiagonal(Chain):
    """Block-diagonal matrix of ``count`` blocks of ``p x q``: the chain of one factor ``(count, p, q, 1)``.

    ``y[i, :] = blocks[i] @ x[i, :]`` with ``x`` seen as ``(count, q)``; the adjoint has the adjoint blocks.

    Parameters
    ----------
    blocks
        ``(*batch, count, p, q)``.
    shape
        Logical ``(m, n)``, at most ``(count*p, count*q)``; the default. Blocks of unequal sizes are for
        :func:`structmat.block_diag`.

    Notes
    -----
    ``count p q`` stored numbers, ``2 count p q`` flops per column.

    Examples
    --------
    >>> import numpy as np, structmat as sm
    >>> sm.BlockDiagonal(np.ones((3, 2, 4))).shape
    (6, 12)
    """

    __slots__ = ()

    def __init__(self, blocks: Any, shape: tuple[int, int] | None = None) -> None:
        self._set_chain((arrays.values(blocks, "BlockDiagonal", 3)[..., :, None, :, :],), shape)

    @property
    def blocks(self) -> Array:
        """The blocks, ``(*batch, count, p, q)``."""
        return self.factors[0][..., :, 0, :, :]

    @classmethod
    def random(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls, shape: tuple[int, int], *, blocks: int | None = None, dtype: DType = float, rng: Any = None
    ) -> BlockDiagonal:
        """A random block-diagonal matrix; sizes that ``blocks`` does not divide are padded.

        Parameters
        ----------
        shape
            ``(m, n)``.
        blocks
            Number of blocks; default about the square root of the smaller size.
        dtype, rng
            Dtype and seed or generator.

        Examples
        --------
        >>> import structmat as sm
        >>> sm.BlockDiagonal.random((7, 5), blocks=2, rng=0).shape
        (7, 5)
        """
        m, n = check_size(shape)
        count = split_counts(blocks, (min(m, n), min(m, n)))[0]
        (factor,) = random_factors([(count, ceil_div(m, count), ceil_div(n, count), 1)], dtype, rng)
        return cls(factor[:, 0], (m, n))
