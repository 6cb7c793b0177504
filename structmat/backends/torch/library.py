"""How an operator enters ``torch.library``: kernel, fake tensors, differentiation, autocast, vmap, flops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree
from torch.utils.flop_counter import register_flop_formula

from structmat.backends.torch import sharding
from structmat.backends.torch.autograd import transformed

LIBRARY = torch.library.Library("structmat", "FRAGMENT")
DEVICES = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}


def define(schema: str) -> None:
    """Declare an operator of the namespace ``structmat``."""
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))


def below_autograd() -> Any:
    """A context in which operators go to the kernels behind differentiation."""
    return torch._C._AutoDispatchBelowAutograd()


def register(
    name: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    composed: Callable[..., Any],
    differentiated: Callable[..., Any],
    flops: Callable[..., int],
) -> None:
    """Register what an operator does: on real tensors, on fake ones, under transforms, under autograd, in flop counters.

    ``composed`` does the same by differentiable operations of torch: it stands in under ``torch.func``, ``vmap`` and
    forward-mode differentiation. Autocast casts all floating operands but doubles.
    """
    LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")

    def autograd(*args: Any) -> Any:
        sharding.prepare(*args)
        return composed(*args) if transformed() else differentiated(*args)

    LIBRARY.impl(name, autograd, "Autograd")
    torch.library.register_fake(f"structmat::{name}", fake, lib=LIBRARY)
    operator = getattr(torch.ops.structmat, name)
    for device, key in DEVICES.items():
        LIBRARY.impl(name, _autocast(operator.default, device, key), key)
    LIBRARY.impl(name, composed, "FuncTorchBatched")
    register_flop_formula(operator)(flops)


def _autocast(operator: Any, device: str, key: str) -> Callable[..., Any]:
    """As autocast treats products: floating operands but doubles become of its dtype, the bias too."""
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def cast(x: Any) -> Any:
        eligible = isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
        return x.to(torch.get_autocast_dtype(device)) if eligible else x

    def call(*args: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            return operator(*_pytree.tree_map(cast, list(args)))

    return call
