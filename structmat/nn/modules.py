"""Modules: what counts as a dense linear layer, where it stands in a model, and putting another in its place."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from structmat.nn.layer import StructuredLinear


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is the ``Conv1D`` of transformers (GPT-2): a linear layer whose weight is ``(in, out)``."""
    home = sys.modules.get("transformers.pytorch_utils")  # where it is not loaded no module can be of its class
    return home is not None and isinstance(module, home.Conv1D)


def is_dense_linear(module: nn.Module) -> bool:
    """Whether a module is an ``nn.Linear``, a subclass of it or a ``Conv1D``."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def shape_of(module: Any) -> tuple[int, int]:
    """``(out, in)`` of a linear layer, dense or structured."""
    if is_conv1d(module):
        return int(module.weight.shape[1]), int(module.weight.shape[0])
    return int(module.out_features), int(module.in_features)


def weight_of(module: Any) -> torch.Tensor:
    """The weight ``(out, in)`` of a dense linear layer, detached."""
    weight = module.weight.detach()
    return weight.T if is_conv1d(module) else weight


def dense_class(module: nn.Module) -> str:
    """The class of dense layer that a structured layer stands for: ``"Linear"`` or ``"Conv1D"``."""
    return str(getattr(module, "dense_class", "Linear"))


def mark(layer: StructuredLinear, dense: str, record: Any = None) -> None:
    """Note on a layer what class of dense layer it stands for, and how it was converted; copies of it keep the notes."""
    vars(layer).update(dense_class=dense, record=record)


def to_dense(layer: StructuredLinear) -> nn.Module:
    """The dense layer of the class that a structured one stands for, multiplied out."""
    linear = layer.to_linear()
    if dense_class(layer) != "Conv1D":
        return linear
    from transformers.pytorch_utils import Conv1D

    made = Conv1D(linear.out_features, linear.in_features)
    made.weight = nn.Parameter(linear.weight.detach().T.contiguous(), requires_grad=linear.weight.requires_grad)
    zero = torch.zeros(linear.out_features, dtype=linear.weight.dtype, device=linear.weight.device)
    made.bias = nn.Parameter(zero) if linear.bias is None else linear.bias
    return made.train(layer.training)


def places(model: nn.Module, name: str) -> list[str]:
    """All names under which the module of a name stands in the model."""
    wanted = model.get_submodule(name)
    return [other for other, module in model.named_modules(remove_duplicate=False) if module is wanted]


def put(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """Put a module in the place of a name; returns the model, which is the module itself for the name ``""``."""
    if not name:
        return module
    parent, _, child = name.rpartition(".")
    model.get_submodule(parent)._modules[child] = module
    return model


def obstacle(model: nn.Module, name: str, module: nn.Module) -> str | None:
    """Why a linear layer cannot be replaced, in words for the plan; None where it can."""
    parent = model.get_submodule(name.rpartition(".")[0]) if name else None
    if isinstance(parent, nn.MultiheadAttention):
        return "fused attention reads the weight and never calls the layer; see unfuse_attention"
    if isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward:
        return f"{type(module).__name__} has a forward of its own"
    if parametrize.is_parametrized(module):
        return "parametrised: remove the parametrisation first"
    if isinstance(module, LazyModuleMixin):
        return "lazy: its size is not known before the first call"
    weight = module.weight
    if not (isinstance(weight, torch.Tensor) and weight.is_floating_point()):
        return f"its weight is not of floating-point numbers but {getattr(weight, 'dtype', type(weight).__name__)}"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "has hooks, which would be lost"
    return None


def tied_to(model: nn.Module) -> dict[str, str]:
    """For the name of every linear layer whose weight another module holds too the name of that other parameter."""
    holders: dict[int, list[tuple[str, int]]] = {}
    for path, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append((f"{path}.{key}" if path else key, id(module)))
    found = {}
    for path, module in model.named_modules():
        if is_dense_linear(module) and isinstance(module._parameters.get("weight"), nn.Parameter):
            others = [key for key, owner in holders[id(module.weight)] if owner != id(module)]
            if others:
                found[path] = others[0]
    return found
