"""A batch through a Kronecker product of dense factors and its gradients, one factor at a time, without a transposition.

With the other digits gathered into ``before`` and ``after``, factor ``i`` is one batched product ``F_i z`` with ``z`` seen as
``(before, n_i, after)``, of stride 0 in ``F_i``. Only products and views, so that all of it is differentiable.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from structmat.backends.base import cheapest_order


class Step(NamedTuple):
    """One factor ``(m, n)`` applied between the digits before it and after it."""

    factor: int
    before: int
    after: int
    m: int
    n: int


@functools.lru_cache(maxsize=1024)
def steps(shapes: tuple[tuple[int, int], ...]) -> tuple[Step, ...]:
    """The steps in the order of least work."""
    sizes, found = [n for _, n in shapes], []
    for i in cheapest_order(shapes):
        m, n = shapes[i]
        found.append(Step(i, math.prod(sizes[:i]), math.prod(sizes[i + 1 :]), m, n))
        sizes[i] = m
    return tuple(found)


def run(x: Tensor, bias: Tensor | None, factors: Sequence[Tensor], columns: bool = False) -> Tensor:
    """``x A^T + bias`` for rows ``(B, n)``, or ``A x + bias`` for columns ``(n, B)``, ``A`` the product of ``factors``."""
    batch = x.shape[1 if columns else 0]
    m = math.prod(f.shape[0] for f in factors)
    z = x
    for step in _steps(factors):
        z = _applied(z, factors[step.factor], step, batch, columns)
    y = z.reshape((m, batch) if columns else (batch, m))
    if bias is not None:
        y = y + (bias[:, None] if columns else bias)
    return y


def gradients(
    x: Tensor, dy: Tensor, factors: Sequence[Tensor], needs: Sequence[bool], columns: bool = False
) -> list[Tensor | None]:
    """Gradients of the operand, the bias and the factors where ``needs`` says so."""
    if x.is_complex():  # torch's gradients are those of the conjugated map
        x, factors = x.conj().resolve_conj(), [f.conj().resolve_conj() for f in factors]
    batch, walk = x.shape[1 if columns else 0], _steps(factors)
    found: list[Tensor | None] = [None] * len(needs)
    found[1] = dy.sum(1 if columns else 0) if needs[1] else None
    wanted = [k for k, step in enumerate(walk) if needs[2 + step.factor]]
    inputs = [x]
    for step in walk[: max(wanted, default=0)]:
        inputs.append(_applied(inputs[-1], factors[step.factor], step, batch, columns))
    g, lowest = dy, 0 if needs[0] else min(wanted, default=len(walk))
    for k in range(len(walk) - 1, -1, -1):
        step = walk[k]
        if k in wanted:
            found[2 + step.factor] = _outer(g, inputs[k], step, batch, columns)
        if k > lowest or (k == 0 and needs[0]):
            back = step._replace(m=step.n, n=step.m)
            g = _applied(g, factors[step.factor].t(), back, batch, columns)
    found[0] = g.reshape(x.shape) if needs[0] else None
    return found


def _steps(factors: Sequence[Tensor]) -> tuple[Step, ...]:
    return steps(tuple((int(f.shape[0]), int(f.shape[1])) for f in factors))


def _applied(z: Tensor, factor: Tensor, step: Step, batch: int, columns: bool) -> Tensor:
    outer, inner = _around(step, batch, columns)
    if inner == 1 and not columns:
        return functional.linear(z.reshape(outer, step.n), factor)
    if columns and step.before == 1:
        return factor @ z.reshape(step.n, inner)
    return torch.bmm(factor.expand(outer, step.m, step.n), z.reshape(outer, step.n, inner))


def _outer(g: Tensor, z: Tensor, step: Step, batch: int, columns: bool) -> Tensor:
    """The sum of ``g z^T`` over the digits around the factor's own."""
    outer, inner = _around(step, batch, columns)
    if inner == 1 and not columns:
        return g.reshape(outer, step.m).t() @ z.reshape(outer, step.n)
    if columns and step.before == 1:
        return g.reshape(step.m, inner) @ z.reshape(step.n, inner).t()
    return torch.bmm(g.reshape(outer, step.m, inner), z.reshape(outer, step.n, inner).transpose(1, 2)).sum(0)


def _around(step: Step, batch: int, columns: bool) -> tuple[int, int]:
    """The batch stands before all digits of rows, and after all digits of columns."""
    return (step.before, step.after * batch) if columns else (batch * step.before, step.after)
