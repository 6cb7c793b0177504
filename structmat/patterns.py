"""Patterns of Kronecker-sparse factors and axis orders: plain integers, no arrays.

Definitions: T.-T. Le, L. Zheng, E. Riccietti, R. Gribonval, "Butterfly factorization with error guarantees",
SIAM J. Matrix Anal. Appl. 46(4), 2025 (arXiv 2411.04506), sections 3 and 4.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np


class Pattern(NamedTuple):
    """Support ``I_a (x) 1_{b x c} (x) I_d`` of a Kronecker-sparse factor of shape ``(a*b*d, a*c*d)``."""

    a: int
    b: int
    c: int
    d: int

    @property
    def rows(self) -> int:
        """Number of rows, ``a*b*d``."""
        return self.a * self.b * self.d

    @property
    def cols(self) -> int:
        """Number of columns, ``a*c*d``."""
        return self.a * self.c * self.d

    @property
    def nparams(self) -> int:
        """Stored numbers, which are also the multiply-adds per column: ``a*b*c*d``."""
        return self.a * self.b * self.c * self.d

    @property
    def T(self) -> Pattern:
        """The pattern of the transposed factor."""
        return Pattern(self.a, self.c, self.b, self.d)

    def chain_rank(self, other: Pattern) -> int | None:
        """Rank ``r = a1*c1/a2 = b2*d2/d1`` of the pair ``self @ other`` if it is chainable, else ``None``."""
        if 0 in self or 0 in other or other.a % self.a or self.d % other.d or self.cols != other.rows:
            return None
        if (self.a * self.c) % other.a or (other.b * other.d) % self.d:
            return None
        return self.a * self.c // other.a

    def product(self, other: Pattern) -> Pattern:
        """Pattern of the product of a chainable pair: ``(a1, b1*d1/d2, a2*c2/a1, d2)``."""
        return Pattern(self.a, self.b * self.d // other.d, other.a * other.c // self.a, other.d)


class AxisOrder(NamedTuple):
    """A transposition of the digits of a mixed-radix index: ``y = x.reshape(radices).transpose(axes).ravel()``."""

    radices: tuple[int, ...]
    axes: tuple[int, ...]

    @property
    def T(self) -> AxisOrder:
        """The inverse (and transpose): ``x = y.reshape(T.radices).transpose(T.axes).ravel()``."""
        inverse = tuple(sorted(range(len(self.axes)), key=self.axes.__getitem__))
        return AxisOrder(tuple(self.radices[i] for i in self.axes), inverse)

    @property
    def size(self) -> int:
        """Length of the index."""
        return math.prod(self.radices)

    def permutation(self) -> np.ndarray:
        """The index array ``p`` with ``y = x[p]``."""
        return np.arange(self.size).reshape(self.radices).transpose(self.axes).ravel()


def axis_order(permutation: np.ndarray) -> AxisOrder | None:
    """The axis order equal to a permutation ``y = x[p]``, or ``None`` if ``p`` is not a transposition of digits.

    The index array of a transposition is affine in the digits of the output index. The digits are read off from the
    fastest one: the stride of a digit is the first difference, its radix the length over which that stride holds.
    """
    p = np.asarray(permutation)
    n = p.shape[0]
    if n == 0 or p[0] != 0:
        return None
    digits: list[tuple[int, int]] = []  # (radix, stride) of the output digits, fastest first
    done = 1
    while done < n:
        if n % done:
            return None
        heads = p[::done]
        stride = int(heads[1])
        breaks = np.nonzero(np.diff(heads) != stride)[0]
        radix = int(breaks[0]) + 1 if breaks.size else heads.shape[0]
        if stride <= 0 or radix < 2 or n % (done * radix):
            return None
        digits.append((radix, stride))
        done *= radix
    by_stride = sorted(range(len(digits)), key=lambda i: -digits[i][1])
    expected = n
    for i in by_stride:
        radix, stride = digits[i]
        if stride * radix != expected:
            return None
        expected = stride
    slow_first = list(range(len(digits)))[::-1]
    radices = tuple(digits[i][0] for i in by_stride)
    order = AxisOrder(radices, tuple(by_stride.index(i) for i in slow_first))
    return order if np.array_equal(order.permutation(), p) else None


def compose(first: AxisOrder | None, second: AxisOrder | None) -> tuple[bool, AxisOrder | None]:
    """``(True, order)`` of applying ``first`` and then ``second``; ``(False, None)`` if that is no axis order.

    The identity is ``None``.
    """
    if first is None or second is None:
        order = second if first is None else first
    else:
        order = axis_order(first.permutation()[second.permutation()])
        if order is None:
            return False, None
    return True, None if is_identity(order) else order


def is_identity(order: AxisOrder | None) -> bool:
    """Whether an axis order leaves every index where it is."""
    if order is None:
        return True
    moved = [i for i in order.axes if order.radices[i] > 1]
    return moved == sorted(moved)


def near_square(n: int) -> tuple[int, int]:
    """The divisor pair ``(small, large)`` of ``n`` nearest to its square root."""
    for small in range(math.isqrt(n), 0, -1):
        if n % small == 0:
            return small, n // small
    return 1, n


def prime_factors(n: int) -> list[int]:
    """Prime factors of ``n`` in ascending order."""
    factors, p = [], 2
    while p * p <= n:
        while n % p == 0:
            factors.append(p)
            n //= p
        p += 1
    return [*factors, n] if n > 1 else factors
