"""BlockTensorTrain: every contiguous block of the matrix has a small rank."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from structmat import arrays
from structmat.arrays import Array, DType
from structmat.patterns import AxisOrder, Pattern, prime_factors
from structmat.structures.chain import Chain, check_size, random_factors, split_counts
from structmat.structures.factor import pattern_of
from structmat.structures.monarch import check_ranks, two_factor_patterns


class BlockTensorTrain(Chain):
    """Block Tensor-Train matrix of ``c >= 2`` cores: a chain whose output digits are reversed, so that blocks are contiguous.

    With output radices ``q``, input radices ``p`` and ranks ``r`` (``r_0 = r_c = 1``) core ``l`` has the pattern
    ``(p_1..p_{l-1}, r_{l-1} q_l, p_l r_l, q_{l+1}..q_c)`` and
    ``W[(i_c .. i_1), (k_1 .. k_c)] = sum_rho prod_l core_l[k_{<l}, i_{>l}, (rho_{l-1} i_l), (k_l rho_l)]``.
    For two cores the block of rows ``f``, columns ``g`` is ``left[f, :, (g rho)] @ right[g, (rho f), :]``, of rank
    ``rho``. Source: Qiu et al., "Compute Better Spent: Replacing Dense Layers with Structured Matrices", ICML 2024,
    section 3.3; the chain form: arXiv 2411.04506.

    Parameters
    ----------
    cores
        Arrays, left (applied last) to right. Two cores may be given as ``left (f, e, g*rho)`` and
        ``right (g, rho*f, a)`` for ``m = f*e``, ``n = g*a``; any number as blocks ``(a, d, b, c)`` of the patterns above.
    shape
        Logical ``(m, n)``, at most the cores' own, the default.

    Raises
    ------
    ValueError
        For fewer than two cores or cores that do not fit; the message names the shapes.

    Notes
    -----
    Two cores: ``rho (f n + g m)`` stored numbers, twice that in flops per column. The same matrices as
    :class:`Monarch` up to a transposition of the output index.

    Examples
    --------
    >>> import numpy as np, structmat as sm
    >>> A = sm.BlockTensorTrain.random((12, 10), blocks=(3, 2), rank=1, rng=0)
    >>> int(np.linalg.matrix_rank(A.to_dense()[:4, :5]))
    1
    """

    __slots__ = ()

    def __init__(self, cores: Sequence[Any], shape: tuple[int, int] | None = None) -> None:
        if len(cores) < 2:
            raise ValueError(f"BlockTensorTrain: expected at least two cores, got {len(cores)}")
        blocks = [arrays.values(c, f"BlockTensorTrain core {i}", 3) for i, c in enumerate(cores)]
        if len(blocks) == 2 and all(b.ndim == 3 for b in blocks):
            check_ranks(blocks[0], blocks[1], "BlockTensorTrain")
            blocks = [blocks[0][None], blocks[1][:, None]]
        if any(b.ndim < 4 for b in blocks):
            shapes = ", ".join(str(tuple(b.shape)) for b in blocks)
            raise ValueError(
                f"BlockTensorTrain: expected cores (a, d, b, c), or two of (f, e, g*rho) and (g, rho*f, a); got {shapes}"
            )
        radices = output_radices([pattern_of(b) for b in blocks], "BlockTensorTrain")
        self._set_chain(tuple(blocks), shape, digit_reversal(radices))

    @property
    def cores(self) -> tuple[Array, ...]:
        """The cores as blocks ``(*batch, a, d, b, c)``, left to right."""
        return self.factors

    @property
    def ranks(self) -> tuple[int, ...]:
        """Rank of each link between neighbouring cores."""
        flipped = self.patterns[0].a != 1 or self.patterns[-1].d != 1  # a transposed train
        patterns = [p.T for p in reversed(self.patterns)] if flipped else list(self.patterns)
        ranks = [p.chain_rank(q) or 0 for p, q in itertools.pairwise(patterns)]
        return tuple(reversed(ranks)) if flipped else tuple(ranks)

    @classmethod
    def random(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        shape: tuple[int, int],
        *,
        cores: int = 2,
        blocks: int | tuple[int, int] | None = None,
        rank: int = 1,
        dtype: DType = float,
        rng: Any = None,
    ) -> BlockTensorTrain:
        """A random Block Tensor-Train; sizes that do not split evenly are padded.

        Parameters
        ----------
        shape
            ``(m, n)``.
        cores
            Number of cores, at least 2.
        blocks
            For two cores: ``(f, g)``, the numbers of row and column blocks, or one number for both; default about the
            square roots of the sizes.
        rank
            Rank of every link.
        dtype, rng
            Dtype and seed or generator.

        Examples
        --------
        >>> import structmat as sm
        >>> sm.BlockTensorTrain.random((24, 27), cores=3, rank=2, rng=0).ranks
        (2, 2)
        """
        m, n = check_size(shape)
        if cores < 2:
            raise ValueError(f"cores: expected at least 2, got {cores}")
        if blocks is not None and cores != 2:
            raise ValueError(f"blocks: only for two cores, got cores={cores}")
        if cores == 2:
            patterns = two_factor_patterns((m, n), split_counts(blocks, (m, n)), rank)
        else:
            ranks = (1, *([rank] * (cores - 1)), 1)
            patterns = chain_patterns(balanced_radices(m, cores), balanced_radices(n, cores), ranks)
        return cls(random_factors(patterns, dtype, rng), (m, n))


def chain_patterns(q: Sequence[int], p: Sequence[int], r: Sequence[int]) -> list[tuple[int, int, int, int]]:
    """Normal form of a chainable chain: factor ``l`` is ``(p_{<l}, r_{l-1} q_l, p_l r_l, q_{>l})``; arXiv 2411.04506."""
    count = len(q)
    return [(math.prod(p[:i]), r[i] * q[i], p[i] * r[i + 1], math.prod(q[i + 1 :])) for i in range(count)]


def output_radices(patterns: Sequence[Pattern], name: str) -> tuple[int, ...]:
    """Output radices ``q`` of a chain in normal form; ``ValueError`` if the patterns are not one."""
    for p, q in itertools.pairwise(patterns):
        if p.chain_rank(q) is None and 0 not in (*p, *q):  # nothing to chain in an empty factor
            raise ValueError(f"{name}: neighbouring patterns {tuple(p)} and {tuple(q)} are not chainable")
    if patterns[0].a != 1 or patterns[-1].d != 1:
        raise ValueError(
            f"{name}: expected the first pattern to start and the last to end with 1, "
            f"got {tuple(patterns[0])} and {tuple(patterns[-1])}"
        )
    tails = [patterns[0].rows, *(p.d for p in patterns)]
    return tuple(big // small if small else 0 for big, small in itertools.pairwise(tails))


def digit_reversal(radices: Sequence[int]) -> AxisOrder:
    """The axis order that reverses the digits of an index."""
    return AxisOrder(tuple(radices), tuple(range(len(radices)))[::-1])


def balanced_radices(size: int, count: int) -> tuple[int, ...]:
    """``count`` nearly equal radices whose product is ``size``, or the smallest one above it that is balanced."""
    digits = [1] * count
    for prime in reversed(prime_factors(max(size, 1))):
        digits[digits.index(min(digits))] *= prime
    if max(digits) <= 4 * min(digits):
        return tuple(sorted(digits))
    root = max(1, math.floor(size ** (1 / count)))
    digits = [root] * count
    for i in range(count - 1, -1, -1):
        if math.prod(digits) < size:
            digits[i] += 1
    while math.prod(digits) < size:
        digits[-1] += 1
    return tuple(sorted(digits))
