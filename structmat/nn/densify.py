"""Densify: structured layers multiplied out, and an optimizer that goes on with the result (reverse sparsification)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from structmat.nn.layer import StructuredLinear


def densify(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> nn.Module:
    """Replace every structured layer by the ``nn.Linear`` that it is equal to; in place, and returned.

    The sparse-to-dense half of Dao et al., "Monarch: Expressive Structured Matrices for Efficient and Accurate Training",
    ICML 2022, section 4: train structured for most of the steps, multiply out, go on dense.

    Parameters
    ----------
    model
        Any module; a layer that is used twice stays one layer. A model that is itself a structured layer comes back as another
        object.
    optimizer
        One that holds parameters of ``model``. The factors leave it with their state, moments of a factor being no moments of
        the product. The dense weights enter without state, so that Adam starts its averages anew for them: warm up for some
        steps. A weight's learning rate is what :func:`structmat.nn.param_groups` gives a dense layer, found from the factors'
        current one, and their group's other options; the weight decay is that of the product. Biases and all other
        parameters stay with their state.

    Returns
    -------
    nn.Module
        ``model``.

    Raises
    ------
    ValueError
        If there is no structured layer, or the optimizer holds some of a layer's factors only.

    Examples
    --------
    >>> import torch, structmat.nn as snn
    >>> model = torch.nn.Sequential(snn.StructuredLinear(8, 8), torch.nn.ReLU())
    >>> optimizer = torch.optim.AdamW(snn.param_groups(model, lr=0.01))
    >>> snn.densify(model, optimizer)[0], len(optimizer.param_groups)
    (Linear(in_features=8, out_features=8, bias=True), 2)
    """
    layers = {id(m): m for m in model.modules() if isinstance(m, StructuredLinear)}
    if not layers:
        raise ValueError("densify: the model has no structured layer")
    homes = {} if optimizer is None else _homes(optimizer, list(layers.values()))
    dense = {key: _dense(layer) for key, layer in layers.items()}
    if optimizer is not None:
        for key, layer in layers.items():
            _exchange(optimizer, layer, dense[key].weight, homes.get(key))
        optimizer.param_groups[:] = [g for g in optimizer.param_groups if g["params"]]
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if id(child) in dense:
                setattr(parent, name, dense[id(child)])
    return dense.get(id(model), model)


def _dense(layer: StructuredLinear) -> nn.Linear:
    """The dense layer with the structured one's own bias."""
    linear = layer.to_linear()
    linear.bias = layer.bias  # pyright: ignore[reportAttributeAccessIssue]
    return linear


def _homes(optimizer: torch.optim.Optimizer, layers: list[StructuredLinear]) -> dict[int, list[dict[str, Any]]]:
    """The groups that hold the factors of every layer; layers that the optimizer does not know are left out."""
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    homes = {}
    for layer in layers:
        groups = [group_of[id(f)] for f in layer.factors if id(f) in group_of]
        if groups and len(groups) != len(layer.factors):
            raise ValueError(
                f"densify: the optimizer holds {len(groups)} of the {len(layer.factors)} factors of {layer.structure} "
                f"{layer.out_features}x{layer.in_features}; was it made before the conversion?"
            )
        if groups:
            homes[id(layer)] = groups
    return homes


def _exchange(
    optimizer: torch.optim.Optimizer, layer: StructuredLinear, weight: torch.Tensor, groups: list[dict[str, Any]] | None
) -> None:
    """The factors leave the optimizer, the dense weight enters in a group of its own."""
    if groups is None:
        return
    from structmat.nn.scaling import multipliers

    first = groups[0]
    options = {k: v for k, v in first.items() if k not in ("params", "names", "multiplier", "param_names")}
    if (
        "multiplier" in first
    ):  # of param_groups: the rate of a dense layer is the factor's without what its structure brings
        rules = [multipliers(layer, rule)[0] for rule in ("adam", "sgd")]
        rule = rules[isinstance(optimizer, torch.optim.SGD)]
        options["lr"] = first["lr"] / rule
        if "initial_lr" in first:
            options["initial_lr"] = first["initial_lr"] / rule
        decayed = sum(g["lr"] * g.get("weight_decay", 0.0) for g in groups)
        options["weight_decay"] = (
            decayed / options["lr"] if options["lr"] else first.get("weight_decay", 0.0) * len(groups)
        )
        options |= {"multiplier": first["multiplier"] / rule, "names": ["weight"]}
    for factor, group in zip(layer.factors, groups, strict=True):
        place = next(i for i, p in enumerate(group["params"]) if p is factor)
        for key in ("params", "names", "param_names"):
            if len(group.get(key, ())) > place:
                del group[key][place]
        optimizer.state.pop(factor, None)
    named = "param_names" in first
    optimizer.add_param_group(options | {"params": [("weight", weight)] if named else [weight]})
