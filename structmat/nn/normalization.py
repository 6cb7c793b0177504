"""Weight normalisation: factors whose size is capped, with a learnable gain each, for long or fast training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from structmat.nn import huggingface
from structmat.nn.layer import StructuredLinear
from structmat.nn.scaling import sigma

EPS = 1e-8  # added to the mean square


class NormalizedLinear(StructuredLinear):
    """A :class:`StructuredLinear` with normalised factors; made by :func:`weight_norm`, not by its constructor.

    Beside ``factors`` and ``bias`` it has the parameter ``gains (number of factors,)``. ``operator`` is a copy: its arrays are
    the normalised factors.
    """

    gains: nn.Parameter

    def _values(self) -> list[Tensor]:
        return [
            w * (g / _excess(w, s)).to(w.dtype)
            for w, g, s in zip(self.factors, self.gains.unbind(), sigmas(self), strict=True)
        ]

    @property
    def config(self) -> dict[str, Any]:
        """As of :class:`StructuredLinear`, with ``weight_norm``."""
        return super().config | {"weight_norm": True}


def weight_norm(module: nn.Module) -> nn.Module:
    """Cap the size of every factor of the structured layers in a module; in place, and returned.

    In the forward pass a factor ``W`` is replaced by ``gain * W / max(1, rms(W) / sigma)`` with ``rms(W) = sqrt(mean(W**2) +
    1e-8)``, ``sigma`` the standard deviation that :func:`structmat.nn.initialize` gives it, and a learnable gain. The product
    of factors that all grow then cannot grow as their powers. Source: Qiu et al., "Compute Better Spent", ICML 2024 (arXiv
    2406.06248), which found it necessary for transformers with Block Tensor-Train layers.

    Parameters
    ----------
    module
        A :class:`StructuredLinear`, or a module with some. Its outputs do not change: where a factor is larger than its cap
        now, its gain starts at the ratio, else at 1. :func:`structmat.nn.param_groups` gives gains the base learning rate and
        no weight decay. Make the optimizer afterwards.

    Returns
    -------
    nn.Module
        ``module``. The layers save and load, convert to dense ones and copy as before; ``parallelize`` refuses them.

    Raises
    ------
    ValueError
        If there is no structured layer, or one is normalised already.
    TypeError
        If one is of a class of its own, such as a parallel layer.

    Examples
    --------
    >>> import torch, structmat.nn as snn
    >>> layer = snn.weight_norm(snn.StructuredLinear(64, 64, structure="btt"))
    >>> [name for name, _ in layer.named_parameters()]
    ['bias', 'gains', 'factors.0', 'factors.1']
    """
    layers = _layers(module, "weight_norm")
    if any(isinstance(m, NormalizedLinear) for m in layers):
        raise ValueError("weight_norm: a layer is normalised already")
    for layer in layers:
        if type(layer) is not StructuredLinear:
            raise TypeError(f"weight_norm: expected layers of StructuredLinear, got a {type(layer).__name__}")
    for layer in layers:
        with torch.no_grad():
            first = layer.factors[0]
            gains = torch.ones(len(layer.factors), dtype=first.dtype, device=first.device)
            if not first.is_meta:
                for i, (w, s) in enumerate(zip(layer.factors, sigmas(layer), strict=True)):
                    gains[i] = _excess(w, s)
        layer.register_parameter("gains", nn.Parameter(gains, first.requires_grad))
        layer.__class__ = NormalizedLinear
    huggingface.attach(module)
    return module


def remove_weight_norm(module: nn.Module) -> nn.Module:
    """Multiply gains and caps into the factors, which are ordinary ones again; in place, and returned.

    The parameters stay the same objects, and the outputs the same up to rounding. A factor that several layers share cannot
    take up the gains of each: ``ValueError``, and nothing is changed. Raises ``ValueError`` also if no layer is normalised.

    Examples
    --------
    >>> import torch, structmat.nn as snn
    >>> layer = snn.weight_norm(snn.StructuredLinear(64, 64, structure="btt"))
    >>> snn.remove_weight_norm(layer) is layer, hasattr(layer, "gains")
    (True, False)
    """
    layers = [m for m in _layers(module, "remove_weight_norm") if isinstance(m, NormalizedLinear)]
    if not layers:
        raise ValueError("remove_weight_norm: no layer is normalised")
    held = [id(w) for layer in layers for w in layer.factors]
    if len(set(held)) < len(held):
        raise ValueError("remove_weight_norm: layers share a factor, with gains of their own")
    for layer in layers:
        with torch.no_grad():
            for w, value in zip(layer.factors, layer._values(), strict=True):
                w.copy_(value)
        del layer.gains
        layer.__class__ = StructuredLinear  # pyright: ignore[reportAttributeAccessIssue]
    huggingface.attach(module)
    return module


def sigmas(layer: StructuredLinear) -> list[float]:
    """The cap of every factor by slot: the standard deviation at the start."""
    rule = "variance" if layer.init == "variance" else "spectral"
    caps = [1.0] * len(layer.factors)
    for factor in layer.program.factors:
        caps[factor.slot] = sigma(factor, rule)
    return caps


def _excess(w: Tensor, cap: float) -> Tensor:
    """How many times larger than its cap a factor is, and at least 1, which it is for one of no entries."""
    if not w.numel():
        return w.new_ones(())
    w = (
        w.float() if w.dtype in (torch.float16, torch.bfloat16) else w
    )  # in half precision EPS is 0, and squares overflow
    return ((w.abs().square().mean() + EPS).sqrt() / cap).clamp(min=1.0)


def _layers(module: nn.Module, name: str) -> list[StructuredLinear]:
    layers = [m for m in module.modules() if isinstance(m, StructuredLinear)]
    if not layers:
        raise ValueError(f"{name}: the module has no structured layer")
    return layers
