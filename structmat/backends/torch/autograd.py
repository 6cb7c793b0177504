"""The training path of a chain: saves its operand alone, and computes the intermediates again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from structmat.backends.torch import forward
from structmat.backends.torch.gradients import differentiable_gradients, gradients
from structmat.backends.torch.layout import Layout


def chain(x: Tensor, bias: Tensor | None, layout: Layout, factors: Sequence[Tensor], columns: bool = False) -> Tensor:
    """``x A^T + bias`` for rows ``(B, n)``, or ``A x + bias`` for columns ``(n, B)``: batch through the cache.

    Saves ``x`` alone. For tensors without a transform around them; see :func:`eager`. Differentiable twice.
    """
    if layout.plain and not columns:
        return forward.composed(x, bias, layout, factors)
    if wants_gradient(x, bias, *factors):
        return Chain.apply(x, bias, layout, columns, forward.run, gradients, *factors)  # pyright: ignore[reportReturnType]
    return forward.run(x, bias, layout, factors, columns)


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether a gradient may be asked of what is computed from these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def eager(*tensors: Tensor | None) -> bool:
    """Whether tensors are plain and nothing traces, transforms or counts: what an autograd Function is safe with."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        return False
    if transformed():
        return False
    if (
        torch._C._len_torch_dispatch_stack() or torch._C._is_torch_function_mode_enabled()
    ):  # FLOP counters, fake tensors
        return False
    return all(t is None or type(t) in (Tensor, torch.nn.Parameter) for t in tensors)


def transformed() -> bool:
    """Whether ``torch.func`` (vmap, grad, jvp, functionalize) or forward-mode differentiation is at work."""
    stack = torch._C._functorch.peek_interpreter_stack()  # pyright: ignore[reportAttributeAccessIssue]
    return stack is not None or torch.autograd.forward_ad._current_level >= 0


class Chain(torch.autograd.Function):
    """A chain as one node; what computes it forward and backward is given: plain functions, or the custom operators."""

    @staticmethod
    def forward(  # noqa: D102 (as in torch)
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        layout: Layout,
        columns: bool,
        run: Callable[..., Tensor],
        gradients: Callable[..., list[Tensor | None]],
        *factors: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, *factors)
        ctx.layout, ctx.columns, ctx.gradients = layout, columns, gradients
        return run(x, bias, layout, factors, columns)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:  # noqa: D102
        x, *factors = ctx.saved_tensors
        needs = (*ctx.needs_input_grad[:2], *ctx.needs_input_grad[6:])
        if torch.is_grad_enabled():  # the gradient is to be differentiated again
            found = differentiable_gradients(x, grads[0], ctx.layout, factors, ctx.columns)
        else:
            found = ctx.gradients(x, grads[0], ctx.layout, factors, needs, ctx.columns)
        dx, dbias, *dfactors = (g if need else None for g, need in zip(found, needs, strict=True))
        return dx, dbias, None, None, None, None, *dfactors
