"""What layers take from the torch backend: chains of block factors on rows ``(B, n)``."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from structmat.backends.torch import autograd
from structmat.backends.torch.autograd import eager as eager
from structmat.backends.torch.layout import End as End
from structmat.backends.torch.layout import Layout as Layout
from structmat.backends.torch.layout import layout_of as layout_of
from structmat.backends.torch.product import chain_product, takes_operator
from structmat.backends.torch.views import padded as padded
from structmat.backends.torch.views import reordered as reordered


def chain(x: Tensor, bias: Tensor | None, layout: Layout, factors: Sequence[Tensor]) -> Tensor:
    """``x A^T + bias`` for plain tensors: the custom operator on CUDA devices, the training path on the others."""
    if takes_operator(x) and not layout.plain:
        return chain_product(x, bias, layout, factors)
    return autograd.chain(x, bias, layout, factors)


def composed_chain(x: Tensor, bias: Tensor | None, layout: Layout, factors: Sequence[Tensor]) -> Tensor:
    """``x A^T + bias`` where tensors are not plain: the custom operator, or composed of products and views."""
    return chain_product(x, bias, layout, factors)
