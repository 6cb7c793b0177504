"""Butterfly: a product of sparse factors, one per digit of the index, of any radix."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from structmat import arrays
from structmat.arrays import DType
from structmat.patterns import Pattern, prime_factors
from structmat.structures.block_tensor_train import chain_patterns, output_radices
from structmat.structures.chain import Chain, check_size, random_factors
from structmat.structures.factor import pattern_of


class Butterfly(Chain):
    """Butterfly matrix: the chain ``(p_{<l}, q_l, p_l, q_{>l})`` with output radices ``q`` and input radices ``p``.

    For ``n = 2^J`` and radix 2 these are the factors ``(2^{l}, 2, 2, 2^{J-1-l})`` of the fast Fourier and Hadamard
    transforms, stride 1 applied first. Source: Dao et al., "Learning Fast Algorithms for Linear Transforms Using
    Butterfly Factorizations", ICML 2019; any radix: arXiv 2411.04506, section 4.

    Parameters
    ----------
    factors
        Blocks ``(*batch, a, d, b, c)``, left (applied last) to right.
    shape
        Logical ``(m, n)``, at most the factors' own, the default.

    Raises
    ------
    ValueError
        If neighbouring factors are not chainable with rank 1.

    Notes
    -----
    Radix ``p`` and ``n = p^J``: ``J p n`` stored numbers, twice that in flops per column.

    Examples
    --------
    >>> import structmat as sm
    >>> A = sm.Butterfly.random((16, 16), radix=4, rng=0)
    >>> [tuple(p) for p in A.patterns]
    [(1, 4, 4, 4), (4, 4, 4, 1)]
    """

    __slots__ = ()

    def __init__(self, factors: Sequence[Any], shape: tuple[int, int] | None = None) -> None:
        if not factors:
            raise ValueError("Butterfly: expected at least one factor, got none")
        blocks = tuple(arrays.values(f, f"Butterfly factor {i}", 4) for i, f in enumerate(factors))
        patterns = [pattern_of(b) for b in blocks]
        output_radices(patterns, "Butterfly")
        for p, q in itertools.pairwise(patterns):
            if p.chain_rank(q) != 1:
                raise ValueError(
                    f"Butterfly: neighbours {tuple(p)} and {tuple(q)} have rank {p.chain_rank(q)}, expected 1"
                )
        self._set_chain(blocks, shape)

    @classmethod
    def random(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        shape: tuple[int, int],
        *,
        radix: int | None = None,
        dtype: DType = float,
        rng: Any = None,
    ) -> Butterfly:
        """A random butterfly matrix.

        Parameters
        ----------
        shape
            ``(m, n)``; see :func:`butterfly_patterns` for sizes that are padded.
        radix
            Largest radix of a factor; default: the prime factors of the sizes, or of the next size for which they give
            fewer parameters.
        dtype, rng
            Dtype and seed or generator.

        Examples
        --------
        >>> import structmat as sm
        >>> sm.Butterfly.random((13, 13), rng=0).shape
        (13, 13)
        """
        m, n = check_size(shape)
        return cls(random_factors(butterfly_patterns((m, n), radix), dtype, rng), (m, n))


def butterfly_patterns(shape: tuple[int, int], radix: int | None = None) -> list[Pattern]:
    """Patterns of a butterfly that covers ``shape``.

    Each size is split into its prime factors, grouped up to ``radix``. A size with a larger prime factor (without
    ``radix``: one whose prime factors sum to more than those of a larger size would cost) is padded to the next size
    that has none. The shorter list of radices is met by merging the smallest radices of the longer one.
    """
    if radix is not None and radix < 2:
        raise ValueError(f"radix: expected at least 2, got {radix}")
    q, p = (size_radices(max(size, 1), radix) for size in shape)
    while len(q) != len(p):
        long = q if len(q) > len(p) else p
        long[:2] = [long[0] * long[1]] if len(long) > 1 else long
        if len(long) == 1 and len(q) != len(p):
            (q if len(q) < len(p) else p).append(1)
        long.sort()
    return [Pattern(*t) for t in chain_patterns(q, p, [1] * (len(q) + 1))]


def size_radices(size: int, radix: int | None = None) -> list[int]:
    """Radices, ascending, whose product is ``size`` or the cheapest size above it."""
    limit = 2 ** math.ceil(math.log2(max(size, 2)))
    if radix is not None:
        padded = next(n for n in smooth_sizes(size, limit, radix) if n >= size)
        return sorted(group(prime_factors(padded), radix)) or [1]
    candidates = [size, *smooth_sizes(size, limit, 13)]
    return min((prime_factors(n) for n in candidates), key=lambda radices: math.prod(radices) * sum(radices)) or [1]


def smooth_sizes(low: int, high: int, largest: int) -> list[int]:
    """Sizes from ``low`` to ``high`` without prime factors above ``largest``, ascending."""
    primes = [p for p in range(2, min(largest, high) + 1) if len(prime_factors(p)) == 1]
    sizes = {1}
    for p in primes:
        grown = set(sizes)
        while grown:
            grown = {n * p for n in grown if n * p <= high}
            sizes |= grown
    return sorted(n for n in sizes if n >= low)


def group(factors: Sequence[int], radix: int) -> list[int]:
    """Multiply neighbouring factors as long as the product does not exceed ``radix``."""
    groups: list[int] = []
    for f in sorted(factors):
        if groups and groups[-1] * f <= radix:
            groups[-1] *= f
        else:
            groups.append(f)
    return groups
