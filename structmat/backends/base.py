"""What a backend is: two makers of plans, one for chains and one for Kronecker products.

A backend knows arrays, patterns and plain numbers, never an operator. ``chain`` and ``kron`` are called once per
operator and return a plan, which is called with data. The plans here are written with ``reshape``, ``swapaxes`` and
``@`` alone, so that they run on the arrays of every library and are differentiable where the library is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from structmat import arrays
from structmat.arrays import Array
from structmat.patterns import AxisOrder, Pattern


class ChainLayout(NamedTuple):
    """A chain without its values: ``y = truncate(out_order(K_1 ... K_L in_order(pad(x))))``."""

    patterns: tuple[Pattern, ...]  # left to right; the last is applied first
    rows: int  # logical number of outputs, at most patterns[0].rows
    cols: int  # logical number of inputs, at most patterns[-1].cols
    out_order: AxisOrder | None = None
    in_order: AxisOrder | None = None

    @property
    def T(self) -> ChainLayout:
        """The layout of the transposed chain: its blocks are transposed and in reverse order."""
        patterns = tuple(pattern.T for pattern in reversed(self.patterns))
        out_order, in_order = (order.T if order else None for order in (self.in_order, self.out_order))
        return ChainLayout(patterns, self.cols, self.rows, out_order, in_order)


class Candidate(NamedTuple):
    """A kernel that a planner considered, with its predicted time."""

    kernel: str
    seconds: float


class Explanation(NamedTuple):
    """Which kernel a plan uses for one layout and batch, and what it considered, fastest first."""

    kernel: str
    candidates: tuple[Candidate, ...] = ()


class Plan(Protocol):
    """How one operator is applied; made once and kept by the operator."""

    def columns(self, x: Array, out: Array | None = None) -> Array:
        """``A x`` for ``x`` of shape ``(..., n, k)``."""
        ...

    def rows(self, x: Array) -> Array:
        """``x A^T`` for ``x`` of shape ``(..., k, n)``."""
        ...

    def vector(self, x: Array) -> Array:
        """``A x`` for one vector ``x`` of shape ``(n,)``."""
        ...

    def add(self, x: Array, out: Array, rows: bool = False) -> bool:
        """``out += A x`` (or ``x A^T``) in one pass; ``False``, and nothing done, where there is no kernel for it."""
        ...

    def once(self, x: Array) -> Array:
        """``A x`` for an operand that comes once (the identity): nothing is prepared that only later calls would use."""
        ...

    def explain(self, k: int, rows: bool = False) -> Explanation:
        """The kernel for ``k`` columns (or rows)."""
        ...

    def tune(self, k: int, rows: bool = False) -> None:
        """Choose the kernel for ``k`` columns (or rows) by measuring."""
        ...


class Backend:
    """Plans made of library calls that every array library has. Subclasses override what they do faster."""

    name = "generic"

    def chain(self, layout: ChainLayout, blocks: Sequence[Array]) -> Plan:
        """The plan of a chain with factor values ``blocks``, arrays ``(*batch, a, d, b, c)`` left to right."""
        return ChainPlan(layout, blocks)

    def kron(self, factors: Sequence[Array]) -> Plan:
        """The plan of a Kronecker product of dense factors, arrays ``(*batch, m_i, n_i)``."""
        return KronPlan(factors)


class LibraryPlan:
    """What plans made of library calls have in common."""

    def columns(self, x: Array, out: Array | None = None) -> Array:
        """``A x`` for ``x`` of shape ``(..., n, k)``."""
        raise NotImplementedError

    def rows(self, x: Array) -> Array:
        """``x A^T`` for ``x`` of shape ``(..., k, n)``: the columns of the transposed view."""
        return self.columns(x.swapaxes(-1, -2)).swapaxes(-1, -2)

    def vector(self, x: Array) -> Array:
        """``A x`` for one vector ``x`` of shape ``(n,)``."""
        return self.columns(x[:, None])[..., 0]

    def once(self, x: Array) -> Array:
        """``A x``, as always."""
        return self.columns(x)

    def add(self, x: Array, out: Array, rows: bool = False) -> bool:  # noqa: ARG002
        """Library calls make results of their own."""
        return False

    def explain(self, k: int, rows: bool = False) -> Explanation:  # noqa: ARG002
        """There is one kernel, whatever the batch."""
        return Explanation("library")

    def tune(self, k: int, rows: bool = False) -> None:
        """Nothing to choose from."""


class ChainPlan(LibraryPlan):
    """A chain by one batched ``@`` per factor; the digits are brought into place by ``swapaxes``."""

    def __init__(self, layout: ChainLayout, blocks: Sequence[Array]) -> None:
        self.layout = layout
        self.blocks = tuple(blocks)

    def columns(self, x: Array, out: Array | None = None) -> Array:
        """``A x`` for ``x`` of shape ``(..., n, k)``."""
        layout = self.layout
        z = reorder(pad(x, layout.patterns[-1].cols), layout.in_order)
        for pattern, block in zip(reversed(layout.patterns), reversed(self.blocks), strict=True):
            a, b, c, d = pattern
            k = z.shape[-1]
            z = z.reshape(*z.shape[:-2], a, c, d, k).swapaxes(-3, -2)
            z = (self._like(block, z) @ z).swapaxes(-3, -2)
            z = z.reshape(*z.shape[:-4], a * b * d, k)
        return arrays.copy_into(reorder(z, layout.out_order)[..., : layout.rows, :], out)

    def _like(self, block: Array, _x: Array) -> Array:
        return block


class KronPlan(LibraryPlan):
    """A Kronecker product, one factor at a time and without a transposition.

    With the other digits gathered into ``before`` and ``after``, factor ``i`` is one batched product
    ``F_i @ x.reshape(before, n_i, after)``. The factors are applied in the order of least work.
    """

    def __init__(self, factors: Sequence[Array]) -> None:
        self.factors = tuple(factors)
        self.order = cheapest_order([(f.shape[-2], f.shape[-1]) for f in factors])
        self.weights = tuple(f if f.ndim == 2 else f[..., None, :, :] for f in factors)
        sizes = [f.shape[-1] for f in factors]
        steps = []
        for i in self.order:
            steps.append((i, math.prod(sizes[:i]), sizes[i], math.prod(sizes[i + 1 :])))
            sizes[i] = factors[i].shape[-2]
        self.steps = tuple(steps)
        self.m = math.prod(sizes)

    def columns(self, x: Array, out: Array | None = None) -> Array:
        """``A x`` for ``x`` of shape ``(..., n, k)``."""
        k = x.shape[-1]
        z = x
        for i, before, n, after in self.steps:
            weight = self._like(self.weights[i], z)
            z = z.reshape(*_lead(x, z), before, n, after * k)
            z = weight @ z
        return arrays.copy_into(z.reshape(*z.shape[:-3], self.m, k), out)

    def rows(self, x: Array) -> Array:
        """``x A^T`` for ``x`` of shape ``(..., k, n)``."""
        k = x.shape[-2]
        z = x
        for i, before, n, after in self.steps:
            weight = self._like(self.weights[i], z)
            lead = _lead(x, z)
            if after == 1:
                z = z.reshape(*lead, 1, k * before, n) @ weight.swapaxes(-1, -2)
            else:
                z = weight @ z.reshape(*lead, k * before, n, after)
        return z.reshape(*z.shape[:-3], k, self.m)

    def _like(self, factor: Array, _x: Array) -> Array:
        return factor


def _lead(x: Array, z: Array) -> tuple[int, ...]:
    """Batch dimensions of an intermediate: those of the operand at first, then all but the three of a step."""
    return tuple(x.shape[:-2]) if z is x else tuple(z.shape[:-3])


def pad(x: Array, size: int) -> Array:
    """Rows of zeros appended to ``x`` of shape ``(..., n, k)`` up to ``size`` rows."""
    n = x.shape[-2]
    if n == size:
        return x
    xp = arrays.namespace(x)
    zeros = xp.zeros((*x.shape[:-2], size - n, x.shape[-1]), dtype=x.dtype, device=arrays.device(x))
    return xp.concat((x, zeros), axis=-2)


def reorder(x: Array, order: AxisOrder | None) -> Array:
    """The rows of ``x`` of shape ``(..., n, k)`` in another axis order (a copy unless the order is the identity)."""
    if order is None:
        return x
    lead, digits = x.ndim - 2, len(order.radices)
    axes = (*range(lead), *(lead + i for i in order.axes), lead + digits)
    digits_of_x = x.reshape(*x.shape[:-2], *order.radices, x.shape[-1])
    return arrays.namespace(x).permute_dims(digits_of_x, axes).reshape(x.shape)


def cheapest_order(shapes: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """The order of least work for the factors of a Kronecker product, shapes ``(m_i, n_i)``.

    Exchanging two neighbours shows that ascending ``1/n_i - 1/m_i`` is optimal; equal factors go from the right.
    """
    key = {i: (1 / n - 1 / m if m and n else 0.0, -i) for i, (m, n) in enumerate(shapes)}
    return tuple(sorted(key, key=key.__getitem__))
