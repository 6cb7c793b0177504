"""``torch.ops.structmat.chain`` and its backward operator: one node for compilers, profilers, modes and subclasses.

``chain(x, bias, factors, layout, columns)`` is ``x A^T + bias`` for rows ``(B, n)``, or ``A x + bias`` for columns; ``factors``
are ``(blocks, b, c)`` and ``layout`` the integers of :func:`structmat.backends.torch.layout.encoded`. ``chain_backward``
returns the gradients that ``needs`` asks for, of operand, bias and factors, in this order.

Under ``torch.func`` and forward-mode differentiation both are composed of products and views instead: an operator with a
backward formula alone raises there, or gives tangents of zero without a word (pytorch issues 168393 and 170834).
"""

# ruff: noqa: ARG001 (fake tensors and flop formulas are given what the operator is given)
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from structmat.backends.torch import forward, fused
from structmat.backends.torch.autograd import Chain, eager, wants_gradient
from structmat.backends.torch.gradients import differentiable_gradients, gradients
from structmat.backends.torch.layout import Layout, decoded, fitted
from structmat.backends.torch.library import below_autograd, define, register

define("chain(Tensor x, Tensor? bias, Tensor[] factors, int[] layout, bool columns=False) -> Tensor")
define(
    "chain_backward(Tensor dy, Tensor x, Tensor[] factors, int[] layout, bool columns, bool[] needs) -> Tensor[]",
)


def product(x: Tensor, bias: Tensor | None, layout: Layout, factors: Sequence[Tensor], columns: bool = False) -> Tensor:
    """``x A^T + bias``, or ``A x + bias`` for columns, through the operator."""
    return torch.ops.structmat.chain(x, bias, list(factors), layout.code, columns)


# ---- what the operators do ------------------------------------------------------------------------------------------


def _chain(x: Tensor, bias: Tensor | None, factors: list[Tensor], code: Sequence[int], columns: bool = False) -> Tensor:
    layout = _checked(x, bias, factors, code, columns)
    if not columns:
        y = fused.chain(x, bias, layout, factors)
        if y is not None:
            return y
    return forward.run(x, bias, layout, factors, columns)


def _backward(
    dy: Tensor, x: Tensor, factors: list[Tensor], code: Sequence[int], columns: bool, needs: Sequence[bool]
) -> list[Tensor]:
    layout = _checked(x, None, factors, code, columns)
    return [g for g in gradients(x, dy, layout, factors, needs, columns) if g is not None]


def _fake_chain(
    x: Tensor, bias: Tensor | None, factors: list[Tensor], code: Sequence[int], columns: bool = False
) -> Tensor:
    layout = _checked(x, bias, factors, code, columns)
    return x.new_empty((layout.rows, x.shape[1]) if columns else (x.shape[0], layout.rows))


def _fake_backward(
    dy: Tensor, x: Tensor, factors: list[Tensor], code: Sequence[int], columns: bool, needs: Sequence[bool]
) -> list[Tensor]:
    layout = decoded(tuple(code))
    shapes = [x.shape, (layout.rows,), *layout.shapes]
    return [x.new_empty(s) for s, need in zip(shapes, needs, strict=True) if need]


def _checked(x: Tensor, bias: Tensor | None, factors: list[Tensor], code: Sequence[int], columns: bool) -> Layout:
    """The layout; ``ValueError`` where operand, bias or factors do not fit it, ``TypeError`` for mixed dtypes or devices."""
    layout = _layout(factors, code)
    if x.ndim != 2 or x.shape[0 if columns else 1] != layout.cols:
        expected = f"({layout.cols}, B)" if columns else f"(B, {layout.cols})"
        raise ValueError(f"chain: expected an operand of shape {expected}, got {tuple(x.shape)}")
    if bias is not None and tuple(bias.shape) != (layout.rows,):
        raise ValueError(f"chain: expected a bias of shape ({layout.rows},), got {tuple(bias.shape)}")
    dtypes = {t.dtype for t in (x, bias, *factors) if t is not None}
    if len(dtypes) > 1:
        raise TypeError(f"chain: expected one dtype, got {', '.join(sorted(map(str, dtypes)))}")
    devices = {t.device for t in (x, bias, *factors) if t is not None}
    if len(devices) > 1:
        raise TypeError(f"chain: expected one device, got {', '.join(sorted(map(str, devices)))}")
    return layout


def _layout(factors: Sequence[Tensor], code: Sequence[int]) -> Layout:
    shapes: Any = tuple(tuple(int(n) for n in f.shape) for f in factors)
    return fitted(tuple(code), shapes)


# ---- differentiation ----------------------------------------------------------------------------------------------------


def _composed(
    x: Tensor, bias: Tensor | None, factors: list[Tensor], code: Sequence[int], columns: bool = False
) -> Tensor:
    return forward.composed(x, bias, decoded(tuple(code)), factors, columns)


def _differentiated(
    x: Tensor, bias: Tensor | None, factors: list[Tensor], code: Sequence[int], columns: bool = False
) -> Tensor:
    layout = decoded(tuple(code))
    if wants_gradient(x, bias, *factors):
        return Chain.apply(x, bias, layout, columns, _below, _gradients, *factors)  # pyright: ignore[reportReturnType]
    return _below(x, bias, layout, factors, columns)


def _below(x: Tensor, bias: Tensor | None, layout: Layout, factors: Sequence[Tensor], columns: bool) -> Tensor:
    with below_autograd():
        if eager(x, bias, *factors):  # nothing is between here and the kernel
            return _chain(x, bias, list(factors), layout.code, columns)
        return product(x, bias, layout, factors, columns)


def _gradients(
    x: Tensor, dy: Tensor, layout: Layout, factors: Sequence[Tensor], needs: Sequence[bool], columns: bool
) -> list[Tensor | None]:
    found = iter(torch.ops.structmat.chain_backward(dy, x, list(factors), layout.code, columns, list(needs)))
    return [next(found) if need else None for need in needs]


def _composed_backward(
    dy: Tensor, x: Tensor, factors: list[Tensor], code: Sequence[int], columns: bool, needs: Sequence[bool]
) -> list[Tensor]:
    found = differentiable_gradients(x, dy, decoded(tuple(code)), factors, columns)
    return [g for g, need in zip(found, needs, strict=True) if need]


def _differentiated_backward(
    dy: Tensor, x: Tensor, factors: list[Tensor], code: Sequence[int], columns: bool, needs: Sequence[bool]
) -> list[Tensor]:
    if wants_gradient(dy, x, *factors):
        return _composed_backward(dy, x, factors, code, columns, needs)
    with below_autograd():
        return torch.ops.structmat.chain_backward(dy, x, factors, code, columns, needs)


# ---- flops ----------------------------------------------------------------------------------------------------------------


def _flops(x: Any, bias: Any, factors: Any, code: Sequence[int], columns: bool = False, **_: Any) -> int:
    layout = decoded(tuple(code))
    return 2 * x[1 if columns else 0] * sum(p.nparams for p in layout.patterns)


def _backward_flops(
    dy: Any, x: Any, factors: Any, code: Sequence[int], columns: bool, needs: Sequence[bool], **_: Any
) -> int:
    """What is computed again, ``g z^T`` of every factor that needs it, and ``K^T g`` as far as any gradient is needed."""
    sizes = [p.nparams for p in decoded(tuple(code)).patterns]
    wanted = [i for i, need in enumerate(needs[2:]) if need]
    again = sum(sizes[wanted[0] + 1 :]) if wanted else 0
    down = sum(sizes) if needs[0] else sum(sizes[: wanted[-1]]) if wanted else 0
    return 2 * x[1 if columns else 0] * (again + sum(sizes[i] for i in wanted) + down)


register("chain", _chain, _fake_chain, _composed, _differentiated, _flops)
register("chain_backward", _backward, _fake_backward, _composed_backward, _differentiated_backward, _backward_flops)
