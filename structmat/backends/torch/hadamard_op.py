"""``torch.ops.structmat.hadamard``: a multiple of Sylvester's Hadamard matrix, its own transpose and so its own backward.

``hadamard(x, scale, columns)`` is ``scale H x`` for rows ``(B, n)`` or columns ``(n, B)``, ``n`` a power of two; one kernel on
a CUDA device, two products elsewhere.
"""

# ruff: noqa: ARG001 (fake tensors and flop formulas are given what the operator is given)
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from structmat.backends.torch import fused, kron
from structmat.backends.torch.autograd import wants_gradient
from structmat.backends.torch.library import below_autograd, define, register

define("hadamard(Tensor x, float scale, bool columns=False) -> Tensor")


def product(x: Tensor, scale: float, columns: bool = False) -> Tensor:
    """``scale H x`` through the operator."""
    return torch.ops.structmat.hadamard(x, scale, columns)


def scale_of(factors: Sequence[Tensor]) -> float | None:
    """The multiple of the Hadamard matrix that a Kronecker product is; None for others, and where gradients are wanted.

    Reads the values, once for a plan.
    """
    plain = all(type(f) is Tensor and f.shape == (2, 2) and not f.requires_grad and not f.is_meta for f in factors)
    if len(factors) < 2 or not plain or factors[0].is_complex():
        return None
    scale = 1.0
    for (a, b), (c, d) in torch.stack(list(factors)).double().tolist():
        if not a == b == c == -d:
            return None
        scale *= a
    return scale


def _composed(x: Tensor, scale: float, columns: bool = False) -> Tensor:
    n = _size(x, columns)
    if x.dtype in (torch.float16, torch.bfloat16):  # sums without the scale may be too large for 16 bits
        return _composed(x.float(), scale, columns).to(x.dtype)
    low = 1 << ((n.bit_length() - 1) // 2)
    factors = [_sylvester(n // low, x) * scale, _sylvester(low, x)]
    return kron.run(x, None, factors, columns)


def _sylvester(n: int, like: Tensor) -> Tensor:
    matrix = torch.ones(1, 1, dtype=like.dtype, device=like.device)  # nothing comes from the host: graphs capture it
    while matrix.shape[0] < n:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def _hadamard(x: Tensor, scale: float, columns: bool = False) -> Tensor:
    n = _size(x, columns)
    y = None if columns else fused.hadamard(x, n, scale)
    return _composed(x, scale, columns).contiguous() if y is None else y


def _fake(x: Tensor, scale: float, columns: bool = False) -> Tensor:
    _size(x, columns)
    return x.new_empty(x.shape)


def _size(x: Tensor, columns: bool) -> int:
    n = int(x.shape[0 if columns else 1]) if x.ndim == 2 else 0
    if n < 1 or n & (n - 1) or not (x.is_floating_point() or x.is_complex()):
        expected = "(n, B)" if columns else "(B, n)"
        raise ValueError(
            f"hadamard: expected floating {expected} with n a power of two, got {x.dtype} {tuple(x.shape)}"
        )
    return n


class Hadamard(torch.autograd.Function):
    """The transform as one node that saves nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, columns: bool) -> Tensor:  # noqa: D102
        ctx.scale, ctx.columns = scale, columns
        with below_autograd():
            return product(x, scale, columns)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:  # noqa: D102
        return product(grads[0], ctx.scale, ctx.columns), None, None


def _differentiated(x: Tensor, scale: float, columns: bool = False) -> Tensor:
    if wants_gradient(x):
        return Hadamard.apply(x, scale, columns)  # pyright: ignore[reportReturnType]
    with below_autograd():
        return product(x, scale, columns)


def _flops(x: Any, scale: float, columns: bool = False, **_: Any) -> int:
    """Sums and differences of the fast transform."""
    n = x[0 if columns else 1]
    return x[0] * x[1] * (n.bit_length() - 1)


register("hadamard", _hadamard, _fake, _composed, _differentiated, _flops)
