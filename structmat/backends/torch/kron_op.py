"""``torch.ops.structmat.kron`` and its backward operator: a Kronecker product of dense factors as one node.

``kron(x, bias, factors, columns)`` is ``x A^T + bias`` for rows ``(B, n)``, or ``A x + bias`` for columns. ``kron_backward``
returns the gradients that ``needs`` asks for, of operand, bias and factors, in this order.
"""

# ruff: noqa: ARG001 (fake tensors and flop formulas are given what the operator is given)
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from structmat.backends.torch import fused, kron
from structmat.backends.torch.autograd import eager, wants_gradient
from structmat.backends.torch.library import below_autograd, define, register

define("kron(Tensor x, Tensor? bias, Tensor[] factors, bool columns=False) -> Tensor")
define("kron_backward(Tensor dy, Tensor x, Tensor[] factors, bool columns, bool[] needs) -> Tensor[]")


def product(x: Tensor, bias: Tensor | None, factors: Sequence[Tensor], columns: bool = False) -> Tensor:
    """``x A^T + bias``, or ``A x + bias`` for columns, through the operator."""
    return torch.ops.structmat.kron(x, bias, list(factors), columns)


# ---- what the operators do ------------------------------------------------------------------------------------------


def _kron(x: Tensor, bias: Tensor | None, factors: list[Tensor], columns: bool = False) -> Tensor:
    _check(x, bias, factors, columns)
    if not columns:
        y = fused.kron(x, bias, factors)
        if y is not None:
            return y
    y = kron.run(x, bias, factors, columns)
    return y if y.is_contiguous() else y.contiguous()


def _backward(dy: Tensor, x: Tensor, factors: list[Tensor], columns: bool, needs: Sequence[bool]) -> list[Tensor]:
    found = _composed_backward(dy, x, factors, columns, needs)
    return [g.contiguous() for g in found]


def _composed_backward(
    dy: Tensor, x: Tensor, factors: list[Tensor], columns: bool, needs: Sequence[bool]
) -> list[Tensor]:
    return [g for g in kron.gradients(x, dy, factors, needs, columns) if g is not None]


def _fake_kron(x: Tensor, bias: Tensor | None, factors: list[Tensor], columns: bool = False) -> Tensor:
    _check(x, bias, factors, columns)
    m = math.prod(int(f.shape[0]) for f in factors)
    return x.new_empty((m, x.shape[1]) if columns else (x.shape[0], m))


def _fake_backward(dy: Tensor, x: Tensor, factors: list[Tensor], columns: bool, needs: Sequence[bool]) -> list[Tensor]:
    m = math.prod(int(f.shape[0]) for f in factors)
    shapes = [x.shape, (m,), *(f.shape for f in factors)]
    return [x.new_empty(s) for s, need in zip(shapes, needs, strict=True) if need]


def _check(x: Tensor, bias: Tensor | None, factors: list[Tensor], columns: bool) -> None:
    """``ValueError`` where operand, bias or factors do not fit, ``TypeError`` for mixed dtypes or devices."""
    if not factors or any(f.ndim != 2 for f in factors):
        raise ValueError(f"kron: expected factors (m, n), got shapes {[tuple(f.shape) for f in factors]}")
    m, n = (math.prod(int(f.shape[i]) for f in factors) for i in range(2))
    if x.ndim != 2 or x.shape[0 if columns else 1] != n:
        expected = f"({n}, B)" if columns else f"(B, {n})"
        raise ValueError(f"kron: expected an operand of shape {expected}, got {tuple(x.shape)}")
    if bias is not None and tuple(bias.shape) != (m,):
        raise ValueError(f"kron: expected a bias of shape ({m},), got {tuple(bias.shape)}")
    dtypes = {t.dtype for t in (x, bias, *factors) if t is not None}
    if len(dtypes) > 1:
        raise TypeError(f"kron: expected one dtype, got {', '.join(sorted(map(str, dtypes)))}")
    devices = {t.device for t in (x, bias, *factors) if t is not None}
    if len(devices) > 1:
        raise TypeError(f"kron: expected one device, got {', '.join(sorted(map(str, devices)))}")


# ---- differentiation ----------------------------------------------------------------------------------------------------


class Kron(torch.autograd.Function):
    """A Kronecker product as one node that saves its operand alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, columns: bool, *factors: Tensor) -> Tensor:  # noqa: D102
        ctx.save_for_backward(x, *factors)
        ctx.columns = columns
        return _below(x, bias, list(factors), columns)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:  # noqa: D102
        x, *factors = ctx.saved_tensors
        needs = [*ctx.needs_input_grad[:2], *ctx.needs_input_grad[3:]]
        if torch.is_grad_enabled():  # the gradient is to be differentiated again
            dx, dbias, *rest = kron.gradients(x, grads[0], factors, needs, ctx.columns)
        else:
            found = iter(torch.ops.structmat.kron_backward(grads[0], x, factors, ctx.columns, needs))
            dx, dbias, *rest = (next(found) if need else None for need in needs)
        return dx, dbias, None, *rest


def _below(x: Tensor, bias: Tensor | None, factors: list[Tensor], columns: bool) -> Tensor:
    with below_autograd():
        if eager(x, bias, *factors):  # nothing is between here and the kernel
            return _kron(x, bias, factors, columns)
        return torch.ops.structmat.kron(x, bias, factors, columns)


def _differentiated(x: Tensor, bias: Tensor | None, factors: list[Tensor], columns: bool = False) -> Tensor:
    if wants_gradient(x, bias, *factors):
        return Kron.apply(x, bias, columns, *factors)  # pyright: ignore[reportReturnType]
    return _below(x, bias, factors, columns)


def _differentiated_backward(
    dy: Tensor, x: Tensor, factors: list[Tensor], columns: bool, needs: Sequence[bool]
) -> list[Tensor]:
    if wants_gradient(dy, x, *factors):
        return _composed_backward(dy, x, factors, columns, needs)
    with below_autograd():
        return torch.ops.structmat.kron_backward(dy, x, factors, columns, needs)


# ---- flops ----------------------------------------------------------------------------------------------------------------


def _sizes(factors: Any) -> list[tuple[int, int]]:
    """Place and multiply-adds for one sample of every step, in the order in which the factors are applied."""
    return [(s.factor, s.before * s.after * s.m * s.n) for s in kron.steps(tuple((f[0], f[1]) for f in factors))]


def _flops(x: Any, bias: Any, factors: Any, columns: bool = False, **_: Any) -> int:
    return 2 * x[1 if columns else 0] * sum(size for _, size in _sizes(factors))


def _backward_flops(dy: Any, x: Any, factors: Any, columns: bool, needs: Sequence[bool], **_: Any) -> int:
    """What is computed again below the last wanted factor, ``g z^T`` of every one, ``F^T g`` as far as it is needed."""
    sizes = _sizes(factors)
    wanted = [k for k, (i, _) in enumerate(sizes) if needs[2 + i]]
    lowest = 0 if needs[0] else wanted[0] + 1 if wanted else len(sizes)
    parts = [sizes[: wanted[-1]] if wanted else [], [sizes[k] for k in wanted], sizes[lowest:]]
    return 2 * x[1 if columns else 0] * sum(size for part in parts for _, size in part)


register("kron", _kron, _fake_kron, kron.run, _differentiated, _flops)
register("kron_backward", _backward, _fake_backward, _composed_backward, _differentiated_backward, _backward_flops)
